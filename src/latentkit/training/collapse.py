"""Noticing that a run has collapsed, early enough that a checkpoint from before it is still there."""

import torch
from torch import Tensor

from latentkit.errors import InputError

SMOOTH = 1 / 20
DOUBT, COLLAPSED = 2.0, 6.0
"""Decibels that the running reconstruction may fall below what it was: nothing is saved then; the run is given up."""
FORGOTTEN = 6.0 / 2000
"""Decibels a step by which what it was is forgotten: a slow loss that stays is a choice, not a collapse."""
STATE = ("psnr_now", "psnr_before")


class Collapse(InputError):
    """Training stopped because what it had learned was being lost."""


def watch(psnr: Tensor, shared: dict[str, Tensor], counts: bool) -> None:
    """Follow the reconstruction's PSNR over the global batch; raises Collapse where it fell and that `counts`."""
    now = torch.lerp(shared.get("psnr_now", psnr), psnr, SMOOTH)
    before = torch.maximum(now, shared.get("psnr_before", now) - FORGOTTEN)
    shared["psnr_now"], shared["psnr_before"] = now, before
    if counts and float(before - now) > COLLAPSED:
        raise Collapse(f"the reconstruction fell from {float(before):.1f} to {float(now):.1f} dB within a few steps.")


def doubtful(shared: dict[str, Tensor]) -> bool:
    """Whether the reconstruction has fallen so far that the present weights are not worth keeping."""
    return "psnr_now" in shared and float(shared["psnr_before"] - shared["psnr_now"]) > DOUBT
