"""Is it a copy? The nearest training picture of each drawn one, and what distance is usual for pictures never seen."""

from typing import NamedTuple

import torch
from torch import Tensor

from latentkit.errors import InputError

CHUNK = 256


class Nearest(NamedTuple):
    """For each of `n` pictures the distance to its nearest in a set, and that one's place, both `n`."""

    distance: Tensor
    place: Tensor


class Memorisation(NamedTuple):
    """Nearest-training-picture distances of drawn pictures, and of held-out ones as the scale.

    `ratio` is the median of the drawn ones' distances over the held-out ones': about 1 where the model draws new
    pictures, near 0 where it repeats its training set. `copies` counts drawn pictures nearer to a training picture
    than any held-out one is.
    """

    ratio: float
    drawn: float
    held: float
    copies: int
    nearest: Nearest


def nearest(queries: Tensor, reference: Tensor, apart: bool = False) -> Nearest:
    """The nearest row of `reference` `m d` to each row of `queries` `n d`, by Euclidean distance per root of `d`.

    With `apart` row i of both is the same picture and is not its own neighbour.
    """
    if len(reference) < (2 if apart else 1):
        raise InputError(f"nearest neighbours were asked for in a set of {len(reference)} pictures")
    distances, places = [], []
    for start in range(0, len(queries), CHUNK):
        rows = queries[start : start + CHUNK].double()
        table = torch.cdist(rows, reference.double())
        if apart:
            here = torch.arange(len(rows))
            table[here, start + here] = torch.inf
        found = table.min(1)
        distances.append(found.values / queries.shape[1] ** 0.5)
        places.append(found.indices)
    return Nearest(torch.cat(distances), torch.cat(places))


def memorisation(drawn: Tensor, held: Tensor | None, training: Tensor) -> Memorisation:
    """Compare drawn with held-out pictures, all as features `n d`.

    Without held-out pictures the scale is each training picture's distance to the nearest other one.
    """
    found = nearest(drawn, training)
    usual = nearest(training, training, apart=True) if held is None else nearest(held, training)
    scale, near = float(usual.distance.median()), float(found.distance.median())
    ratio = near / scale if scale > 0 else float("nan")
    return Memorisation(ratio, near, scale, int((found.distance < usual.distance.min()).sum()), found)
