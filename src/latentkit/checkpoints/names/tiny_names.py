"""The names and configs that other programs give tiny autoencoders: their author's own, and diffusers'.

Both number the layers of each half one after another, those without weights too; the author's decoder begins with the
bound of its latents, which diffusers has in front of its layers. Sources: madebyollin/taesd `taesd.py`; diffusers
`autoencoder_tiny.py` and `vae.py`.
"""

from collections.abc import Collection, Mapping
from typing import Any, NamedTuple

from torch import Tensor

from latentkit.checkpoints.names.diffusers_configs import real
from latentkit.checkpoints.names.ldm_names import Layers
from latentkit.checkpoints.names.rename import Pair, paired
from latentkit.errors import InputError
from latentkit.nets.tiny import TinyAutoencoder, TinyConfig

CLASS = "AutoencoderTiny"
VERSION = "0.30.0"
"""The version of diffusers whose fields are written."""
BLOCK = {"conv_in": "conv.0", "conv_middle": "conv.2", "conv_out": "conv.4"}
FIXED: dict[str, Any] = {
    "_class_name": CLASS,
    "act_fn": "relu",
    "upsample_fn": "nearest",
    "upsampling_scaling_factor": 2,
}
"""Fields of which only one value is run here."""


class Layout(NamedTuple):
    """What stands before the layers of each half, and the number of the decoder's first layer with weights."""

    encoder: str
    decoder: str
    first: int


DIFFUSERS = Layout("encoder.layers.", "decoder.layers.", 0)
AUTHOR = Layout("encoder.", "decoder.", 1)


def layout_of(names: Collection[str]) -> Layout | None:
    """Whose names these are, if a tiny autoencoder's."""
    return next((one for one in (DIFFUSERS, AUTHOR) if f"{one.encoder}1.conv.0.weight" in names), None)


def tiny_pairs(network: TinyAutoencoder, layout: Layout = DIFFUSERS) -> list[Pair]:
    """Every parameter of the network beside its name."""
    return paired(_layers(network.config, layout), network.state_dict())


def _layers(config: TinyConfig, layout: Layout) -> Layers:
    last = len(config.blocks) - 1
    halves = (("encoder", layout.encoder, 0, config.blocks), ("decoder", layout.decoder, layout.first, None))
    for half, theirs, number, counts in halves:
        yield f"{half}.conv_in", f"{theirs}{number}"
        number += 1 if half == "encoder" else 2  # the decoder's is followed by ReLU
        for level, count in enumerate(counts or reversed(config.blocks)):
            if half == "encoder" and level > 0:
                yield f"{half}.levels.{level}.downsample", f"{theirs}{number}"
                number += 1
            for index in range(count):
                for ours, name in BLOCK.items():
                    yield f"{half}.levels.{level}.blocks.{index}.{ours}", f"{theirs}{number}.{name}"
                number += 1
            if half == "decoder" and level < last:
                yield f"{half}.levels.{level}.upsample", f"{theirs}{number + 1}"  # behind what repeats the pixels
                number += 2
        yield f"{half}.conv_out", f"{theirs}{number}"


def tiny_shape(tensors: Mapping[str, Tensor], what: str, layout: Layout) -> TinyConfig:
    """The config of what the tensors hold; InputError where its encoder makes no sense."""
    counts, convolutions = [0], []
    for number in range(len(tensors)):
        if f"{layout.encoder}{number}.conv.0.weight" in tensors:
            counts[-1] += 1
        elif (weight := tensors.get(f"{layout.encoder}{number}.weight")) is not None and weight.ndim == 4:
            convolutions.append(weight)
            counts.append(0)
        else:
            break
    if len(convolutions) < 2 or counts[0] or counts[-1]:
        raise InputError(f"{what}: its layers {layout.encoder}0 and on make no encoder of a tiny autoencoder")
    channels, picture_channels = convolutions[0].shape[:2]
    return TinyConfig(tuple(counts[1:-1]), convolutions[-1].shape[0], channels, picture_channels)


def tiny_config(what: str, values: Mapping[str, Any]) -> tuple[TinyConfig, float, float]:
    """Our config of an AutoencoderTiny, and its latents' factor and shift; InputError names fields that cannot be run.

    Its `latent_magnitude` and `latent_shift` say how latents are kept as bytes, and take no part in a picture.
    """

    def refuse(name: str, why: str) -> InputError:
        return InputError(f"{what}: {name} is {str(values.get(name))[:80]!r}; {why}")

    for name, wanted in FIXED.items():
        if values.get(name, wanted) != wanted:
            raise refuse(name, f"only {wanted!r} is run")
    found: dict[str, Any] = {}
    for name, default in (("encoder", (1, 3, 3, 3)), ("decoder", (3, 3, 3, 1))):
        found[name] = values.get(f"num_{name}_blocks", default)
        widths = values.get(f"{name}_block_out_channels", (64,) * 4)
        for field, numbers in ((f"num_{name}_blocks", found[name]), (f"{name}_block_out_channels", widths)):
            if not isinstance(numbers, list | tuple) or not 0 < len(numbers) < 20 or not all(map(_whole, numbers)):
                raise refuse(field, "give a whole number from 1 to 1024 for each level")
        if len(widths) != len(found[name]) or len(set(widths)) > 1:
            raise refuse(f"{name}_block_out_channels", "all levels must have the same width")
        found[f"{name} width"] = widths[0]
    if list(found["decoder"]) != list(reversed(found["encoder"])) or found["encoder width"] != found["decoder width"]:
        raise refuse("num_decoder_blocks", "the decoder must mirror the encoder")
    channels = {name: values.get(name, default) for name, default in (("in_channels", 3), ("latent_channels", 4))}
    for name, number in channels.items():
        if not _whole(number):
            raise refuse(name, "give a whole number from 1 to 1024")
    if values.get("out_channels", 3) != channels["in_channels"]:
        raise refuse("out_channels", "pictures must have as many channels out as in")
    scale, shift = values.get("scaling_factor", 1.0), values.get("shift_factor") or 0.0
    if not real(scale) or scale < 1e-6 or not real(shift):
        raise refuse("scaling_factor", "give a number above 0, and a number as shift_factor")
    config = TinyConfig(
        tuple(found["encoder"]), channels["latent_channels"], found["encoder width"], channels["in_channels"]
    )
    return config, float(scale), float(shift)


def _whole(number: Any) -> bool:
    return type(number) is int and 1 <= number <= 1024


def tiny_json(config: TinyConfig, scale: float) -> dict[str, Any]:
    """The config.json of our network."""
    widths = [config.channels] * len(config.blocks)
    return {
        **FIXED,
        "_diffusers_version": VERSION,
        "block_out_channels": widths,
        "decoder_block_out_channels": widths,
        "encoder_block_out_channels": widths,
        "force_upcast": False,
        "in_channels": config.picture_channels,
        "latent_channels": config.latent_channels,
        "latent_magnitude": 3,
        "latent_shift": 0.5,
        "num_decoder_blocks": list(reversed(config.blocks)),
        "num_encoder_blocks": list(config.blocks),
        "out_channels": config.picture_channels,
        "scaling_factor": scale,
        "shift_factor": 0.0,
    }
