"""The counts of a data set, and the command that prints them."""

import json

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from latentkit.cli.data import app
from latentkit.data import report
from latentkit.data.pictures import decode, to_png, to_tiff
from latentkit.data.source import open_source
from latentkit.errors import InputError


@pytest.fixture
def folder(tmp_path, save):
    root = tmp_path / "set"
    save(root / "a/1.png", 1, (8, 16, 3))
    save(root / "a/2.png", 1, (8, 16, 3))
    save(root / "b/3.png", 3, (10, 10, 1))
    save(root / "b/4.png", 4, (12, 12, 4))
    (root / "b/5.png").write_bytes(to_png(torch.zeros(1, 8, 8), depth=16))
    (root / "b/bands.tif").write_bytes(to_tiff(torch.zeros(6, 8, 8)))
    (root / "b/broken.png").write_bytes(b"words")
    (root / "a/1.txt").write_text("one")
    (root / "b/3.txt").write_text("three words here")
    return root


def test_counts_are_exact(folder):
    found = report.inspect(open_source(folder))
    assert found["pictures"] == 6
    assert found["width"] == {"least": 8, "median": 11, "most": 16}
    assert found["sizes"] == {"16x8": 2, "8x8": 2, "10x10": 1, "12x12": 1}
    assert found["aspects"] == {"1:1": 4, "2:1": 2}
    assert found["channels"] == {"1": 2, "3": 2, "4": 1, "6": 1}
    assert found["depths"] == {"uint8": 4, "uint16": 2}
    assert (found["alpha"], found["transparent"]) == (1, 1)
    assert found["duplicates"] == [["a/1.png", "a/2.png"]]
    assert found["captions"] == {"count": 2, "missing": 4, "distinct": 2, "longest": 16, "longest_key": "b/3.png"}
    assert found["classes"] == {"a": 2, "b": 4}
    assert found["rejected"] == [{"key": "b/broken.png", "reason": "is not a PNG, JPEG, WebP or TIFF picture"}]


def test_the_command(folder, tmp_path):
    sheet = tmp_path / "sheet.png"
    done = CliRunner().invoke(app, ["check", str(folder), "--sheet", str(sheet)], catch_exceptions=False)
    assert done.exit_code == 0
    for words in (
        "6 pictures (captions)",
        "duplicates  1",
        "a/1.png = a/2.png",
        "2 distinct, 4 missing",
        "b/broken.png: is",
    ):
        assert words in done.stdout
    picture = decode(sheet.read_bytes(), "sheet").array
    assert picture.shape == (2 * 98 + 2, 3 * 98 + 2, 3)
    assert np.ptp(picture) > 0

    done = CliRunner().invoke(app, ["check", str(folder), "--json"], catch_exceptions=False)
    assert json.loads(done.stdout)["pictures"] == 6

    before = sheet.read_bytes()
    with pytest.raises(InputError, match="is not overwritten"):
        CliRunner().invoke(app, ["check", str(folder), "--sheet", str(sheet)], catch_exceptions=False)
    assert sheet.read_bytes() == before
    with pytest.raises(InputError, match="does not exist"):
        CliRunner().invoke(app, ["check", str(tmp_path / "none")], catch_exceptions=False)


@pytest.mark.parametrize(("bands", "seen"), [(2, [255, 255, 255]), (4, [255, 0, 128]), (6, [255, 0, 128])])
def test_a_sheet_shows_the_first_band_or_three(tmp_path, bands, seen):
    values = torch.tensor([1.0, -1.0, 0.0, 1.0, 1.0, 1.0])[:bands, None, None]
    (tmp_path / "bands.tif").write_bytes(to_tiff(values.expand(-1, 8, 8)))
    picture = report.sheet(open_source(tmp_path), side=8)[:, 3:7, 3:7]
    assert ((picture.mean((1, 2)) + 1) * 127.5).round().tolist() == pytest.approx(seen, abs=1)


def test_long_lists_are_cut_with_their_count(tmp_path, save):
    save(tmp_path / "a.png", 0)
    for i in range(30):
        (tmp_path / f"bad{i:02}.png").write_bytes(b"x")
    text = report.describe(report.inspect(open_source(tmp_path)))
    assert "not used    30" in text
    assert "and 10 more (--json lists all)" in text
    assert "captions    none" in text


def test_a_sheet_of_many_takes_them_evenly(tmp_path, save):
    for i in range(10):
        save(tmp_path / f"{i}.png", i, (8, 8, 3))
    assert report.sheet(open_source(tmp_path), count=4, side=10).shape == (3, 2 * 12 + 2, 2 * 12 + 2)
