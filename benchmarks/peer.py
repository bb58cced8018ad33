"""diffusers' modules as a person would use them: the same architecture and weights as ours, its own plain loops."""

import re
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from diffusers import AutoencoderKL, EulerDiscreteScheduler, UNet2DConditionModel
from diffusers.utils import logging
from torch import Tensor, nn

from latentkit.nets.autoencoder import AutoencoderConfig
from latentkit.nets.unet import UNetConfig

logging.set_verbosity_error()

BLOCK = [
    (r"(\d)\.norm_in\.", r"\1.norm1."),
    (r"(\d)\.conv_in\.", r"\1.conv1."),
    (r"(\d)\.norm_out\.", r"\1.norm2."),
    (r"(\d)\.conv_out\.", r"\1.conv2."),
    (r"\.skip\.", ".conv_shortcut."),
    (r"^(|encoder\.|decoder\.)norm_out\.", r"\1conv_norm_out."),
    (r"\.([qkv])\.(weight|bias)$", r".to_\1.\2"),
]
"""What both networks rename: the inside of a residual block, q, k, v, the last norm."""

AUTOENCODER = [
    (r"^to_moments\.", "quant_conv."),
    (r"^from_latent\.", "post_quant_conv."),
    (r"^encoder\.levels\.(\d+)\.resample\.", r"encoder.down_blocks.\1.downsamplers.0."),
    (r"^decoder\.levels\.(\d+)\.resample\.", r"decoder.up_blocks.\1.upsamplers.0."),
    (r"^encoder\.levels\.(\d+)\.blocks\.", r"encoder.down_blocks.\1.resnets."),
    (r"^decoder\.levels\.(\d+)\.blocks\.", r"decoder.up_blocks.\1.resnets."),
    (r"\.middle\.block_in\.", ".mid_block.resnets.0."),
    (r"\.middle\.block_out\.", ".mid_block.resnets.1."),
    (r"\.middle\.attention\.norm\.", ".mid_block.attentions.0.group_norm."),
    (r"\.middle\.attention\.attention\.out\.", ".mid_block.attentions.0.to_out.0."),
    (r"\.middle\.attention\.attention\.", ".mid_block.attentions.0."),
    *BLOCK,
]

UNET = [
    (r"^(time|vector)_embedding\.linear_in\.", r"\1_embedding.linear_1."),
    (r"^(time|vector)_embedding\.linear_out\.", r"\1_embedding.linear_2."),
    (r"^vector_embedding\.", "class_embedding."),
    (r"^(down|up)\.(\d+)\.blocks\.(\d+)\.residual\.", r"\1_blocks.\2.resnets.\3."),
    (r"^(down|up)\.(\d+)\.blocks\.(\d+)\.transformer\.", r"\1_blocks.\2.attentions.\3."),
    (r"^(down|up)\.(\d+)\.(down|up)sample\.", r"\1_blocks.\2.\3samplers.0."),
    (r"^middle\.block_in\.residual\.", "mid_block.resnets.0."),
    (r"^middle\.block_in\.transformer\.", "mid_block.attentions.0."),
    (r"^middle\.block_out\.residual\.", "mid_block.resnets.1."),
    (r"(resnets\.\d+)\.embedding\.", r"\1.time_emb_proj."),
    (r"\.project_(in|out)\.", r".proj_\1."),
    (r"\.blocks\.(\d+)\.", r".transformer_blocks.\1."),
    (r"\.norm_self\.", ".norm1."),
    (r"\.norm_cross\.", ".norm2."),
    (r"\.norm_feed\.", ".norm3."),
    (r"\.self_attention\.out\.", ".attn1.to_out.0."),
    (r"\.cross_attention\.out\.", ".attn2.to_out.0."),
    (r"\.self_attention\.", ".attn1."),
    (r"\.cross_attention\.", ".attn2."),
    (r"\.feed_forward\.project\.", ".ff.net.0.proj."),
    (r"\.feed_forward\.out\.", ".ff.net.2."),
    *BLOCK,
]

SAME = 0.9
"""Cosine of a part's gradients, compiled and eager, from which on they are the same but for rounding."""


class Variant(NamedTuple):
    """One way to run the peer."""

    bf16: bool
    channels_last: bool
    compiled: bool

    def __str__(self) -> str:
        return " ".join(
            (
                "bf16" if self.bf16 else "float32",
                "channels_last" if self.channels_last else "contiguous",
                "compiled" if self.compiled else "eager",
            )
        )

    @property
    def layout(self) -> torch.memory_format:
        """The memory format of weights and pictures."""
        return torch.channels_last if self.channels_last else torch.contiguous_format


def renamed(key: str, rules: list[tuple[str, str]]) -> str:
    """Our name of a weight as diffusers': each rule applied in turn."""
    for pattern, replacement in rules:
        key = re.sub(pattern, replacement, key)
    return key


def copy_weights(ours: nn.Module, theirs: nn.Module, rules: list[tuple[str, str]]) -> None:
    """Fill the peer with our weights; RuntimeError unless every name and shape of both is used."""
    theirs.load_state_dict({renamed(key, rules): value for key, value in ours.state_dict().items()}, strict=True)


def autoencoder(config: AutoencoderConfig) -> AutoencoderKL:
    """AutoencoderKL of the same architecture (`stem` 1)."""
    assert config.stem == 1, "AutoencoderKL has no stem"
    levels = len(config.multipliers)
    return AutoencoderKL(
        in_channels=config.picture_channels,
        out_channels=config.picture_channels,
        down_block_types=("DownEncoderBlock2D",) * levels,
        up_block_types=("UpDecoderBlock2D",) * levels,
        block_out_channels=tuple(config.channels * m for m in config.multipliers),
        layers_per_block=config.blocks,
        latent_channels=config.latent_channels,
        mid_block_add_attention=config.attention,
    )


def unet(config: UNetConfig) -> UNet2DConditionModel:
    """UNet2DConditionModel of the same architecture (its `attention_head_dim` is the count of heads)."""
    attends = [depth > 0 for depth in config.depth]
    return UNet2DConditionModel(
        in_channels=config.channels_in,
        out_channels=config.channels_out,
        down_block_types=tuple("CrossAttnDownBlock2D" if a else "DownBlock2D" for a in attends),
        up_block_types=tuple("CrossAttnUpBlock2D" if a else "UpBlock2D" for a in reversed(attends)),
        block_out_channels=tuple(config.channels * m for m in config.multipliers),
        layers_per_block=config.blocks,
        cross_attention_dim=config.context_width or 1280,
        attention_head_dim=config.heads or 8,
        use_linear_projection=config.linear_projection,
        class_embed_type="projection" if config.vector_width else None,
        projection_class_embeddings_input_dim=config.vector_width,
    )


def prepared(config: AutoencoderConfig | UNetConfig, variant: Variant, weights: nn.Module | None) -> Any:
    """The peer of one of our networks in float32 and the variant's layout, with the weights of ours or its own."""
    if isinstance(config, AutoencoderConfig):
        theirs, rules = autoencoder(config), AUTOENCODER
    else:
        theirs, rules = unet(config), UNET
    if weights is not None:
        copy_weights(weights, theirs, rules)
    return theirs.to(memory_format=variant.layout)


def gradients(network: nn.Module, loss: Callable[[], Tensor], bf16: bool) -> dict[str, Tensor]:
    """Of one loss, by the network's outermost parts: each part's gradients as one vector."""
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        value = loss()
    found: dict[str, list[Tensor]] = {}
    named = dict(network.named_parameters())
    for name, grad in zip(named, torch.autograd.grad(value, list(named.values()), allow_unused=True), strict=True):
        found.setdefault(name.split(".")[0], []).append(torch.zeros_like(named[name]) if grad is None else grad)
    return {part: torch.cat([grad.flatten().float() for grad in grads]) for part, grads in found.items()}


def trusted(variant: Variant, found: Callable[[Variant], dict[str, Tensor]]) -> None:
    """RuntimeError where `found`, the gradients of a variant, are others compiled than eager in any part."""
    if not variant.compiled:
        return
    compiled, eager = found(variant), found(variant._replace(compiled=False))
    for part, wanted in eager.items():
        cosine = float(torch.nn.functional.cosine_similarity(compiled[part], wanted, dim=0))
        if wanted.any() and not cosine >= SAME:
            raise RuntimeError(f"compiled, the peer's gradients of {part} are wrong (cosine {cosine:.2f}): not used")


def autoencoder_loss(
    theirs: AutoencoderKL, variant: Variant, pixels: Tensor, noise: Tensor, compare: Callable[..., Tensor]
) -> Callable[[], Tensor]:
    """The reconstruction loss; `compare(decoded, pixels, mean, log_variance)` is that of our objective."""
    encode, decode = theirs.encode, theirs.decode
    if variant.compiled:
        encode, decode = torch.compile(encode), torch.compile(decode)
    pixels = pixels.contiguous(memory_format=variant.layout)

    def loss() -> Tensor:
        posterior = encode(pixels).latent_dist
        mean, log_variance = posterior.mean.float(), posterior.logvar.float()
        decoded = decode(mean + (0.5 * log_variance).exp() * noise).sample.float()
        return compare(decoded, pixels, mean, log_variance)

    return loss


def diffusion_loss(
    theirs: UNet2DConditionModel,
    variant: Variant,
    encoder: nn.Module,
    ids: Tensor,
    x: Tensor,
    timestep: Tensor,
    target: Tensor,
) -> Callable[[], Tensor]:
    """The mean squared error of the U-Net at noisy latents `x`, told `ids` through a text encoder trained with it."""
    network, tower = theirs, encoder
    if variant.compiled:
        network, tower = torch.compile(theirs), torch.compile(encoder)
    x = x.contiguous(memory_format=variant.layout)

    def loss() -> Tensor:
        context, vector = tower(ids)
        predicted = network(x, timestep, encoder_hidden_states=context, class_labels=vector).sample
        return (predicted.float() - target).square().mean()

    return loss


def pictures(
    theirs: UNet2DConditionModel,
    first_stage: AutoencoderKL,
    variant: Variant,
    encoder: nn.Module,
    ids: Tensor,
    noise: Tensor,
    steps: int,
    guidance: float,
) -> Callable[[], Tensor]:
    """Text to pictures by Euler's method with guidance; `ids` holds the negative rows, then the positive ones."""
    dtype = torch.bfloat16 if variant.bf16 else torch.float32
    theirs, first_stage, encoder = (m.to(dtype).eval().requires_grad_(False) for m in (theirs, first_stage, encoder))
    network, decode, tower = theirs, first_stage.decode, encoder
    if variant.compiled:
        network, decode, tower = torch.compile(theirs), torch.compile(first_stage.decode), torch.compile(encoder)
    scheduler = EulerDiscreteScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", timestep_spacing="trailing"
    )

    @torch.inference_mode()
    def draw() -> Tensor:
        context, vector = tower(ids)
        scheduler.set_timesteps(steps)
        x = noise * (scheduler.sigmas[0] ** 2 + 1) ** 0.5
        for timestep in scheduler.timesteps:
            both = scheduler.scale_model_input(torch.cat([x, x]), timestep)
            both = both.to(dtype).contiguous(memory_format=variant.layout)
            predicted = network(both, timestep, encoder_hidden_states=context, class_labels=vector).sample.float()
            negative, positive = predicted.chunk(2)
            x = scheduler.step(negative + guidance * (positive - negative), timestep, x).prev_sample
        return decode(x.to(dtype).contiguous(memory_format=variant.layout)).sample.float().clamp(-1, 1)

    return draw
