"""A data set as a list of pictures that are known to decode, each with its digest and its words.

Opening decodes every picture once and keeps what was found beside nothing of the user's: the index lies in the
cache folder (XDG_CACHE_HOME or ~/.cache), keyed by each file's size and times, so that a second open only looks at
those.
"""

import hashlib
import json
import os
import sys
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import cached_property
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from latentkit.data.folder import (
    PICTURE_ENDINGS,
    Entry,
    Listing,
    Place,
    Rejected,
    Stamp,
    Words,
    list_folder,
    look,
)
from latentkit.data.pictures import BadPicture, Picture, decode
from latentkit.data.range import Range
from latentkit.data.shards import list_shard
from latentkit.errors import InputError, close, nearest

__all__ = ["Item", "Rejected", "Source", "cache_home", "open_source", "track"]

INDEX_FORMAT = 2
SHOW_AFTER = 2.0  # seconds before a progress bar appears

T = TypeVar("T")


class Item(NamedTuple):
    """One usable picture: sizes in pixels, `depth` the numpy type of its samples, `digest` the sha256 of its bytes.

    `alpha` says that its last channel is alpha, `transparent` that some of it is not opaque.
    """

    key: str
    width: int
    height: int
    channels: int
    depth: str
    digest: str
    caption: str | None = None
    keywords: tuple[str, ...] = ()
    label: str | None = None
    split: str | None = None
    extras: dict[str, Any] = {}  # noqa: RUF012  (never written to)
    alpha: bool = False
    transparent: bool = False
    notes: tuple[str, ...] = ()


class Source:
    """The usable pictures of a data set, sorted by key, and the files that are not used.

    `values` is the range that its samples are read by, None: that of their type.
    """

    def __init__(
        self,
        root: Path,
        kind: str,
        found: list[tuple[Item, Place]],
        rejected: list[Rejected],
        classes: tuple[str, ...],
        values: Range | None = None,
    ) -> None:
        self.root = root
        self.kind = kind
        self.items = [item for item, _ in found]
        self.places = [place for _, place in found]
        self.rejected = rejected
        self.classes = classes
        self.values = values

    def __len__(self) -> int:
        return len(self.items)

    @cached_property
    def fingerprint(self) -> str:
        """sha256 over every item: its key, picture and words."""
        digest = hashlib.sha256()
        for item in self.items:
            digest.update(json.dumps(item, sort_keys=True, default=str).encode())
        return digest.hexdigest()

    def data(self, index: int) -> bytes:
        """The bytes of picture `index`; `BadPicture` when they are gone or not those that were indexed."""
        item, place = self.items[index], self.places[index]
        try:
            data = _bytes_at(self.root, place)
        except OSError as error:
            raise BadPicture(item.key, f"can no longer be read ({error.strerror})") from None
        if hashlib.sha256(data).hexdigest() != item.digest:
            raise BadPicture(item.key, "has changed since it was indexed")
        return data

    def read(self, index: int) -> Picture:
        """The decoded picture `index`; `BadPicture` when it went bad after it was indexed."""
        return decode(self.data(index), self.items[index].key, self.values)

    def subset(self, indices: Iterable[int]) -> "Source":
        """The same data set with these pictures only; classes keep their numbers."""
        found = [(self.items[i], self.places[i]) for i in sorted(indices)]
        return Source(self.root, self.kind, found, self.rejected, self.classes, self.values)

    def select(self, split: str) -> "Source":
        """The pictures of one split."""
        names = {item.split for item in self.items if item.split}
        if split not in names:
            said = nearest(split, names) if names else "its pictures name no split"
            raise InputError(f"{self.root.name} has no split {split!r}: {said}")
        return self.subset(i for i, item in enumerate(self.items) if item.split == split)


def open_source(path: str | Path, progress: bool = True, values: Range | None = None) -> Source:
    """The data set in a folder or a tar shard, whose samples are read by the range `values` (None: their type's).

    A folder holds tar shards; or pictures with metadata.jsonl or metadata.csv, with caption files beside them, in
    class folders, or plain. Nothing in it is changed. `InputError` when there is nothing usable.
    """
    root = Path(path).expanduser()
    if not root.exists():
        beside = root.parent.iterdir() if root.parent.is_dir() else ()
        question = close(root.name, [p.name for p in beside if p.is_dir() or p.suffix == ".tar"])
        raise InputError(f"data folder {path} does not exist" + (f"; {question}" if question else ""), exit_code=2)
    shards = [root] if root.is_file() else sorted(p for p in root.glob("*.tar") if not p.name.startswith("."))
    if root.is_file():
        if root.suffix.lower() != ".tar":
            raise InputError(f"{path} is a file; a data set is a folder of pictures or a .tar shard", exit_code=2)
        root = root.parent
    memo = _Memo(root, values)
    listing = _list_shards(root, shards, memo) if shards else list_folder(root)
    if shards and not Path(path).expanduser().is_file():
        loose = sorted(p.name for p in root.iterdir() if p.name.lower().endswith(PICTURE_ENDINGS))
        listing.rejected.extend(Rejected(name, "lies beside tar shards, which are read instead") for name in loose)
    entries, twice = _unique(listing.entries)
    try:
        facts = _look(root, entries, memo, progress, values)
    finally:
        memo.save()

    found: list[tuple[Item, Place]] = []
    rejected = [*listing.rejected, *twice]
    for entry, fact in zip(entries, facts, strict=True):
        if isinstance(fact, str):
            rejected.append(Rejected(entry.key, fact))
            continue
        width, height, channels, depth, digest, alpha, transparent, notes = fact
        item = Item(entry.key, width, height, channels, depth, digest, *entry.words, alpha, transparent, tuple(notes))
        found.append((item, entry.place))
    found.sort(key=lambda pair: pair[0].key)
    if not found:
        raise InputError(_nothing(path, rejected))
    labels = {item.label for item, _ in found if item.label is not None}
    numeric = all(label.isdecimal() for label in labels)
    classes = tuple(sorted(labels, key=lambda label: (int(label) if numeric else 0, label)))
    return Source(root, listing.kind, found, sorted(rejected), classes, values)


def _nothing(path: str | Path, rejected: list[Rejected]) -> str:
    if not rejected:
        return f"{path} holds no pictures: PNG, JPEG, WebP or TIFF files, or webdataset .tar shards, are read"
    shown = "".join(f"\n  {key}: {reason}" for key, reason in rejected[:5])
    more = f"\n  and {len(rejected) - 5} more" if len(rejected) > 5 else ""
    return f"{path} holds no usable picture; {len(rejected)} files were looked at:{shown}{more}"


def _list_shards(root: Path, shards: list[Path], memo: "_Memo") -> Listing:
    entries: list[Entry] = []
    rejected: list[Rejected] = []
    for path in shards:
        mark = look(path, root.resolve())
        if isinstance(mark, str):
            rejected.append(Rejected(path.name, mark))
            continue
        row = memo.get(f"{path.name}#members", mark)
        if row is None:
            listing = list_shard(path, path.name, mark)
            row = [listing.entries, listing.rejected]
            memo.put(f"{path.name}#members", mark, row)
        for key, (_, offset, size, _), (caption, keywords, label, split, extras) in row[0]:
            words = Words(caption, tuple(keywords), label, split, extras)
            entries.append(Entry(key, Place(path.name, offset, size, mark), words))
        rejected += [Rejected(*pair) for pair in row[1]]
    return Listing("shards", entries, rejected)


def _unique(entries: list[Entry]) -> tuple[list[Entry], list[Rejected]]:
    """Entries with keys made unique: keys that several shards share get the shard's name before them."""
    counts = Counter(entry.key for entry in entries)
    named = [e._replace(key=f"{e.place.file}/{e.key}") if counts[e.key] > 1 else e for e in entries]
    seen: set[str] = set()
    kept: list[Entry] = []
    twice: list[Entry] = []
    for entry in named:
        (twice if entry.key in seen else kept).append(entry)
        seen.add(entry.key)
    return kept, [Rejected(entry.key, "has the key of another picture") for entry in twice]


def _bytes_at(root: Path, place: Place) -> bytes:
    with open(root / place.file, "rb") as file:
        file.seek(place.offset)
        return file.read(place.size)


def _fact(root: Path, entry: Entry, values: Range | None) -> list[Any] | str:
    """[width, height, channels, depth, digest, alpha, transparent, notes] of one picture, or why it is not used."""
    try:
        data = _bytes_at(root, entry.place)
        array, alpha, notes, _ = decode(data, entry.key, values)
    except BadPicture as error:
        return error.reason
    except OSError as error:
        return f"cannot be read ({error.strerror})"
    top = 1.0 if array.dtype.kind == "f" else float(2 ** (8 * array.dtype.itemsize) - 1)
    transparent = bool(alpha and array[..., -1].min() < top)
    height, width, channels = array.shape
    return [width, height, channels, str(array.dtype), hashlib.sha256(data).hexdigest(), alpha, transparent, notes]


def _look(root: Path, entries: list[Entry], memo: "_Memo", progress: bool, values: Range | None) -> list[Any]:
    """The facts of every entry, from the index or by decoding it now, in order."""
    names = [f"{entry.place.file}@{entry.place.offset}" for entry in entries]
    facts = [memo.get(name, entry.place.stamp) for name, entry in zip(names, entries, strict=True)]
    new = [i for i, fact in enumerate(facts) if fact is None]
    pool = ThreadPoolExecutor(min(8, os.cpu_count() or 1))
    try:
        looked = pool.map(lambda i: _fact(root, entries[i], values), new)
        for i, fact in zip(new, track(looked, len(new), "looking at pictures", progress), strict=True):
            facts[i] = fact
            memo.put(names[i], entries[i].place.stamp, fact)
    finally:
        pool.shutdown(cancel_futures=True)
    return facts


def track(sequence: Iterable[T], total: int, title: str, shown: bool = True) -> Iterator[T]:
    """Pass `sequence` through; after two seconds a bar with the remaining time shows on stderr, on a terminal only."""
    begin = time.monotonic()
    bar: Any = None
    task: Any = None
    try:
        for done, value in enumerate(sequence, 1):
            yield value
            if bar is None and shown and sys.stderr.isatty() and time.monotonic() - begin > SHOW_AFTER:
                from rich.console import Console
                from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

                columns = TextColumn(title), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
                bar = Progress(*columns, console=Console(stderr=True), transient=True)
                bar.start()
                task = bar.add_task(title, total=total)
            if bar is not None:
                bar.update(task, completed=done)
    finally:
        if bar is not None:
            bar.stop()


def cache_home() -> Path:
    """Where is kept what can be made again: `latentkit` below XDG_CACHE_HOME or ~/.cache."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "latentkit"


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "none"


class _Memo:
    """What was found in each file, kept while its stamp stays; a damaged or older index is as good as none."""

    def __init__(self, root: Path, values: Range | None) -> None:
        stated = b"" if values is None else f"\n{values.model_dump_json()}".encode()
        name = hashlib.sha256(os.fsencode(root.resolve()) + stated).hexdigest()[:32]
        self.path = cache_home() / "index" / f"{name}.json"
        versions = [_version(package) for package in ("pillow", "tifffile", "imagecodecs")]
        self.format = [INDEX_FORMAT, *versions]
        self.old = self._load()
        self.new: dict[str, Any] = {}
        self.changed = False

    def _load(self) -> dict[str, Any]:
        try:
            digest, _, body = self.path.read_bytes().partition(b"\n")
            if hashlib.sha256(body).hexdigest().encode() != digest:
                return {}
            stored = json.loads(body)
            return stored["rows"] if stored["format"] == self.format else {}
        except (OSError, ValueError, KeyError, TypeError):
            return {}

    def get(self, name: str, mark: Stamp) -> Any:
        """What was found in `name` when its stamp was `mark`, else None."""
        row = self.old.get(name)
        if row is None or tuple(row[0]) != mark:
            return None
        self.new[name] = row
        return row[1]

    def put(self, name: str, mark: Stamp, found: Any) -> None:
        """Keep what was found."""
        self.new[name] = [mark, found]
        self.changed = True

    def save(self) -> None:
        """Write the index by rename; a cache folder that cannot be written is no error."""
        if not self.changed and len(self.new) == len(self.old):
            return
        body = json.dumps({"format": self.format, "rows": self.new}).encode()
        temporary = self.path.with_suffix(f".{os.getpid()}.tmp")
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            temporary.write_bytes(hashlib.sha256(body).hexdigest().encode() + b"\n" + body)
            os.replace(temporary, self.path)
        except OSError:
            with suppress(OSError):
                temporary.unlink()
