"""NoiseSchedule: how training noise was laid out, and the map between sigma and the network's timestep."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np

from latentkit.errors import InputError, nearest

SIGMA_CAP = 1e7
"""Stands for an infinite sigma (zero-terminal SNR, flow at t = 1): finite, so that ratios stay exact."""

TIMESTEPS = 1000
MOST_STEPS = 100_000
FIRST_SIGMA_MAX = 1e3
"""A first level above it leaves nothing of a picture to learn."""
RHO = 7.0


def _linear(steps: int, start: float, end: float) -> np.ndarray:
    return np.linspace(start, end, steps, dtype=np.float64)


def _scaled_linear(steps: int, start: float, end: float) -> np.ndarray:
    return np.linspace(math.sqrt(start), math.sqrt(end), steps, dtype=np.float64) ** 2


def _sqrt(steps: int, start: float, end: float) -> np.ndarray:
    return np.sqrt(np.linspace(start, end, steps, dtype=np.float64))


def _cosine(steps: int, start: float, end: float) -> np.ndarray:
    def alpha_bar(t: np.ndarray) -> np.ndarray:
        return np.asarray(np.cos((t + 0.008) / 1.008 * math.pi / 2) ** 2)

    t = np.arange(steps, dtype=np.float64)
    return np.minimum(1 - alpha_bar((t + 1) / steps) / alpha_bar(t / steps), 0.999)


def rho_levels(low: float, high: float, count: int, rho: float = RHO) -> np.ndarray:
    """`count` falling sigmas, even in sigma^(1/rho) (Karras et al. 2022, eq. 5)."""
    ends = np.power([high, low], 1 / rho)
    return np.linspace(ends[0], ends[1], count) ** rho


def _capped(sigmas: float | np.ndarray) -> np.ndarray:
    """With the cap for what is infinite, and for what rounding has moved off it."""
    return np.where(sigmas > SIGMA_CAP * (1 - 1e-9), SIGMA_CAP, sigmas)


Betas = Callable[[int, float, float], np.ndarray]
BETAS: dict[str, Betas] = {"linear": _linear, "scaled_linear": _scaled_linear, "cosine": _cosine, "sqrt": _sqrt}
KINDS = (*BETAS, "flow", "edm", "geometric")


@dataclass(frozen=True)
class NoiseSchedule:
    """The noise levels that a network was trained with, and the timestep that it gets at each.

    | kind | levels | timestep |
    | --- | --- | --- |
    | "linear" | betas from `beta_start` to `beta_end` (Ho et al. 2020; CompVis: "sqrt_linear") | index |
    | "scaled_linear" | even in sqrt(beta) (Rombach et al. 2022; CompVis's code: "linear") | index |
    | "sqrt" | square roots of even betas (CompVis) | index |
    | "cosine" | Nichol & Dhariwal 2021, eq. 17 | index |
    | "geometric" | `sigma_first` to `sigma_last`, even in log sigma (Song & Ermon 2019: NCSN, SMLD) | index |
    | "edm" | the same range, even in sigma^(1/7), and all between (Karras et al. 2022) | ln(sigma) / 4 |
    | "flow" | sigma = `shift` t / (1 - t) (Esser et al. 2024, eq. 23) | `steps` sigma / (1 + sigma) |

    `zero_terminal` rescales betas to end in pure noise (Lin et al. 2023, algorithm 1). Sigmas are float64 host values.
    """

    __pydantic_config__ = {"extra": "forbid"}  # noqa: RUF012

    kind: Literal["linear", "scaled_linear", "cosine", "sqrt", "flow", "edm", "geometric"] = "flow"
    beta_start: float = 0.00085
    beta_end: float = 0.012
    steps: int = TIMESTEPS
    zero_terminal: bool = False
    sigma_first: float = 0.002
    sigma_last: float = 80.0
    shift: float = 1.0

    def __post_init__(self) -> None:
        self._check()
        levels = self._levels()
        finite = levels[: int(np.searchsorted(levels, SIGMA_CAP)) + 1]
        if self.steps > 1 and not (0 < levels[0] <= FIRST_SIGMA_MAX and np.all(np.diff(finite) > 0)):
            raise InputError(
                f"noise schedule of kind {self.kind!r} goes from sigma {levels[0]:.3g} to {levels[-1]:.3g} in "
                f"{self.steps} steps; its levels must rise, and begin above 0 and at most at {FIRST_SIGMA_MAX:g}"
            )
        object.__setattr__(self, "_table", np.log(levels))

    def _check(self) -> None:
        """Refuse fields that cannot be, or that say nothing about this kind."""
        kind = self.kind
        if kind not in KINDS:
            raise InputError(f"noise schedule {kind!r} is unknown; {nearest(kind, KINDS)}")
        if not 1 <= self.steps <= MOST_STEPS:
            raise InputError(f"noise schedule has {self.steps} steps; it needs at least 1, and at most {MOST_STEPS}")
        if kind in ("linear", "scaled_linear", "sqrt") and not 0 < self.beta_start <= self.beta_end <= 1:
            raise InputError(
                f"noise schedule has beta_start={self.beta_start} and beta_end={self.beta_end}; "
                "they must satisfy 0 < beta_start <= beta_end <= 1"
            )
        if kind in ("edm", "geometric") and not 0 < self.sigma_first < self.sigma_last < SIGMA_CAP:
            raise InputError(
                f"noise schedule has sigma_first={self.sigma_first} and sigma_last={self.sigma_last}; "
                f"they must satisfy 0 < sigma_first < sigma_last < {SIGMA_CAP:g}"
            )
        if self.zero_terminal and (kind not in BETAS or self.steps < 2):
            ends = "a flow ends in pure noise as it is" if kind == "flow" else f"this is {kind!r} of {self.steps} steps"
            raise InputError(f"zero_terminal rescales betas, at least 2 of them; {ends}: leave it out")
        if not 0 < self.shift < math.inf or (self.shift != 1 and kind != "flow"):
            raise InputError(
                f"noise schedule of kind {kind!r} has shift={self.shift}; a flow takes a positive one, all others 1"
            )

    def _levels(self) -> np.ndarray:
        """The trained sigmas, ascending."""
        if self.kind == "flow":
            return self.at(np.arange(self.steps, dtype=np.float64))
        if self.kind == "geometric":
            return np.geomspace(self.sigma_last, self.sigma_first, self.steps)[::-1]
        if self.kind == "edm":
            return rho_levels(self.sigma_first, self.sigma_last, self.steps)[::-1]
        with np.errstate(divide="ignore", over="ignore"):
            log_alpha_bar = np.cumsum(np.log1p(-BETAS[self.kind](self.steps, self.beta_start, self.beta_end)))
            if self.zero_terminal:
                signal = np.exp(log_alpha_bar / 2)
                log_alpha_bar = 2 * np.log((signal - signal[-1]) * (signal[0] / (signal[0] - signal[-1])))
            return _capped(np.sqrt(np.expm1(-log_alpha_bar)))

    @property
    def sigmas(self) -> np.ndarray:
        """The trained noise levels, ascending, float64; those past the cap are the cap."""
        return _capped(np.exp(self._table))  # type: ignore[attr-defined]

    @property
    def sigma_min(self) -> float:
        """The smallest trained noise level."""
        return float(self.sigmas[0])

    @property
    def sigma_max(self) -> float:
        """The largest trained noise level (`SIGMA_CAP` stands for infinity)."""
        return float(self.sigmas[-1])

    @property
    def top(self) -> int:
        """The position of the first level that is the largest: the last one, unless several are pure noise."""
        return int(np.argmax(self.sigmas))

    def at(self, position: float | np.ndarray) -> np.ndarray:
        """The sigma at a continuous position among the trained levels, 0 ... `steps` - 1; -1 is the clean picture."""
        position = np.asarray(position, np.float64)
        if self.kind == "flow":
            return self._odds((position + 1) / self.steps, self.shift)
        table = self._table  # type: ignore[attr-defined]
        between = np.exp(np.interp(position, np.arange(self.steps, dtype=np.float64), table))
        return _capped(between * np.clip(position + 1, 0, 1))

    @staticmethod
    def _odds(t: float | np.ndarray, factor: float = 1.0) -> np.ndarray:
        """factor t / (1 - t), the cap from t = 1."""
        with np.errstate(divide="ignore"):
            return _capped(factor * t / np.maximum(1 - t, 0))

    def position(self, sigma: float | np.ndarray) -> np.ndarray:
        """The inverse of `at` over the trained levels, clipped outside."""
        sigma = np.asarray(sigma, np.float64)
        if self.kind == "flow":
            return np.asarray(self.steps * np.where(sigma >= SIGMA_CAP, 1.0, sigma / (self.shift + sigma)) - 1)
        table = self._table  # type: ignore[attr-defined]
        logs = np.log(np.maximum(sigma, 1e-300))
        return np.asarray(np.interp(logs, table, np.arange(self.steps, dtype=np.float64)))

    def to_timestep(self, sigma: float | np.ndarray, nearest_index: bool = False) -> np.ndarray:
        """The timestep that the network gets at `sigma`: continuous, or that of the nearest trained level.

        Between trained levels an index is linear in log sigma. Outside them it is clipped; a flow's runs from 0 to
        `steps`.
        """
        sigma = np.asarray(sigma, np.float64)
        position = self.position(sigma)
        if nearest_index:
            position = np.asarray(np.rint(position))
        if self.kind not in ("flow", "edm"):
            return position
        sigma = self.at(position) if nearest_index else sigma
        if self.kind == "flow":
            return np.asarray(self.steps * np.where(sigma >= SIGMA_CAP, 1.0, sigma / (1 + sigma)))
        return np.asarray(np.log(np.clip(sigma, self.sigma_first, self.sigma_last)) / 4)

    def to_sigma(self, timestep: float | np.ndarray) -> np.ndarray:
        """The inverse of the continuous `to_timestep`."""
        timestep = np.asarray(timestep, np.float64)
        if self.kind == "flow":
            return self._odds(timestep / self.steps)
        if self.kind == "edm":
            ends = math.log(self.sigma_first), math.log(self.sigma_last)
            return np.asarray(np.exp(np.clip(4 * timestep, *ends)))
        return self.at(np.maximum(timestep, 0))

    def initial_std(self, sigma: float, exact: bool = True) -> float:
        """Deviation of the start at `sigma`: sqrt(1 + sigma^2) of unit-variance data, or sigma as some peers take."""
        return math.sqrt(1 + sigma * sigma) if exact else sigma
