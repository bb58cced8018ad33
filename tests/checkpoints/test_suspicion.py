"""Tensors out of proportion are named; new and trained models raise no false alarm."""

from dataclasses import replace
from pathlib import Path

import family
import pytest
import torch
from torch import Tensor

from latentkit.checkpoints.doctor.suspicion import suspicious
from latentkit.checkpoints.files import find
from latentkit.checkpoints.layouts import open_model
from latentkit.model.latent_diffusion import LatentDiffusion
from latentkit.model.presets import FIRST_STAGES, PRESETS, TINY
from latentkit.nets.autoencoder import Autoencoder
from latentkit.nets.controlnet import ControlNet
from latentkit.nets.tiny import TinyAutoencoder
from latentkit.nets.unet import UNet

CONV, BIAS = "residual.conv_in.weight", "residual.conv_in.bias"
BRANCH, NORM = "residual.conv_out.weight", "residual.norm_in.weight"
TABLE = "token_embedding.weight"


@pytest.fixture(scope="module", params=["SD 1", "emoji"])
def state(request: pytest.FixtureRequest) -> dict[str, Tensor]:
    """A random model's, and a trained one's."""
    model = open_model(find("emoji")).model if request.param == "emoji" else family.model(request.param)
    return model.state_dict()


@pytest.mark.parametrize(
    ("name", "factor", "why"),
    [
        (CONV, 300, "times as large as is usual"),
        (CONV, 1e-4, "times as small as is usual"),
        (CONV, 1e-9, "times as small as is usual"),
        (BRANCH, 1e-9, "times as small as is usual"),
        (BRANCH, 1e-4, None),
        (CONV, 0, "is all zero"),
        (CONV, float("nan"), "not finite"),
        (BIAS, float("inf"), "not finite"),
        (NORM, 0, "is all zero"),
        (NORM, 1e-4, "near 0"),
        (NORM, 300, "times as large as is usual"),
        (NORM, 1e5, "has values of the size"),
        (BIAS, 1e6, "has values of the size"),
        (BIAS, 0, None),
        (BIAS, 1e30, "has values of the size"),
        (TABLE, 1e6, "has values of the size"),
        (TABLE, 1e-5, None),
        ("first_stage.latent_std", 1e9, None),
    ],
)
def test_one_spoiled_tensor_is_named(name: str, factor: float, why: str | None, state: dict[str, Tensor]) -> None:
    name = next(one for one in state if one.endswith(name))
    found = suspicious(state | {name: state[name] * factor})
    assert list(found) == ([name] if why else [])
    assert not why or why in found[name]


def test_layers_that_are_all_too_large(state: dict[str, Tensor]) -> None:
    large = {name: 300 * tensor if name.startswith("denoiser.") else tensor for name, tensor in state.items()}
    found = suspicious(large)
    assert len(found) > 20
    assert any("makes what goes through it about" in why for why in found.values())


def test_no_false_alarm_on_whole_models(state: dict[str, Tensor]) -> None:
    assert suspicious(state) == {}
    assert suspicious({name: tensor.half() for name, tensor in state.items()}) == {}


@pytest.mark.parametrize("name", family.ARCHITECTURES)
def test_a_new_model_is_only_told_what_is_zero(name: str) -> None:
    torch.manual_seed(0)
    only_zero(LatentDiffusion(family.ARCHITECTURES[name], {"label": {"classes": ["cat", "dog"]}}))


@pytest.mark.parametrize("name", PRESETS)
def test_new_networks_of_every_preset(name: str) -> None:
    torch.manual_seed(0)
    network = PRESETS[name].architecture.network
    small = replace(network, channels=64, depth=tuple(min(1, n) for n in network.depth), middle_depth=1)
    only_zero(UNet(small))
    if network.context_width and not network.plain_attention and not network.classes:
        only_zero(ControlNet(replace(small, channels_in=4)))


@pytest.mark.parametrize("name", [*FIRST_STAGES, *TINY])
def test_new_first_stages(name: str) -> None:
    torch.manual_seed(0)
    only_zero(TinyAutoencoder(TINY[name]) if name in TINY else Autoencoder(replace(FIRST_STAGES[name], channels=32)))


def only_zero(network: torch.nn.Module) -> None:
    state = network.state_dict()
    zero = {name for name, tensor in state.items() if tensor.ndim > 1 and not tensor.any()}
    assert suspicious(state) == dict.fromkeys(sorted(zero), "is all zero")


def test_a_file_is_told_by_its_names(tmp_path: Path) -> None:
    from latentkit.checkpoints.layouts import report
    from latentkit.checkpoints.ldm_file import write_single

    model = family.model("SD 1")
    model.denoiser.unet.conv_in.weight.mul_(300)
    write_single(tmp_path / "model.safetensors", model, "test")
    assert list(report(tmp_path / "model.safetensors")["suspicious"]) == ["denoiser.unet.conv_in.weight"]
