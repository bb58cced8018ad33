"""Tensors out of proportion are named; new and trained models raise no false alarm."""

from dataclasses import replace
from pathlib import Path

import family
import pytest
import torch
from torch import Tensor

from latentkit.checkpoints.doctor.suspicion import suspicious, suspicious_changes, suspicious_control
from latentkit.checkpoints.files import find
from latentkit.checkpoints.layouts import open_model
from latentkit.model.latent_diffusion import LatentDiffusion
from latentkit.model.presets import FIRST_STAGES, PRESETS, TINY
from latentkit.nets.autoencoder import Autoencoder
from latentkit.nets.controlnet import ControlNet
from latentkit.nets.lora import Change
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


def trained(kinds: int = 0) -> ControlNet:
    """A ControlNet without zeros."""
    torch.manual_seed(0)
    network = ControlNet(family.ARCHITECTURES["SD 1"].network, kinds=kinds)
    for parameter in network.parameters():
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.01)
    return network


@pytest.mark.parametrize("kinds", [0, 6])
def test_what_a_controlnet_adds_is_told_as_one_where_it_is_zero(kinds: int) -> None:
    state = ControlNet(family.ARCHITECTURES["SD 1"].network, kinds=kinds).state_dict()
    first, *rest = suspicious_control(state).items()
    assert first == ("skips and middle_out", "are all zero, as before training: this ControlNet changes nothing")
    assert not any(name.startswith(("skips", "middle_out")) for name, _ in rest)
    assert {why for _, why in rest} == {"is all zero"}
    state = trained(kinds).state_dict()
    assert suspicious_control(state) == {}
    state["skips.1.weight"] = torch.zeros_like(state["skips.1.weight"])
    assert suspicious_control(state) == {"skips.1.weight": "is all zero"}
    state["conv_in.weight"] *= 300
    assert list(suspicious_control(state)) == ["conv_in.weight", "skips.1.weight"]


LAYERS = [f"denoiser.unet.down.{n}.weight" for n in range(12)]


def lora(scale: float = 1.0) -> dict[str, Change]:
    """A trained LoRA, LoCon, LoHa, LoKr, DoRA and differences."""
    torch.manual_seed(0)
    down, up = (0.1 * scale**0.5 * torch.randn(shape) for shape in ((4, 32), (32, 4)))
    plain = Change(down, up, 2.0)
    made = dict.fromkeys(LAYERS, plain)
    made["denoiser.unet.conv.weight"] = Change(down.reshape(4, 8, 2, 2), up[..., None, None])
    made["denoiser.unet.loha.weight"] = replace(plain, second=Change(10 * down, 10 * up))
    made["denoiser.unet.lokr.weight"] = replace(plain, left=Change(None, torch.eye(2)))
    made["denoiser.unet.dora.weight"] = replace(plain, magnitude=torch.ones(32))
    made["denoiser.unet.whole.weight"] = Change(None, 0.03 * torch.randn(32, 32))
    made["denoiser.unet.norm.weight"] = Change(None, torch.full((32,), 1e-5))
    made["denoiser.unet.norm.bias"] = Change(None, torch.full((32,), 1e-5))
    return made


def test_changes_of_a_lora_without_effect() -> None:
    made = lora()
    assert suspicious_changes(made) == {}
    zero = torch.zeros(32, 4)
    for spoiled in (
        replace(made[LAYERS[0]], up=zero),
        replace(made[LAYERS[0]], down=zero.T),
        replace(made[LAYERS[0]], second=Change(zero.T, zero)),
        replace(made[LAYERS[0]], left=Change(None, torch.zeros(2, 2))),
        replace(made[LAYERS[0]], middle=torch.zeros(4, 4, 1, 1)),
    ):
        assert suspicious_changes(made | {LAYERS[0]: spoiled}) == {LAYERS[0]: "is zero: it has no effect"}
    idle = replace(made[LAYERS[0]], up=zero)
    assert suspicious_changes(made | dict.fromkeys(LAYERS, idle)) == {
        "denoiser.unet.down.* (12)": "is zero: it has no effect"
    }
    assert suspicious_changes(dict.fromkeys(LAYERS, idle)) == {"all 12 changes": "are zero: this LoRA has no effect"}
    assert suspicious_changes(made | {LAYERS[0]: replace(idle, magnitude=torch.ones(32))}) == {}


def test_changes_of_a_lora_out_of_proportion() -> None:
    made = lora()
    up = made[LAYERS[0]].up
    (found,) = suspicious_changes(made | {LAYERS[0]: replace(made[LAYERS[0]], up=300 * up)}).items()
    assert found[0] == LAYERS[0]
    assert "times as large as is usual" in found[1]
    assert suspicious_changes(made | {LAYERS[0]: replace(made[LAYERS[0]], up=1e-4 * up)}) == {}
    assert suspicious_changes(made | {LAYERS[0]: replace(made[LAYERS[0]], alpha=600.0)}).keys() == {LAYERS[0]}
    assert len(suspicious_changes(lora(1e4))) > 10


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
