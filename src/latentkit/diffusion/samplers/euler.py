"""First-order rules: Euler (deterministic DDIM), its ancestral form, DDPM, and multistep consistency."""

import math
from functools import partial

import torch
from torch import Tensor

from latentkit.diffusion.samplers.driver import SamplerEntry, Walk, ancestral


def euler(walk: Walk, x: Tensor) -> Tensor:
    """x' = (s'/s) x + (1 - s'/s) x0: DDIM with eta 0 (Song et al. 2021, eq. 12, in this space)."""
    x, x0 = walk.estimate(x)
    return walk.mix(x, x0, walk.after / walk.sigma)


def euler_ancestral(walk: Walk, x: Tensor, eta: float = 1.0) -> Tensor:
    """Euler to a lower level, then fresh noise back up: DDIM with `eta` (Song et al. 2021, eq. 12 and 16)."""
    x, x0 = walk.estimate(x)
    down, up = ancestral(walk.sigma, walk.after, eta)
    return walk.mix(x, x0, down / walk.sigma, up)


def ddpm(walk: Walk, x: Tensor, variance: str = "small") -> Tensor:
    """The posterior's mean and noise of its variance (Ho et al. 2020, eq. 7), of the forward step's, or learned.

    "small" is the posterior's variance and "large" the forward step's; a learned one lies between the two
    (Nichol & Dhariwal 2021, eq. 15) and goes before both.
    """
    x, x0 = walk.estimate(x)
    sigma, after = walk.sigma, walk.after
    down, small = ancestral(sigma, after, 1.0)
    if after == 0:
        return walk.mix(x, x0, 0.0)
    large = math.sqrt((sigma - after) * (sigma + after) * (1 + after * after) / (1 + sigma * sigma))
    if walk.log_variance is None:
        return walk.mix(x, x0, down / sigma, large if variance == "large" else small)
    widened = torch.exp(walk.log_variance.to(x) * math.log(large / small))
    return walk.mix(x, x0, down / sigma).addcmul_(widened, walk.fresh(), value=small)


def lcm(walk: Walk, x: Tensor) -> Tensor:
    """x' = x0 + s' noise: multistep consistency sampling (Song et al. 2023, algorithm 1; Luo et al. 2023)."""
    x, x0 = walk.estimate(x)
    return walk.mix(x, x0, 0.0, walk.after)


ETA = {"eta": (0.0, 1.0)}

SAMPLERS = {
    "euler": SamplerEntry(
        euler,
        1,
        1,
        False,
        "DDIM with eta 0 (Song et al. 2021)",
        "previews, flow models, and being understood",
        ("EulerDiscreteScheduler", "FlowMatchEulerDiscreteScheduler", "EDMEulerScheduler"),
    ),
    "euler_ancestral": SamplerEntry(
        euler_ancestral,
        1,
        1,
        True,
        "DDIM with eta 1, which is DDPM (Song et al. 2021)",
        "variety: the picture keeps changing with the number of steps",
        ("Euler a", "EulerAncestralDiscreteScheduler"),
        ETA,
    ),
    "ddim": SamplerEntry(
        partial(euler_ancestral, eta=0.0),
        1,
        1,
        False,
        "Song et al. 2021, eq. 12; eta 0 is Euler",
        "the 2021 models' own figures, and inversion",
        ("DDIMScheduler",),
        ETA,
    ),
    "ddpm": SamplerEntry(
        ddpm,
        1,
        1,
        True,
        "Ho et al. 2020, algorithm 2; learned variance: Nichol & Dhariwal 2021",
        "many steps, and models that learned their variance",
        ("DDPMScheduler",),
        {"variance": ("small", "large")},
    ),
    "lcm": SamplerEntry(
        lcm,
        0,
        1,
        True,
        "Song et al. 2023, algorithm 1; Luo et al. 2023",
        "consistency and turbo models, 1 to 8 steps",
        ("LCMScheduler",),
    ),
}
