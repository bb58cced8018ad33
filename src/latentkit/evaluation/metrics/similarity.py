"""Structural similarity of two pictures, at one scale and at several, with the published windows and weights."""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

WINDOW, SIGMA = 11, 1.5
C1, C2 = 0.01**2, 0.03**2
WEIGHTS = (0.0448, 0.2856, 0.3001, 0.2363, 0.1333)
"""Of each scale, the finest first (Wang et al. 2003, section 3.2)."""
ROWS = 512
"""Rows of windows that are compared at a time, so that memory does not grow with the area."""


class MultiScale(NamedTuple):
    """Similarity over `scales` halvings; fewer than five are weighted by the published weights over their sum."""

    value: float
    scales: int


def ssim(a: Tensor, b: Tensor) -> float:
    """Mean structural similarity of two pictures `c h w` in [-1, 1], 1 for equal ones, each channel by itself.

    Gaussian windows of 11x11, deviation 1.5, that lie inside (smaller where a side is), intensities in [0, 1], float64
    (Wang et al. 2004, eq. 13 to 16).
    """
    return float(_similarity(*_intensities(a, b))[0].mean())


def ms_ssim(a: Tensor, b: Tensor) -> MultiScale:
    """Structural similarity of two pictures `c h w` in [-1, 1] over as many of five scales as a window fits into.

    Contrast and structure of each scale, luminance of the last, to the power of `WEIGHTS`, multiplied; what is below
    zero counts as zero; scales are 2x2 means (Wang et al. 2003, eq. 7).
    """
    a, b = _intensities(a, b)
    scales = max(1, min(len(WEIGHTS), int(math.log2(max(min(a.shape[1:]) / WINDOW, 1))) + 1))
    weights = [weight / sum(WEIGHTS[:scales]) for weight in WEIGHTS[:scales]]
    product = a.new_ones(len(a))
    for scale, weight in enumerate(weights):
        whole, contrast = _similarity(a, b)
        product = product * (whole if scale == scales - 1 else contrast).clamp_min(0) ** weight
        a, b = F.avg_pool2d(a, 2), F.avg_pool2d(b, 2)
    return MultiScale(float(product.mean()), scales)


def _intensities(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    return (a.double().cpu() + 1) / 2, (b.double().cpu() + 1) / 2


def _similarity(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Means over windows of the whole similarity and of its contrast and structure, each by channel."""
    tall, wide = (_gaussian(side) for side in a.shape[1:])
    below = a.shape[1] - len(tall) + 1
    whole, contrast = a.new_zeros(len(a)), a.new_zeros(len(a))
    for channel in range(len(a)):
        for top in range(0, below, ROWS):
            x, y = (p[channel, top : top + ROWS + len(tall) - 1] for p in (a, b))
            moments = torch.stack([x, y, x * x, y * y, x * y])[:, None]
            moments = F.conv2d(F.conv2d(moments, tall[None, None, :, None]), wide[None, None, None])[:, 0]
            mean_x, mean_y, square_x, square_y, product = moments
            variances = square_x - mean_x**2 + square_y - mean_y**2
            structure = (2 * (product - mean_x * mean_y) + C2) / (variances + C2)
            luminance = (2 * mean_x * mean_y + C1) / (mean_x**2 + mean_y**2 + C1)
            whole[channel] += (luminance * structure).sum()
            contrast[channel] += structure.sum()
    count = below * (a.shape[2] - len(wide) + 1)
    return whole / count, contrast / count


def _gaussian(side: int) -> Tensor:
    size = min(WINDOW, side)
    places = torch.arange(size, dtype=torch.float64) - (size - 1) / 2
    weights = torch.exp(-places.square() / (2 * SIGMA**2))
    return weights / weights.sum()
