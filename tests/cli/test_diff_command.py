"""`latentkit diff` compares two of whatever `inspect` knows, and says what they are where that is not the same."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import family
import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from latentkit.checkpoints.adapters.control_files import write_control
from latentkit.checkpoints.adapters.lora_files import write_lora
from latentkit.checkpoints.files import save_model
from latentkit.checkpoints.ldm_file import write_single
from latentkit.checkpoints.lone import write_first_stage
from latentkit.checkpoints.names.rename import given
from latentkit.checkpoints.names.tiny_names import AUTHOR, tiny_pairs
from latentkit.checkpoints.storage.archive import read_archive
from latentkit.cli import application
from latentkit.nets.controlnet import ControlNet
from latentkit.nets.lora import Change
from latentkit.nets.tiny import TinyAutoencoder, TinyConfig

WEIGHT = "denoiser.unet.down.0.blocks.0.residual.conv_in.weight"


def diff(*words: Any) -> tuple[int, str]:
    done = CliRunner().invoke(application(), ["diff", *map(str, words)])
    return done.exit_code, done.output + str(done.exception or "")


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of each kind one and its copy in another layout, where there is one, and `-b` that differs in one tensor."""
    root = tmp_path_factory.mktemp("files")
    torch.manual_seed(0)
    model = family.model("SD 1")
    save_model(root / "base", model, {}, torch.float32)
    write_single(root / "model-a", model, "x")
    save_model(root / "model-c", model, {}, torch.float32)
    write_first_stage(root / "vae-a", model.first_stage, "ldm")
    write_first_stage(root / "vae-c", model.first_stage, "diffusers")
    unet = {name: part for name, part in load_file(root / "model-a").items() if name.startswith("model.")}
    save_file(unet, root / "unet-a")
    save_file({name.removeprefix("model.diffusion_model."): part for name, part in unet.items()}, root / "unet-c")
    network = ControlNet(family.UNET)
    write_control(root / "control-a", network, "ldm")
    write_control(root / "control-c", network, "diffusers")
    change = Change(torch.randn(4, 32, 3, 3), torch.randn(32, 4, 1, 1), alpha=2.0)
    write_lora(root / "lora-a", model, {WEIGHT: change}, "kohya")
    write_lora(root / "lora-c", model, {WEIGHT: change}, "diffusers")
    write_lora(root / "lora-b", model, {WEIGHT: replace(change, alpha=1.0)}, "kohya")
    save_file({"emb_params": torch.ones(2, 768)}, root / "inversion-a")
    save_file({"cat": torch.ones(2, 768)}, root / "inversion-c")
    tiny = TinyAutoencoder(TinyConfig((1, 2), channels=16))
    save_file(given(tiny_pairs(tiny, AUTHOR), tiny.state_dict()), root / "tiny-a")
    (root / "tiny-c").write_bytes((root / "tiny-a").read_bytes())
    for path in root.glob("*-a"):
        if path.name != "lora-a":
            tensors = load_file(path)
            name = max(tensors, key=lambda one: tensors[one].numel())
            save_file(
                tensors | {name: tensors[name] + 1}, path.with_name(path.name[:-1] + "b"), read_archive(path).metadata
            )
    return root


@pytest.mark.parametrize("kind", ["model", "vae", "unet", "control", "lora", "inversion", "tiny"])
def test_two_of_a_kind(kind: str, files: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(files)
    base = ("--base", "base") if kind in ("control", "lora") else ()
    if kind == "unet":  # of no released shape: it takes the model's
        from latentkit.checkpoints import lone

        monkeypatch.setattr(lone, "_unet", lambda *_: family.UNET)
    code, said = diff(f"{kind}-a", f"{kind}-c", *base)
    assert code == 0, said
    assert "0 of " in said
    code, said = diff(f"{kind}-a", f"{kind}-b", *base)
    assert code == 1, said
    assert "largest difference" in said
    assert "\n1 of " in said


def test_scales_of_latents_that_both_say(files: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(files)
    write_first_stage(files / "vae-x", family.model("SD 1", scale=0.5).first_stage, "diffusers")
    code, said = diff("vae-c", "vae-x")
    assert code == 1
    assert "statistics differs: " in said


def test_two_of_different_kinds_and_other_settings(files: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(files)
    code, said = diff("vae-a", "tiny-a")
    assert code != 0
    assert "vae-a is a first stage alone and tiny-a is a tiny autoencoder; give two of a kind" in said
    model = family.model("SD 1")
    model.architecture = replace(model.architecture, prediction="v")
    save_model(files / "model-v", model, {}, torch.float32)
    code, said = diff("model-c", "model-v")
    assert code == 1
    assert "prediction differs: eps and v\n0 of " in said
