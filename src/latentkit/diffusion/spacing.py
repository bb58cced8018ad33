"""Which sigmas a sampler visits. Every spacing gives exactly `steps` intervals, ending at 0."""

import itertools
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np

from latentkit.diffusion.schedule import BETAS, RHO, SIGMA_CAP, NoiseSchedule, rho_levels
from latentkit.errors import InputError, nearest

FLOW_SIGMA_MAX = 80.0
"""Where a spacing that needs finite sigmas begins when the schedule's last one is infinite."""

AYS_SD1 = (14.615, 6.475, 3.861, 2.697, 1.886, 1.396, 0.963, 0.652, 0.399, 0.152, 0.029)
AYS_XL = (14.615, 6.315, 3.771, 2.181, 1.342, 0.862, 0.555, 0.380, 0.234, 0.113, 0.029)
"""Align Your Steps, ten steps and the level below the last (Sabour et al. 2024)."""

BETA_SHAPE = 0.6
SEARCHED = "searched"


class Spacing(NamedTuple):
    """A spacing's line in the table: `lay(schedule, steps, **options)` gives the visited sigmas, falling."""

    lay: Callable[..., np.ndarray]
    source: str
    options: dict[str, float] = {}  # noqa: RUF012


def _over(lay: Callable[..., np.ndarray]) -> Callable[..., np.ndarray]:
    """`lay(low, high, count)` over the finite sigmas; where the last one is infinite, its cap comes before."""

    def over(schedule: NoiseSchedule, steps: int, low: float, high: float, **options: float) -> np.ndarray:
        cap = [] if high or schedule.sigma_max < SIGMA_CAP else [SIGMA_CAP]
        finite = max(FLOW_SIGMA_MAX, 2 * schedule.sigma_min) if cap else schedule.sigma_max
        return np.append(cap, lay(low or schedule.sigma_min, high or finite, steps - len(cap), **options))

    return over


def _polyexponential(low: float, high: float, count: int, rho: float = 1.0) -> np.ndarray:
    return np.exp(math.log(low) + np.linspace(1, 0, count) ** rho * (math.log(high) - math.log(low)))


def _kl_optimal(low: float, high: float, count: int) -> np.ndarray:
    return np.tan(np.linspace(math.atan(high), math.atan(low), count))


def _beta_sigma(low: float, high: float, count: int) -> np.ndarray:
    return low + beta_quantile(np.linspace(1, 0, count)) * (high - low)


def beta_quantile(share: np.ndarray, shape: float = BETA_SHAPE) -> np.ndarray:
    """Quantiles of the symmetric Beta(shape, shape), by Newton's rule on the power series of its integral."""
    k = np.arange(56.0)
    factors = np.cumprod(np.append(1.0, (k[1:] - shape) / k[1:])) / (k + shape)
    total = math.gamma(shape) ** 2 / math.gamma(2 * shape)
    target = np.minimum(share, 1 - share) * total
    u = shape * target
    for _ in range(5):
        x = u ** (1 / shape)
        u = u - (u * np.polynomial.polynomial.polyval(x, factors) - target) * shape * (1 - x) ** (1 - shape)
    x = u ** (1 / shape)
    return np.where(share > 0.5, 1 - x, x)


Positions = Callable[..., Iterable[np.ndarray]]


def _on_levels(positions: Positions) -> Callable[..., np.ndarray]:
    """Sigmas at the first of `positions(schedule, steps)` that fall and lie on the levels, else at even ones."""

    def lay(schedule: NoiseSchedule, steps: int, **options: float) -> np.ndarray:
        top = schedule.top
        wanted = itertools.chain(positions(schedule, steps, **options), [np.linspace(top, 0, steps)])
        return schedule.at(next(p for p in wanted if p[0] <= top and p[-1] > -1 and np.all(np.diff(p) < 0)))

    return lay


def _uniform(schedule: NoiseSchedule, steps: int) -> Iterable[np.ndarray]:
    yield np.linspace(schedule.top, -1, steps + 1)[:-1]


def _leading(schedule: NoiseSchedule, steps: int, offset: float, drop: float) -> Iterable[np.ndarray]:
    count = steps + bool(drop)
    yield np.arange(count - 1, count - 1 - steps, -1.0) * ((schedule.top + 1) // count) + offset


def _trailing(schedule: NoiseSchedule, steps: int) -> Iterable[np.ndarray]:
    yield np.rint(_downwards(schedule, steps)) - 1


def _simple(schedule: NoiseSchedule, steps: int) -> Iterable[np.ndarray]:
    yield np.ceil(_downwards(schedule, steps)) - 1


def _lcm(schedule: NoiseSchedule, steps: int, origin: float) -> Iterable[np.ndarray]:
    skipped = np.floor(np.arange(steps) * origin / steps)
    yield (origin - skipped) * ((schedule.top + 1) // origin) - 1


def _downwards(schedule: NoiseSchedule, steps: int) -> np.ndarray:
    """T, T - T/n, ..., T/n for T levels."""
    levels = schedule.top + 1
    return levels - np.arange(steps) * levels / steps


def _normal(schedule: NoiseSchedule, steps: int) -> Iterable[np.ndarray]:
    yield np.linspace(schedule.top, 0, steps)


def _sgm_uniform(schedule: NoiseSchedule, steps: int) -> Iterable[np.ndarray]:
    yield np.linspace(schedule.top, 0, steps + 1)[:-1]


def _beta(schedule: NoiseSchedule, steps: int) -> Iterable[np.ndarray]:
    top = schedule.top
    yield np.rint(beta_quantile(1 - np.arange(steps) / steps) * top)
    cap = [top] if schedule.sigma_max >= SIGMA_CAP else []
    count = steps - len(cap)
    yield np.append(cap, beta_quantile(1 - np.arange(count) / count) * (top - len(cap)))


def _linspace(schedule: NoiseSchedule, steps: int, drop: float, whole: float) -> np.ndarray:
    """As `diffusers`: unlike everywhere else a sigma between two levels is linear in sigma."""
    positions = np.linspace(0, schedule.top, steps + bool(drop))[::-1][:steps]
    rounded = np.rint(positions)
    if whole and np.all(np.diff(rounded) < 0):
        positions = rounded
    if schedule.kind not in BETAS:
        return schedule.at(positions)
    return np.interp(positions, np.arange(schedule.steps), schedule.sigmas)


def _between(anchors: Sequence[float], count: int) -> np.ndarray:
    """`count` levels along falling anchors, the last of which stands below the last level; even in log sigma."""
    places = np.linspace(0, len(anchors) - 1, count + 1)[:-1]
    return np.exp(np.interp(places, np.arange(len(anchors)), np.log(anchors)))


def _tabled(anchors: tuple[float, ...]) -> Callable[..., np.ndarray]:
    def lay(schedule: NoiseSchedule, steps: int) -> np.ndarray:
        if schedule.sigma_max < 0.99 * anchors[0]:
            raise InputError(
                f"this spacing begins at sigma {anchors[0]}, the noise schedule ends at {schedule.sigma_max:g}; "
                "take another, such as 'karras' or 'kl_optimal'",
                exit_code=2,
            )
        cap = [SIGMA_CAP] if schedule.sigma_max >= SIGMA_CAP else []
        return np.append(cap, _between(anchors, steps - len(cap)))

    return lay


def _searched(schedule: NoiseSchedule, steps: int, found: Sequence[Sequence[float]]) -> np.ndarray:
    """The list found for `steps`, or the nearest one drawn out or in between its finite levels."""
    if not found:
        raise InputError("this model holds no searched spacing; `latentkit search-spacing` finds one", exit_code=2)
    levels = min(found, key=lambda sigmas: abs(math.log((len(sigmas) - 1) / steps)))[:-1]
    if len(levels) == steps:
        return np.asarray(levels, np.float64)
    cap = [sigma for sigma in levels if sigma >= SIGMA_CAP]
    finite = list(levels[len(cap) :]) or [FLOW_SIGMA_MAX]
    return np.append(cap, _between([*finite, min(schedule.sigma_min, finite[-1] / 2)], steps - len(cap)))


ENDS: dict[str, float] = {"low": 0.0, "high": 0.0}
"""Options of a spacing over a range of sigmas; 0: the schedule's own."""

SPACINGS: dict[str, Spacing] = {
    "uniform": Spacing(_on_levels(_uniform), "evenly spaced training time, down to 0 as the step after the last"),
    "leading": Spacing(_on_levels(_leading), "whole ratio from the first level (DDIM)", {"offset": 0.0, "drop": 0.0}),
    "trailing": Spacing(_on_levels(_trailing), "uniform, rounded to whole levels (Lin et al. 2023)"),
    "linspace": Spacing(_linspace, "from the last level to the first (diffusers)", {"drop": 0.0, "whole": 0.0}),
    "normal": Spacing(_on_levels(_normal), "from the last level to the first (k-diffusion)"),
    "sgm_uniform": Spacing(_on_levels(_sgm_uniform), "normal with one more level, the first left out (ComfyUI)"),
    "simple": Spacing(_on_levels(_simple), "uniform, rounded up to whole levels (ComfyUI)"),
    "lcm": Spacing(_on_levels(_lcm), "among `origin` trailing ones (Luo et al. 2023)", {"origin": 50.0}),
    "beta": Spacing(_on_levels(_beta), "Beta(0.6, 0.6) quantiles of the levels (Lee et al. 2024, ComfyUI)"),
    "beta_sigma": Spacing(_over(_beta_sigma), "Beta(0.6, 0.6) quantiles of sigma (diffusers)", ENDS),
    "karras": Spacing(_over(rho_levels), "even in sigma^(1/rho) (Karras et al. 2022, eq. 5)", {"rho": RHO, **ENDS}),
    "exponential": Spacing(_over(_polyexponential), "even in log sigma", ENDS),
    "polyexponential": Spacing(_over(_polyexponential), "log sigma by a power (k-diffusion)", {"rho": 1.0, **ENDS}),
    "kl_optimal": Spacing(_over(_kl_optimal), "even in arctan sigma (Sabour et al. 2024)", ENDS),
    "ays_sd1": Spacing(_tabled(AYS_SD1), "Align Your Steps for Stable Diffusion 1.5 (Sabour et al. 2024)"),
    "ays_xl": Spacing(_tabled(AYS_XL), "Align Your Steps for Stable Diffusion XL (Sabour et al. 2024)"),
}

ALIASES = {
    "automatic": "normal",
    "ddim": "leading:offset=1",
    "ddim_uniform": "leading:offset=1",
    "align_your_steps": "ays_sd1",
    "ays": "ays_sd1",
    "ays_sd15": "ays_sd1",
    "ays_sdxl": "ays_xl",
    "gits": SEARCHED,
    "tcd": "lcm",
}
"""What A1111 and ComfyUI call them, where case, spaces and hyphens do not make it our own name."""


def _options(text: str, where: str) -> dict[str, str]:
    """ "a=1,b=2" as a dictionary."""
    parts = [part.partition("=") for part in text.split(",") if part.strip()]
    if any(not sign for _, sign, _ in parts):
        raise InputError(f"spacing {where!r}: options are written NAME:option=value,option=value", exit_code=2)
    return {key.strip(): value.strip() for key, _, value in parts}


def _number(text: str, schedule: NoiseSchedule, where: str) -> np.float64:
    try:
        value = np.float64(schedule.sigma_min if text == "sigma_min" else text)
    except ValueError:
        value = np.float64(math.nan)
    if not 0 <= value < math.inf:
        raise InputError(f"{where} is {text!r}; it must be a number of at least 0, or sigma_min", exit_code=2)
    return value


def space(
    name: str, schedule: NoiseSchedule, steps: int, searched: Sequence[Sequence[float]] = ()
) -> np.ndarray[Any, np.dtype[np.float64]]:
    """`steps + 1` strictly falling sigmas, float64, the last one 0.

    `name` may carry options, as in "karras:rho=5" or "leading:offset=1,end=sigma_min": those of its line in
    `SPACINGS`, and for all of them `end`, the sigma after the last step. `searched` are the model's own lists for the
    spacing "searched". Errors: InputError for an unknown name or option, fewer than 1 step, or more than the schedule
    has.
    """
    base, _, given = name.partition(":")
    key = base.strip().lower().replace(" ", "_").replace("-", "_")
    key, _, implied = ALIASES.get(key, key).partition(":")
    if key not in SPACINGS and key != SEARCHED:
        raise InputError(f"spacing {base!r} is unknown; {nearest(base, [*SPACINGS, SEARCHED, *ALIASES])}", exit_code=2)
    if not 1 <= steps <= schedule.steps:
        raise InputError(f"{steps} sampler steps asked for; allowed are 1 to {schedule.steps}", exit_code=2)
    options = {"end": np.float64(0)}
    if key != SEARCHED:
        options |= {option: np.float64(value) for option, value in SPACINGS[key].options.items()}
    for option, text in {**_options(implied, name), **_options(given, name)}.items():
        if option not in options:
            raise InputError(f"spacing {key!r} has no option {option!r}; {nearest(option, options)}", exit_code=2)
        options[option] = _number(text, schedule, f"option {option!r} of spacing {key!r}")
    end = options.pop("end")
    with np.errstate(all="ignore"):
        laid = (
            _searched(schedule, steps, searched) if key == SEARCHED else SPACINGS[key].lay(schedule, steps, **options)
        )
    sigmas = np.append(laid, end)
    if not (len(sigmas) == steps + 1 and np.all(np.diff(sigmas) < 0)):
        span = f"{laid[0]:.4g} to {laid[-1]:.4g}, then {end:.4g}"
        raise InputError(f"spacing {name!r} gives no {steps} falling steps here (sigma {span}); change its options")
    return sigmas
