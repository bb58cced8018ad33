"""Kernel distance between two sets of pictures (Binkowski et al. 2018), unbiased at any number of pictures."""

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from latentkit.diffusion.noise import keyed_bits
from latentkit.errors import InputError

SUBSETS = 100
MOST = 1000  # pictures a subset


class Kid(NamedTuple):
    """Mean and deviation of MMD^2 over `subsets` draws of `size` pictures from sets of `first` and `second`."""

    mean: float
    std: float
    subsets: int
    size: int
    first: int
    second: int


def mmd2(x: Tensor, y: Tensor) -> float:
    """Unbiased squared maximum mean discrepancy of features `n d` and `m d`; about 0, below it too, for equal sources.

    Kernel (x.y / d + 1)^3; computed in float64. Source: Gretton et al. 2012, lemma 6 (for n = m also Binkowski et al.
    2018, equation 4).
    """
    n, m = len(x), len(y)
    if min(n, m) < 2:
        raise InputError(f"a kernel distance needs at least two pictures on each side, got {n} and {m}")
    x, y = x.double(), y.double()
    within_x, within_y, across = _kernel(x, x), _kernel(y, y), _kernel(x, y)
    first = (within_x.sum() - within_x.diagonal().sum()) / (n * (n - 1))
    second = (within_y.sum() - within_y.diagonal().sum()) / (m * (m - 1))
    return float(first + second - 2 * across.mean())


def _kernel(x: Tensor, y: Tensor) -> Tensor:
    return (x @ y.T / x.shape[1] + 1) ** 3


def kid(x: Tensor, y: Tensor, *, seed: int = 0) -> Kid:
    """`mmd2` over 100 random subsets of half the smaller set (at most 1,000 pictures) of features `n d` and `m d`.

    The subsets are a function of `seed` and the sizes; InputError for fewer than four pictures on a side.
    """
    smaller = min(len(x), len(y))
    if smaller < 4:
        raise InputError(f"a kernel distance over subsets needs at least four pictures on each side, got {smaller}")
    size = min(MOST, smaller // 2)
    values = [
        mmd2(x[_chosen(len(x), size, seed, "x", subset)], y[_chosen(len(y), size, seed, "y", subset)])
        for subset in range(SUBSETS)
    ]
    return Kid(float(np.mean(values)), float(np.std(values)), SUBSETS, size, len(x), len(y))


def _chosen(length: int, size: int, seed: int, side: str, subset: int) -> Tensor:
    """`size` different places out of `length`."""
    order = np.argsort(keyed_bits(length, "kid", seed, side, subset), kind="stable")
    return torch.from_numpy(order[:size])
