"""ControlNet files: the names of lllyasviel's released code and of diffusers, and their reading.

Source of the names: lllyasviel/ControlNet `cldm/cldm.py`; diffusers `ControlNetModel`.
"""

from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from latentkit.checkpoints.files import Shapes
from latentkit.checkpoints.names import diffusers_names, ldm_names
from latentkit.checkpoints.names.rename import Pair, paired, taken
from latentkit.checkpoints.storage.archive import read_archive, read_json, read_part
from latentkit.errors import InputError
from latentkit.model.latent_diffusion import LatentDiffusion
from latentkit.nets.controlnet import ControlNet

PREFIX = "control_model."
"""Before the names in the released code's whole checkpoints; files of a ControlNet alone may lack it."""
FIRST = {"ldm": "input_hint_block.0.weight", "diffusers": "controlnet_cond_embedding.conv_in.weight"}
"""The first convolution over the hint, by layout."""
REFUSED = {"global_pool_conditions": (False,), "controlnet_conditioning_channel_order": ("rgb",)}
"""Fields of diffusers' config, and the only values with which it is this network."""


def controlnet_pairs(network: ControlNet, layout: Literal["ldm", "diffusers"]) -> list[Pair]:
    """Every parameter of the ControlNet beside its name in a layout, without `PREFIX` before it."""
    shared = (ldm_names if layout == "ldm" else diffusers_names).unet_pairs(network)
    return [*shared, *paired(_ldm(network) if layout == "ldm" else _diffusers(network), network.state_dict())]


def _ldm(network: ControlNet) -> Iterator[tuple[str, str | Pair]]:
    yield from ((f"hint.{index}", f"input_hint_block.{2 * index}") for index in range(len(network.hint)))
    yield from ((f"skips.{index}", f"zero_convs.{index}.0") for index in range(len(network.skips)))
    yield "middle_out", "middle_block_out.0"


def _diffusers(network: ControlNet) -> Iterator[tuple[str, str | Pair]]:
    last = len(network.hint) - 1
    for index in range(last + 1):
        place = {0: "conv_in", last: "conv_out"}.get(index, f"blocks.{index - 1}")
        yield f"hint.{index}", f"controlnet_cond_embedding.{place}"
    yield from ((f"skips.{index}", f"controlnet_down_blocks.{index}") for index in range(len(network.skips)))
    yield "middle_out", "controlnet_mid_block"


def read_control(path: str | Path, model: LatentDiffusion) -> ControlNet:
    """The ControlNet in a file of either layout or a diffusers folder, for `model`: on its device, in its type.

    Errors: InputError names what is missing, left over or of another shape than this model's ControlNet has.
    """
    path = Path(path)
    tensors: Mapping[str, Tensor] = _folder(path) if path.is_dir() else read_archive(path).tensors
    if any(name.startswith(PREFIX) for name in tensors):
        tensors = {name.removeprefix(PREFIX): tensors[name] for name in tensors if name.startswith(PREFIX)}
    layout = next((layout for layout, name in FIRST.items() if name in tensors), None)
    if layout is None or tensors[FIRST[layout]].ndim != 4:
        raise InputError(f"{path}: is no ControlNet: it has neither {' nor '.join(FIRST.values())}")
    config = replace(model.architecture.network, channels_in=model.first_stage.latent_channels)
    with torch.device("meta"), Shapes():
        network = ControlNet(config, hint_channels=tensors[FIRST[layout]].shape[1])
    pairs = controlnet_pairs(network, layout)  # type: ignore[arg-type]
    state, complaints = taken(pairs, tensors, network.state_dict())
    complaints.unknown += tensors.keys() - {pair.theirs for pair in pairs}
    if complaints:
        raise InputError(f"{path}: is no ControlNet for this model: " + "; ".join(complaints.lines()))
    like = model.denoiser.unet.conv_in.weight
    network.load_state_dict({name: tensor.to(like.device, like.dtype) for name, tensor in state.items()}, assign=True)
    return network.eval().requires_grad_(False)


def _folder(path: Path) -> dict[str, Tensor]:
    """The tensors of a diffusers folder, whose config asks for nothing else than this network."""
    config: dict[str, Any] = read_json(path / "config.json")
    for field, allowed in REFUSED.items():
        if config.get(field, allowed[0]) not in allowed:
            raise InputError(f"{path}: has {field} {config[field]!r}, and only {allowed[0]!r} is run")
    return read_part(path)
