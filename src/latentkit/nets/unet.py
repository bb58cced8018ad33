"""The time-conditional U-Net with its three condition slots: context, vector, concat."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple, Protocol, cast, runtime_checkable

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from latentkit.errors import InputError
from latentkit.nets.attention import PixelAttention, SpatialTransformer
from latentkit.nets.layers import (
    Downsample,
    EmbeddingMLP,
    ResidualBlock,
    Upsample,
    group_norm,
    laid_out,
    normalised,
    sinusoids,
    zeroed,
)


@dataclass(frozen=True)
class UNetConfig:
    """The shape of a U-Net; Stable Diffusion 1.x, 2.x and XL are values of it (`model/presets.py`)."""

    __pydantic_config__ = {"extra": "forbid"}  # noqa: RUF012

    channels_in: int = 4
    """Channels of the latent, those of the concat slot included."""
    channels_out: int = 4
    channels: int = 320
    """Width of the first level."""
    multipliers: tuple[int, ...] = (1, 2, 4, 4)
    """Width of each level as a multiple of `channels`; each level but the last halves height and width."""
    blocks: int = 2
    """Residual blocks per level going down (one more going up)."""
    depth: tuple[int, ...] = (1, 1, 1, 0)
    """Transformer blocks after each residual block, per level (0: no attention)."""
    middle_depth: int = 1
    heads: int | None = 8
    """Attention heads; None: as many as `head_width` asks for."""
    head_width: int | None = None
    context_width: int | None = None
    """Width of the context tokens; None: no cross-attention."""
    vector_width: int | None = None
    """Width of the vector slot; None: no such slot."""
    linear_projection: bool = True
    scale_shift: bool = False
    """The embedding scales and shifts (AdaGN) instead of being added."""
    embedding_width: int | None = None
    """Width of the time embedding; None: 4 times `channels`."""
    plain_attention: bool = False
    """One self-attention over pixels in place of transformers (`depth` 0 or 1): the 2021 models without tokens."""
    residual_resampling: bool = False
    """Residual blocks, not single convolutions, make the steps between levels."""
    cross_only: int = 0
    """Levels, from the first, whose transformers look twice at the context and never at the picture (x4 upscaler)."""
    classes: int | None = None
    """Rows of a table that the vector slot, one number, chooses from (the x4 upscaler's level of noise)."""
    dropout: float = 0.0

    def __post_init__(self) -> None:
        for name in ("channels_in", "channels_out", "channels", "blocks"):
            if getattr(self, name) < 1:
                raise InputError(f"U-Net {name} is {getattr(self, name)}; it must be at least 1")
        if not self.multipliers or len(self.depth) != len(self.multipliers):
            raise InputError(
                f"U-Net multipliers {self.multipliers} and depth {self.depth} differ in length or are empty; "
                "give one of each per level"
            )
        if (self.heads is None) == (self.head_width is None):
            raise InputError(f"U-Net has heads={self.heads} and head_width={self.head_width}; give exactly one of them")
        if self.plain_attention and (self.context_width or max(*self.depth, self.middle_depth) > 1):
            raise InputError(
                f"U-Net has plain attention, context_width={self.context_width}, depth {self.depth} and middle_depth="
                f"{self.middle_depth}; plain attention takes no context and a depth of 0 or 1"
            )
        if self.cross_only and not self.context_width:
            raise InputError(f"U-Net cross_only is {self.cross_only}, but there is no context; give context_width")
        if self.classes is not None and (self.classes < 1 or self.vector_width):
            raise InputError(f"U-Net has classes={self.classes} and vector_width={self.vector_width}; give one of them")
        name, divisor = ("heads", self.heads) if self.heads is not None else ("head_width", self.head_width)
        for multiplier, depth in zip((*self.multipliers, self.multipliers[-1]), (*self.depth, self.middle_depth)):
            width = self.channels * multiplier
            if depth and (not divisor or divisor < 1 or width % divisor):
                raise InputError(f"U-Net level of width {width} cannot be split by {name}={divisor}; give a divisor")

    def head_count(self, width: int) -> int:
        """Attention heads at a level of `width` channels."""
        return self.heads if self.heads is not None else width // (self.head_width or width)


class UNetBlock(nn.Module):
    """A residual block and the transformer or plain attention behind it, if any."""

    def __init__(
        self, config: UNetConfig, c_in: int, c_out: int, embedding_width: int, depth: int, *, cross_only: bool = False
    ) -> None:
        super().__init__()
        self.residual = ResidualBlock(
            c_in, c_out, embedding_width, scale_shift=config.scale_shift, dropout=config.dropout
        )
        heads = config.head_count(c_out)
        plain = config.plain_attention
        self.attention = PixelAttention(c_out, heads, eps=1e-5) if depth and plain else None
        self.transformer = (
            SpatialTransformer(
                c_out, heads, depth, config.context_width, linear=config.linear_projection, cross_only=cross_only
            )
            if depth and not plain
            else None
        )

    def forward(
        self, x: Tensor, embedding: Tensor, context: Tensor | None, mask: Tensor | None, perturbed: bool = False
    ) -> Tensor:
        """`b c_in h w -> b c_out h w`."""
        x = self.residual(x, embedding)
        if self.attention is not None:
            return self.attention(x, perturbed)
        return x if self.transformer is None else self.transformer(x, context, mask, perturbed)


def _step(config: UNetConfig, width: int, embedding_width: int, direction: Literal["down", "up"]) -> nn.Module:
    """From one resolution to the next."""
    if config.residual_resampling:
        return ResidualBlock(
            width,
            width,
            embedding_width,
            scale_shift=config.scale_shift,
            dropout=config.dropout,
            resample=direction,
        )
    return Downsample(width) if direction == "down" else Upsample(width)


class DownLevel(nn.Module):
    """One resolution going down: its blocks, then the step to the next."""

    def __init__(self, blocks: list[UNetBlock], downsample: nn.Module | None) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(blocks)
        self.downsample = downsample


class UpLevel(nn.Module):
    """One resolution going up: its blocks (each takes a skip), then the step to the next."""

    def __init__(self, blocks: list[UNetBlock], upsample: nn.Module | None) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(blocks)
        self.upsample = upsample


class Middle(nn.Module):
    """Residual block, attention, residual block at the lowest resolution."""

    def __init__(self, config: UNetConfig, width: int, embedding_width: int) -> None:
        super().__init__()
        self.block_in = UNetBlock(config, width, width, embedding_width, config.middle_depth)
        self.block_out = UNetBlock(config, width, width, embedding_width, 0)


class Descent(NamedTuple):
    """The way down to the lowest resolution: what a U-Net begins with, and a ControlNet is."""

    time_embedding: EmbeddingMLP
    vector_embedding: EmbeddingMLP | None
    class_embedding: nn.Embedding | None
    conv_in: nn.Conv2d
    down: nn.ModuleList
    middle: Middle
    skips: tuple[int, ...]
    """Widths of what is handed over to the way up."""
    embedding_width: int


def descent(config: UNetConfig) -> Descent:
    """New modules of the way down."""
    width = config.channels
    embedding_width = config.embedding_width or 4 * width
    time_embedding = EmbeddingMLP(width, embedding_width)
    vector_embedding = EmbeddingMLP(config.vector_width, embedding_width) if config.vector_width else None
    class_embedding = nn.Embedding(config.classes, embedding_width) if config.classes else None
    conv_in = nn.Conv2d(config.channels_in, width, 3, padding=1)
    widths = [width * multiplier for multiplier in config.multipliers]
    last = len(widths) - 1

    current, skips, down = width, [width], []
    for level, (out, depth) in enumerate(zip(widths, config.depth)):
        cross_only = level < config.cross_only
        blocks = []
        for _ in range(config.blocks):
            blocks.append(UNetBlock(config, current, out, embedding_width, depth, cross_only=cross_only))
            current = out
            skips.append(out)
        if level < last:
            skips.append(out)
        down.append(DownLevel(blocks, _step(config, out, embedding_width, "down") if level < last else None))
    middle = Middle(config, current, embedding_width)
    embeddings = time_embedding, vector_embedding, class_embedding
    return Descent(*embeddings, conv_in, nn.ModuleList(down), middle, tuple(skips), embedding_width)


@runtime_checkable
class Descending(Protocol):
    """A network with the parts of a `Descent`."""

    config: UNetConfig
    checkpointing: bool
    time_embedding: EmbeddingMLP
    vector_embedding: EmbeddingMLP | None
    class_embedding: nn.Embedding | None
    conv_in: nn.Conv2d
    down: nn.ModuleList
    middle: Middle


def run(network: Descending, block: nn.Module, *inputs: Tensor | bool | None) -> Tensor:
    """The block's answer, its activations kept or not as the network says."""
    if network.checkpointing and torch.is_grad_enabled():
        return checkpoint(block, *inputs, use_reentrant=False)
    return block(*inputs)


def embed(
    network: Descending,
    timestep: Tensor,
    context: Tensor | None,
    vector: Tensor | None,
    beside: Float[Tensor, "b d"] | None = None,
) -> Float[Tensor, "b d"]:
    """What every residual block is told, through SiLU; InputError for slots that the network does not have.

    `timestep` is `b`, or `b d`, its sinusoids made before; `beside` joins what is made of it.
    """
    config = network.config
    for name, given, width in (
        ("context", context, config.context_width),
        ("vector", vector, 1 if config.classes else config.vector_width),
    ):
        got = None if given is None else given.shape[-1]
        if got != width:
            raise InputError(f"this U-Net has a {name} slot of width {width}; it was given one of width {got}")
    waves = timestep if timestep.ndim == 2 else sinusoids(timestep, config.channels)
    embedding: Tensor = network.time_embedding(waves)
    if network.vector_embedding is not None:
        embedding = embedding + network.vector_embedding(vector)
    if network.class_embedding is not None:
        assert vector is not None
        embedding = embedding + network.class_embedding(vector[:, 0].long())
    return F.silu(embedding if beside is None else embedding + beside)


def descend(
    network: Descending,
    h: Tensor,
    embedding: Tensor,
    context: Tensor | None,
    mask: Tensor | None,
    perturbed: bool = False,
) -> tuple[Tensor, list[Tensor]]:
    """From the first convolution's answer `h` to the lowest resolution: what comes out there, and the skips."""
    skips = [h]
    for down in cast(Iterable[DownLevel], network.down):
        for block in down.blocks:
            h = run(network, block, h, embedding, context, mask)
            skips.append(h)
        if down.downsample is not None:
            h = down.downsample(h, *((embedding,) if network.config.residual_resampling else ()))
            skips.append(h)
    h = run(network, network.middle.block_in, h, embedding, context, mask, perturbed)
    return run(network, network.middle.block_out, h, embedding, context, mask), skips


class UNet(nn.Module):
    """F(x, timestep, context, vector): the raw network of Rombach et al. 2022, section 3.3 and appendix E."""

    def __init__(self, config: UNetConfig) -> None:
        super().__init__()
        self.config = config
        self.checkpointing = False
        """Recompute each block in the backward pass instead of keeping its activations."""
        half = descent(config)
        self.time_embedding, self.vector_embedding, self.class_embedding = half[:3]
        self.conv_in, self.down, self.middle = half.conv_in, half.down, half.middle
        width, embedding_width, skips = config.channels, half.embedding_width, list(half.skips)
        widths = [width * multiplier for multiplier in config.multipliers]
        current = widths[-1]
        up = []
        for level in reversed(range(len(widths))):
            cross_only = level < config.cross_only
            out, depth = widths[level], config.depth[level]
            blocks = []
            for _ in range(config.blocks + 1):
                c_in = current + skips.pop()
                blocks.append(UNetBlock(config, c_in, out, embedding_width, depth, cross_only=cross_only))
                current = out
            up.append(UpLevel(blocks, _step(config, out, embedding_width, "up") if level > 0 else None))
        self.up = nn.ModuleList(up)
        self.norm_out = group_norm(width, 1e-5)
        self.conv_out = zeroed(nn.Conv2d(width, config.channels_out, 3, padding=1))

    def forward(
        self,
        x: Float[Tensor, "b c h w"],
        timestep: Float[Tensor, " b"] | Float[Tensor, "b waves"],
        context: Float[Tensor, "b n d"] | None = None,
        vector: Float[Tensor, "b v"] | None = None,
        mask: Tensor | None = None,
        perturbed: bool = False,
        residuals: Sequence[Tensor] | None = None,
    ) -> Float[Tensor, "b o h w"]:
        """`context` is `b n d` with boolean `mask` `b n`, `vector` is `b v`; each given iff the config has its slot.

        `perturbed` makes the middle's self-attention maps the identity (Ahn et al. 2024). `residuals` are added to
        every skip in their order, and the last to what leaves the middle (`nets/controlnet.py`).
        """
        embedding = embed(self, timestep, context, vector)
        h, skips = descend(self, self.conv_in(laid_out(x)), embedding, context, mask, perturbed)
        if residuals is not None:
            *added, last = residuals
            h, skips = h + last, [skip + each for skip, each in zip(skips, added, strict=True)]
        for up in cast(Iterable[UpLevel], self.up):
            for block in up.blocks:
                h = run(self, block, torch.cat([h, skips.pop()], dim=1), embedding, context, mask)
            if up.upsample is not None:
                size = skips[-1].shape[2], skips[-1].shape[3]
                h = up.upsample(h, embedding, size) if self.config.residual_resampling else up.upsample(h, size)
        return self.conv_out(normalised(self.norm_out, h))
