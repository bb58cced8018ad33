"""What a folder of pictures says: which files are pictures, and their captions, classes, splits and other columns."""

import codecs
import csv
import json
import os
import stat
from collections.abc import Iterator
from operator import length_hint
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple, TypeAlias

from latentkit.errors import InputError

PICTURE_ENDINGS = (".png", ".jpg", ".jpeg", ".jpe", ".webp", ".tif", ".tiff")
# Pictures of formats that are not read: looked at, so that each is named with its reason and none is passed over.
FOREIGN_ENDINGS = (".gif", ".bmp", ".svg", ".eps", ".ps", ".psd", ".heic", ".heif", ".avif", ".jp2", ".jxl", ".ico")
METADATA = ("metadata.jsonl", "metadata.csv")
CAPTION_ENDINGS = (".txt", ".caption")
MAX_CAPTION_BYTES = 64 << 10
NOT_TEXT = "is not UTF-8 text, and its picture is used without it; save it as UTF-8"
SPLITS = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("val", "valid", "validation", "dev"), "validation"),
    **dict.fromkeys(("test", "testing", "eval"), "test"),
}


# A file's size in bytes, modification and change time in ns: while they stay, the file is taken as unchanged.
Stamp: TypeAlias = tuple[int, int, int]


class Place(NamedTuple):
    """Where a picture's bytes lie: `file` relative to the root, bytes `offset` to `offset + size`, and its stamp."""

    file: str
    offset: int
    size: int
    stamp: Stamp


class Rejected(NamedTuple):
    """A file that is not used, and why."""

    key: str
    reason: str


class Words(NamedTuple):
    """What is said about one picture."""

    caption: str | None = None
    keywords: tuple[str, ...] = ()
    label: str | None = None
    split: str | None = None
    extras: dict[str, Any] = {}  # noqa: RUF012  (never written to)


class Entry(NamedTuple):
    """One picture that was found, not yet decoded."""

    key: str
    place: Place
    words: Words


class Listing(NamedTuple):
    """All that a folder or its shards name, before any picture is decoded."""

    kind: str
    entries: list[Entry]
    rejected: list[Rejected]


def words_of(record: dict[str, Any]) -> Words:
    """Caption (`text`, else `caption`, else `name`), keywords, label and split of a record; the rest are extras."""
    rest = dict(record)
    caption = None
    for field in ("text", "caption", "name"):
        if caption is None and rest.get(field) not in (None, ""):
            caption = str(rest.pop(field))
    keywords = rest.pop("keywords", None) or ()
    if isinstance(keywords, str):
        keywords = keywords.replace("|", ",").split(",")
    label, split = rest.pop("label", None), rest.pop("split", None)
    return Words(
        caption,
        tuple(str(word).strip() for word in keywords if str(word).strip()),
        None if label in (None, "") else str(label),
        None if split in (None, "") else SPLITS.get(str(split), str(split)),
        rest,
    )


def first_line(data: bytes) -> str | None:
    """The first line of a caption file, None when empty; ValueError where it is not UTF-8 text."""
    whole = len(data) < MAX_CAPTION_BYTES
    text = codecs.getincrementaldecoder("utf-8-sig")().decode(data[:MAX_CAPTION_BYTES], whole).lstrip()
    if "\0" in text:
        raise ValueError("holds NUL")
    return (text.splitlines()[0].strip() or None) if text else None


def walk(root: Path) -> tuple[dict[str, Stamp], list[Rejected]]:
    """The stamp of every regular file below `root` by its relative path, and the links and devices that are refused.

    Hidden files are passed over. A link is followed only to a file inside the root.
    """
    files: dict[str, Stamp] = {}
    rejected: list[Rejected] = []
    inside = os.path.realpath(root)

    def unreadable(error: OSError) -> None:
        rejected.append(Rejected(os.path.relpath(error.filename, inside), f"cannot be listed ({error.strerror})"))

    for folder, folders, names in os.walk(inside, onerror=unreadable):
        prefix = "" if folder == inside else os.path.relpath(folder, inside).replace(os.sep, "/") + "/"
        folders[:] = sorted(n for n in folders if not n.startswith(".") and n != "__MACOSX")
        for name in folders:
            if os.path.islink(os.path.join(folder, name)):
                rejected.append(Rejected(prefix + name, "is a symbolic link to a folder, which is not followed"))
        for name in sorted(names):
            if name.startswith("."):
                continue
            found = look(os.path.join(folder, name), inside)
            if not isinstance(found, str):
                files[prefix + name] = found
            elif name.lower().endswith((*PICTURE_ENDINGS, *FOREIGN_ENDINGS, *CAPTION_ENDINGS, *METADATA)):
                rejected.append(Rejected(os.fsencode(prefix + name).decode("utf-8", "replace"), found))
    return files, rejected


def look(path: str | Path, inside: str | Path) -> Stamp | str:
    """The stamp of a file, or why it is not opened (a link that leaves the real folder `inside`, a device)."""
    try:
        str(path).encode()
        found = os.lstat(path)
        if stat.S_ISLNK(found.st_mode):
            if not Path(os.path.realpath(path, strict=True)).is_relative_to(inside):
                return "is a symbolic link that leaves the data folder"
            found = os.stat(path)
        if not stat.S_ISREG(found.st_mode):
            return "is not a regular file"
        if not os.access(path, os.R_OK):
            return "cannot be read (permission)"
    except UnicodeEncodeError:
        return "has a name that is not UTF-8; rename it"
    except OSError:
        return "is a symbolic link that leads nowhere"
    return found.st_size, found.st_mtime_ns, found.st_ctime_ns


def list_folder(root: Path) -> Listing:
    """Pictures below `root` with what metadata, caption files, class folders and split folders say of them."""
    files, rejected = walk(root)
    pictures = {key for key in files if key.lower().endswith((*PICTURE_ENDINGS, *FOREIGN_ENDINGS))}
    tops = {key.split("/")[0] for key in pictures if "/" in key}
    if tops and tops <= set(SPLITS) and all("/" in key for key in pictures):
        parts = [(f"{top}/", SPLITS[top]) for top in sorted(tops)]
    else:
        parts = [("", "")]
    kinds, entries = [], []
    for prefix, split in parts:
        inside = {key for key in pictures if key.startswith(prefix)}
        kind, words, refused = _describe(root, prefix, inside, files)
        kinds.append(kind)
        rejected += refused
        for key in sorted(words):
            said = words[key]
            if split and not said.split:
                said = said._replace(split=split)
            entries.append(Entry(key, Place(key, 0, files[key][0], files[key]), said))
    return Listing(max(kinds, key=kinds.count), entries, rejected)


def _describe(
    root: Path, prefix: str, pictures: set[str], files: dict[str, Stamp]
) -> tuple[str, dict[str, Words], list[Rejected]]:
    """Kind of one part of the folder, the words of each of its pictures, and what its metadata names in vain."""
    for name in METADATA:
        if prefix + name in files:
            words, rejected = _read_metadata(root, prefix, name, pictures, files)
            return "metadata", words, rejected
    beside: dict[str, str | None] = {}
    rejected = []
    for key in pictures:
        captions = [key.rsplit(".", 1)[0] + ending for ending in CAPTION_ENDINGS]
        beside[key] = None
        for name in [name for name in captions if name in files][:1]:
            try:
                beside[key] = first_line(_start(root / name))
            except ValueError:
                rejected.append(Rejected(name, NOT_TEXT))
    tops = {key[len(prefix) :].split("/")[0] for key in pictures}
    labelled = len(tops) > 1 and all("/" in key[len(prefix) :] for key in pictures)
    words = {key: Words(beside[key], label=key[len(prefix) :].split("/")[0] if labelled else None) for key in pictures}
    kind = "captions" if any(beside.values()) else "classes" if labelled else "plain"
    return kind, words, rejected


def _start(path: Path) -> bytes:
    with open(path, "rb") as file:
        return file.read(MAX_CAPTION_BYTES)


def _read_metadata(
    root: Path, prefix: str, name: str, pictures: set[str], files: dict[str, Stamp]
) -> tuple[dict[str, Words], list[Rejected]]:
    where = prefix + name
    words: dict[str, Words] = {}
    rejected = []
    mentioned = set()
    for line, record in _records(root / where, where):
        if isinstance(record, str):
            rejected.append(Rejected(f"{where} line {line}", record))
            continue
        file_name = record.pop("file_name", None)
        if not isinstance(file_name, str) or not file_name:
            rejected.append(Rejected(f"{where} line {line}", "has no file_name; each line names its picture by it"))
            continue
        key = prefix + PurePosixPath(file_name).as_posix()
        mentioned |= {prefix + value for value in record.values() if isinstance(value, str)}
        if file_name.startswith("/") or ".." in PurePosixPath(file_name).parts:
            rejected.append(Rejected(key, f"is named in {where}, but leaves the data folder"))
        elif key in words:
            rejected.append(Rejected(key, f"is named again in {where} line {line}; the first line counts"))
        elif key not in files:
            rejected.append(Rejected(key, f"is named in {where}, but missing"))
        else:
            words[key] = words_of(record)
    unnamed = sorted(pictures - set(words) - mentioned)
    rejected += [Rejected(key, f"is not named in {where}") for key in unnamed]
    return words, rejected


def _records(path: Path, where: str) -> Iterator[tuple[int, dict[str, Any] | str]]:
    """Line number and columns of each line of a metadata file, or what is wrong with the line."""
    text = path.read_bytes().decode("utf-8-sig", "surrogateescape")
    for number, record in _csv(text, where) if path.suffix == ".csv" else _jsonl(text):
        try:
            json.dumps(record, ensure_ascii=False).encode()
        except UnicodeEncodeError:
            yield number, "is not UTF-8 text"
        else:
            yield number, record


def _csv(text: str, where: str) -> Iterator[tuple[int, dict[str, Any] | str]]:
    lines = text.splitlines(keepends=True)
    unread = iter(lines)  # the reader's own count passes over lines that it refuses
    reader = csv.DictReader(unread)
    if "file_name" not in (reader.fieldnames or ()):
        columns = ", ".join(reader.fieldnames or ()).encode(errors="replace").decode()
        raise InputError(f"{where} has no column file_name; its columns are {columns}")
    while True:
        try:
            row = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            yield len(lines) - length_hint(unread), f"is not CSV: {error}"
        else:
            yield len(lines) - length_hint(unread), {str(k): v for k, v in row.items() if v is not None}


def _jsonl(text: str) -> Iterator[tuple[int, dict[str, Any] | str]]:
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except (ValueError, RecursionError):
            record = None
        if isinstance(record, dict):
            yield number, record
        else:
            yield number, 'is not a JSON object like {"file_name": "a.png", "text": "..."}'
