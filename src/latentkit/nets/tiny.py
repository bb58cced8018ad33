"""Tiny autoencoders that stand in for a large one (TAESD): 3x3 convolutions alone, no norm and no attention."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from latentkit.errors import InputError
from latentkit.nets.bottleneck import Posterior, certain
from latentkit.nets.layers import laid_out

BOUND = 3.0
"""Latents are squashed to within this before they are decoded."""
ELEMENTS = 1 << 26
"""Elements of the widest field of a strip, halo apart, where nothing is kept for a gradient."""


@dataclass(frozen=True)
class TinyConfig:
    """The shape of a tiny autoencoder; the released ones have 4 latent channels, or 16, and blocks (1, 3, 3, 3)."""

    __pydantic_config__ = {"extra": "forbid"}  # noqa: RUF012

    blocks: tuple[int, ...]
    """Of each level of the encoder, the finest first (the decoder mirrors them); each further level halves height and
    width."""
    latent_channels: int = 4
    channels: int = 64
    picture_channels: int = 3

    def __post_init__(self) -> None:
        if not self.blocks or min(*self.blocks, self.latent_channels, self.channels, self.picture_channels) < 1:
            raise InputError(f"tiny autoencoder is {self}; all of its numbers must be at least 1")

    @property
    def downsampling(self) -> int:
        """Pixels per latent cell, per side."""
        return int(2 ** (len(self.blocks) - 1))

    @property
    def has_posterior(self) -> bool:
        """Its latents are certain."""
        return False

    @property
    def codes(self) -> None:
        """It rounds latents to nothing."""
        return None

    @property
    def levels(self) -> None:
        """Nor to these."""
        return None

    @property
    def halo(self) -> int:
        """Latent cells beyond a strip that can have a say in it, on either way."""
        return -(-sum((3 * count + 2) << level for level, count in enumerate(self.blocks)) // self.downsampling)


def _conv(c_in: int, c_out: int, *, stride: int = 1, bias: bool = True) -> nn.Conv2d:
    return nn.Conv2d(c_in, c_out, 3, stride=stride, padding=1, bias=bias)


class TinyBlock(nn.Module):
    """Three convolutions with ReLU between them, added, and ReLU: `b c h w -> b c h w`."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv_in, self.conv_middle, self.conv_out = (_conv(channels, channels) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        """See the class."""
        h = F.relu(self.conv_middle(F.relu(self.conv_in(x))))
        return F.relu(self.conv_out(h) + x)


class TinyLevel(nn.Module):
    """One resolution: the step down to it, if any, its blocks, and the step up from it, if any."""

    def __init__(self, channels: int, blocks: int, *, down: bool = False, up: bool = False) -> None:
        super().__init__()
        self.downsample = _conv(channels, channels, stride=2, bias=False) if down else None
        self.blocks = nn.ModuleList(TinyBlock(channels) for _ in range(blocks))
        self.upsample = _conv(channels, channels, bias=False) if up else None
        self.checkpointing = False  # keep the blocks' inputs only, and compute the rest again on the way back

    def forward(self, x: Tensor) -> Tensor:
        """`b c h w -> b c h' w'`."""
        if self.downsample is not None:
            x = self.downsample(x)
        for block in self.blocks:
            saving = self.checkpointing and torch.is_grad_enabled()
            x = checkpoint(block, x, use_reentrant=False) if saving else block(x)
        return x if self.upsample is None else self.upsample(F.interpolate(x, scale_factor=2.0, mode="nearest"))


class TinyEncoder(nn.Module):
    """Pixels in [-1, 1] to latents: `b c h w -> b z h/f w/f`."""

    def __init__(self, config: TinyConfig) -> None:
        super().__init__()
        width = config.channels
        self.conv_in = _conv(config.picture_channels, width)
        self.levels = nn.ModuleList(TinyLevel(width, count, down=i > 0) for i, count in enumerate(config.blocks))
        self.conv_out = _conv(width, config.latent_channels)

    def forward(self, pixels: Tensor) -> Tensor:
        """See the class; the network itself sees pixels in [0, 1]."""
        h = self.conv_in(laid_out((pixels + 1) / 2))
        for level in self.levels:
            h = level(h)
        return self.conv_out(h)


class TinyDecoder(nn.Module):
    """Latents to pixels, about [-1, 1], not clamped: `b z h w -> b c fh fw`."""

    def __init__(self, config: TinyConfig) -> None:
        super().__init__()
        width, last = config.channels, len(config.blocks) - 1
        self.conv_in = _conv(config.latent_channels, width)
        counts = enumerate(reversed(config.blocks))
        self.levels = nn.ModuleList(TinyLevel(width, count, up=i < last) for i, count in counts)
        self.conv_out = _conv(width, config.picture_channels)

    def forward(self, z: Tensor) -> Tensor:
        """See the class."""
        h = F.relu(self.conv_in(laid_out(BOUND * torch.tanh(z / BOUND))))
        for level in self.levels:
            h = level(h)
        return self.conv_out(h) * 2 - 1


class TinyAutoencoder(nn.Module):
    """Encoder and decoder, nothing between them (Bohan 2023, github.com/madebyollin/taesd).

    It offers what `Autoencoder` does, to go wherever that goes. Large pictures pass it in strips of rows whose halo
    holds all that has a say, so that the values are the same.
    """

    codebook = levels = None

    def __init__(self, config: TinyConfig) -> None:
        super().__init__()
        self.config = config
        self.encoder = TinyEncoder(config)
        self.to_moments = nn.Identity()
        self.decoder = TinyDecoder(config)

    def encode(self, pixels: Float[Tensor, "b c h w"]) -> Posterior:
        """Pixels in [-1, 1] to latents without noise; height and width multiples of the downsampling."""
        factor, channels = self.config.downsampling, self.config.picture_channels
        if pixels.shape[1] != channels or pixels.shape[2] % factor or pixels.shape[3] % factor:
            raise InputError(
                f"the autoencoder got pictures of {pixels.shape[1]} channels, {pixels.shape[3]}x{pixels.shape[2]} px; "
                f"it takes {channels} channels and sides that are multiples of {factor}"
            )
        return certain(self._in_strips(self.encoder, pixels, factor, 1))

    def decode(self, z: Float[Tensor, "b z h w"]) -> Float[Tensor, "b c hp wp"]:
        """Latents to pixels, about [-1, 1], not clamped."""
        return self._in_strips(self.decoder, z, 1, self.config.downsampling)

    def decode_rounded(self, z: Float[Tensor, "b z h w"]) -> Float[Tensor, "b c hp wp"]:
        """As `decode`: there is no rounding."""
        return self.decode(z)

    def set_checkpointing(self, on: bool) -> None:
        """Trade time for memory in training: `TinyLevel.checkpointing` of every level."""
        for level in (*self.encoder.levels, *self.decoder.levels):
            level.checkpointing = on

    def _in_strips(self, part: Callable[[Tensor], Tensor], x: Tensor, cell: int, grown: int) -> Tensor:
        """`part(x)`, of which a latent cell has `cell` rows in `x` and `grown` in the answer."""
        cells, row = x.shape[2] // cell, self.config.downsampling**2 * self.config.channels * x.shape[0] * x.shape[3]
        count = max(1, ELEMENTS * cell // row)
        if count >= cells or torch.is_grad_enabled():
            return part(x)
        answers = []
        for start in range(0, cells, count):
            stop = min(start + count, cells)
            low, high = max(0, start - self.config.halo), min(cells, stop + self.config.halo)
            whole = part(x[:, :, low * cell : high * cell])
            answers.append(whole[:, :, (start - low) * grown : (stop - low) * grown])
        return torch.cat(answers, 2)
