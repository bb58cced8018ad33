"""Samplers against closed forms: order of convergence, exact distributions, the ends of the path."""

import functools
import inspect
import math
from collections.abc import Callable, Iterator

import numpy as np
import pytest
import torch
from ideal import gaussian, gaussian_path, mixture, runge_kutta_path
from torch import Tensor

from latentkit.diffusion.noise import PictureNoise
from latentkit.diffusion.samplers.driver import Denoise, Denoised, Sampler, Step, sample, sampler, table
from latentkit.diffusion.schedule import SIGMA_CAP, NoiseSchedule
from latentkit.diffusion.spacing import space
from latentkit.errors import InputError

ENTRIES = table()
DETERMINISTIC = [name for name, entry in ENTRIES.items() if not entry.stochastic]
STOCHASTIC = [name for name, entry in ENTRIES.items() if entry.stochastic]
START, END = 20.0, 0.05


def no_noise(step: int, purpose: str = "step") -> Tensor:
    raise AssertionError("a deterministic sampler asked for noise")


def fall(steps: int) -> np.ndarray:
    """START to END, even in log sigma."""
    return np.geomspace(START, END, steps + 1)


def finish(run: Sampler, denoise: Denoise, x: Tensor, sigmas: np.ndarray) -> Tensor:
    for step in run(denoise, x, sigmas, no_noise):
        x = step.x
    return x


def start() -> Tensor:
    return START * torch.randn(6, 2, 1, 1, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


@functools.cache
def problems() -> list[tuple[Denoise, Tensor]]:
    """Denoisers and where their exact flow takes `start()`."""
    centres = torch.tensor([[1.0, 0.5], [-0.5, 1.5], [0.0, -2.0]], dtype=torch.float64)[:, :, None, None]
    bumps = mixture(centres, 0.6)
    return [
        (gaussian(0.3, 0.7), gaussian_path(start(), 0.3, 0.7, START, END)),
        (bumps, runge_kutta_path(bumps, start(), START, END, 400)),
    ]


def observed_orders(run: Sampler) -> list[float]:
    """log2 of how the error falls when the steps double, per problem."""
    orders = []
    for denoise, exact in problems():
        coarse, fine = ((finish(run, denoise, start(), fall(n)) - exact).abs().max().item() for n in (80, 160))
        orders.append(math.log2(coarse / fine))
    return orders


@pytest.mark.parametrize("name", DETERMINISTIC)
def test_converges_at_its_stated_order(name: str) -> None:
    for order in observed_orders(ENTRIES[name].run):
        assert order == pytest.approx(ENTRIES[name].order, abs=0.15)


def mutant(function: Callable[..., Iterator[Step]], old: str, new: str) -> Sampler:
    """The sampler with one expression of its source changed."""
    function = inspect.unwrap(function)
    source = inspect.getsource(function)
    assert source.count(old) == 1, f"{function.__name__} has no single {old!r}"
    scope = dict(vars(inspect.getmodule(function)))
    exec("from __future__ import annotations\n" + source.replace(old, new), scope)
    changed: Sampler = scope[function.__name__]
    return changed


@pytest.mark.parametrize(
    ("name", "old", "new"),
    [
        ("euler", "after / sigma", "1.01 * after / sigma"),
        ("heun", "0.5 *", "0.505 *"),
        ("heun", "slope + ", "1.01 * slope + "),
        ("dpm++2m", "2 * last", "2.02 * last"),
        ("dpm++2m", "after / sigma))\n", "1.01 * after / sigma))\n"),
    ],
)
def test_a_coefficient_that_is_one_percent_off_fails_the_order_test(name: str, old: str, new: str) -> None:
    entry = ENTRIES[name]
    assert observed_orders(mutant(entry.run, old, old)) == observed_orders(entry.run)
    assert min(observed_orders(mutant(entry.run, old, new))) < entry.order - 0.15


@pytest.mark.parametrize("name", DETERMINISTIC)
def test_evaluations_are_as_stated(name: str) -> None:
    calls = 0

    def counted(x: Tensor, sigma: float) -> Denoised:
        nonlocal calls
        calls += 1
        return gaussian(0, 1)(x, sigma)

    finish(ENTRIES[name].run, counted, start(), fall(7))
    assert calls == 7 * ENTRIES[name].evaluations


@pytest.mark.parametrize("name", ENTRIES)
def test_one_datum_is_reached_exactly(name: str) -> None:
    datum = torch.tensor([[0.3, -0.8]], dtype=torch.float64)[:, :, None, None]
    noise = PictureNoise([5], (2, 1, 1))
    *_, last = sample(
        name, mixture(datum, 0.0), 3.0 * noise.initial().double(), np.array([3.0, 1.0, 0.2, 0.0]), noise.step
    )
    assert torch.equal(last.x, datum)
    assert last.sigma == 0


@pytest.mark.parametrize("name", DETERMINISTIC)
def test_a_finite_data_set_is_reached(name: str) -> None:
    data = torch.tensor([[1.0, 0.5], [-0.5, 1.5], [0.0, -2.0]], dtype=torch.float64)[:, :, None, None]
    ends = finish(ENTRIES[name].run, mixture(data, 0.0), start(), np.append(np.geomspace(START, 0.02, 60), 0.0))
    assert (ends[:, None] - data[None]).abs().amax((2, 3, 4)).amin(1).max() < 1e-6


@pytest.mark.parametrize("name", STOCHASTIC)
def test_ancestral_steps_keep_the_exact_distribution_of_one_datum(name: str) -> None:
    count, datum = 40_000, 0.7
    one = mixture(torch.full((1, 1, 1, 1), datum, dtype=torch.float64), 0.0)
    streams = torch.Generator().manual_seed(3)

    def noise(step: int, purpose: str = "step") -> Tensor:
        return torch.randn(count, 1, 1, 1, dtype=torch.float64, generator=streams)

    sigmas = np.array([9.0, 4.0, 1.0, 0.9, 0.1])
    for step in sample(name, one, datum + 9.0 * noise(0), sigmas, noise):
        z = ((step.x - datum) / step.sigma).flatten()
        moments = [z.mean(), z.square().mean() - 1, z.pow(3).mean(), z.pow(4).mean() - 3]
        deviations = [1, math.sqrt(2), math.sqrt(15), math.sqrt(96)]
        for moment, deviation in zip(moments, deviations):
            assert abs(moment) < 4.5 * deviation / math.sqrt(count)


@pytest.mark.parametrize("name", STOCHASTIC)
def test_ancestral_noise_and_signal_add_up_to_the_next_level(name: str) -> None:
    """What is left of x and what comes new, both measured by their response, have the variance of the next sigma."""
    datum = mixture(torch.zeros(1, 1, 1, 1, dtype=torch.float64), 0.0)
    unit = torch.ones(1, 1, 1, 1, dtype=torch.float64)
    sigma, after = 5.0, 2.0
    (kept,) = sample(name, datum, sigma * unit, np.array([sigma, after]), lambda step, purpose="step": 0 * unit)
    (fresh,) = sample(name, datum, 0 * unit, np.array([sigma, after]), lambda step, purpose="step": unit)
    assert kept.x.item() ** 2 + fresh.x.item() ** 2 == pytest.approx(after**2, rel=1e-14)


@pytest.mark.parametrize("name", ENTRIES)
def test_from_a_cap_the_first_interval_is_one_first_order_step(name: str) -> None:
    noise = PictureNoise([1, 2], (2, 1, 1))
    sigmas = np.array([SIGMA_CAP, 9.0, 4.0])
    first = next(sample(name, gaussian(0.3, 0.7), noise.initial() * SIGMA_CAP, sigmas, noise.step))
    peer = "euler_ancestral" if ENTRIES[name].stochastic else "euler"
    expected = next(sample(peer, gaussian(0.3, 0.7), noise.initial() * SIGMA_CAP, sigmas, noise.step))
    assert torch.equal(first.x, expected.x)


@pytest.mark.parametrize("name", DETERMINISTIC)
def test_a_flow_from_its_cap_arrives_in_float32(name: str) -> None:
    """The exact flow takes unit noise at infinity to mean + std * noise."""
    noise = PictureNoise([1, 2, 3], (2, 1, 1))
    sigmas = space("uniform", NoiseSchedule("flow"), 100)
    *_, last = sample(name, gaussian(0.3, 0.5), noise.initial() * float(sigmas[0]), sigmas, noise.step)
    assert last.x.dtype == torch.float32
    torch.testing.assert_close(last.x, 0.3 + 0.5 * noise.initial(), atol=0.02, rtol=0)


def test_a_cap_enters_no_multistep_history() -> None:
    """The step after a cap's interval is the one that a fresh start at its end would make."""
    noise = PictureNoise([1], (2, 1, 1))
    x = noise.initial() * SIGMA_CAP
    first, second = sample("dpm++2m", gaussian(0.3, 0.7), x, np.array([SIGMA_CAP, 9.0, 4.0]), noise.step)
    fresh = next(sample("dpm++2m", gaussian(0.3, 0.7), first.x, np.array([9.0, 4.0]), noise.step))
    assert torch.equal(second.x, fresh.x)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", ENTRIES)
def test_x_keeps_its_own_type_and_a_step_is_yielded_per_interval(name: str, dtype: torch.dtype) -> None:
    noise = PictureNoise([1], (2, 1, 1))
    sigmas = np.array([3.0, 1.0, 0.5, 0.0])
    steps = list(sample(name, gaussian(0, 1), 3 * noise.initial().to(dtype), sigmas, noise.step))
    assert [step.sigma for step in steps] == [1.0, 0.5, 0.0]
    assert all(step.x.dtype == step.x0.dtype == dtype for step in steps)


def test_a_run_can_be_left_between_steps() -> None:
    calls = []

    def watched(x: Tensor, sigma: float) -> Denoised:
        calls.append(sigma)
        return Denoised(x)

    next(sample("euler", watched, torch.zeros(1, 1, 1, 1), np.array([3.0, 2.0, 1.0]), no_noise))
    assert calls == [3.0]


def test_an_unknown_sampler_is_named_with_the_nearest() -> None:
    with pytest.raises(InputError, match="'eular' is unknown; did you mean 'euler'") as error:
        sampler("eular")
    assert error.value.exit_code == 2
