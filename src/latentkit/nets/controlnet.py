"""ControlNet: a second way down, told a picture, whose answers are added to the U-Net's skips (Zhang et al. 2023)."""

import math
from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby, pairwise
from typing import NamedTuple, cast

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from latentkit.errors import InputError, nearest
from latentkit.nets.layers import EmbeddingMLP, laid_out, sinusoids, zeroed
from latentkit.nets.unet import UNetConfig, descend, descent, embed

HINT_WIDTHS = (16, 32, 96, 256)
"""Widths of the convolutions over the hint; each but the last is followed by a halving of height and width."""
HINT_CELL = 8
"""Pixels of the hint to a latent cell."""


KINDS = {
    "openpose": 0, "depth": 1, "hed": 2, "pidi": 2, "scribble": 2, "ted": 2, "canny": 3, "lineart": 3,
    "anime_lineart": 3, "mlsd": 3, "normal": 4, "segment": 5, "tile": 6, "repaint": 7,
}  # fmt: skip
"""Kinds of hint that the released XL unions were trained on, by their number there; the last two promax alone."""


def kind_number(kind: str) -> int:
    """The number of a kind of hint, of its name or of the number itself; InputError with the nearest name."""
    if kind.isdecimal():
        return int(kind)
    if kind not in KINDS:
        raise InputError(f"hint kind {kind!r} is unknown; {nearest(kind, KINDS)}", exit_code=2)
    return KINDS[kind]


KIND_WAVES = 256
"""Width of the sinusoids that say of each kind of hint whether it is there."""
FAINTEST = 0.1
"""Share of the first residual in guess mode, from which the shares grow to 1 in equal ratios."""


class Fusion(nn.Module):
    """What makes one ControlNet serve several kinds of hint (xinsir's ControlNet++ union, 2024).

    Each hint, and the latent, is a token: its mean over the picture. The released code attends over the batch, where
    all rows of one picture are alike, so that each token gets its own value back; queries and keys are kept for export.
    """

    def __init__(self, kinds: int, width: int, embedding_width: int) -> None:
        super().__init__()
        self.kinds = nn.Parameter(torch.randn(kinds, width) * width**0.5)
        self.blocks = nn.ModuleList([_Token(width)])
        self.out = zeroed(nn.Linear(width, width))
        self.embedding = EmbeddingMLP(KIND_WAVES * kinds, embedding_width)

    def told(self, kinds: Int[Tensor, "b k"], dtype: torch.dtype) -> Float[Tensor, "b e"]:
        """What joins the time embedding: which kinds there are."""
        there = torch.zeros(len(kinds), len(self.kinds), device=kinds.device).scatter(1, kinds, 1.0)
        waves = sinusoids(there.flatten(), KIND_WAVES).reshape(len(kinds), -1)
        answer: Tensor = self.embedding(waves.to(dtype))
        return answer

    def forward(
        self, start: Float[Tensor, "b c h w"], hints: Sequence[Tensor], kinds: Int[Tensor, "b k"], shares: Tensor
    ) -> Float[Tensor, "b c h w"]:
        """The latent's features `start` with those of all hints, each as much as `shares` `b k` says."""
        for place, hint in enumerate(hints):
            share = shares[:, place, None]
            token = (hint.mean((2, 3)) + self.kinds[kinds[:, place]].to(hint)) * share
            for block in self.blocks:
                token = block(token)
            start = start + hint * share[..., None, None] + (self.out(token) * share)[..., None, None]
        return start


class _Token(nn.Module):
    """A block of a transformer whose every token sees itself alone."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm_in, self.norm_out = nn.LayerNorm(width), nn.LayerNorm(width)
        self.q, self.k, self.v, self.out = (nn.Linear(width, width) for _ in range(4))
        self.wide, self.narrow = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.out(self.v(self.norm_in(x)))
        wide = self.wide(self.norm_out(x))
        return x + cast(Tensor, self.narrow(wide * torch.sigmoid(1.702 * wide)))


class _Unchanged(nn.Module):
    """In place of the middle's second half, which small ControlNets lack."""

    def forward(self, x: Tensor, *told: object) -> Tensor:
        return x


class ControlNet(nn.Module):
    """The way down of a U-Net of the same config, told a hint picture, and a 1x1 convolution behind each part of it.

    With the convolutions at zero, as a new one has them, it adds nothing. With `kinds` it is a union: it takes several
    hints at once, each of one of so many kinds. With `short` its middle is one residual block (diffusers' small XL
    ones).
    """

    pooled: bool = False
    """What it adds is the mean over the picture, and only where guidance leads to (shuffle)."""
    bgr: bool = False
    """Its hints have blue first."""

    def __init__(self, config: UNetConfig, hint_channels: int = 3, *, kinds: int = 0, short: bool = False) -> None:
        super().__init__()
        self.config = config
        self.hint_channels = hint_channels
        self.checkpointing = False
        half = descent(config)
        self.time_embedding, self.vector_embedding, self.class_embedding = half[:3]
        self.conv_in, self.down, self.middle = half.conv_in, half.down, half.middle
        self.short = short
        if short:
            self.middle.block_in.transformer, self.middle.block_out = None, _Unchanged()  # type: ignore[assignment]
        self.fusion = Fusion(kinds, config.channels, half.embedding_width) if kinds else None
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
        hint: Float[Tensor, "b p hp wp"] | list[Tensor],
        context: Float[Tensor, "b n d"] | None = None,
        vector: Float[Tensor, "b v"] | None = None,
        mask: Tensor | None = None,
        kinds: Int[Tensor, "b k"] | None = None,
        shares: Float[Tensor, "b k"] | None = None,
    ) -> list[Tensor]:
        """What `UNet` takes as `residuals`; `hint` is in 0..1, `b p 8h 8w` pixels, the rest as in `UNet`.

        A union takes a list of them, the kind of each and how much each counts.
        """
        pictures = hint if isinstance(hint, list) else [hint]
        h = self.conv_in(laid_out(x))
        features = [self._features(picture, x) for picture in pictures]
        told = None
        if self.fusion is None:
            h = h + features[0]
        else:
            if kinds is None or shares is None:
                raise InputError(f"this ControlNet takes hints of {len(self.fusion.kinds)} kinds; say which each is of")
            told = self.fusion.told(kinds, x.dtype)
            h = self.fusion(h, features, kinds, shares)
        embedding = embed(self, timestep, context, vector, told)
        h, skips = descend(self, h, embedding, context, mask)
        return [*(layer(skip) for layer, skip in zip(self.skips, skips, strict=True)), self.middle_out(h)]

    def _features(self, hint: Tensor, x: Tensor) -> Tensor:
        wanted = (self.hint_channels, HINT_CELL * x.shape[2], HINT_CELL * x.shape[3])
        if tuple(hint.shape[1:]) != wanted:
            raise InputError(f"this ControlNet takes a hint of {wanted}; it was given one of {tuple(hint.shape[1:])}")
        h = laid_out(hint)
        for layer in self.hint[:-1]:
            h = F.silu(layer(h))
        answer: Tensor = self.hint[-1](h)
        return answer


class Control(NamedTuple):
    """A ControlNet at work: its strength, and the entry of `Conditioning.extras` that holds its hint.

    Beside that entry, one with `ROWS` behind its name holds which rows it answers for (`b`, boolean); without, all.
    """

    network: ControlNet
    hint: str
    weight: float = 1.0
    guess: bool = False
    """The upper residuals count for less, as for hints that no words go with."""
    pooled: bool = False
    """As `ControlNet.pooled`, where its file does not say so."""
    kind: int = 0
    """Of the hint, for a union."""
    low: float = 0.0
    high: float = math.inf
    """It works at noise levels (sigmas) above low, up to high."""


ROWS = " rows"


def residuals(
    controls: Sequence[Control],
    hints: Mapping[str, Tensor],
    x: Tensor,
    timestep: Tensor,
    context: Tensor | None,
    vector: Tensor | None,
    mask: Tensor | None,
) -> list[Tensor] | None:
    """The weighted sum of what the ControlNets add; None of none. All hints of one union are answered at once."""
    total: list[Tensor] | None = None
    for group in _groups(controls):
        network, name, weight, guess = group[0][:4]
        told: tuple[Tensor | None, ...] = (x, timestep, context, vector, mask)
        pictures = [hints[control.hint].to(x) for control in group]
        rows = hints.get(name + ROWS)
        if rows is not None:
            told = tuple(None if one is None else one[rows] for one in told)
            pictures = [picture[rows] for picture in pictures]
        if network.bgr:
            pictures = [picture.flip(1) for picture in pictures]
        latent, time, *slots = told
        if network.fusion is None:
            answers = network(latent, time, pictures[0], *slots)
        else:
            count, weights = len(pictures[0]), [control.weight for control in group]
            kinds = torch.tensor([[control.kind for control in group]], device=x.device).expand(count, -1)
            if len(group) == 1:
                weights = [1.0]
            else:
                weight = 1.0
            answers = network(latent, time, pictures, *slots, kinds, x.new_tensor([weights]).expand(count, -1))
        last, pooled = len(answers) - 1, network.pooled or group[0].pooled
        grown = [FAINTEST ** (1 - place / last) if guess and not pooled else 1.0 for place in range(last + 1)]
        answers = [weight * share * answer for share, answer in zip(grown, answers)]
        if pooled:
            answers = [answer.mean((2, 3), keepdim=True).expand_as(answer) for answer in answers]
        if rows is not None:
            answers = [answer.new_zeros(len(rows), *answer.shape[1:]).index_put((rows,), answer) for answer in answers]
        total = answers if total is None else [a + b for a, b in zip(total, answers, strict=True)]
    return total


def _groups(controls: Sequence[Control]) -> Iterator[list[Control]]:
    """The ControlNets one by one, but neighbours that are one union in one mode together."""
    key = enumerate(controls)
    alike = groupby(key, lambda each: (id(each[1].network), each[1].guess) if each[1].network.fusion else each[0])
    yield from ([control for _, control in group] for _, group in alike)
