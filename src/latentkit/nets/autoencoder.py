"""The bare autoencoder of the first stage: pixels to raw latents and back."""

import itertools
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from latentkit.errors import InputError
from latentkit.nets.attention import PixelAttention
from latentkit.nets.bottleneck import Codebook, Levels, Posterior, certain, exact, posterior
from latentkit.nets.layers import Downsample, ResidualBlock, Upsample, group_norm, laid_out, normalised


@dataclass(frozen=True)
class AutoencoderConfig:
    """The shape of an autoencoder; Stable Diffusion's is the default with `stem` 1."""

    __pydantic_config__ = {"extra": "forbid"}  # noqa: RUF012

    picture_channels: int = 3
    latent_channels: int = 4
    channels: int = 128
    """Width of the first level."""
    multipliers: tuple[int, ...] = (1, 2, 4, 4)
    """Width of each level as a multiple of `channels`; each level but the last halves height and width."""
    blocks: int = 2
    """Residual blocks per level of the encoder (the decoder has one more)."""
    stem: int = 1
    """Pixels per side that are folded into channels before the first convolution (pixel unshuffle)."""
    attention: bool = True
    """One attention over pixels in the middle."""
    attention_levels: int = 0
    """Last levels that have an attention over pixels after each residual block, too."""
    codes: int | None = None
    """Entries of the codebook that latents are rounded to before they are decoded."""
    levels: tuple[int, ...] | None = None
    """Values that each latent channel is rounded to before it is decoded (finite scalar quantisation)."""
    variance: bool = True
    """The encoder ends in mean and log-variance (the KL bottleneck), where there are no codes and no levels; false: in
    the latents alone (the identity)."""

    def __post_init__(self) -> None:
        for name in ("picture_channels", "latent_channels", "channels", "blocks"):
            if getattr(self, name) < 1:
                raise InputError(f"autoencoder {name} is {getattr(self, name)}; it must be at least 1")
        if not self.multipliers or min(self.multipliers) < 1:
            raise InputError(f"autoencoder multipliers are {self.multipliers}; give one of at least 1 per level")
        if self.stem not in (1, 2, 4, 8, 16, 32):
            raise InputError(f"autoencoder stem is {self.stem}; allowed are 1, 2, 4, 8, 16 and 32")
        if not 0 <= self.attention_levels <= len(self.multipliers):
            raise InputError(
                f"autoencoder attention_levels is {self.attention_levels}; it has {len(self.multipliers)} levels"
            )
        if self.codes is not None and self.codes < 1:
            raise InputError(f"autoencoder codes is {self.codes}; give at least 1, or none for the KL bottleneck")
        if self.levels is not None and (len(self.levels) != self.latent_channels or min(self.levels) < 2):
            raise InputError(
                f"autoencoder levels are {self.levels}; give one number of at least 2 for each of the "
                f"{self.latent_channels} latent channels"
            )
        if self.codes and self.levels:
            raise InputError("an autoencoder rounds its latents to codes or to levels; leave out one of them")

    @property
    def downsampling(self) -> int:
        """Pixels per latent cell, per side."""
        return int(self.stem * 2 ** (len(self.multipliers) - 1))

    @property
    def encoded_channels(self) -> int:
        """Channels that the encoder ends in: mean and log-variance, or the latents alone."""
        return 2 * self.latent_channels if self.has_posterior else self.latent_channels

    @property
    def has_posterior(self) -> bool:
        """Whether latents are drawn from a posterior (the KL bottleneck)."""
        return self.variance and not self.codes and not self.levels


def _block(c_in: int, c_out: int) -> ResidualBlock:
    return ResidualBlock(c_in, c_out, eps=1e-6)


class Level(nn.Module):
    """One resolution: its residual blocks and the step to the next (down in the encoder, up in the decoder)."""

    def __init__(self, widths: list[int], attention: bool, resample: nn.Module | None) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(_block(c_in, c_out) for c_in, c_out in itertools.pairwise(widths))
        self.attentions = nn.ModuleList(PixelAttention(width) for width in widths[1:] if attention)
        self.resample = resample
        self.checkpointing = False  # keep the blocks' inputs only, and compute the rest again on the way back

    def forward(self, x: Tensor) -> Tensor:
        """`b c_in h w -> b c_out h' w'`."""
        for index, block in enumerate(self.blocks):
            saving = self.checkpointing and torch.is_grad_enabled()
            x = checkpoint(block, x, use_reentrant=False) if saving else block(x)
            if self.attentions:
                x = self.attentions[index](x)
        return x if self.resample is None else self.resample(x)


class Middle(nn.Module):
    """Residual block, attention over pixels, residual block."""

    def __init__(self, channels: int, attention: bool) -> None:
        super().__init__()
        self.block_in = _block(channels, channels)
        self.attention = PixelAttention(channels) if attention else None
        self.block_out = _block(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        """`b c h w -> b c h w`."""
        x = self.block_in(x)
        return self.block_out(x if self.attention is None else self.attention(x))


class Encoder(nn.Module):
    """Pixels to what the last 1x1 convolution takes: `b c h w -> b 2z h/f w/f` (a codebook's: `b z h/f w/f`)."""

    def __init__(self, config: AutoencoderConfig) -> None:
        super().__init__()
        self.stem = config.stem
        width = config.channels
        self.conv_in = nn.Conv2d(config.picture_channels * config.stem**2, width, 3, padding=1)
        widths = [width * multiplier for multiplier in config.multipliers]
        levels, current = [], width
        last = len(widths) - 1
        for index, out in enumerate(widths):
            attention = index > last - config.attention_levels
            step = Downsample(out, asymmetric=True) if index < last else None
            levels.append(Level([current] + [out] * config.blocks, attention, step))
            current = out
        self.levels = nn.ModuleList(levels)
        self.middle = Middle(current, config.attention)
        self.norm_out = group_norm(current, 1e-6)
        self.conv_out = nn.Conv2d(current, config.encoded_channels, 3, padding=1)

    def forward(self, pixels: Tensor) -> Tensor:
        """See the class."""
        h = self.conv_in(laid_out(F.pixel_unshuffle(pixels, self.stem) if self.stem > 1 else pixels))
        for level in self.levels:
            h = level(h)
        return self.conv_out(normalised(self.norm_out, self.middle(h)))


class Decoder(nn.Module):
    """Raw latents after the first 1x1 convolution to pixels: `b z h w -> b c fh fw`."""

    def __init__(self, config: AutoencoderConfig) -> None:
        super().__init__()
        self.stem = config.stem
        widths = [config.channels * multiplier for multiplier in reversed(config.multipliers)]
        current = widths[0]
        self.conv_in = nn.Conv2d(config.latent_channels, current, 3, padding=1)
        self.middle = Middle(current, config.attention)
        levels = []
        for index, out in enumerate(widths):
            step = Upsample(out) if index < len(widths) - 1 else None
            levels.append(Level([current] + [out] * (config.blocks + 1), index < config.attention_levels, step))
            current = out
        self.levels = nn.ModuleList(levels)
        self.norm_out = group_norm(current, 1e-6)
        self.conv_out = nn.Conv2d(current, config.picture_channels * config.stem**2, 3, padding=1)

    def forward(self, z: Tensor) -> Tensor:
        """See the class."""
        h = self.middle(self.conv_in(laid_out(z)))
        for level in self.levels:
            h = level(h)
        h = self.conv_out(normalised(self.norm_out, h))
        return F.pixel_shuffle(h, self.stem) if self.stem > 1 else h


class Autoencoder(nn.Module):
    """Encoder, bottleneck, decoder (Rombach et al. 2022, section 3.1 and appendix G).

    With codes or levels the latents are what comes before rounding, and `decode` rounds (section 3.1, VQ-reg).
    """

    def __init__(self, config: AutoencoderConfig) -> None:
        super().__init__()
        self.config = config
        z = config.latent_channels
        self.encoder = Encoder(config)
        self.to_moments = nn.Conv2d(config.encoded_channels, config.encoded_channels, 1)
        self.codebook = Codebook(config.codes, z) if config.codes else None
        self.levels = Levels(config.levels) if config.levels else None
        self.from_latent = nn.Conv2d(z, z, 1)
        self.decoder = Decoder(config)

    def encode(self, pixels: Float[Tensor, "b c h w"]) -> Posterior:
        """Pixels in [-1, 1] to the posterior over raw latents; height and width multiples of the downsampling.

        Latents are certain where the encoder ends in them alone, and within [-1, 1] before levels.
        """
        factor, channels = self.config.downsampling, self.config.picture_channels
        if pixels.shape[1] != channels or pixels.shape[2] % factor or pixels.shape[3] % factor:
            raise InputError(
                f"the autoencoder got pictures of {pixels.shape[1]} channels, {pixels.shape[3]}x{pixels.shape[2]} px; "
                f"it takes {channels} channels and sides that are multiples of {factor}"
            )
        moments = self.to_moments(self.encoder(pixels))
        if self.config.has_posterior:
            return posterior(moments)
        return certain(moments if self.levels is None else self.levels.bound(exact(moments)))

    def decode(self, z: Float[Tensor, "b z h w"]) -> Float[Tensor, "b c hp wp"]:
        """Raw latents to pixels, about [-1, 1], not clamped."""
        rounding = self.codebook or self.levels
        return self.decode_rounded(z if rounding is None else rounding(z))

    def decode_rounded(self, z: Float[Tensor, "b z h w"]) -> Float[Tensor, "b c hp wp"]:
        """As `decode`, of latents that were rounded already."""
        return self.decoder(self.from_latent(z))

    def set_checkpointing(self, on: bool) -> None:
        """Trade time for memory in training: `Level.checkpointing` of every level."""
        for level in (*self.encoder.levels, *self.decoder.levels):
            level.checkpointing = on
