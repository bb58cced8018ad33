"""Heun's second-order rule on dx/dsigma = (x - x0) / sigma."""

import itertools
from collections.abc import Iterator

import numpy as np
from torch import Tensor

from latentkit.diffusion.samplers.driver import Denoise, SamplerEntry, Step, StepNoise
from latentkit.diffusion.schedule import SIGMA_CAP


def heun(denoise: Denoise, x: Tensor, sigmas: np.ndarray, noise: StepNoise) -> Iterator[Step]:
    """Trapezoid of two slopes (Karras et al. 2022, algorithm 1); plain Euler from a cap and into 0."""
    for sigma, after in itertools.pairwise(sigmas):
        x0 = denoise(x, float(sigma)).x0
        ahead = x0.lerp(x, float(after / sigma))
        if after > 0 and sigma < SIGMA_CAP:
            slope = (x - x0) / float(sigma)
            x0 = denoise(ahead, float(after)).x0
            ahead = x + (slope + (ahead - x0) / float(after)) * (0.5 * float(after - sigma))
        x = ahead
        yield Step(x, x0, float(after))


SAMPLERS = {"heun": SamplerEntry(heun, 2, 2, False, "Karras et al. 2022, algorithm 1")}
