"""Pictures of scientists, from training to plain reconstructions of the same type, channels and values."""

import json
import signal
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tifffile
from PIL import Image

from latentkit import cli

LINEAR = {"kind": "linear", "low": -1000.0, "high": 3000.0, "samples": "int16"}
LOG = {"kind": "log", "low": 0.5, "high": 10000.0, "samples": "float32"}


def typed(monkeypatch: pytest.MonkeyPatch, *words: str) -> None:
    monkeypatch.setattr(sys, "argv", ["latentkit", *words])
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(SystemExit) as end:
        cli.main()
    signal.signal(signal.SIGTERM, before)
    cli.LOG.setLevel("NOTSET")
    assert not end.value.code


@pytest.mark.parametrize(
    ("dtype", "channels", "values"),
    [
        ("int16", 1, LINEAR),
        ("float32", 1, LOG),
        ("float32", 12, None),
        ("uint16", 1, None),
        ("uint16", 2, None),
        ("uint16", 4, None),
    ],
)
def test_what_was_learned_comes_back(
    dtype: str, channels: int, values: dict[str, Any] | None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A few smooth pictures are learned by heart, with figures of held-out ones taken on the way."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    Path("scans").mkdir()
    rng, (y, x) = np.random.default_rng(0), np.mgrid[:16, :16] / 16
    for number in range(4):
        phases = rng.uniform(0, 6, (2, channels))
        share = 0.5 + 0.22 * (np.sin(3 * x[..., None] + phases[0]) + np.sin(3 * y[..., None] + phases[1]))
        tifffile.imwrite(
            f"scans/{number}.tif",
            _stored(share, dtype, values),
            photometric="minisblack",
            planarconfig="contig",
            extrasamples=[0] * (channels - 1) or None,
        )
    recipe = {
        "stage": "autoencoder",
        "name": "scans",
        "data": {"path": "scans", "transform": {"size": 16, "channels": channels, "range": values}},
        "network": {"picture_channels": channels, "latent_channels": 8, "channels": 32, "multipliers": [1], "stem": 2}
        | {"blocks": 1, "attention": False},
        "loss": {"kl": 1e-6},
        "optimiser": {"name": "muon", "lr": 5e-3, "warmup": 5, "decay": 0.5},
        "averaging": {"decay": 0.9, "power": []},
        "schedule": {"steps": 80, "batch": 4, "log_every": 40, "sample_every": 30},
    }
    Path("recipe.yaml").write_text(json.dumps(recipe))
    typed(monkeypatch, "train", "recipe.yaml")
    typed(monkeypatch, "reconstruct", "scans/0.tif", "scans/3.tif", "-m", "runs/scans", "--only")
    for number in (0, 3):
        was, back = tifffile.imread(f"scans/{number}.tif"), tifffile.imread(f"out/{number}-reconstruction.tiff")
        assert (back.dtype, back.shape) == (was.dtype, was.shape)
        error = np.abs(_share(back, dtype, values) - _share(was, dtype, values))
        assert error.mean() < 0.01
    Image.new("RGBA", (16, 16)).save("alpha.png")
    shown = {"scans/0.tif": "RGB" if channels > 2 else "L"}
    shown |= {"alpha.png": {2: "LA", 4: "RGBA"}.get(channels, "L")} if channels < 5 and values is None else {}
    for written in Path("runs/scans/samples").glob("*.png"):
        with Image.open(written) as sheet:
            assert sheet.mode == shown["scans/0.tif"]
    for picture, mode in shown.items():
        typed(monkeypatch, "reconstruct", picture, "-m", "runs/scans")
        with Image.open(f"out/{Path(picture).stem}-reconstruction.png") as sheet:
            assert sheet.mode == mode


@pytest.mark.parametrize(("channels", "suffix", "mode"), [(2, "tiff", "L"), (4, "tiff", "RGB"), (-4, "png", "RGBA")])
def test_plain_channels_are_drawn_as_such(
    channels: int, suffix: str, mode: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Of so many channels of a TIFF; of a PNG with alpha below zero."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    Path("scans").mkdir()
    for number in range(4):
        array = np.random.default_rng(number).integers(0, 255, (16, 16, abs(channels)), np.uint8)
        if channels < 0:
            Image.fromarray(array).save(f"scans/{number}.png")
        else:
            extra = [0] * (channels - 1)
            tifffile.imwrite(f"scans/{number}.tif", array, photometric="minisblack", extrasamples=extra)
    recipe = {
        "stage": "diffusion",
        "name": "scans",
        "first_stage": "identity",
        "data": {"path": "scans", "transform": {"size": 16, "channels": abs(channels)}},
        "network": {"channels": 32, "multipliers": [1], "blocks": 1, "depth": [0], "heads": 2},
        "averaging": {"power": []},
        "schedule": {"steps": 1, "batch": 2, "sample_every": 1},
        "sampling": {"steps": 1, "guidance_scale": 1.0},
    }
    Path("recipe.yaml").write_text(json.dumps(recipe))
    typed(monkeypatch, "train", "recipe.yaml")
    typed(monkeypatch, "generate", "-m", "runs/scans", "-n", "2", "--grid")
    assert sorted(path.suffix for path in Path("out").iterdir()) == sorted([f".{suffix}"] * 2 + [".png"])
    for written in (*Path("runs/scans/samples").glob("*.png"), *Path("out").glob("*grid*.png")):
        with Image.open(written) as sheet:
            assert sheet.mode == mode
    typed(monkeypatch, "compare-samplers", "-m", "runs/scans", "--steps", "1", "--sampler", "ddim", "-o", "compared")


def _stored(share: np.ndarray, dtype: str, values: dict[str, Any] | None) -> np.ndarray:
    """Samples that lie at these shares of their range."""
    if values is None:
        return (share * (1.0 if dtype == "float32" else 65535)).squeeze().astype(dtype)
    low, high = values["low"], values["high"]
    found = low * (high / low) ** share if values["kind"] == "log" else low + share * (high - low)
    return np.asarray(found.squeeze(), dtype)


def _share(array: np.ndarray, dtype: str, values: dict[str, Any] | None) -> np.ndarray:
    """The other way."""
    if values is None:
        return array / (1.0 if dtype == "float32" else 65535)
    low, high = values["low"], values["high"]
    if values["kind"] == "log":
        return np.asarray(np.log(array / low) / np.log(high / low))
    return np.asarray((array.astype(float) - low) / (high - low))
