"""Guidance: functions from a denoiser to a denoiser, which compose."""

import torch
from torch import Tensor

from latentkit.diffusion.samplers.driver import Denoise, Denoised

EVERYWHERE = (0.0, float("inf"))


def classifier_free(both: Denoise, alone: Denoise, scale: float, interval: tuple[float, float] = EVERYWHERE) -> Denoise:
    """x0 = negative + scale (positive - negative) while sigma lies in `interval`, else the positive alone.

    `both` takes `2b c h w` (negative rows first, then positive) and `alone` takes `b c h w`, so that each evaluation
    is one call. Scale 1 is no guidance. Source: Ho & Salimans 2022; interval: Kynkaanniemi et al. 2024.
    """
    if scale == 1:
        return alone
    low, high = interval

    def guided(x: Tensor, sigma: float) -> Denoised:
        if not low <= sigma <= high:
            return alone(x, sigma)
        negative, positive = both(torch.cat([x, x]), sigma).x0.chunk(2)
        return Denoised(torch.lerp(negative, positive, scale), anchor=negative)

    return guided
