"""Frechet distance between two sets of pictures, each taken for a normal distribution of features (Heusel et al. 2017).

With fewer pictures than features it is biased upwards, more so the fewer there are: compare it at equal numbers only.
"""

import torch
from torch import Tensor

from latentkit.errors import InputError


def frechet(x: Tensor, y: Tensor) -> float:
    """|difference of means|^2 + tr(S + T - 2 (S T)^(1/2)) of features `n d` and `m d`, computed in float64.

    S = A^T A and T = B^T B have the trace of (S T)^(1/2) in the singular values of A B^T, so that no root of a
    singular matrix is taken. Source: Dowson & Landau 1982, eq. 4. InputError for fewer than two pictures on a side.
    """
    if min(len(x), len(y)) < 2:
        raise InputError(f"a Frechet distance needs at least two pictures on each side, got {len(x)} and {len(y)}")
    x, y = x.double(), y.double()
    a, b = _root(x), _root(y)
    shift = (x.mean(0) - y.mean(0)).square().sum()
    across = torch.linalg.svdvals(a @ b.T).sum()
    return max(0.0, float(shift + a.square().sum() + b.square().sum() - 2 * across))


def _root(x: Tensor) -> Tensor:
    """A matrix whose square A^T A is the covariance of `x`, with no more rows than columns."""
    centred = (x - x.mean(0)) / (len(x) - 1) ** 0.5
    root: Tensor = torch.linalg.qr(centred, mode="r").R
    return root
