"""Tensors into one safetensors file, whole or not at all, none of them copied; and the JSON beside them."""

import hashlib
import json
import os
import time
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from latentkit.checkpoints.names.rename import FLOATING, finite, listed
from latentkit.errors import InputError

IMPLEMENTATION = "https://github.com/Stability-AI/generative-models"
"""ModelSpec's word for the code whose names of tensors these are."""
TYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
}


SPEC = "modelspec.sai_model_spec"


def model_spec(kind: str, title: str, date: Any = None, **fields: str | None) -> dict[str, str]:
    """Metadata by Stability's ModelSpec 1.0.1, to which `write_tensors` adds the hash; fields of nothing are left out.

    `date` is when the model was made, by ISO 8601; what is none, and None, is the day of SOURCE_DATE_EPOCH or today.
    Source: Stability-AI/ModelSpec `README.md`.
    """
    try:
        day = datetime.fromisoformat(date) and date
    except (TypeError, ValueError):
        epoch = os.environ.get("SOURCE_DATE_EPOCH", "")
        day = datetime.fromtimestamp(int(epoch) if epoch.isdecimal() else time.time(), UTC).date().isoformat()
    known = {"architecture": kind, "implementation": IMPLEMENTATION, "title": title, "date": day, **fields}
    return {SPEC: "1.0.1"} | {f"modelspec.{key}": value for key, value in known.items() if value}


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write contiguous tensors of a CPU in an order that depends on their names alone; `model_spec` gets its hash.

    Errors: InputError for values that are not finite and for a disk that refuses; a file that was at `path` before is
    then unharmed.
    """
    wrong = [name for name, tensor in tensors.items() if tensor.dtype in FLOATING and not finite(tensor)]
    if wrong:
        kind = str(tensors[wrong[0]].dtype).removeprefix("torch.")
        raise InputError(f"nothing was written to {path}: {listed(wrong)} not finite in {kind}")
    order = sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))
    if SPEC in metadata:
        content = hashlib.sha256()
        for name in order:
            content.update(_data(tensors[name]))
        metadata = {**metadata, "modelspec.hash_sha256": f"0x{content.hexdigest()}"}
    header: dict[str, Any] = {"__metadata__": dict(metadata)}
    offset = 0
    for name in order:
        tensor = tensors[name]
        end = offset + tensor.numel() * tensor.element_size()
        header[name] = {"dtype": TYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [offset, end]}
        offset = end
    head = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
    head += b" " * (-len(head) % 8)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "wb") as file:
            file.write(len(head).to_bytes(8, "little") + head)
            for name in order:
                file.write(_data(tensors[name]))
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        raise InputError(f"{path} could not be written: {error.strerror or error}") from error
    finally:
        temporary.unlink(missing_ok=True)


def _data(tensor: Tensor) -> memoryview:
    return tensor.detach().cpu().reshape(-1).view(torch.uint8).numpy().data


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write a JSON object, keys in order; InputError where the disk refuses."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(dict(content), indent=2, sort_keys=True) + "\n", encoding="utf-8")
    except OSError as error:
        raise InputError(f"{path} could not be written: {error.strerror or error}") from error
