"""ControlNet files in both layouts against diffusers: names, values, and what is refused."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from latentkit.checkpoints.adapters.control_files import read_control
from latentkit.checkpoints.adapters.controlnet_names import FIRST, controlnet_pairs
from latentkit.checkpoints.files import Shapes
from latentkit.checkpoints.names.diffusers_configs import unet_json
from latentkit.checkpoints.names.rename import given
from latentkit.errors import InputError
from latentkit.model.latent_diffusion import Architecture, LatentDiffusion
from latentkit.model.presets import PRESETS
from latentkit.nets.controlnet import ControlNet
from latentkit.nets.unet import UNetConfig

SD1 = UNetConfig(
    channels=32, multipliers=(1, 2), depth=(1, 0), heads=4, context_width=24, linear_projection=False, blocks=2
)
SD2 = replace(SD1, heads=None, head_width=8, linear_projection=True)
SDXL = UNetConfig(
    channels=32, multipliers=(1, 2, 4), depth=(0, 1, 2), middle_depth=2, heads=None, head_width=16, context_width=40,
    vector_width=48, blocks=1,
)  # fmt: skip
FAMILIES = {"sd1": SD1, "sd2": SD2, "sdxl": SDXL}


def model(config: UNetConfig) -> LatentDiffusion:
    """A model of latents of four channels, whose conditioners do not matter here."""
    return LatentDiffusion(Architecture(config, picture_channels=4, prediction="v"), {})


def peer(config: UNetConfig) -> Any:
    """diffusers' ControlNet for a U-Net of the config, with no weight at zero."""
    diffusers: Any = pytest.importorskip("diffusers")
    small = config.channels == 32
    fields = unet_json(config, 8, wave_width=4 if small else 256)
    theirs = diffusers.ControlNetModel.from_unet(
        diffusers.UNet2DConditionModel.from_config(fields), load_weights_from_unet=False
    )
    torch.manual_seed(5)
    with torch.no_grad():
        for parameter in theirs.parameters() if small else ():
            fan_in = parameter[0].numel() if parameter.ndim > 1 else 4
            parameter.copy_(torch.randn(parameter.shape) / fan_in**0.5 + 0.5 * (parameter.ndim == 1))
    return theirs.eval()


def told(config: UNetConfig, theirs: Any) -> tuple[dict[str, Tensor], Any]:
    """Inputs for ours, and diffusers' form of the vector."""
    x, context, timestep = torch.randn(2, 4, 6, 4), torch.randn(2, 5, config.context_width or 0), torch.tensor([3, 951])
    ours = {"x": x, "timestep": timestep.float(), "hint": torch.rand(2, 3, 48, 32), "context": context}
    if not config.vector_width:
        return ours, None
    pooled, ids = torch.randn(2, config.vector_width - 6 * 4), torch.randint(0, 1024, (2, 6))
    waves = theirs.add_time_proj(ids.flatten()).reshape(2, -1)
    return {**ours, "vector": torch.cat([pooled, waves], 1)}, {"text_embeds": pooled, "time_ids": ids}


@pytest.mark.parity
@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_a_folder_of_diffusers_answers_as_there(family: str, tmp_path: Path) -> None:
    config = FAMILIES[family]
    theirs = peer(config)
    theirs.save_pretrained(tmp_path / "control")
    ours = read_control(tmp_path / "control", model(config))
    inputs, added = told(config, theirs)
    down, middle = theirs(
        inputs["x"], inputs["timestep"], inputs["context"], inputs["hint"], added_cond_kwargs=added, return_dict=False
    )
    answers = ours(**inputs)
    assert len(answers) == len(down) + 1
    for one, other in zip(answers, [*down, middle]):
        assert other.std() > 0.1
        assert (one - other).abs().max() < 1e-5 * other.abs().max()


@pytest.mark.parity
@pytest.mark.parametrize("family", FAMILIES)
def test_single_files_are_what_diffusers_converts_and_come_back_to_the_bit(family: str, tmp_path: Path) -> None:
    from diffusers.loaders.single_file_utils import convert_controlnet_checkpoint

    config = FAMILIES[family]
    theirs, target = peer(config), model(config)
    save_file(theirs.state_dict(), tmp_path / "d.safetensors")
    ours = read_control(tmp_path / "d.safetensors", target)
    single = given(controlnet_pairs(ours, "ldm"), ours.state_dict())
    prefixed = {f"control_model.{name}": one for name, one in single.items()}
    before = {name: one.clone() for name, one in theirs.state_dict().items()}
    wrong = theirs.load_state_dict(convert_controlnet_checkpoint(prefixed, theirs.config), strict=False)
    assert not wrong.unexpected_keys
    assert all(name.startswith("add_embedding.") for name in wrong.missing_keys)  # its converter forgets XL's
    assert all(torch.equal(one, before[name]) for name, one in theirs.state_dict().items())
    whole = {"first_stage_model.x": torch.zeros(2), **prefixed}
    for number, tensors in enumerate((single, whole)):
        path = tmp_path / f"{number}.safetensors"
        save_file(tensors, path)
        again = read_control(path, target)
        for layout, held in (("ldm", single), ("diffusers", load_file(tmp_path / "d.safetensors"))):
            written = given(controlnet_pairs(again, layout), again.state_dict())  # type: ignore[arg-type]
            assert written.keys() == held.keys()
            assert all(torch.equal(written[name].squeeze(), held[name].squeeze()) for name in held)


@pytest.mark.parity
@pytest.mark.parametrize("name", ["sd1.5", "sd2.1", "sdxl"])
def test_every_parameter_at_full_size_has_the_peers_name_and_shape(name: str) -> None:
    config = PRESETS[name].architecture.network
    with torch.device("meta"), Shapes():
        network = ControlNet(config)
        theirs = peer(config).state_dict()
    pairs = controlnet_pairs(network, "diffusers")
    assert sorted(ours for pair in pairs for ours in pair.ours) == sorted(network.state_dict())
    written = given(pairs, network.state_dict())
    assert {key: one.shape for key, one in written.items()} == {key: one.shape for key, one in theirs.items()}
    assert len({pair.theirs for pair in controlnet_pairs(network, "ldm")}) == len(pairs)


def test_what_is_refused_is_named(tmp_path: Path) -> None:
    target, path = model(SD1), tmp_path / "c.safetensors"
    network = ControlNet(SD1)
    good = given(controlnet_pairs(network, "ldm"), network.state_dict())

    def refused(tensors: dict[str, Tensor], message: str, of: LatentDiffusion = target) -> None:
        save_file(tensors, path)
        with pytest.raises(InputError, match=message):
            read_control(path, of)

    less = {name: one for name, one in good.items() if name != "zero_convs.1.0.bias"}
    refused(less, "zero_convs.1.0.bias is missing")
    refused(good | {"different": torch.zeros(1)}, "different is not known to this architecture")
    refused(good | {"time_embed.0.bias": torch.full((128,), torch.nan)}, "time_embed.0.bias is not finite")
    refused({"a": torch.zeros(1)}, f"is no ControlNet: it has neither {FIRST['ldm']} nor ")
    refused(good, "is no ControlNet for this model: .* of another shape", model(replace(SD1, context_width=40)))
    folder = tmp_path / "folder"
    folder.mkdir()
    theirs = given(controlnet_pairs(network, "diffusers"), network.state_dict())
    save_file(theirs, folder / "diffusion_pytorch_model.safetensors")
    (folder / "config.json").write_text("{}")
    assert read_control(folder, target).config == SD1
    for field, value in (("global_pool_conditions", "yes"), ("controlnet_conditioning_channel_order", "gbr")):
        (folder / "config.json").write_text(json.dumps({field: value}))
        with pytest.raises(InputError, match=f"{value}.*; neither is run"):
            read_control(folder, target)
    for name, kind in (("lllite_unet_down.weight", "ControlNet-LLLite"), ("adapter.body.0.weight", "T2I-Adapter")):
        refused({name: torch.zeros(1)}, f"is no ControlNet: .*; it seems to be a {kind}, which is not run")


def test_it_takes_the_latent_alone_and_the_type_of_its_model(tmp_path: Path) -> None:
    network, path = ControlNet(SD1), tmp_path / "c.safetensors"
    save_file(given(controlnet_pairs(network, "ldm"), network.state_dict()), path)
    wide = Architecture(replace(SD1, channels_in=9), picture_channels=4, concat_channels=5, prediction="v")
    read = read_control(path, LatentDiffusion(wide, {}).to(torch.bfloat16))
    assert read.config.channels_in == 4
    assert {parameter.dtype for parameter in read.parameters()} == {torch.bfloat16}
    assert not read.training
