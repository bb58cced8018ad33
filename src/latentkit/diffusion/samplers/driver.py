"""The contract of sampling (`Denoise`, `Denoised`, `Step`) and the one loop that runs every sampler."""

from collections.abc import Callable, Iterator
from typing import NamedTuple, Protocol, runtime_checkable

import numpy as np
from torch import Tensor

from latentkit.errors import InputError, nearest


class Denoised(NamedTuple):
    """A denoiser's answer: the estimate of the clean latent and what a few samplers read besides it."""

    x0: Tensor
    anchor: Tensor | None = None
    log_variance: Tensor | None = None


Denoise = Callable[[Tensor, float], Denoised]
"""denoise(x, sigma): x is `b c h w` with x = x0 + sigma * eps, sigma a float64 host value."""


class Step(NamedTuple):
    """One finished interval: the latent at `sigma` and the last estimate of x0; valid until the next step."""

    x: Tensor
    x0: Tensor
    sigma: float


@runtime_checkable
class StepNoise(Protocol):
    """Where a stochastic sampler gets its noise from (see `noise.PictureNoise.step`)."""

    def __call__(self, step: int, purpose: str = "step") -> Tensor:
        """Standard normal of the latent's shape."""
        ...


Sampler = Callable[[Denoise, Tensor, np.ndarray, StepNoise], Iterator[Step]]


class SamplerEntry(NamedTuple):
    """A sampler's line in the table: its update rule and what a person chooses by."""

    run: Sampler
    order: int
    evaluations: int
    stochastic: bool
    source: str


def table() -> dict[str, SamplerEntry]:
    """Every sampler by its name."""
    from latentkit.diffusion.samplers import dpm, euler, heun

    return {**euler.SAMPLERS, **heun.SAMPLERS, **dpm.SAMPLERS}


def sampler(name: str) -> SamplerEntry:
    """The sampler called `name`; InputError with the nearest names otherwise."""
    entries = table()
    if name not in entries:
        raise InputError(f"sampler {name!r} is unknown; {nearest(name, entries)}", exit_code=2)
    return entries[name]


def sample(name: str, denoise: Denoise, x: Tensor, sigmas: np.ndarray, noise: StepNoise) -> Iterator[Step]:
    """Run sampler `name` from `x` at `sigmas[0]` down `sigmas` (falling, float64), one `Step` per interval."""
    yield from sampler(name).run(denoise, x, np.asarray(sigmas, np.float64), noise)
