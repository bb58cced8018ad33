"""The names of CompVis's and Stability's released code, generated from a network: SD 1, 2, XL and the 2021 models.

Sources: CompVis/latent-diffusion `openaimodel.py`, `model.py`, `autoencoder.py`; Stability-AI/generative-models.
"""

from collections.abc import Iterator

from latentkit.checkpoints.names.rename import Pair, paired
from latentkit.errors import InputError
from latentkit.nets.autoencoder import Autoencoder, AutoencoderConfig
from latentkit.nets.controlnet import ControlNet
from latentkit.nets.tiny import TinyConfig
from latentkit.nets.unet import UNet, UNetConfig

UNET, FIRST_STAGE, EMA = "model.diffusion_model.", "first_stage_model.", "model_ema."
Layers = Iterator[tuple[str, str | Pair]]

RESIDUAL = {
    "norm_in": "in_layers.0",
    "conv_in": "in_layers.2",
    "embedding": "emb_layers.1",
    "norm_out": "out_layers.0",
    "conv_out": "out_layers.3",
    "skip": "skip_connection",
}
TRANSFORMER_BLOCK = {
    "norm_self": "norm1",
    "norm_cross": "norm2",
    "norm_feed": "norm3",
    "feed_forward.project": "ff.net.0.proj",
    "feed_forward.out": "ff.net.2",
    **{
        f"{ours}.{leaf}": f"{theirs}.{name}"
        for ours, theirs in (("self_attention", "attn1"), ("cross_attention", "attn2"))
        for leaf, name in (("q", "to_q"), ("k", "to_k"), ("v", "to_v"), ("out", "to_out.0"))
    },
}
"""The same in diffusers."""
AUTOENCODER_RESIDUAL = {
    "norm_in": "norm1",
    "conv_in": "conv1",
    "norm_out": "norm2",
    "conv_out": "conv2",
    "skip": "nin_shortcut",
}


def leaves(ours: str, theirs: str, table: dict[str, str]) -> Layers:
    """The layers of one block of a known kind."""
    yield from ((f"{ours}.{leaf}", f"{theirs}.{name}") for leaf, name in table.items())


def transformer(ours: str, theirs: str, depth: int) -> Layers:
    """A spatial transformer, inside of which all layouts agree."""
    for leaf, name in (("norm", "norm"), ("project_in", "proj_in"), ("project_out", "proj_out")):
        yield f"{ours}.{leaf}", f"{theirs}.{name}"
    for index in range(depth):
        yield from leaves(f"{ours}.blocks.{index}", f"{theirs}.transformer_blocks.{index}", TRANSFORMER_BLOCK)


def unet_pairs(network: UNet | ControlNet, *, new_order: bool = False) -> list[Pair]:
    """Every parameter of the U-Net beside its released name, without `UNET` before it.

    `new_order` is the released code's `use_new_attention_order`: plain attention keeps all q before all k, instead of
    q, k, v by head. Errors: InputError for what that layout cannot hold.
    """
    return paired(_unet(network.config, new_order), network.state_dict())


def _unet(config: UNetConfig, new_order: bool) -> Layers:
    if not config.middle_depth:
        raise InputError("the CompVis layout holds no U-Net without attention in its middle; this one has none")
    yield from (("time_embedding.linear_in", "time_embed.0"), ("time_embedding.linear_out", "time_embed.2"))
    yield from (("vector_embedding.linear_in", "label_emb.0.0"), ("vector_embedding.linear_out", "label_emb.0.2"))
    yield "class_embedding", "label_emb"
    yield from (("conv_in", "input_blocks.0.0"), ("norm_out", "out.0"), ("conv_out", "out.2"))

    def block(ours: str, theirs: str, level: int, depth: int) -> Layers:
        yield from leaves(f"{ours}.residual", f"{theirs}.0", RESIDUAL)
        if depth and config.plain_attention:
            heads = 1 if new_order else config.head_count(config.channels * config.multipliers[level])
            yield from _plain(f"{ours}.attention", f"{theirs}.1", heads)
        elif depth:
            yield from transformer(f"{ours}.transformer", f"{theirs}.1", depth)

    def step(ours: str, theirs: str, convolution: str) -> Layers:
        yield f"{ours}.conv", f"{theirs}.{convolution}"
        if config.residual_resampling:
            yield from leaves(ours, theirs, RESIDUAL)

    last = len(config.multipliers) - 1
    number = 1
    for level, depth in enumerate(config.depth):
        for index in range(config.blocks):
            yield from block(f"down.{level}.blocks.{index}", f"input_blocks.{number}", level, depth)
            number += 1
        yield from step(f"down.{level}.downsample", f"input_blocks.{number}.0", "op")
        number += 1
    yield from block("middle.block_in", "middle_block", last, config.middle_depth)
    yield from leaves("middle.block_out.residual", "middle_block.2", RESIDUAL)
    number = 0
    for up, level in enumerate(reversed(range(last + 1))):
        depth = config.depth[level]
        for index in range(config.blocks + 1):
            yield from block(f"up.{up}.blocks.{index}", f"output_blocks.{number}", level, depth)
            number += 1
        yield from step(f"up.{up}.upsample", f"output_blocks.{number - 1}.{2 if depth else 1}", "conv")


def _plain(ours: str, theirs: str, heads: int) -> Layers:
    """An attention block of the 2021 U-Nets: one-dimensional convolutions, q, k and v in one."""
    yield f"{ours}.norm", f"{theirs}.norm"
    q, k, v = (f"{ours}.attention.{part}" for part in "qkv")
    yield q, Pair(f"{theirs}.qkv", (q, k, v), groups=heads, axes=1)
    yield f"{ours}.attention.out", Pair(f"{theirs}.proj_out", (f"{ours}.attention.out",), axes=1)


def autoencoder_pairs(network: Autoencoder) -> list[Pair]:
    """Every parameter of the autoencoder beside its released name, without `FIRST_STAGE` before it.

    Errors: InputError for what that layout cannot hold.
    """
    config = network.config
    if isinstance(config, TinyConfig):
        raise InputError("the CompVis layout holds no tiny autoencoder; diffusers' and our own do")
    for name, wanted in (("stem", 1), ("levels", None), ("variance", True)):
        if getattr(config, name) != wanted:
            got = getattr(config, name)
            raise InputError(f"the CompVis layout holds no autoencoder with {name} {got}; only with {wanted}")
    pairs = paired(_autoencoder(config), network.state_dict())
    return [*pairs, Pair("quantize.embedding.weight", ("codebook.vectors",))] if config.codes else pairs


def _autoencoder(config: AutoencoderConfig) -> Layers:
    yield from (("to_moments", "quant_conv"), ("from_latent", "post_quant_conv"))
    last = len(config.multipliers) - 1
    for half, direction, blocks in (("encoder", "down", config.blocks), ("decoder", "up", config.blocks + 1)):
        yield from ((f"{half}.{name}", f"{half}.{name}") for name in ("conv_in", "norm_out", "conv_out"))
        for number in (1, 2):
            ours = f"{half}.middle.{('block_in', 'block_out')[number - 1]}"
            yield from leaves(ours, f"{half}.mid.block_{number}", AUTOENCODER_RESIDUAL)
        yield from _pixel_attention(f"{half}.middle.attention", f"{half}.mid.attn_1")
        for level in range(last + 1):
            ours = f"{half}.levels.{level}"
            theirs = f"{half}.{direction}.{level if direction == 'down' else last - level}"
            for index in range(blocks):
                yield from leaves(f"{ours}.blocks.{index}", f"{theirs}.block.{index}", AUTOENCODER_RESIDUAL)
                yield from _pixel_attention(f"{ours}.attentions.{index}", f"{theirs}.attn.{index}")
            yield f"{ours}.resample.conv", f"{theirs}.{direction}sample.conv"


def _pixel_attention(ours: str, theirs: str) -> Layers:
    """The autoencoder's attention, 1x1 convolutions there."""
    yield f"{ours}.norm", f"{theirs}.norm"
    for leaf, name in (("q", "q"), ("k", "k"), ("v", "v"), ("out", "proj_out")):
        layer = f"{ours}.attention.{leaf}"
        yield layer, Pair(f"{theirs}.{name}", (layer,), axes=2)
