"""DPM-Solver++: exponential integrators in lambda = -log sigma with x0 held polynomial."""

import itertools
from collections.abc import Iterator

import numpy as np
from torch import Tensor

from latentkit.diffusion.samplers.driver import Denoise, SamplerEntry, Step, StepNoise
from latentkit.diffusion.schedule import SIGMA_CAP


def dpm_2m(denoise: Denoise, x: Tensor, sigmas: np.ndarray, noise: StepNoise) -> Iterator[Step]:
    """Second-order multistep (Lu et al. 2022, algorithm 2); first order at the start, from a cap, and into 0."""
    previous: tuple[Tensor, float] | None = None
    for i, (sigma, after) in enumerate(itertools.pairwise(sigmas)):
        x0 = denoise(x, float(sigma)).x0
        held = x0
        if previous is not None and after > 0:
            step, last = np.log(sigma / after), np.log(previous[1] / sigma)
            held = x0 + (x0 - previous[0]) * float(step / (2 * last))
        x = held.lerp(x, float(after / sigma))
        previous = None if sigmas[i] >= SIGMA_CAP else (x0, float(sigma))
        yield Step(x, x0, float(after))


SAMPLERS = {"dpm++2m": SamplerEntry(dpm_2m, 2, 1, False, "DPM-Solver++(2M), Lu et al. 2022")}
