"""Presets have the parameter counts of the released models."""

from dataclasses import replace

import pytest
import torch
from torch import nn

from latentkit.errors import InputError
from latentkit.model.latent_diffusion import fit_network
from latentkit.model.presets import FIRST_STAGES, PRESETS, preset
from latentkit.nets.autoencoder import Autoencoder
from latentkit.nets.unet import UNet

UNETS = {
    "sd1.5": 859.52,
    "sd1.5-inpainting": 859.54,
    "sd2.1": 865.91,
    "sd2.1-base": 865.91,
    "x4-upscaler": 473.40,
    "sdxl": 2567.46,
    "celeba256": 274.06,
    "lsun_churches256": 294.97,
    "cin256": 394.98,
    "cin256-v2": 400.92,
    "txt2img-1p4B": 872.30,
    "semantic_synthesis256": 215.23,
    "inpainting_big": 387.25,
    "bsr_sr": 113.62,
}
"""Millions, where they are published: printed by the released code, or in tables 12 to 15 of the paper."""


def millions(module: nn.Module) -> float:
    return sum(parameter.numel() for parameter in module.parameters()) / 1e6


@pytest.mark.parametrize("name", UNETS)
def test_unet_parameters(name: str) -> None:
    with torch.device("meta"):
        assert round(millions(UNet(preset(name).network)), 2) == UNETS[name]


@pytest.mark.parametrize(("name", "expected"), [("kl-f8", 83.65), ("kl-f4", 55.31), ("vq-f4", 55.32)])
def test_autoencoder_parameters(name: str, expected: float) -> None:
    with torch.device("meta"):
        assert round(millions(Autoencoder(FIRST_STAGES[name])), 2) == expected


@pytest.mark.parametrize("name", PRESETS)
def test_the_parts_of_a_preset_fit_together(name: str) -> None:
    architecture = preset(name)
    assert fit_network(architecture) == architecture
    assert fit_network(replace(architecture, network=replace(architecture.network, channels_in=99))) == architecture


def test_the_largest_runs_at_its_size_on_meta_tensors() -> None:
    with torch.device("meta"):
        x = torch.empty(1, 4, 128, 128)
        context, vector = torch.empty(1, 77, 2048), torch.empty(1, 2816)
        assert UNet(preset("sdxl").network)(x, torch.zeros(1), context, vector).shape == x.shape


def test_the_2021_models_have_the_heads_that_they_were_trained_with() -> None:
    one = {"cin256", "cin256-v2", "text2img256", "layout2img-openimages256"}
    eight = {"lsun_churches256", "inpainting_big", "semantic_synthesis256", "semantic_synthesis512", "txt2img-1p4B"}
    assert {name for name in PRESETS if preset(name).network.heads == 1} == one
    assert {name for name in PRESETS if preset(name).network.heads == 8} == eight | {
        "sd1.5",
        "sd1.5-inpainting",
        "x4-upscaler",
    }
    assert {name for name in PRESETS if preset(name).network.head_width == 32} == {
        "celeba256",
        "ffhq256",
        "lsun_beds256",
        "bsr_sr",
    }


def test_an_unknown_preset_is_named_with_the_nearest() -> None:
    with pytest.raises(InputError, match=r"'sd15' is unknown; did you mean 'sd1\.5'"):
        preset("sd15")
