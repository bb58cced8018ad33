"""The commands about first stages, as a person types them."""

import json
import signal
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from latentkit import cli
from latentkit.checkpoints.files import save_autoencoder
from latentkit.data.pictures import to_png
from latentkit.model.first_stage import FirstStage
from latentkit.nets.autoencoder import AutoencoderConfig

Run = Callable[..., int]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Run:
    """Runs the command in a folder with four pictures and an autoencoder's file; gives the exit code."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    config = AutoencoderConfig(latent_channels=2, channels=16, multipliers=(1, 2), blocks=1, attention=False, codes=8)
    save_autoencoder("ae.safetensors", FirstStage(config, 3), {})
    Path("pictures").mkdir()
    for number in range(4):
        Path(f"pictures/{number}.png").write_bytes(to_png(torch.rand(3, 12, 13 + number) * 2 - 1))
    before = signal.getsignal(signal.SIGTERM)

    def call(*words: str) -> int:
        monkeypatch.setattr(sys, "argv", ["latentkit", *words])
        try:
            cli.main()
        except SystemExit as end:
            return int(end.code or 0)
        finally:
            signal.signal(signal.SIGTERM, before)
            cli.LOG.setLevel("NOTSET")
        return 0

    return call


M = ("-m", "ae.safetensors")


def test_evaluate_first_stage(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("evaluate", "first-stage", "pictures", *M) == 0
    text = capsys.readouterr().out
    assert text.startswith("4 pictures through a first stage of downsampling 2")
    assert run("evaluate", "first-stage", "pictures", *M, "-n", "3", "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert found["pictures"] == 3
    assert found["network"] == "latentkit-random-conv-v1"
    assert found["frechet"] > 0
    assert found["codes"]["codes"] == 8
    assert len(found["digest"]) == 64


def test_evaluate_first_stage_refuses(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("evaluate", "first-stage", "absent", *M) == 2
    assert run("evaluate", "first-stage", "pictures", "-m", "absent") == 2
    assert run("evaluate", "first-stage", "pictures", *M, "--lpips", "a", "b") == 2
    assert "no file 'a'" in capsys.readouterr().err
