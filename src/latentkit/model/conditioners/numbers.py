"""Numbers about a picture: SD XL's sizes and crops, its refiner's aesthetic score, the upscaler's level of noise."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from latentkit.errors import InputError
from latentkit.model.conditioning import Conditioning
from latentkit.nets.layers import sinusoids

AWAY_SCORE = 2.5
"""The refiner's aesthetic score of what is guided away from."""


SAYS = {6: ("original_size", "crop", "target_size"), 5: ("original_size", "crop", "aesthetic_score")}
"""What the numbers are about, by how many there are: SD XL base, and its refiner."""
Numbers = tuple[float, ...]


@dataclass(frozen=True)
class NumbersConfig:
    """Which numbers a model is told (Podell et al. 2023, section 2.2)."""

    __pydantic_config__ = {"extra": "forbid"}  # noqa: RUF012

    default: tuple[float, ...]
    """What it is told unless something else is said; one entry per number."""
    width: int | None = 256
    """Each number as waves of this width; None: as it is."""

    @property
    def context_width(self) -> int:
        """It makes no context."""
        return 0

    @property
    def vector_width(self) -> int:
        """Width of the vector."""
        return len(self.default) * (self.width or 1)

    @property
    def says(self) -> tuple[str, ...]:
        """What its numbers are about."""
        return SAYS.get(len(self.default), ())

    def drawn(self, height: int, width: int, away: bool = False, **said: tuple[float, float] | float) -> Numbers:
        """The numbers of a whole picture of the size drawn, pixels, but for what is `said` otherwise (see `SAYS`).

        `away`: of what is guided away from. Pairs are height and width, or top and left.
        """
        if not self.says:
            return self.default
        values: dict[str, Any] = {
            "original_size": (height, width),
            "crop": self.default[2:4],
            "target_size": (height, width),
            "aesthetic_score": AWAY_SCORE if away else self.default[-1],
            **said,
        }
        told = (values[name] for name in self.says)
        return tuple(float(n) for value in told for n in (value if isinstance(value, tuple) else (value,)))


SDXL_NUMBERS = NumbersConfig((1024, 1024, 0, 0, 1024, 1024))
"""Height and width of the original, top and left of the crop, height and width drawn."""
REFINER_NUMBERS = NumbersConfig((1024, 1024, 0, 0, 6))
"""Height and width of the original, top and left of the crop, aesthetic score."""
UPSCALER_NUMBERS = NumbersConfig((20,), width=None)
"""Level of the noise that was put on the small picture."""


class NumbersConditioner(nn.Module):
    """One tuple of numbers per picture to the vector slot."""

    def __init__(self, config: NumbersConfig) -> None:
        super().__init__()
        self.config = config

    def from_batch(self, batch: dict[str, Any]) -> list[tuple[float, ...]]:
        """Training pictures say none: all get the defaults."""
        return self.absent(len(batch["draw"]))

    def absent(self, count: int) -> list[tuple[float, ...]]:
        """The defaults."""
        return [self.config.default] * count

    def forward(self, values: Sequence[Sequence[float]]) -> Conditioning:
        """Rows for the numbers; InputError where there are more or fewer than the model takes."""
        for value in values:
            if len(value) != len(self.config.default):
                raise InputError(f"{len(value)} numbers are given; this model takes {len(self.config.default)}")
        numbers = torch.tensor(values, dtype=torch.float32)
        if self.config.width is None:
            return Conditioning(vector=numbers)
        return Conditioning(
            vector=sinusoids(numbers.flatten(), self.config.width).unflatten(0, numbers.shape).flatten(1)
        )

    def state(self) -> dict[str, Any]:
        """Nothing."""
        return {}
