"""What `inspect` and `convert` say of a model: every part, and by name all that is left aside or lost."""

import json
from dataclasses import replace
from pathlib import Path

import family
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from typer.testing import CliRunner

from latentkit.checkpoints import ldm_file
from latentkit.checkpoints.diffusers_folder import INDEX, write_folder
from latentkit.checkpoints.files import save_model
from latentkit.checkpoints.layouts import report
from latentkit.checkpoints.ldm_file import write_single
from latentkit.checkpoints.names.ldm_names import EMA, UNET
from latentkit.checkpoints.names.rename import blocks
from latentkit.checkpoints.storage.archive import read_archive
from latentkit.cli import application

LAST = "cond_stage_model.model.transformer.resblocks.23."


def run(*words: object) -> str:
    done = CliRunner().invoke(application(), [str(word) for word in words], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return done.stdout


def written(path: Path, name: str, more: dict[str, Tensor], **told: str) -> Path:
    """A single file with more tensors and metadata than it must have."""
    write_single(path, family.model(name), "title", licence="free")
    save_file(load_file(path) | more, path, read_archive(path).metadata | told)
    return path


def averages(path: Path) -> dict[str, Tensor]:
    return {
        EMA + name.removeprefix("model.").replace(".", ""): tensor + 1
        for name, tensor in load_file(path).items()
        if name.startswith(UNET)
    }


def test_blocks_are_folded_only_where_all_of_them_is_meant() -> None:
    names = [f"a.b.{n}.{kind}" for n in (1, 2) for kind in ("weight", "bias")] + ["a.c.x", "betas"]
    assert blocks(names, names) == ["a.* (5)", "betas"]
    assert blocks(names, [*names, "a.d"]) == ["a.b.* (4)", "a.c.x", "betas"]
    assert blocks(names, [*names, "a.b.1.scale", "a.d"]) == sorted(names)
    assert blocks(names[:3], names[:3]) == sorted(names[:3])


def test_what_is_left_aside_is_said_by_name(tmp_path: Path) -> None:
    last = [f"{LAST}{layer}.{kind}" for layer in ("ln_1", "ln_2", "mlp.c_fc") for kind in ("weight", "bias")]
    loss = [f"first_stage_model.loss.{n}" for n in range(3)]
    more = dict.fromkeys([*last, *loss, "betas", "model_ema.decay", "cond_stage_model.model.logit_scale"])
    path = written(
        tmp_path / "model.safetensors",
        "SD 2",
        {name: torch.ones(2) for name in more},
        **{"modelspec.author": "me", "ss_tag": "x"},
    )
    said, inspected = run("convert", path, tmp_path / "new", "--to", "diffusers"), run("inspect", path)
    for text in (said, inspected):
        assert "left aside: averaged weights: model_ema.decay\n" in text
        assert f"left aside: losses of the first stage: {', '.join(loss)}\n" in text
        assert f"take no part: cond_stage_model.model.logit_scale, {LAST}* (6)\n" in text
    assert "what the file says of itself: modelspec.author, ss_tag" in said
    assert any("not held by this layout: " in line and line.endswith("licence") for line in said.splitlines())
    assert "averaged weights, which are" not in inspected
    assert set(json.loads(run("inspect", path, "--json"))["ignored"]["losses of the first stage"]) == set(loss)
    again = run("convert", path, tmp_path / "again.safetensors", "--to", "ldm")
    assert "not held" not in again
    told = read_archive(tmp_path / "again.safetensors").metadata
    assert (told["modelspec.license"], told["modelspec.title"]) == ("free", "title")


def test_what_a_layout_does_not_hold_is_said_by_name(tmp_path: Path) -> None:
    model = family.model("SD 1")
    model.architecture = replace(model.architecture, size=(32, 48), searched=((3.0, 1.0),))
    save_model(tmp_path / "own.safetensors", model, {"steps": 3, "seed": 1}, torch.float32)
    said = run("convert", tmp_path / "own.safetensors", tmp_path / "folder", "--to", "diffusers")
    assert "not held by this layout: size, searched, seed, steps\n" in said


@pytest.mark.parametrize(("name", "taken"), [("SD 1", False), ("churches", True)])
def test_averaged_weights_are_said_to_be_taken_or_not(
    name: str, taken: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if taken:  # as for the 2021 models, whose files do not say that they are ours
        found = ldm_file.single_file
        monkeypatch.setattr(ldm_file, "single_file", lambda *words: found(*words)._replace(name="of 2021"))
    path = written(tmp_path / "model.safetensors", name, {})
    written(path, name, averages(path))
    inspected, count = run("inspect", path), len(averages(path))
    assert f"which are {'taken; convert --plain' if taken else 'left aside; convert --averaged'} takes" in inspected
    plain = f"weights in whose place their averages are: model.* ({count})\n"
    averaged = f"averaged weights: model_ema.* ({count})\n"
    for more, used in (((), taken), (("--averaged",), True), (("--plain",), False)):
        said = run("convert", path, tmp_path / f"new{more}", "--to", "ldm", *more)
        assert (plain in said, averaged in said) == (used, not used)


def test_every_part_has_its_line_and_its_picture(tmp_path: Path) -> None:
    path = written(tmp_path / "model.safetensors", "XL", {})
    parts = report(path)["parts"]
    assert list(parts) == ["U-Net", "first stage", "text tower", "text tower 2"]
    assert sum(part["tensors"] for part in parts.values()) == len(family.model("XL").state_dict())
    assert parts["text tower 2"]["picture"] == [
        "3 layers, 48 wide, 3 heads; 77 of 49408 tokens; gelu; context from layer 2; a vector 40 wide"
    ]
    assert parts["first stage"]["picture"][0] == "4 latent channels, 2 pixels to a cell"
    shown = run("inspect", path)
    assert shown.count("\n  text tower") == 2
    for name, wanted in (("classes", "classes"), ("semantic", "semantic map"), ("layout", "layout tower")):
        path = written(tmp_path / f"{name}.safetensors", name, {})
        assert list(report(path)["parts"]) == ["U-Net", "first stage", wanted]


def test_parts_of_a_folder_that_are_not_run_are_named(tmp_path: Path) -> None:
    write_folder(tmp_path / "model", family.model("SD 1"))
    index = json.loads((tmp_path / "model" / INDEX).read_text())
    for name in ("safety_checker", "feature_extractor", "depth_estimator"):
        index[name] = ["transformers", "Some"]
    (tmp_path / "model" / INDEX).write_text(json.dumps(index))
    text = tmp_path / "model" / "text_encoder" / "model.safetensors"
    save_file(load_file(text) | {"text_model.embeddings.position_ids": torch.arange(77)}, text)
    for said in (
        run("inspect", tmp_path / "model"),
        run("convert", tmp_path / "model", tmp_path / "new", "--to", "ldm"),
    ):
        assert "left aside: parts that are not run: depth_estimator, feature_extractor, safety_checker\n" in said
        assert "tensors that take no part in a picture: text_encoder/text_model.embeddings.position_ids\n" in said
