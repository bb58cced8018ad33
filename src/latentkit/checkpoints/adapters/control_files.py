"""ControlNet files: a single file of either layout or a diffusers folder, read for a model and written.

Read too: files that hold a ControlNet's difference from its model, and control-LoRAs (Stability AI 2023), whose changes
of the model's weights are low-rank.
"""

import json
import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from latentkit.checkpoints.adapters.controlnet_names import FIRST, KINDS, PREFIX, Layout, controlnet_pairs
from latentkit.checkpoints.files import Shapes, affordable
from latentkit.checkpoints.names.diffusers_configs import unet_json
from latentkit.checkpoints.names.rename import Complaints, given, taken
from latentkit.checkpoints.storage.archive import read_archive, read_json, read_part
from latentkit.checkpoints.storage.folders import whole_folder
from latentkit.checkpoints.storage.tensors import write_json, write_tensors
from latentkit.errors import InputError
from latentkit.model.latent_diffusion import LatentDiffusion
from latentkit.nets.controlnet import HINT_WIDTHS, ControlNet
from latentkit.nets.unet import UNetConfig

DIFFERENCE, LORA = "difference", "lora_controlnet"
"""Entries that say that a file holds no whole weights."""
POOLED, ORDER = "global_pool_conditions", "controlnet_conditioning_channel_order"
"""Fields of diffusers' config, and of our metadata, that leave no trace in weights."""
CLASSES = ("ControlNetModel", "ControlNetUnionModel")
WEIGHTS = "diffusion_pytorch_model.safetensors"
STRANGERS = {
    "lllite_": "a ControlNet-LLLite",
    "adapter.body.": "a T2I-Adapter",
    "body.0.": "a T2I-Adapter",
    "ip_adapter": "an IP-Adapter",
    "image_proj": "an IP-Adapter",
}
"""Beginnings of names in files of other techniques, which are not run."""


class ControlFile(NamedTuple):
    """A ControlNet as it is stored, its layout, and what did not fit."""

    network: ControlNet
    layout: Layout
    complaints: Complaints


def read_control(path: str | Path, model: LatentDiffusion) -> ControlNet:
    """The ControlNet in a file or folder, for `model`: on its device, in its type.

    Errors: InputError names what is missing, left over or of another shape than this model's ControlNet has.
    """
    network, _, complaints = open_control(path, model)
    refuse(path, complaints)
    like = model.denoiser.unet.conv_in.weight
    return network.to(like.device, like.dtype)


def refuse(path: str | Path, complaints: Complaints) -> None:
    """InputError where the file does not hold the ControlNet."""
    if complaints:
        raise InputError(f"{path}: is no ControlNet for this model: " + "; ".join(complaints.lines()))


def open_control(path: str | Path, model: LatentDiffusion) -> ControlFile:
    """The same in the file's own types, on the CPU; errors only where there is no ControlNet at all."""
    path = Path(path)
    tensors, said = _read(path)
    layout = layout_of(tensors)
    if layout is None:
        seeming = [kind for start, kind in STRANGERS.items() if any(name.startswith(start) for name in tensors)]
        instead = f"; it seems to be {seeming[0]}, which is not run" if seeming else ""
        raise InputError(f"{path}: is no ControlNet: it has neither {' nor '.join(FIRST.values())}{instead}")
    config = replace(model.architecture.network, channels_in=model.first_stage.latent_channels)
    own = model.denoiser.unet.state_dict()
    relative = tensors.pop(DIFFERENCE, None) is not None
    low_rank = tensors.pop(LORA, None) is not None
    first, kinds = tensors[FIRST[layout]], tensors.get(KINDS)
    if not (low_rank or config.plain_attention):
        depth, middle_depth = _depths(tensors, config, layout)
        config = replace(config, depth=depth, middle_depth=middle_depth or depth[-1] or 1)
    affordable(path, [config])
    middle = ("middle_block.2.", "mid_block.resnets.1.")[layout == "diffusers"]
    short = not low_rank and not any(name.startswith(middle) for name in tensors)
    with torch.device("meta"), Shapes():
        network = ControlNet(
            config, first.shape[1], kinds=0 if kinds is None or kinds.ndim != 2 else len(kinds), short=short
        )
    pairs = controlnet_pairs(network, layout)
    expected = network.state_dict()
    if relative or low_rank:
        if model.denoiser.unet.conv_in.weight.is_meta:
            what = "a control-LoRA" if low_rank else "the difference from a model"
            raise InputError(f"{path}: holds {what}; name the model that it was made for", exit_code=2)
        bases = {pair.theirs: own[pair.ours[0]] for pair in pairs if pair.ours[0] in own}
        tensors = _whole(tensors, bases) if low_rank else {n: _sum(t, bases.get(n)) for n, t in tensors.items()}
    state, complaints = taken(pairs, tensors, expected)
    complaints.unknown += tensors.keys() - {pair.theirs for pair in pairs}
    network.pooled, network.bgr = bool(said.get(POOLED, False)), said.get(ORDER, "rgb") == "bgr"
    if not complaints:
        network.load_state_dict(state, assign=True)
    return ControlFile(network.eval().requires_grad_(False), layout, complaints)


def layout_of(tensors: Mapping[str, Tensor]) -> Layout | None:
    """The layout of a ControlNet's tensors; None where they are none."""
    found: tuple[Layout, ...] = ("ldm", "diffusers")
    return next((layout for layout in found if FIRST[layout] in tensors and tensors[FIRST[layout]].ndim == 4), None)


def _read(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors without `PREFIX`, and the fields that leave no trace in them."""
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise InputError(f"{path}: is no ControlNet: diffusers' folder of one has a config.json beside its weights")
        said = read_json(path / "config.json")
        if said.get("_class_name", CLASSES[0]) not in CLASSES:
            got = str(said["_class_name"])[:80]
            raise InputError(f"{path}: is of the class {got!r}; known are {', '.join(CLASSES)}")
        tensors = read_part(path)
    else:
        archive = read_archive(path)
        told, tensors = archive.metadata, archive.tensors
        said = {POOLED: told.get(POOLED) == "true", ORDER: told.get(ORDER, "rgb")}
    if not isinstance(said.get(POOLED, False), bool) or said.get(ORDER, "rgb") not in ("rgb", "bgr"):
        got = " and ".join(f"{name} {str(said.get(name))[:80]!r}" for name in (POOLED, ORDER))
        raise InputError(f"{path}: has {got}; neither is run")
    if any(name.startswith(PREFIX) for name in tensors):
        tensors = {
            name.removeprefix(PREFIX): tensor
            for name, tensor in tensors.items()
            if name.startswith(PREFIX) or name in (DIFFERENCE, LORA)
        }
    return dict(tensors), said


def _depths(tensors: Mapping[str, Tensor], config: UNetConfig, layout: Layout) -> tuple[tuple[int, ...], int]:
    """Transformer blocks by level, and in the middle: small ControlNets have fewer than their model."""
    found: dict[str, set[str]] = {}
    for name in tensors:
        if match := re.match(r"(.*?)\.transformer_blocks\.(\d+)\.", name):
            found.setdefault(match[1], set()).add(match[2])
    step = config.blocks + 1
    places, middle = {
        "ldm": ("input_blocks.{0}.1", "middle_block.1"),
        "diffusers": ("down_blocks.{1}.attentions.0", "mid_block.attentions.0"),
    }[layout]
    levels = range(len(config.depth))
    depth = tuple(len(found.get(places.format(1 + level * step, level), ())) for level in levels)
    return depth, len(found.get(middle, ()))


def _sum(tensor: Tensor, base: Tensor | None) -> Tensor:
    """A weight of its difference; whatever has another shape is left to be complained of."""
    return tensor if base is None or base.numel() != tensor.numel() else tensor + base.to(tensor).reshape(tensor.shape)


def _whole(tensors: Mapping[str, Tensor], bases: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A control-LoRA's weights: the model's own, changed by `up` and `down`, where it does not hold them itself."""
    whole = {name: tensor for name, tensor in tensors.items() if not name.endswith((".up", ".down"))}
    for name, base in bases.items():
        layer = name.removesuffix(".weight")
        up, down = tensors.get(f"{layer}.up"), tensors.get(f"{layer}.down")
        if name in whole:
            continue
        if up is not None and down is not None and name.endswith(".weight"):
            fits = up.ndim > 1 and down.ndim > 1 and up.shape[1] == down.shape[0]
            if not fits or len(up) * down[0].numel() != base.numel():
                whole[f"{layer}.up"] = up  # complained of, by its name
                continue
            base = base.float() + (up.float().flatten(1) @ down.float().flatten(1)).reshape(base.shape)
        whole[name] = base
    used = {name.removesuffix(".weight") for name in bases}
    return whole | {
        n: t for n, t in tensors.items() if n.endswith((".up", ".down")) and n.rpartition(".")[0] not in used
    }


def write_control(path: str | Path, network: ControlNet, layout: Layout) -> None:
    """Write a ControlNet as one file of the released code's layout, or as diffusers' folder.

    Errors: InputError for what the layout cannot hold.
    """
    path = Path(path)
    tensors = given(controlnet_pairs(network, layout), network.state_dict())
    if layout == "ldm":
        said = {POOLED: json.dumps(network.pooled), ORDER: "bgr" if network.bgr else "rgb"}
        write_tensors(path, {PREFIX + name: tensor for name, tensor in tensors.items()}, {"format": "pt", **said})
        return
    config = _json(network)
    with whole_folder(path) as new:
        write_tensors(new / WEIGHTS, tensors, {"format": "pt"})
        write_json(new / "config.json", config)


def _json(network: ControlNet) -> dict[str, Any]:
    """diffusers' config of a ControlNet."""
    left = ("dropout", "out_channels", "sample_size", "time_embedding_dim", "up_block_types", "center_input_sample")
    fields = {name: value for name, value in unet_json(network.config, 0).items() if name not in left}
    fields |= {
        "_class_name": CLASSES[0],
        "conditioning_channels": network.hint_channels,
        "conditioning_embedding_out_channels": list(HINT_WIDTHS),
        ORDER: "bgr" if network.bgr else "rgb",
        POOLED: network.pooled,
    }
    if network.short:
        fields["mid_block_type"] = "UNetMidBlock2D"
    if network.fusion is not None:
        del fields["mid_block_type"]
        width = network.config.channels
        fields |= {
            "_class_name": CLASSES[1],
            "num_control_type": len(network.fusion.kinds),
            "num_trans_channel": width,
            "num_proj_channel": width,
            "num_trans_head": 8,
            "num_trans_layer": len(network.fusion.blocks),
        }
    return fields
