"""Single rules against their own formulas: variances, churn, consistency, Brownian paths, Langevin, tolerance."""

import itertools
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from ideal import exact_path, gaussian, mixture
from torch import Tensor

from latentkit.diffusion.noise import PictureNoise
from latentkit.diffusion.samplers import quadrature
from latentkit.diffusion.samplers.driver import Denoise, Denoised, ancestral, sample

SIGMA, AFTER = 5.0, 2.0
UNIT = torch.ones(1, 1, 1, 1, dtype=torch.float64)


class Fixed:
    """Noise that is everywhere the same number."""

    def __init__(self, value: float) -> None:
        self.value, self.asked = value, []  # type: ignore[var-annotated]

    def step(self, step: int, purpose: str = "step") -> Tensor:
        """The number."""
        self.asked.append((step, purpose))
        return self.value * UNIT

    def between(self, sigma: float, after: float) -> Tensor:
        """The number."""
        self.asked.append((sigma, after))
        return self.value * UNIT


def one(name: str, denoise: Denoise, x: float, noise: float, **options: Any) -> float:
    """Where one interval from SIGMA to AFTER takes the number x."""
    (step,) = sample(name, denoise, x * UNIT, np.array([SIGMA, AFTER]), Fixed(noise), **options)
    return step.x.item()


def at_zero(x: Tensor, sigma: float) -> Denoised:
    """All data are 0."""
    return Denoised(torch.zeros_like(x))


@pytest.mark.parametrize("eta", [0.0, 0.4, 1.0])
@pytest.mark.parametrize("sigma", [5.0, 1e7])
def test_ancestral_levels_add_up_and_are_those_of_ddim(eta: float, sigma: float) -> None:
    down, up = ancestral(sigma, AFTER, eta)
    assert down**2 + up**2 == pytest.approx(AFTER**2, rel=1e-14)
    alpha, alpha_after = 1 / (1 + sigma**2), 1 / (1 + AFTER**2)
    published = eta * math.sqrt((1 - alpha_after) / (1 - alpha) * (1 - alpha / alpha_after))
    assert up == pytest.approx(published / math.sqrt(alpha_after), rel=1e-12)


def ddpm_variance(share: float | None, **options: Any) -> float:
    def denoise(x: Tensor, sigma: float) -> Denoised:
        return Denoised(torch.zeros_like(x), log_variance=None if share is None else share * UNIT)

    return one("ddpm", denoise, 0.0, 1.0, **options) ** 2


def test_ddpms_variances_are_the_posteriors_and_the_forward_steps() -> None:
    alpha, alpha_after = 1 / (1 + SIGMA**2), 1 / (1 + AFTER**2)
    beta = 1 - alpha / alpha_after
    small, large = (1 - alpha_after) / (1 - alpha) * beta / alpha_after, beta / alpha_after
    assert ddpm_variance(None) == pytest.approx(small, rel=1e-12)
    assert ddpm_variance(None, variance="large") == pytest.approx(large, rel=1e-12)
    for share in (0.0, 0.3, 1.0):
        learned = math.exp(share * math.log(large) + (1 - share) * math.log(small))
        assert ddpm_variance(share) == ddpm_variance(share, variance="large") == pytest.approx(learned, rel=1e-12)


@pytest.mark.parametrize("options", [{}, {"variance": "large"}])
@pytest.mark.parametrize("share", [None, 0.5])
def test_ddpm_draws_no_noise_into_zero(options: dict[str, str], share: float | None) -> None:
    answer = Denoised(0.3 * UNIT, log_variance=None if share is None else share * UNIT)
    (step,) = sample("ddpm", lambda x, sigma: answer, UNIT, np.array([SIGMA, 0.0]), Fixed(1.0), **options)
    assert step.x.item() == 0.3


def test_lcm_draws_the_whole_level_anew() -> None:
    assert one("lcm", lambda x, sigma: Denoised(0.3 * UNIT), 77.0, 1.5) == pytest.approx(0.3 + 1.5 * AFTER)


def test_churn_raises_sigma_between_its_limits_only() -> None:
    sigmas = np.array([60.0, 9.0, 1.0, 0.04, 0.02])
    seen = []

    def watched(x: Tensor, sigma: float) -> Denoised:
        seen.append(sigma)
        return at_zero(x, sigma)

    noise = Fixed(0.0)
    list(sample("edm", watched, UNIT, sigmas, noise, churn=1.0))
    assert seen == pytest.approx([60, 9, 9 * 1.25, 1, 1 * 1.25, 0.04, 0.04, 0.02])
    assert noise.asked == [(1, "churn"), (2, "churn")]
    seen.clear()
    list(sample("edm", watched, UNIT, sigmas, noise, churn=100.0))
    assert seen[2] == pytest.approx(9 * math.sqrt(2))


@pytest.mark.parametrize("name", ["dpm++2m_sde", "dpm++2m_sde_heun", "dpm++3m_sde", "dpm++sde"])
def test_one_datum_is_approached_on_one_path_whatever_the_steps(name: str) -> None:
    """The clock of the Brownian noise is that of the reverse SDE: more steps show more of the same path."""
    noise = PictureNoise([1, 2], (2, 4, 4))
    x, denoise = 8 * noise.initial(), gaussian(0.3, 0.0)
    coarse, fine = ({step.sigma: step.x.clone() for step in sample(name, denoise, x, sigmas, noise)}
                    for sigmas in (np.array([8.0, 2.0, 0.5]), 2.0 ** np.arange(3.0, -1.5, -0.5)))  # fmt: skip
    for sigma, expected in coarse.items():
        torch.testing.assert_close(fine[sigma], expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["dpm++2m_sde", "dpm++2m_sde_heun", "dpm++3m_sde", "dpm++sde", "dpm++2s_ancestral"])
@pytest.mark.parametrize("eta", [0.3, 1.0])
def test_signal_and_noise_add_up_to_the_next_level(name: str, eta: float) -> None:
    kept, fresh = one(name, at_zero, SIGMA, 0.0, eta=eta), one(name, at_zero, 0.0, 1.0, eta=eta)
    assert kept**2 + fresh**2 == pytest.approx(AFTER**2, rel=1e-12)


def test_without_noise_the_path_through_the_middle_is_that_of_2s() -> None:
    x, sigmas = 9 * torch.randn(3, 2, 2, 2, dtype=torch.float64), np.array([9.0, 4.0, 1.0, 0.3, 0.0])
    ends = []
    for name in ("dpm++sde", "dpm++2s_ancestral"):
        *_, last = sample(name, gaussian(0.3, 0.7), x, sigmas, None, eta=0.0)
        ends.append(last.x)
    torch.testing.assert_close(*ends, rtol=1e-13, atol=1e-13)


def test_the_noise_on_the_way_to_the_middle_is_of_the_same_path() -> None:
    noise = Fixed(0.0)
    list(sample("dpm++sde", at_zero, UNIT, np.array([8.0, 2.0, 0.0]), noise))
    assert noise.asked == [(8.0, 4.0), (8.0, 2.0)]


def test_langevin_meets_its_own_stationary_variance() -> None:
    """Variance v of x at one level is a fixed point: v = (1 - k q)^2 v + alpha, for Gaussian data of deviation s."""
    s, step_size, level = 0.7, 0.2, 0.5
    q = level**2 / (s**2 + level**2)
    kept = 1 - step_size / 2 * q

    def end(x: float, noise: float, inner: int) -> float:
        steps = sample("langevin", gaussian(0.0, s), x * UNIT, np.array([9.0, level]), Fixed(noise), inner_steps=inner)
        return next(iter(steps)).x.item()

    assert end(1.0, 0.0, 3) == pytest.approx(kept**3, rel=1e-12)
    added = end(0.0, 1.0, 1)
    assert added**2 == pytest.approx(step_size * level**2, rel=1e-12)
    stationary = added**2 / (1 - kept**2)
    assert stationary == pytest.approx((s**2 + level**2) / (1 - step_size * q / 4), rel=1e-12)
    noise = PictureNoise([1], (1, 60, 60))
    *_, last = sample("langevin", gaussian(0.0, s), 9 * noise.initial().double(), np.array([9.0, level]), noise,
                      inner_steps=150)  # fmt: skip
    assert last.x.var().item() == pytest.approx(stationary, rel=4 * math.sqrt(2 / 3600))


def test_the_inner_noises_of_langevin_are_apart() -> None:
    noise = Fixed(0.0)
    list(sample("langevin", at_zero, UNIT, np.array([9.0, 2.0, 1.0]), noise, inner_steps=2))
    assert noise.asked == [(0, "inner 0"), (0, "inner 1"), (1, "inner 0"), (1, "inner 1")]


def test_predictor_and_corrector_are_those_of_the_paper() -> None:
    """x += g^2 score + g z, then epsilon score + sqrt(2 epsilon) z, epsilon = 2 (snr |z| / |score|)^2."""
    noise = PictureNoise([1, 2], (2, 3, 3))
    x = 5 * noise.initial().double()
    (step,) = sample("predictor_corrector", gaussian(0.0, 0.0), x, np.array([SIGMA, AFTER]), noise, snr=0.16)
    moved = x - (SIGMA**2 - AFTER**2) * x / SIGMA**2 + math.sqrt(SIGMA**2 - AFTER**2) * noise.step(0).double()
    z, score = noise.step(0, "corrector").double(), -moved / AFTER**2
    norm = [each.flatten(1).norm(dim=1)[:, None, None, None] for each in (z, score)]
    epsilon = 2 * (0.16 * norm[0] / norm[1]) ** 2
    torch.testing.assert_close(step.x, moved + epsilon * score + (2 * epsilon).sqrt() * z)


def test_the_corrector_is_no_longer_than_half_its_level_where_the_score_vanishes() -> None:
    (step,) = sample("predictor_corrector", lambda x, sigma: Denoised(x), 0 * UNIT, np.array([SIGMA, AFTER]), Fixed(1))
    assert step.x.item() == pytest.approx(math.sqrt(SIGMA**2 - AFTER**2) + AFTER)


@pytest.mark.parametrize("order", [2, 3])
def test_the_adaptive_rule_keeps_its_tolerance_and_pays_for_it(order: int) -> None:
    centres = torch.tensor([[1.0, 0.5], [-0.5, 1.5], [0.0, -2.0]], dtype=torch.float64)[:, :, None, None]
    denoise = mixture(centres, 0.3)
    x = 9 * torch.randn(4, 2, 1, 1, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    exact = exact_path(denoise, x, 9.0, 0.05)
    errors, paid = [], []
    for tolerance in (0.1, 0.001):
        *_, last = sample("dpm_adaptive", denoise, x, np.array([9.0, 0.05]), None, tolerance=tolerance, order=order)
        errors.append((last.x - exact).abs().max().item())
        paid.append(last.evaluations)
    assert errors[1] < errors[0] < 0.3
    assert errors[1] < 0.02
    assert paid[1] > paid[0]
    assert all(evaluations % order == 0 for evaluations in paid)


def hard_below(row: int) -> Denoise:
    """Points of 0 for rows from `row` on, three bumps for those before."""

    def denoise(x: Tensor, sigma: float) -> Denoised:
        return Denoised(torch.cat([torch.tanh(9 * x[:row]) * torch.cos(3 * x[:row]), 0 * x[row:]]))

    return denoise


def test_the_worst_picture_of_a_batch_sets_the_adaptive_step() -> None:
    sigmas, x = np.array([9.0, 0.05]), torch.linspace(1, 9, 8, dtype=torch.float64)[:, None, None, None]
    *_, alone = sample("dpm_adaptive", hard_below(1), x[:1], sigmas, None)
    *_, together = sample("dpm_adaptive", hard_below(1), x, sigmas, None)
    assert together.evaluations == alone.evaluations
    torch.testing.assert_close(together.x[:1], alone.x, rtol=1e-12, atol=1e-12)


def test_the_adaptive_stride_goes_on_in_the_next_interval() -> None:
    paid = []
    for sigmas in (np.array([9.0, 0.05]), np.geomspace(9.0, 0.05, 4)):
        *_, last = sample("dpm_adaptive", gaussian(0.3, 0.7), 9 * UNIT, sigmas, None)
        paid.append(last.evaluations)
    assert paid[0] < paid[1] <= paid[0] + 2 * 3


def test_the_adaptive_rule_rejects_a_step_that_is_too_long() -> None:
    """Where the data change sharply the stride that grew before is tried, refused and shortened."""
    sigmas = []

    def sharp(x: Tensor, sigma: float) -> Denoised:
        sigmas.append(sigma)
        return Denoised(torch.full_like(x, math.tanh(40 * math.log(sigma))))

    list(sample("dpm_adaptive", sharp, 9 * UNIT, np.array([9.0, 0.05]), None))
    tried = sigmas[::3]
    assert any(later == earlier for earlier, later in itertools.pairwise(tried))


Weights = Callable[[list[float], float, float], list[float]]


@pytest.mark.parametrize(
    ("weights", "variable"),
    [
        (quadrature.polynomial, lambda s: s - 2.0),
        (quadrature.exponential_noise, lambda s: np.log(s / 2.0)),
    ],
    ids=["polynomial", "exponential_noise"],
)
@pytest.mark.parametrize("count", [1, 2, 3, 4])
def test_weights_of_the_noise_integrate_polynomials_exactly(weights: Weights, variable: Any, count: int) -> None:
    known, after = [2.0, 2.7, 3.1, 4.5][:count], 1.3
    fine, width = np.polynomial.legendre.leggauss(30)
    levels = 2.0 + (fine + 1) / 2 * (after - 2.0)
    for power in range(count):
        exact = (width * variable(levels) ** power).sum() * (after - 2.0) / 2
        found = np.dot(weights(known, 2.0, after), variable(np.array(known)) ** power)
        assert found == pytest.approx(exact, rel=1e-9, abs=1e-12)


@pytest.mark.parametrize("rate", [1.0, 2.0])
@pytest.mark.parametrize("count", [1, 2, 3, 4])
def test_weights_of_x0_integrate_polynomials_exactly(rate: float, count: int) -> None:
    """The integral of rate e^(-rate (h - t)) t^k over the interval, t = log(sigma / s)."""
    known, after = [2.0, 2.7, 3.1, 4.5][:count], 1.3
    h = math.log(2.0 / after)
    fine, width = np.polynomial.legendre.leggauss(30)
    t = (fine + 1) / 2 * h
    for power in range(count):
        exact = (width * rate * np.exp(-rate * (h - t)) * t**power).sum() * h / 2
        found = np.dot(quadrature.exponential(known, 2.0, after, rate), np.log(2.0 / np.array(known)) ** power)
        assert found == pytest.approx(exact, rel=1e-9, abs=1e-12)


def test_equal_steps_have_the_coefficients_of_adams() -> None:
    for order in (1, 2, 3, 4):
        equal = [2.0 + 0.1 * k for k in range(order)]
        np.testing.assert_allclose(quadrature.fixed(order, 2.0, 1.9), quadrature.polynomial(equal, 2.0, 1.9), rtol=1e-9)
