"""NoiseSchedule: how training noise was laid out, and the map between sigma and the network's timestep."""

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np

from latentkit.errors import InputError, nearest

SIGMA_CAP = 1e7
"""Stands for an infinite sigma (zero-terminal SNR, flow at t = 1): finite, so that ratios stay exact."""

TIMESTEPS = 1000


def _linear(steps: int, start: float, end: float) -> np.ndarray:
    return np.linspace(start, end, steps, dtype=np.float64)


def _scaled_linear(steps: int, start: float, end: float) -> np.ndarray:
    return np.linspace(math.sqrt(start), math.sqrt(end), steps, dtype=np.float64) ** 2


def _cosine(steps: int, start: float, end: float) -> np.ndarray:
    def alpha_bar(t: np.ndarray) -> np.ndarray:
        return np.asarray(np.cos((t + 0.008) / 1.008 * math.pi / 2) ** 2)

    t = np.arange(steps, dtype=np.float64)
    return np.minimum(1 - alpha_bar((t + 1) / steps) / alpha_bar(t / steps), 0.999)


def _capped(sigmas: float | np.ndarray) -> np.ndarray:
    """With the cap for what is infinite, and for what rounding has moved off it."""
    return np.where(sigmas > SIGMA_CAP * (1 - 1e-9), SIGMA_CAP, sigmas)


BETAS = {"linear": _linear, "scaled_linear": _scaled_linear, "cosine": _cosine}
KINDS = (*BETAS, "flow")


@dataclass(frozen=True)
class NoiseSchedule:
    """The noise levels that a network was trained with.

    `kind`: "linear" (DDPM), "scaled_linear" (linear in sqrt(beta): what CompVis's code calls "linear"), "cosine"
    (improved DDPM), or "flow" (rectified flow: sigma = t / (1 - t), timestep = 1000 t). `beta_start` and `beta_end`
    belong to the first two. Sigmas are float64 host values.
    """

    __pydantic_config__ = {"extra": "forbid"}  # noqa: RUF012

    kind: Literal["linear", "scaled_linear", "cosine", "flow"] = "flow"
    beta_start: float = 0.00085
    beta_end: float = 0.012
    steps: int = TIMESTEPS

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise InputError(f"noise schedule {self.kind!r} is unknown; {nearest(self.kind, KINDS)}")
        if self.steps < 1:
            raise InputError(f"noise schedule has {self.steps} steps; it needs at least 1")
        if self.kind in ("linear", "scaled_linear") and not 0 < self.beta_start <= self.beta_end <= 1:
            raise InputError(
                f"noise schedule has beta_start={self.beta_start} and beta_end={self.beta_end}; "
                "they must satisfy 0 < beta_start <= beta_end <= 1"
            )
        if self.kind != "flow":
            betas = BETAS[self.kind](self.steps, self.beta_start, self.beta_end)
            alpha_bar = np.cumprod(1 - betas)
            table = _capped(np.sqrt((1 - alpha_bar) / np.maximum(alpha_bar, 1e-300)))
            object.__setattr__(self, "_log_sigmas", np.log(table))

    @property
    def sigmas(self) -> np.ndarray:
        """The trained noise levels, ascending, float64 (a flow's: at t = 1/steps ... 1, the last one capped)."""
        if self.kind == "flow":
            t = np.arange(1, self.steps + 1, dtype=np.float64) / self.steps
            with np.errstate(divide="ignore"):
                return _capped(t / (1 - t))
        return _capped(np.exp(self._log_sigmas))  # type: ignore[attr-defined]

    @property
    def sigma_min(self) -> float:
        """The smallest trained noise level."""
        return float(self.sigmas[0])

    @property
    def sigma_max(self) -> float:
        """The largest trained noise level (`SIGMA_CAP` stands for infinity)."""
        return float(self.sigmas[-1])

    def to_timestep(self, sigma: float | np.ndarray, nearest_index: bool = False) -> np.ndarray:
        """The timestep that the network gets at `sigma`: continuous, or the nearest trained index.

        Between trained levels it is linear in log sigma. Outside it is clipped; a flow's runs from 0 to `steps`.
        """
        sigma = np.asarray(sigma, np.float64)
        if self.kind == "flow":
            timestep = self.steps * np.where(sigma >= SIGMA_CAP, 1.0, sigma / (1 + sigma))
        else:
            table = self._log_sigmas  # type: ignore[attr-defined]
            timestep = np.interp(np.log(np.maximum(sigma, 1e-300)), table, np.arange(self.steps, dtype=np.float64))
        return np.asarray(np.rint(timestep) if nearest_index else timestep)

    def to_sigma(self, timestep: float | np.ndarray) -> np.ndarray:
        """The inverse of the continuous `to_timestep`."""
        timestep = np.asarray(timestep, np.float64)
        if self.kind == "flow":
            t = timestep / self.steps
            with np.errstate(divide="ignore"):
                return _capped(t / (1 - t))
        table = self._log_sigmas  # type: ignore[attr-defined]
        return _capped(np.exp(np.interp(timestep, np.arange(self.steps, dtype=np.float64), table)))

    def initial_std(self, sigma: float, exact: bool = True) -> float:
        """Deviation of the start at `sigma`: sqrt(1 + sigma^2) of unit-variance data, or sigma as some peers take."""
        return math.sqrt(1 + sigma * sigma) if exact else sigma
