"""The names that diffusers gives the same weights, written as rewriting rules over ours."""

import re
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

Rules = Sequence[tuple[str, str]]

RESIDUAL: Rules = (
    (r"\.norm_in\.", ".norm1."), (r"\.conv_in\.", ".conv1."), (r"\.embedding\.", ".time_emb_proj."),
    (r"\.norm_out\.", ".norm2."), (r"\.conv_out\.", ".conv2."), (r"\.skip\.", ".conv_shortcut."),
)  # fmt: skip
TRANSFORMER: Rules = (
    (r"\.project_in\.", ".proj_in."), (r"\.project_out\.", ".proj_out."),
    (r"\.blocks\.(\d+)\.", r".transformer_blocks.\1."),
    (r"\.norm_self\.", ".norm1."), (r"\.norm_cross\.", ".norm2."), (r"\.norm_feed\.", ".norm3."),
    (r"\.self_attention\.", ".attn1."), (r"\.cross_attention\.", ".attn2."),
    (r"\.feed_forward\.project\.", ".ff.net.0.proj."), (r"\.feed_forward\.out\.", ".ff.net.2."),
    (r"\.([qkv])\.(weight|bias)$", r".to_\1.\2"), (r"(\.attn\d)\.out\.", r"\1.to_out.0."),
)  # fmt: skip
UNET: Rules = (
    (r"^vector_embedding\.", "add_embedding."), (r"_embedding\.linear_in\.", "_embedding.linear_1."),
    (r"_embedding\.linear_out\.", "_embedding.linear_2."), (r"^norm_out\.", "conv_norm_out."),
    (r"^middle\.block_in\.residual", "mid_block.resnets.0"), (r"^middle\.block_out\.residual", "mid_block.resnets.1"),
    (r"^middle\.block_in\.transformer", "mid_block.attentions.0"),
    (r"^(down|up)\.(\d+)\.blocks\.(\d+)\.residual", r"\1_blocks.\2.resnets.\3"),
    (r"^(down|up)\.(\d+)\.blocks\.(\d+)\.transformer", r"\1_blocks.\2.attentions.\3"),
    (r"^(down|up)\.(\d+)\.(down|up)sample\.", r"\1_blocks.\2.\3samplers.0."),
)  # fmt: skip
AUTOENCODER: Rules = (
    (r"^to_moments\.", "quant_conv."), (r"^from_latent\.", "post_quant_conv."),
    (r"^(\w+)\.norm_out\.", r"\1.conv_norm_out."),
    (r"^encoder\.levels\.(\d+)\.blocks\.(\d+)\.", r"encoder.down_blocks.\1.resnets.\2."),
    (r"^decoder\.levels\.(\d+)\.blocks\.(\d+)\.", r"decoder.up_blocks.\1.resnets.\2."),
    (r"^encoder\.levels\.(\d+)\.resample\.", r"encoder.down_blocks.\1.downsamplers.0."),
    (r"^decoder\.levels\.(\d+)\.resample\.", r"decoder.up_blocks.\1.upsamplers.0."),
    (r"\.middle\.block_in\.", ".mid_block.resnets.0."), (r"\.middle\.block_out\.", ".mid_block.resnets.1."),
    (r"\.middle\.attention\.norm\.", ".mid_block.attentions.0.group_norm."),
    (r"\.middle\.attention\.attention\.out\.", ".mid_block.attentions.0.to_out.0."),
    (r"\.middle\.attention\.attention\.([qkv])\.", r".mid_block.attentions.0.to_\1."),
)  # fmt: skip


def renamed(name: str, rules: Rules) -> str:
    """diffusers' name of our `name`."""
    for pattern, replacement in rules:
        name = re.sub(pattern, replacement, name)
    if ".attentions." in name and rules is UNET:
        return renamed(name, TRANSFORMER)
    return renamed(name, RESIDUAL) if ".resnets." in name and rules is not RESIDUAL else name


def copy_weights(ours: nn.Module, theirs: Any, rules: Rules) -> None:
    """Give the peer our weights; every one of both sides must be used."""
    theirs.load_state_dict({renamed(name, rules): value for name, value in ours.state_dict().items()}, strict=True)


def randomise(module: nn.Module, seed: int) -> None:
    """Every parameter random, those that start at zero too, of a size that keeps activations near 1."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            fan_in = max(1, parameter[0].numel()) if parameter.ndim > 1 else 4
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            parameter.copy_(noise / fan_in**0.5 + (parameter.ndim == 1) * 0.5)


def distance(ours: Tensor, theirs: Tensor) -> float:
    """The largest difference, relative to the largest value."""
    return ((ours - theirs).abs().max() / theirs.abs().max()).item()
