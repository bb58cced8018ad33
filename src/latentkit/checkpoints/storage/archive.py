"""A file of tensors in any form that other programs write: safetensors, or a pickle by `torch.save`."""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from latentkit.checkpoints.storage.legacy import read_legacy
from latentkit.checkpoints.storage.mapping import mapped
from latentkit.checkpoints.storage.pickles import flat, read_pickle
from latentkit.errors import InputError

MOST_JSON = 1 << 25
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
        with safe_open(path, "pt") as tables:
            return Archive(_mapped(path, tables), dict(tables.metadata() or {}))
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror or error}") from None
    except InputError:
        raise
    except (SafetensorError, ValueError) as error:
        raise InputError(f"{path}: is truncated, damaged or no safetensors file ({str(error)[:200]})") from None


def _mapped(path: Path, tables: Any) -> dict[str, Tensor]:
    """The tensors of a file whose header the library found to be right, by name."""
    space = mapped(path)
    start = 8 + int.from_bytes(space[:8], "little")
    tensors: dict[str, Tensor] = {}
    for name, entry in sorted(json.loads(space[8:start]).items()):
        if name == "__metadata__":
            continue
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
    tensors = {name: value for name, value in flat(whole) if isinstance(value, Tensor)}
    own = {name: value for name, value in content.items() if isinstance(value, int | float | str)}
    return Archive(tensors, {}, own)


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file; InputError says what is wrong with it."""
    try:
        if path.stat().st_size > MOST_JSON:
            raise InputError(f"{path}: has more than {MOST_JSON} bytes")
        content = json.loads(path.read_bytes())
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror or error}") from None
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
    found: dict[str, Path] = {}
    for stem in ("diffusion_pytorch_model", "model", "pytorch_model"):
        for ending in (".safetensors", ".bin"):
            found = _variants(folder, stem, ending) | found
    if not found:
        raise InputError(f"{folder}: holds no weights")
    if variant not in found and "" not in found and (variant or len(found) > 1):
        raise InputError(
            f"{folder}: holds no plain weights but the variants {', '.join(sorted(found))}; leave one of them there, "
            "or name one in Python: read_folder(path, variant=...)"
        )
    path = found.get(variant or "") or found.get("") or next(iter(found.values()))
    return _shards(folder, path) if path.suffix == ".json" else read_archive(path).tensors


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
        if Path(name).name != name or name.startswith("."):
            raise InputError(f"{index}: names the shard {name[:80]!r}, which is no file of this folder")
        tensors |= read_archive(folder / name).tensors
    missing = places.keys() - tensors.keys()
    if missing:
        raise InputError(f"{index}: {sorted(missing)[0]} and {len(missing) - 1} more tensors are in no shard")
    return tensors
