"""Values of any type by a stated range: there and back, what is refused, what is cut, and through a data set."""

import numpy as np
import pytest
import torch
from pydantic import ValidationError

from latentkit.applications.pictures import open_data
from latentkit.data.dataset import Pictures, Transform
from latentkit.data.pictures import BadPicture, decode, tiff_of, to_png, to_tensor, to_tiff
from latentkit.data.range import SAMPLES, Range, stated, transform_of
from latentkit.data.source import open_source
from latentkit.errors import InputError
from latentkit.training.recipe import DataRecipe

HOUNSFIELD = Range(low=-1024, high=3071)


def test_values_in_closed_form():
    values = np.array([10.0, 100.0, 1000.0])
    assert Range(low=10, high=1000).to_unit(values) == pytest.approx([0, 1 / 11, 1])
    assert Range(kind="window", low=100, high=400).to_unit(values).tolist() == [0, 0, 1]
    assert Range(kind="log", low=10, high=1000).to_unit(values) == pytest.approx([0, 0.5, 1])
    assert Range(kind="log", low=10, high=1000).to_unit(np.zeros(1)).tolist() == [0]
    x = torch.tensor([-1.0, 0.0, 1.0]).reshape(1, 1, 3)
    assert Range(low=10, high=1000).to_values(x, "float32").ravel() == pytest.approx([10, 505, 1000])
    assert Range(kind="log", low=10, high=1000).to_values(x, "uint16").ravel().tolist() == [10, 100, 1000]


@pytest.mark.parametrize("kind", ["linear", "window", "log"])
@pytest.mark.parametrize("samples", list(SAMPLES))
@pytest.mark.parametrize("channels", [1, 2, 4, 12])
def test_there_and_back(kind, samples, channels):
    """Every whole number of a type returns as it was, floating point within float32 of the range; type and channels."""
    dtype = np.dtype(SAMPLES[samples])
    if dtype.kind == "f":
        array = np.random.default_rng(0).uniform(0.01, 8.5, (16, 16, channels)).astype(dtype)
        values = Range(kind=kind, low=0.01, high=8.5)
        array = array.clip(np.float32(0.010001), np.float32(8.5))
    else:
        low = 1 if kind == "log" else np.iinfo(dtype).min
        array = np.linspace(low, np.iinfo(dtype).max, 16 * 16 * channels).round().astype(dtype)
        array = array.reshape(16, 16, channels)
        values = Range(kind=kind, low=low, high=int(np.iinfo(dtype).max))
    picture = decode(tiff_of(array), "a", values)
    assert picture.samples == samples
    assert picture.array.dtype == np.float32
    back = values.to_values(to_tensor(picture, channels), samples)
    assert back.dtype == dtype
    if dtype.kind == "f":
        assert back == pytest.approx(array, abs=8.5 * 3e-7)
    else:
        assert np.array_equal(back, array)


def test_whole_numbers_are_cut_to_their_type():
    x = torch.tensor([-1.0, 1.0]).reshape(1, 1, 2)
    assert Range(low=-50, high=300).to_values(x, "uint8").ravel().tolist() == [0, 255]
    with pytest.raises(InputError, match="NaN"):
        HOUNSFIELD.to_values(x * float("nan"), "int16")


def test_what_lies_outside_is_refused_where_it_is_linear():
    array = np.full((8, 8, 1), 4000, np.int16)
    with pytest.raises(BadPicture, match=r"a: holds values in 4000..4000, outside the stated range -1024..3071"):
        decode(tiff_of(array), "a", HOUNSFIELD)
    assert decode(tiff_of(array), "a", Range(kind="window", low=-1024, high=3071)).array.min() == 1.0


def test_without_a_range_all_is_as_before():
    assert decode(tiff_of(np.full((8, 8, 1), 600, np.uint16)), "a").array.dtype == np.uint16
    with pytest.raises(BadPicture, match="has int16 samples; 8 and 16 bits unsigned"):
        decode(tiff_of(np.zeros((8, 8, 1), np.int16)), "a")
    with pytest.raises(BadPicture, match="or in a range that is stated"):
        decode(tiff_of(np.full((8, 8, 1), 2, np.float32)), "a")
    with pytest.raises(BadPicture, match="int32"):
        decode(tiff_of(np.zeros((8, 8, 1), np.int32)), "a", HOUNSFIELD)


def test_nan_and_alpha():
    with pytest.raises(BadPicture, match="NaN"):
        decode(tiff_of(np.full((8, 8, 1), np.nan, np.float32)), "a", HOUNSFIELD)
    gray = np.full((8, 8, 1), 1000, np.uint16)
    picture = decode(tiff_of(np.concatenate([gray, gray * 0 + 65535], 2), alpha=True), "a", Range(low=0, high=2000))
    assert picture.has_alpha
    assert picture.array[0, 0].tolist() == [0.5, 1.0]


def test_zero_stays_zero_where_white_is_zero():
    import io

    import tifffile

    out = io.BytesIO()
    tifffile.imwrite(out, np.full((8, 8), 5, np.uint16), photometric="miniswhite")
    assert decode(out.getvalue(), "a", Range(low=0, high=10)).array.max() == 0.5
    assert decode(out.getvalue(), "a").array.max() == 65530


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"low": 3, "high": 3}, "low must be less than high"),
        ({"low": 0, "high": float("inf")}, "finite"),
        ({"kind": "log", "low": 0, "high": 3}, "low must be above 0"),
        ({"kind": "cubic", "low": 0, "high": 3}, "kind"),
        ({"low": 0, "high": 3, "middle": 1}, "middle"),
        ({"low": "0", "high": 3}, "low"),
    ],
)
def test_ranges_that_make_no_sense(wrong, said):
    with pytest.raises(ValidationError, match=said):
        Range(**wrong)


def test_a_data_set_is_read_by_its_range(tmp_path):
    """Through the index, the subset and the transform, and back to the file's values; the index is of that range."""
    array = np.random.default_rng(0).integers(-1024, 3072, (16, 16, 1)).astype(np.int16)
    for number in range(3):
        (tmp_path / f"{number}.tiff").write_bytes(tiff_of(array))
    (tmp_path / "wide.tiff").write_bytes(tiff_of(array * 4))
    with pytest.raises(InputError, match="int16"):
        open_source(tmp_path)
    source = open_source(tmp_path, values=HOUNSFIELD)
    assert [item.depth for item in source.items] == ["float32"] * 3
    assert "outside the stated range" in source.rejected[0].reason
    pictures = Pictures(source.subset([1]), Transform(size=16, channels=1, range=HOUNSFIELD), 0)
    assert np.array_equal(HOUNSFIELD.to_values(pictures.sample(0, 0), "int16"), array)
    with pytest.raises(InputError, match="int16"):
        open_source(tmp_path)


def test_a_recipe_states_it(tmp_path):
    for number in range(3):
        (tmp_path / f"{number}.tiff").write_bytes(tiff_of(np.full((16, 16, 1), 300 * number, np.uint16)))
    transform = {"size": 16, "channels": 1, "range": {"low": 0, "high": 600}}
    train, held = open_data(DataRecipe.model_validate({"path": str(tmp_path), "transform": transform}), 0, 8)
    assert [float(train.view(i, 0)[1].mean()) for i in range(3)] == [-1.0, 0.0, 1.0]
    assert held.source.values == Range(low=0, high=600)


def test_eight_bits_may_have_one_too():
    data = to_png(torch.full((1, 8, 8), 0.0))
    assert decode(data, "a", Range(low=0, high=256)).array.max() == 0.5
    assert decode(data, "a", Range(low=0, high=256)).samples == "uint8"
    assert decode(to_tiff(torch.zeros(1, 8, 8)), "a").samples is None


def test_a_model_says_its_range():
    told = {"recipe": {"data": {"transform": {"range": {"low": -1024, "high": 3071, "samples": "int16"}}}}}
    found = stated(told, "m")
    assert found == Range(low=-1024, high=3071, samples="int16")
    assert found.to_values(torch.ones(1, 1, 1)).dtype == np.int16
    for nothing in ({}, {"recipe": None}, {"recipe": {"data": "x"}}, {"recipe": {"data": {"transform": []}}}):
        assert stated(nothing, "m") is None
        assert transform_of(nothing) == {}
    told["recipe"]["data"]["transform"]["range"]["low"] = 4000
    with pytest.raises(InputError, match=r"m: its range of values is invalid: range 4000.0..3071.0"):
        stated(told, "m")
