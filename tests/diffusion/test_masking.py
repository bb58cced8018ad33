"""Mask blending against the loop that it stands for."""

import itertools

import numpy as np
import pytest
import torch
from torch import Tensor

from latentkit.diffusion.masking import blended
from latentkit.diffusion.samplers.driver import Denoise, Denoised, sample

SIGMAS = np.array([14.0, 6.0, 2.0, 0.7, 0.2, 0.0])


def denoise(x: Tensor, sigma: float) -> Denoised:
    """A denoiser whose answer at a place depends on its neighbours."""
    near = (x + x.roll(1, 3) + x.roll(1, 2)) / 3
    return Denoised(torch.tanh(near / (1 + sigma * sigma) ** 0.5), anchor=torch.tanh(near), log_variance=near)


def plain(x: Tensor, sigma: float) -> Denoised:
    return Denoised(denoise(x, sigma).x0)


def parts() -> tuple[Tensor, Tensor, Tensor]:
    clean, eps = torch.randn(2, 3, 4, 4), torch.randn(2, 3, 4, 4)
    repaint = torch.rand(2, 1, 4, 4) < 0.5
    return clean, repaint, eps


def last(model: Denoise, x: Tensor, sampler: str) -> Tensor:
    return [step.x for step in sample(sampler, model, x, SIGMAS, None)][-1]


def test_euler_is_putting_the_kept_part_back_after_each_step() -> None:
    clean, repaint, eps = parts()
    x = clean + 14 * eps
    for sigma, after in itertools.pairwise(SIGMAS):
        x0 = plain(x, sigma).x0
        x = torch.where(repaint, x0 + (after / sigma) * (x - x0), clean + after * eps)
    torch.testing.assert_close(last(blended(plain, clean, repaint, eps), clean + 14 * eps, "euler"), x)


@pytest.mark.parametrize("sampler", ["euler", "dpm++2m", "heun"])
def test_what_is_kept_ends_as_it_was(sampler: str) -> None:
    clean, repaint, eps = parts()
    ends = last(blended(plain, clean, repaint, eps), clean + 14 * eps, sampler)
    torch.testing.assert_close(torch.where(repaint, clean, ends), clean)
    assert not torch.allclose(ends, clean, atol=0.1)


def test_every_part_of_the_answer() -> None:
    clean, repaint, eps = parts()
    x = torch.randn(2, 3, 4, 4)
    expected = denoise(torch.where(repaint, x, clean + 3 * eps), 3.0)
    x0, anchor, log_variance = blended(denoise, clean, repaint, eps)(x, 3.0)
    assert torch.equal(x0, torch.where(repaint, expected.x0, clean))
    assert torch.equal(anchor, torch.where(repaint, expected.anchor, clean))  # type: ignore[arg-type]
    assert torch.equal(log_variance, expected.log_variance)  # type: ignore[arg-type]
