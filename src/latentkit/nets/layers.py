"""The blocks that both networks are made of: norms, residual blocks, resampling, time embedding."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def group_norm(channels: int, eps: float) -> nn.GroupNorm:
    """GroupNorm of 32 groups, or of the largest power of two that divides `channels`."""
    return nn.GroupNorm(math.gcd(32, channels), channels, eps=eps)


def zeroed(module: nn.Module) -> nn.Module:
    """`module` with its parameters at zero: a residual branch that starts as nothing."""
    for parameter in module.parameters():
        nn.init.zeros_(parameter)
    return module


class ResidualBlock(nn.Module):
    """norm, SiLU, conv, twice, with the embedding added (or as scale and shift) between: `b c_in h w -> b c_out h w`.

    `embedding_width` None makes it the autoencoder's block (no embedding). Source: Dhariwal & Nichol 2021, B.
    """

    def __init__(
        self,
        c_in: int,
        c_out: int,
        embedding_width: int | None = None,
        *,
        scale_shift: bool = False,
        dropout: float = 0.0,
        eps: float = 1e-5,
    ) -> None:
        super().__init__()
        self.scale_shift = scale_shift
        self.norm_in = group_norm(c_in, eps)
        self.conv_in = nn.Conv2d(c_in, c_out, 3, padding=1)
        if embedding_width is not None:
            self.embedding = nn.Linear(embedding_width, c_out * (2 if scale_shift else 1))
        self.norm_out = group_norm(c_out, eps)
        self.dropout = nn.Dropout(dropout)
        self.conv_out = zeroed(nn.Conv2d(c_out, c_out, 3, padding=1))
        self.skip: nn.Module = nn.Identity() if c_in == c_out else nn.Conv2d(c_in, c_out, 1)

    def forward(self, x: Tensor, embedding: Tensor | None = None) -> Tensor:
        """`embedding` is `b d`, already through SiLU."""
        h = self.conv_in(F.silu(self.norm_in(x)))
        if embedding is None:
            h = self.norm_out(h)
        elif self.scale_shift:
            scale, shift = self.embedding(embedding)[:, :, None, None].chunk(2, dim=1)
            h = torch.addcmul(shift, self.norm_out(h), 1 + scale)
        else:
            h = self.norm_out(h + self.embedding(embedding)[:, :, None, None])
        return torch.add(self.skip(x), self.conv_out(self.dropout(F.silu(h))))


class Downsample(nn.Module):
    """Halve height and width by a strided 3x3 convolution.

    `asymmetric` pads right and below only, as the released autoencoders do; the U-Net pads all sides.
    """

    def __init__(self, channels: int, *, asymmetric: bool = False) -> None:
        super().__init__()
        self.asymmetric = asymmetric
        self.conv = nn.Conv2d(channels, channels, 3, stride=2, padding=0 if asymmetric else 1)

    def forward(self, x: Tensor) -> Tensor:
        """`b c h w -> b c h/2 w/2`."""
        return self.conv(F.pad(x, (0, 1, 0, 1)) if self.asymmetric else x)


class Upsample(nn.Module):
    """Double height and width: nearest neighbour, then a 3x3 convolution."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor, size: tuple[int, int] | None = None) -> Tensor:
        """`b c h w -> b c 2h 2w`, or to `size` where the level below it was odd."""
        h, w = size or (2 * x.shape[2], 2 * x.shape[3])
        return self.conv(F.interpolate(x, (h, w), mode="nearest"))


def sinusoids(timestep: Tensor, width: int) -> Tensor:
    """`b -> b width`: cosines then sines, periods 2 pi to 2 pi 1e4, float32 (CompVis's order)."""
    half = width // 2
    # In the released code's order of operations: one ulp here is 3e-5 in the wave at timestep 999.
    rates = torch.exp(-math.log(1e4) * torch.arange(half, dtype=torch.float32, device=timestep.device) / half)
    angles = timestep.float()[:, None] * rates
    wave = torch.cat([angles.cos(), angles.sin()], dim=1)
    return F.pad(wave, (0, width - 2 * half))


class EmbeddingMLP(nn.Module):
    """Linear, SiLU, linear: `b d_in -> b d`, used for the timestep and for the vector slot."""

    def __init__(self, d_in: int, width: int) -> None:
        super().__init__()
        self.linear_in = nn.Linear(d_in, width)
        self.linear_out = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        """Computed in the layers' type."""
        return self.linear_out(F.silu(self.linear_in(x.to(self.linear_in.weight.dtype))))
