"""Classes by a learned embedding, the last row standing for "no class"."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from latentkit.errors import InputError, nearest
from latentkit.model.conditioning import Conditioning


@dataclass(frozen=True)
class LabelConfig:
    """The shape of a class embedding."""

    __pydantic_config__ = {"extra": "forbid"}  # noqa: RUF012

    width: int = 256
    vector: bool = True
    """The class also fills the vector slot (no 2021 model's does)."""
    null: bool = True
    """A last row stands for "no class"; without it the model cannot be guided by classes."""

    @property
    def context_width(self) -> int:
        """Width of the context token that it makes."""
        return self.width

    @property
    def vector_width(self) -> int:
        """Width of the vector that it makes, 0 if none."""
        return self.width if self.vector else 0


CIN256_LABEL = LabelConfig(512, vector=False, null=False)
CIN256_V2_LABEL = LabelConfig(512, vector=False)
"""Of 1,001 rows the last is the null class."""


class LabelConditioner(nn.Module):
    """Class names to one context token and to the vector slot (Rombach et al. 2022, section 4.3.1)."""

    def __init__(self, config: LabelConfig, classes: Sequence[str]) -> None:
        super().__init__()
        self.config = config
        self.classes = tuple(classes)
        self._index: dict[str | None, int] = {name: i for i, name in enumerate(self.classes)}
        if config.null:
            self._index[None] = len(self.classes)
        self.embedding = nn.Embedding(len(self._index), config.width)

    def from_batch(self, batch: dict[str, Any]) -> list[str | None]:
        """The class names of a training batch, whose "label" holds class numbers and -1 for none."""
        return [self.classes[i] if i >= 0 else None for i in batch["label"].tolist()]

    def absent(self, count: int) -> list[None]:
        """What stands for "no class"."""
        return [None] * count

    def forward(self, labels: Sequence[str | None]) -> Conditioning:
        """Rows for the class names; None is no class. InputError names an unknown class."""
        for label in labels:
            if label is None and not self.config.null:
                raise InputError("this model knows no picture without a class: name one, guidance scale 1", exit_code=2)
            if label not in self._index:
                raise InputError(f"class {label!r} is unknown; {nearest(str(label), self.classes)}", exit_code=2)
        rows = torch.tensor([self._index[label] for label in labels], device=self.embedding.weight.device)
        embedded = self.embedding(rows)
        return Conditioning(context=embedded[:, None, :], vector=embedded if self.config.vector else None)

    def state(self) -> dict[str, Any]:
        """What rebuilds it, for the model file."""
        return {"classes": list(self.classes)}
