"""Another denoiser takes over in the middle of a run: nothing of the one before is remembered, noise goes on."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from ideal import gaussian
from torch import Tensor

from latentkit.diffusion.noise import PictureNoise
from latentkit.diffusion.samplers.driver import Denoised, Step, sample, table
from latentkit.diffusion.schedule import SIGMA_CAP, NoiseSchedule
from latentkit.diffusion.spacing import space

SIGMAS = space("karras", NoiseSchedule(kind="scaled_linear", beta_start=0.00085, beta_end=0.012), 40)
SWITCH = 11
"""Leaves more steps than those with which the order of some rules falls at the end."""
FIRST, SECOND = gaussian(0.3, 0.5), gaussian(-1.0, 0.2)
START = 14 * torch.randn(2, 1, 3, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def last(steps: Iterator[Step]) -> Tensor:
    *_, end = steps
    return end.x


@pytest.mark.parametrize("name", [name for name, entry in table().items() if not entry.stochastic])
def test_it_is_two_runs_one_after_the_other(name: str) -> None:
    middle = last(sample(name, FIRST, START, SIGMAS[: SWITCH + 1], None)).clone()
    wanted = last(sample(name, SECOND, middle, SIGMAS[SWITCH:], None))
    got = last(sample(name, FIRST, START, SIGMAS, None, later=(SWITCH, SECOND)))
    torch.testing.assert_close(got, wanted, rtol=0, atol=1e-12)
    assert (got - last(sample(name, FIRST, START, SIGMAS, None))).abs().max() > 0.1


@pytest.mark.parametrize("name", ["euler_ancestral", "dpm++2m_sde"])
def test_noise_is_that_of_the_one_run(name: str) -> None:
    """The same denoiser as its own successor changes nothing in a rule without memory."""
    noise = PictureNoise([1, 2], (1, 3, 3))
    options: dict[str, Any] = {"eta": 1.0}
    whole = last(sample(name, FIRST, START, SIGMAS, noise, **options)).clone()
    handed = last(sample(name, FIRST, START, SIGMAS, noise, later=(SWITCH, FIRST), **options))
    torch.testing.assert_close(handed, whole, rtol=0, atol=1e-12 if name == "euler_ancestral" else 0.05)


def test_every_evaluation_of_a_step_is_by_one_denoiser() -> None:
    asked: dict[str, list[float]] = {"first": [], "second": []}

    def called(name: str) -> object:
        def denoise(x: Tensor, sigma: float) -> Denoised:
            asked[name].append(sigma)
            return FIRST(x, sigma)

        return denoise

    last(sample("heun", called("first"), START, SIGMAS, None, later=(SWITCH, called("second"))))  # type: ignore[arg-type]
    assert min(asked["first"]) == SIGMAS[SWITCH]  # the second evaluation of the last step of the first
    assert max(asked["second"]) == SIGMAS[SWITCH]


def test_a_run_that_begins_in_pure_noise_is_handed_over_too() -> None:
    sigmas = np.array([SIGMA_CAP, 10.0, 1.0, 0.0])
    got = last(sample("euler", FIRST, START * SIGMA_CAP, sigmas, None, later=(1, SECOND)))
    begun = last(sample("euler", FIRST, START * SIGMA_CAP, sigmas[:2], None)).clone()
    torch.testing.assert_close(got, last(sample("euler", SECOND, begun, sigmas[1:], None)), rtol=0, atol=1e-12)
