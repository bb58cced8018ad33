"""A file of tensors in any form that other programs write: safetensors, or a pickle by `torch.save`."""

import json
import math
import mmap
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from latentkit.checkpoints.storage.legacy import read_legacy
from latentkit.checkpoints.storage.mapping import mapped
from latentkit.checkpoints.storage.pickles import MOST_ELEMENTS, MOST_NAME, flat, read_pickle
from latentkit.errors import InputError

MOST_JSON = 1 << 25
"""Bytes of JSON, and of the header of safetensors (the largest known have less than a tenth of it)."""
MOST_TENSORS = 30_000
MOST_AXES = 8
TYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
}
"""Types of tensors that are mapped; others are copied."""


class Archive(NamedTuple):
    """Tensors by name, mapped and not read; metadata; what else a checkpoint says of itself (`global_step`)."""

    tensors: dict[str, Tensor]
    metadata: dict[str, str] = {}  # noqa: RUF012
    values: dict[str, Any] = {}  # noqa: RUF012


def read_archive(path: Path) -> Archive:
    """The tensors of a file, whatever its name ends in. Errors: InputError says what is wrong with it."""
    try:
        refuse_other(path)
        with open(path, "rb") as file:
            start = file.read(16)
        if start[:4] == b"PK\x03\x04":
            return _pickled(read_pickle(path), path)
        if len(start) < 9:
            raise InputError(f"{path}: is truncated: it has {len(start)} bytes")
        if start[8:9] != b"{" and start[:1] == b"\x80":
            return _pickled(read_legacy(path), path)
        if start[8:9] != b"{":
            raise InputError(f"{path}: is neither safetensors nor a file that torch.save wrote")
        space = mapped(path)
        header = _header(path, space)
        with safe_open(path, "pt") as tables:
            return Archive(_mapped(space, header, tables), dict(tables.metadata() or {}))
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror or error}") from None
    except InputError:
        raise
    except (SafetensorError, ValueError, RecursionError) as error:
        raise InputError(f"{path}: is truncated, damaged or no safetensors file ({str(error)[:200]})") from None


def refuse_other(path: Path) -> None:
    """InputError for what is there and is no file: a pipe or a device may never end."""
    if path.exists() and not path.is_file():
        raise InputError(f"{path}: is no file but a folder, a pipe or a device")


def _header(path: Path, space: mmap.mmap) -> dict[str, Any]:
    """Type, shape and place of each tensor, as far as they are sane; whether they fit the file, the library knows."""

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        if len(found := dict(pairs)) < len(pairs):
            raise InputError(f"{path}: its header has a name twice")
        return found

    length = int.from_bytes(space[:8], "little")
    if length > MOST_JSON:
        raise InputError(f"{path}: its header has {length} bytes; at most {MOST_JSON} are read")
    header = json.loads(space[8 : 8 + length], object_pairs_hook=once)
    if not isinstance(header, dict):
        raise InputError(f"{path}: its header is no JSON object")
    header.pop("__metadata__", None)
    refuse_names(path, header)
    for name, entry in header.items():
        shape = entry.get("shape") if isinstance(entry, dict) else None
        sane = isinstance(shape, list) and all(type(n) is int for n in shape) and len(shape) <= MOST_AXES
        if not sane or math.prod(n or 1 for n in shape or ()) > MOST_ELEMENTS:
            raise InputError(f"{path}: {name} has the shape {str(shape)[:80]}, which is none of a weight")
    return header


def refuse_names(path: Path, names: Iterable[str]) -> None:
    """InputError for names that nobody gave, which would be shown in messages, and for too many."""
    names = list(names)
    if len(names) > MOST_TENSORS:
        raise InputError(f"{path}: has {len(names)} tensors; at most {MOST_TENSORS} are read")
    for name in names:
        if len(name) > MOST_NAME or not name.isprintable():
            what = f"a name of {len(name)} characters" if name.isprintable() else "a name that cannot be shown"
            raise InputError(f"{path}: has a tensor with {what}: {name[:40]!r}")


def _mapped(space: mmap.mmap, header: Mapping[str, Any], tables: Any) -> dict[str, Tensor]:
    """The tensors of a file whose header the library found to be right, by name."""
    start = 8 + int.from_bytes(space[:8], "little")
    tensors: dict[str, Tensor] = {}
    for name, entry in sorted(header.items()):
        dtype, (first, last) = TYPES.get(entry["dtype"]), entry["data_offsets"]
        if dtype is None or first == last or (start + first) % dtype.itemsize:
            tensors[name] = tables.get_tensor(name)
        else:
            count = (last - first) // dtype.itemsize
            tensors[name] = torch.frombuffer(space, dtype=dtype, count=count, offset=start + first).view(entry["shape"])
    return tensors


def _pickled(content: Any, path: Path) -> Archive:
    whole = content.get("state_dict", content) if isinstance(content, dict) else None
    if not isinstance(whole, dict):
        raise InputError(f"{path}: holds no tensors by name")
    tensors = {name: value for name, value in flat(whole, str(path)) if isinstance(value, Tensor)}
    refuse_names(path, tensors)
    own = {name: value for name, value in content.items() if isinstance(value, int | float | str)}
    return Archive(tensors, {}, own)


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file; InputError says what is wrong with it."""
    try:
        refuse_other(path)
        if path.stat().st_size > MOST_JSON:
            raise InputError(f"{path}: has more than {MOST_JSON} bytes")
        content = json.loads(path.read_bytes())
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror or error}") from None
    except InputError:
        raise
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}: is no JSON ({str(error)[:100]})") from None
    if not isinstance(content, Mapping):
        raise InputError(f"{path}: is no JSON object")
    return dict(content)


def read_part(folder: Path, variant: str | None = None) -> dict[str, Tensor]:
    """The tensors of a sub-folder that diffusers or transformers wrote: one file, or shards and their index.

    `variant` is the middle of the file's name ("fp16"); None: the plain files, or the one variant that is there.
    Errors: InputError names what is missing, variants of which none is plain, and a shard whose name leads out of the
    folder.
    """
    found = _weights(folder)
    if not found:
        raise InputError(f"{folder}: holds no weights")
    if variant not in found and "" not in found and (variant or len(found) > 1):
        known = sorted(found)
        raise InputError(
            f"{folder}: holds no plain weights but the variants {', '.join(known)}; leave one of them there, or of a "
            f"whole model write one: latentkit convert FOLDER NEW --to latentkit --variant {known[0]}"
        )
    path = found.get(variant or "") or found.get("") or next(iter(found.values()))
    return _shards(folder, path) if path.suffix == ".json" else read_archive(path).tensors


def variants(root: Path) -> list[str]:
    """The variants that weights in sub-folders are there of, besides plain ones."""
    return sorted({name for folder in root.iterdir() for name in _weights(folder) if name})


def _weights(folder: Path) -> dict[str, Path]:
    """The files of weights, or indices of shards, by variant."""
    found: dict[str, Path] = {}
    for stem in ("diffusion_pytorch_model", "model", "pytorch_model"):
        for ending in (".safetensors", ".bin"):
            found = _variants(folder, stem, ending) | found
    return found


def _variants(folder: Path, stem: str, ending: str) -> dict[str, Path]:
    """Whole files, or indices of shards, by variant; that of plain ones is empty."""
    last = re.escape(ending)
    found: dict[str, Path] = {}
    for pattern in (rf"{stem}{last}\.index(?:\.([^.]+))?\.json", rf"{stem}(?:\.([^.-]+))?{last}"):
        for path in sorted(folder.glob(f"{stem}*")):
            if (match := re.fullmatch(pattern, path.name)) and path.is_file():
                found[match[1] or ""] = path
    return found


def _shards(folder: Path, index: Path) -> dict[str, Tensor]:
    places = read_json(index).get("weight_map")
    if not isinstance(places, dict) or not all(isinstance(name, str) for name in places.values()):
        raise InputError(f"{index}: has no weight_map of names")
    tensors: dict[str, Tensor] = {}
    for name in sorted(set(places.values())):
        if Path(name).name != name or name.startswith(".") or not name.isprintable() or len(name) > 255:
            raise InputError(f"{index}: names the shard {name[:80]!r}, which is no file of this folder")
        tensors |= read_archive(folder / name).tensors
    missing = places.keys() - tensors.keys()
    if missing:
        raise InputError(f"{index}: {sorted(missing)[0]} and {len(missing) - 1} more tensors are in no shard")
    return tensors
