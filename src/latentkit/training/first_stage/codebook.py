"""How a codebook learns: by its loss or as running means, with codes that nobody chooses given new places.

And how codes are used, a codebook's and those of levels.
"""

import math

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from latentkit.diffusion.noise import keyed_uniform
from latentkit.nets.bottleneck import Codebook, Levels

RUNNING = 0.99
"""Decay of the running usage."""
DEAD = 0.01
"""Running usage, where 1 is an equal share, below which a code is dead: after some 460 steps that nobody chose it."""
MOST_COUNTED = 1 << 18
"""Codes that levels may have for their use to be counted."""
SLOTS = 4096
PER_PICTURE = 8
"""Latent cells of each picture that dead codes may take the place of."""
STATE = ("codebook_usage", "codebook_counts", "codebook_means")
SUMS = ("codebook_chosen", "codebook_sums", "codebook_cells", "codebook_filled")


class CodebookLoss(BaseModel):
    """Weights of the two sides of the distance between latents and codes (van den Oord et al. 2017, eq. 3)."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    codes: float = Field(default=1.0, ge=0)
    """Pulls codes to latents. The released 2021 models have 0.25 here and 1 below: beta on the wrong side."""
    commitment: float = Field(default=0.25, ge=0)
    """Pulls latents to codes (beta)."""
    running_mean: float | None = Field(default=None, gt=0, lt=1)
    """Decay with which codes are running means of their latents, in place of `codes` (appendix A.1 there)."""
    revive: bool = True
    """Move codes that nobody chooses to latents of the present batch (Dhariwal et al. 2020, 3.1)."""


def counted(levels: Levels, z: Tensor) -> dict[str, Tensor]:
    """How often each code of levels is chosen by latents `b c h w`; nothing where there are too many to count."""
    codes = math.prod(levels.levels)
    if codes > MOST_COUNTED:
        return {}
    return {"codebook_chosen": torch.bincount(levels.nearest(z).flatten(), minlength=codes).float()}


def followed(counts: Tensor, shared: dict[str, Tensor]) -> dict[str, float]:
    """Move the running usage by the counts over the global batch; returns what to log."""
    share = counts / counts.sum() * len(counts)
    shared["codebook_usage"] = torch.lerp(share, shared.get("codebook_usage", torch.zeros_like(share)), RUNNING)
    return {
        "codebook_perplexity": _perplexity(shared["codebook_usage"]),
        "codebook_chosen": float((counts > 0).float().mean()),
    }


def _perplexity(usage: Tensor) -> float:
    return float(torch.special.entr(usage / usage.sum()).sum().exp())


def chosen(codebook: Codebook, z: Tensor, index: Tensor, draws: Tensor, seed: int) -> dict[str, Tensor]:
    """What a codebook's statistics need of latents `b c h w` and their codes, as sums over pictures."""
    cells, flat = z.detach().movedim(1, -1).flatten(0, 2).float(), index.flatten()
    codes, width = codebook.vectors.shape
    counts = torch.bincount(flat, minlength=codes).float()
    sums = torch.zeros(codes, width, device=z.device).index_add_(0, flat, cells)
    # Each picture puts some cells into slots of its own, so that sums over processes are tables of candidates.
    kept, filled = torch.zeros(SLOTS, width, device=z.device), torch.zeros(SLOTS, device=z.device)
    for row, draw in zip(z.detach().movedim(1, -1).flatten(1, 2).float(), draws.tolist(), strict=True):
        places = (keyed_uniform((PER_PICTURE,), seed, "candidates", draw) * len(row)).long().to(z.device)
        slots = (torch.arange(PER_PICTURE, device=z.device) + draw * PER_PICTURE) % SLOTS
        kept[slots] += row[places]
        filled[slots] += 1
    return dict(zip(SUMS, (counts, sums, kept, filled), strict=True))


@torch.no_grad()
def settle(
    codebook: Codebook,
    settings: CodebookLoss,
    sums: dict[str, Tensor],
    shared: dict[str, Tensor],
    seed: int,
    step: int,
) -> dict[str, float]:
    """Move running usage and, where asked for, codes, by the sums over the global batch; returns what to log."""
    vectors = codebook.vectors
    counts = sums["codebook_chosen"]
    logs = followed(counts, shared)
    usage = shared["codebook_usage"]
    if settings.running_mean is not None:
        decay = settings.running_mean
        held = shared.get("codebook_counts", torch.ones_like(counts))
        means = shared.get("codebook_means", vectors.detach().float().clone())
        held = torch.lerp(counts, held, decay)
        means = torch.lerp(sums["codebook_sums"], means, decay)
        shared["codebook_counts"], shared["codebook_means"] = held, means
        alive = held > 1e-5
        vectors[alive] = (means / held.clamp_min(1e-5)[:, None])[alive].to(vectors.dtype)
    revived = 0
    if settings.revive:
        dead = (usage < DEAD).nonzero().flatten()
        candidates = sums["codebook_cells"][sums["codebook_filled"] == 1]
        revived = min(len(dead), len(candidates))
        taken, given = (
            keyed_uniform((len(rows),), seed, purpose, step).argsort()[:revived].to(rows.device)
            for rows, purpose in ((dead, "dead"), (candidates, "given"))
        )
        places, cells = dead[taken], candidates[given]
        vectors[places] = cells.to(vectors.dtype)
        usage[places] = 1.0
        if settings.running_mean is not None:
            shared["codebook_counts"][places], shared["codebook_means"][places] = 1.0, cells
    return logs | {"codebook_perplexity": _perplexity(usage), "codebook_revived": float(revived)}
