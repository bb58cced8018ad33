"""The autoencoder on pictures of any size: in strips of rows, with the values of the whole up to float error.

A norm needs all of its input before it can give anything, so the picture passes one segment between two norms at a
time: each segment reads strips of the one before it, writes its own, and sums up what the next norm needs. What lies
between segments is kept in host memory or in files; on the device are only strips and their halos. Attention is exact
too: the softmax runs over the keys strip by strip (Milakov & Gimelshein 2018).
"""

import math
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from latentkit.nets.attention import PixelAttention
from latentkit.nets.autoencoder import Autoencoder, Level, Middle
from latentkit.nets.bottleneck import Posterior, certain, exact, posterior
from latentkit.nets.layers import Downsample, ResidualBlock, Upsample, bf16_on_cpu

ELEMENTS = 1 << 22
"""Elements of a strip, halo apart."""
CACHED = 1 << 18
"""Elements that a CPU works on at a time in wide floats, so that they stay in its cache."""


class Field:
    """A `1 c h w` in host memory or a file, read and written by rows, and the sums over pixels that norms need."""

    def __init__(self, shape: tuple[int, int, int, int], dtype: torch.dtype, device: torch.device, spill: str | None):
        _, c, h, w = shape
        self.shape: tuple[int, int, int, int] = shape
        self.device = device
        if spill is None:
            self.data = torch.empty(1, h, w, c, dtype=dtype)
        else:
            with tempfile.NamedTemporaryFile(dir=spill, delete=False) as file:
                path = Path(file.name)
            self.data = torch.from_file(str(path), shared=True, size=c * h * w, dtype=dtype).view(1, h, w, c)
            path.unlink()  # the memory keeps the file as long as it is needed
        self.sums = _sums(c)

    def rows(self, start: int, stop: int) -> Tensor:
        """Rows on the device, channels last."""
        return self.data[:, start:stop].to(self.device).permute(0, 3, 1, 2)

    def write(self, start: int, strip: Tensor) -> None:
        """Put rows in, and add them to the sums."""
        self.data[:, start : start + strip.shape[2]] = strip.permute(0, 2, 3, 1)
        _add(self.sums, strip)


class Doubled:
    """An upsampled source whose rows are computed whenever they are read: it is nowhere whole."""

    shape: tuple[int, int, int, int]

    def __init__(self, x: "Field | Doubled", upsample: Upsample) -> None:
        _, c, h, w = x.shape
        self.x, self.upsample = x, upsample
        self.merged = upsample.merged() if bf16_on_cpu(upsample.conv.weight) else None
        self.shape = (1, c, 2 * h, 2 * w)
        self.sums = _sums(c)

    def rows(self, start: int, stop: int) -> Tensor:
        """Rows on the device, channels last."""
        low, high = max(start // 2 - 1, 0), min(-(-stop // 2) + 1, self.x.shape[2])
        rows = self.x.rows(low, high)
        rows = self.upsample(rows) if self.merged is None else self.upsample.doubled(rows, self.merged)
        return rows[:, :, start - 2 * low : stop - 2 * low]


Source = Field | Doubled


class Normalised:
    """Rows of `x` after `norm`, with the statistics of the whole picture, and SiLU."""

    def __init__(self, norm: nn.GroupNorm, x: Source, *, silu: bool = True) -> None:
        _, c, h, w = x.shape
        mean, square = (x.sums / (h * w)).unflatten(1, (norm.num_groups, -1)).mean(2, keepdim=True)
        rate = (square - mean * mean).clamp_min(0).add(norm.eps).rsqrt()
        mean, rate = (value.expand(norm.num_groups, c // norm.num_groups).flatten() for value in (mean, rate))
        scale = rate * norm.weight.double().cpu()
        shift = norm.bias.double().cpu() - mean * scale
        self.silu = silu
        self.tables = shift, scale

    def __call__(self, rows: Tensor) -> Tensor:
        """`1 c h w -> 1 c h w`, channels last."""
        shift, scale = (table.to(rows.device, _wide(rows)) for table in self.tables)
        result = torch.empty_like(rows, memory_format=torch.channels_last)
        for part, written in zip(_pieces(rows), _pieces(result)):
            pixels = torch.addcmul(shift, part.to(_wide(part)), scale)
            written.copy_(F.silu(pixels, inplace=True) if self.silu else pixels)
        return result


class Strips:
    """Encodes and decodes with the weights of `network` in strips, one picture after another; see the module.

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
        whole = torch.cat([self._encoded(picture) for picture in pixels.split(1)])
        if self.network.config.has_posterior:
            return posterior(whole)
        return certain(whole if self.network.levels is None else self.network.levels.bound(exact(whole)))

    def _encoded(self, pixels: Tensor) -> Tensor:
        encoder, stem = self.network.encoder, self.network.encoder.stem
        _, _, h, w = pixels.shape
        shape = 1, encoder.conv_in.out_channels, h // stem, w // stem

        def unshuffled(start: int, stop: int) -> Tensor:
            rows = pixels[:, :, start * stem : stop * stem].to(self.device, self.dtype)
            return F.pixel_unshuffle(rows, stem) if stem > 1 else rows

        x: Source = self._made(shape, lambda a, z: _convolved(encoder.conv_in, unshuffled, a, z, shape[2]))
        for level in encoder.levels:
            x = self._level(level, x)  # type: ignore[arg-type]
        x = self._middle(encoder.middle, x)
        return self._last(encoder.norm_out, encoder.conv_out, x, self.network.to_moments)

    @torch.no_grad()
    def decode(self, z: Tensor) -> Tensor:
        """As `Autoencoder.decode`; `z` and the pixels lie in host memory."""
        return torch.cat([self._decoded(picture) for picture in z.split(1)])

    def _decoded(self, z: Tensor) -> Tensor:
        network, decoder = self.network, self.network.decoder
        rounding = network.codebook or network.levels
        _, _, h, w = z.shape

        def latents(start: int, stop: int) -> Tensor:
            rows = z[:, :, start:stop].to(self.device, self.dtype)
            return network.from_latent(rows if rounding is None else rounding(rows))

        x: Source = self._made(
            (1, decoder.conv_in.out_channels, h, w), lambda a, z: _convolved(decoder.conv_in, latents, a, z, h)
        )
        x = self._middle(decoder.middle, x)
        for level in decoder.levels:
            x = self._level(level, x, last=level is decoder.levels[-2:][0])  # type: ignore[arg-type]
        shuffle = nn.PixelShuffle(decoder.stem) if decoder.stem > 1 else nn.Identity()
        return self._last(decoder.norm_out, decoder.conv_out, x, shuffle, decoder.stem)

    def _field(self, shape: tuple[int, int, int, int]) -> Field:
        return Field(shape, self.dtype, self.device, self.spill)

    def _made(self, shape: tuple[int, int, int, int], make: Callable[[int, int], Tensor]) -> Field:
        """A field of what `make(start, stop)` gives for each strip of rows."""
        field = self._field(shape)
        for start, stop in _strips(shape):
            field.write(start, make(start, stop))
        return field

    def _last(self, norm: nn.GroupNorm, conv: nn.Conv2d, x: Source, then: nn.Module, grown: int = 1) -> Tensor:
        """The last norm and convolution, and `then`, in host memory: `1 c h w`, `grown` times as many rows."""
        _, _, h, _ = x.shape
        normalised, whole = Normalised(norm, x), None
        for start, stop in _strips(x.shape):
            strip = then(_convolved(conv, lambda i, j: normalised(x.rows(i, j)), start, stop, h))
            if whole is None:
                whole = torch.empty(1, strip.shape[1], h * grown, strip.shape[3], dtype=strip.dtype)
            whole[:, :, start * grown : stop * grown] = strip
        assert whole is not None
        return whole

    def _level(self, level: Level, x: Source, last: bool = False) -> Source:
        for index, block in enumerate(level.blocks):
            x = self._residual(block, x)  # type: ignore[arg-type]
            if level.attentions:
                x = self._attention(level.attentions[index], x)  # type: ignore[arg-type]
        return x if level.resample is None else self._resampled(level.resample, x, last)

    def _middle(self, middle: Middle, x: Source) -> Source:
        x = self._residual(middle.block_in, x)
        return self._residual(middle.block_out, x if middle.attention is None else self._attention(middle.attention, x))

    def _residual(self, block: ResidualBlock, x: Source) -> Field:
        """The sum is built where the skipped branch lies, which is x itself where it can be."""
        _, _, h, w = x.shape
        shape = 1, block.conv_in.out_channels, h, w
        kept = isinstance(x, Field) and isinstance(block.skip, nn.Identity)
        total = x if kept and isinstance(x, Field) else self._field(shape)
        inner, normalised = self._field(shape), Normalised(block.norm_in, x)
        for start, stop in _strips(x.shape):
            low, high = max(start - 1, 0), min(stop + 1, h)
            rows = x.rows(low, high)
            inner.write(start, _cut(block.conv_in, normalised(rows), start - low, high - stop))
            if not kept:
                skipped = block.skip(rows[:, :, start - low : stop - low])
                total.data[:, start:stop] = skipped.permute(0, 2, 3, 1)
        del x
        total.sums, normalised = _sums(shape[1]), Normalised(block.norm_out, inner)
        for start, stop in _strips(shape):
            added = _convolved(block.conv_out, lambda i, j: normalised(inner.rows(i, j)), start, stop, h)
            total.write(start, added.add_(total.rows(start, stop)))
        return total

    def _resampled(self, resample: nn.Module, x: Source, last: bool) -> Source:
        """The last upsampling gives the largest of all fields, and is done twice rather than kept."""
        _, c, h, w = x.shape
        if isinstance(resample, Downsample):  # output rows a to z take input rows 2 a to 2 z, and one more
            return self._made((1, c, h // 2, w // 2), lambda a, z: resample(x.rows(2 * a, min(2 * z + 1, h))))
        assert isinstance(resample, Upsample)
        doubled = Doubled(x, resample)
        if not last:
            return self._made(doubled.shape, doubled.rows)
        for start, stop in _strips(doubled.shape):
            _add(doubled.sums, doubled.rows(start, stop))
        return doubled

    def _attention(self, module: PixelAttention, x: Source) -> Field:
        """Queries a strip at a time, and for each the keys a strip at a time; their scores are elements, too."""
        attention, scale = module.attention, x.shape[1] ** -0.5
        wide = torch.float64 if self.dtype == torch.float64 else torch.float32
        b, c, h, w = x.shape
        parts = list(_strips((b, max(c, math.isqrt(ELEMENTS)), h, w)))

        def tokens(field: Source, start: int, stop: int) -> Tensor:
            return field.rows(start, stop).flatten(2).transpose(1, 2)

        normalised = Normalised(module.norm, x, silu=False)
        normed = self._made(x.shape, lambda a, z: normalised(x.rows(a, z)))
        keys, values = (
            self._made(x.shape, lambda a, z, part=part: _picture(part(tokens(normed, a, z)), z - a))  # type: ignore[misc]
            for part in (attention.k, attention.v)
        )

        def attended(start: int, stop: int) -> Tensor:
            q = attention.q(tokens(normed, start, stop)) * scale
            top = torch.full((*q.shape[:2], 1), float("-inf"), dtype=wide, device=self.device)
            total, answer = torch.zeros_like(top), torch.zeros(q.shape, dtype=wide, device=self.device)
            for first, last in parts:
                scores = (q @ tokens(keys, first, last).transpose(1, 2)).to(wide)
                highest = torch.maximum(top, scores.amax(2, keepdim=True))
                weights, kept = (scores - highest).exp_(), (top - highest).exp_()
                total = total * kept + weights.sum(2, keepdim=True)
                answer = answer * kept + (weights.to(self.dtype) @ tokens(values, first, last)).to(wide)
                top = highest
            return x.rows(start, stop) + _picture(attention.out((answer / total).to(self.dtype)), stop - start)

        field = self._field((b, c, h, w))
        for start, stop in parts:
            field.write(start, attended(start, stop))
        return field


def _strips(shape: tuple[int, int, int, int]) -> Iterator[tuple[int, int]]:
    """(start, stop) of strips of an even number of rows."""
    b, c, h, w = shape
    size = max(2, ELEMENTS // (b * c * w) // 2 * 2)
    yield from ((start, min(start + size, h)) for start in range(0, h, size))


def _convolved(conv: nn.Module, rows: Callable[[int, int], Tensor], start: int, stop: int, height: int) -> Tensor:
    """Rows of a 3x3 convolution of `rows(start, stop)`, which has `height` of them."""
    low, high = max(start - 1, 0), min(stop + 1, height)
    return _cut(conv, rows(low, high), start - low, high - stop)


def _cut(conv: nn.Module, rows: Tensor, above: int, below: int) -> Tensor:
    """A 3x3 convolution of rows, the first and the last of which are a neighbour's (1), or there is none (0)."""
    if not above or not below:
        rows = F.pad(rows, (0, 0, 1 - above, 1 - below))
    return F.conv2d(rows, conv.weight, conv.bias, padding=(0, 1))  # type: ignore[arg-type]


def _wide(x: Tensor) -> torch.dtype:
    """The type of statistics of x."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _pieces(x: Tensor) -> Iterator[Tensor]:
    """The pixels of `1 c h w` as `n c`; on a CPU some at a time."""
    table = x.permute(0, 2, 3, 1).reshape(-1, x.shape[1])
    yield from table.split(max(1, CACHED // x.shape[1]) if x.device.type == "cpu" else len(table))


def _sums(channels: int) -> Tensor:
    return torch.zeros(2, channels, dtype=torch.float64)


def _add(sums: Tensor, strip: Tensor) -> None:
    """Add values and squares of the pixels of a strip."""
    for part in _pieces(strip):
        pixels = part.to(_wide(part))
        sums[0] += pixels.sum(0).double().cpu()
        sums[1] += (pixels * pixels).sum(0).double().cpu()


def _picture(tokens: Tensor, height: int) -> Tensor:
    return tokens.transpose(1, 2).unflatten(2, (height, -1))
