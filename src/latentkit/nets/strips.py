"""The autoencoder on pictures of any size: in strips of rows, with the values of the whole up to float error.

A norm needs all of its input before it can give anything, so the picture passes one segment between two norms at a
time: each segment reads strips of the one before it, writes its own, and sums up what the next norm needs. What lies
between segments is kept in host memory or in files; on the device are only strips and their halos. Attention is exact
too: the softmax runs over the keys strip by strip (Milakov & Gimelshein 2018).
"""

import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from latentkit.nets.attention import PixelAttention
from latentkit.nets.autoencoder import Autoencoder, Level, Middle
from latentkit.nets.bottleneck import Posterior, certain, exact, posterior
from latentkit.nets.layers import Downsample, ResidualBlock, Upsample

ELEMENTS = 1 << 22
"""Elements of a strip, halo apart."""


class Field:
    """A `b c h w` in host memory or a file, read and written by rows, and the sums over pixels that norms need."""

    def __init__(self, shape: tuple[int, int, int, int], dtype: torch.dtype, device: torch.device, spill: str | None):
        b, c, h, w = shape
        self.shape, self.device = shape, device
        if spill is None:
            self.data = torch.empty(b, h, w, c, dtype=dtype)
        else:
            with tempfile.NamedTemporaryFile(dir=spill, delete=False) as file:
                path = Path(file.name)
            self.data = torch.from_file(str(path), shared=True, size=b * c * h * w, dtype=dtype).view(b, h, w, c)
            path.unlink()  # the memory keeps the file as long as it is needed
        self.sums = torch.zeros(2, b, c, dtype=torch.float64)

    def rows(self, start: int, stop: int) -> Tensor:
        """Rows on the device, channels last."""
        return self.data[:, start:stop].to(self.device).permute(0, 3, 1, 2)

    def write(self, start: int, strip: Tensor) -> None:
        """Put rows in, and add them to the sums."""
        self.data[:, start : start + strip.shape[2]] = strip.permute(0, 2, 3, 1)
        values = strip.double() if strip.dtype == torch.float64 else strip.float()
        self.sums[0] += values.sum((2, 3)).double().cpu()
        self.sums[1] += values.square().sum((2, 3)).double().cpu()

    def normalised(self, norm: nn.GroupNorm, start: int, stop: int, *, silu: bool = True) -> Tensor:
        """Rows after `norm`, with the statistics of the whole picture, and SiLU."""
        b, c, h, w = self.shape
        mean, square = (self.sums / (h * w)).unflatten(2, (norm.num_groups, -1)).mean(3, keepdim=True)
        rate = (square - mean * mean).clamp_min(0).add(norm.eps).rsqrt()
        shape = (b, norm.num_groups, c // norm.num_groups)
        mean, rate = (value.expand(shape).flatten(1).to(self.device) for value in (mean, rate))
        scale = rate * norm.weight.double()
        shift = norm.bias.double() - mean * scale
        rows = self.rows(start, stop)
        exactly = torch.float64 if rows.dtype == torch.float64 else torch.float32
        scale, shift = (value.to(exactly)[:, :, None, None] for value in (scale, shift))
        rows_ = torch.addcmul(shift, rows.to(exactly), scale)
        return (F.silu(rows_, inplace=True) if silu else rows_).to(rows.dtype)


class Strips:
    """Encodes and decodes with the weights of `network` in strips; see the module.

    `spill` is a folder for what lies between segments; None keeps it in host memory.
    """

    def __init__(self, network: Autoencoder, spill: str | Path | None = None) -> None:
        self.network = network
        self.spill = None if spill is None else str(spill)
        weight = network.from_latent.weight
        self.dtype, self.device = weight.dtype, weight.device

    @torch.no_grad()
    def encode(self, pixels: Tensor) -> Posterior:
        """As `Autoencoder.encode`; `pixels` and the latents lie in host memory."""
        encoder, stem = self.network.encoder, self.network.encoder.stem
        b, _, h, w = pixels.shape
        shape = b, encoder.conv_in.out_channels, h // stem, w // stem

        def unshuffled(start: int, stop: int) -> Tensor:
            rows = pixels[:, :, start * stem : stop * stem].to(self.device, self.dtype)
            return F.pixel_unshuffle(rows, stem) if stem > 1 else rows

        x = self._made(shape, lambda a, z: _convolved(encoder.conv_in, unshuffled, a, z, shape[2]))
        for level in encoder.levels:
            x = self._level(level, x)  # type: ignore[arg-type]
        x = self._middle(encoder.middle, x)
        whole = self._last(encoder.norm_out, encoder.conv_out, x, self.network.to_moments)
        if self.network.config.has_posterior:
            return posterior(whole)
        return certain(whole if self.network.levels is None else self.network.levels.bound(exact(whole)))

    @torch.no_grad()
    def decode(self, z: Tensor) -> Tensor:
        """As `Autoencoder.decode`; `z` and the pixels lie in host memory."""
        network, decoder = self.network, self.network.decoder
        rounding = network.codebook or network.levels
        b, _, h, w = z.shape

        def latents(start: int, stop: int) -> Tensor:
            rows = z[:, :, start:stop].to(self.device, self.dtype)
            return network.from_latent(rows if rounding is None else rounding(rows))

        x = self._made(
            (b, decoder.conv_in.out_channels, h, w), lambda a, z: _convolved(decoder.conv_in, latents, a, z, h)
        )
        x = self._middle(decoder.middle, x)
        for level in decoder.levels:
            x = self._level(level, x)  # type: ignore[arg-type]
        shuffle = nn.PixelShuffle(decoder.stem) if decoder.stem > 1 else nn.Identity()
        return self._last(decoder.norm_out, decoder.conv_out, x, shuffle, decoder.stem)

    def _made(self, shape: tuple[int, int, int, int], make: Callable[[int, int], Tensor]) -> Field:
        """A field of what `make(start, stop)` gives for each strip of rows."""
        field = Field(shape, self.dtype, self.device, self.spill)
        for start, stop in _strips(shape):
            field.write(start, make(start, stop))
        return field

    def _last(self, norm: nn.GroupNorm, conv: nn.Conv2d, x: Field, then: nn.Module, grown: int = 1) -> Tensor:
        """The last norm and convolution, and `then`, in host memory: `b c h w`, `grown` times as many rows."""
        b, _, h, _ = x.shape
        whole = None
        for start, stop in _strips(x.shape):
            strip = then(_convolved(conv, lambda i, j: x.normalised(norm, i, j), start, stop, h))
            if whole is None:
                whole = torch.empty(b, strip.shape[1], h * grown, strip.shape[3], dtype=strip.dtype)
            whole[:, :, start * grown : stop * grown] = strip
        assert whole is not None
        return whole

    def _level(self, level: Level, x: Field) -> Field:
        for index, block in enumerate(level.blocks):
            x = self._residual(block, x)  # type: ignore[arg-type]
            if level.attentions:
                x = self._attention(level.attentions[index], x)  # type: ignore[arg-type]
        return x if level.resample is None else self._resampled(level.resample, x)

    def _middle(self, middle: Middle, x: Field) -> Field:
        x = self._residual(middle.block_in, x)
        return self._residual(middle.block_out, x if middle.attention is None else self._attention(middle.attention, x))

    def _residual(self, block: ResidualBlock, x: Field) -> Field:
        b, _, h, w = x.shape
        shape = b, block.conv_in.out_channels, h, w
        inner = self._made(
            shape, lambda a, z: _convolved(block.conv_in, lambda i, j: x.normalised(block.norm_in, i, j), a, z, h)
        )
        return self._made(
            shape,
            lambda a, z: torch.add(
                block.skip(x.rows(a, z)),
                _convolved(block.conv_out, lambda i, j: inner.normalised(block.norm_out, i, j), a, z, h),
            ),
        )

    def _resampled(self, resample: nn.Module, x: Field) -> Field:
        b, c, h, w = x.shape
        if isinstance(resample, Downsample):  # output rows a to z take input rows 2 a to 2 z, and one more
            return self._made((b, c, h // 2, w // 2), lambda a, z: resample(x.rows(2 * a, min(2 * z + 1, h))))
        assert isinstance(resample, Upsample)

        def doubled(start: int, stop: int) -> Tensor:
            low, high = max(start // 2 - 1, 0), min(-(-stop // 2) + 1, h)
            return resample(x.rows(low, high))[:, :, start - 2 * low : stop - 2 * low]

        return self._made((b, c, 2 * h, 2 * w), doubled)

    def _attention(self, module: PixelAttention, x: Field) -> Field:
        """Queries a strip at a time, and for each the keys a strip at a time."""
        attention, scale = module.attention, x.shape[1] ** -0.5
        wide = torch.float64 if self.dtype == torch.float64 else torch.float32

        def tokens(field: Field, start: int, stop: int) -> Tensor:
            return field.rows(start, stop).flatten(2).transpose(1, 2)

        normed = self._made(x.shape, lambda a, z: x.normalised(module.norm, a, z, silu=False))
        keys, values = (
            self._made(x.shape, lambda a, z, part=part: _picture(part(tokens(normed, a, z)), z - a))  # type: ignore[misc]
            for part in (attention.k, attention.v)
        )

        def attended(start: int, stop: int) -> Tensor:
            q = attention.q(tokens(normed, start, stop)) * scale
            top = torch.full((*q.shape[:2], 1), float("-inf"), dtype=wide, device=self.device)
            total, answer = torch.zeros_like(top), torch.zeros(q.shape, dtype=wide, device=self.device)
            for first, last in _strips(x.shape):
                scores = (q @ tokens(keys, first, last).transpose(1, 2)).to(wide)
                highest = torch.maximum(top, scores.amax(2, keepdim=True))
                weights, kept = (scores - highest).exp_(), (top - highest).exp_()
                total = total * kept + weights.sum(2, keepdim=True)
                answer = answer * kept + (weights.to(self.dtype) @ tokens(values, first, last)).to(wide)
                top = highest
            return x.rows(start, stop) + _picture(attention.out((answer / total).to(self.dtype)), stop - start)

        return self._made(x.shape, attended)


def _strips(shape: tuple[int, int, int, int]) -> Iterator[tuple[int, int]]:
    """(start, stop) of strips of an even number of rows."""
    b, c, h, w = shape
    size = max(2, ELEMENTS // (b * c * w) // 2 * 2)
    yield from ((start, min(start + size, h)) for start in range(0, h, size))


def _convolved(conv: nn.Module, rows: Callable[[int, int], Tensor], start: int, stop: int, height: int) -> Tensor:
    """Rows of a 3x3 convolution of `rows(start, stop)`, which has `height` of them."""
    low, high = max(start - 1, 0), min(stop + 1, height)
    return conv(rows(low, high))[:, :, start - low : stop - low]


def _picture(tokens: Tensor, height: int) -> Tensor:
    return tokens.transpose(1, 2).unflatten(2, (height, -1))
