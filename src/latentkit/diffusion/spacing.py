"""Which sigmas a sampler visits. Every spacing gives exactly `steps` intervals, ending at 0."""

from collections.abc import Callable

import numpy as np

from latentkit.diffusion.schedule import SIGMA_CAP, NoiseSchedule
from latentkit.errors import InputError, nearest

FLOW_SIGMA_MAX = 80.0
"""Where a spacing that needs finite sigmas begins when the schedule's last one is infinite."""

Spacing = Callable[[NoiseSchedule, int], np.ndarray]


def _uniform(schedule: NoiseSchedule, steps: int) -> np.ndarray:
    """Evenly spaced timesteps from the last trained one ("trailing")."""
    last = float(schedule.steps if schedule.kind == "flow" else schedule.steps - 1)
    first = 0.0 if schedule.kind == "flow" else -1.0
    timesteps = np.linspace(last, first, steps + 1)[:-1]
    return schedule.to_sigma(timesteps)


def _even(warp: Callable[[np.ndarray], np.ndarray], unwarp: Callable[[np.ndarray], np.ndarray]) -> Spacing:
    """Evenly spaced in warp(sigma) over the finite sigmas; where the last one is infinite, its cap comes before."""

    def lay(schedule: NoiseSchedule, steps: int) -> np.ndarray:
        capped = schedule.sigma_max >= SIGMA_CAP
        high = FLOW_SIGMA_MAX if capped else schedule.sigma_max
        ends = warp(np.asarray([high, schedule.sigma_min]))
        finite = unwarp(np.linspace(ends[0], ends[1], steps - int(capped)))
        return np.append([SIGMA_CAP] if capped else [], finite)

    return lay


SPACINGS: dict[str, Spacing] = {
    "uniform": _uniform,
    "karras": _even(lambda sigma: sigma ** (1 / 7), lambda warped: warped**7),  # Karras et al. 2022, eq. 5, rho = 7
    "exponential": _even(np.log, np.exp),
    "kl_optimal": _even(np.arctan, np.tan),  # Align Your Steps, closed form for Gaussian data of unit deviation
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
