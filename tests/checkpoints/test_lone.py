"""Autoencoders and U-Nets that come without the rest of a model: known, measured, converted, put into models."""

import json
import math
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import family
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from typer.testing import CliRunner

from latentkit.checkpoints.diffusers_folder import write_folder
from latentkit.checkpoints.exchange import with_part
from latentkit.checkpoints.files import Shapes, load_autoencoder, save_autoencoder
from latentkit.checkpoints.layouts import report
from latentkit.checkpoints.ldm_file import write_single
from latentkit.checkpoints.lone import lone_first_stage, lone_part
from latentkit.checkpoints.names import diffusers_names, ldm_names
from latentkit.checkpoints.names.rename import given
from latentkit.cli import application
from latentkit.errors import InputError
from latentkit.evaluation.first_stage import open_first_stage
from latentkit.model.presets import FIRST_STAGES, PRESETS, Preset
from latentkit.nets.autoencoder import Autoencoder
from latentkit.nets.unet import UNet

VAE, UNET = "first_stage_model.", "model.diffusion_model."


@pytest.fixture(autouse=True)
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    """The tiny families are presets."""
    for name, architecture in family.ARCHITECTURES.items():
        monkeypatch.setitem(PRESETS, name, Preset(architecture))
    monkeypatch.setitem(FIRST_STAGES, "kl", family.KL)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The parts of one model in every form."""
    root, model = tmp_path_factory.mktemp("lone"), family.model("SD 1")
    write_single(root / "whole.safetensors", model, "test")
    write_folder(root / "folder", model)
    whole = load_file(root / "whole.safetensors")

    def part(prefix: str, bare: bool) -> dict[str, Tensor]:
        return {n.removeprefix(prefix if bare else ""): t for n, t in whole.items() if n.startswith(prefix)}

    save_file(part(VAE, True) | {"loss.logvar": torch.zeros(())}, root / "bare-vae.safetensors")
    save_file(part(VAE, False), root / "vae.safetensors")
    save_file(part(UNET, True), root / "bare-unet.safetensors")
    save_file(part(UNET, False), root / "unet.safetensors")
    torch.save({"state_dict": part(VAE, True)}, root / "vae.ckpt")
    made = {name: root / f"{name}.safetensors" for name in ("bare-vae", "vae", "bare-unet", "unet", "whole")}
    made |= {"folder": root / "folder", "vae.ckpt": root / "vae.ckpt"}
    for name in ("vae", "unet"):
        made[f"folder of a {name}"] = root / "folder" / name
        weights = root / "folder" / name / "diffusion_pytorch_model.safetensors"
        made[f"file beside its config of a {name}"] = weights
        made[f"file alone of a {name}"] = root / f"alone-{name}.safetensors"
        made[f"file alone of a {name}"].write_bytes(weights.read_bytes())
    return made


STAGES = [
    "bare-vae", "vae", "vae.ckpt", "folder of a vae", "file beside its config of a vae", "file alone of a vae",
]  # fmt: skip
UNETS = ["bare-unet", "unet", "folder of a unet", "file beside its config of a unet", "file alone of a unet"]


@pytest.mark.parametrize("form", STAGES)
def test_an_autoencoder_alone_is_known_and_used(form: str, files: dict[str, Path]) -> None:
    found = report(files[form])
    assert found["kind"] == "first stage alone (kl)"
    assert (found["wrong"], found["suspicious"]) == ([], {})
    assert found["ignored"] == ({"what takes no part": ["loss.logvar"]} if form == "bare-vae" else {})
    assert found["parts"]["first stage"]["picture"][0] == "4 latent channels, 2 pixels to a cell"
    stage = open_first_stage(files[form], "cpu").first_stage
    ours = family.model("SD 1").first_stage
    assert stage.autoencoder is not None
    assert ours.autoencoder is not None
    theirs = stage.autoencoder.state_dict()
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in ours.autoencoder.state_dict().items())
    said = "config" in form or "folder" in form
    assert stage.latent_std[0] == pytest.approx(1 / 0.18215 if said else 1.0)


@pytest.mark.parametrize("form", UNETS)
def test_a_unet_alone_is_known_and_put_into_a_model(form: str, files: dict[str, Path]) -> None:
    found = report(files[form])
    assert found["kind"].startswith("U-Net alone (SD 1")
    assert not found["wrong"]
    other = family.model("SD 1")
    for parameter in other.denoiser.parameters():
        parameter.data.zero_()
    made = with_part(other, files[form], "unet")
    assert made.architecture == other.architecture
    one, two = family.model("SD 1").state_dict(), made.state_dict()
    assert all(torch.equal(tensor, two[name]) for name, tensor in one.items())


def test_whole_models_and_other_files_are_no_part(files: dict[str, Path], tmp_path: Path) -> None:
    control = tmp_path / "control.safetensors"
    save_file({**load_file(files["bare-unet"]), "zero_convs.0.0.weight": torch.ones(1)}, control)
    for path in (files["whole"], files["folder"], control):
        assert lone_part(path) is None
    with pytest.raises(InputError, match="is a whole model; wanted is a U-Net alone"):
        with_part(family.model("SD 1"), files["whole"], "unet")


def command(*arguments: Any) -> tuple[int, str]:
    result = CliRunner().invoke(application(), [str(argument) for argument in arguments])
    return result.exit_code, result.output + (str(result.exception) if result.exception else "")


def test_convert_puts_parts_into_a_model(files: dict[str, Path], tmp_path: Path) -> None:
    blank, made = family.model("SD 1"), tmp_path / "made.safetensors"
    for parameter in (*blank.denoiser.parameters(), *blank.first_stage.parameters()):
        parameter.data.zero_()
    write_single(tmp_path / "blank.safetensors", blank, "test")
    code, said = command(
        "convert", tmp_path / "blank.safetensors", made, "--to", "ldm", "--vae", files["vae"], "--unet", files["unet"]
    )
    assert code == 0, said
    assert f"bit for bit the same as in {tmp_path / 'blank.safetensors'} with {files['vae']} and" in said.replace(
        "\n", ""
    )
    assert "left aside" not in said
    assert command("diff", files["whole"], made)[0] == 0
    for option, part, message in (
        ("vae", "unet", "is a U-Net alone; wanted is an autoencoder"),
        ("unet", "vae", "is an autoencoder alone; wanted is a U-Net alone"),
    ):
        code, said = command(
            "convert", tmp_path / "blank.safetensors", tmp_path / "x", "--to", "ldm", f"--{option}", files[part]
        )
        assert code != 0
        assert message in said
        assert not (tmp_path / "x").exists()
    code, said = command("convert", files["unet"], tmp_path / "x", "--to", "ldm")
    assert code != 0
    assert "U-Net alone; to put it into a model: latentkit convert MODEL" in said
    assert "--unet" in said
    for part, option in (("vae", "vae"), ("unet", "unet")):
        code, said = command("convert", files[part], tmp_path / "x", "--to", "ldm", "--lora", "style.safetensors")
        assert code != 0
        assert "alone, which takes no --lora; to put it into a model" in said
        assert f"--{option} {files[part]}" in said
        assert not (tmp_path / "x").exists()
    assert "takes no --averaged" in command("convert", files["vae"], tmp_path / "x", "--to", "ldm", "--averaged")[1]
    code, said = command("inspect", files["bare-vae"])
    assert code == 0, said
    assert "first stage alone (kl)" in said


def test_what_the_parts_files_leave_aside_is_said_by_name(files: dict[str, Path], tmp_path: Path) -> None:
    unet, whole, own = (tmp_path / f"{name}.safetensors" for name in ("unet", "whole", "own"))
    save_file(load_file(files["unet"]) | {"model_ema.decay": torch.ones(())}, unet)
    save_file(load_file(files["whole"]) | {"betas": torch.ones(1)}, whole)
    save_autoencoder(own, family.model("SD 1").first_stage, {})
    for vae, line in (
        (files["bare-vae"], "what takes no part: loss.logvar"),
        (whole, "buffers of the noise schedule: betas"),
        (own, None),
        (files["folder"], None),
    ):
        code, said = command("convert", whole, tmp_path / "new", "--to", "diffusers", "--vae", vae, "--unet", unet)
        assert code == 0, said
        lines = [line for line in said.splitlines() if "left aside" in line]
        wanted = [
            "  left aside: buffers of the noise schedule: betas",
            *([f"  left aside of {vae}: {line}"] if line else []),
        ]
        assert lines == [*wanted, f"  left aside of {unet}: what takes no part: model_ema.decay"]
        shutil.rmtree(tmp_path / "new")


@pytest.mark.parametrize("to", ["ldm", "diffusers", "latentkit"])
def test_an_autoencoder_alone_is_converted_alone(to: str, files: dict[str, Path], tmp_path: Path) -> None:
    code, said = command("convert", files["folder of a vae"], tmp_path / "made", "--to", to, "--dtype", "float16")
    assert code == 0, said
    assert "bit for bit the same" in said
    made = load_autoencoder(tmp_path / "made") if to == "latentkit" else lone_first_stage(tmp_path / "made")
    assert made is not None
    if to == "diffusers":
        assert json.loads((tmp_path / "made" / "config.json").read_text())["scaling_factor"] == 0.18215
        import diffusers

        kind: Any = diffusers.AutoencoderKL
        _, found = kind.from_pretrained(tmp_path / "made", output_loading_info=True)
        assert not any(found[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys")), found


def test_parts_that_do_not_fit_are_refused(files: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(
        InputError,
        match=r"latents of 4 channels, 2x2 pixels each, of 3 in pictures; the model draws latents of 3 channels, 2x2",
    ):
        with_part(family.model("classes"), files["vae"], "vae")
    with pytest.raises(InputError, match=r"takes 4 channels, context 32, vector None; the model's takes 4, 48, None"):
        with_part(family.model("SD 2"), files["unet"], "unet")
    inpainting = tmp_path / "inpainting.safetensors"
    write_single(inpainting, family.model("SD 1 inpainting"), "test")
    unet = {name: tensor for name, tensor in load_file(inpainting).items() if name.startswith(UNET)}
    save_file(unet, inpainting)
    made = with_part(family.model("SD 1"), inpainting, "unet")
    assert made.architecture == family.ARCHITECTURES["SD 1 inpainting"]


@pytest.mark.parametrize("kind", ["dropped", "renamed", "NaN", "cut"])
@pytest.mark.parametrize("form", ["bare-vae", "file beside its config of a vae", "unet", "file alone of a unet"])
def test_mutations_are_named(kind: str, form: str, files: dict[str, Path], tmp_path: Path) -> None:
    tensors = load_file(files[form])
    (tmp_path / "config.json").write_text(json.dumps({}))
    if "config" in form:
        (tmp_path / "config.json").write_text((files[form].parent / "config.json").read_text())
    name = sorted(n for n in tensors if "middle_block.0" in n or "mid_block.resnets.0" in n or "mid.block_1" in n)[0]
    tensor = tensors.pop(name)
    if kind != "dropped":
        changed = {"renamed": tensor, "NaN": torch.full_like(tensor, math.nan), "cut": tensor[:-1].clone()}[kind]
        tensors[name + ("x" if kind == "renamed" else "")] = changed
    path = tmp_path / "model.safetensors"
    save_file(tensors, path)
    assert any(name in line for line in report(path)["wrong"])
    assert command("inspect", path)[0] == 1


@pytest.mark.parametrize("name", FIRST_STAGES)
@pytest.mark.parametrize("layout", ["ldm", "diffusers"])
def test_every_released_first_stage_is_known_alone(
    name: str, layout: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with torch.device("meta"), Shapes():
        network = Autoencoder(FIRST_STAGES[name])
    names = ldm_names if layout == "ldm" else diffusers_names
    tensors = given(names.autoencoder_pairs(network), network.state_dict())
    known(name, tensors, tmp_path, monkeypatch)


@pytest.mark.parametrize("name", ["sd1.5", "sd2.1-base", "sdxl", "sdxl-refiner", "x4-upscaler", "celeba256"])
@pytest.mark.parametrize("layout", ["ldm", "diffusers"])
def test_released_unets_are_known_alone(
    name: str, layout: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with torch.device("meta"), Shapes():
        network = UNet(PRESETS[name].architecture.network)
    pairs = ldm_names.unet_pairs(network) if layout == "ldm" else diffusers_names.unet_pairs(network)
    known(name, given(pairs, network.state_dict()), tmp_path, monkeypatch)


def known(name: str, tensors: dict[str, Tensor], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from latentkit.checkpoints import lone
    from latentkit.checkpoints.storage.archive import Archive

    monkeypatch.setattr(lone, "read_archive", lambda _: Archive(tensors))
    found = lone_part(tmp_path / "file.safetensors")
    assert found is not None
    assert not found.complaints
    assert name in found.name.split(", ")


def test_what_no_preset_has_needs_its_config(files: dict[str, Path], tmp_path: Path) -> None:
    path = tmp_path / "vae.safetensors"
    with torch.device("meta"), Shapes():
        network = Autoencoder(replace(family.KL, channels=64))
    tensors = given(diffusers_names.autoencoder_pairs(network), network.state_dict())
    save_file({name: torch.zeros(tensor.shape) for name, tensor in tensors.items()}, path)
    with pytest.raises(InputError, match=r"of no released model's shape; put its config\.json beside it"):
        lone_part(path)
    (tmp_path / "config.json").write_text(
        json.dumps({"_class_name": "AutoencoderKL", "layers_per_block": 10**6, "block_out_channels": [64, 128],
                    "down_block_types": ["DownEncoderBlock2D"] * 2, "up_block_types": ["UpDecoderBlock2D"] * 2})
    )  # fmt: skip
    with pytest.raises(InputError, match="at most 2000 are built"):
        lone_part(path)
