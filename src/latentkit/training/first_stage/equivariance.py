"""Latents that scale and turn with their pictures, so that the second stage finds them smooth."""

import torch.nn.functional as F
from torch import Tensor

from latentkit.diffusion.noise import keyed_uniform

SMALLEST = 0.25


def change_of(step: int, seed: int) -> tuple[float, int] | None:
    """Scale in [0.25, 1] and quarter turns of a step, on half of the steps; a function of (seed, step) alone."""
    applied, scale, turns = keyed_uniform((3,), seed, "equivariance", step).tolist()
    return (SMALLEST + (1 - SMALLEST) * scale, int(4 * turns)) if applied < 0.5 else None


def changed(x: Tensor, scale: float, turns: int, cell: int) -> Tensor:
    """`b c h w` turned and scaled, antialiased, to whole multiples of `cell` a side (Kouzelis et al. 2025, 3.2)."""
    x = x.rot90(turns, (2, 3))
    size = [max(1, round(scale * side / cell)) * cell for side in x.shape[2:]]
    if size == [*x.shape[2:]]:
        return x
    return F.interpolate(x, size, mode="bilinear", antialias=True, align_corners=False)
