"""Stochastic samplers against closed forms, without a single random number.

Where the denoiser is affine a sampler is one too: `ideal.Basis` shows its coefficients, and with them the exact mean
and variance of what it draws.
"""

import math
from typing import Any

import numpy as np
import pytest
import torch
from convergence import BEGUN, EVEN, LOG, Grid, fitted
from ideal import Basis, gaussian, gaussian_path
from torch import Tensor

from latentkit.diffusion.samplers.driver import Denoise, Denoised, follow, table

ENTRIES = table()
MEAN, STD = 0.3, 0.7
OPTIONS: list[tuple[str, dict[str, Any]]] = [
    (name, options)
    for name, entry in ENTRIES.items()
    for options in (
        {},
        *({"eta": eta} for eta in (0.3, 1.0) if "eta" in entry.options),
        *({"churn": churn} for churn in (3.0, 40.0) if "churn" in entry.options),
    )
    if entry.stochastic or options
]
NOISY = {"langevin": "is met by many small steps", "predictor_corrector": "is met by many small steps"}
"""Samplers that do not give one datum the noise of each level in one interval."""
UNRATED = ("lcm", "langevin")
"""Samplers of no order: below."""
GENTLE: dict[str, dict[str, Any]] = {"edm": {"churn": 3.0}, "predictor_corrector": {"snr": 0.0}}
"""Options under which a rate shows: churn whose share is not capped, and no corrector, which is not affine."""


def moments(name: str, denoise: Denoise, std: float, sigmas: np.ndarray, **options: Any) -> list[tuple[float, float]]:
    """Mean and variance after each interval, begun with those of data N(MEAN, std^2) at sigmas[0]."""
    basis = Basis(3 * len(sigmas) + 2 * options.get("inner_steps", 0))
    steps = follow(ENTRIES[name], denoise, basis.start(), sigmas, basis, **options)
    return [basis.moments(step.x, MEAN, std**2 + float(sigmas[0]) ** 2) for step in steps]


@pytest.mark.parametrize(("name", "options"), [(n, o) for n, o in OPTIONS if n not in NOISY])
def test_one_datum_gets_exactly_the_noise_of_each_level(name: str, options: dict[str, Any]) -> None:
    sigmas = np.array([9.0, 4.0, 1.0, 0.9, 0.1, 0.0])
    for (mean, variance), sigma in zip(moments(name, gaussian(MEAN, 0.0), 0.0, sigmas, **options), sigmas[1:]):
        assert mean == pytest.approx(MEAN, abs=1e-12)
        assert variance == pytest.approx(sigma**2, rel=1e-12, abs=1e-24)


def variance_rate(name: str, grid: Grid, **options: Any) -> float:
    """The order fitted to how the variance at the end nears that of Gaussian data."""
    counts, errors = (80, 160, 320), []
    for steps in counts:
        _, variance = moments(name, gaussian(MEAN, STD), STD, grid.lay(steps)[1], **options)[-1]
        errors.append(abs(variance - STD**2 - grid.end**2))
    return fitted(counts, errors)


@pytest.mark.parametrize("grid", [LOG, BEGUN], ids=["from 20", "from 2"])
@pytest.mark.parametrize("name", [name for name, entry in ENTRIES.items() if entry.stochastic and name not in UNRATED])
def test_gaussian_data_are_met_at_the_stated_rate(name: str, grid: Grid) -> None:
    assert variance_rate(name, grid, **GENTLE.get(name, {})) == pytest.approx(ENTRIES[name].order, abs=0.15)


@pytest.mark.parametrize("name", [name for name, entry in ENTRIES.items() if "eta" in entry.options])
def test_less_noise_is_of_the_same_rate(name: str) -> None:
    assert variance_rate(name, BEGUN, eta=0.5) == pytest.approx(ENTRIES[name].order, abs=0.15)


def test_a_larger_churn_is_of_the_same_rate_once_its_share_is_not_capped() -> None:
    exact, distances = STD**2 + EVEN.end**2, []
    for steps in (160, 320):
        _, variance = moments("edm", gaussian(MEAN, STD), STD, EVEN.lay(steps)[1], churn=40.0)[-1]
        distances.append(abs(variance - exact))
    assert distances[0] / distances[1] == pytest.approx(4, rel=0.1)


@pytest.mark.parametrize("std", [0.0, STD])
@pytest.mark.parametrize("step_size", [0.5, 0.1, 0.02])
def test_langevin_meets_its_own_stationary_variance(std: float, step_size: float) -> None:
    """v / (1 - step sigma^2 / 4v) at the level sigma of data whose v is std^2 + sigma^2; v itself for small steps.

    Each step keeps 1 - a of the distance to the mean, a = step sigma^2 / 2v, and adds noise of variance 2 a v.
    """
    sigma = 0.8
    v = std**2 + sigma**2
    steps = math.ceil(15 * v / (step_size * sigma**2))
    sigmas = np.array([0.9, sigma])
    ((mean, variance),) = moments("langevin", gaussian(MEAN, std), std, sigmas, step_size=step_size, inner_steps=steps)
    assert mean == pytest.approx(MEAN, abs=1e-12)
    assert variance == pytest.approx(v / (1 - step_size * sigma**2 / (4 * v)), rel=1e-6)


def test_without_a_consistency_function_more_steps_bring_lcm_no_nearer() -> None:
    few, many = (moments("lcm", gaussian(MEAN, STD), STD, EVEN.lay(steps)[1])[-1][1] for steps in (40, 320))
    exact = STD**2 + EVEN.end**2
    assert abs(many - exact) > 0.9 * abs(few - exact) > 0.1


def test_a_consistency_function_is_sampled_exactly_in_any_number_of_steps() -> None:
    """LCM's rule with the exact map to the end of the flow, in the place of a network that learned it."""

    def consistent(x: Tensor, sigma: float) -> Denoised:
        return Denoised(gaussian_path(x, MEAN, STD, sigma, 0.0))

    sigmas = np.array([30.0, 2.0, 0.5, 0.0])
    for (mean, variance), sigma in zip(moments("lcm", consistent, STD, sigmas), sigmas[1:]):
        assert mean == pytest.approx(MEAN, abs=1e-12)
        assert variance == pytest.approx(STD**2 + sigma**2, rel=1e-12)


@pytest.mark.parametrize(
    ("name", "plain", "options"),
    [
        ("euler_ancestral", "euler", {}),
        ("ddim", "euler", {}),
        ("dpm2_ancestral", "dpm2", {}),
        ("dpm++2m_sde", "dpm++2m", {}),
        ("dpm++3m_sde", "dpm++3m", {}),
        ("dpm++sde", "dpm++2s_ancestral", {"eta": 0.0}),
    ],
)
def test_without_noise_the_stochastic_form_is_the_deterministic_one(
    name: str, plain: str, options: dict[str, Any]
) -> None:
    x = torch.randn(4, 2, 1, 1, dtype=torch.float64)
    sigmas = np.geomspace(9.0, 0.1, 9)
    ends = []
    for entry, given in ((ENTRIES[name], {"eta": 0.0}), (ENTRIES[plain], options)):
        *_, last = follow(entry, gaussian(MEAN, STD), x, sigmas, None, **given)
        ends.append(last.x.clone())
    torch.testing.assert_close(*ends, rtol=1e-13, atol=1e-13)
