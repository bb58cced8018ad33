"""The commands about first stages, as a person types them."""

import json
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import tifffile
import torch

from latentkit.checkpoints.files import save_autoencoder
from latentkit.data.pictures import decode, tiff_of, to_png, to_tensor
from latentkit.evaluation.reconstruction import psnr, reconstruct
from latentkit.model import first_stage
from latentkit.model.first_stage import FirstStage
from latentkit.nets.autoencoder import AutoencoderConfig
from latentkit.nets.strips import Strips

Run = Callable[..., int]


@pytest.fixture
def run(run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Run:
    """Runs the command in a folder with four pictures and an autoencoder's file; gives the exit code."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    config = AutoencoderConfig(latent_channels=2, channels=16, multipliers=(1, 2), blocks=1, attention=False, codes=8)
    save_autoencoder("ae.safetensors", FirstStage(config, 3), {})
    Path("pictures").mkdir()
    for number in range(4):
        Path(f"pictures/{number}.png").write_bytes(to_png(torch.rand(3, 12, 13 + number) * 2 - 1))
    return run


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
    Path("a.yaml").write_text("stage: autoencoder\nname: a\n")
    assert run("evaluate", "first-stage", "pictures", *M, "--lpips", "a.yaml", "a.yaml") == 1
    assert "a.yaml cannot be read as weights; give a state dict" in capsys.readouterr().err


def test_a_picture_of_other_channels_is_named(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    Path("pictures/five.tiff").write_bytes(tiff_of(np.zeros((12, 12, 5), np.uint8)))
    assert run("evaluate", "first-stage", "pictures", *M, "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert found["pictures"] == 4
    assert "5 colour channels cannot be read as 3" in found["left_out"]["five.tiff"]
    assert run("reconstruct", "pictures/five.tiff", *M) == 1
    assert "latentkit: pictures/five.tiff: a picture with 5 colour channels" in capsys.readouterr().err
    Path("alone").mkdir()
    Path("pictures/five.tiff").rename("alone/five.tiff")
    assert run("evaluate", "first-stage", "alone", *M) == 1
    assert "no picture could be measured; five.tiff: a picture with 5" in capsys.readouterr().err


def test_reconstruct_prints_paths_and_never_writes_over(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("0-reconstruction.png", "0-reconstruction-2.png"):
        assert run("reconstruct", "pictures/0.png", *M, "--times", "4") == 0
        (line,) = capsys.readouterr().out.splitlines()
        assert re.fullmatch(rf"out/{name}  \d+\.\d\d dB  errors x4", line)
    assert decode(Path("out/0-reconstruction.png").read_bytes(), "a").array.shape == (16, 3 * 15 + 2, 3)


def test_reconstruct_only_keeps_size_and_type(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("reconstruct", "pictures/0.png", "pictures/1.png", *M, "--only", "-o", "back", "--json") == 0
    first, second = map(json.loads, capsys.readouterr().out.splitlines())
    assert first["path"] == "back/0-reconstruction.png"
    assert second["picture"] == "pictures/1.png"
    original, other = (decode(Path(first[key]).read_bytes(), "a") for key in ("picture", "path"))
    assert other.array.shape == original.array.shape == (12, 13, 3)
    exact = psnr(to_tensor(original, 3), to_tensor(other, 3))
    assert first["psnr"] == pytest.approx(exact, abs=0.1)  # 8 bits are rounded


def test_reconstruct_by_the_range_of_the_model(run: Run) -> None:
    """Values return in the file's type: a model of pixels themselves would give them back."""
    transform = {"background": "white", "range": {"kind": "linear", "low": -1024.0, "high": 3071.0}}
    config = AutoencoderConfig(picture_channels=1, channels=16, multipliers=(1,), blocks=1, attention=False)
    stage = FirstStage(config, 1)
    save_autoencoder("scan.safetensors", stage, {"recipe": {"data": {"transform": transform}}})
    array = np.random.default_rng(0).integers(-1024, 3072, (9, 10, 1)).astype(np.int16)
    Path("scan.tiff").write_bytes(tiff_of(array))
    assert run("reconstruct", "scan.tiff", "-m", "scan.safetensors", "--only") == 0
    x = torch.from_numpy((array.astype(np.float32) + 1024) / 4095 * 2 - 1).movedim(-1, 0)
    expected = (reconstruct(stage, x).picture[0].double().numpy() + 1) / 2 * 4095 - 1024
    found = tifffile.imread("out/scan-reconstruction.tiff")
    assert found.dtype == np.int16
    assert np.abs(found - expected).max() <= 0.51


@pytest.mark.parametrize(
    "words", [("evaluate", "first-stage", "pictures", "-n", "1"), ("reconstruct", "pictures/0.png")]
)
def test_on_little_memory_pictures_pass_in_strips(
    words: tuple[str, ...], run: Run, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    used = []
    monkeypatch.setattr(first_stage, "Strips", lambda *given: used.append(1) or Strips(*given))
    said = []
    for option in ([], ["--low-memory"]):
        assert run(*words, *M, "--json", *option) == 0
        said.append(json.loads(capsys.readouterr().out))
        assert len(used) == 2 * len(option), "to encode and to decode"
    assert said[0]["psnr"] == pytest.approx(said[1]["psnr"], abs=1e-3)


def test_reconstruct_refuses(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("reconstruct", "pictures", *M) == 2
    assert "is a folder; name the pictures in it" in capsys.readouterr().err
    assert run("reconstruct", "absent.png", *M) == 2
    assert run("reconstruct", "ae.safetensors", *M) == 1
    assert not Path("out").exists() or not list(Path("out").iterdir())


def test_report_prints_the_page(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = {
        "stage": "autoencoder",
        "name": "small",
        "data": {"path": "pictures", "transform": {"size": 16}},
        "network": {"latent_channels": 2, "channels": 16, "multipliers": [1, 2], "blocks": 1, "attention": False}
        | {"codes": 8},
        "schedule": {"steps": 1, "batch": 1},
    }
    Path("run").mkdir()
    Path("run/recipe.yaml").write_text(json.dumps(recipe))
    Path("ae.safetensors").rename("run/model.safetensors")
    assert run("report", "run") == 0
    assert capsys.readouterr().out == "run/health.html\n"
    assert "the finished model" in Path("run/health.html").read_text()
    assert run("report", "pictures") == 2
