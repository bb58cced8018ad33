"""`latentkit inspect`, `convert` and `diff` take models as every command does: by name, file or run folder."""

import json
from pathlib import Path

import pytest
from tiny import tiny_model
from typer.testing import CliRunner

from latentkit.checkpoints.files import save_model
from latentkit.cli import application
from latentkit.errors import InputError


def test_models_are_named_as_everywhere(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    save_model(tmp_path / "run" / "model.safetensors", tiny_model(), {})
    runner = CliRunner()
    for name in ("emoji", str(tmp_path / "run"), str(tmp_path / "run" / "model.safetensors")):
        done = runner.invoke(application(), ["inspect", name, "--json"], catch_exceptions=False)
        assert done.exit_code == 0
        assert json.loads(done.stdout)["layout"] == "latentkit"
    copy = str(tmp_path / "copy.safetensors")
    done = runner.invoke(application(), ["convert", str(tmp_path / "run"), copy, "--to", "latentkit"])
    assert done.exit_code == 0, done.output
    assert runner.invoke(application(), ["diff", copy, str(tmp_path / "run")]).exit_code == 0
    assert runner.invoke(application(), ["diff", copy, "emoji"]).exit_code == 1
    with pytest.raises(InputError, match=r"emojy.*emoji"):
        runner.invoke(application(), ["inspect", "emojy"], catch_exceptions=False)
