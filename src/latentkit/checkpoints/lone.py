"""An autoencoder or a U-Net that comes without the rest of a model, in a file or folder of other programs."""

import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from latentkit.checkpoints.detect import autoencoder_shape, comparable, nearest, unet_shape
from latentkit.checkpoints.files import Shapes, affordable, short
from latentkit.checkpoints.ldm_file import folded, usual_scale
from latentkit.checkpoints.names import diffusers_names, ldm_names
from latentkit.checkpoints.names.diffusers_configs import (
    Statistics,
    autoencoder_config,
    autoencoder_json,
    unet_config,
)
from latentkit.checkpoints.names.rename import Complaints, Pair, blocks, given, prefixed, taken
from latentkit.checkpoints.storage.archive import read_archive, read_json, read_part
from latentkit.checkpoints.storage.folders import whole_folder
from latentkit.checkpoints.storage.tensors import write_json, write_tensors
from latentkit.errors import InputError
from latentkit.model.first_stage import FirstStage
from latentkit.model.presets import FIRST_STAGES, PRESETS
from latentkit.nets.autoencoder import Autoencoder, AutoencoderConfig
from latentkit.nets.unet import UNet, UNetConfig

Part = Literal["first stage", "U-Net"]
CLASSES: dict[str, tuple[Part, str]] = {
    "AutoencoderKL": ("first stage", "vae"),
    "VQModel": ("first stage", "vae"),
    "UNet2DConditionModel": ("U-Net", "unet"),
    "UNet2DModel": ("U-Net", "unet"),
}
"""Classes of a config.json, and what they are."""
MARKS: tuple[tuple[Part, Literal["ldm", "diffusers"], str], ...] = (
    ("first stage", "ldm", r"(first_stage_model\.)?(en|de)coder\.(down|up)\.\d+\."),
    ("first stage", "diffusers", r"(en|de)coder\.(down|up)_blocks\.\d+\."),
    ("U-Net", "ldm", r"(model\.diffusion_model\.)?(input|output)_blocks\.\d+\."),
    ("U-Net", "diffusers", r"(down|up)_blocks\.\d+\.resnets\."),
)
"""What the names of each part's tensors begin with."""
MORE = r"(cond_stage_model|conditioner|control_model|zero_convs|input_hint_block|controlnet_\w+)\..*"
"""Tensors of whole models and of ControlNets."""
ASIDE = r"(first_stage_model\.)?loss\..*|model_ema\..*|(.*\.)?(num_batches_tracked|global_step)"
"""Tensors that take no part in a picture."""


class Lone(NamedTuple):
    """A part alone, its tensors under our names, and what does not fit."""

    part: Part
    layout: Literal["ldm", "diffusers"]
    name: str
    """Presets of its shapes, or nothing."""
    config: AutoencoderConfig | UNetConfig
    state: dict[str, Tensor]
    statistics: Statistics | None
    """Of raw latents, where it says them."""
    complaints: Complaints
    aside: list[str]
    """Tensors that take no part in a picture, of all `names` that are there."""
    names: Collection[str]

    @property
    def left(self) -> dict[str, list[str]]:
        """What is left aside, by kind (see `rename.blocks`)."""
        return {"what takes no part": blocks(self.aside, self.names)}


def lone_part(path: Path) -> Lone | None:
    """The part of a model that is there alone, None where it is something else; InputError for what is none."""
    folder = path if path.is_dir() else path.parent
    said: dict[str, Any] = {}
    if (folder / "config.json").is_file() and not (folder / "model_index.json").exists():
        said = read_json(folder / "config.json")
    if path.is_dir() and str(said.get("_class_name")) not in CLASSES:
        return None
    tensors = read_part(path) if path.is_dir() else read_archive(path).tensors
    found = _kind(tensors)
    if found is None or (said and CLASSES.get(str(said.get("_class_name")), found)[0] != found[0]):
        return None
    part, layout, root = found
    statistics = None
    if layout == "ldm":
        config = autoencoder_shape(tensors, str(path), root) if part == "first stage" else _unet(tensors, path, root)
        pairs = _pairs(_module(config, str(path)), layout)
    elif str(said.get("_class_name")) in CLASSES:
        config, place, statistics = _said(folder / "config.json", said)
        pairs = _pairs(_module(config, str(path)), layout, place)
    else:
        config, pairs = _known(part, tensors, path)
    pairs = prefixed(pairs, root)
    if part == "first stage" and layout == "diffusers":
        tensors = {diffusers_names.modern(name): tensor for name, tensor in tensors.items()}
    ours, complaints = taken(pairs, tensors, _module(config, str(path)).state_dict())
    left = tensors.keys() - {pair.theirs for pair in pairs}
    aside = sorted(name for name in left if re.fullmatch(ASIDE, name))
    complaints.unknown += sorted(left - set(aside))
    return Lone(part, layout, ", ".join(_names(config)), config, ours, statistics, complaints, aside, tensors)


def _kind(tensors: Mapping[str, Tensor]) -> tuple[Part, Literal["ldm", "diffusers"], str] | None:
    """The one part whose tensors these are, and what its names begin with."""
    if any(re.fullmatch(MORE, name) for name in tensors):
        return None
    found = {
        (part, layout, (match[1] or "") if layout == "ldm" else "")
        for part, layout, pattern in MARKS
        for name in tensors
        if (match := re.match(pattern, name))
    }
    return found.pop() if len(found) == 1 else None


def _unet(tensors: Mapping[str, Tensor], path: Path, root: str) -> UNetConfig:
    refusal = InputError(f"{path}: holds a U-Net of no released model's shape, and does not say how many heads it has")
    try:
        shape = comparable(unet_shape(tensors, str(path), root))
        known = [own.architecture.network for own in PRESETS.values() if comparable(own.architecture.network) == shape]
    except InputError as error:
        refusal, known = error, []
    if not known and (
        name := nearest({ldm_names.UNET + n.removeprefix(root): t for n, t in tensors.items()}, (ldm_names.UNET,))
    ):
        known = [PRESETS[name].architecture.network]
    if not known:
        raise refusal
    return known[0]


def _said(path: Path, values: Mapping[str, Any]) -> tuple[AutoencoderConfig | UNetConfig, str, Statistics | None]:
    if CLASSES[values["_class_name"]][0] == "U-Net":
        network, place = unet_config(str(path), values)
        return network, place, None
    stage, statistics = autoencoder_config(str(path), values)
    return stage, "", statistics


def _known(part: Part, tensors: Mapping[str, Tensor], path: Path) -> tuple[AutoencoderConfig | UNetConfig, list[Pair]]:
    """What a file without its config.json is, by the name and shape of most of its tensors."""
    configs: list[AutoencoderConfig | UNetConfig] = list(FIRST_STAGES.values())
    if part == "U-Net":
        configs = [known.architecture.network for known in PRESETS.values()]
    best: tuple[int, AutoencoderConfig | UNetConfig, list[Pair]] | None = None
    if part == "first stage":
        tensors = {diffusers_names.modern(name): tensor for name, tensor in tensors.items()}
    first = tensors.get("encoder.conv_in.weight" if part == "first stage" else "conv_in.weight")
    place = "class_embedding" if "class_embedding.linear_1.weight" in tensors else "add_embedding"
    for config in configs:
        channels = config.picture_channels if isinstance(config, AutoencoderConfig) else config.channels_in
        if first is not None and tuple(first.shape[:2]) != (config.channels, channels):
            continue
        try:
            module = _module(config, str(path))
            pairs = _pairs(module, "diffusers", place)
        except InputError:  # diffusers has none of that shape
            continue
        sizes = {name: tensor.numel() for name, tensor in module.state_dict().items()}
        wanted = {pair.theirs: sum(sizes[name] for name in pair.ours) for pair in pairs}
        apart = len(tensors.keys() ^ wanted) + sum(
            tensors[name].numel() != wanted[name] for name in tensors.keys() & wanted
        )
        if best is None or apart < best[0]:
            best = apart, config, pairs
    if best is None or best[0] > len(tensors) // 4:
        raise InputError(f"{path}: holds a {part} of no released model's shape; put its config.json beside it")
    return best[1:]


def _module(config: AutoencoderConfig | UNetConfig, what: str) -> nn.Module:
    """Without weights; InputError where it cannot be."""
    affordable(what, [config])
    try:
        with torch.device("meta"), Shapes():
            return UNet(config) if isinstance(config, UNetConfig) else Autoencoder(config)
    except Exception as error:
        raise InputError(f"{what}: its network cannot be built: {short(error)}") from None


def _pairs(module: nn.Module, layout: str, place: str = "add_embedding") -> list[Pair]:
    if isinstance(module, UNet):
        return ldm_names.unet_pairs(module) if layout == "ldm" else diffusers_names.unet_pairs(module, place)
    assert isinstance(module, Autoencoder)
    return ldm_names.autoencoder_pairs(module) if layout == "ldm" else diffusers_names.autoencoder_pairs(module)


def _names(config: AutoencoderConfig | UNetConfig) -> list[str]:
    if isinstance(config, AutoencoderConfig):
        return [name for name, known in FIRST_STAGES.items() if known == config]
    shown = comparable(config)
    return [name for name, known in PRESETS.items() if comparable(known.architecture.network) == shown]


def lone_first_stage(
    path: Path, device: str | torch.device = "cpu", dtype: torch.dtype | None = None
) -> FirstStage | None:
    """The autoencoder that is there alone, frozen; None where there is something else. `dtype` None: as stored.

    Errors: InputError names all that is missing, left over or wrong.
    """
    lone = lone_part(path)
    if lone is None or not isinstance(lone.config, AutoencoderConfig):
        return None
    lone.complaints.refuse(str(path))
    with torch.device("meta"), Shapes():
        stage = FirstStage(lone.config, lone.config.picture_channels)
    channels = lone.config.latent_channels
    mean, std = lone.statistics or Statistics((0.0,) * channels, (1.0,) * channels)
    state = {f"autoencoder.{name}": tensor.to(device, dtype or tensor.dtype) for name, tensor in lone.state.items()}
    state |= {"latent_mean": torch.tensor(mean, device=device), "latent_std": torch.tensor(std, device=device)}
    stage.load_state_dict(state, assign=True)
    return stage.eval().requires_grad_(False)


def write_first_stage(path: Path, stage: FirstStage, layout: str, dtype: torch.dtype | None = None) -> None:
    """Write an autoencoder alone, as others do: `encoder.` and `decoder.` in one file, or diffusers' folder.

    `dtype` None: as it is. Errors: InputError names what that layout cannot hold.
    """
    network, scale = stage.autoencoder, usual_scale(stage)
    assert isinstance(network, Autoencoder)
    pairs = _pairs(network, layout)
    state = network.state_dict() | folded(stage, scale, dtype, "")
    tensors = {name: tensor.to(dtype or tensor.dtype) for name, tensor in given(pairs, state).items()}
    if layout == "ldm":
        write_tensors(path, tensors, {"format": "pt"})
    else:
        config = autoencoder_json(network.config, 64 * network.config.downsampling, scale)
        with whole_folder(path) as new:
            write_json(new / "config.json", config)
            write_tensors(new / "diffusion_pytorch_model.safetensors", tensors, {"format": "pt"})
