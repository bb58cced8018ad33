"""Conditioning: what a denoiser is told, in three slots."""

from collections.abc import Sequence
from dataclasses import dataclass, field, fields

import torch
import torch.nn.functional as F
from torch import Tensor

PLAIN = ("vector", "concat")
"""Slots whose rows all have one shape."""


@dataclass(frozen=True)
class Conditioning:
    """Rows for `b` pictures: `context` `b n d` (with boolean `mask` `b n`), `vector` `b v`, `concat` `b c h w`.

    `extras` hold what one adapter named for itself. Slots are None where a model has none.
    """

    context: Tensor | None = None
    mask: Tensor | None = None
    vector: Tensor | None = None
    concat: Tensor | None = None
    extras: dict[str, Tensor] = field(default_factory=dict)

    def _slots(self) -> dict[str, Tensor]:
        named = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "extras"}
        return {name: value for name, value in named.items() if value is not None}

    def take(self, rows: Tensor | slice) -> "Conditioning":
        """The conditioning of some of the pictures."""
        extras = {name: value[rows] for name, value in self.extras.items()}
        return Conditioning(extras=extras, **{name: value[rows] for name, value in self._slots().items()})

    def to(self, device: torch.device) -> "Conditioning":
        """The same on another device."""
        extras = {name: value.to(device) for name, value in self.extras.items()}
        return Conditioning(extras=extras, **{name: value.to(device) for name, value in self._slots().items()})

    @staticmethod
    def cat(parts: Sequence["Conditioning"]) -> "Conditioning":
        """The rows of all `parts` one after another; all have the same slots, masks apart.

        Shorter contexts are padded with tokens that do not count.
        """
        first = parts[0]
        given = [{**p._slots(), "mask": None}.keys() for p in parts]
        assert all(slots == given[0] for slots in given), "parts with different slots"
        slots = {name: torch.cat([getattr(p, name) for p in parts]) for name in first._slots() if name in PLAIN}
        extras = {name: torch.cat([p.extras[name] for p in parts]) for name in first.extras}
        contexts = [p.context for p in parts if p.context is not None]
        if not contexts:
            return Conditioning(extras=extras, **slots)
        length = max(context.shape[1] for context in contexts)
        context = torch.cat([F.pad(one, (0, 0, 0, length - one.shape[1])) for one in contexts])
        mask = None
        if any(p.mask is not None for p in parts) or any(one.shape[1] < length for one in contexts):
            mask = torch.cat([F.pad(_mask(p), (0, length - _mask(p).shape[1])) for p in parts])
        return Conditioning(context=context, mask=mask, extras=extras, **slots)


def merge(parts: Sequence[Conditioning]) -> Conditioning:
    """The answers of several conditioners as one: contexts one after another, vectors side by side."""

    def joined(name: str, dim: int) -> Tensor | None:
        values = [getattr(part, name) for part in parts if getattr(part, name) is not None]
        return torch.cat(values, dim) if values else None

    contexts = [part for part in parts if part.context is not None]
    mask = None
    if any(part.mask is not None for part in contexts):
        mask = torch.cat([_mask(part) for part in contexts], 1)
    extras = {name: value for part in parts for name, value in part.extras.items()}
    return Conditioning(joined("context", 1), mask, joined("vector", 1), joined("concat", 1), extras)


def _mask(part: Conditioning) -> Tensor:
    """The part's own mask, or one under which all of its tokens count."""
    assert part.context is not None
    return part.mask if part.mask is not None else part.context.new_ones(part.context.shape[:2], dtype=torch.bool)
