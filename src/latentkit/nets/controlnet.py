"""ControlNet: a second way down, told a picture, whose answers are added to the U-Net's skips (Zhang et al. 2023)."""

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import NamedTuple

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from latentkit.errors import InputError
from latentkit.nets.layers import laid_out, zeroed
from latentkit.nets.unet import UNetConfig, descend, descent, embed

HINT_WIDTHS = (16, 32, 96, 256)
"""Widths of the convolutions over the hint; each but the last is followed by a halving of height and width."""
HINT_CELL = 8
"""Pixels of the hint to a latent cell."""


class ControlNet(nn.Module):
    """The way down of a U-Net of the same config, told a hint picture, and a 1x1 convolution behind each part of it.

    With the convolutions at zero, as a new one has them, it adds nothing.
    """

    def __init__(self, config: UNetConfig, hint_channels: int = 3) -> None:
        super().__init__()
        self.config = config
        self.hint_channels = hint_channels
        self.checkpointing = False
        half = descent(config)
        self.time_embedding, self.vector_embedding, self.class_embedding = half[:3]
        self.conv_in, self.down, self.middle = half.conv_in, half.down, half.middle
        first, *_, last = HINT_WIDTHS
        hint = [nn.Conv2d(hint_channels, first, 3, padding=1)]
        for width, wider in pairwise(HINT_WIDTHS):
            hint.append(nn.Conv2d(width, width, 3, padding=1))
            hint.append(nn.Conv2d(width, wider, 3, padding=1, stride=2))
        hint.append(nn.Conv2d(last, config.channels, 3, padding=1))
        zeroed(hint[-1])
        self.hint = nn.ModuleList(hint)
        self.skips = nn.ModuleList(zeroed(nn.Conv2d(width, width, 1)) for width in half.skips)
        self.middle_out = zeroed(nn.Conv2d(half.skips[-1], half.skips[-1], 1))

    def forward(
        self,
        x: Float[Tensor, "b c h w"],
        timestep: Float[Tensor, " b"] | Float[Tensor, "b waves"],
        hint: Float[Tensor, "b p hp wp"],
        context: Float[Tensor, "b n d"] | None = None,
        vector: Float[Tensor, "b v"] | None = None,
        mask: Tensor | None = None,
    ) -> list[Tensor]:
        """What `UNet` takes as `residuals`; `hint` is in 0..1, `b p 8h 8w` pixels, the rest as in `UNet`."""
        wanted = (self.hint_channels, HINT_CELL * x.shape[2], HINT_CELL * x.shape[3])
        if tuple(hint.shape[1:]) != wanted:
            raise InputError(f"this ControlNet takes a hint of {wanted}; it was given one of {tuple(hint.shape[1:])}")
        h = laid_out(hint)
        for layer in self.hint[:-1]:
            h = F.silu(layer(h))
        embedding = embed(self, timestep, context, vector)
        start = self.conv_in(laid_out(x)) + self.hint[-1](h)
        h, skips = descend(self, start, embedding, context, mask)
        return [*(layer(skip) for layer, skip in zip(self.skips, skips, strict=True)), self.middle_out(h)]


class Control(NamedTuple):
    """A ControlNet at work: its strength, and the entry of `Conditioning.extras` that holds its hint."""

    network: ControlNet
    hint: str
    weight: float = 1.0


def residuals(
    controls: Sequence[Control],
    hints: Mapping[str, Tensor],
    x: Tensor,
    timestep: Tensor,
    context: Tensor | None,
    vector: Tensor | None,
    mask: Tensor | None,
) -> list[Tensor] | None:
    """The weighted sum of what the ControlNets add; None of none."""
    total: list[Tensor] | None = None
    for network, name, weight in controls:
        answers = network(x, timestep, hints[name].to(x), context, vector, mask)
        weighted = [weight * answer for answer in answers]
        total = weighted if total is None else [a + b for a, b in zip(total, weighted, strict=True)]
    return total
