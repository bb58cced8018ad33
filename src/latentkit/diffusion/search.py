"""A spacing searched on a model: the few noise levels at which straight steps best keep to the path of many."""

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from latentkit.diffusion.samplers.driver import Denoise, Point, sample
from latentkit.errors import InputError

TEACHER = "dpm++2m"
LATER = 1.15
"""By how much an error of a later step counts more than one of the step before it."""


def follow(denoise: Denoise, x: Tensor, grid: np.ndarray) -> Iterator[Point]:
    """The points of the teacher's path from `x` `b c h w` at `grid[0]` down the fine `grid` to its last level."""
    for sigma, step in zip(grid, sample(TEACHER, denoise, x, grid, None)):
        yield Point(x, step.x0.clone(), float(sigma))
        x = step.x.clone()
    yield Point(x, x, float(grid[-1]))


def search(denoise: Denoise, x: Tensor, grid: np.ndarray, steps: int) -> tuple[float, ...]:
    """The `steps + 1` levels of the fine `grid`, both ends included, that suit `denoise` from `x` `b c h w`.

    Those of least local error in sum along the path of many steps. Source: Chen et al. 2024 (GITS), section 4.2.
    Errors: InputError for more steps than the grid has.
    """
    return tuple(grid[i] for i in choose(local_errors(list(follow(denoise, x, grid))), steps))


def choose(costs: np.ndarray, steps: int, later: float = LATER) -> list[int]:
    """The `steps + 1` points, the first and the last among them, of least cost: `costs[i, j]` is that of i to j.

    A cost counts `later` times as much as one a step before it.
    """
    last = len(costs) - 1
    if not 1 <= steps <= last:
        raise InputError(f"{steps} steps asked of a search over {last}; allowed are 1 to {last}", exit_code=2)
    best = [costs[:, last]]  # best[k][i]: the least cost of k + 1 steps from point i to the last
    for _ in range(steps - 1):
        best.append((costs + later * best[-1]).min(1))
    chosen = [0]
    for rest in reversed(best[:-1]):
        chosen.append(int((costs[chosen[-1]] + later * rest).argmin()))
    return [*chosen, last]


def local_errors(points: Sequence[Point]) -> np.ndarray:
    """The error of one step of Euler's rule from point i to j, `n n`; infinite unless j > i.

    It is a root mean square, of a latent scaled to variance 1 by 1 / sqrt(1 + sigma^2).
    """
    sigmas = torch.tensor([point.sigma for point in points], dtype=torch.float64)
    path = torch.stack([point.x for point in points])
    costs = np.full((len(points), len(points)), np.inf)
    for i, (x, x0, sigma) in enumerate(points[:-1]):
        after = sigmas[i + 1 :]
        ratio = (after / sigma).to(x)[:, None, None, None, None]
        apart = (x0 + ratio * (x - x0) - path[i + 1 :]).square().flatten(2).mean(2).sqrt().mean(1)
        costs[i, i + 1 :] = apart.double().cpu() * torch.rsqrt(1 + after**2)
    return costs
