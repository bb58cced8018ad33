"""How a budget of time is shared: arithmetic on measured step times, nothing else."""

import math
import re
from typing import NamedTuple

from pydantic import BaseModel, ConfigDict

from latentkit.applications.fit.measure import Measured
from latentkit.errors import InputError

SHARES = (0.35, 0.60)  # of the time for steps, to the first and to the second stage, in this ratio
LEAST_STEPS = 50  # a stage, below which the plan says that nothing is learnt
LEAST_BUDGET = 120.0  # seconds: less is refused whatever the machine
LOOKS = (5, 2, 1)  # sample sheets and measurements a stage: the most that leave four fifths of the time to steps
SAMPLES = (256, 64, 16)  # pictures drawn for the report, likewise
MOST_REFERENCE = 2000  # pictures whose features the report takes
MOST_HELD = 512
MOST_COMPARED = 64  # pictures that were trained on, and others, that the report's verdict looks at
SHEET = 16  # pictures of a sample sheet
SAVED_EVERY = 60.0  # seconds between checkpoints

FEATURES = 0.02  # seconds a picture
START = 3.0  # seconds to begin each stage and the report


class Costs(NamedTuple):
    """What was measured, in seconds (see `Measured`), and counts."""

    first: Measured
    second: Measured
    first_batch: int
    second_batch: int
    pictures: int
    held: int
    spent: float = 0.0
    """Seconds that looking, measuring and planning took."""


class Division(BaseModel):
    """Steps of each stage, looks a stage, pictures for the report, and the seconds each part is expected to take."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    first_steps: int
    second_steps: int
    looks: int
    samples: int
    first: float
    latents: float
    second: float
    report: float
    planning: float = 0.0

    @property
    def total(self) -> float:
        """Seconds in all."""
        return self.planning + self.training

    @property
    def training(self) -> float:
        """Seconds that are left when the plan is made."""
        return self.first + self.latents + self.second + self.report

    @property
    def little(self) -> bool:
        """Whether the steps are too few to learn anything."""
        return min(self.first_steps, self.second_steps) < LEAST_STEPS


def parse_budget(text: str) -> float:
    """Seconds of a time like 90s, 30m, 2h, 1h30m or 1d; InputError for anything else."""
    match = re.fullmatch(r"(?:(\d+(?:\.\d+)?)d)?(?:(\d+(?:\.\d+)?)h)?(?:(\d+(?:\.\d+)?)m)?(?:(\d+(?:\.\d+)?)s)?", text)
    if not text or match is None:
        raise InputError(f"budget {text!r} is not a time; write it like 90s, 30m, 2h or 1h30m", exit_code=2)
    seconds = sum(float(part or 0) * unit for part, unit in zip(match.groups(), (86400, 3600, 60, 1), strict=True))
    if not 0 < seconds <= 366 * 86400:
        raise InputError(f"budget {text!r} is not a time between {duration(LEAST_BUDGET)} and a year", exit_code=2)
    if seconds < LEAST_BUDGET:
        least = duration(LEAST_BUDGET)
        raise InputError(f"a budget of {text} is too small for two stages; the least is {least}", exit_code=2)
    return seconds


def duration(seconds: float) -> str:
    """Seconds as `parse_budget` reads them, rounded up to about two digits: 45s, 12m, 1h30m."""
    if seconds < 90:
        return f"{max(1, math.ceil(seconds))}s"
    minutes = math.ceil(seconds / 60)
    if minutes < 60:
        return f"{minutes}m"
    return f"{minutes // 60}h{minutes % 60}m" if minutes % 60 else f"{minutes // 60}h"


def divide(costs: Costs, budget: float | None, steps: tuple[int, int] | None = None) -> Division:
    """Steps that fill `budget` seconds; without one, those that the number of pictures suggests; or `steps` as given.

    InputError where a budget leaves no time for steps.
    """
    if steps is None and budget is None:
        return _expected(costs, *suggested(costs), LOOKS[0], SAMPLES[0])
    if steps is not None:
        return _expected(costs, *steps, LOOKS[0], SAMPLES[0])
    assert budget is not None
    for looks, samples in zip(LOOKS, SAMPLES, strict=True):
        rest = _expected(costs, 0, 0, looks, samples).total
        if rest <= 0.2 * budget:
            break
    first, second = (share / sum(SHARES) * (budget - rest) for share in SHARES)
    found = int(first / _step(costs.first)), int(second / _step(costs.second))
    if min(found) < 1:
        what = (
            f"reading, encoding and measuring {costs.pictures + costs.held} pictures takes {duration(rest)} of it here"
        )
        raise InputError(f"a budget of {duration(budget)} is too small: {what}; give {duration(4 * rest)} or more")
    return _expected(costs, *found, looks, samples)


def suggested(costs: Costs) -> tuple[int, int]:
    """Steps for n pictures: each is seen 3400 / sqrt(n) times by the first stage, five times as often by the second.

    For the 1,784 training pictures of the emoji that is 80 and 400 epochs.
    """
    seen = 3400 * math.sqrt(costs.pictures)
    return max(200, round(seen / costs.first_batch)), max(200, round(5 * seen / costs.second_batch))


def _step(stage: Measured) -> float:
    """Seconds of a step with its share of a checkpoint."""
    return stage.seconds * (1 + stage.save / SAVED_EVERY)


def _expected(costs: Costs, first_steps: int, second_steps: int, looks: int, samples: int) -> Division:
    first, second = costs.first, costs.second
    everything = costs.pictures + costs.held
    held = min(costs.held, MOST_HELD)
    reference = min(everything, MOST_REFERENCE)
    return Division(
        first_steps=first_steps,
        second_steps=second_steps,
        looks=looks,
        samples=samples,
        planning=costs.spent,
        first=START
        + everything * first.decode
        + first_steps * _step(first)
        + first.save
        + (looks + 1) * held * first.look,
        latents=everything * (first.decode + first.encode),
        second=START
        + second_steps * _step(second)
        + second.save
        + looks * (min(held, MOST_HELD // 2) * second.look + SHEET * second.draw),
        report=START
        + reference * (first.decode + FEATURES)
        + 2 * min(held, MOST_COMPARED) * first.look
        + samples * (second.draw + FEATURES),
    )
