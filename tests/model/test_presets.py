"""Presets have the parameter counts of the released models."""

import pytest
import torch
from torch import nn

from latentkit.errors import InputError
from latentkit.model.presets import KL_F8, preset
from latentkit.nets.autoencoder import Autoencoder
from latentkit.nets.unet import UNet


def millions(module: nn.Module) -> float:
    return sum(parameter.numel() for parameter in module.parameters()) / 1e6


@pytest.mark.parametrize(
    ("name", "expected"), [("sd1.5", 859.5), ("sd2.1", 865.9), ("sd2.1-base", 865.9), ("sdxl", 2567.5)]
)
def test_unet_parameters(name: str, expected: float) -> None:
    with torch.device("meta"):
        assert round(millions(UNet(preset(name).network)), 1) == expected


def test_autoencoder_parameters() -> None:
    with torch.device("meta"):
        assert round(millions(Autoencoder(KL_F8)), 2) == 83.65


def test_the_largest_runs_at_its_size_on_meta_tensors() -> None:
    with torch.device("meta"):
        x = torch.empty(1, 4, 128, 128)
        context, vector = torch.empty(1, 77, 2048), torch.empty(1, 2816)
        assert UNet(preset("sdxl").network)(x, torch.zeros(1), context, vector).shape == x.shape


def test_an_unknown_preset_is_named_with_the_nearest() -> None:
    with pytest.raises(InputError, match=r"'sd15' is unknown; did you mean 'sd1\.5'"):
        preset("sd15")
