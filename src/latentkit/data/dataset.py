"""Pictures of one size: a source seen through a transform, with every random choice keyed by the draw."""

import os
import threading
from typing import Annotated, Literal, Self

import numpy as np
import torch
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator
from torch import Tensor

from latentkit.data.pictures import (
    MIN_SIDE,
    BadPicture,
    Picture,
    background_colour,
    keeps_alpha,
    resize,
    to_samples,
    to_tensor,
)
from latentkit.data.range import Range
from latentkit.data.source import Item, Source
from latentkit.diffusion.noise import keyed_bits
from latentkit.errors import InputError

MEMORY_SHARE = 0.25
BAD_SHARE = 0.001
BAD_ALLOWED = 10
MAX_OVERHANG = 4  # a picture is cut before scaling to at most this many times the target's aspect


def _check_colour(text: str) -> str:
    background_colour(text)
    return text


def _check_flips(letters: str) -> str:
    if set(letters) - set("hvr") or len(set(letters)) != len(letters):
        raise ValueError(f"flips {letters!r}: letters h (horizontal), v (vertical), r (quarter turns), each once")
    return letters


class Transform(BaseModel):
    """How a stored picture becomes a training picture; part of the recipe."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    size: int = Field(ge=MIN_SIDE, description="side in pixels; with buckets, the square root of the area")
    channels: int = Field(3, ge=1, description="1 gray, 2 gray and alpha, 3 RGB, 4 RGB and alpha, or as stored")
    background: Annotated[str, AfterValidator(_check_colour)] = "white"
    crop: Literal["center", "random"] = "center"
    flips: Annotated[str, AfterValidator(_check_flips)] = ""
    buckets: bool = False
    zoom: Literal[1, 2, 4, 8] = 1
    """A draw shows a random part of the picture at 1, 2, 4 ... up to so many times its size, if it has the pixels."""
    short: int | None = Field(default=None, ge=MIN_SIDE)
    """What `size` would be for the whole picture, of which a part of `size` is then cut out; null: `size`.

    A square part of 256 pixels of pictures whose short side is 384: size 256, short 384.
    """
    range: Range | None = None
    """What the values of 16-bit and floating-point samples mean; null: 0 to the largest of their type, or to 1."""

    @model_validator(mode="after")
    def _zoomed(self) -> Self:
        if self.zoom > 1 and self.crop != "random":
            raise ValueError(f"zoom {self.zoom} shows random parts: set crop: random")
        if self.short is not None and (self.short < self.size or self.zoom > 1):
            raise ValueError(f"short {self.short} must be at least size {self.size}, and takes no zoom ({self.zoom})")
        return self

    def views(self) -> list[tuple[int, bool]]:
        """Every way a picture may be shown: (quarter turns, then mirrored left to right); the first is as it is."""
        letters = set(self.flips)
        if "r" in letters:
            return [
                (turns, mirror) for mirror in ((False, True) if letters & set("hv") else (False,)) for turns in range(4)
            ]
        return (
            [(0, False)]
            + [(0, True)] * ("h" in letters)
            + [(2, True)] * ("v" in letters)
            + [(2, False)] * ({"h", "v"} <= letters)
        )


def bucket_shapes(size: int, multiple: int) -> list[tuple[int, int]]:
    """Heights and widths of about size * size pixels, from 1:4 to 4:1, sides multiples of `multiple`, widest last."""
    step = -(-size // (8 * multiple)) * multiple
    shapes = {(size, size)}
    for long in range(size, 2 * size + 1, step):
        short = round(size * size / long / multiple) * multiple
        if 2 / 3 < long * short / size**2 < 3 / 2:
            shapes |= {(long, short), (short, long)}
    return sorted(shapes, key=lambda shape: (shape[1] / shape[0], shape))


def nearest_shape(shapes: list[tuple[int, int]], height: int, width: int) -> int:
    """The index of the shape whose aspect is nearest (by its logarithm; the first of equals)."""
    distances = [abs(np.log(w / h) - np.log(width / height)) for h, w in shapes]
    return int(np.argmin(np.round(distances, 9)))


class Pictures:
    """A source as tensors `c h w` in [-1, 1]; picture `index` of draw `draw` is a pure function of both and the seed.

    Sides are multiples of `multiple` with buckets. Pictures scaled to their bucket are kept in memory, rounded to the
    depth of their file, when all of them fit in a quarter of what is free. A picture that went bad after it was
    indexed is replaced by another of its bucket (the same each time), and named in `replaced`; more than 0.1 % and
    more than 10 of them are an `InputError`. `alpha` says that the last channel of every picture is its alpha.
    """

    field = "pixels"

    def __init__(self, source: Source, transform: Transform, seed: int, *, multiple: int = 8) -> None:
        self.source = source
        self.transform = transform
        self.seed = seed
        size = transform.size
        if transform.buckets and "r" in transform.flips:
            raise InputError("flips 'r' (quarter turns) need square pictures: leave out the r or set buckets: false")
        if transform.buckets and size % multiple:
            raise InputError(f"size {size} is not a multiple of {multiple}, which this model's pictures need")
        self.shapes = bucket_shapes(size, multiple) if transform.buckets else [(size, size)]
        shape_of = {size: nearest_shape(self.shapes, *size) for size in {(i.height, i.width) for i in source.items}}
        self._buckets = [shape_of[item.height, item.width] for item in source.items]
        for item in source.items:
            _check_channels(item, transform)
        self.alpha = all(keeps_alpha(item.channels - item.alpha, transform.channels) for item in source.items)
        self.replaced: dict[str, str] = {}
        self._bad: dict[int, str] = {}
        self._kept: dict[tuple[int, float], Tensor] | None = (
            {} if self._bytes() <= MEMORY_SHARE * free_memory() else None
        )
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self.source)

    def _bytes(self) -> int:
        overhang = 1.5 if self.transform.crop == "random" else 1.0
        overhang *= sum(4**level for level in range(self.transform.zoom.bit_length()))  # all sizes
        overhang *= self._enlarged**2
        return sum(
            int(np.prod(self.shapes[bucket]) * self.transform.channels * np.dtype(item.depth).itemsize * overhang)
            for item, bucket in zip(self.source.items, self._buckets, strict=True)
        )

    @property
    def buckets(self) -> tuple[int, ...] | None:
        """The bucket number of every picture, for `Order`; None when all have one shape."""
        return tuple(self._buckets) if len(self.shapes) > 1 else None

    @property
    def commonest(self) -> int:
        """The bucket of the most pictures, a place in `shapes` (the first of equals)."""
        return max(range(len(self.shapes)), key=self._buckets.count)

    def bucket_of(self, index: int) -> int:
        """The bucket of a picture, a place in `shapes`."""
        return self._buckets[index]

    def sample(self, index: int, draw: int) -> Tensor:
        """The picture (or its replacement) as this draw shows it, `c h w` in [-1, 1]."""
        return self.take(index, draw)[1]

    def take(self, index: int, draw: int) -> tuple[int, Tensor]:
        """The index of the picture used, and `sample`."""
        down, right, view, zoom = choices(self.seed, draw)
        used, scaled = self._usable(index, zoom)
        return used, self._finish(scaled, used, view, (down, right))

    def view(self, index: int, number: int) -> tuple[int, Tensor]:
        """The index of the picture used, and it in view `number` of the transform's views, cut at the centre."""
        used, scaled = self._usable(index)
        return used, self._finish(scaled, used, number, None)

    def _finish(self, scaled: Tensor, index: int, view: int, where: tuple[int, int] | None) -> Tensor:
        height, width = self.shapes[self._buckets[index]]
        spare = scaled.shape[1] - height, scaled.shape[2] - width
        if self.transform.crop == "random" and where is not None:
            top, left = where[0] % (spare[0] + 1), where[1] % (spare[1] + 1)
        else:
            top, left = spare[0] // 2, spare[1] // 2
        x = scaled[:, top : top + height, left : left + width]
        views = self.transform.views()
        turns, mirror = views[view % len(views)]
        x = torch.rot90(x, turns, (1, 2)) if turns else x
        x = x.flip(2) if mirror else x
        half = 0.5 if x.dtype == torch.float32 else torch.iinfo(x.dtype).max / 2
        return x.contiguous().float().div(half).sub_(1)  # a new tensor: floats may be those that are kept

    def _usable(self, index: int, zoom: int = 0) -> tuple[int, Tensor]:
        """The picture, or the first of its substitutes that can be read, scaled to cover its bucket, as stored.

        `zoom` is a number that decides which of its sizes.
        """
        attempt = 0
        used = index
        while True:
            try:
                return used, self._scaled(used, self._times(used, zoom))
            except BadPicture as error:
                self._count(used, error.reason)
            used = substitute(index, attempt, self._buckets)
            attempt += 1

    def _count(self, index: int, reason: str) -> None:
        with self._lock:
            self._bad[index] = reason
            self.replaced[self.source.items[index].key] = reason
        check_bad(self.replaced, len(self), "went bad after they were indexed")

    @property
    def _enlarged(self) -> float:
        return (self.transform.short or self.transform.size) / self.transform.size

    def _times(self, index: int, zoom: int) -> float:
        """How many times its bucket's size a picture is shown: one of 1, 2, 4 ... that ask for no pixels it lacks.

        With `short`, always that over `size`.
        """
        if self.transform.short is not None:
            return self._enlarged
        item, (height, width) = self.source.items[index], self.shapes[self._buckets[index]]
        has = min(item.height / height, item.width / width, self.transform.zoom)
        return 1 << zoom % max(1, int(has).bit_length())

    def _scaled(self, index: int, times: float) -> Tensor:
        if index in self._bad:
            raise BadPicture(self.source.items[index].key, self._bad[index])
        if self._kept is not None and (index, times) in self._kept:
            return self._kept[index, times]
        height, width = self.shapes[self._buckets[index]]
        x = self._scale(self.source.read(index), (round(times * height), round(times * width)))
        if self._kept is not None:
            self._kept[index, times] = x
        return x

    def _scale(self, picture: Picture, shape: tuple[int, int]) -> Tensor:
        """The picture scaled to cover `shape`, in the type of its samples; cut to the shape unless crops are random."""
        height, width = shape
        channels, background = self.transform.channels, self.transform.background
        array = picture.array
        overhang = MAX_OVERHANG if self.transform.crop == "random" else 1
        tall = min(array.shape[0], -(-array.shape[1] * height * overhang // width))
        wide = min(array.shape[1], -(-array.shape[0] * width * overhang // height))
        top, left = (array.shape[0] - tall) // 2, (array.shape[1] - wide) // 2
        array = array[top : top + tall, left : left + wide]
        x = to_tensor(picture._replace(array=array), channels, background)
        scale = max(height / tall, width / wide)
        full = max(height, round(tall * scale)), max(width, round(wide * scale))
        x = resize(x, *full, alpha=keeps_alpha(picture.colours, channels), background=background)
        if self.transform.crop == "center":
            top, left = (full[0] - height) // 2, (full[1] - width) // 2
            x = x[:, top : top + height, left : left + width]
        return torch.from_numpy(to_samples(x, array.dtype)).permute(2, 0, 1).contiguous()


def _check_channels(item: Item, transform: Transform) -> None:
    colours = item.channels - item.alpha
    if colours != transform.channels and not (colours in (1, 3) and transform.channels <= 4):
        got = f"{item.key} has {colours} colour channels"
        raise InputError(f"{got}, which cannot be read as channels: {transform.channels}; use channels: {colours}")


def choices(seed: int, draw: int) -> tuple[int, int, int, int]:
    """Four 64-bit numbers that decide a draw's crop (down, right), view and zoom."""
    down, right, view, zoom = keyed_bits(4, seed, "transform", draw).tolist()
    return down, right, view, zoom


def substitute(index: int, attempt: int, buckets: list[int]) -> int:
    """Another picture of the same bucket, a pure function of the index and the attempt."""
    same = [i for i, bucket in enumerate(buckets) if bucket == buckets[index] and i != index]
    if attempt >= 4 * len(same) + 16:
        raise InputError(f"no picture is left to replace one that went bad (bucket {buckets[index]})")
    return same[int(keyed_bits(attempt + 1, "substitute", index)[attempt]) % len(same)] if same else index


def check_bad(bad: dict[str, str], length: int, what: str) -> None:
    """`InputError` when more than 0.1 % and more than 10 of `length` pictures are bad."""
    if len(bad) > max(BAD_ALLOWED, BAD_SHARE * length):
        shown = "".join(f"\n  {key}: {reason}" for key, reason in sorted(bad.items())[:5])
        raise InputError(f"{len(bad)} of {length} pictures {what}, more than 10 and 0.1 %; the first:{shown}")


def free_memory() -> int:
    """Bytes of memory that can be taken without swapping."""
    try:
        with open("/proc/meminfo") as file:
            return next(int(line.split()[1]) * 1024 for line in file if line.startswith("MemAvailable"))
    except (OSError, StopIteration):
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2
