"""A model of values by a stated range writes such values."""

import io
from pathlib import Path

import numpy as np
import pytest
import tifffile
import torch
from tiny import tiny_model

from latentkit.applications.generate import Result, generate
from latentkit.applications.request import Unconditional
from latentkit.applications.stages.train_autoencoder import _begin
from latentkit.applications.stages.train_diffusion import _first_stage
from latentkit.checkpoints.files import Model, save_autoencoder
from latentkit.data.pictures import decode
from latentkit.data.range import Range
from latentkit.errors import InputError
from latentkit.model.first_stage import FirstStage
from latentkit.nets.autoencoder import Autoencoder, AutoencoderConfig
from latentkit.training.recipe import DiffusionRecipe, parse_recipe


def drawn(channels: int = 1, alpha: bool | None = None, **changes: object) -> Result:
    stated = {"kind": "linear", "low": -1024.0, "high": 3071.0, "samples": "int16", **changes}
    provenance = {"defaults": {"steps": 1}, "recipe": {"data": {"transform": {"range": stated}}}}
    provenance |= {} if alpha is None else {"alpha": alpha}
    model = Model(tiny_model(channels=channels, text=False), provenance, "scan")
    return next(event for event in generate(model, Unconditional(seed=1)) if isinstance(event, Result))


@pytest.mark.parametrize(("channels", "alpha"), [(1, None), (2, None), (2, False), (4, False)])
def test_values_are_written_in_their_type_and_range(channels: int, alpha: bool | None) -> None:
    result = drawn(channels, alpha)
    suffix, data = result.file()
    found = tifffile.imread(io.BytesIO(data)).reshape(*result.picture.shape[1:], channels)
    assert suffix == "tiff"
    assert found.dtype == np.int16
    assert not decode(data, "scan", result.values).has_alpha
    expected = (result.picture.permute(1, 2, 0).double().numpy().clip(-1, 1) + 1) / 2 * 4095 - 1024
    assert np.array_equal(found, expected.round())
    assert found.min() < found.max()


def test_alpha_is_in_no_range() -> None:
    result = drawn(channels=2, alpha=True)
    found = tifffile.imread(io.BytesIO(result.file()[1]))
    assert decode(result.file()[1], "scan", result.values).has_alpha
    share = (result.picture.double().numpy().clip(-1, 1) + 1) / 2
    assert np.array_equal(found[..., 0], (share[0] * 4095 - 1024).round())
    assert np.abs(found[..., 1] - share[1] * 32767).max() <= 0.51


def test_a_range_that_makes_no_sense_is_refused() -> None:
    with pytest.raises(InputError, match="scan: its range of values is invalid"):
        drawn(low=5000.0)


def second(path: Path, **stated: object) -> DiffusionRecipe:
    transform = {"size": 16, "channels": 3, **({"range": stated} if stated else {})}
    recipe = parse_recipe(
        {
            "stage": "diffusion",
            "name": "scans",
            "first_stage": str(path),
            "data": {"path": "x", "transform": transform},
            "network": {},
            "schedule": {"steps": 1, "batch": 1},
        }
    )
    assert isinstance(recipe, DiffusionRecipe)
    return recipe


def test_both_stages_read_values_alike(tmp_path: Path) -> None:
    config = AutoencoderConfig(channels=16, multipliers=(1,), blocks=1, attention=False)
    path, plain = tmp_path / "ae.safetensors", tmp_path / "plain.safetensors"
    stated = {"kind": "linear", "low": 0.0, "high": 600.0}
    save_autoencoder(path, FirstStage(config, 3), {"recipe": {"data": {"transform": {"range": stated}}}})
    save_autoencoder(plain, FirstStage(config, 3), {})
    for wrong in ({}, stated | {"high": 601.0}, stated | {"kind": "window"}):
        with pytest.raises(InputError, match="state the same"):
            _first_stage(second(path, **wrong))
    assert _first_stage(second(path, **stated, samples="uint16"))[0] is not None
    assert _first_stage(second(plain))[0] is not None
    assert _first_stage(second(plain, **stated))[0] is not None


def test_a_first_stage_goes_on_from_one_of_the_same_range_only(tmp_path: Path) -> None:
    config = AutoencoderConfig(channels=16, multipliers=(1,), blocks=1, attention=False)
    path, stated = tmp_path / "ae.safetensors", {"kind": "linear", "low": 0.0, "high": 600.0}
    trained = FirstStage(config, 3)
    save_autoencoder(path, trained, {"recipe": {"data": {"transform": {"range": stated}}}})
    for wrong in (None, Range(**stated | {"high": 601.0})):
        with pytest.raises(InputError, match=r"start: .*ae\.safetensors was trained on values by .*high=600\.0"):
            _begin(Autoencoder(config), str(path), wrong)
    network = Autoencoder(config)
    _begin(network, str(path), Range(**stated))
    assert trained.autoencoder is not None
    assert torch.equal(network.to_moments.weight, trained.autoencoder.to_moments.weight)
