"""Webdataset shards: tar files whose members KEY.png, KEY.txt and KEY.json belong together, read by offset."""

import json
import tarfile
from pathlib import Path, PurePosixPath
from typing import Any

from latentkit.data.folder import (
    NOT_TEXT,
    PICTURE_ENDINGS,
    Entry,
    Listing,
    Place,
    Rejected,
    Stamp,
    Words,
    first_line,
    words_of,
)

MAX_JSON_BYTES = 1 << 20
BLOCK = 512
NOT_JSON = "is not a JSON object; its words are left out"


def list_shard(path: Path, file: str, mark: Stamp) -> Listing:
    """The pictures of one tar file, each with its offset; members that are not plain data are named and refused.

    `file` is the shard's name in the data set, `mark` its stamp. A key is a member's path up to its name's first dot.
    """
    rejected: list[Rejected] = []
    pictures: dict[str, tuple[int, int]] = {}
    words: dict[str, dict[str, bytes]] = {}
    try:
        with open(path, "rb") as raw, tarfile.open(fileobj=raw, mode="r:") as archive:
            for member in archive:
                name = f"{file}/{member.name}".encode("utf-8", "replace").decode()
                if member.isdir():
                    continue
                reason = _refusal(member, mark[0])
                if reason:
                    rejected.append(Rejected(name, reason))
                    continue
                key, ending = _split(member.name)
                if ending in PICTURE_ENDINGS:
                    if key in pictures:
                        rejected.append(Rejected(name, "is a second picture of its key"))
                    else:
                        pictures[key] = member.offset_data, member.size
                elif ending in (".txt", ".caption", ".cls", ".json") and member.size <= MAX_JSON_BYTES:
                    raw.seek(member.offset_data)
                    words.setdefault(key, {})[ending] = raw.read(member.size)
                archive.members = []  # type: ignore[attr-defined]  # the list would grow with the shard
            raw.seek(archive.offset)
            if raw.read(BLOCK).strip(b"\0"):
                rejected.append(Rejected(file, "is damaged: what follows its last readable member is lost"))
    except (tarfile.TarError, OSError, ValueError, EOFError) as error:
        kind = "is compressed or not a tar file" if not pictures else "is damaged: its end cannot be read"
        hint = "; shards are plain .tar, read by seeking" if not pictures else ""
        rejected.append(Rejected(file, f"{kind}{hint} ({type(error).__name__})"))
    entries = []
    for key, (offset, size) in pictures.items():
        said, broken = _words(words.get(key, {}))
        rejected += [Rejected(f"{file}/{key}{ending}", reason) for ending, reason in broken.items()]
        entries.append(Entry(key, Place(file, offset, size, mark), said))
    return Listing("shards", entries, rejected)


def _refusal(member: tarfile.TarInfo, size: int) -> str | None:
    parts = PurePosixPath(member.name).parts
    if member.name.startswith("/") or ".." in parts or "\\" in member.name or "\0" in member.name:
        return "has a name that leaves the shard"
    if not member.name.isprintable():
        return "has a name with unprintable characters"
    if not member.isreg() or member.issparse():
        return "is not a plain file (a link, a device or sparse)"
    if member.offset_data + member.size > size:
        return "is cut off by the end of the shard"
    return None


def _split(name: str) -> tuple[str, str]:
    """Key and ending of a member: the path up to the first dot of its last part, and the rest in lower case."""
    folder, _, last = name.rpartition("/")
    stem, dot, ending = last.partition(".")
    return (f"{folder}/{stem}" if folder else stem), (dot + ending).lower()


def _words(members: dict[str, bytes]) -> tuple[Words, dict[str, str]]:
    """Words of the members that belong to one picture (a .txt wins over the .json), and what is wrong with which."""
    record: Any = {}
    lines: dict[str, str | None] = {}
    broken: dict[str, str] = {}
    for ending, data in members.items():
        try:
            if ending == ".json":
                record = json.loads(data)
                json.dumps(record, ensure_ascii=False).encode()
            else:
                lines[ending] = first_line(data)
        except (ValueError, RecursionError):
            broken[ending] = NOT_TEXT if ending != ".json" else NOT_JSON
    if not isinstance(record, dict):
        broken[".json"] = NOT_JSON
    words = words_of({} if ".json" in broken else record)
    caption = lines.get(".txt", lines.get(".caption"))
    return words._replace(caption=caption or words.caption, label=lines.get(".cls") or words.label), broken
