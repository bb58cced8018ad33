"""The variational bound that training reports."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from latentkit.diffusion.samplers.driver import Denoise, Denoised
from latentkit.diffusion.schedule import NoiseSchedule
from latentkit.model.latent_diffusion import Architecture, LatentDiffusion, fit_network
from latentkit.nets.unet import UNetConfig
from latentkit.training.diffusion import BOUND_PICTURES, DiffusionLoss, DiffusionObjective

STD = 0.5


def objective(believed: float) -> DiffusionObjective:
    """Of pixels, with the exact denoiser of N(0, believed^2)."""
    network = UNetConfig(channels=16, multipliers=(1,), blocks=1, depth=(0,), middle_depth=0, heads=2)
    model = LatentDiffusion(fit_network(Architecture(network, size=(8, 8), schedule=NoiseSchedule("flow"))), {})

    def bind(conditioning: Any, perturbed: bool = False) -> Denoise:
        def denoise(x: Tensor, sigma: float) -> Denoised:
            return Denoised(x * (believed**2 / (believed**2 + sigma**2)))

        return denoise

    model.denoiser.bind = bind  # type: ignore[method-assign]
    return DiffusionObjective(model, DiffusionLoss(), seed=0)


def test_it_is_the_entropy_where_the_model_is_right_and_more_where_it_is_not() -> None:
    pixels = STD * torch.randn(BOUND_PICTURES, 3, 8, 8)
    batch = {"pixels": pixels, "draw": torch.arange(BOUND_PICTURES), "step": 7}
    found = objective(STD).bound(batch)
    entropy = 0.5 * math.log(2 * math.pi * math.e * STD**2)
    assert found["bound"] == pytest.approx(entropy, abs=0.1)
    assert objective(2.0).bound(batch)["bound"] > found["bound"] + 0.1
    more = {"pixels": torch.cat([pixels, 9 * pixels]), "draw": torch.arange(2 * BOUND_PICTURES), "caption": [""] * 32}
    assert objective(STD).bound(more) == found
    assert list(found) == ["bound", *(f"bound_from_sigma_{s:g}" for s in (10, 1, 0.1, 0.01, 0.001))]
    assert found["bound_from_sigma_0.01"] > found["bound_from_sigma_10"] > 0
    assert found["bound_from_sigma_0.01"] == pytest.approx(math.log(10), rel=0.15)  # a nat each unit of ln sigma
