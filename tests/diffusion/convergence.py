"""How fast samplers converge to the exact flow: errors on the closed forms of `ideal`, orders fitted to them."""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
from ideal import Problem, problems
from torch import Tensor

from latentkit.diffusion.samplers.driver import Point, SamplerEntry, follow, table
from latentkit.diffusion.samplers.singlestep import adaptive

PAST = 5
"""Known points that are put before the start: more than any sampler remembers."""


class Silence:
    """In the place of noise where none may be asked for."""

    def step(self, step: int, purpose: str = "step") -> Tensor:
        """Never called."""
        raise AssertionError("a deterministic sampler asked for noise")

    def between(self, sigma: float, after: float) -> Tensor:
        """Never called."""
        raise AssertionError("a deterministic sampler asked for noise")


FITTED = [name for name, entry in table().items() if not entry.stochastic]


class Grid(NamedTuple):
    """A ladder of sigmas with any number of steps: where `warp` is even, from `start` to `end`."""

    start: float
    end: float
    warp: Callable[[Any], Any]
    back: Callable[[Any], Any]

    def lay(self, steps: int) -> tuple[list[float], np.ndarray]:
        """`PAST` sigmas above the start, and the ladder."""
        low, high = float(self.warp(self.end)), float(self.warp(self.start))
        width = (high - low) / steps
        past = [float(self.back(high + k * width)) for k in range(PAST, 0, -1)]
        ladder = np.asarray(self.back(high - width * np.arange(steps + 1)))
        ladder[0], ladder[-1] = self.start, self.end
        return past, ladder


LOG = Grid(20.0, 0.05, np.log, np.exp)
EVEN = Grid(5.0, 0.5, np.asarray, np.asarray)
BEGUN = Grid(2.0, 0.05, np.log, np.exp)
"""Begins where the flow bends, so that a poor beginning shows."""
TO_ZERO = Grid(5.0, 0.0, np.asarray, np.asarray)


def error(entry: SamplerEntry, problem: Problem, grid: Grid, steps: int, seeded: bool, **options: Any) -> float:
    """The largest distance to the exact flow at the end, its history known or begun by the sampler itself."""
    past, sigmas = grid.lay(steps)
    history: Sequence[Point] = ()
    if seeded:
        history = [Point(x := problem.at(sigma), problem.denoise(x, sigma).x0, sigma) for sigma in past]
    x = problem.x
    for step in follow(entry, problem.denoise, x, sigmas, Silence(), history, **options):
        x = step.x
    return float((x - problem.at(grid.end)).abs().max())


def fitted(steps: Sequence[int], errors: Sequence[float]) -> float:
    """The order that least squares fit to log error over log steps."""
    return -float(np.polyfit(np.log(steps), np.log(errors), 1)[0])


class Column(NamedTuple):
    """One way of measuring: the grid, how many steps, and whether the past before the start is known."""

    title: str
    grid: Grid
    steps: tuple[int, ...]
    seeded: bool
    problems: int = 2


COLUMNS = {
    "log": Column("past known; even in log sigma, 20 to 0.05", LOG, (80, 160, 320), True),
    "even": Column("past known; even in sigma, 5 to 0.5", EVEN, (80, 160, 320), True),
    "begun": Column("own start; even in log sigma, 2 to 0.05", BEGUN, (80, 160, 320), False),
    "to zero": Column("own start; even in sigma, 5 to 0", TO_ZERO, (320, 640, 1280), False, 1),
}


COARSER = {adaptive: 4}
"""By how much fewer steps: the adaptive rule looks at every latent, so that its steps are dear."""


def orders(entry: SamplerEntry, column: str, **options: Any) -> tuple[float, ...]:
    """The orders that a sampler shows, one for each problem."""
    _, grid, counts, seeded, most = COLUMNS[column]
    counts = tuple(count // COARSER.get(entry.run, 1) for count in counts)
    return tuple(
        fitted(counts, [error(entry, problem, grid, steps, seeded, **options) for steps in counts])
        for problem in problems(grid.start)[:most]
    )


@functools.cache
def measured(name: str, column: str) -> tuple[float, ...]:
    """`orders` of the sampler called `name`."""
    return orders(table()[name], column)


def page() -> str:
    """The table of measured orders, in Markdown."""
    rows = ["| sampler | stated | " + " | ".join(column.title for column in COLUMNS.values()) + " |"]
    rows.append("| --- | --- |" + " --- |" * len(COLUMNS))
    for name in FITTED:
        shown = (", ".join(f"{value:.1f}" for value in measured(name, key)) for key in COLUMNS)
        rows.append(f"| `{name}` | {table()[name].order} | " + " | ".join(shown) + " |")
    return "\n".join(rows) + "\n"
