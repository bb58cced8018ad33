"""Langevin dynamics: annealed (NCSN), and as the corrector of a reverse-diffusion predictor."""

import math

import torch
from torch import Tensor

from latentkit.diffusion.samplers.driver import SamplerEntry, Walk

MOST = 0.5
"""Of sigma: no step of the corrector is longer, so that it shrinks distances where data are points."""


def annealed(walk: Walk, x: Tensor, step_size: float = 0.2, inner_steps: int = 5) -> Tensor:
    """`inner_steps` steps x += alpha/2 score + sqrt(alpha) noise at the next level; into 0 the estimate itself.

    alpha is `step_size` sigma^2: Song & Ermon 2019, algorithm 1, whose epsilon is `step_size` times the square of its
    last sigma (2e-5 and 0.01 there). The last step denoises (Jolicoeur-Martineau et al. 2021).
    """
    after = walk.after
    if after == 0:
        return walk.mix(*walk.estimate(x), 0.0)
    for k in range(inner_steps):
        moved, x0 = walk.estimate(x, after)
        x = walk.mix(moved, x0, 1 - step_size / 2, after * math.sqrt(step_size), f"inner {k}")
    return x


def predictor_corrector(walk: Walk, x: Tensor, snr: float = 0.16) -> Tensor:
    """Reverse diffusion, then one step of Langevin at the level reached; into 0 the estimate itself.

    The corrector's length gives its noise and its score the ratio `snr`, for each picture on its own. Source: Song et
    al. 2021, algorithms 2 and 4 (variance-exploding).
    """
    sigma, after = walk.sigma, walk.after
    x, x0 = walk.estimate(x)
    if after == 0:
        return walk.mix(x, x0, 0.0)
    x = walk.mix(x, x0, (after / sigma) ** 2, math.sqrt((sigma - after) * (sigma + after)))
    x, x0 = walk.estimate(x, after)
    noise = walk.fresh("corrector")
    away = torch.sub(x0, x, out=walk.spare(x, x0))
    noise_norm, norm = (each.flatten(1).norm(dim=1)[:, None, None, None] for each in (noise, away))
    length = torch.clamp(snr * after * noise_norm / norm, max=MOST)
    return torch.addcmul(x, away, 2 * length**2, out=away).addcmul_(noise, length, value=2 * after)


SAMPLERS = {
    "langevin": SamplerEntry(
        annealed,
        0,
        5,
        True,
        "Song & Ermon 2019 (NCSN), algorithm 1; evaluations are the inner steps",
        "score models as published; hundreds of levels",
        (),
        {"step_size": (1e-6, 2.0), "inner_steps": (1, 1000)},
    ),
    "predictor_corrector": SamplerEntry(
        predictor_corrector,
        1,
        2,
        True,
        "Song et al. 2021 (variance-exploding), algorithms 2 and 4",
        "score models as published; hundreds of levels",
        ("ScoreSdeVeScheduler",),
        {"snr": (0.0, 1.0)},
    ),
}
