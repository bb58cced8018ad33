"""Latents of a whole data set on disk: made once, never stale, and good after a kill at any moment.

A cache is the folder KEY of `folder`, where KEY is the sha256 of every picture's digest, the encoder's digest and the
transform. It is built in KEY.building beside a map of what is done, and renamed when it is whole. KEY.lock is held by
who looks into it or builds it, KEY.use by all who read from it.
"""

import fcntl
import hashlib
import json
import logging
import math
import os
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple, TextIO

import numpy as np
import torch
from torch import Tensor

from latentkit.data.dataset import Pictures, check_bad, choices, substitute
from latentkit.data.source import cache_home, track
from latentkit.errors import InputError

CACHE_FORMAT = 2  # of 1, latents of floating-point and ranged pictures may be spoilt
SAVE_EVERY = 2.0  # seconds between two writings of the map of what is done
DONE, NOT_FINITE, GONE = 1, 2, 3
REASONS = {NOT_FINITE: "its latent holds NaN or infinite values", GONE: "its picture went bad after it was indexed"}
LOG_VARIANCE_RANGE = (-30.0, 20.0)

Encode = Callable[[Tensor], Tensor]


class LatentCache:
    """Posterior moments (mean, then log-variance) of every picture in every view, from memory-mapped files.

    `quarantined` names the pictures without a usable latent; `take` gives another of the same bucket in their place.
    """

    field = "moments"

    def __init__(self, folder: Path, pictures: Pictures, manifest: dict[str, Any], use: TextIO) -> None:
        self._use = use  # held while this lives
        self.source = pictures.source
        self.shapes = pictures.shapes
        self.buckets = pictures.buckets
        self.seed = pictures.seed
        self.views = len(pictures.transform.views())
        self.quarantined: dict[str, str] = manifest["quarantined"]
        self._buckets = [pictures.bucket_of(i) for i in range(len(pictures))]
        self._slots = _slots(self._buckets)
        self._bad = {i for i, item in enumerate(self.source.items) if item.key in self.quarantined}
        self._maps = {
            part["bucket"]: np.memmap(folder / part["file"], manifest["dtype"], "r", shape=tuple(part["shape"]))
            for part in manifest["parts"]
        }

    def __len__(self) -> int:
        return len(self.source)

    def take(self, index: int, draw: int) -> tuple[int, Tensor]:
        """The index of the picture used, and its moments `2c h w` in the view that this draw shows."""
        used, attempt = index, 0
        while used in self._bad:
            used, attempt = substitute(index, attempt, self._buckets), attempt + 1
        view = choices(self.seed, draw)[2] % self.views
        moments = self._maps[self._buckets[used]][self._slots[used], view]
        return used, torch.from_numpy(np.array(moments, np.float32))

    def statistics(self) -> tuple[Tensor, Tensor]:
        """Mean and deviation of every latent channel over all usable pictures and views, float64 [c] each.

        Those of posterior samples: the variance is that of the means plus the mean posterior variance.
        """
        count, total = 0, np.zeros(next(iter(self._maps.values())).shape[2] // 2)
        for mean, _ in self._usable():
            count += mean.size // mean.shape[2]
            total += mean.sum((0, 1, 3, 4))
        centre = total / count
        spread = np.zeros_like(centre)
        for mean, log_variance in self._usable():
            spread += ((mean - centre[:, None, None]) ** 2 + np.exp(log_variance)).sum((0, 1, 3, 4))
        return torch.from_numpy(centre), torch.from_numpy(np.sqrt(spread / count))

    def _usable(self) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Means and log-variances, float64 [items, views, c, h, w], a few hundred pictures at a time."""
        for bucket, moments in self._maps.items():
            good = [i for i, b in enumerate(self._buckets) if b == bucket and i not in self._bad]
            slots = [self._slots[i] for i in good]
            for begin in range(0, len(slots), 256):
                part = np.asarray(moments[slots[begin : begin + 256]], np.float64)
                mean, log_variance = np.split(part, 2, axis=2)
                yield mean, log_variance.clip(*LOG_VARIANCE_RANGE)


def open_latents(
    folder: str | Path,
    pictures: Pictures,
    encode: Encode,
    encoder_digest: str,
    *,
    batch: int = 32,
    half: bool = False,
    progress: bool = True,
) -> LatentCache:
    """The cache of these pictures below `folder`, built with `encode` (pixels b c h w to moments b 2c h w) if missing.

    `encoder_digest` stands for the encoder's weights. A build goes on where a killed one stopped; another process
    that opens the same cache waits. A cache whose bytes are not those that were written is made again, with a warning.
    """
    if pictures.transform.crop != "center":
        raise InputError(f"latents of crop {pictures.transform.crop!r} cannot be cached: set crop: center, or no cache")
    root = Path(folder)
    root.mkdir(parents=True, exist_ok=True)
    dtype = "float16" if half else "float32"
    key = cache_key(pictures, encoder_digest, dtype)
    final = root / key
    with open(root / f"{key}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        manifest = _load(final, key)
        if manifest is None:
            if final.exists():
                logging.getLogger("latentkit").warning("latent cache %s is damaged and is made again", final)
                shutil.rmtree(final)
            manifest = _build(root, key, pictures, encode, batch, dtype, progress)
        check_bad(manifest["quarantined"], len(pictures), "have no usable latent")
        use = open(root / f"{key}.use", "w")  # noqa: SIM115  (held as long as the cache)
        fcntl.flock(use, fcntl.LOCK_SH)
        return LatentCache(final, pictures, manifest, use)


class Stored(NamedTuple):
    """A cache on disk: its bytes, the data set it was made of, when it was last used (seconds), and if it is now."""

    path: Path
    size: int
    source: str
    used: float
    busy: bool


def cache_folder() -> Path:
    """Where latents are kept between runs."""
    return cache_home() / "latents"


def stored(folder: Path) -> list[Stored]:
    """Every cache below `folder`, those half built included, the last used first."""
    found = []
    for path in folder.iterdir() if folder.is_dir() else ():
        if path.is_dir():
            files = [file.stat() for file in path.iterdir() if file.is_file()]
            uses = [file.stat().st_mtime for file in folder.glob(f"{path.stem}.*") if file.suffix in (".lock", ".use")]
            source = "half built" if path.suffix else _source(path)
            size = sum(file.st_blocks * 512 for file in files)
            found.append(Stored(path, size, source, max([0.0, *uses]), _held(folder, path.stem) is None))
    return sorted(found, key=lambda one: -one.used)


def clear(folder: Path) -> tuple[list[Stored], list[Stored]]:
    """Delete every cache below `folder` that no process uses; returns those that are gone and those that were left."""
    gone, left = [], []
    for one in stored(folder):
        locks = _held(folder, one.path.stem)
        if locks is None:
            left.append(one)
            continue
        with locks[0], locks[1]:
            shutil.rmtree(one.path)
            gone.append(one)
    return gone, left


def _held(folder: Path, key: str) -> tuple[TextIO, TextIO] | None:
    """Both locks of a cache, or None where another holds one."""
    locks = open(folder / f"{key}.lock", "a"), open(folder / f"{key}.use", "a")  # noqa: SIM115  (given on)
    try:
        for lock in locks:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        for lock in locks:
            lock.close()
        return None
    return locks


def _source(path: Path) -> str:
    try:
        return str(json.loads((path / "manifest.json").read_bytes())["source"])
    except (OSError, ValueError, KeyError, TypeError):
        return "unknown"


def cache_key(pictures: Pictures, encoder_digest: str, dtype: str = "float32") -> str:
    """sha256 of all that the latents depend on: every picture's digest, the encoder, the transform and the type."""
    content = [item.digest for item in pictures.source.items]
    transform = pictures.transform.model_dump(exclude={"zoom"})  # 1, where crops are not random
    parts = [CACHE_FORMAT, content, encoder_digest, transform, pictures.shapes, dtype]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def _slots(buckets: list[int]) -> list[int]:
    """The place of every picture within its bucket."""
    filled: dict[int, int] = {}
    slots = []
    for bucket in buckets:
        slots.append(filled.get(bucket, 0))
        filled[bucket] = slots[-1] + 1
    return slots


def _load(final: Path, key: str) -> dict[str, Any] | None:
    """The manifest of a whole cache whose files have the digests written in it, else None."""
    try:
        manifest: dict[str, Any] = json.loads((final / "manifest.json").read_bytes())
        if manifest["key"] != key:
            return None
        whole = all(_digest(final / part["file"]) == part["sha256"] for part in manifest["parts"])
        return manifest if whole else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _digest(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _build(
    root: Path, key: str, pictures: Pictures, encode: Encode, batch: int, dtype: str, progress: bool
) -> dict[str, Any]:
    building = root / f"{key}.building"
    building.mkdir(exist_ok=True)
    members: dict[int, list[int]] = {}
    for index in range(len(pictures)):
        members.setdefault(pictures.bucket_of(index), []).append(index)
    # The same pictures share a call whatever was done before: a call's other pictures change the last bits.
    chunks = [(b, at) for b, indices in sorted(members.items()) for at in range(0, len(indices), batch)]
    parts: dict[int, _Part] = {}
    last = time.monotonic()
    try:
        for bucket, at in track(chunks, len(chunks), "encoding pictures", progress):
            if bucket not in parts:
                first = _encode(pictures, members[bucket][:batch], encode, dtype)[0]
                shape = (len(members[bucket]), *first.shape[1:])
                parts[bucket] = _Part(building, bucket, shape, dtype, batch)
            part = parts[bucket]
            if part.is_done(at):
                continue
            part.write(at, *_encode(pictures, members[bucket][at : at + batch], encode, dtype))
            if time.monotonic() - last > SAVE_EVERY:
                part.sync()
                last = time.monotonic()
        for part in parts.values():
            part.sync()
    finally:
        for part in parts.values():
            part.close()

    quarantined = {}
    for bucket, part in parts.items():
        for index, state in zip(members[bucket], part.state, strict=True):
            if state != DONE:
                quarantined[pictures.source.items[index].key] = REASONS[int(state)]
    manifest = {
        "key": key,
        "source": str(pictures.source.root.resolve()),
        "dtype": dtype,
        "parts": [
            {"bucket": b, "file": p.path.name, "shape": p.shape, "sha256": _digest(p.path)} for b, p in parts.items()
        ],
        "quarantined": quarantined,
    }
    with open(building / "manifest.json", "w") as file:
        json.dump(manifest, file)
        file.flush()
        os.fsync(file.fileno())
    os.rename(building, root / key)
    _sync_folder(root)
    return manifest


def _encode(pictures: Pictures, indices: list[int], encode: Encode, dtype: str) -> tuple[np.ndarray, np.ndarray]:
    """Moments [items, views, 2c, h, w] of some pictures, and the state of each: done, not finite, or gone."""
    state = np.full(len(indices), DONE, np.uint8)
    views = []
    for view in range(len(pictures.transform.views())):
        pixels = []
        for place, index in enumerate(indices):
            used, x = pictures.view(index, view)
            state[place] = GONE if used != index else state[place]
            pixels.append(x)
        with torch.no_grad():
            views.append(encode(torch.stack(pixels)).float().cpu().numpy().astype(dtype))
    moments = np.stack(views, axis=1)
    finite = np.isfinite(moments).reshape(len(indices), -1).all(1)
    state[~finite & (state == DONE)] = NOT_FINITE
    return moments, state


class _Part:
    """One bucket's file while it is built, and the state of each of its pictures (0: not encoded) beside it."""

    def __init__(self, building: Path, bucket: int, shape: tuple[int, ...], dtype: str, batch: int) -> None:
        self.path = building / f"bucket-{bucket}.bin"
        self.shape = shape
        self.state = np.zeros(shape[0], np.uint8)
        self._row = math.prod(shape[1:]) * np.dtype(dtype).itemsize
        self._state_path = building / f"bucket-{bucket}-{batch}.state"
        size = shape[0] * self._row
        if self.path.exists() and self.path.stat().st_size == size and self._state_path.exists():
            stored = np.frombuffer(self._state_path.read_bytes(), np.uint8)
            if stored.shape == self.state.shape and stored.max(initial=0) <= GONE:
                self.state = stored.copy()
        self._file = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            os.posix_fallocate(self._file, 0, size)  # a full disk is found now, and not in the middle of a run
        except OSError as error:
            os.close(self._file)
            free = shutil.disk_usage(building).free
            need = f"{size / 1e9:.2f} GB are needed in {building.parent} and {free / 1e9:.2f} GB are free"
            raise InputError(f"the latent cache cannot be written ({error.strerror}): {need}") from None

    def is_done(self, at: int) -> bool:
        """Whether the chunk that starts at picture `at` was encoded; chunks are marked whole."""
        return bool(self.state[at])

    def write(self, at: int, moments: np.ndarray, state: np.ndarray) -> None:
        """Write the moments of a chunk."""
        data = memoryview(moments.tobytes())
        offset = at * self._row
        while data:
            written = os.pwrite(self._file, data, offset)
            data, offset = data[written:], offset + written
        self.state[at : at + len(state)] = state

    def sync(self) -> None:
        """Bring what was written to disk, then the map that says so."""
        os.fsync(self._file)
        temporary = self._state_path.with_suffix(".tmp")
        with open(temporary, "wb") as file:
            file.write(self.state.tobytes())
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, self._state_path)

    def close(self) -> None:
        """Close the file; what was not synced is encoded again."""
        os.close(self._file)


def _sync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
