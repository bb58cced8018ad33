"""Second-order rules of two evaluations on dx/dsigma = (x - x0) / sigma: Heun, with churn or without, and DPM2."""

import math
from functools import partial

import torch
from torch import Tensor

from latentkit.diffusion.samplers.driver import SamplerEntry, Walk, ancestral
from latentkit.diffusion.samplers.euler import ETA

CHURNED = (0.05, 50.0)
"""Sigmas between which churn adds noise (Karras et al. 2022, table 5)."""
MOST_CHURN = math.sqrt(2) - 1


def heun(walk: Walk, x: Tensor, churn: float = 0.0) -> Tensor:
    """Trapezoid of two slopes (Karras et al. 2022, algorithms 1 and 2); plain Euler into 0.

    `churn` over the number of steps is the share by which sigma is raised with fresh noise before each step. The
    noise is of unit variance: the paper's 1.003 makes up for networks that remove too much.
    """
    sigma = walk.sigma
    raised = min(churn / (len(walk.sigmas) - 1), MOST_CHURN) if CHURNED[0] <= sigma <= CHURNED[1] else 0.0
    if raised:
        sigma *= 1 + raised
        up = math.sqrt(sigma * sigma - walk.sigma * walk.sigma)
        x = torch.add(x, walk.fresh("churn"), alpha=up, out=walk.spare())
    x, x0 = walk.estimate(x, sigma)
    return trapezoid(walk, x, x0, sigma)


def trapezoid(walk: Walk, x: Tensor, x0: Tensor, sigma: float) -> Tensor:
    """From `sigma` to `walk.after` by the mean of the slopes at both ends; by the first alone into 0."""
    after = walk.after
    ahead = walk.mix(x, x0, after / sigma)
    if after == 0:
        return ahead
    ahead, ahead0 = walk.estimate(ahead, after)
    half = (after - sigma) / 2
    out = torch.lerp(x0, x, 1 + half / sigma, out=walk.spare(x, ahead))
    return out.add_(ahead, alpha=half / after).sub_(ahead0, alpha=half / after)


def dpm_2(walk: Walk, x: Tensor, eta: float = 0.0) -> Tensor:
    """The slope in the middle (of log sigma) for the whole interval; plain Euler into 0.

    Source: DPM-Solver-2's midpoint on dx/dsigma, with Karras et al. 2022 (k-diffusion, `sample_dpm_2`).
    """
    sigma = walk.sigma
    down, up = ancestral(sigma, walk.after, eta)
    x, x0 = walk.estimate(x)
    if down == 0:
        return walk.mix(x, x0, 0.0, up)
    middle = math.sqrt(sigma * down)
    between, between0 = walk.estimate(walk.mix(x, x0, middle / sigma), middle)
    slope = (down - sigma) / middle
    out = torch.add(x, between, alpha=slope, out=walk.spare(x, between)).sub_(between0, alpha=slope)
    return out.add_(walk.fresh(), alpha=up) if up else out


SAMPLERS = {
    "heun": SamplerEntry(
        heun,
        2,
        2,
        False,
        "Karras et al. 2022, algorithm 1",
        "few artefacts at many evaluations",
        ("HeunDiscreteScheduler",),
    ),
    "edm": SamplerEntry(
        partial(heun, churn=40.0),
        2,
        2,
        True,
        "Karras et al. 2022, algorithm 2",
        "the best figures of pixel models, at hundreds of evaluations",
        (),
        {"churn": (0.0, 1000.0)},
    ),
    "dpm2": SamplerEntry(
        dpm_2,
        2,
        2,
        False,
        "Lu et al. 2022 a (DPM-Solver-2), k-diffusion",
        "comparison with older pictures",
        ("dpm_2", "KDPM2DiscreteScheduler"),
    ),
    "dpm2_ancestral": SamplerEntry(
        partial(dpm_2, eta=1.0),
        2,
        2,
        True,
        "dpm2 with ancestral noise (k-diffusion)",
        "variety, at two evaluations a step",
        ("DPM2 a", "dpm_2_ancestral", "KDPM2AncestralDiscreteScheduler"),
        ETA,
    ),
}
