"""How the latents of a set of pictures lie: each channel's values, channels together, and their spectrum."""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

BINS = 16
"""Of the spectrum, from 0 to half a cycle a cell."""
WIDEST, BARS = 4.0, 40
"""Deviations to either side that a histogram shows, in so many bars."""


class Statistics(NamedTuple):
    """Of raw latents: `mean`, `std`, excess `kurtosis` (0: normal) by channel, and the channels' `correlation` `z z`.

    `histograms` are (deviations from the mean, density) by channel, `spectrum` (cycles a cell, power) of latents of
    deviation 1: white noise has 1 everywhere.
    """

    mean: Tensor
    std: Tensor
    kurtosis: Tensor
    correlation: Tensor
    histograms: list[list[tuple[float, float]]]
    spectrum: list[tuple[float, float]]


def statistics(latents: Sequence[Tensor]) -> Statistics:
    """The statistics of latents `z h w`, of any sizes, over all of their cells."""
    cells = torch.cat([one.double().flatten(1) for one in latents], 1)
    mean, std = cells.mean(1), cells.std(1, correction=0)
    scale = std.clamp_min(1e-12)
    standard = (cells - mean[:, None]) / scale[:, None]
    edges = torch.linspace(-WIDEST, WIDEST, BARS + 1, dtype=torch.float64)
    middles = ((edges[1:] + edges[:-1]) / 2).tolist()
    width = 2 * WIDEST / BARS
    counts = [torch.histc(row, BARS, -WIDEST, WIDEST) / (len(row) * width) for row in standard]
    return Statistics(
        mean=mean,
        std=std,
        kurtosis=(standard**4).mean(1) - 3,
        correlation=standard @ standard.T / cells.shape[1],
        histograms=[list(zip(middles, row.tolist(), strict=True)) for row in counts],
        spectrum=spectrum((one.double() - mean[:, None, None]) / scale[:, None, None] for one in latents),
    )


def spectrum(pictures: Iterable[Tensor]) -> list[tuple[float, float]]:
    """Mean power of `c h w` of any sizes by frequency, (cycles a pixel, power), averaged over directions and channels.

    Each channel's own mean, and what lies beyond half a cycle in the corners, are left out. White noise of deviation 1
    has power 1 everywhere.
    """
    power, count = torch.zeros(BINS, dtype=torch.float64), torch.zeros(BINS, dtype=torch.float64)
    for picture in pictures:
        x = picture.double()
        found = torch.fft.fft2(x, norm="ortho").abs().square().mean(0)
        rows, columns = (torch.fft.fftfreq(side, dtype=torch.float64) for side in x.shape[1:])
        radius = (rows[:, None].square() + columns[None].square()).sqrt()
        kept = (radius > 0) & (radius <= 0.5)
        places = (radius[kept] * 2 * BINS).ceil().long() - 1
        power.index_add_(0, places, found[kept])
        count.index_add_(0, places, torch.ones_like(found[kept]))
    return [((i + 0.5) / (2 * BINS), float(power[i] / count[i])) for i in range(BINS) if count[i]]
