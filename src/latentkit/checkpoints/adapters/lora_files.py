"""LoRA files: the changes of a model's weights by kohya's, LyCORIS's, diffusers' and peft's names, both ways."""

import json
import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from latentkit.checkpoints.adapters.lora_names import KOHYA, layers, layers_of, place, stranger
from latentkit.checkpoints.ldm_file import spec_name
from latentkit.checkpoints.names.rename import FLOATING, listed
from latentkit.checkpoints.storage.archive import read_archive, read_json
from latentkit.checkpoints.storage.tensors import model_spec, write_tensors
from latentkit.errors import InputError
from latentkit.model.latent_diffusion import LatentDiffusion
from latentkit.nets.lora import Change, Changes

Layout = Literal["kohya", "diffusers", "ldm"]
"""kohya's names of tensors with diffusers' of layers, diffusers' own, or kohya's with the released code's of layers."""

SECOND = {"second up", "second down"}
NAMES = ("pytorch_lora_weights", "adapter_model")
"""What a LoRA's file in a folder is called by diffusers and by peft."""
TERMS = "adapter_config.json"
"""Where peft keeps what it does not write into the file."""


class Lora(NamedTuple):
    """The changes that a file holds, by the name of the weight in the model, and what the file says of itself."""

    name: str
    changes: Changes
    metadata: Mapping[str, str]


def read_lora(path: str | Path, model: LatentDiffusion) -> Lora:
    """The LoRA in a file, or alone in a folder, for `model`, of whose weights the shapes alone count.

    Errors: InputError names the layers that the model does not have, and what is missing, twice there, of the wrong
    shape or not finite.
    """
    path = lora_file(Path(path))
    archive = read_archive(path)
    terms = _terms(path, archive.metadata) | _beside(path)
    found = layers(model)
    flat = {(part, layer.replace(".", "_")): ours for (part, layer), ours in found.items()}
    parts: dict[str, dict[str, Tensor]] = {}
    keys: dict[str, list[str]] = {}
    ranks: dict[str, float] = {}
    unknown: list[str] = []
    for key, tensor in archive.tensors.items():
        put = place(key)
        ours = None if put is None else (flat if put.flat else found).get((put.part, put.layer))
        if put is None or ours is None:
            unknown.append(key)
        elif put.kind in parts.setdefault(ours, {}):
            raise InputError(f"{path}: changes {ours} twice")
        else:
            peft = put.kind == "magnitude" and "dora_scale" not in key  # one for each output, however it is shaped
            parts[ours][put.kind] = tensor.flatten() if peft else tensor
            keys.setdefault(ours, []).append(key)
            if (alpha := _alpha(path, terms, put.part, put.layer)) is not None:
                ranks[ours] = alpha
    if unknown and (kind := stranger(iter(sorted(unknown)))):
        raise InputError(f"{path}: holds {kind}, which is not run; LoRA, LoCon, LoHa, LoKr, DoRA and differences are")
    if unknown:
        raise InputError(
            f"{path}: {listed(unknown)} not known to this model, so the LoRA is for another kind or no LoRA; "
            "latentkit inspect says what a model is"
        )
    if not parts:
        raise InputError(f"{path}: holds no tensors")
    state = dict(model.named_parameters())
    changes = {}
    for ours, each in parts.items():
        try:
            changes[ours] = _change(path, ours, each, ranks.get(ours), state[ours])
        except InputError as error:
            raise InputError(f"{error} (there: {', '.join(sorted(keys[ours]))})") from error
    return Lora(path.stem, changes, archive.metadata)


def _terms(path: Path, metadata: Mapping[str, str]) -> dict[str, Any]:
    """What diffusers keeps in the metadata."""
    try:
        terms = json.loads(metadata.get("lora_adapter_metadata") or "{}")
    except (ValueError, RecursionError):
        terms = None
    if not isinstance(terms, dict):
        raise InputError(f"{path}: its metadata lora_adapter_metadata is damaged")
    return terms


def lora_file(path: Path) -> Path:
    """The file itself, or that of a folder as diffusers and peft lay it out; InputError where there is no such one."""
    if not path.is_dir():
        return path
    known = [path / f"{name}{ending}" for name in NAMES for ending in (".safetensors", ".bin")]
    found = [file for file in known if file.is_file()][:1] or sorted(path.glob("*.safetensors"))
    if len(found) != 1:
        raise InputError(f"{path}: is a folder with {len(found)} .safetensors files; a LoRA's has one", exit_code=2)
    return found[0]


def _beside(path: Path) -> dict[str, Any]:
    """What peft says of a U-Net's adapter beside it."""
    config = path.with_name(TERMS)
    if path.stem != NAMES[1] or not config.is_file():
        return {}
    said = read_json(config)
    return {f"unet.{name}": value for name, value in ({"lora_alpha": said.get("alpha")} | said).items()}


def _alpha(path: Path, terms: Mapping[str, Any], part: str, layer: str) -> float | None:
    """The alpha that diffusers keeps in the metadata, for a layer: by its whole name or the end of it, or for all."""
    names = layer.split(".")
    ends = [".".join(names[start:]) for start in range(len(names))]
    try:
        own = dict(terms.get(f"{part}.alpha_pattern") or {})
        alpha = next((own[name] for name in ends if name in own), terms.get(f"{part}.lora_alpha"))
        if alpha is None:
            return None
        return float(alpha) * (math.sqrt(terms[f"{part}.r"]) if terms.get(f"{part}.use_rslora") else 1)
    except (ValueError, TypeError, LookupError, OverflowError):
        raise InputError(f"{path}: its metadata lora_adapter_metadata is damaged") from None


def _change(path: Path, ours: str, parts: dict[str, Tensor], told: float | None, weight: Tensor) -> Change:
    """One weight's change; InputError where its parts do not make one."""
    what = f"{path}: of the change of {ours}, "
    for wrong, names in (
        ("missing", {"up"} - parts.keys()),
        ("missing", {"down"} - parts.keys() if "middle" in parts or "second up" in parts else ()),
        ("missing", SECOND - parts.keys() if SECOND & parts.keys() else ()),
        ("missing", ["left up"] if "left down" in parts and "left up" not in parts else ()),
        ("not of floating type", [kind for kind, part in parts.items() if part.dtype not in FLOATING]),
        ("not finite", [n for n, one in parts.items() if one.dtype in FLOATING and not torch.isfinite(one).all()]),
        ("empty", [kind for kind, part in parts.items() if not part.numel()]),
    ):
        if names:
            raise InputError(f"{what}{' and '.join(sorted(names))} is {wrong}")
    whole = "down" not in parts
    if whole and "left up" not in parts and parts["up"].numel() != weight.numel():
        raise InputError(f"{what}down is missing")
    alpha = told
    if "alpha" in parts:
        alpha = float(parts["alpha"]) if parts["alpha"].numel() == 1 else -1.0
    if alpha is not None and not 0 < alpha < math.inf:
        raise InputError(f"{what}alpha is no number above 0")

    def product(which: str) -> Change:
        down, up, middle = (parts.get(f"{which}{name}") for name in ("down", "up", "middle"))
        assert up is not None
        lycoris = "second up" in parts or "left up" in parts  # which keeps it so beside a middle
        return Change(down, up.T if middle is not None and lycoris else up, middle=middle)

    try:
        left = product("left ") if "left up" in parts else None
        if whole:  # of rank 1, whatever LyCORIS divides by
            alpha = alpha / left.rank if alpha and left is not None and left.down is not None else None
        second = product("second ") if "second up" in parts else None
        change = replace(product(""), alpha=alpha, second=second, left=left, magnitude=parts.get("magnitude"))
        change.shapes().applied(weight.to("meta"), 1.0)
    except (RuntimeError, IndexError) as error:
        shapes = {kind: tuple(part.shape) for kind, part in parts.items()}
        raise InputError(f"{path}: the change of {ours} has parts that do not fit each other: {shapes}") from error
    except InputError as error:
        raise InputError(f"{path}: {ours}: {error}") from None
    return change


def write_lora(
    path: str | Path, model: LatentDiffusion, changes: Changes, layout: Layout = "kohya", name: str | None = None
) -> None:
    """Write a LoRA of `model` to a new .safetensors file.

    Errors: InputError for a change that the layout cannot hold (diffusers: all but LoRA, and a DoRA of inputs), or a
    file that is there.
    """
    path = Path(path)
    if path.exists():
        raise InputError(f"{path} exists and is not overwritten; name another file", exit_code=2)
    named = layers_of(model, "ldm" if layout == "ldm" else "diffusers")
    theirs = {ours: both for both, ours in named.items()}
    prefixes = {part: prefix for prefix, part in reversed(KOHYA.items())}
    if len(model.architecture.clip.towers if model.architecture.clip else ()) > 1:
        prefixes["text_encoder"] = "lora_te1_"
    tensors: dict[str, Tensor] = {}
    for ours, change in changes.items():
        part, layer = theirs[ours]
        if layout == "diffusers":
            tensors |= _diffusers(f"{part}.{layer}", ours, change)
        else:
            tensors |= _kohya(f"{prefixes[part]}{layer.replace('.', '_')}", change)
    kind = f"{spec_name(model.architecture)}/lora"
    metadata = {"format": "pt", **model_spec(kind, name or path.stem)}
    if layout != "diffusers":
        rank, alpha = {c.rank for c in changes.values()}, {c.alpha or float(c.rank) for c in changes.values()}
        metadata |= {
            "ss_network_module": "networks.lora" if all(_plain(c) for c in changes.values()) else "lycoris.kohya",
            "ss_network_dim": str(rank.pop()) if len(rank) == 1 else "Dynamic",
            "ss_network_alpha": str(alpha.pop()) if len(alpha) == 1 else "Dynamic",
            "ss_output_name": name or path.stem,
        }
    write_tensors(path, {key: value.contiguous() for key, value in tensors.items()}, metadata)


def _plain(change: Change) -> bool:
    return change.second is None and change.left is None and change.down is not None


def _kohya(place: str, change: Change) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    if change.left is not None or change.down is not None:
        alpha = float(change.rank if change.alpha is None else change.alpha)
        tensors[f"{place}.alpha"] = torch.tensor(alpha)
    if change.magnitude is not None:
        tensors[f"{place}.dora_scale"] = change.magnitude
    if change.left is not None:
        for number, each in ((1, change.left), (2, change)):
            up = each.up if each.middle is None else each.up.T
            tensors[f"{place}.lokr_w{number}{'' if each.down is None else '_a'}"] = up
            tensors |= {} if each.down is None else {f"{place}.lokr_w{number}_b": each.down}
            tensors |= {} if each.middle is None else {f"{place}.lokr_t{number}": each.middle}
        if change.down is None:  # LyCORIS then divides by the other factor's rank
            tensors[f"{place}.alpha"] *= change.left.rank
    elif change.second is not None:
        for number, each in ((1, change), (2, change.second)):
            assert each.down is not None
            up = each.up if each.middle is None else each.up.T
            tensors |= {f"{place}.hada_w{number}_a": up, f"{place}.hada_w{number}_b": each.down}
            tensors |= {} if each.middle is None else {f"{place}.hada_t{number}": each.middle}
    elif change.down is None:
        tensors[f"{place}.diff"] = change.up
    else:
        tensors |= {f"{place}.lora_down.weight": change.down, f"{place}.lora_up.weight": change.up}
        tensors |= {} if change.middle is None else {f"{place}.lora_mid.weight": change.middle}
    return tensors


def _diffusers(place: str, ours: str, change: Change) -> dict[str, Tensor]:
    """peft's names; alpha goes into the second factor, in a type that holds it exactly if one does."""
    if not _plain(change) or change.middle is not None or change.down is None:
        raise InputError(f"diffusers' layout holds no LoHa, LoKr, difference or middle, as {ours} has; write kohya's")
    up = change.up
    if change.scale != 1:
        wide = up.float() * change.scale
        up = wide.to(up.dtype) if torch.equal(wide.to(up.dtype).float(), wide) else wide
    tensors = {f"{place}.lora_A.weight": change.down, f"{place}.lora_B.weight": up}
    if change.magnitude is not None:
        if change.magnitude.shape[0] != len(change.up):
            raise InputError(f"diffusers' layout holds no DoRA with norms of inputs, as {ours} has; write kohya's")
        shape = (1, -1, 1, 1) if change.down.ndim == 4 else (-1,)
        tensors[f"{place}.lora_magnitude_vector.weight"] = change.magnitude.reshape(shape)
    return tensors
