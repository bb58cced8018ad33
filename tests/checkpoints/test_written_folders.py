"""What cannot be written whole leaves nothing behind, and all that a layout cannot hold is said at once."""

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import family
import pytest
import torch
from typer.testing import CliRunner

from latentkit.checkpoints import diffusers_folder, layouts
from latentkit.checkpoints.adapters import control_files, survey
from latentkit.checkpoints.diffusers_folder import read_folder, write_folder
from latentkit.checkpoints.files import save_model
from latentkit.checkpoints.ldm_file import write_single
from latentkit.checkpoints.lone import write_first_stage
from latentkit.checkpoints.storage.folders import whole_folder
from latentkit.cli import application
from latentkit.errors import InputError, together
from latentkit.nets.controlnet import ControlNet


def large() -> Any:
    model = family.model("SD 1")
    model.first_stage.autoencoder.decoder.conv_out.weight.fill_(1e5)  # type: ignore[union-attr, operator]
    return model


def test_an_overflow_leaves_nothing_and_can_be_tried_again(tmp_path: Path) -> None:
    source, target = tmp_path / "one.safetensors", tmp_path / "new"
    write_single(source, large(), "test")
    words = ["convert", str(source), str(target), "--to", "diffusers"]
    for _ in range(2):
        done = CliRunner().invoke(application(), [*words, "--dtype", "float16"])
        assert f"nothing was written to {target}/vae" in str(done.exception)
        assert "conv_out.weight is not finite in float16" in str(done.exception)
        assert os.listdir(tmp_path) == ["one.safetensors"]
    assert CliRunner().invoke(application(), words).exit_code == 0
    assert sorted(os.listdir(tmp_path)) == ["new", "one.safetensors"]


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit, OSError("disk full")])
@pytest.mark.parametrize("made", [False, True])
def test_a_folder_that_is_not_finished_is_not_there(
    error: Any, made: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stopped(*_: Any) -> None:
        raise error

    target = tmp_path / "deep" / "new"
    if made:  # empty
        target.mkdir(parents=True)
    monkeypatch.setattr(diffusers_folder, "write_clip", stopped)
    with pytest.raises(InputError if isinstance(error, OSError) else error):
        write_folder(target, family.model("SD 1"))
    assert [path for path in tmp_path.rglob("*") if path.is_file() or "partial" in path.name] == []
    assert target.exists() == made
    monkeypatch.undo()
    write_folder(target, family.model("SD 1"))
    assert read_folder(target)


def test_parts_alone_are_whole_or_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stopped(*_: Any) -> None:
        raise KeyboardInterrupt

    from latentkit.checkpoints import lone

    network = ControlNet(family.UNET)
    monkeypatch.setattr(lone, "write_tensors", stopped)
    monkeypatch.setattr(control_files, "write_json", stopped)
    with pytest.raises(KeyboardInterrupt):
        write_first_stage(tmp_path / "vae", family.model("SD 1").first_stage, "diffusers")
    with pytest.raises(KeyboardInterrupt):
        control_files.write_control(tmp_path / "control", network, "diffusers")
    assert not list(tmp_path.iterdir())


def test_what_is_written_and_found_wrong_is_taken_away(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = tmp_path / "one.safetensors"
    write_single(source, family.model("SD 1"), "test")
    monkeypatch.setattr(layouts, "differences", lambda *_: {"x": "apart"})
    for to in ("ldm", "diffusers", "latentkit"):
        done = CliRunner().invoke(application(), ["convert", str(source), str(tmp_path / "new"), "--to", to])
        assert "is not what was to be written" in str(done.exception)
        assert os.listdir(tmp_path) == ["one.safetensors"]
    save_model(tmp_path / "base.safetensors", family.model("SD 1"), {}, torch.float32)
    control_files.write_control(tmp_path / "c.safetensors", ControlNet(family.UNET), "ldm")

    def wrong(*_: Any) -> None:
        raise InputError("wrong")

    monkeypatch.setattr(survey, "_refuse", wrong)
    words = ["c.safetensors", "new", "--to", "diffusers", "--base", "base.safetensors"]
    monkeypatch.chdir(tmp_path)
    assert CliRunner().invoke(application(), ["convert", *words]).exit_code == 1
    assert not (tmp_path / "new").exists()


def test_errors_inside_name_the_folder_itself(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=f"^{tmp_path}/new/x is wrong$"), whole_folder(tmp_path / "new") as new:
        raise InputError(f"{new}/x is wrong")
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="could not be written"), whole_folder(tmp_path / "file" / "new"):
        pass


@pytest.mark.parametrize(
    ("to", "wanted"),
    [
        ("diffusers", ["stem 4", "text conditioner", "schedule 'flow'"]),
        ("ldm", ["no text encoder of one's own", "stem 4"]),
    ],
)
def test_all_that_a_layout_cannot_hold_is_said_at_once(to: str, wanted: list[str], tmp_path: Path) -> None:
    done = CliRunner().invoke(application(), ["convert", "emoji", str(tmp_path / "new"), "--to", to])
    assert done.exit_code == 1
    assert all(one in str(done.exception) for one in wanted)
    assert not list(tmp_path.iterdir())
    model = family.model("SD 1")
    model.first_stage.autoencoder = None
    model.architecture = replace(model.architecture, first_stage=None, prediction="flow")
    with pytest.raises(InputError, match="no diffusion on pixels"):
        write_folder(tmp_path / "new", model)


def test_errors_are_said_together() -> None:
    def refuse(text: str) -> None:
        raise InputError(text)

    with pytest.raises(InputError, match=r"^a; b$"):
        together(lambda: refuse("a"), lambda: None, lambda: refuse("b"), lambda: refuse("a"))
    together(lambda: None)
