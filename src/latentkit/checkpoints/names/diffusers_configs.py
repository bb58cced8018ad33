"""The config.json of diffusers' U-Nets and autoencoders as our configs and back; what we cannot run is named."""

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from latentkit.errors import InputError
from latentkit.nets.autoencoder import AutoencoderConfig
from latentkit.nets.unet import UNetConfig

VERSION = "0.30.0"
"""The version of diffusers whose fields are written."""

UNET_FIXED: dict[str, Any] = {
    "act_fn": "silu",
    "addition_embed_type_num_heads": 64,
    "attention_type": "default",
    "center_input_sample": False,
    "class_embeddings_concat": False,
    "conv_in_kernel": 3,
    "conv_out_kernel": 3,
    "cross_attention_norm": None,
    "downsample_padding": 1,
    "dual_cross_attention": False,
    "encoder_hid_dim": None,
    "encoder_hid_dim_type": None,
    "flip_sin_to_cos": True,
    "freq_shift": 0,
    "mid_block_only_cross_attention": None,
    "mid_block_scale_factor": 1,
    "norm_eps": 1e-5,
    "norm_num_groups": 32,
    "num_attention_heads": None,
    "resnet_out_scale_factor": 1.0,
    "resnet_skip_time_act": False,
    "time_embedding_act_fn": None,
    "time_embedding_type": "positional",
    "timestep_post_act": None,
}
"""Fields of which only one value is run here."""
UNET_FREE = {
    "addition_embed_type", "addition_time_embed_dim",
    "add_attention", "attention_head_dim", "attn_norm_num_groups", "block_out_channels", "class_embed_type",
    "cross_attention_dim", "decay", "down_block_types", "downsample_type", "dropout", "in_channels",
    "inv_gamma", "layers_per_block", "mid_block_type", "min_decay", "num_class_embeds", "num_train_timesteps",
    "only_cross_attention", "optimization_step", "out_channels", "power", "projection_class_embeddings_input_dim",
    "resnet_time_scale_shift", "reverse_transformer_layers_per_block", "sample_size", "time_cond_proj_dim",
    "time_embedding_dim",
    "transformer_layers_per_block", "up_block_types", "upcast_attention", "update_after_step", "upsample_type",
    "use_ema_warmup", "use_linear_projection",
}  # fmt: skip
AUTOENCODER_FIXED: dict[str, Any] = {
    "act_fn": "silu",
    "use_quant_conv": True,
    "use_post_quant_conv": True,
    "norm_type": "group",
    "lookup_from_codebook": False,
}
AUTOENCODER_FREE = {
    "block_out_channels", "down_block_types", "force_upcast",
    "in_channels", "latent_channels", "latents_mean", "latents_std", "layers_per_block", "mid_block_add_attention",
    "norm_num_groups", "num_vq_embeddings", "out_channels", "sample_size", "scaling_factor", "shift_factor",
    "up_block_types", "vq_embed_dim",
}  # fmt: skip


class Statistics(NamedTuple):
    """Mean and deviation of the raw latents, by channel."""

    mean: tuple[float, ...]
    std: tuple[float, ...]


def real(value: Any) -> bool:
    """Whether it is a number that can be meant."""
    return isinstance(value, int | float) and -1e6 < value < 1e6


class _Fields:
    """A config.json whose entries are asked for by type; InputError names those that are wrong."""

    def __init__(self, what: str, values: Mapping[str, Any], fixed: Mapping[str, Any], free: set[str]) -> None:
        self.what, self.values = what, values
        for name, wanted in fixed.items():
            got = values.get(name, wanted)
            if got != wanted:
                self.refuse(name, f"only {wanted!r} is run")
        unknown = [n for n, v in values.items() if n not in {*fixed, *free} and n[:1] != "_" and v is not None]
        if unknown:
            names = str(sorted(unknown))[:200]
            raise InputError(f"{what}: fields {names} are not known; what they ask for cannot be run")

    def refuse(self, name: str, why: str) -> InputError:
        """Name the field and what it holds."""
        raise InputError(f"{self.what}: {name} is {str(self.values.get(name))[:80]!r}; {why}")

    def number(self, name: str, default: int | None = None) -> int:
        """A positive whole number."""
        value = self.values.get(name, default)
        if type(value) is not int or not 0 < value < 1 << 20:
            raise self.refuse(name, "give a whole number above 0")
        return value

    def optional(self, name: str) -> int | None:
        """The same, or nothing."""
        return None if self.values.get(name) is None else self.number(name)

    def numbers(self, name: str, levels: int, default: int | None = None) -> tuple[int, ...]:
        """One for each level, or one for all."""
        value = self.values.get(name, default)
        many = (value,) * levels if type(value) is int else tuple(value) if isinstance(value, Sequence) else ()
        if len(many) != levels or any(type(n) is not int or not 0 < n < 1 << 20 for n in many):
            self.refuse(name, f"give a whole number above 0 for each of {levels} levels")
        return many

    def blocks(self, name: str) -> tuple[str, ...]:
        """Names of blocks, one for each level."""
        value = self.values.get(name)
        if not isinstance(value, Sequence) or not 0 < len(value) <= 16 or not all(isinstance(n, str) for n in value):
            raise self.refuse(name, "give the kind of each level, 16 at most")
        return tuple(value)

    def multipliers(self, levels: int) -> tuple[int, tuple[int, ...]]:
        """The first level's width, and every level's as a multiple of it."""
        widths = self.numbers("block_out_channels", levels)
        unit = math.gcd(*widths)
        if unit != widths[0]:
            self.refuse("block_out_channels", "each width must be a multiple of the first")
        return unit, tuple(width // unit for width in widths)


def unet_config(what: str, values: Mapping[str, Any]) -> tuple[UNetConfig, str]:
    """Our config of a UNet2DConditionModel or UNet2DModel, and where its vector goes (see `diffusers_names.py`).

    Errors: InputError names fields that cannot be run.
    """
    fields = _Fields(what, values, UNET_FIXED, UNET_FREE)
    plain = values.get("_class_name") == "UNet2DModel"
    kinds, up_kinds = fields.blocks("down_block_types"), fields.blocks("up_block_types")
    levels = len(kinds)
    attention = "AttnDownBlock2D" if plain else "CrossAttnDownBlock2D"
    steps = {"DownBlock2D": "UpBlock2D", "ResnetDownsampleBlock2D": "ResnetUpsampleBlock2D"}
    steps[attention] = attention.replace("Down", "Up")
    if tuple(steps.get(kind, "?") for kind in reversed(kinds)) != up_kinds:
        fields.refuse("down_block_types", f"only {', '.join(steps)} and their mirror images are run")
    channels, multipliers = fields.multipliers(levels)
    if any(channels % 32 for _ in multipliers):
        fields.refuse("block_out_channels", "widths must be multiples of 32")
    blocks = fields.numbers("layers_per_block", levels)
    if len(set(blocks)) > 1:
        fields.refuse("layers_per_block", "all levels must have the same number")
    depths = (1,) * levels if plain else fields.numbers("transformer_layers_per_block", levels, 1)
    reverse = values.get("reverse_transformer_layers_per_block")
    if reverse is not None and reverse != list(depths[::-1]):
        fields.refuse("reverse_transformer_layers_per_block", "the way up must mirror the way down")
    middle = values.get("mid_block_type", "UNetMidBlock2D" if plain else "UNetMidBlock2DCrossAttn")
    if middle != ("UNetMidBlock2D" if plain else "UNetMidBlock2DCrossAttn") or not values.get("add_attention", True):
        fields.refuse("mid_block_type", "the middle must have an attention of the same kind")
    scale_shift = values.get("resnet_time_scale_shift", "default") == "scale_shift"
    if not scale_shift and values.get("resnet_time_scale_shift", "default") != "default":
        fields.refuse("resnet_time_scale_shift", "only 'default' and 'scale_shift' are run")
    groups = values.get("attn_norm_num_groups", None if scale_shift else 32)
    if plain and (groups or (None if scale_shift else 32)) != 32:
        fields.refuse("attn_norm_num_groups", "the middle's attention must have a norm of 32 groups")
    dropout = values.get("dropout", 0.0)
    if not real(dropout) or not 0 <= dropout < 1:
        fields.refuse("dropout", "give a number from 0 to below 1")
    vector, place, classes = _vector(fields)
    heads, head_width = _heads(fields, plain, [channels * multiplier for multiplier in multipliers])
    context = None if plain else fields.numbers("cross_attention_dim", levels, 1280)
    if context is not None and len(set(context)) > 1:
        fields.refuse("cross_attention_dim", "all levels must have the same width")
    config = UNetConfig(
        channels_in=fields.number("in_channels", 3 if plain else 4),
        channels_out=fields.number("out_channels", 3 if plain else 4),
        channels=channels,
        multipliers=multipliers,
        blocks=blocks[0],
        depth=tuple(depth if kind == attention else 0 for kind, depth in zip(kinds, depths)),
        middle_depth=depths[-1],
        heads=heads,
        head_width=head_width,
        context_width=context[0] if context else None,
        vector_width=vector,
        linear_projection=plain or bool(values.get("use_linear_projection", False)),
        scale_shift=scale_shift,
        embedding_width=fields.optional("time_embedding_dim"),
        dropout=float(dropout),
        plain_attention=plain,
        residual_resampling="ResnetDownsampleBlock2D" in kinds or values.get("downsample_type") == "resnet",
        cross_only=_cross_only(fields, levels),
        classes=classes,
    )
    return config, place


def _vector(fields: _Fields) -> tuple[int | None, str, int | None]:
    """Width of the vector slot, the name of its embedding, rows of a table of classes."""
    added, kind = fields.values.get("addition_embed_type"), fields.values.get("class_embed_type")
    if added is None and kind is None:
        return None, "add_embedding", fields.optional("num_class_embeds")
    if added is not None and (added != "text_time" or kind is not None):
        fields.refuse("addition_embed_type", "only 'text_time' is run, and without a class embedding")
    if added is None and kind != "projection":
        fields.refuse("class_embed_type", "only 'projection' is run")
    place = "class_embedding" if added is None else "add_embedding"
    return fields.number("projection_class_embeddings_input_dim"), place, None


def _heads(fields: _Fields, plain: bool, widths: list[int]) -> tuple[int | None, int | None]:
    """The number of heads or their width. In UNet2DConditionModel `attention_head_dim` is a number of heads."""
    if plain:
        return (
            (None, fields.number("attention_head_dim", 8))
            if fields.values.get("attention_head_dim", 8) is not None
            else (1, None)
        )
    heads = fields.numbers("attention_head_dim", len(widths), 8)
    if len(set(heads)) == 1:
        return heads[0], None
    if len({width / count for width, count in zip(widths, heads)}) == 1:
        return None, widths[0] // heads[0]
    raise fields.refuse("attention_head_dim", "heads must be equal in number or in width on all levels")


def _cross_only(fields: _Fields, levels: int) -> int:
    value = fields.values.get("only_cross_attention", False)
    many = (value,) * levels if isinstance(value, bool) else tuple(value) if isinstance(value, Sequence) else ()
    count = sum(map(bool, many))
    if len(many) != levels or value is True or list(many) != [True] * count + [False] * (levels - count):
        fields.refuse("only_cross_attention", "only the first levels can do without self-attention")
    return count


def unet_json(
    config: UNetConfig, sample_size: int, place: str = "add_embedding", wave_width: int = 256
) -> dict[str, Any]:
    """The config.json of our U-Net; InputError for what diffusers does not have.

    `sample_size` is in latent cells, `wave_width` that of one of XL's sizes in the vector.
    """
    widths = [config.channels * multiplier for multiplier in config.multipliers]
    if any(width % 32 for width in widths):
        raise InputError(f"diffusers' layout holds no U-Net of widths {widths}: they must be multiples of 32")
    if config.middle_depth != (config.depth[-1] or config.middle_depth):
        raise InputError("diffusers' layout holds no U-Net whose middle is of another depth than its last level")
    common = {
        "_diffusers_version": VERSION,
        "act_fn": "silu",
        "block_out_channels": widths,
        "dropout": config.dropout,
        "in_channels": config.channels_in,
        "layers_per_block": config.blocks,
        "norm_eps": 1e-5,
        "norm_num_groups": 32,
        "out_channels": config.channels_out,
        "resnet_time_scale_shift": "scale_shift" if config.scale_shift else "default",
        "sample_size": sample_size,
        "time_embedding_dim": config.embedding_width,
    }
    if config.plain_attention:
        head_widths = {width // config.head_count(width) for width in widths if width in _attended(config)}
        if len(head_widths) > 1 or config.classes or config.vector_width:
            raise InputError(
                "diffusers' layout holds plain attention of one head width and without a vector only; this U-Net has "
                f"head widths {sorted(head_widths)}, classes={config.classes}, vector_width={config.vector_width}"
            )
        down, up = ("ResnetDownsampleBlock2D", "ResnetUpsampleBlock2D") if config.residual_resampling else (
            "DownBlock2D", "UpBlock2D",
        )  # fmt: skip
        step = "resnet" if config.residual_resampling else "conv"
        return common | {
            "_class_name": "UNet2DModel",
            "attn_norm_num_groups": 32,
            "attention_head_dim": head_widths.pop(),
            "down_block_types": ["AttnDownBlock2D" if depth else down for depth in config.depth],
            "downsample_type": step,
            "mid_block_type": "UNetMidBlock2D",
            "up_block_types": ["AttnUpBlock2D" if depth else up for depth in reversed(config.depth)],
            "upsample_type": step,
        }
    if config.residual_resampling or config.context_width is None:
        raise InputError(
            "diffusers' layout holds no transformers with residual resampling or without context; this U-Net has "
            f"residual_resampling={config.residual_resampling}, context_width={config.context_width}"
        )
    heads = [config.head_count(width) for width in widths]
    depth = [depth or 1 for depth in config.depth]
    depth[-1] = config.middle_depth
    fields: dict[str, Any] = {
        "_class_name": "UNet2DConditionModel",
        "attention_head_dim": heads[0] if len(set(heads)) == 1 else heads,
        "center_input_sample": False,
        "cross_attention_dim": config.context_width,
        "down_block_types": ["CrossAttnDownBlock2D" if d else "DownBlock2D" for d in config.depth],
        "downsample_padding": 1,
        "flip_sin_to_cos": True,
        "freq_shift": 0,
        "mid_block_scale_factor": 1,
        "mid_block_type": "UNetMidBlock2DCrossAttn",
        "only_cross_attention": [level < config.cross_only for level in range(len(widths))]
        if config.cross_only
        else False,
        "transformer_layers_per_block": depth[0] if len(set(depth)) == 1 else depth,
        "up_block_types": ["CrossAttnUpBlock2D" if d else "UpBlock2D" for d in reversed(config.depth)],
        "use_linear_projection": config.linear_projection,
        "num_class_embeds": config.classes,
    }
    if config.vector_width:
        added = place == "add_embedding"
        fields |= {
            "addition_embed_type": "text_time" if added else None,
            "addition_time_embed_dim": wave_width if added else None,
            "class_embed_type": None if added else "projection",
            "projection_class_embeddings_input_dim": config.vector_width,
        }
    return common | fields


def _attended(config: UNetConfig) -> set[int]:
    """Widths at which there is attention."""
    depths = [*config.depth[:-1], config.middle_depth]
    return {config.channels * multiplier for multiplier, depth in zip(config.multipliers, depths) if depth}


def autoencoder_config(what: str, values: Mapping[str, Any]) -> tuple[AutoencoderConfig, Statistics]:
    """Our config of an AutoencoderKL or VQModel, and the statistics that its latents are scaled with.

    Errors: InputError names fields that cannot be run.
    """
    fields = _Fields(what, values, AUTOENCODER_FIXED, AUTOENCODER_FREE)
    quantised = values.get("_class_name") == "VQModel"
    kinds, up_kinds = fields.blocks("down_block_types"), fields.blocks("up_block_types")
    levels = len(kinds)
    attended = sum(kind.startswith("Attn") for kind in kinds)
    mirrored = ("AttnUpDecoderBlock2D",) * attended + ("UpDecoderBlock2D",) * (levels - attended)
    if up_kinds != mirrored or kinds != tuple(kind.replace("UpDecoder", "DownEncoder") for kind in reversed(mirrored)):
        fields.refuse("down_block_types", "only the last levels can have attention, up and down alike")
    channels, multipliers = fields.multipliers(levels)
    if {math.gcd(32, channels * multiplier) for multiplier in multipliers} != {fields.number("norm_num_groups", 32)}:
        fields.refuse("norm_num_groups", "it must be what the widths have in common with 32")
    latent_channels = fields.number("latent_channels", 3 if quantised else 4)
    if quantised and fields.optional("vq_embed_dim") not in (None, latent_channels):
        fields.refuse("vq_embed_dim", "codes must have the latent's channels")
    picture_channels = fields.number("in_channels", 3)
    if fields.number("out_channels", 3) != picture_channels:
        fields.refuse("out_channels", "pictures must have as many channels out as in")
    config = AutoencoderConfig(
        picture_channels=picture_channels,
        latent_channels=latent_channels,
        channels=channels,
        multipliers=multipliers,
        blocks=fields.number("layers_per_block", 1),
        attention=bool(values.get("mid_block_add_attention", True)),
        attention_levels=attended,
        codes=fields.number("num_vq_embeddings", 256) if quantised else None,
    )
    return config, _statistics(fields, latent_channels)


def _statistics(fields: _Fields, channels: int) -> Statistics:
    """latent = (raw - mean) / std, of a factor and a shift or of lists by channel."""
    scale, shift = fields.values.get("scaling_factor", 0.18215), fields.values.get("shift_factor") or 0.0
    means, stds = (fields.values.get(f"latents_{name}") for name in ("mean", "std"))
    if not real(scale) or scale < 1e-6:
        fields.refuse("scaling_factor", "give a number above 0")
    if not real(shift):
        fields.refuse("shift_factor", "give a number")
    if means is None and stds is None:
        return Statistics((float(shift),) * channels, (1 / scale,) * channels)
    # diffusers: latent = (raw - mean) * scale / std
    whole = all(isinstance(part, list) and len(part) == channels and all(map(real, part)) for part in (means, stds))
    if not whole or min(stds or ()) <= 0:
        fields.refuse("latents_mean", f"latents_mean and latents_std must be lists of {channels} numbers")
    return Statistics(tuple(float(n) for n in means or ()), tuple(float(n) / scale for n in stds or ()))


def autoencoder_json(config: AutoencoderConfig, sample_size: int, scale: float) -> dict[str, Any]:
    """The config.json of our autoencoder; InputError for what diffusers does not have."""
    widths = [config.channels * multiplier for multiplier in config.multipliers]
    groups = {math.gcd(32, width) for width in widths}
    if len(groups) > 1:
        raise InputError(f"diffusers' layout holds no autoencoder of widths {widths}: their norms have unequal groups")
    plain, attended = len(widths) - config.attention_levels, config.attention_levels
    fields: dict[str, Any] = {
        "_class_name": "VQModel" if config.codes else "AutoencoderKL",
        "_diffusers_version": VERSION,
        "act_fn": "silu",
        "block_out_channels": widths,
        "down_block_types": ["DownEncoderBlock2D"] * plain + ["AttnDownEncoderBlock2D"] * attended,
        "in_channels": config.picture_channels,
        "latent_channels": config.latent_channels,
        "layers_per_block": config.blocks,
        "mid_block_add_attention": config.attention,
        "norm_num_groups": groups.pop(),
        "out_channels": config.picture_channels,
        "sample_size": sample_size,
        "scaling_factor": scale,
        "up_block_types": ["AttnUpDecoderBlock2D"] * attended + ["UpDecoderBlock2D"] * plain,
    }
    return fields | ({"num_vq_embeddings": config.codes} if config.codes else {"force_upcast": True})
