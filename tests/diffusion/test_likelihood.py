"""The bound and the exact density against mixtures and Gaussians whose density is known."""

import itertools
import math

import numpy as np
import pytest
import torch
from ideal import gaussian, mixture
from torch import Tensor

from latentkit.diffusion.likelihood import Bound, Draw, bits_per_dimension, bound, log_density, prior
from latentkit.diffusion.noise import PictureNoise
from latentkit.diffusion.samplers.driver import Denoised
from latentkit.diffusion.schedule import SIGMA_CAP

SHAPE = (3, 1, 2)
CENTRES = torch.randn(4, *SHAPE, dtype=torch.float64, generator=torch.Generator().manual_seed(2)) * 0.8
STD = 0.3
MIXTURE = mixture(CENTRES, STD)
LEVELS = np.geomspace(80.0, 0.01, 60)
COUNT = 1500
BITS = math.log(2) * math.prod(SHAPE)


def log_mixture(x: Tensor, sigma: float) -> Tensor:
    """The mixture's own log density at noise `sigma`."""
    variance, d = STD**2 + sigma**2, math.prod(SHAPE)
    away = (x[:, None] - CENTRES).square().flatten(2).sum(2)
    each = -away / (2 * variance) - d / 2 * math.log(2 * math.pi * variance)
    return each.logsumexp(1) - math.log(len(CENTRES))


def drawn(count: int) -> Tensor:
    generator = torch.Generator().manual_seed(3)
    chosen = CENTRES[torch.arange(count) % len(CENTRES)]
    return chosen + STD * torch.randn(count, *SHAPE, dtype=torch.float64, generator=generator)


def noise(count: int, seed: int = 0) -> Draw:
    """One stream per picture."""
    return PictureNoise(range(seed, seed + count), SHAPE).step


def cheap(step: int) -> Tensor:
    return torch.randn(COUNT, *SHAPE, dtype=torch.float64)


def test_the_flow_gives_the_mixtures_own_density() -> None:
    """To 1e-3 bits per dimension, and far below; from a finite first level its mismatch is left."""
    x, levels = drawn(6), np.append(np.append([SIGMA_CAP], LEVELS), 0.0)
    found = log_density(MIXTURE, x, levels)
    assert ((found - log_mixture(x, 0.01)).abs() / BITS).max() < 1e-5
    assert 1e-3 < ((log_density(MIXTURE, x, LEVELS) - log_mixture(x, 0.01)).abs() / BITS).max() < 1e-2
    wrong = log_density(lambda x, sigma: Denoised(MIXTURE(x, sigma).x0 * 1.01), x, levels)
    assert ((wrong - log_mixture(x, 0.01)).abs() / BITS).max() > 1e-2


def test_the_flow_converges_at_fourth_order() -> None:
    """Of N(m, s^2) it takes x to m + (x - m) r, r^2 = (s^2 + T^2) / (s^2 + e^2), from noise e to T."""
    x, mean, std, (high, low), errors = drawn(3), 0.2, 0.5, (80.0, 0.01), []
    stretch = math.sqrt((std**2 + high**2) / (std**2 + low**2))
    first = torch.distributions.Normal(0.0, math.sqrt(1 + high**2)).log_prob(mean + (x - mean) * stretch)
    exact = first.flatten(1).sum(1) + math.prod(SHAPE) * math.log(stretch)
    for steps in (20, 40):
        levels = np.geomspace(high, low, steps + 1)
        errors.append(float((log_density(gaussian(mean, std), x, levels) - exact).abs().max()))
    assert math.log2(errors[0] / errors[1]) == pytest.approx(4, abs=0.4)


def test_probes_estimate_the_trace_without_bias() -> None:
    """All sign vectors together are exact; each alone is not; a picture's own probes make a batch its singles."""
    x, levels = drawn(2), LEVELS[::6]
    exact = log_density(MIXTURE, x, levels)
    signs = torch.tensor(list(itertools.product([-1.0, 1.0], repeat=math.prod(SHAPE)))).view(-1, 1, *SHAPE)
    every = log_density(MIXTURE, x, levels, signs.expand(-1, 2, -1, -1, -1))
    torch.testing.assert_close(every, exact)
    one = log_density(MIXTURE, x, levels, signs[5:6].expand(-1, 2, -1, -1, -1))
    assert not torch.allclose(one, exact, atol=1e-4)
    assert torch.equal(one[1:], log_density(MIXTURE, x[1:], levels, signs[5:6]))


@pytest.mark.parametrize("endless", [True, False])
def test_the_bound_is_worse_than_the_exact_value_and_tight_without_end(endless: bool) -> None:
    x = drawn(COUNT)
    exact = -log_mixture(x, 0.0).mean()
    runs = [bound(MIXTURE, x, LEVELS, cheap, i / 6 + 0.1 if endless else None).total().mean() for i in range(6)]
    found, spread = torch.stack(runs).mean(), torch.stack(runs).std() / len(runs) ** 0.5
    gap = float(found - exact) / BITS
    assert spread / BITS < 0.01
    assert gap > -3 * spread / BITS
    assert gap < 0.03 if endless else 0.1 < gap < 1


def test_a_wrong_denoiser_has_a_higher_bound() -> None:
    x = drawn(COUNT)
    right, wrong = (bound(d, x, LEVELS, cheap, 0.3).total().mean() for d in (MIXTURE, gaussian(0.0, 1.0)))
    assert wrong > right + 0.5


def test_the_bound_of_a_gaussian_in_closed_form() -> None:
    """E|x0 - x0^|^2 of N(0, s^2) is d s^2 t^2 / (s^2 + t^2) at noise t: every part has a known mean."""
    std, count, d = 0.7, 4000, math.prod(SHAPE)
    levels = np.array([9.0, 2.0, 0.5, 0.1])
    x = std * torch.randn(count, *SHAPE, dtype=torch.float64)
    found = bound(gaussian(0.0, std), x, levels, lambda step: torch.randn(count, *SHAPE))
    error = d * std**2 * levels**2 / (std**2 + levels**2)
    steps = 0.5 * (levels[1:] ** -2 - levels[:-1] ** -2) * error[:-1]
    torch.testing.assert_close(found.steps.mean(0), torch.from_numpy(steps), rtol=0.05, atol=0)
    decoder = 0.5 * (d * math.log(2 * math.pi * 0.01) + error[-1] / 0.01)
    assert float(found.decoder.mean()) == pytest.approx(decoder, rel=0.05)
    q = torch.distributions.Normal(x, 9.0)
    p = torch.distributions.Normal(torch.zeros_like(x), math.sqrt(82.0))
    torch.testing.assert_close(found.prior, torch.distributions.kl_divergence(q, p).flatten(1).sum(1))
    torch.testing.assert_close(found.total(), found.prior + found.steps.sum(1) + found.decoder)


def test_a_learned_variance_enters_the_bound_of_finite_steps() -> None:
    """Against torch's KL of two normals whose variances lie `share` of the way between the known ones."""
    x, share, levels = drawn(3), 0.3, np.array([2.0, 0.5])

    def learned(x: Tensor, sigma: float) -> Denoised:
        return MIXTURE(x, sigma)._replace(log_variance=torch.full_like(x, share))

    eps = noise(3)(0).double()
    found = bound(learned, x, levels, noise(3)).steps[:, 0]
    s, t = 0.5, 2.0
    noisy = x + t * eps
    small, large = s**2 * (t**2 - s**2) / t**2, (t**2 - s**2) * (1 + s**2) / (1 + t**2)
    variance = small ** (1 - share) * large**share
    means = [s**2 / t**2 * noisy + (1 - s**2 / t**2) * x0 for x0 in (x, MIXTURE(noisy, t).x0)]
    q, p = (torch.distributions.Normal(mean, v**0.5) for mean, v in zip(means, (small, variance)))
    torch.testing.assert_close(found, torch.distributions.kl_divergence(q, p).flatten(1).sum(1))
    assert not torch.allclose(found, bound(MIXTURE, x, levels, noise(3)).steps[:, 0])


def test_a_batch_of_bounds_equals_its_singles() -> None:
    x = drawn(3)
    together = bound(MIXTURE, x, LEVELS, noise(3), 0.3)
    for i in range(3):
        alone = bound(MIXTURE, x[i : i + 1], LEVELS, noise(1, i), 0.3)
        assert all(torch.allclose(a, t[i : i + 1], rtol=1e-12, atol=1e-12) for a, t in zip(alone, together))


def test_an_infinite_level_says_nothing() -> None:
    x = drawn(3)
    assert prior(x, SIGMA_CAP).abs().max() < 1e-9
    assert prior(x, 1.0).min() > 0.1
    one = bound(MIXTURE, x, np.array([SIGMA_CAP, 0.5]), noise(3))
    assert isinstance(one, Bound)
    assert torch.isfinite(one.total()).all()


def test_bits_per_dimension_of_evenly_spread_levels_is_eight() -> None:
    """Uniform over the 256 levels and their widths: density (255/2 / 256) per element of [-1 - 1/255, 1 + 1/255]."""
    d = 12
    nats = torch.tensor([-d * math.log(255 / 2 / 256)], dtype=torch.float64)
    assert float(bits_per_dimension(nats, d)) == pytest.approx(8)
    assert float(bits_per_dimension(nats + d * math.log(2), d)) == pytest.approx(9)
