"""Denoisers known in closed form: data that are Gaussian, or a mixture of Gaussians (points are of deviation 0)."""

import math

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
