"""What a single file of the released code holds, from its tensors' names and shapes alone, and what it says of itself.

Heads leave no trace in a shape: a network of a preset's shape has the preset's heads; the others must say theirs.
"""

import json
import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, NamedTuple

from pydantic import TypeAdapter, ValidationError
from torch import Tensor

from latentkit.checkpoints.names.ldm_names import FIRST_STAGE, UNET
from latentkit.checkpoints.storage.archive import Archive
from latentkit.diffusion.prediction import PREDICTIONS
from latentkit.errors import InputError
from latentkit.model.latent_diffusion import Architecture
from latentkit.model.presets import PRESETS, predicting
from latentkit.nets.autoencoder import AutoencoderConfig
from latentkit.nets.unet import UNetConfig

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
    steps = [n for n in range(count) if f"{root}input_blocks.{n}.0.op.weight" in tensors]
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
        plain_here = f"{root}{place}qkv.weight" in tensors
        depth.append(1 if plain_here else blocks_here)
        plain |= plain_here
        if blocks_here:
            context = shape(place + "transformer_blocks.0.attn2.to_k.weight", 2)[1]
            linear = (
                tensors[f"{root}{place}proj_in.weight"].ndim == 2 if f"{root}{place}proj_in.weight" in tensors else True
            )
            if shape(place + "transformer_blocks.0.attn1.to_k.weight", 2)[1] != width:
                cross_only = level + 1
    plain |= f"{root}middle_block.1.qkv.weight" in tensors
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
    coded = f"{root}quantize.embedding.weight" in tensors
    return AutoencoderConfig(
        picture_channels=picture_channels,
        latent_channels=shape("decoder.conv_in.weight", 4)[1],
        channels=channels,
        multipliers=tuple(width // channels for width in widths),
        blocks=blocks,
        attention=f"{root}encoder.mid.attn_1.q.weight" in tensors,
        attention_levels=sum(f"{root}encoder.down.{n}.attn.0.q.weight" in tensors for n in range(levels)),
        codes=shape("quantize.embedding.weight", 2)[0] if coded else None,
    )


def single_file(archive: Archive, what: str) -> Found:
    """What a whole model in the layout of the released code is; InputError where that cannot be known."""
    network, first_stage = unet_shape(archive.tensors, what), autoencoder_shape(archive.tensors, what)
    said = said_prediction(archive)
    if DESCRIPTION in archive.metadata:
        architecture, state, scale = _described(archive.metadata[DESCRIPTION], what)
        if comparable(architecture.network) != comparable(network):
            raise InputError(f"{what}: describes another network than its tensors make")
        if architecture.first_stage != first_stage:
            raise InputError(f"{what}: describes another first stage than its tensors make")
        return Found(architecture, scale, state, "a model of latentkit", True)
    for name, preset in PRESETS.items():
        own = preset.architecture
        if comparable(own.network) == comparable(network) and own.first_stage == first_stage:
            architecture = predicting(own, said or own.prediction)
            if "ztsnr" in archive.tensors:
                architecture = replace(architecture, schedule=replace(architecture.schedule, zero_terminal=True))
            return Found(architecture, _scale(archive) or preset.latent_scale, {}, name, said is not None)
    raise InputError(
        f"{what}: holds a U-Net of {network.channels} channels and levels {network.multipliers} with the depth "
        f"{network.depth}, which is none of the released models, and does not say how many heads it has"
    )


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
        return architecture, dict(document["state"]), float(document["latent_scale"])
    except (ValueError, KeyError, TypeError, RecursionError, ValidationError) as error:
        first = (str(error).splitlines() or [""])[0][:120]
        raise InputError(f"{what}: its description {DESCRIPTION} is damaged ({first})") from None
