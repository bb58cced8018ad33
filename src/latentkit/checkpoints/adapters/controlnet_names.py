"""The names of ControlNets' weights in lllyasviel's released code and in diffusers, generated from a network.

Sources: lllyasviel/ControlNet `cldm/cldm.py`; diffusers `ControlNetModel`, `ControlNetUnionModel`.
"""

from collections.abc import Iterator
from typing import Literal

from latentkit.checkpoints.names import diffusers_names, ldm_names
from latentkit.checkpoints.names.rename import Pair, paired
from latentkit.errors import InputError
from latentkit.nets.controlnet import ControlNet

Layout = Literal["ldm", "diffusers"]
PREFIX = "control_model."
"""Before the names in the released code's whole checkpoints; files of a ControlNet alone may lack it."""
FIRST = {"ldm": "input_hint_block.0.weight", "diffusers": "controlnet_cond_embedding.conv_in.weight"}
"""The first convolution over the hint, by layout."""
KINDS = "task_embedding"
"""What a union has for each kind of hint."""


def controlnet_pairs(network: ControlNet, layout: Layout) -> list[Pair]:
    """Every parameter of the ControlNet beside its name in a layout, without `PREFIX` before it.

    Errors: InputError for what that layout cannot hold.
    """
    state = network.state_dict()
    if layout == "ldm":
        if network.fusion is not None:
            raise InputError("the released code's layout holds no ControlNet of several kinds; write diffusers'")
        return [*ldm_names.unet_pairs(network), *paired(_ldm(network), state)]
    pairs = [*diffusers_names.unet_pairs(network), *paired(_diffusers(network), state)]
    return pairs if network.fusion is None else [*pairs, *_joint(len(network.fusion.blocks))]


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
    yield from (("fusion.out", "spatial_ch_projs"), ("fusion.embedding.linear_in", "control_add_embedding.linear_1"))
    yield "fusion.embedding.linear_out", "control_add_embedding.linear_2"
    for index in range(0 if network.fusion is None else len(network.fusion.blocks)):
        for ours, theirs in (
            ("norm_in", "ln_1"),
            ("norm_out", "ln_2"),
            ("out", "attn.out_proj"),
            ("wide", "mlp.c_fc"),
            ("narrow", "mlp.c_proj"),
        ):
            yield f"fusion.blocks.{index}.{ours}", f"transformer_layes.{index}.{theirs}"


def _joint(blocks: int) -> Iterator[Pair]:
    """What of a union is no layer of its own there."""
    yield Pair(KINDS, ("fusion.kinds",))
    for index in range(blocks):
        for kind in ("weight", "bias"):
            ours = tuple(f"fusion.blocks.{index}.{part}.{kind}" for part in "qkv")
            yield Pair(f"transformer_layes.{index}.attn.in_proj_{kind}", ours)
