"""Files of tiny autoencoders: a half in each of two files, both in one, or diffusers' folder."""

import hashlib
from pathlib import Path

import torch
from torch import Tensor

from latentkit.checkpoints.files import Shapes, affordable
from latentkit.checkpoints.names.rename import taken
from latentkit.checkpoints.names.tiny_names import (
    AUTHOR,
    CLASS,
    layout_of,
    tiny_config,
    tiny_pairs,
    tiny_shape,
)
from latentkit.checkpoints.storage.archive import read_archive, read_json, read_part
from latentkit.checkpoints.storage.digest import Digest
from latentkit.errors import InputError
from latentkit.model.first_stage import FirstStage
from latentkit.nets.tiny import TinyAutoencoder

HALVES = {"encoder": "0.weight", "decoder": "1.weight"}
"""The first tensor of a file that holds one half alone."""


def is_tiny(path: Path) -> bool:
    """Whether a file or folder holds a tiny autoencoder, or half of one."""
    if path.is_dir():
        config = path / "config.json"
        return config.is_file() and read_json(config).get("_class_name") == CLASS
    names = read_archive(path).tensors
    return layout_of(names) is not None or _half(names) is not None


def read_tiny(path: str | Path, device: str | torch.device = "cpu", dtype: torch.dtype | None = None) -> FirstStage:
    """The first stage there, frozen; of one half in a file the other lies beside it. `dtype` None: as stored.

    Errors: InputError names all that is missing, left over or wrong.
    """
    path = Path(path)
    scale, shift = 1.0, 0.0
    tensors = read_part(path) if path.is_dir() else _whole(path)
    layout = layout_of(tensors)
    if layout is None:
        raise InputError(f"{path}: holds no tiny autoencoder (TAESD) by any name that is known")
    config = tiny_shape(tensors, str(path), layout)
    if path.is_dir():
        said, scale, shift = tiny_config(str(path / "config.json"), read_json(path / "config.json"))
        if said != config:
            raise InputError(f"{path}: its config.json describes {said}, its tensors are {config}")
    affordable(path, [config])
    with torch.device("meta"), Shapes():
        stage = FirstStage(config, config.picture_channels)
    network = stage.autoencoder
    assert isinstance(network, TinyAutoencoder)
    pairs = tiny_pairs(network, layout)
    state, complaints = taken(pairs, tensors, network.state_dict())
    complaints.unknown += sorted(tensors.keys() - {pair.theirs for pair in pairs})
    complaints.refuse(str(path))
    ready = {name: tensor.to(device, dtype or tensor.dtype) for name, tensor in state.items()}
    network.load_state_dict(ready, assign=True)
    stage.latent_mean = torch.full((config.latent_channels,), shift, device=device)
    stage.latent_std = torch.full((config.latent_channels,), 1 / scale, device=device)
    return stage.eval().requires_grad_(False)


def _half(names: dict[str, Tensor]) -> str | None:
    """Which half a file with such names holds alone."""
    if not any(name.endswith(".conv.0.weight") and name.split(".")[0].isdigit() for name in names):
        return None
    return next((half for half, first in HALVES.items() if first in names), None)


def _partner(path: Path, half: str) -> Path:
    """Where the other half of a tiny autoencoder lies beside the one in a file; the same path for an unlike name."""
    other = next(one for one in HALVES if one != half)
    return path.with_name(path.name.replace(half, other))


def tiny_digest(path: Path) -> str:
    """As `Digest`; of a tiny autoencoder in two files it is that of both, whichever of them is named."""
    own = Digest(path)()
    try:
        half = None if path.is_dir() else _half(read_archive(path).tensors)
    except InputError:  # whatever reads it next says what is wrong
        return own
    if half is None or (beside := _partner(path, half)) == path or not beside.is_file():
        return own
    return hashlib.sha256("".join(sorted([own, Digest(beside)()])).encode()).hexdigest()


def _whole(path: Path) -> dict[str, Tensor]:
    """The tensors of a file; of one half under the half's name, with those of the other half beside it."""
    tensors = read_archive(path).tensors
    half = _half(tensors)
    if half is None:
        return tensors
    other = next(one for one in HALVES if one != half)
    beside = _partner(path, half)
    if beside == path or not beside.is_file():
        wanted = beside.name if beside != path else f"the same name with {other!r}"
        raise InputError(f"{path}: holds the {half} alone; the {other} must lie beside it ({wanted})", exit_code=2)
    found = read_archive(beside).tensors
    if _half(found) != other:
        raise InputError(f"{beside}: holds no {other} of a tiny autoencoder, which was to go with {path.name}")
    prefixes = {"encoder": AUTHOR.encoder, "decoder": AUTHOR.decoder}
    return {
        prefixes[part] + name: one for part, held in ((half, tensors), (other, found)) for name, one in held.items()
    }
