"""Denoisers known in closed form: data that are Gaussian, or a mixture of Gaussians (points are of deviation 0)."""

import functools
import math
from typing import NamedTuple

import torch
from torch import Tensor

from latentkit.diffusion.samplers.driver import Denoise, Denoised


def gaussian(mean: float, std: float) -> Denoise:
    """The posterior mean of N(mean, std^2) data."""

    def denoise(x: Tensor, sigma: float) -> Denoised:
        return Denoised(mean + (x - mean) * (std**2 / (std**2 + sigma**2)))

    return denoise


def gaussian_path(x: Tensor, mean: float, std: float, start: float, end: float) -> Tensor:
    """Where the probability flow of N(mean, std^2) data takes `x` from sigma `start` to `end`."""
    return mean + (x - mean) * math.sqrt((std**2 + end**2) / (std**2 + start**2))


def mixture(centres: Tensor, std: float) -> Denoise:
    """The posterior mean of an even mixture of N(centre, std^2), centres `k c h w`."""

    def denoise(x: Tensor, sigma: float) -> Denoised:
        variance = std**2 + sigma**2
        away = x[:, None] - centres[None]
        weight = torch.softmax(-away.square().flatten(2).sum(2) / (2 * variance), dim=1)
        each = centres[None] + away * (std**2 / variance)
        return Denoised((weight[:, :, None, None, None] * each).sum(1))

    return denoise


def runge_kutta_path(denoise: Denoise, x: Tensor, start: float, end: float, steps: int) -> Tensor:
    """The probability flow by the classical fourth-order rule in log sigma: dx / d log sigma = x - x0."""

    def slope(x: Tensor, log_sigma: float) -> Tensor:
        return x - denoise(x, math.exp(log_sigma)).x0

    low, width = math.log(start), math.log(end / start) / steps
    for i in range(steps):
        at = low + i * width
        one = slope(x, at)
        two = slope(x + one * (width / 2), at + width / 2)
        three = slope(x + two * (width / 2), at + width / 2)
        four = slope(x + three * width, at + width)
        x = x + (one + 2 * two + 2 * three + four) * (width / 6)
    return x


def exact_path(denoise: Denoise, x: Tensor, start: float, end: float, steps: int = 400) -> Tensor:
    """The probability flow by Richardson from two of `runge_kutta_path`: fifth order, about 1e-12 with 400 steps."""
    coarse, fine = (runge_kutta_path(denoise, x, start, end, n) for n in (steps, 2 * steps))
    return fine + (fine - coarse) / 15


class Problem(NamedTuple):
    """A denoiser, a batch at sigma `start`, and where the exact flow takes that batch."""

    denoise: Denoise
    start: float
    x: Tensor
    mean: float | None = None
    std: float | None = None

    def at(self, sigma: float) -> Tensor:
        """The batch at `sigma`, above or below the start."""
        if self.mean is not None and self.std is not None:
            return gaussian_path(self.x, self.mean, self.std, self.start, sigma)
        return _solved(self.denoise, self.x, self.start, max(sigma, 1e-6))


@functools.cache
def _solved(denoise: Denoise, x: Tensor, start: float, sigma: float) -> Tensor:
    return exact_path(denoise, x, start, sigma, 4 + math.ceil(50 * abs(math.log(start / sigma))))


@functools.cache
def problems(start: float) -> tuple[Problem, Problem]:
    """A Gaussian, whose flow is closed, and a mixture of three, whose flow bends where it chooses."""
    drawn = torch.randn(6, 2, 1, 1, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    centres = torch.tensor([[1.0, 0.5], [-0.5, 1.5], [0.0, -2.0]], dtype=torch.float64)[:, :, None, None]
    x = drawn * math.hypot(1, start)
    return Problem(gaussian(0.3, 0.7), start, x, 0.3, 0.7), Problem(mixture(centres, 0.6), start, x)


class Basis:
    """Noise that shows an affine sampler its own coefficients: draw k is 1 in row k + 2 of the batch and 0 elsewhere.

    Row 0 starts at 0, row 1 at 1, the others at 0, so that x_row0 is the constant, x_row1 - x_row0 the factor of the
    start, and x_row(k+2) - x_row0 the factor of draw k: mean and variance follow without sampling.
    """

    def __init__(self, draws: int) -> None:
        self.rows, self.drawn = draws + 2, 0
        self.path: dict[float, Tensor] = {}

    def start(self) -> Tensor:
        """The batch to begin with."""
        return self._unit(1)

    def step(self, step: int, purpose: str = "step") -> Tensor:
        """One independent draw."""
        self.drawn += 1
        return self._unit(self.drawn + 1)

    def between(self, sigma: float, after: float) -> Tensor:
        """The increment of one Brownian path over 1 / sigma^2, over its deviation; the path only goes on."""
        clocks = [level**-2 for level in (sigma, after)]
        for clock in clocks:
            if clock not in self.path:
                last = max(self.path, default=clock)
                assert clock >= last, "the path is known beyond this point"
                self.path[clock] = self.path.get(last, 0 * self._unit(0))
                if clock > last:
                    self.path[clock] = self.path[clock] + math.sqrt(clock - last) * self.step(0)
        return (self.path[clocks[1]] - self.path[clocks[0]]) / math.sqrt(clocks[1] - clocks[0])

    def moments(self, x: Tensor, mean: float, variance: float) -> tuple[float, float]:
        """Mean and variance of the result where the start has `mean` and `variance`."""
        constant = x[0].flatten()[0]
        factors = x[1:].flatten() - constant
        return float(constant + factors[0] * mean), float(factors[0] ** 2 * variance + factors[1:].square().sum())

    def _unit(self, row: int) -> Tensor:
        assert row < self.rows, "more draws than rows"
        unit = torch.zeros(self.rows, 1, 1, 1, dtype=torch.float64)
        unit[row] = 1
        return unit
