"""Textual inversions: vectors that a name in a prompt stands for, in every layout that they are found in."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from latentkit.checkpoints.names.rename import FLOATING
from latentkit.checkpoints.storage.archive import read_archive, refuse_other
from latentkit.errors import InputError

MOST_BYTES = 1 << 26
TOWERS = ("clip_l", "clip_g")


class Inversion(NamedTuple):
    """The name, and vectors `n d` for each text tower (SD XL: L's, then bigG's)."""

    name: str
    vectors: tuple[Tensor, ...]


def read_inversion(path: Path, name: str | None = None) -> Inversion:
    """The textual inversion in a .safetensors, .pt or .bin file; `name` wins over the file's own.

    Pickles are read as plain values and tensors only. InputError says what is wrong with the file.
    """
    try:
        refuse_other(path)
        if path.stat().st_size > MOST_BYTES:
            raise InputError(f"{path}: is larger than {MOST_BYTES >> 20} MB: it is no textual inversion")
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror or error}", exit_code=2) from None
    archive = read_archive(path)
    content: dict[str, Any] = dict(archive.tensors)
    if all(key.startswith("string_to_") for key in content):  # flattened; A1111 also writes string_to_token
        nested = {key: value for key, value in content.items() if key.startswith("string_to_param.")}
        content = {"string_to_param": nested, "name": archive.values.get("name")}
    own, vectors = inversion(str(path), content)
    return Inversion(name or own or path.stem, vectors)


def inversion(what: str, content: Any) -> tuple[str | None, tuple[Tensor, ...]]:
    """Name (where it has one) and vectors of a file's content; InputError where it is no textual inversion.

    Layouts: AUTOMATIC1111's `string_to_param` (.pt) and `emb_params` (.safetensors); SD XL's `clip_l` and `clip_g`;
    diffusers' one tensor under the name itself.
    """
    tensors: list[Any] = []
    name: Any = None
    if isinstance(content, Mapping):
        if isinstance(content.get("string_to_param"), Mapping):
            tensors, name = list(content["string_to_param"].values()), content.get("name")
        elif "emb_params" in content:
            tensors = [content["emb_params"]]
        elif TOWERS[0] in content or TOWERS[1] in content:
            tensors = [content[tower] for tower in TOWERS if tower in content]
        elif len(content) == 1:
            ((name, tensor),) = content.items()
            tensors = [tensor]
    vectors = [tensor.detach() for tensor in tensors if isinstance(tensor, Tensor)]
    vectors = [tensor[None] if tensor.ndim == 1 else tensor for tensor in vectors]
    flat = all(tensor.ndim == 2 and tensor.numel() and tensor.dtype in FLOATING for tensor in vectors)
    if not vectors or len(vectors) != len(tensors) or not flat or len({len(tensor) for tensor in vectors}) > 1:
        kinds = sorted(map(str, content))[:5] if isinstance(content, Mapping) else type(content).__name__
        raise InputError(f"{what}: is no textual inversion (it holds {kinds})")
    if not all(torch.isfinite(tensor).all() for tensor in vectors):
        raise InputError(f"{what}: holds vectors that are not finite ({', '.join(sorted(map(str, content)))})")
    return (name if isinstance(name, str) else None), tuple(vectors)
