"""Averaged weights: the plain moving average, and power-function tracks for choosing a width afterwards (EDM2).

Source: Karras et al. 2024, "Analyzing and Improving the Training Dynamics of Diffusion Models", section 3.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn


class Averaging(BaseModel):
    """Which averages of the weights a run keeps."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    decay: float = Field(default=0.999, gt=0, lt=1)  # of the plain average, reached through (1 + n) / (10 + n)
    power: tuple[float, ...] = Field(default=(0.05, 0.10), strict=False)  # relative widths of the power-function tracks
    snapshot_every: int | None = Field(default=None, gt=0)  # steps between stored tracks, for reconstruct()


def power_exponent(width: float) -> float:
    """Gamma of the power-function profile of relative width sigma_rel (EDM2, equation 126 and algorithm 2)."""
    inverse = width**-2
    return float(np.roots([1, 7, 16 - inverse, 12 - inverse]).real.max())


def track_name(width: float | None) -> str:
    """The name of a track on disk: `ema`, or `ema-power-0.050`."""
    return "ema" if width is None else f"ema-power-{width:.3f}"


class Ema:
    """Averages of named parameters, float32, on the parameters' device and in their memory format."""

    def __init__(self, parameters: Iterable[tuple[str, nn.Parameter]], settings: Averaging) -> None:
        self.parameters = dict(parameters)
        self.decay = settings.decay
        self.updates = 0
        self.exponents = {track_name(width): power_exponent(width) for width in settings.power}
        self.tracks = {
            name: [parameter.detach().float().clone() for parameter in self.parameters.values()]
            for name in ("ema", *self.exponents)
        }

    @torch.no_grad()
    def restart(self) -> None:
        """Begin every track again at the present weights."""
        self.updates = 0
        for track in self.tracks.values():
            for mean, parameter in zip(track, self.parameters.values(), strict=True):
                mean.copy_(parameter)

    @torch.no_grad()
    def update(self) -> None:
        """Take the present weights into every track."""
        self.updates += 1
        n = self.updates
        weights = [parameter.detach().float() for parameter in self.parameters.values()]
        for name, track in self.tracks.items():
            if name == "ema":
                share = 1 - min(self.decay, (1 + n) / (10 + n))
            else:
                share = 1 - (1 - 1 / n) ** (self.exponents[name] + 1)
            torch._foreach_lerp_(track, weights, share)

    def table(self, track: str = "ema") -> dict[str, Tensor]:
        """The averaged weights of one track by parameter name; not copies."""
        return dict(zip(self.parameters, self.tracks[track], strict=True))

    def tables(self) -> dict[str, dict[str, Tensor]]:
        """Every track, for a checkpoint."""
        return {track: self.table(track) for track in self.tracks}

    @torch.no_grad()
    def restore(self, tables: dict[str, dict[str, Tensor]], updates: int) -> None:
        """Take back what `tables` and `updates` gave; raises KeyError where a name is missing."""
        for track in self.tracks:
            for name, mean in self.table(track).items():
                mean.copy_(tables[track][name])
        self.updates = updates

    @contextmanager
    def applied(self, module: nn.Module | None = None, track: str = "ema") -> Iterator[None]:
        """The averaged weights in the module within the context; afterwards every bit of the training weights is back.

        `module` None is the trained network itself. Another module of the same parameter names may be given.
        """
        parameters = self.parameters if module is None else dict(module.named_parameters())
        averages = {name: mean for name, mean in self.table(track).items() if name in parameters}
        kept = {name: parameters[name].detach().clone() for name in averages}
        try:
            with torch.no_grad():
                for name, mean in averages.items():
                    parameters[name].copy_(mean)
            yield
        finally:
            with torch.no_grad():
                for name, weight in kept.items():
                    parameters[name].copy_(weight)

    def snapshot(self) -> tuple[dict[str, Tensor], dict[str, str]]:
        """The power tracks as half-precision tensors `TRACK/NAME`, and the metadata that `reconstruct` reads."""
        tensors = {
            f"{track}/{name}": mean.half() for track in self.exponents for name, mean in self.table(track).items()
        }
        exponents = " ".join(f"{track}={exponent!r}" for track, exponent in self.exponents.items())
        return tensors, {"updates": str(self.updates), "exponents": exponents}


def reconstruct(snapshots: Iterable[Path], width: float, updates: int | None = None) -> dict[str, Tensor]:
    """The weights that a power-function average of relative width `width` would have had after `updates` updates.

    `snapshots` are files of `Ema.snapshot`; `updates` is the newest snapshot's unless given. Least squares over the
    stored profiles (EDM2, algorithm 3).
    """
    from safetensors import safe_open

    stored: list[tuple[Path, str, float, float]] = []  # file, track, updates, exponent
    for path in snapshots:
        with safe_open(path, "pt") as file:
            metadata: dict[str, Any] = file.metadata()
        for pair in metadata["exponents"].split():
            track, exponent = pair.split("=")
            stored.append((path, track, float(metadata["updates"]), float(exponent)))
    newest = max(entry[2] for entry in stored)
    times = np.array([entry[2] for entry in stored])
    exponents = np.array([entry[3] for entry in stored])
    shares = np.linalg.lstsq(
        _overlap(times[:, None], exponents[:, None], times[None], exponents[None]),
        _overlap(times, exponents, np.array(float(updates or newest)), np.array(power_exponent(width))),
        rcond=None,
    )[0]
    result: dict[str, Tensor] = {}
    for (path, track, _, _), share in zip(stored, shares, strict=True):
        with safe_open(path, "pt") as file:
            for key in file.keys():  # noqa: SIM118 (not a dict)
                if key.startswith(f"{track}/"):
                    name = key[len(track) + 1 :]
                    part = file.get_tensor(key).float() * float(share)
                    result[name] = result[name] + part if name in result else part
    return result


def _overlap(time_a: np.ndarray, gamma_a: np.ndarray, time_b: np.ndarray, gamma_b: np.ndarray) -> np.ndarray:
    """Inner products of two averages' profiles (EDM2, equation 123)."""
    ratio = (time_a / time_b) ** np.where(time_a < time_b, gamma_b, -gamma_a)
    product: np.ndarray = (gamma_a + 1) * (gamma_b + 1) * ratio / ((gamma_a + gamma_b + 1) * np.maximum(time_a, time_b))
    return product
