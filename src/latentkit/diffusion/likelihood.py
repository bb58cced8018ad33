"""Likelihood of clean tensors `b c h w` under a `Denoise`, in nats of a whole picture: a bound, and the exact value.

The model is the one that samplers draw from: N(0, 1 + sigma_max^2) at the first noise level, followed downwards to the
smallest. `sigmas` fall, as a spacing lays them; a 0 at their end is left out.
"""

import itertools
import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from latentkit.diffusion.prediction import step_divergence
from latentkit.diffusion.samplers.driver import Denoise, Denoised


class Bound(NamedTuple):
    """An upper bound of -log p(x0) by its parts, nats: `prior` `b`, `steps` `b n` (one per interval), `decoder` `b`."""

    prior: Tensor
    steps: Tensor
    decoder: Tensor

    def total(self) -> Tensor:
        """The bound of each picture, `b`."""
        return self.prior + self.steps.sum(1) + self.decoder

    def decades(self, sigmas: np.ndarray) -> dict[float, float]:
        """The mean over pictures of `steps` down `sigmas`, summed by the power of ten that an interval ends in."""
        found: dict[float, float] = {}
        for after, value in zip(_positive(sigmas)[1:].tolist(), self.steps.mean(0).tolist()):
            decade = 10.0 ** math.floor(math.log10(after))
            found[decade] = found.get(decade, 0.0) + value
        return found


GOLDEN = (math.sqrt(5) - 1) / 2
Draw = Callable[[int], Tensor]
"""draw(i): standard normal `b c h w`, independent for every i."""


def bound(denoise: Denoise, x0: Tensor, sigmas: np.ndarray, noise: Draw, offset: float | None = None) -> Bound:
    """The variational bound, each part estimated from one draw of `noise`; float64.

    Without `offset` it is that of ancestral sampling down `sigmas`, with the denoiser's variance if it learned one (Ho
    et al. 2020, equation 5). With one, drawn evenly from [0, 1), it is that of infinitely many steps (Kingma et al.
    2021, equation 17), each interval seen at one level within it. The last estimate is the mean of a normal whose
    deviation is the smallest noise level.
    """
    sigmas, x0 = _positive(sigmas), x0.double()

    def seen(sigma: float, draw: int) -> Denoised:
        return denoise(x0 + sigma * noise(draw).to(x0), sigma)

    steps = []
    for i, (sigma, after) in enumerate(itertools.pairwise(sigmas.tolist())):
        if offset is None:
            steps.append(_divergence(seen(sigma, i), x0, sigma, after))
        else:
            width = math.log(sigma / after)
            within = sigma * math.exp(-width * ((offset + i * GOLDEN) % 1))
            steps.append(width * within**-2 * _error(seen(within, i), x0))
    last = float(sigmas[-1])
    decoder = normal(_error(seen(last, len(sigmas)), x0), x0[0].numel(), last**2)
    rows = torch.stack(steps, 1) if steps else x0.new_zeros(len(x0), 0)
    return Bound(prior(x0, float(sigmas[0])), rows, decoder)


def _divergence(answer: Denoised, x0: Tensor, sigma: float, after: float) -> Tensor:
    """KL(q(x_after | x_sigma, x0) || p(x_after | x_sigma)) of each picture, `b`."""
    share = torch.zeros_like(x0) if answer.log_variance is None else answer.log_variance.double()
    divergence = step_divergence(share, x0 - answer.x0, x0.new_tensor(sigma), x0.new_tensor(after))
    return divergence.flatten(1).sum(1)


def prior(x0: Tensor, sigma: float) -> Tensor:
    """KL(N(x0, sigma^2) || N(0, 1 + sigma^2)) of each picture, `b`: what the first noise level still says of it."""
    ratio = sigma * sigma / (1 + sigma * sigma)
    whole = x0[0].numel() * (ratio - 1 - math.log(ratio))
    return 0.5 * (whole + x0.double().square().flatten(1).sum(1) / (1 + sigma * sigma))


def log_density(denoise: Denoise, x: Tensor, sigmas: np.ndarray, probes: Tensor | None = None) -> Tensor:
    """log p(x) at the smallest noise level, `b`, by the probability flow; float64.

    The divergence is exact (one backward pass per element) or, with `probes` `k b c h w` of -1 and 1, estimated without
    bias. Between neighbouring `sigmas` a classical fourth-order step is taken in the angle whose tangent is sigma,
    where an infinite sigma is no special place. Source: Song et al. 2021 (score SDE), equations 39 and 40.
    """
    angles = np.arctan(_positive(sigmas))[::-1]
    y = x.double() * math.cos(angles[0])
    gained = torch.full_like(y[:, 0, 0, 0], y[0].numel() * math.log(math.cos(angles[0])))
    for start, end in itertools.pairwise(angles.tolist()):
        width = end - start
        slopes: list[Tensor] = []
        divergences: list[Tensor] = []
        for before, share in ((None, 0.0), (0, 0.5), (1, 0.5), (2, 1.0)):
            at = y if before is None else y + share * width * slopes[before]
            slope, divergence = _flow(denoise, at, start + share * width, probes)
            slopes.append(slope)
            divergences.append(divergence)
        y = y + width / 6 * (slopes[0] + 2 * slopes[1] + 2 * slopes[2] + slopes[3])
        gained = gained + width / 6 * (divergences[0] + 2 * divergences[1] + 2 * divergences[2] + divergences[3])
    return gained - normal(y.square().flatten(1).sum(1), y[0].numel(), 1.0)


def normal(squares: Tensor, dimensions: int, variance: float) -> Tensor:
    """-log of the normal density of `dimensions` elements at the squared distance `squares` `b` from its mean."""
    return 0.5 * (dimensions * math.log(2 * math.pi * variance) + squares / variance)


def bits_per_dimension(nats: Tensor, dimensions: int, levels: int = 256) -> Tensor:
    """Bits for each element of a picture of `levels` levels in [-1, 1], from nats -log p of one dequantised evenly.

    Source: Theis et al. 2016, section 3.1.
    """
    return nats / (dimensions * math.log(2)) + math.log2((levels - 1) / 2)


def _positive(sigmas: np.ndarray) -> np.ndarray:
    sigmas = np.asarray(sigmas, np.float64)
    sigmas = sigmas[:-1] if sigmas[-1] == 0 else sigmas
    assert sigmas[-1] > 0 and np.all(np.diff(sigmas) < 0), "noise levels fall, and end above 0"  # noqa: PT018
    return sigmas


def _error(answer: Denoised, x0: Tensor) -> Tensor:
    """|x0 - estimate|^2 of each picture, `b`."""
    return (x0 - answer.x0).square().flatten(1).sum(1)


def _flow(denoise: Denoise, y: Tensor, angle: float, probes: Tensor | None) -> tuple[Tensor, Tensor]:
    """dy / d angle of y = x cos(angle), which is (y cos - x0) / sin, and its divergence `b`."""
    cos, sin = math.cos(angle), math.sin(angle)
    with torch.enable_grad():
        free = y.detach().requires_grad_()
        x0 = denoise(free / cos, math.tan(angle)).x0
        trace = _trace(x0, free, probes)
    return (y * cos - x0.detach()) / sin, (y[0].numel() * cos - trace) / sin


def _trace(output: Tensor, given: Tensor, probes: Tensor | None) -> Tensor:
    """The trace of d output / d given of each picture, `b`: exact, or the mean over `probes` (Hutchinson 1989)."""
    if probes is None:
        basis = torch.eye(output[0].numel(), dtype=output.dtype, device=output.device)
        directions, share = basis.view(-1, 1, *output.shape[1:]).expand(-1, len(output), -1, -1, -1), 1.0
    else:
        directions, share = probes.to(output), 1 / len(probes)
    total = torch.zeros_like(given[:, 0, 0, 0])
    for direction in directions:
        (slope,) = torch.autograd.grad(output, given, direction, retain_graph=True)
        total = total + share * (slope * direction).flatten(1).sum(1)
    return total
