"""First-order rules: Euler (deterministic DDIM) and its ancestral form (DDPM at full noise)."""

import itertools
from collections.abc import Iterator

import numpy as np
from torch import Tensor

from latentkit.diffusion.samplers.driver import Denoise, SamplerEntry, Step, StepNoise


def euler(denoise: Denoise, x: Tensor, sigmas: np.ndarray, noise: StepNoise) -> Iterator[Step]:
    """x' = (s'/s) x + (1 - s'/s) x0: DDIM with eta 0 (Song et al. 2021, eq. 12, in this space)."""
    for sigma, after in itertools.pairwise(sigmas):
        x0 = denoise(x, float(sigma)).x0
        x = x0.lerp(x, float(after / sigma))
        yield Step(x, x0, float(after))


def euler_ancestral(denoise: Denoise, x: Tensor, sigmas: np.ndarray, noise: StepNoise) -> Iterator[Step]:
    """Euler to a lower level, then fresh noise back up: DDIM with eta 1, DDPM's posterior sampling."""
    for i, (sigma, after) in enumerate(itertools.pairwise(sigmas)):
        x0 = denoise(x, float(sigma)).x0
        ratio = after / sigma
        down = after * ratio
        x = x0.lerp(x, float(down / sigma))
        if after > 0:
            up = after * np.sqrt(1 - ratio * ratio)
            x = x + noise(i).to(x) * float(up)
        yield Step(x, x0, float(after))


SAMPLERS = {
    "euler": SamplerEntry(euler, 1, 1, False, "DDIM, eta 0 (Song et al. 2021)"),
    "euler_ancestral": SamplerEntry(euler_ancestral, 1, 1, True, "DDPM (Ho et al. 2020), eta 1"),
}
