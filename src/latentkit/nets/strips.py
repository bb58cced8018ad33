"""The autoencoder on pictures of any size: in strips of rows, with the values of the whole up to float error.

A norm needs all of its input before it can give anything, so the picture passes one segment between two norms at a
time: each segment reads strips of the one before it, writes its own, and sums up what the next norm needs. What lies
between segments is kept in host memory or in files; on the device are only strips and their halos. Attention is exact
too: the softmax runs over the keys strip by strip (Milakov & Gimelshein 2018).
"""

import math
import mmap
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from latentkit.nets.attention import PixelAttention
from latentkit.nets.autoencoder import Autoencoder, Level, Middle
from latentkit.nets.bottleneck import Posterior, certain, exact, posterior
from latentkit.nets.layers import Downsample, ResidualBlock, Upsample, fast_on_cpu

ELEMENTS = 1 << 21
"""Elements of a strip, halo apart."""


class Moments:
    """Mean and variance of every channel over pixels, `c` float64 each, of what was added so far."""

    def __init__(self, channels: int) -> None:
        self.count = 0
        self.mean, self.square = torch.zeros(2, channels, dtype=torch.float64)

    def add(self, rows: Tensor) -> None:
        """Add the pixels of `1 c h w` (Chan et al. 1983)."""
        c, wide = rows.shape[1], _wide(rows)
        if rows.device.type == "cpu":
            unused, other = torch.zeros(2, c, dtype=wide)
            mean, variance = torch.batch_norm_update_stats(rows, unused, other, 0.0)
        else:
            variance, mean = torch.var_mean(rows.to(wide), (0, 2, 3), correction=0)
        mean, variance = (value.double().cpu() for value in (mean, variance))
        count = rows.numel() // c
        total, step = self.count + count, mean - self.mean
        self.square += count * variance + step.square() * (self.count * count / total)
        self.mean += step * (count / total)
        self.count = total

    def grouped(self, groups: int) -> tuple[Tensor, Tensor]:
        """Mean and variance of each channel's group, `c` each."""
        means, variances = (value.unflatten(0, (groups, -1)) for value in (self.mean, self.square / self.count))
        mean = means.mean(1, keepdim=True)
        variance = (variances + (means - mean).square()).mean(1, keepdim=True)
        return mean.expand_as(means).flatten(), variance.expand_as(means).flatten()


class Memory:
    """Room for strips, in host memory or in files of the folder `spill`; what is given back is taken again.

    Apart from the allocator's memory, which would not go back to the system, and not new each time: on a CPU the pages
    of new memory cost more than all that the norms do.
    """

    def __init__(self, dtype: torch.dtype, spill: str | None) -> None:
        self.dtype, self.spill = dtype, spill
        self.free: list[Tensor] = []

    def take(self, count: int) -> Tensor:
        """`count` elements, of a room for at least `ELEMENTS`."""
        fitting = [index for index, room in enumerate(self.free) if room.numel() >= count]
        return self.free.pop(fitting[0]) if fitting else self._new(max(count, ELEMENTS))

    def _new(self, count: int) -> Tensor:
        if self.spill is None:
            return torch.frombuffer(mmap.mmap(-1, count * self.dtype.itemsize), dtype=self.dtype)
        with tempfile.NamedTemporaryFile(dir=self.spill, delete=False) as file:
            path = Path(file.name)
        try:
            return torch.from_file(str(path), shared=True, size=count, dtype=self.dtype)
        finally:
            path.unlink()  # the memory keeps the file as long as it is needed


class Field:
    """A `1 c h w` outside of the device, strip by strip until each is released; and what norms need of it."""

    def __init__(self, shape: tuple[int, int, int, int], device: torch.device, memory: Memory) -> None:
        self.shape, self.device, self.memory = shape, device, memory
        self.moments = Moments(shape[1])
        self.rooms: dict[tuple[int, int], Tensor] = {}

    def _between(self, start: int, stop: int) -> Iterator[tuple[int, int, Tensor]]:
        """(first row, last row + 1, `1 rows w c`) of the parts of strips between two rows."""
        _, c, _, w = self.shape
        for (a, z), room in self.rooms.items():
            low, high = max(a, start), min(z, stop)
            if low < high:
                yield low, high, room[(low - a) * w * c : (high - a) * w * c].view(1, high - low, w, c)

    def rows(self, start: int, stop: int) -> Tensor:
        """Rows on the device, channels last; valid until they are released."""
        parts = [part.to(self.device) for _, _, part in self._between(start, stop)]
        return (parts[0] if len(parts) == 1 else torch.cat(parts, 1)).permute(0, 3, 1, 2)

    def put(self, start: int, rows: Tensor) -> None:
        """Put rows in; the first time from the top down."""
        _, c, _, w = self.shape
        stop = start + rows.shape[2]
        for a, z in _strips(self.shape):
            if a < stop and z > start and (a, z) not in self.rooms:
                self.rooms[a, z] = self.memory.take((z - a) * w * c)
        for low, high, part in self._between(start, stop):
            part.copy_(rows[:, :, low - start : high - start].permute(0, 2, 3, 1))

    def write(self, start: int, rows: Tensor) -> None:
        """Put rows in, and add them to the moments."""
        self.put(start, rows)
        self.moments.add(rows)

    def release(self, row: int) -> None:
        """Give back the strips that end above `row`."""
        for part in [part for part in self.rooms if part[1] <= row]:
            self.memory.free.append(self.rooms.pop(part))


class Normalised:
    """Rows of `x` after `norm`, with the statistics of the whole picture, and SiLU."""

    def __init__(self, norm: nn.GroupNorm, x: Field, *, silu: bool = True) -> None:
        self.silu, self.eps = silu, norm.eps
        self.tables = *x.moments.grouped(norm.num_groups), norm.weight, norm.bias

    def __call__(self, rows: Tensor) -> Tensor:
        """`1 c h w -> 1 c h w`, channels last."""
        mean, variance, weight, bias = (table.to(rows.device, _wide(rows)) for table in self.tables)
        result = F.batch_norm(rows, mean, variance, weight, bias, eps=self.eps)
        return F.silu(result, inplace=True) if self.silu else result


class Strips:
    """Encodes and decodes with the weights of `network` in strips, one picture after another; see the module.

    `spill` is a folder for what lies between segments; None keeps it in host memory.
    """

    def __init__(self, network: Autoencoder, spill: str | Path | None = None) -> None:
        self.network = network
        weight = network.from_latent.weight
        self.dtype, self.device = weight.dtype, weight.device
        self.memory = Memory(self.dtype, None if spill is None else str(spill))

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

        x = self._made(shape, lambda a, z: _convolved(encoder.conv_in, unshuffled, a, z, shape[2]))
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

        x = self._made(
            (1, decoder.conv_in.out_channels, h, w), lambda a, z: _convolved(decoder.conv_in, latents, a, z, h)
        )
        x = self._middle(decoder.middle, x)
        for level in decoder.levels:
            x = self._level(level, x)  # type: ignore[arg-type]
        shuffle = nn.PixelShuffle(decoder.stem) if decoder.stem > 1 else nn.Identity()
        return self._last(decoder.norm_out, decoder.conv_out, x, shuffle, decoder.stem)

    def _field(self, shape: tuple[int, int, int, int]) -> Field:
        return Field(shape, self.device, self.memory)

    def _made(self, shape: tuple[int, int, int, int], make: Callable[[int, int], Tensor]) -> Field:
        """A field of what `make(start, stop)` gives for each strip of rows."""
        field = self._field(shape)
        for start, stop in _strips(shape):
            field.write(start, make(start, stop))
        return field

    def _last(self, norm: nn.GroupNorm, conv: nn.Conv2d, x: Field, then: nn.Module, grown: int = 1) -> Tensor:
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
        """The sum is built where the skipped branch lies, which is x itself where it can be."""
        _, _, h, w = x.shape
        shape = 1, block.conv_in.out_channels, h, w
        kept = isinstance(block.skip, nn.Identity)
        total = x if kept else self._field(shape)
        inner, normalised = self._field(shape), Normalised(block.norm_in, x)
        for start, stop in _strips(x.shape):
            low, high = max(start - 1, 0), min(stop + 1, h)
            rows = x.rows(low, high)
            inner.write(start, _cut(block.conv_in, normalised(rows), start - low, high - stop))
            if not kept:
                total.put(start, block.skip(rows[:, :, start - low : stop - low]))
                x.release(h if stop == h else stop - 1)
        total.moments, normalised = Moments(shape[1]), Normalised(block.norm_out, inner)
        for start, stop in _strips(shape):
            added = _convolved(block.conv_out, lambda i, j: normalised(inner.rows(i, j)), start, stop, h)
            total.write(start, total.rows(start, stop).add_(added))  # in place where it can be
            inner.release(h if stop == h else stop - 1)
        return total

    def _resampled(self, resample: nn.Module, x: Field) -> Field:
        _, c, h, w = x.shape
        if isinstance(resample, Downsample):

            def halved(start: int, stop: int) -> Tensor:
                rows = resample(x.rows(2 * start, min(2 * stop + 1, h)))
                x.release(2 * stop)
                return rows

            return self._made((1, c, h // 2, w // 2), halved)
        assert isinstance(resample, Upsample)
        merged = None
        if fast_on_cpu(resample.conv.weight):  # as it is fastest, for all strips
            merged = resample.merged().contiguous(memory_format=torch.channels_last)

        def doubled(start: int, stop: int) -> Tensor:
            low, high = max(start // 2 - 1, 0), min(stop // 2 + 1, h)
            rows = x.rows(low, high)
            if merged is None:
                rows = resample(rows)[:, :, start - 2 * low : stop - 2 * low]
            else:
                rows = _edged(rows, start // 2 - low, high - stop // 2)
                rows = resample.doubled(rows, merged, neighbours=1)
            x.release(h if stop == 2 * h else stop // 2 - 1)
            return rows

        return self._made((1, c, 2 * h, 2 * w), doubled)

    def _attention(self, module: PixelAttention, x: Field) -> Field:
        """Queries a strip at a time, and for each the keys a strip at a time; their scores are elements, too."""
        attention, scale = module.attention, x.shape[1] ** -0.5
        wide = torch.float64 if self.dtype == torch.float64 else torch.float32
        b, c, h, w = x.shape
        parts = list(_strips((b, max(c, math.isqrt(ELEMENTS)), h, w)))

        def tokens(field: Field, start: int, stop: int) -> Tensor:
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
        for done in (x, normed, keys, values):
            done.release(h)
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
    return F.conv2d(_edged(rows, above, below), conv.weight, conv.bias, padding=(0, 1))  # type: ignore[arg-type]


def _edged(rows: Tensor, above: int, below: int) -> Tensor:
    """Rows with one of zeros above and below, unless there is a neighbour's (1) already."""
    return rows if above and below else F.pad(rows, (0, 0, 1 - above, 1 - below))


def _wide(x: Tensor) -> torch.dtype:
    """The type of statistics of x."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _picture(tokens: Tensor, height: int) -> Tensor:
    return tokens.transpose(1, 2).unflatten(2, (height, -1))
