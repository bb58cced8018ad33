"""How well a first stage gives pictures back."""

from collections.abc import Iterable

import torch
from torch import Tensor

from latentkit.training.losses import structure


def psnr(original: Tensor, other: Tensor) -> float:
    """Peak signal-to-noise ratio in decibels of two pictures in [-1, 1] (peak to peak 2), at most 100."""
    error = float(((original - other) / 2).square().mean())
    return 100.0 if error <= 1e-10 else float(-10 * torch.log10(torch.tensor(error)))


def bounding_box(picture: Tensor, background: float = 1.0) -> tuple[slice, slice]:
    """Rows and columns of `c h w` that hold anything but the background value (all of them if nothing does)."""
    inked = (picture - background).abs().amax(0) > 2 / 255
    if not inked.any():
        return slice(None), slice(None)
    rows, columns = inked.any(1).nonzero().flatten(), inked.any(0).nonzero().flatten()
    return slice(int(rows[0]), int(rows[-1]) + 1), slice(int(columns[0]), int(columns[-1]) + 1)


def reconstruction(pairs: Iterable[tuple[Tensor, Tensor]]) -> dict[str, float]:
    """Means over (original, reconstruction) pairs `c h w` in [-1, 1].

    `psnr` of whole pictures, `psnr_box` inside the box that is not plain white, and `structure`, the structural
    similarity over three scales (1 is equal).
    """
    rows = []
    for original, other in pairs:
        height, width = bounding_box(original)
        similarity = 1 - float(structure(other[None], original[None]))
        rows.append((psnr(original, other), psnr(original[:, height, width], other[:, height, width]), similarity))
    means = torch.tensor(rows, dtype=torch.float64).mean(0).tolist()
    return dict(zip(("psnr", "psnr_box", "structure"), means, strict=True))
