"""What differs between two models, parts or adapters: weights, shapes and what else they say, by name."""

from collections.abc import Iterator, Mapping
from dataclasses import asdict, is_dataclass
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from latentkit.checkpoints.adapters.inversions import read_inversion
from latentkit.checkpoints.adapters.survey import find_control, find_lora, kind_of
from latentkit.checkpoints.adapters.tiny_files import is_tiny, read_tiny
from latentkit.checkpoints.layouts import open_model
from latentkit.checkpoints.lone import lone_part
from latentkit.checkpoints.probe import settle
from latentkit.model.latent_diffusion import LatentDiffusion
from latentkit.nets.lora import Change


class Compared(NamedTuple):
    """What a file holds, under our names."""

    kind: str
    weights: dict[str, Tensor]
    said: dict[str, Any]
    """All else in which two of a kind may differ."""


def compared(path: Path, base: LatentDiffusion | None = None) -> Compared:
    """What is at `path`, whole model, part or adapter (of `base`, or of a known family); InputError as in `inspect`."""
    kind = kind_of(path)
    if kind == "LoRA":
        _, _, lora = find_lora(path, base)
        return Compared(kind, dict(_changes(lora.changes)), {})
    if kind == "ControlNet":
        network = find_control(path, base)[1].network
        said = {"pooled": network.pooled, "blue first": network.bgr, "short": network.short}
        return Compared(kind, network.state_dict(), asdict(network.config) | said)
    if kind == "textual inversion":
        _, vectors = read_inversion(path)
        return Compared(kind, {f"vectors of tower {index + 1}": part for index, part in enumerate(vectors)}, {})
    if is_tiny(path):
        stage = read_tiny(path)
        assert stage.autoencoder is not None
        return Compared("tiny autoencoder", stage.state_dict(), asdict(stage.autoencoder.config))
    if (lone := lone_part(path)) is not None:
        lone.complaints.refuse(str(path))
        said = asdict(lone.config) | {"statistics": lone.statistics and list(lone.statistics)}
        return Compared(f"{lone.part} alone", lone.state, said)
    opened = open_model(path)
    if not opened.certain:
        settle(opened.model, str(path))
    return Compared("model", opened.model.state_dict(), asdict(opened.model.architecture) | opened.model.state())


def _changes(changes: Mapping[str, Change]) -> Iterator[tuple[str, Tensor]]:
    """What a LoRA adds to each weight, and the magnitudes of DoRA."""
    for name, change in changes.items():
        yield name, change.product() * change.scale
        if change.magnitude is not None:
            yield f"{name}, magnitude", change.magnitude


def fields_apart(one: Any, other: Any) -> dict[str, tuple[Any, Any]]:
    """The fields in which two configs or mappings differ, of nested ones as `outer.inner`, with what each has."""
    first, second = (_flat(asdict(part) if is_dataclass(part) else part) for part in (one, other))  # type: ignore[arg-type]
    names = [name for name in first | second if first.get(name) != second.get(name)]
    return {name: (first.get(name), second.get(name)) for name in names}


def _flat(fields: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in fields.items():
        if isinstance(value, Mapping):
            found |= _flat(value, f"{prefix}{name}.")
        elif isinstance(value, list | tuple) and any(isinstance(part, Mapping) for part in value):
            found |= _flat(dict(zip(map(str, range(len(value))), value)), f"{prefix}{name}.")
        else:
            found[prefix + name] = value
    return found
