"""Every key and shape of the released files at full size, from two sources that are not ours.

diffusers' converters read what they know of them. For the rest the networks are laid out here once more as the released
constructors do, from the released configs (attention by downsampling or resolution, not by level).
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

import pytest
import torch

from latentkit.checkpoints.files import Shapes
from latentkit.checkpoints.names import diffusers_names, ldm_names
from latentkit.checkpoints.names.diffusers_configs import autoencoder_json, unet_json
from latentkit.checkpoints.names.rename import given
from latentkit.model.presets import FIRST_STAGES, PRESETS, preset
from latentkit.nets.autoencoder import Autoencoder
from latentkit.nets.unet import UNet

Sizes = dict[str, tuple[int, ...]]


def sizes(tensors: Any) -> Sizes:
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}


def unet(name: str) -> UNet:
    with torch.device("meta"), Shapes():
        return UNet(preset(name).network)


def autoencoder(name: str) -> Autoencoder:
    with torch.device("meta"), Shapes():
        return Autoencoder(FIRST_STAGES[name])


@pytest.mark.parity
@pytest.mark.parametrize(
    "name", [name for name, own in PRESETS.items() if not own.architecture.network.plain_attention]
)
def test_diffusers_converts_every_key_of_the_unet(name: str) -> None:
    loaders: Any = pytest.importorskip("diffusers.loaders.single_file_utils")
    network, place = unet(name), "class_embedding" if "unclip" in name else "add_embedding"
    state = network.state_dict()
    released = {f"model.diffusion_model.{key}": t for key, t in given(ldm_names.unet_pairs(network), state).items()}
    converted = loaders.convert_ldm_unet_checkpoint(released, unet_json(network.config, 64, place))
    assert sizes(converted) == sizes(given(diffusers_names.unet_pairs(network, place), state))


@pytest.mark.parity
@pytest.mark.parametrize("name", ["kl-f4", "kl-f8", "x4-upscaler"])
def test_diffusers_converts_every_key_of_the_first_stage(name: str) -> None:
    loaders: Any = pytest.importorskip("diffusers.loaders.single_file_utils")
    network = autoencoder(name)
    state = network.state_dict()
    released = {f"first_stage_model.{k}": t for k, t in given(ldm_names.autoencoder_pairs(network), state).items()}
    converted = loaders.convert_ldm_vae_checkpoint(released, autoencoder_json(network.config, 256, 0.18215))
    assert sizes(converted) == sizes(given(diffusers_names.autoencoder_pairs(network), state))


def layer(name: str, out: int, into: int | None = None, *kernel: int, bias: bool = True) -> Iterator[tuple[str, Any]]:
    """A norm where there is no `into`."""
    yield f"{name}.weight", (out,) if into is None else (out, into, *kernel)
    if bias:
        yield f"{name}.bias", (out,)


class Released(NamedTuple):
    """Arguments of the released U-Net (CompVis/latent-diffusion, `openaimodel.py`), two blocks to a level in all."""

    into: int
    out: int
    channels: int
    multipliers: tuple[int, ...]
    attention: tuple[int, ...]
    """Downsampling factors."""
    depth: int = 0
    """Of transformers, 0 for plain attention."""
    context: int = 0
    scale_shift: bool = False
    updown: bool = False

    def residual(self, name: str, into: int, out: int) -> Iterator[tuple[str, Any]]:
        yield from layer(f"{name}.in_layers.0", into)
        yield from layer(f"{name}.in_layers.2", out, into, 3, 3)
        yield from layer(f"{name}.emb_layers.1", (1 + self.scale_shift) * out, 4 * self.channels)
        yield from layer(f"{name}.out_layers.0", out)
        yield from layer(f"{name}.out_layers.3", out, out, 3, 3)
        if into != out:
            yield from layer(f"{name}.skip_connection", out, into, 1, 1)

    def looks(self, name: str, wide: int) -> Iterator[tuple[str, Any]]:
        yield from layer(f"{name}.norm", wide)
        if not self.depth:
            yield from layer(f"{name}.qkv", 3 * wide, wide, 1)
            yield from layer(f"{name}.proj_out", wide, wide, 1)
            return
        for end in ("in", "out"):
            yield from layer(f"{name}.proj_{end}", wide, wide, 1, 1)
        for block in (f"{name}.transformer_blocks.{number}" for number in range(self.depth)):
            for number, context in ((1, wide), (2, self.context)):
                yield from layer(f"{block}.attn{number}.to_q", wide, wide, bias=False)
                yield from layer(f"{block}.attn{number}.to_k", wide, context, bias=False)
                yield from layer(f"{block}.attn{number}.to_v", wide, context, bias=False)
                yield from layer(f"{block}.attn{number}.to_out.0", wide, wide)
            yield from layer(f"{block}.ff.net.0.proj", 8 * wide, wide)
            yield from layer(f"{block}.ff.net.2", wide, 4 * wide)
            for number in (1, 2, 3):
                yield from layer(f"{block}.norm{number}", wide)

    def tensors(self) -> Iterator[tuple[str, Any]]:
        wide, last = self.channels, len(self.multipliers) - 1
        yield from layer("time_embed.0", 4 * wide, wide)
        yield from layer("time_embed.2", 4 * wide, 4 * wide)
        yield from layer("input_blocks.0.0", wide, self.into, 3, 3)
        skips, factor, number = [wide], 1, 1
        for level, multiplier in enumerate(self.multipliers):
            for _ in range(2):
                yield from self.residual(f"input_blocks.{number}.0", wide, multiplier * self.channels)
                wide = multiplier * self.channels
                if factor in self.attention:
                    yield from self.looks(f"input_blocks.{number}.1", wide)
                skips.append(wide)
                number += 1
            if level < last:
                down = f"input_blocks.{number}.0"
                yield from self.residual(down, wide, wide) if self.updown else layer(f"{down}.op", wide, wide, 3, 3)
                skips.append(wide)
                factor, number = factor * 2, number + 1
        yield from self.residual("middle_block.0", wide, wide)
        yield from self.looks("middle_block.1", wide)
        yield from self.residual("middle_block.2", wide, wide)
        number = 0
        for level, multiplier in reversed(list(enumerate(self.multipliers))):
            for index in range(3):
                into, wide, place = wide + skips.pop(), multiplier * self.channels, 1
                yield from self.residual(f"output_blocks.{number}.0", into, wide)
                if factor in self.attention:
                    yield from self.looks(f"output_blocks.{number}.1", wide)
                    place = 2
                if level and index == 2:
                    up = f"output_blocks.{number}.{place}"
                    yield from self.residual(up, wide, wide) if self.updown else layer(f"{up}.conv", wide, wide, 3, 3)
                    factor //= 2
                number += 1
        yield from layer("out.0", wide)
        yield from layer("out.2", self.out, wide, 3, 3)


FACES = Released(3, 3, 224, (1, 2, 3, 4), (8, 4, 2))
UNETS = {
    "celeba256": FACES,
    "ffhq256": FACES,
    "lsun_beds256": FACES,
    "lsun_churches256": Released(4, 4, 192, (1, 2, 2, 4, 4), (1, 2, 4, 8), scale_shift=True, updown=True),
    "cin256": Released(4, 4, 256, (1, 2, 4), (4, 2, 1), 1, 512),
    "cin256-v2": Released(3, 3, 192, (1, 2, 3, 5), (8, 4, 2), 1, 512),
    "text2img256": Released(3, 3, 192, (1, 2, 3, 5), (8, 4, 2), 1, 640),
    "txt2img-1p4B": Released(4, 4, 320, (1, 2, 4, 4), (4, 2, 1), 1, 1280),
    "layout2img-openimages256": Released(3, 3, 128, (1, 2, 3, 4), (8, 4, 2), 3, 512),
    "semantic_synthesis256": Released(6, 3, 128, (1, 4, 8), (32, 16, 8)),
    "semantic_synthesis512": Released(6, 3, 128, (1, 4, 8), (32, 16, 8)),
    "inpainting_big": Released(7, 3, 256, (1, 2, 3, 4), (8, 4, 2), updown=True),
    "bsr_sr": Released(6, 3, 160, (1, 2, 2, 4), (16, 8)),
    "sd1.5": Released(4, 4, 320, (1, 2, 4, 4), (4, 2, 1), 1, 768),
    "sd1.5-inpainting": Released(9, 4, 320, (1, 2, 4, 4), (4, 2, 1), 1, 768),
}


@pytest.mark.parametrize("name", UNETS)
def test_the_released_constructor_makes_the_same_unet(name: str) -> None:
    network = unet(name)
    assert sizes(given(ldm_names.unet_pairs(network), network.state_dict())) == dict(UNETS[name].tensors())


def test_every_unet_is_laid_out_by_another_source() -> None:
    """Stable Diffusion 2 and XL by diffusers' converter alone."""
    plain = {name for name, own in PRESETS.items() if own.architecture.network.plain_attention}
    assert plain <= UNETS.keys() <= PRESETS.keys()
    assert all(name.startswith(("sd", "x4")) for name in PRESETS.keys() - UNETS.keys())


class Coder(NamedTuple):
    """Arguments of the released autoencoders (`model.py`, `autoencoder.py`) at 256 pixels, two blocks to a level."""

    multipliers: tuple[int, ...]
    latent: int
    attention: tuple[int, ...] = ()
    """Resolutions."""
    codes: int = 0
    middle: bool = True

    def residual(self, name: str, into: int, out: int) -> Iterator[tuple[str, Any]]:
        yield from layer(f"{name}.norm1", into)
        yield from layer(f"{name}.conv1", out, into, 3, 3)
        yield from layer(f"{name}.norm2", out)
        yield from layer(f"{name}.conv2", out, out, 3, 3)
        if into != out:
            yield from layer(f"{name}.nin_shortcut", out, into, 1, 1)

    def looks(self, name: str, wide: int) -> Iterator[tuple[str, Any]]:
        yield from layer(f"{name}.norm", wide)
        for leaf in ("q", "k", "v", "proj_out"):
            yield from layer(f"{name}.{leaf}", wide, wide, 1, 1)

    def mid(self, half: str, wide: int) -> Iterator[tuple[str, Any]]:
        yield from self.residual(f"{half}.mid.block_1", wide, wide)
        if self.middle:
            yield from self.looks(f"{half}.mid.attn_1", wide)
        yield from self.residual(f"{half}.mid.block_2", wide, wide)

    def tensors(self) -> Iterator[tuple[str, Any]]:
        wide, side, last = 128, 256, len(self.multipliers) - 1
        encoded = self.latent if self.codes else 2 * self.latent
        yield from layer("encoder.conv_in", wide, 3, 3, 3)
        for level, multiplier in enumerate(self.multipliers):
            for block in range(2):
                yield from self.residual(f"encoder.down.{level}.block.{block}", wide, 128 * multiplier)
                wide = 128 * multiplier
                if side in self.attention:
                    yield from self.looks(f"encoder.down.{level}.attn.{block}", wide)
            if level < last:
                yield from layer(f"encoder.down.{level}.downsample.conv", wide, wide, 3, 3)
                side //= 2
        yield from self.mid("encoder", wide)
        yield from layer("encoder.norm_out", wide)
        yield from layer("encoder.conv_out", encoded, wide, 3, 3)
        yield from layer("decoder.conv_in", wide, self.latent, 3, 3)
        yield from self.mid("decoder", wide)
        for level, multiplier in reversed(list(enumerate(self.multipliers))):
            for block in range(3):
                yield from self.residual(f"decoder.up.{level}.block.{block}", wide, 128 * multiplier)
                wide = 128 * multiplier
                if side in self.attention:
                    yield from self.looks(f"decoder.up.{level}.attn.{block}", wide)
            if level:
                yield from layer(f"decoder.up.{level}.upsample.conv", wide, wide, 3, 3)
                side *= 2
        yield from layer("decoder.norm_out", wide)
        yield from layer("decoder.conv_out", 3, wide, 3, 3)
        yield from layer("quant_conv", encoded, encoded, 1, 1)
        yield from layer("post_quant_conv", self.latent, self.latent, 1, 1)
        if self.codes:
            yield "quantize.embedding.weight", (self.codes, self.latent)


CODERS = {
    "kl-f4": Coder((1, 2, 4), 3),
    "kl-f8": Coder((1, 2, 4, 4), 4),
    "kl-f16": Coder((1, 1, 2, 2, 4), 16, (16,)),
    "kl-f32": Coder((1, 1, 2, 2, 4, 4), 64, (16, 8)),
    "vq-f4": Coder((1, 2, 4), 3, (), 8192),
    "vq-f4-noattn": Coder((1, 2, 4), 3, (), 8192, False),
    "vq-f8": Coder((1, 2, 2, 4), 4, (32,), 16384),
    "vq-f8-n256": Coder((1, 2, 2, 4), 4, (32,), 256),
    "vq-f16": Coder((1, 1, 2, 2, 4), 8, (16,), 16384),
    "x4-upscaler": Coder((1, 2, 4), 4),
}


@pytest.mark.parametrize("name", FIRST_STAGES)
def test_the_released_constructor_makes_the_same_first_stage(name: str) -> None:
    network = autoencoder(name)
    assert sizes(given(ldm_names.autoencoder_pairs(network), network.state_dict())) == dict(CODERS[name].tensors())
