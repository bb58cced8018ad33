"""Layouts, labelled boxes, as tokens of the 2021 models' transformer."""

from collections.abc import Sequence
from math import isqrt
from typing import Any, NamedTuple

import torch
from torch import nn

from latentkit.errors import InputError, nearest
from latentkit.model.conditioning import Conditioning
from latentkit.nets.towers import BertText, BertTextConfig


class Box(NamedTuple):
    """A class and the corners of its box in 0..1, from the picture's top left; the class by name or by number."""

    label: str | int
    left: float
    top: float
    right: float
    bottom: float


class LayoutConditioner(nn.Module):
    """Boxes to the context slot; the absent layout has no box (Rombach et al. 2022, section 4.3.1 and table 17).

    Each box is three tokens: its class, and its corners, each the number of a point of a square grid. Behind those of
    all boxes, and of none to fill the room, stand the corners of the crop: here the whole picture. `classes` name the
    first numbers (those of a released model are in no file).
    """

    def __init__(self, config: BertTextConfig, classes: Sequence[str] = ()) -> None:
        super().__init__()
        self.config = config
        self.classes = tuple(classes)
        self._index = {name: number for number, name in enumerate(self.classes)}
        if config.length < 5 or len(self.classes) >= config.vocabulary:
            raise InputError(
                f"a layout of {config.length} tokens out of {config.vocabulary} with {len(self.classes)} classes; it "
                "has 3 tokens for each box and 2 more, and a token more than classes"
            )
        self.encoder = BertText(config)

    @property
    def room(self) -> int:
        """Boxes of a layout."""
        return (self.config.length - 2) // 3

    def from_batch(self, batch: dict[str, Any]) -> list[Sequence[Box]]:
        """The layouts of a training batch."""
        return list(batch["layout"])

    def absent(self, count: int) -> list[Sequence[Box]]:
        """Layouts without a box."""
        return [()] * count

    def tokens(self, layout: Sequence[Box]) -> list[int]:
        """The ids of a layout; InputError names a class that the model has not, and one box too many."""
        if len(layout) > self.room:
            raise InputError(f"the layout has {len(layout)} boxes; this model reads {self.room}", exit_code=2)
        none = self.config.vocabulary - 1
        found = [token for box in layout for token in (self._number(box.label), *self._corners(*box[1:]))]
        found += [none] * (self.config.length - 2 - len(found))
        return [*found, *self._corners(0.0, 0.0, 1.0, 1.0)]

    def forward(self, layouts: Sequence[Sequence[Box]]) -> Conditioning:
        """Rows for the layouts, on the encoder's device; errors as `tokens`."""
        rows = [self.tokens(layout) for layout in layouts]
        return Conditioning(context=self.encoder(torch.tensor(rows, device=self.encoder.position_embedding.device)))

    def state(self) -> dict[str, Any]:
        """What rebuilds it, for the model file."""
        return {"classes": list(self.classes)}

    def _number(self, label: str | int) -> int:
        number = self._index.get(label) if isinstance(label, str) else label
        if number is None:
            known = nearest(str(label), self.classes) if self.classes else "this model knows classes by number only"
            raise InputError(f"class {label!r} of a box is unknown; {known}", exit_code=2)
        most = (len(self.classes) or self.config.vocabulary - 1) - 1
        if not 0 <= number <= most:
            raise InputError(f"class {number} of a box is unknown; allowed are 0 to {most}", exit_code=2)
        return number

    def _corners(self, left: float, top: float, right: float, bottom: float) -> tuple[int, int]:
        side = isqrt(self.config.vocabulary)
        (x, y), (u, v) = ((round(a * (side - 1)), round(b * (side - 1))) for a, b in ((left, top), (right, bottom)))
        return y * side + x, v * side + u
