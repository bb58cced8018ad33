"""A model's networks in a few lines each: the picture of an architecture that `latentkit inspect` draws."""

from collections.abc import Sequence
from typing import Any

from latentkit.model.latent_diffusion import Architecture
from latentkit.nets.autoencoder import AutoencoderConfig
from latentkit.nets.clip import ClipImageConfig, ClipTextConfig
from latentkit.nets.tiny import TinyConfig
from latentkit.nets.unet import UNetConfig


def unet(config: UNetConfig) -> list[str]:
    """What it takes, and one line for each level."""
    lines = [f"{config.channels_in} channels in, {config.channels_out} out"]
    for level, (multiplier, depth) in enumerate(zip(config.multipliers, config.depth)):
        width = config.channels * multiplier
        kind = "plain attention" if config.plain_attention else f"{depth} x transformer"
        heads = f", {kind}, {config.head_count(width)} heads" if depth else ""
        lines.append(_level(level, width, config.blocks, heads))
    if config.context_width:
        lines.append(f"context {config.context_width} wide")
    if config.vector_width:
        lines.append(f"vector {config.vector_width} wide")
    return lines


def first_stage(config: AutoencoderConfig | TinyConfig) -> list[str]:
    """What its latents are, and one line for each level."""
    cells = f"{config.latent_channels} latent channels, {config.downsampling} pixels to a cell"
    if isinstance(config, TinyConfig):
        return [cells, f"levels of {_listed(config.blocks)} blocks, {config.channels} wide"]
    if config.codes:
        cells += f"; {config.codes} codes"
    elif config.levels:
        cells += f"; rounded to {_listed(config.levels)} values"
    lines = [cells]
    if config.stem > 1:
        lines.append(f"{config.stem}x{config.stem} pixels folded into channels")
    for level, multiplier in enumerate(config.multipliers):
        deep = level >= len(config.multipliers) - config.attention_levels
        attention = ", attention" if deep else ""
        lines.append(_level(level, config.channels * multiplier, config.blocks, attention))
    return [*lines, "attention in the middle"] if config.attention else lines


def tower(config: Any) -> str:
    """A transformer of a conditioner."""
    line = f"{config.layers} layers, {config.width} wide, {config.heads} heads"
    if isinstance(config, ClipImageConfig):
        line += f"; pictures of {config.size} px in patches of {config.patch} px"
    else:
        line += f"; {config.length} of {config.vocabulary} tokens"
    if isinstance(config, ClipTextConfig | ClipImageConfig):
        line += f"; {config.activation}"
    if isinstance(config, ClipTextConfig):
        line += f"; context from layer {config.layers - config.skip}{', normed' if config.final_norm else ''}"
    if vector := getattr(config, "projection", None):
        line += f"; a vector {vector} wide"
    return line


def whole(architecture: Architecture) -> dict[str, list[str]]:
    """The lines of each part, by what its tensors' names begin with."""
    found = {"denoiser.": unet(architecture.network)}
    if architecture.first_stage is not None:
        found["first_stage."] = first_stage(architecture.first_stage)
    towers: dict[str, Any] = {"text": architecture.text or architecture.bert, "layout": architecture.layout}
    for index, clip in enumerate(architecture.clip.towers if architecture.clip else ()):
        towers[f"text.towers.{index}"] = clip
    if architecture.image:
        towers["image"] = architecture.image.tower
    found |= {f"conditioners.{name}.": [tower(config)] for name, config in towers.items() if config}
    if architecture.label:
        found["conditioners.label."] = [f"a {'vector' if architecture.label.vector else 'token'} for each class"]
    if architecture.map:
        found["conditioners.map."] = [f"{architecture.map.channels} channels of a map of classes"]
    return found


def _level(level: int, width: int, blocks: int, more: str) -> str:
    return f"{'  ' * level}1/{2**level}: {width:5d} wide, {blocks} block{'s' * (blocks > 1)}{more}"


def _listed(numbers: Sequence[int]) -> str:
    return ", ".join(map(str, numbers))
