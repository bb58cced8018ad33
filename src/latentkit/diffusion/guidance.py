"""Guidance: functions from denoisers to a denoiser, which compose in the order of the source.

A `Pair` says what is led away from and what to, a `Rule` makes one estimate of the two, and `guide` makes a denoiser of
both. `thresholded`, `classifier` and `differentiable` go around any denoiser.
"""

import math
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from latentkit.diffusion.samplers.driver import Denoise, Denoised

EVERYWHERE = (0.0, float("inf"))
MOMENTUM = -0.5
NORM = 15 / 256
"""Root mean square of APG's difference: a norm of 15 over the 4x128x128 latents of Stable Diffusion XL."""

Pair = Callable[[Tensor, float], tuple[Denoised, Denoised]]
"""pair(x, sigma): the estimates that are led away from (the negative) and to (the positive)."""

Rule = Callable[[Tensor, float, Tensor, Tensor], Denoised]
"""rule(x, sigma, negative, positive): one estimate of x0 from two."""


def together(joint: Denoise, weights: Sequence[float] = (1.0,)) -> Pair:
    """One call for all: `joint` takes `(1 + n) b c h w`, negative rows first, then those of each of `n` conditions.

    The positive is negative + sum of weight (condition - negative). Source: Liu et al. 2022.
    """
    count = 1 + len(weights)

    def pair(x: Tensor, sigma: float) -> tuple[Denoised, Denoised]:
        negative, *conditions = _rows(joint(torch.cat([x] * count), sigma), count)
        if tuple(weights) == (1.0,):
            return negative, conditions[0]
        terms = (weight * (each.x0 - negative.x0) for weight, each in zip(weights, conditions))
        return negative, conditions[0]._replace(x0=negative.x0 + torch.stack(list(terms)).sum(0))

    return pair


def apart(negative: Denoise, positive: Denoise) -> Pair:
    """A call for each: a weaker or disturbed model as the negative is autoguidance (Karras et al. 2024)."""
    return lambda x, sigma: (negative(x, sigma), positive(x, sigma))


def itself(denoise: Denoise) -> Pair:
    """Nothing is led away from: for rules that only add to the positive."""

    def pair(x: Tensor, sigma: float) -> tuple[Denoised, Denoised]:
        answer = denoise(x, sigma)
        return answer, answer

    return pair


def positive(pair: Pair) -> Denoise:
    """What `pair` leads to, alone."""
    return lambda x, sigma: pair(x, sigma)[1]


def guide(pair: Pair, alone: Denoise, rule: Rule, interval: tuple[float, float] = EVERYWHERE) -> Denoise:
    """What `rule` makes of `pair` while sigma lies in `interval`, else what `alone` says.

    Source of the interval: Kynkaanniemi et al. 2024.
    """
    low, high = interval

    def guided(x: Tensor, sigma: float) -> Denoised:
        if not low <= sigma <= high:
            return alone(x, sigma)
        negative, positive = pair(x, sigma)
        return rule(x, sigma, negative.x0, positive.x0)._replace(log_variance=positive.log_variance)

    return guided


def classifier_free(
    joint: Denoise, alone: Denoise, scale: float, interval: tuple[float, float] = EVERYWHERE
) -> Denoise:
    """Plain guidance of one condition, both branches in one call (see `together`); scale 1 is `alone`."""
    return alone if scale == 1 else guide(together(joint), alone, linear(scale), interval)


def linear(scale: float) -> Rule:
    """negative + scale (positive - negative). Source: Ho & Salimans 2022, equation 6, with scale 1 + w."""
    return lambda x, sigma, negative, positive: Denoised(torch.lerp(negative, positive, scale))


def plus(scale: float) -> Rule:
    """CFG++: `linear` with a scale in 0..1, noise being relative to the negative (Chung et al. 2024, algorithm 2)."""
    return lambda x, sigma, negative, positive: Denoised(torch.lerp(negative, positive, scale), anchor=negative)


def projected(
    scale: float, sigmas: np.ndarray, *, parallel: float = 0.0, momentum: float = MOMENTUM, norm: float = NORM
) -> Rule:
    """APG, for one run down `sigmas`: `linear` with another difference of positive and negative.

    To the difference is added `momentum` times that of the step before; its root mean square is brought down to
    `norm`; of its part along the positive, a share `parallel` is kept. Source: Sadat et al. 2024, algorithm 1.
    """
    ends = np.asarray(sigmas, np.float64)[1:]
    step, before, latest = -1, None, None

    def rule(x: Tensor, sigma: float, negative: Tensor, positive: Tensor) -> Denoised:
        nonlocal step, before, latest
        now = int(np.count_nonzero(ends >= sigma))
        if now > step:  # later evaluations of a step, and churned ones, start from the same past
            step, before = now, latest
        difference = positive - negative
        latest = difference if before is None else difference + momentum * before
        size = latest.square().mean((1, 2, 3), keepdim=True).sqrt()
        moved = latest * (norm / size).clamp(max=1)
        power = positive.square().sum((1, 2, 3), keepdim=True).clamp_min(1e-12)
        along = (moved * positive).sum((1, 2, 3), keepdim=True) / power * positive
        taken = moved + (parallel - 1) * along
        return Denoised(torch.lerp(negative + (difference - taken), positive, scale))

    return rule


def rescaled(rule: Rule, share: float) -> Rule:
    """`rule` with a `share` of its change of the deviation of v undone, per picture.

    Source: Lin et al. 2023, algorithm 2. There v = x / (1 + sigma^2) - x0, up to a factor.
    """

    def changed(x: Tensor, sigma: float, negative: Tensor, positive: Tensor) -> Denoised:
        answer = rule(x, sigma, negative, positive)
        own, guided = (x0 - x / (1 + sigma * sigma) for x0 in (positive, answer.x0))
        factor = own.std((1, 2, 3), keepdim=True) / guided.std((1, 2, 3), keepdim=True)
        return answer._replace(x0=answer.x0 + share * (factor - 1) * guided)

    return changed


def perturbed(rule: Rule, disturbed: Denoise, scale: float) -> Rule:
    """`rule`, and `scale` (positive - disturbed) besides: perturbed-attention guidance (Ahn et al. 2024)."""

    def changed(x: Tensor, sigma: float, negative: Tensor, positive: Tensor) -> Denoised:
        answer = rule(x, sigma, negative, positive)
        return answer._replace(x0=answer.x0 + scale * (positive - disturbed(x, sigma).x0))

    return changed


def thresholded(
    denoise: Denoise, percentile: float, decode: Callable[[Tensor], Tensor], encode: Callable[[Tensor], Tensor]
) -> Denoise:
    """Dynamic thresholding: where a share 1 - `percentile` of a picture's values leaves [-1, 1], it is cut and shrunk.

    `decode` takes x0 to pixels and `encode` back. Source: Saharia et al. 2022, section 2.3.
    """

    def cut(x: Tensor, sigma: float) -> Denoised:
        answer = denoise(x, sigma)
        pixels = decode(answer.x0)
        values = pixels.abs().flatten(1).sort(1).values  # torch.quantile refuses more than 2^24 values
        place = percentile * (values.shape[1] - 1)
        below, above = values[:, math.floor(place)], values[:, math.ceil(place)]
        limit = torch.lerp(below, above, place % 1).clamp(min=1)[:, None, None, None]
        return answer._replace(x0=encode(pixels.clamp(-limit, limit) / limit))

    return cut


def classifier(denoise: Denoise, log_probability: Callable[[Tensor, float], Tensor], scale: float) -> Denoise:
    """x0 + scale sigma^2 grad log p(c | x, sigma), where `log_probability(x, sigma)` is `b`, in nats.

    Scale 1 is Bayes' rule. Source: Dhariwal & Nichol 2021, algorithm 2.
    """

    def guided(x: Tensor, sigma: float) -> Denoised:
        answer = denoise(x, sigma)
        with torch.inference_mode(False), torch.enable_grad():
            free = x.clone().requires_grad_()
            (slope,) = torch.autograd.grad(log_probability(free, sigma).sum(), free)
        return answer._replace(x0=answer.x0 + scale * sigma * sigma * slope)

    return guided


def differentiable(denoise: Denoise, loss: Callable[[Tensor], Tensor], scale: float) -> Denoise:
    """x0 - scale sigma^2 grad_x loss(x0(x)), the gradient taken through the denoiser; `loss(x0)` is `b`.

    A loss that is a negative log-likelihood in nats, summed over the picture, and scale 1 make it Bayes' rule with the
    likelihood at x0. Source: Rombach et al. 2022, appendix C; Chung et al. 2023 (DPS).
    """

    def guided(x: Tensor, sigma: float) -> Denoised:
        with torch.inference_mode(False), torch.enable_grad():
            free = x.clone().requires_grad_()
            answer = denoise(free, sigma)
            (slope,) = torch.autograd.grad(loss(answer.x0).sum(), free)
        anchor, log_variance = (None if part is None else part.detach() for part in answer[1:])
        return Denoised(answer.x0.detach() - scale * sigma * sigma * slope, anchor, log_variance)

    return guided


def _rows(answer: Denoised, count: int) -> list[Denoised]:
    """The answers of `count` branches that were evaluated in one call."""
    parts = ([None] * count if part is None else part.chunk(count) for part in answer)
    return [Denoised(*part) for part in zip(*parts)]
