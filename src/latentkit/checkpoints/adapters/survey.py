"""What an adapter file is, which family of models it is for, and how it is written in another layout, with proof.

And what any file holds that was given for another.
"""

import json
from collections import Counter
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from latentkit.checkpoints.adapters.control_files import layout_of, open_control, refuse, write_control
from latentkit.checkpoints.adapters.controlnet_names import PREFIX
from latentkit.checkpoints.adapters.inversions import read_inversion
from latentkit.checkpoints.adapters.lora_files import NAMES, Lora, lora_file, read_lora, write_lora
from latentkit.checkpoints.adapters.lora_names import place, stranger
from latentkit.checkpoints.adapters.tiny_files import is_tiny
from latentkit.checkpoints.diffusers_folder import is_folder
from latentkit.checkpoints.doctor.suspicion import suspicious, suspicious_changes, suspicious_control
from latentkit.checkpoints.files import Shapes
from latentkit.checkpoints.lone import lone_part
from latentkit.checkpoints.names.ldm_names import UNET
from latentkit.checkpoints.names.rename import FLOATING, finite, listed
from latentkit.checkpoints.storage.archive import read_archive, read_json, read_part
from latentkit.checkpoints.storage.folders import undone
from latentkit.errors import InputError, nearest
from latentkit.model.latent_diffusion import LatentDiffusion
from latentkit.model.presets import PRESETS
from latentkit.nets.lora import Change

Kind = Literal["LoRA", "ControlNet", "textual inversion"]
FAMILIES = {
    "Stable Diffusion 1": "sd1.5",
    "Stable Diffusion 2": "sd2.1",
    "Stable Diffusion XL": "sdxl",
    "XL's refiner": "sdxl-refiner",
}
"""Models that adapters are made for, and the presets of their shapes."""
LAYOUTS = {"LoRA": ("kohya", "diffusers", "ldm"), "ControlNet": ("ldm", "diffusers")}
TOLD = ("ss_base_model_version", "ss_sd_model_name", "ss_network_module", "ss_output_name", "modelspec.title")
"""Metadata that is repeated, as far as it is there."""
PARTS = {
    "denoiser.unet.": "U-Net",
    "conditioners.text.towers.0.": "text tower",
    "conditioners.text.towers.1.": "second text tower",
}


def kind_of(path: Path) -> Kind | None:
    """What adapter a file or folder holds, by its names; None for anything else, unreadable ones too."""
    try:
        if path.is_dir():
            config = path / "config.json"
            said = str(read_json(config).get("_class_name")) if config.exists() else ""
            if said.startswith("ControlNet"):
                return "ControlNet"
            return "LoRA" if any(file.stem in NAMES for file in path.iterdir()) else None
        tensors = read_archive(path).tensors
    except InputError:
        return None
    if layout_of({name.removeprefix(PREFIX): tensor for name, tensor in tensors.items()}):
        return "ControlNet"
    lora = any((put := place(name)) is not None and put.kind != "alpha" for name in tensors)
    if lora or (tensors and stranger(iter(tensors))):
        return "LoRA"
    alone = len(tensors) == 1 and all(tensor.ndim in (1, 2) for tensor in tensors.values())
    named = {"emb_params", "clip_l", "clip_g"} & tensors.keys()
    if alone or named or any(name.startswith("string_to_param.") for name in tensors):
        return "textual inversion"
    return None


def holding(path: Path) -> str | None:
    """What a file or folder holds, in words; None for what is not known, unreadable ones too."""
    try:
        if (kind := kind_of(path)) is not None:
            return f"a {kind}"
        if is_folder(path):
            return "a whole model"
        if is_tiny(path):
            return "a tiny autoencoder alone"
        if (lone := lone_part(path)) is not None:
            return f"{'an autoencoder' if lone.part == 'first stage' else 'a U-Net'} alone"
        if path.is_dir():
            said = read_json(path / "config.json")
            return f"a {str(said.get('_class_name') or said['architectures'][0])[:80]}"
        archive = read_archive(path)
        own = json.loads(archive.metadata.get("latentkit", "{}")).get("kind")
        if own == "autoencoder":
            return "an autoencoder alone"
        return "a whole model" if own or any(name.startswith(UNET) for name in archive.tensors) else None
    except (InputError, ValueError, AttributeError, LookupError, TypeError, OSError):
        return None


def instead(error: InputError, path: Path, *wanted: str) -> InputError:
    """What is to be said where what is `wanted` (the first, or others that will do) was not found at `path`."""
    found = holding(path)
    return error if found in (None, *wanted) else InputError(f"{path} is {found}; wanted is {wanted[0]}", exit_code=2)


def bases() -> Iterator[tuple[str, LatentDiffusion]]:
    """The families with a model of each that holds no values."""
    yield from ((title, _base(preset)) for title, preset in FAMILIES.items())


@cache
def _base(preset: str) -> LatentDiffusion:
    with torch.device("meta"), Shapes():
        return LatentDiffusion(PRESETS[preset].architecture, {})


def find_lora(path: Path, base: LatentDiffusion | None = None) -> tuple[str, LatentDiffusion, Lora]:
    """The LoRA, and the family (or the given model) that it fits; InputError says why it fits none."""
    if base is not None:
        return "the given model", base, read_lora(path, base)
    complaints = {}
    for title, model in bases():
        try:
            return title, model, read_lora(path, model)
        except InputError as error:
            complaints[title] = str(error).removeprefix(f"{path}: ")
    raise InputError(_fits_none(path, complaints))


def find_control(path: Path, base: LatentDiffusion | None = None) -> tuple[str, Any]:
    """The `ControlFile`, and the family (or the given model) that it fits; InputError says why it fits none."""
    if base is not None:
        found = open_control(path, base)
        refuse(path, found.complaints)
        return "the given model", found
    complaints = {}
    for title, model in bases():
        try:
            found = open_control(path, model)
        except InputError as error:
            complaints[title] = str(error).removeprefix(f"{path}: ")
            continue
        if not found.complaints:
            return title, found
        complaints[title] = "; ".join(found.complaints.lines())
    raise InputError(_fits_none(path, complaints))


def _fits_none(path: Path, complaints: dict[str, str]) -> str:
    """Of several families, what the one with the shortest list says; where all say the same, that."""
    title, why = min(complaints.items(), key=lambda item: len(item[1]))
    if len(set(complaints.values())) == 1:
        return f"{path}: {why}"
    what = f"{path}: fits no known family ({', '.join(FAMILIES)}); convert takes its model with --base"
    return f"{what}. As for {title}: {why}"


def report(path: Path, kind: Kind) -> dict[str, Any]:
    """What an adapter is, and all that is wrong with it."""
    found: dict[str, Any] = {"path": str(path), "kind": kind, "base": None, "wrong": [], "suspicious": {}}
    try:
        floating = {name: one for name, one in _tensors(path, kind).items() if one.dtype in FLOATING}
        if spoiled := [name for name, tensor in floating.items() if not finite(tensor)]:
            raise InputError(f"{listed(spoiled, None)} not finite")
        if kind == "LoRA":
            found |= _lora(path)
        elif kind == "ControlNet":
            found |= _control(path)
        else:
            name, vectors = read_inversion(path)
            found |= {"name": name, "vectors": [list(each.shape) for each in vectors]}
            found["suspicious"] = suspicious({f"tower {n + 1}.vectors": each for n, each in enumerate(vectors)})
            widths = {(768,): "Stable Diffusion 1", (1024,): "Stable Diffusion 2", (768, 1280): "Stable Diffusion XL"}
            found["base"] = widths.get(tuple(each.shape[1] for each in vectors))
    except InputError as error:
        found["wrong"] = [str(error).removeprefix(f"{path}: ")]
    return found


def _tensors(path: Path, kind: Kind) -> Mapping[str, Tensor]:
    if kind == "ControlNet" and path.is_dir():
        return read_part(path)
    return read_archive(lora_file(path)).tensors


def _lora(path: Path) -> dict[str, Any]:
    title, model, lora = find_lora(path)
    names = [name for name, one in model.named_parameters() if one.ndim > 1]
    parts = {
        part: f"{count} of {sum(name.startswith(prefix) for name in names)} weights"
        for prefix, part in PARTS.items()
        if (count := sum(name.startswith(prefix) for name in lora.changes))
    }
    changes = list(lora.changes.values())
    return {
        "base": title,
        "techniques": dict(Counter(technique(change) for change in changes)),
        "ranks": dict(sorted(Counter(change.rank for change in changes).items())),
        "alphas": sorted({float(change.rank if change.alpha is None else change.alpha) for change in changes}),
        "types": dict(Counter(str(change.up.dtype).removeprefix("torch.") for change in changes)),
        "parts": parts,
        "says": {key: lora.metadata[key][:200] for key in TOLD if key in lora.metadata},
        "suspicious": suspicious_changes(lora.changes),
    }


def technique(change: Change) -> str:
    """What a change is called."""
    if change.left is not None:
        name = "LoKr"
    elif change.second is not None:
        name = "LoHa"
    elif change.down is None:
        name = "difference"
    else:
        wide = change.middle is not None or (change.down.ndim == 4 and change.down[0, 0].numel() > 1)
        name = "LoCon" if wide else "LoRA"
    return name if change.magnitude is None else f"{name} with DoRA"


def _control(path: Path) -> dict[str, Any]:
    title, (network, layout, _) = find_control(path)
    count = 0 if network.fusion is None else len(network.fusion.kinds)
    asked = [
        word for word, on in (("pooled", network.pooled), ("blue first", network.bgr), ("short", network.short)) if on
    ]
    return {
        "base": title,
        "layout": layout,
        "hint_channels": network.hint_channels,
        "transformers": list(network.config.depth),
        "kinds": count,
        "ways": asked,
        "parameters": sum(one.numel() for one in network.parameters()),
        "types": dict(Counter(str(one.dtype).removeprefix("torch.") for one in network.parameters())),
        "suspicious": suspicious_control(network.state_dict()),
    }


def convert(source: Path, target: Path, kind: Kind, to: str, base: LatentDiffusion | None = None) -> str:
    """Write an adapter in another layout, read it back, and say what is proven of it.

    Errors: InputError for a layout that it is not written in or that cannot hold it, and where the two differ.
    """
    if to not in LAYOUTS.get(kind, ()):
        allowed = LAYOUTS.get(kind)
        if allowed is None:
            raise InputError(f"a {kind} is not converted: every program reads it as it is", exit_code=2)
        raise InputError(f"layout {to!r} is none of a {kind}; {nearest(to, allowed)}", exit_code=2)
    if target.exists():
        raise InputError(f"{target} exists and is not overwritten; name another", exit_code=2)
    with undone(target):
        return _converted(source, target, kind, to, base)


def _converted(source: Path, target: Path, kind: Kind, to: str, base: LatentDiffusion | None) -> str:
    if kind == "ControlNet":
        title, found = find_control(source, base)
        write_control(target, found.network, to)  # type: ignore[arg-type]
        expected, again = found.network.state_dict(), find_control(target, base)[1].network.state_dict()
        apart = [name for name in expected if not torch.equal(expected[name], again[name])]
        _refuse(target, apart)
        count = f"{len(expected)} of {len(expected)}"
        return f"{target}: a {kind} for {title}; read back, {count} tensors bit for bit the same"
    title, model, lora = find_lora(source, base)
    write_lora(target, model, lora.changes, to)  # type: ignore[arg-type]
    there = read_lora(target, model).changes
    exact, largest = 0, 0.0
    for name, change in lora.changes.items():
        if name not in there:
            _refuse(target, [name])
        error = _apart(change, there[name])
        exact += error == 0
        largest = max(largest, error)
    if largest > 1e-6:
        _refuse(target, [f"a change by {largest:.1e}"])
    rest = "" if exact == len(there) else f", the rest within {largest:.1e} of it (alpha was multiplied in)"
    return f"{target}: a {kind} for {title}; read back, {exact} of {len(there)} changes exactly the same{rest}"


def _refuse(target: Path, apart: list[str]) -> None:
    if apart:
        raise InputError(f"{target} is not what was to be written: {apart[0]} and {len(apart) - 1} more differ")


def _apart(one: Change, other: Change) -> float:
    """The relative difference of two changes' factors: alpha over rank goes with the last."""

    def factors(change: Change) -> list[torch.Tensor]:
        inner = [each for part in (change.second, change.left) if part is not None for each in factors(part)]
        kept = [part.double().flatten() for part in (change.down, change.middle, change.magnitude) if part is not None]
        return [change.up.double().flatten() * change.scale, *kept, *inner]

    pairs = list(zip(factors(one), factors(other), strict=True))
    return max(float((a - b).abs().max() / a.abs().max().clamp_min(1e-30)) for a, b in pairs)
