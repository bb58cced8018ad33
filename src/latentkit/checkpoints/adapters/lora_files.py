"""LoRA files: kohya's, diffusers' and peft's names of the changes of a model's weights, both ways.

Sources: kohya-ss/sd-scripts `networks/lora.py`; LyCORIS `modules/loha.py`; diffusers `state_dict_utils.py`; peft.
"""

import json
import math
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from safetensors import safe_open
from torch import Tensor

from latentkit.checkpoints.names import diffusers_names, ldm_names
from latentkit.checkpoints.names.rename import Pair, listed
from latentkit.checkpoints.names.tower_names import hugging_face_text
from latentkit.errors import InputError
from latentkit.model.latent_diffusion import LatentDiffusion
from latentkit.nets.lora import Change, Changes

Layout = Literal["kohya", "diffusers"]
UNET = "denoiser.unet."
KOHYA = {"lora_unet_": "unet", "lora_te_": "text_encoder", "lora_te1_": "text_encoder", "lora_te2_": "text_encoder_2"}
PARTS = ("unet", "text_encoder", "text_encoder_2")

LEAVES = {
    "lora_down.weight": "down", "lora_up.weight": "up", "lora_mid.weight": "middle", "alpha": "alpha",
    "dora_scale": "magnitude", "lora.down.weight": "down", "lora.up.weight": "up", "lora_A.weight": "down",
    "lora_B.weight": "up", "lora_A.default.weight": "down", "lora_B.default.weight": "up",
    "lora_magnitude_vector": "magnitude", "lora_magnitude_vector.weight": "magnitude",
    "lora_magnitude_vector.default.weight": "magnitude", "hada_w1_a": "up", "hada_w1_b": "down", "hada_t1": "middle",
    "hada_w2_a": "second up", "hada_w2_b": "second down", "hada_t2": "second middle",
    "lora_linear_layer.down.weight": "down", "lora_linear_layer.up.weight": "up",
}  # fmt: skip
"""The end of a tensor's name, and which part of a `Change` it is."""
PROCESSOR = re.compile(r"\.processor\.(to_[qkv]|to_out)_lora\.(down|up)\.weight$")
"""How diffusers named them in 2023."""
OLD_TEXT = {"to_q": "q_proj", "to_k": "k_proj", "to_v": "v_proj", "to_out": "out_proj"}


class Lora(NamedTuple):
    """The changes that a file holds, by the name of the weight in the model, and what the file says of itself."""

    name: str
    changes: Changes
    metadata: Mapping[str, str]


def layers(model: LatentDiffusion) -> dict[tuple[str, str], str]:
    """Our weight by (part, layer), the layer as diffusers and, for the U-Net, as CompVis name it, dots and all."""
    unet = model.denoiser.unet
    found: dict[tuple[str, str], str] = {}
    for pairs in (diffusers_names.unet_pairs(unet), ldm_names.unet_pairs(unet)):
        found |= {("unet", layer): UNET + weight for layer, weight in _weights(pairs)}
    clip = model.architecture.clip
    for index, tower in enumerate(clip.towers if clip else ()):
        part = PARTS[1 + index]
        ours = f"conditioners.text.towers.{index}."
        found |= {(part, layer): ours + weight for layer, weight in _weights(hugging_face_text(tower))}
    return found


def _weights(pairs: list[Pair]) -> Iterator[tuple[str, str]]:
    for pair in pairs:
        if pair.theirs.endswith(".weight") and len(pair.ours) == 1:
            yield pair.theirs.removesuffix(".weight"), pair.ours[0]


def read_lora(path: str | Path, model: LatentDiffusion) -> Lora:
    """The LoRA in a .safetensors, .pt or .bin file, for `model`.

    Pickles are read as plain values and tensors only. InputError names the layers that the model does not have, and
    what is missing, twice there, of the wrong shape or not finite.
    """
    path = Path(path)
    tensors, metadata = _tensors(path)
    found = layers(model)
    flat = {(part, layer.replace(".", "_")): ours for (part, layer), ours in found.items()}
    parts: dict[str, dict[str, Tensor]] = {}
    ranks: dict[str, float] = {}
    unknown: list[str] = []
    for key, tensor in tensors.items():
        place = _place(key)
        ours = None
        if place is not None:
            part, layer, kind, flattened = place
            ours = (flat if flattened else found).get((part, layer))
        if place is None or ours is None:
            unknown.append(key)
        elif kind in parts.setdefault(ours, {}):
            raise InputError(f"{path}: changes {ours} twice")
        else:
            peft = kind == "magnitude" and "dora_scale" not in key  # one for each output, however it is shaped
            parts[ours][kind] = tensor.flatten() if peft else tensor
            if (alpha := _alpha(metadata, part, layer)) is not None:
                ranks[ours] = alpha
    if unknown:
        raise InputError(
            f"{path}: {listed(unknown)} not known to this model, so the LoRA is for another kind or no LoRA; "
            "latentkit inspect says what a model is"
        )
    if not parts:
        raise InputError(f"{path}: holds no tensors")
    state = dict(model.named_parameters())
    changes = {ours: _change(path, ours, each, ranks.get(ours), state[ours]) for ours, each in parts.items()}
    return Lora(path.stem, changes, metadata)


def _place(key: str) -> tuple[str, str, str, bool] | None:
    """(part, layer, kind, whether dots are underscores) of a tensor; None where it is of no known form."""
    key = PROCESSOR.sub(lambda m: f".{m[1].replace('to_out', 'to_out.0')}.lora.{m[2]}.weight", key)
    leaf = next((leaf for leaf in LEAVES if key.endswith(f".{leaf}")), None)
    if leaf is None:
        return None
    layer = key.removesuffix(f".{leaf}")
    for prefix, part in KOHYA.items():
        if layer.startswith(prefix):
            return part, layer.removeprefix(prefix), LEAVES[leaf], True
    layer = layer.removeprefix("base_model.model.")
    part, _, below = layer.partition(".")
    if part not in PARTS:
        return "unet", layer, LEAVES[leaf], False
    if part != "unet":
        head, _, last = below.rpartition(".")
        below = f"{head}.{OLD_TEXT.get(last.removesuffix('_lora'), last)}"
        below = below if below.startswith("text_model.") or below == "text_projection" else f"text_model.{below}"
    return part, below, LEAVES[leaf], False


def _alpha(metadata: Mapping[str, str], part: str, layer: str) -> float | None:
    """The alpha that diffusers keeps in the metadata, for a layer."""
    told = metadata.get("lora_adapter_metadata")
    try:
        values = json.loads(told) if told else {}
        own = values.get(f"{part}.alpha_pattern") or {}
        by_layer = next((own[name] for name in own if layer == name or layer.endswith(f".{name}")), None)
        alpha = by_layer if by_layer is not None else values.get(f"{part}.lora_alpha")
        if alpha is None:
            return None
        return float(alpha) * (math.sqrt(values[f"{part}.r"]) if values.get(f"{part}.use_rslora") else 1)
    except (ValueError, TypeError, AttributeError, KeyError):
        raise InputError("the LoRA's metadata lora_adapter_metadata is damaged") from None


def _tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    try:
        if path.suffix.lower() == ".safetensors":
            with safe_open(path, "pt") as file:
                return {key: file.get_tensor(key) for key in file.keys()}, dict(file.metadata() or {})  # noqa: SIM118
        content: Any = torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror or error}", exit_code=2) from None
    except Exception as error:  # rubbish makes an unpickler raise anything
        first = (str(error).splitlines() or [""])[0][:200]
        raise InputError(f"{path}: is damaged, or holds more than tensors ({first})") from None
    if not isinstance(content, Mapping) or not all(isinstance(value, Tensor) for value in content.values()):
        raise InputError(f"{path}: is no LoRA: it holds other things than tensors")
    return {str(key): value for key, value in content.items()}, {}


def _change(path: Path, ours: str, parts: dict[str, Tensor], told: float | None, weight: Tensor) -> Change:
    """One weight's change; InputError where its parts do not make one."""
    if missing := {"down", "up"} - parts.keys():
        raise InputError(f"{path}: of the change of {ours}, {' and '.join(sorted(missing))} is missing")
    if wrong := [kind for kind, part in parts.items() if not torch.isfinite(part).all()]:
        raise InputError(f"{path}: of the change of {ours}, {' and '.join(wrong)} is not finite")
    alpha = float(parts["alpha"]) if "alpha" in parts else told

    def product(which: str) -> Change:
        up, middle = parts[f"{which}up"], parts.get(f"{which}middle")
        up = up.T if middle is not None and "second up" in parts else up  # LyCORIS keeps LoHa's so beside a middle
        return Change(parts[f"{which}down"], up, middle=middle)

    try:
        first = product("")
        second = product("second ") if "second up" in parts else None
        change = Change(first.down, first.up, alpha, first.middle, second, parts.get("magnitude"))
        fits = change.product().numel() == weight.numel() and len(change.up) == len(weight)
    except (KeyError, RuntimeError, IndexError) as error:
        shapes = {kind: tuple(part.shape) for kind, part in parts.items()}
        raise InputError(f"{path}: the change of {ours} has parts that do not fit each other: {shapes}") from error
    if not fits:
        raise InputError(f"{path}: the change of {ours} is of another shape than the weight {tuple(weight.shape)}")
    return change


def write_lora(
    path: str | Path, model: LatentDiffusion, changes: Changes, layout: Layout = "kohya", name: str | None = None
) -> None:
    """Write a LoRA of `model` to a new .safetensors file.

    Errors: InputError for a change that the layout cannot hold (diffusers: LoHa, a middle, a DoRA of inputs), or a file
    that is there.
    """
    from safetensors.torch import save

    path = Path(path)
    theirs: dict[str, tuple[str, str]] = {}
    for (part, layer), ours in reversed(layers(model).items()):  # diffusers' name comes first, and wins
        theirs[ours] = (part, layer)
    prefixes = {part: prefix for prefix, part in reversed(KOHYA.items())}
    if len(model.architecture.clip.towers if model.architecture.clip else ()) > 1:
        prefixes["text_encoder"] = "lora_te1_"
    tensors: dict[str, Tensor] = {}
    for ours, change in changes.items():
        part, layer = theirs[ours]
        if layout == "kohya":
            tensors |= _kohya(f"{prefixes[part]}{layer.replace('.', '_')}", change)
        else:
            tensors |= _diffusers(f"{part}.{layer}", ours, change)
    metadata = {"format": "pt"}
    if layout == "kohya":
        rank, alpha = {c.rank for c in changes.values()}, {c.alpha or float(c.rank) for c in changes.values()}
        metadata |= {
            "ss_network_module": "networks.lora",
            "ss_network_dim": str(rank.pop()) if len(rank) == 1 else "Dynamic",
            "ss_network_alpha": str(alpha.pop()) if len(alpha) == 1 else "Dynamic",
            "ss_output_name": name or path.stem,
        }
    data = save({key: value.clone(memory_format=torch.contiguous_format) for key, value in tensors.items()}, metadata)
    try:
        with open(path, "xb") as file:
            file.write(data)
    except FileExistsError:
        raise InputError(f"{path} exists and is not overwritten; name another file", exit_code=2) from None
    except OSError as error:
        path.unlink(missing_ok=True)  # half a file is none
        raise InputError(f"{path} could not be written: {error.strerror or error}") from None


def _kohya(place: str, change: Change) -> dict[str, Tensor]:
    tensors = {f"{place}.alpha": torch.tensor(float(change.rank if change.alpha is None else change.alpha))}
    if change.second is None:
        tensors |= {f"{place}.lora_down.weight": change.down, f"{place}.lora_up.weight": change.up}
        if change.middle is not None:
            tensors[f"{place}.lora_mid.weight"] = change.middle
    else:
        for number, each in ((1, change), (2, change.second)):
            up = each.up if each.middle is None else each.up.T
            tensors |= {f"{place}.hada_w{number}_a": up, f"{place}.hada_w{number}_b": each.down}
            if each.middle is not None:
                tensors[f"{place}.hada_t{number}"] = each.middle
    if change.magnitude is not None:
        tensors[f"{place}.dora_scale"] = change.magnitude
    return tensors


def _diffusers(place: str, ours: str, change: Change) -> dict[str, Tensor]:
    """peft's names; alpha goes into the second factor, so that it is the rank."""
    if change.second is not None or change.middle is not None:
        raise InputError(f"diffusers' layout holds no LoHa and no LoCon with a middle, as {ours} has; write kohya's")
    scale = 1.0 if change.alpha is None else change.alpha / change.rank
    up = change.up if scale == 1 else (change.up.float() * scale).to(change.up.dtype)
    tensors = {f"{place}.lora_A.weight": change.down, f"{place}.lora_B.weight": up}
    if change.magnitude is not None:
        if change.magnitude.shape[0] != len(change.up):
            raise InputError(f"diffusers' layout holds no DoRA with norms of inputs, as {ours} has; write kohya's")
        shape = (1, -1, 1, 1) if change.down.ndim == 4 else (-1,)
        tensors[f"{place}.lora_magnitude_vector.weight"] = change.magnitude.reshape(shape)
    return tensors
