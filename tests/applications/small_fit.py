"""Folders of a few drawn pictures, and a scale so small that a whole fit takes seconds."""

from pathlib import Path

import pytest
import torch

from latentkit.applications.fit import choice, division, measure
from latentkit.applications.fit.choice import Scale
from latentkit.data.pictures import to_png, to_tiff

TINY = Scale(16, 2, 32, (1, 1), 4, 32, 1, 0, 32, 1, 4)


def square(number: int, side: int = 16, channels: int = 3) -> torch.Tensor:
    """A coloured square at a place of its own on white, `c h w`; alpha, where there is, is 0 outside it."""
    picture = torch.ones(channels, side, side)
    top, left = (number * 5) % (side // 2), (number * 3) % (side // 2)
    fill = torch.tensor([(number * (37 + 54 * channel)) % 200 for channel in range(channels)]) / 127.5 - 1
    if channels in (2, 4):
        picture[-1], fill[-1] = -1, 1
    picture[:, top : top + side // 2, left : left + side // 2] = fill[:, None, None]
    return picture


def folder_of(path: Path, count: int, *, kind: str = "plain", side: int = 16, channels: int = 3) -> Path:
    """`count` pictures in `path`: plain, in two class folders, or with captions beside them."""
    for number in range(count):
        where = path / ("even" if number % 2 == 0 else "odd") if kind == "classes" else path
        where.mkdir(parents=True, exist_ok=True)
        picture = square(number, side, channels)
        if channels > 4:
            (where / f"{number:03d}.tif").write_bytes(to_tiff(picture))
        else:
            (where / f"{number:03d}.png").write_bytes(to_png(picture))
        if kind == "captions":
            (where / f"{number:03d}.txt").write_text(f"square number {number}")
    return path


@pytest.fixture
def tiny(monkeypatch, tmp_path):
    """Tiny networks on every device, one thread's worth of report, an own cache, and an empty working folder."""
    for device in choice.SCALES:
        monkeypatch.setitem(choice.SCALES, device, TINY)
    monkeypatch.setattr(measure, "TIMED", 0.0)
    monkeypatch.setattr(division, "SAMPLES", (8, 6, 5))
    monkeypatch.setattr(choice, "_precision", lambda device: "float32")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    work = tmp_path / "work"
    work.mkdir()
    monkeypatch.chdir(work)
    return work
