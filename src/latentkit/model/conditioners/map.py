"""Semantic maps, one class number per pixel, beside the latent: the 2021 models' spatial rescaler."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from latentkit.errors import InputError
from latentkit.model.conditioning import Conditioning


@dataclass(frozen=True)
class MapConfig:
    """The shape of a semantic map's rescaler (Rombach et al. 2022, section 4.3.2)."""

    __pydantic_config__ = {"extra": "forbid"}  # noqa: RUF012

    classes: int = 182
    channels: int = 3
    """Channels of the concat slot that it makes."""
    cell: int = 4
    """Pixels per latent cell, per side."""

    def __post_init__(self) -> None:
        if min(self.classes, self.channels, self.cell) < 1:
            raise InputError(f"semantic map has {self}; classes, channels and cell must be at least 1")

    @property
    def context_width(self) -> int:
        """It makes no context."""
        return 0

    @property
    def vector_width(self) -> int:
        """It makes no vector."""
        return 0


class MapConditioner(nn.Module):
    """Maps `h w` of class numbers to the concat slot: the share of each class in a cell, mixed into few channels.

    Halving a one-hot map bilinearly, again and again, takes the mean of each cell, and the mixing is linear: so each
    pixel is mixed first, and the mean taken of few channels. A map is never absent.
    """

    def __init__(self, config: MapConfig) -> None:
        super().__init__()
        self.config = config
        self.mixing = nn.Linear(config.classes, config.channels, bias=False)

    def from_batch(self, batch: dict[str, Any]) -> list[Tensor]:
        """The maps of a training batch, `b h w`."""
        return list(batch["map"])

    def absent(self, count: int) -> list[None]:
        """What stands for "no map", which no model draws."""
        return [None] * count

    def check(self, values: Tensor) -> None:
        """InputError for a class number that the model has not."""
        low, high = int(values.min()), int(values.max())
        if low < 0 or high >= self.config.classes:
            most = self.config.classes - 1
            raise InputError(f"the semantic map holds classes {low} to {high}; this model has 0 to {most}", exit_code=2)

    def forward(self, values: Sequence[Tensor | None]) -> Conditioning:
        """Rows for maps of one size, on the conditioner's device; InputError for none and for unknown classes."""
        maps = []
        for value in values:
            if value is None:
                raise InputError(
                    "this model draws nothing without a semantic map: give one, guidance scale 1, and "
                    "train it with condition_dropout 0",
                    exit_code=2,
                )
            self.check(value)
            maps.append(value)
        weight = self.mixing.weight
        mixed = F.embedding(torch.stack(maps).to(weight.device), weight.T)
        return Conditioning(concat=F.avg_pool2d(mixed.movedim(-1, 1), self.config.cell))

    def state(self) -> dict[str, Any]:
        """Nothing."""
        return {}
