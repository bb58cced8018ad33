"""Samplers against closed forms: order of convergence, exact distributions, the ends of the path."""

from typing import Any

import numpy as np
import pytest
import torch
from ideal import gaussian, mixture
from torch import Tensor

from latentkit.diffusion.noise import PictureNoise
from latentkit.diffusion.samplers.driver import Denoise, Denoised, SamplerEntry, follow, sample, sampler, table
from latentkit.diffusion.schedule import SIGMA_CAP, NoiseSchedule
from latentkit.diffusion.spacing import space
from latentkit.errors import InputError

ENTRIES = table()
DETERMINISTIC = [name for name, entry in ENTRIES.items() if not entry.stochastic]
START, END = 20.0, 0.05


def fall(steps: int) -> np.ndarray:
    """START to END, even in log sigma."""
    return np.geomspace(START, END, steps + 1)


def finish(entry: SamplerEntry, denoise: Denoise, x: Tensor, sigmas: np.ndarray, **options: Any) -> Tensor:
    *_, last = follow(entry, denoise, x, sigmas, None, **options)
    return last.x


def start() -> Tensor:
    return START * torch.randn(6, 2, 1, 1, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("name", DETERMINISTIC)
def test_evaluations_are_as_stated(name: str) -> None:
    steps = list(follow(ENTRIES[name], gaussian(0, 1), start(), fall(7), None))
    assert [step.evaluations for step in steps] == [ENTRIES[name].evaluations * i for i in range(1, 8)]


@pytest.mark.parametrize("name", ENTRIES)
def test_one_datum_is_reached_exactly(name: str) -> None:
    datum = torch.tensor([[0.3, -0.8]], dtype=torch.float64)[:, :, None, None]
    noise = PictureNoise([5], (2, 1, 1))
    *_, last = sample(name, mixture(datum, 0.0), 3.0 * noise.initial().double(), np.array([3.0, 1.0, 0.2, 0.0]), noise)
    assert torch.equal(last.x, datum)
    assert last.sigma == 0


@pytest.mark.parametrize("name", DETERMINISTIC)
def test_a_finite_data_set_is_reached(name: str) -> None:
    data = torch.tensor([[1.0, 0.5], [-0.5, 1.5], [0.0, -2.0]], dtype=torch.float64)[:, :, None, None]
    ends = finish(ENTRIES[name], mixture(data, 0.0), start(), np.append(np.geomspace(START, 0.02, 60), 0.0))
    assert (ends[:, None] - data[None]).abs().amax((2, 3, 4)).amin(1).max() < 1e-6


@pytest.mark.parametrize("name", ENTRIES)
def test_from_a_cap_the_first_interval_is_one_first_order_step(name: str) -> None:
    noise = PictureNoise([1, 2], (2, 1, 1))
    sigmas = np.array([SIGMA_CAP, 9.0, 4.0])
    first = next(sample(name, gaussian(0.3, 0.7), noise.initial() * SIGMA_CAP, sigmas, noise))
    peer = "euler_ancestral" if ENTRIES[name].stochastic else "euler"
    expected = next(sample(peer, gaussian(0.3, 0.7), noise.initial() * SIGMA_CAP, sigmas, noise))
    assert torch.equal(first.x, expected.x)


@pytest.mark.parametrize("name", DETERMINISTIC)
def test_a_flow_from_its_cap_arrives_in_float32(name: str) -> None:
    """The exact flow takes unit noise at infinity to mean + std * noise."""
    noise = PictureNoise([1, 2, 3], (2, 1, 1))
    sigmas = space("uniform", NoiseSchedule("flow"), 100)
    *_, last = sample(name, gaussian(0.3, 0.5), noise.initial() * float(sigmas[0]), sigmas, noise)
    assert last.x.dtype == torch.float32
    torch.testing.assert_close(last.x, 0.3 + 0.5 * noise.initial(), atol=0.02, rtol=0)


def test_a_cap_enters_no_multistep_history() -> None:
    """The step after a cap's interval is the one that a fresh start at its end would make."""
    noise = PictureNoise([1], (2, 1, 1))
    x = noise.initial() * SIGMA_CAP
    first, second = sample("dpm++2m", gaussian(0.3, 0.7), x, np.array([SIGMA_CAP, 9.0, 4.0]), noise)
    fresh = next(sample("dpm++2m", gaussian(0.3, 0.7), first.x, np.array([9.0, 4.0]), noise))
    assert torch.equal(second.x, fresh.x)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", ENTRIES)
def test_x_keeps_its_own_type_and_a_step_is_yielded_per_interval(name: str, dtype: torch.dtype) -> None:
    noise = PictureNoise([1], (2, 1, 1))
    sigmas = np.array([3.0, 1.0, 0.5, 0.0])
    steps = list(sample(name, gaussian(0, 1), 3 * noise.initial().to(dtype), sigmas, noise))
    assert [step.sigma for step in steps] == [1.0, 0.5, 0.0]
    assert all(step.x.dtype == step.x0.dtype == dtype for step in steps)


def test_a_run_can_be_left_between_steps() -> None:
    calls = []

    def watched(x: Tensor, sigma: float) -> Denoised:
        calls.append(sigma)
        return Denoised(x)

    next(sample("euler", watched, torch.zeros(1, 1, 1, 1), np.array([3.0, 2.0, 1.0]), None))
    assert calls == [3.0]


def test_an_unknown_sampler_is_named_with_the_nearest() -> None:
    with pytest.raises(InputError, match="'eular' is unknown; did you mean 'euler'") as error:
        sampler("eular")
    assert error.value.exit_code == 2
