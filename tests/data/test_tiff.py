"""TIFF of any number of channels and any type: every value comes back, or the file is refused by name."""

import io

import numpy as np
import pytest
import torch
from PIL import Image
from test_pictures import RAMP

from latentkit.data import pictures
from latentkit.data.pictures import BadPicture, decode, tiff_of, to_tensor, to_tiff
from latentkit.data.range import Range


@pytest.mark.parametrize("depth", [8, 16, 32])
@pytest.mark.parametrize("channels", [1, 2, 3, 4, 5, 9])
def test_tiff_of_any_channels_and_depth(channels, depth):
    x = torch.rand(channels, 7, 9) * 2 - 1
    picture = decode(to_tiff(x, depth=depth), "a")
    assert picture.array.shape == (7, 9, channels)
    assert not picture.has_alpha
    half_step = {8: 1 / 255, 16: 1 / 65535, 32: 1e-6}[depth]
    assert (to_tensor(picture, channels) - x).abs().max() <= half_step


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.int16, np.float32])
@pytest.mark.parametrize("channels", [1, 2, 3, 4, 5, 12])
def test_tiff_gives_back_every_value(channels, dtype):
    """No channel is taken for alpha, which would change the others where it is 0."""
    array = np.random.default_rng(0).integers(0, 100, (7, 9, channels)).astype(dtype)
    array[:3, :, -1] = 0
    top = 1.0 if dtype == np.float32 else float(np.iinfo(dtype).max)
    array = array / np.float32(100) if dtype == np.float32 else array
    values = Range(low=0, high=top, samples=np.dtype(dtype).name)
    for picture in (decode(tiff_of(array), "a", values), *([] if dtype == np.int16 else [decode(tiff_of(array), "a")])):
        assert not picture.has_alpha
        back = to_tensor(picture, channels)
        assert np.array_equal(values.to_values(back).astype(np.float32).round(6), array.astype(np.float32).round(6))


@pytest.mark.parametrize("channels", [2, 4, 6])
def test_tiff_marks_alpha_where_it_is_told(channels):
    array = np.random.default_rng(0).integers(0, 255, (7, 9, channels), np.uint8)
    picture = decode(tiff_of(array, alpha=True), "a")
    assert picture.has_alpha
    assert np.array_equal(picture.array, array)


def tiff(array, **options):
    import tifffile

    out = io.BytesIO()
    tifffile.imwrite(out, array, **options)
    return out.getvalue()


def test_tiff_kinds():
    gray = RAMP[..., 0]
    assert np.array_equal(decode(tiff(255 - gray, photometric="miniswhite"), "a").array[..., 0], gray)
    planes = np.moveaxis(RAMP, 2, 0)
    assert np.array_equal(decode(tiff(planes, photometric="rgb", planarconfig="separate"), "a").array, RAMP)
    assert np.array_equal(decode(tiff(RAMP, photometric="rgb", compression="deflate"), "a").array, RAMP)
    assert np.array_equal(decode(tiff(RAMP, photometric="rgb", byteorder=">"), "a").array, RAMP)
    big = decode(tiff(RAMP.astype(np.uint16) * 257, photometric="rgb", bigtiff=True, byteorder=">"), "a")
    assert np.array_equal(big.array, RAMP.astype(np.uint16) * 257)
    pages = decode(tiff(np.stack([gray, gray // 2]), photometric="minisblack"), "a")
    assert np.array_equal(pages.array[..., 0], gray)
    assert pages.notes == ("first of several frames",)
    stack = np.stack([gray, gray // 2, gray // 3, gray // 4, gray // 5])
    assert np.array_equal(
        decode(tiff(stack, imagej=True, metadata={"axes": "CYX"}), "a").array, stack.transpose(1, 2, 0)
    )
    turned = tiff(RAMP, photometric="rgb", extratags=[(274, "H", 1, 6, True)])
    assert decode(turned, "a").array.shape == (24, 16, 3)
    colours = np.stack([np.arange(256) * 257] * 3).astype(np.uint16)
    assert np.array_equal(decode(tiff(gray, photometric="palette", colormap=colours), "a").array[..., 1] // 257, gray)
    cmyk = np.asarray(Image.fromarray(RAMP).convert("CMYK"))
    assert np.abs(decode(tiff(cmyk, photometric="separated"), "a").array.astype(int) - RAMP).max() <= 1
    premultiplied = np.dstack([RAMP // 2, np.full((16, 24), 128, np.uint8)])
    straight = decode(tiff(premultiplied, photometric="rgb", extrasamples=["assocalpha"]), "a").array
    assert np.abs(straight[..., :3].astype(int) - RAMP).max() <= 2


@pytest.mark.parametrize(
    ("array", "reason"),
    [
        (np.full((8, 8), np.nan, np.float32), "NaN"),
        (np.full((8, 8), 3.0, np.float32), "must lie in 0..1"),
        (np.ones((8, 8), np.int32), "int32 samples"),
        (np.ones((2, 8), np.uint8), "too small"),
    ],
)
def test_tiff_samples_that_are_refused(array, reason):
    with pytest.raises(BadPicture, match=reason):
        decode(tiff(array), "a.tif")


def test_tiff_size_is_refused_before_reading(monkeypatch):
    data = tiff(np.zeros((64, 64, 9), np.uint8), photometric="minisblack", planarconfig="contig")
    monkeypatch.setattr(pictures, "MAX_SAMPLES", 64 * 64 * 8)
    with pytest.raises(BadPicture, match="too large"):
        decode(data, "a.tif")


def test_planes_count_before_reading(monkeypatch):
    data = tiff(np.zeros((3, 64, 64), np.uint8), photometric="minisblack")
    assert decode(data, "a.tif").array.shape == (64, 64, 1)
    monkeypatch.setattr(pictures, "MAX_SAMPLES", 64 * 64 * 2)
    with pytest.raises(BadPicture, match="split its planes"):
        decode(data, "a.tif")
