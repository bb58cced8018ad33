"""The names that diffusers gives the weights of U-Nets and autoencoders, generated from a network."""

from latentkit.checkpoints.names.ldm_names import AUTOENCODER_RESIDUAL, Layers, leaves, transformer
from latentkit.checkpoints.names.rename import Pair, paired
from latentkit.checkpoints.names.tiny_names import tiny_pairs
from latentkit.errors import InputError
from latentkit.nets.autoencoder import Autoencoder, AutoencoderConfig
from latentkit.nets.controlnet import ControlNet
from latentkit.nets.tiny import TinyConfig
from latentkit.nets.unet import UNet, UNetConfig

RESIDUAL = AUTOENCODER_RESIDUAL | {"embedding": "time_emb_proj", "skip": "conv_shortcut"}
PIXEL_ATTENTION = {"norm": "group_norm"} | {
    f"attention.{leaf}": name for leaf, name in (("q", "to_q"), ("k", "to_k"), ("v", "to_v"), ("out", "to_out.0"))
}
OLD_ATTENTION = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
"""What an autoencoder's attention was called before diffusers 0.18, and since."""
VECTOR_EMBEDDINGS = ("add_embedding", "class_embedding")
"""Where the vector slot goes: in XL, and in unCLIP."""


def unet_pairs(network: UNet | ControlNet, vector: str = "add_embedding") -> list[Pair]:
    """Every parameter of the U-Net beside its name in UNet2DConditionModel, or UNet2DModel for plain attention.

    `vector` is one of `VECTOR_EMBEDDINGS`. Errors: InputError for what that layout cannot hold.
    """
    return paired(_unet(network.config, vector), network.state_dict())


def _unet(config: UNetConfig, vector: str) -> Layers:
    if not config.middle_depth:
        raise InputError("the diffusers layout holds no U-Net without attention in its middle; this one has none")
    for ours, theirs in (("time_embedding", "time_embedding"), ("vector_embedding", vector)):
        yield from ((f"{ours}.linear_in", f"{theirs}.linear_1"), (f"{ours}.linear_out", f"{theirs}.linear_2"))
    yield "class_embedding", "class_embedding"
    yield from (("conv_in", "conv_in"), ("norm_out", "conv_norm_out"), ("conv_out", "conv_out"))

    def block(ours: str, place: str, index: int, depth: int) -> Layers:
        yield from leaves(f"{ours}.residual", f"{place}.resnets.{index}", RESIDUAL)
        yield from transformer(f"{ours}.transformer", f"{place}.attentions.{index}", depth)
        yield from leaves(f"{ours}.attention", f"{place}.attentions.{index}", PIXEL_ATTENTION)

    def step(ours: str, theirs: str) -> Layers:
        yield f"{ours}.conv", f"{theirs}.conv"
        if config.residual_resampling:
            yield from leaves(ours, theirs, RESIDUAL)

    yield from block("middle.block_in", "mid_block", 0, config.middle_depth)
    yield from block("middle.block_out", "mid_block", 1, 0)
    for half, depths in (("down", config.depth), ("up", config.depth[::-1])):
        for level, depth in enumerate(depths):
            for index in range(config.blocks + (half == "up")):
                yield from block(f"{half}.{level}.blocks.{index}", f"{half}_blocks.{level}", index, depth)
            yield from step(f"{half}.{level}.{half}sample", f"{half}_blocks.{level}.{half}samplers.0")


def autoencoder_pairs(network: Autoencoder) -> list[Pair]:
    """Every parameter of the autoencoder beside its name in AutoencoderKL, VQModel (a codebook's) or AutoencoderTiny.

    Errors: InputError for what that layout cannot hold.
    """
    config = network.config
    if isinstance(config, TinyConfig):
        return tiny_pairs(network)
    for name, wanted in (("stem", 1), ("levels", None), ("variance", True)):
        if getattr(config, name) != wanted:
            got = getattr(config, name)
            raise InputError(f"the diffusers layout holds no autoencoder with {name} {got}; only with {wanted}")
    pairs = paired(_autoencoder(config), network.state_dict())
    return [*pairs, Pair("quantize.embedding.weight", ("codebook.vectors",))] if config.codes else pairs


def _autoencoder(config: AutoencoderConfig) -> Layers:
    yield from (("to_moments", "quant_conv"), ("from_latent", "post_quant_conv"))
    for half, direction, blocks in (("encoder", "down", config.blocks), ("decoder", "up", config.blocks + 1)):
        for ours, theirs in (("conv_in", "conv_in"), ("norm_out", "conv_norm_out"), ("conv_out", "conv_out")):
            yield f"{half}.{ours}", f"{half}.{theirs}"
        for index, ours in enumerate(("block_in", "block_out")):
            yield from leaves(f"{half}.middle.{ours}", f"{half}.mid_block.resnets.{index}", RESIDUAL)
        yield from leaves(f"{half}.middle.attention", f"{half}.mid_block.attentions.0", PIXEL_ATTENTION)
        for level in range(len(config.multipliers)):
            ours, theirs = f"{half}.levels.{level}", f"{half}.{direction}_blocks.{level}"
            for index in range(blocks):
                yield from leaves(f"{ours}.blocks.{index}", f"{theirs}.resnets.{index}", RESIDUAL)
                yield from leaves(f"{ours}.attentions.{index}", f"{theirs}.attentions.{index}", PIXEL_ATTENTION)
            yield f"{ours}.resample.conv", f"{theirs}.{direction}samplers.0.conv"


def modern(name: str) -> str:
    """Today's name of an autoencoder's tensor that an older diffusers wrote."""
    stem, _, kind = name.rpartition(".")
    place, _, leaf = stem.rpartition(".")
    return f"{place}.{OLD_ATTENTION[leaf]}.{kind}" if ".attentions." in name and leaf in OLD_ATTENTION else name
