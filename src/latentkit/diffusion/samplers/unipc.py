"""UniPC: DPM-Solver++ in several steps, each of which is corrected once the estimate at its end is known."""

import math

import torch
from torch import Tensor

from latentkit.diffusion.samplers.driver import SamplerEntry, Walk
from latentkit.diffusion.samplers.quadrature import exponential, half


def unipc(walk: Walk, x: Tensor, order: int = 3, variant: str = "bh2") -> Tensor:
    """Correct the last step with the estimate at its end, then predict the next (Zhao et al. 2023, algorithms 5 and 7).

    The order falls towards the end; into 0 it is the first. `variant` is B(h) = h ("bh1") or e^h - 1 ("bh2"), which
    matters only where one weight is left open: predicting at order 2 and correcting at order 1.
    """
    moved, x0 = walk.estimate(x)
    if walk.held is not None:
        last = list(reversed(walk.past))[: int(walk.carried)]
        corrected = _step(walk, walk.held, [*last, (x0, walk.sigma)], last[0][1], walk.sigma, variant)
        moved = corrected if moved is x else corrected.add_(moved - x)
    walk.carried = min(order, len(walk.past) + 1, walk.left)
    known = [(x0, walk.sigma), *reversed(walk.past)][: int(walk.carried)]
    walk.held = moved
    out = _step(walk, moved, known, walk.sigma, walk.after, variant)
    walk.remember(x0, order)
    return out


def _step(walk: Walk, x: Tensor, known: list[tuple[Tensor, float]], start: float, after: float, variant: str) -> Tensor:
    """From `start` to `after` with the known estimates (the first at `start`), in a spare latent."""
    values, sigmas = zip(*known)
    if len(known) == 1 or after == 0:
        return walk.mix(x, values[0], after / start)
    if len(known) == 2:
        weights = half(sigmas[1], start, after, whole=math.log(start / after) if variant == "bh1" else None)
    else:
        weights = exponential(sigmas, start, after)
    out = torch.mul(x, after / start, out=walk.spare(x, *values))
    for value, weight in zip(values, weights):
        out.add_(value, alpha=weight)
    return out


SAMPLERS = {
    "unipc": SamplerEntry(
        unipc,
        4,
        1,
        False,
        "Zhao et al. 2023; order p + 1, the corrector's",
        "5 to 10 steps",
        ("uni_pc", "uni_pc_bh2", "UniPCMultistepScheduler"),
        {"order": (1, 3), "variant": ("bh1", "bh2")},
    ),
}
