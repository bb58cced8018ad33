"""Which sigmas a sampler visits. Every spacing gives exactly `steps` intervals, ending at 0."""

import math
from collections.abc import Callable

import numpy as np

from latentkit.diffusion.schedule import SIGMA_CAP, NoiseSchedule
from latentkit.errors import InputError, nearest

FLOW_SIGMA_MAX = 80.0
"""Where a spacing that needs finite sigmas begins when the schedule's last one is infinite."""


def _finite_range(schedule: NoiseSchedule) -> tuple[float, float]:
    high = schedule.sigma_max
    return schedule.sigma_min, FLOW_SIGMA_MAX if high >= SIGMA_CAP else high


def _uniform(schedule: NoiseSchedule, steps: int) -> np.ndarray:
    """Evenly spaced timesteps from the last trained one ("trailing")."""
    last = float(schedule.steps if schedule.kind == "flow" else schedule.steps - 1)
    first = 0.0 if schedule.kind == "flow" else -1.0
    timesteps = np.linspace(last, first, steps + 1)[:-1]
    return schedule.to_sigma(timesteps)


def _karras(schedule: NoiseSchedule, steps: int, rho: float = 7.0) -> np.ndarray:
    """Evenly spaced in sigma^(1/rho) (Karras et al. 2022, eq. 5)."""
    low, high = _finite_range(schedule)
    ramp = np.linspace(0, 1, steps) if steps > 1 else np.zeros(1)
    return np.asarray((high ** (1 / rho) + ramp * (low ** (1 / rho) - high ** (1 / rho))) ** rho)


def _exponential(schedule: NoiseSchedule, steps: int) -> np.ndarray:
    """Evenly spaced in log sigma."""
    low, high = _finite_range(schedule)
    return np.exp(np.linspace(math.log(high), math.log(low), steps)) if steps > 1 else np.asarray([high])


def _kl_optimal(schedule: NoiseSchedule, steps: int) -> np.ndarray:
    """Evenly spaced in arctan sigma (AYS paper, closed form for Gaussian data of unit deviation)."""
    low, high = _finite_range(schedule)
    ramp = np.linspace(0, 1, steps) if steps > 1 else np.zeros(1)
    return np.tan(ramp * math.atan(low) + (1 - ramp) * math.atan(high))


SPACINGS: dict[str, Callable[[NoiseSchedule, int], np.ndarray]] = {
    "uniform": _uniform,
    "karras": _karras,
    "exponential": _exponential,
    "kl_optimal": _kl_optimal,
}


def space(name: str, schedule: NoiseSchedule, steps: int) -> np.ndarray:
    """`steps + 1` strictly falling sigmas, float64, the last one 0.

    Errors: InputError for an unknown name, fewer than 1 step, or more than the schedule has.
    """
    if name not in SPACINGS:
        raise InputError(f"spacing {name!r} is unknown; {nearest(name, SPACINGS)}", exit_code=2)
    if not 1 <= steps <= schedule.steps:
        raise InputError(f"{steps} sampler steps asked for; allowed are 1 to {schedule.steps}", exit_code=2)
    sigmas = np.append(SPACINGS[name](schedule, steps), 0.0)
    assert np.all(np.diff(sigmas) < 0), f"{name} is not falling at {steps} steps"
    return sigmas
