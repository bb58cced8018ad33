"""How a budget of time is shared: arithmetic on measured step times, nothing else."""

import math
import re
from typing import NamedTuple

from pydantic import BaseModel, ConfigDict

from latentkit.errors import InputError

SHARES = (0.35, 0.60)  # of the time for steps, to the first and to the second stage, in this ratio
LEAST_STEPS = 50
LOOKS = (5, 2, 1)  # sample sheets and measurements a stage: the most that leave four fifths of the time to steps
SAMPLES = (256, 64, 16)  # pictures drawn for the report, likewise
MOST_REFERENCE = 2000  # pictures whose features the report takes
MOST_HELD = 512

# Work besides training steps, in pictures of a training step that take as long.
MEASURE = 1.0  # a held-out picture through the first stage, alone and in float32
ENCODE = 0.4  # a picture into latents in float32
VALIDATE = 2.4  # a held-out picture at six noise levels
SHEET = 150.0  # the sixteen pictures of a sample sheet
DRAW = 10.0  # a picture drawn: 12 steps, twice for guidance, forward only
FEATURES = 0.02  # seconds a picture
START = 5.0  # seconds to begin each stage and to write the report
SAVING = 1.02  # checkpoints


class Costs(NamedTuple):
    """What was measured: seconds a step and pictures a step of each stage, seconds to read a picture, and counts."""

    first_step: float
    first_batch: int
    second_step: float
    second_batch: int
    decode: float
    pictures: int
    held: int


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

    @property
    def total(self) -> float:
        """Seconds in all."""
        return self.first + self.latents + self.second + self.report


def parse_budget(text: str) -> float:
    """Seconds of a time like 90s, 30m, 2h, 1h30m or 1d; InputError for anything else."""
    match = re.fullmatch(r"(?:(\d+(?:\.\d+)?)d)?(?:(\d+(?:\.\d+)?)h)?(?:(\d+(?:\.\d+)?)m)?(?:(\d+(?:\.\d+)?)s)?", text)
    if not text or match is None:
        raise InputError(f"budget {text!r} is not a time; write it like 90s, 30m, 2h or 1h30m", exit_code=2)
    seconds = sum(float(part or 0) * unit for part, unit in zip(match.groups(), (86400, 3600, 60, 1), strict=True))
    if not 0 < seconds <= 366 * 86400:
        raise InputError(f"budget {text!r} is not a time between a second and a year", exit_code=2)
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

    InputError names the least budget where this one is too small.
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
    first, second = (share / sum(SHARES) * (budget - rest) / SAVING for share in SHARES)
    steps = int(first / costs.first_step), int(second / costs.second_step)
    if min(steps) < LEAST_STEPS:
        slowest = max(costs.first_step / SHARES[0], costs.second_step / SHARES[1]) * sum(SHARES)
        least = rest + (LEAST_STEPS + 1) * slowest * SAVING
        raise InputError(
            f"a budget of {duration(budget)} is too small: reading, measuring and drawing take {duration(rest)} here, "
            f"and each stage needs at least {LEAST_STEPS} steps; the least is {duration(least)}"
        )
    return _expected(costs, *steps, looks, samples)


def suggested(costs: Costs) -> tuple[int, int]:
    """Steps for n pictures: each is seen 3400 / sqrt(n) times by the first stage, five times as often by the second.

    For the 1,784 training pictures of the emoji that is 80 and 400 epochs.
    """
    seen = 3400 * math.sqrt(costs.pictures)
    return max(200, round(seen / costs.first_batch)), max(200, round(5 * seen / costs.second_batch))


def _expected(costs: Costs, first_steps: int, second_steps: int, looks: int, samples: int) -> Division:
    first, second = costs.first_step / costs.first_batch, costs.second_step / costs.second_batch
    everything = costs.pictures + costs.held
    held = min(costs.held, MOST_HELD)
    reference = min(everything, MOST_REFERENCE)
    return Division(
        first_steps=first_steps,
        second_steps=second_steps,
        looks=looks,
        samples=samples,
        first=START
        + everything * costs.decode
        + SAVING * first_steps * costs.first_step
        + (looks + 1) * held * MEASURE * first,
        latents=everything * (costs.decode + ENCODE * first),
        second=START
        + SAVING * second_steps * costs.second_step
        + looks * (min(held, MOST_HELD // 2) * VALIDATE + SHEET) * second,
        report=reference * (costs.decode + FEATURES) + samples * (DRAW * second + first + FEATURES),
    )
