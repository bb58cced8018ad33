"""A model of values by a stated range writes such values."""

import io

import numpy as np
import pytest
import tifffile
from tiny import tiny_model

from latentkit.applications.generate import Result, generate
from latentkit.applications.request import Unconditional
from latentkit.checkpoints.files import Model
from latentkit.errors import InputError


def drawn(**changes: object) -> Result:
    stated = {"kind": "linear", "low": -1024.0, "high": 3071.0, "samples": "int16", **changes}
    recipe = {"data": {"transform": {"range": stated}}}
    model = Model(tiny_model(channels=1, text=False), {"defaults": {"steps": 1}, "recipe": recipe}, "scan")
    return next(event for event in generate(model, Unconditional(seed=1)) if isinstance(event, Result))


def test_values_are_written_in_their_type_and_range() -> None:
    result = drawn()
    suffix, data = result.file()
    found = tifffile.imread(io.BytesIO(data))
    assert suffix == "tiff"
    assert found.dtype == np.int16
    expected = (result.picture[0].double().numpy().clip(-1, 1) + 1) / 2 * 4095 - 1024
    assert np.array_equal(found, expected.round())
    assert found.min() < found.max()


def test_a_range_that_makes_no_sense_is_refused() -> None:
    with pytest.raises(InputError, match="scan: its range of values is invalid"):
        drawn(low=5000.0)
