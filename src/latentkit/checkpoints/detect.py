"""What a single file of the released code holds, from its tensors' names and shapes alone, and what it says of itself.

Heads leave no trace in a shape: a network of a preset's shape has the preset's heads; the others must say theirs.
"""

import json
import math
import re
from collections.abc import Mapping
from dataclasses import replace
from functools import cache
from typing import Any, NamedTuple

import torch
from pydantic import TypeAdapter, ValidationError
from torch import Tensor

from latentkit.checkpoints.files import Shapes
from latentkit.checkpoints.names.ldm_names import FIRST_STAGE, UNET, autoencoder_pairs, unet_pairs
from latentkit.checkpoints.names.rename import given, prefixed
from latentkit.checkpoints.storage.archive import Archive
from latentkit.diffusion.prediction import PREDICTIONS
from latentkit.errors import InputError
from latentkit.model.latent_diffusion import Architecture
from latentkit.model.presets import PRESETS, predicting
from latentkit.nets.autoencoder import Autoencoder, AutoencoderConfig
from latentkit.nets.unet import UNet, UNetConfig

DESCRIPTION = "latentkit.single_file"
"""The metadata entry in which our single files hold architecture and tokenizers."""
BASE_STEP = 875000
"""`global_step` of Stable Diffusion 2's eps checkpoint."""


class Found(NamedTuple):
    """What a file seems to hold."""

    architecture: Architecture
    latent_scale: float
    state: dict[str, Any]
    """Tokenizers and class names, by conditioner."""
    name: str
    """A preset's, or what else is known."""
    certain: bool
    """Whether the file says what it predicts; otherwise it is the preset's."""


def _top(tensors: Mapping[str, Tensor], pattern: str) -> int:
    """One more than the largest number that the pattern finds in names; 0 if none."""
    found = [int(match[1]) for name in tensors if (match := re.match(pattern, name))]
    return max(found, default=-1) + 1


def _shape(tensors: Mapping[str, Tensor], what: str, name: str, axes: int) -> tuple[int, ...]:
    if name not in tensors:
        raise InputError(f"{what}: {name} is missing, from which its shape is known")
    shape = tuple(tensors[name].shape)
    if len(shape) != axes or 0 in shape:
        raise InputError(f"{what}: {name} has the shape {list(shape)}; it must have {axes} axes")
    return shape


def unet_shape(tensors: Mapping[str, Tensor], what: str, root: str = UNET) -> UNetConfig:
    """The U-Net below `root` with one head everywhere; InputError names a tensor that makes no sense."""

    def shape(name: str, axes: int) -> tuple[int, ...]:
        return _shape(tensors, what, root + name, axes)

    escaped = re.escape(root)
    channels, channels_in = shape("input_blocks.0.0.weight", 4)[:2]
    count = _top(tensors, escaped + r"input_blocks\.(\d{1,3})\.")
    starts = {name.rpartition(".")[0] for name in tensors}  # a layer is there with any of its tensors
    steps = [n for n in range(count) if f"{root}input_blocks.{n}.0.op" in starts]
    up = re.compile(escaped + r"output_blocks\.(\d{1,3})\.(\d)\.in_layers\.")
    lifted = [int(match[1]) for name in tensors if (match := up.match(name)) and match[2] != "0"]
    blocks = steps[0] - 1 if steps else min(lifted) if lifted else count - 1
    if blocks < 1 or count % (blocks + 1):
        raise InputError(f"{what}: has {count} blocks going down with {blocks} to a level, which makes no U-Net")
    multipliers, depth, context, cross_only = [], [], None, 0
    linear, plain = True, False
    for level in range(count // (blocks + 1)):
        number = 1 + level * (blocks + 1)
        width = shape(f"input_blocks.{number}.0.out_layers.0.weight", 1)[0]
        if width % channels:
            raise InputError(f"{what}: level {level + 1} has {width} channels, no multiple of the first's {channels}")
        multipliers.append(width // channels)
        place = f"input_blocks.{number}.1."
        blocks_here = _top(tensors, re.escape(root + place) + r"transformer_blocks\.(\d{1,3})\.")
        plain_here = f"{root}{place}qkv" in starts
        depth.append(1 if plain_here else blocks_here)
        plain |= plain_here
        if blocks_here:
            context = shape(place + "transformer_blocks.0.attn2.to_k.weight", 2)[1]
            linear = (
                tensors[f"{root}{place}proj_in.weight"].ndim == 2 if f"{root}{place}proj_in.weight" in tensors else True
            )
            if shape(place + "transformer_blocks.0.attn1.to_k.weight", 2)[1] != width:
                cross_only = level + 1
    plain |= f"{root}middle_block.1.qkv" in starts
    middle = 1 if plain else _top(tensors, escaped + r"middle_block\.1\.transformer_blocks\.(\d{1,3})\.")
    if context is None and not plain and middle:
        context = shape("middle_block.1.transformer_blocks.0.attn2.to_k.weight", 2)[1]
    first = shape("input_blocks.1.0.emb_layers.1.weight", 2)
    embedding = shape("time_embed.0.weight", 2)[0]
    has_vector, has_classes = f"{root}label_emb.0.0.weight" in tensors, f"{root}label_emb.weight" in tensors
    return UNetConfig(
        channels_in=channels_in,
        channels_out=shape("out.2.weight", 4)[0],
        channels=channels,
        multipliers=tuple(multipliers),
        blocks=blocks,
        depth=tuple(depth),
        middle_depth=middle,
        heads=1,
        context_width=context,
        vector_width=shape("label_emb.0.0.weight", 2)[1] if has_vector else None,
        linear_projection=linear,
        scale_shift=first[0] == 2 * channels * multipliers[0],
        embedding_width=None if embedding == 4 * channels else embedding,
        plain_attention=plain,
        residual_resampling=bool(lifted),
        cross_only=cross_only,
        classes=shape("label_emb.weight", 2)[0] if has_classes else None,
    )


def autoencoder_shape(tensors: Mapping[str, Tensor], what: str, root: str = FIRST_STAGE) -> AutoencoderConfig:
    """The autoencoder below `root`; InputError names a tensor that makes no sense."""

    def shape(name: str, axes: int) -> tuple[int, ...]:
        return _shape(tensors, what, root + name, axes)

    escaped = re.escape(root)
    channels, picture_channels = shape("encoder.conv_in.weight", 4)[:2]
    levels = _top(tensors, escaped + r"encoder\.down\.(\d{1,2})\.")
    blocks = _top(tensors, escaped + r"encoder\.down\.0\.block\.(\d{1,2})\.")
    widths = [shape(f"encoder.down.{level}.block.0.norm2.weight", 1)[0] for level in range(levels)]
    if not widths or not blocks or any(width % channels for width in widths):
        raise InputError(f"{what}: its first stage has levels of {widths} channels, no multiples of {channels}")
    latent_channels = shape("decoder.conv_in.weight", 4)[1]
    coded = f"{root}quantize.embedding.weight" in tensors or shape("encoder.conv_out.weight", 4)[0] == latent_channels
    starts = {name.rpartition(".")[0] for name in tensors}  # a layer is there with any of its tensors
    return AutoencoderConfig(
        picture_channels=picture_channels,
        latent_channels=latent_channels,
        channels=channels,
        multipliers=tuple(width // channels for width in widths),
        blocks=blocks,
        attention=f"{root}encoder.mid.attn_1.q" in starts,
        attention_levels=sum(f"{root}encoder.down.{n}.attn.0.q" in starts for n in range(levels)),
        codes=shape("quantize.embedding.weight", 2)[0] if coded else None,
    )


def single_file(archive: Archive, what: str) -> Found:
    """What a whole model in the layout of the released code is; InputError where that cannot be known.

    A file that describes its model holds that, and one of which a few tensors differ from a released model's holds
    that one: which tensors they are, `rename.taken` finds out.
    """
    said = said_prediction(archive)
    if DESCRIPTION in archive.metadata:
        architecture, state, scale = _described(archive.metadata[DESCRIPTION], what)
        return Found(architecture, scale, state, "a model of latentkit", True)
    try:
        network, first_stage = unet_shape(archive.tensors, what), autoencoder_shape(archive.tensors, what)
        refusal = InputError(
            f"{what}: holds a U-Net of {network.channels} channels and levels {network.multipliers} with the depth "
            f"{network.depth}, which is none of the released models, and does not say how many heads it has"
        )
        name = next((name for name, own in PRESETS.items() if _same(own.architecture, network, first_stage)), None)
    except InputError as error:
        refusal, name = error, None
    if (name := name or nearest(archive.tensors)) is None:
        raise refusal
    preset = PRESETS[name]
    architecture = predicting(preset.architecture, said or preset.architecture.prediction)
    if "ztsnr" in archive.tensors:
        architecture = replace(architecture, schedule=replace(architecture.schedule, zero_terminal=True))
    return Found(architecture, _scale(archive) or preset.latent_scale, {}, name, said is not None)


def _same(own: Architecture, network: UNetConfig, first_stage: AutoencoderConfig) -> bool:
    return comparable(own.network) == comparable(network) and own.first_stage == first_stage


def nearest(tensors: Mapping[str, Tensor], roots: tuple[str, ...] = (UNET, FIRST_STAGE)) -> str | None:
    """The preset from whose parts below `roots` fewer than one tensor in a hundred differs, by name or shape."""
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    least = (0.01, 0, "")
    for name, preset in PRESETS.items():
        wanted = {UNET: preset.architecture.network, FIRST_STAGE: preset.architecture.first_stage}
        if not _resembles(shapes, preset.architecture.network):
            continue
        whole = {tensor: shape for root in roots for tensor, shape in _shapes(wanted[root], root).items()}
        own = {tensor: shape for tensor, shape in shapes.items() if tensor.startswith(roots)}
        apart = {tensor for tensor, _ in own.items() ^ whole.items()}
        sizes = sum(math.prod(own.get(tensor, ())) != math.prod(whole.get(tensor, ())) for tensor in apart)
        least = min(least, (len(apart) / len(whole), sizes, name), key=lambda found: found[:2])
    return least[2] or None


def _resembles(shapes: Mapping[str, tuple[int, ...]], config: UNetConfig) -> bool:
    """Whether three of four tensors of a U-Net have its shapes, before any is built."""
    width, wide = config.channels * config.multipliers[-1], config.embedding_width or 4 * config.channels
    probes = {
        "input_blocks.0.0.weight": (config.channels, config.channels_in, 3, 3),
        "time_embed.2.weight": (wide, wide),
        "middle_block.0.in_layers.2.weight": (width, width, 3, 3),
        "out.2.weight": (config.channels_out, config.channels, 3, 3),
    }
    return sum(shapes.get(UNET + name) == shape for name, shape in probes.items()) > 2


@cache
def _shapes(config: Any, root: str) -> dict[str, tuple[int, ...]]:
    """What the released code would save of a network, below `root`."""
    with torch.device("meta"), Shapes():
        module = UNet(config) if isinstance(config, UNetConfig) else Autoencoder(config)
    pairs = unet_pairs(module) if isinstance(module, UNet) else autoencoder_pairs(module)
    tensors = given(prefixed(pairs, root), module.state_dict())
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}


def comparable(config: UNetConfig) -> UNetConfig:
    """The config without what leaves no trace in shapes."""
    # Middle-only transformers and plain attention have no projection whose kind shows.
    linear = config.linear_projection or not any(config.depth) or config.plain_attention
    return replace(config, heads=1, head_width=None, dropout=0.0, linear_projection=linear, cross_only=_shown(config))


def _shown(config: UNetConfig) -> int:
    """Levels that only look at the context, as far as shapes show: to the last whose width is not the context's."""
    widths = [config.channels * multiplier for multiplier in config.multipliers][: config.cross_only]
    shown = [n + 1 for n, width in enumerate(widths) if config.depth[n] and width != config.context_width]
    return max(shown, default=0)


def _scale(archive: Archive) -> float | None:
    """The factor on raw latents that training measured (`scale_by_std`)."""
    factor = archive.tensors.get("scale_factor")
    return float(factor) if factor is not None and factor.numel() == 1 and float(factor) > 0 else None


def said_prediction(archive: Archive) -> str | None:
    """What the file says that its network predicts: metadata, marker tensors, or Stable Diffusion 2's step count."""
    told = archive.metadata.get("modelspec.prediction_type", "").lower()
    names = {"epsilon": "eps", "eps": "eps", "v": "v", "v_prediction": "v", "v-prediction": "v"} | {
        name: name for name in PREDICTIONS
    }
    if told in names:
        return names[told]
    if "v_pred" in archive.tensors:
        return "v"
    return "eps" if archive.values.get("global_step") == BASE_STEP else None


def _described(text: str, what: str) -> tuple[Architecture, dict[str, Any], float]:
    try:
        document = json.loads(text)
        fields = json.dumps(document["architecture"])
        architecture = TypeAdapter(Architecture).validate_json(fields, strict=True)
        scale = float(document["latent_scale"])
        if not 0 < scale < math.inf:
            raise ValueError(f"latent_scale is {scale}")
        return architecture, dict(document["state"]), scale
    except (ArithmeticError, ValueError, KeyError, TypeError, RecursionError, ValidationError) as error:
        first = (str(error).splitlines() or [""])[0][:120]
        raise InputError(f"{what}: its description {DESCRIPTION} is damaged ({first})") from None
