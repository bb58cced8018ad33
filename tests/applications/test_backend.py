"""OpenVINO draws what torch draws, from conversions that are made once and never stale."""

import copy
import importlib.util
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from tiny import tiny_model
from torch import Tensor, nn
from typer.testing import CliRunner

from latentkit.applications import backend
from latentkit.applications.attachment import Attachment, WeightsFile
from latentkit.applications.backend import Converted, cache_folder, check, read
from latentkit.applications.generate import Progress, Result, generate, replay
from latentkit.applications.request import ImageToImage, Request, TextToImage
from latentkit.checkpoints.adapters.controlnet_names import controlnet_pairs
from latentkit.checkpoints.adapters.lora_files import write_lora
from latentkit.checkpoints.files import Model, save_autoencoder, save_model
from latentkit.checkpoints.names.rename import given
from latentkit.cli import application
from latentkit.data.pictures import to_png
from latentkit.diffusion.noise import keyed_normal
from latentkit.errors import InputError
from latentkit.model import first_stage
from latentkit.nets.controlnet import ControlNet
from latentkit.nets.lora import Change
from latentkit.nets.unet import UNet, UNetConfig

MISSING = importlib.util.find_spec("openvino") is None
pytestmark = [
    pytest.mark.skipif(MISSING, reason="openvino is not installed: pip install 'latentkit[openvino]'"),
    pytest.mark.usefixtures("unchecked"),  # checks of shapes are in the way of tracing
]

NETWORK = tiny_model()
MODEL = Model(NETWORK, {"defaults": {"steps": 2}}, "tiny", "0" * 64)
QUERY = "denoiser.unet.down.1.blocks.0.transformer.blocks.0.self_attention.q.weight"
CLOSE = 1e-4
"""Of pixels, whose range is 2: both sides are float32, and sum in other orders."""


@pytest.fixture(scope="module", autouse=True)
def _cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A cache folder of this module's own, so that a conversion is made once for all tests."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


def results(events: Iterator[Progress | Result]) -> list[Result]:
    return [event for event in events if isinstance(event, Result)]


def asked(on: str | None, **fields: Any) -> Request:
    return TextToImage(prompt="cat", seed=3, backend=on, **fields)


def drawn(request: Request, model: Model = MODEL) -> Tensor:
    return results(generate(model, request))[0].picture


def kept() -> set[str]:
    return {path.name for path in cache_folder().glob("*") if path.is_file()}


def lora(folder: Path) -> WeightsFile:
    out, width = NETWORK.state_dict()[QUERY].shape
    change = Change(keyed_normal((3, width), 1, "down"), keyed_normal((out, 3), 1, "up") * 0.3, 2.0)
    write_lora(folder / "lora.safetensors", NETWORK, {QUERY: change})
    return WeightsFile.read(folder / "lora.safetensors")


def controlled(folder: Path) -> tuple[WeightsFile, Attachment, float]:
    network = ControlNet(replace(NETWORK.architecture.network, channels_in=4))
    state = {
        name: keyed_normal(one.shape, 1, name) * (one[0].numel() ** -0.5 if one.ndim > 1 else 0.1)
        for name, one in network.state_dict().items()
    }
    save_file(given(controlnet_pairs(network, "ldm"), state), folder / "control.safetensors")
    return WeightsFile.read(folder / "control.safetensors"), picture(folder), 0.7


def picture(folder: Path) -> Attachment:
    (folder / "picture.png").write_bytes(to_png(keyed_normal((3, 40, 40), 1, "picture").clamp(-1, 1)))
    return Attachment.read(folder / "picture.png")


@pytest.mark.parametrize(
    "fields",
    [{}, {"guidance_scale": 4.0, "negative": "a green apple"}, {"width": 48, "height": 40}, {"width": 64}],
    ids=["plain", "guided", "another size", "a third size"],
)
def test_pictures_are_those_of_torch(fields: dict[str, Any]) -> None:
    torch.testing.assert_close(drawn(asked("openvino", **fields)), drawn(asked(None, **fields)), rtol=0, atol=CLOSE)


def test_image_to_image_passes_both_halves_of_the_first_stage(tmp_path: Path) -> None:
    init = picture(tmp_path)
    ours, torchs = (ImageToImage(init, prompt="cat", seed=3, strength=0.5, backend=on) for on in ("openvino", None))
    before = kept()
    torch.testing.assert_close(drawn(ours), drawn(torchs), rtol=0, atol=CLOSE)
    assert len(kept() - before) >= 2, "the encoder was not converted"


def test_pictures_that_torch_draws_in_strips_pass_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(first_stage.WHOLE_PIXELS, "cpu", 0)
    monkeypatch.setattr(first_stage, "Strips", None)
    assert torch.isfinite(drawn(asked("openvino"))).all()


def test_what_is_put_on_a_network_is_converted_too(tmp_path: Path) -> None:
    """LoRA, ControlNet and perturbed attention at once; without any one of them it is another picture."""
    fields = {"lora": [(lora(tmp_path), 0.8)], "control": [controlled(tmp_path)], "pag_scale": 2.0}
    ours = drawn(asked("openvino", **fields))
    torch.testing.assert_close(ours, drawn(asked(None, **fields)), rtol=0, atol=CLOSE)
    for name in fields:
        fewer = drawn(asked(None, **{key: value for key, value in fields.items() if key != name}))
        assert (fewer - ours).abs().max() > 100 * CLOSE, name
    torch.testing.assert_close(drawn(asked("openvino")), drawn(asked(None)), rtol=0, atol=CLOSE)


def small(**slots: Any) -> UNet:
    """A U-Net of one level, with random weights."""
    config = UNetConfig(channels=32, multipliers=(1,), depth=(1,), blocks=1, heads=2, context_width=24, **slots)
    network = UNet(config).eval().requires_grad_(False)
    for name, parameter in network.named_parameters():
        if parameter.ndim > 1:
            parameter.data = keyed_normal(parameter.shape, 1, name) * parameter[0].numel() ** -0.5
    return network


X, CONTEXT = keyed_normal((2, 4, 16, 16), 1, "x"), keyed_normal((2, 5, 24), 1, "context")


@torch.no_grad()
def answer(network: UNet) -> Tensor:
    return Converted(network)(X, torch.full((2,), 5.0), CONTEXT)


def test_a_conversion_is_made_once_and_again_when_weights_change_or_it_is_damaged(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    network = small()
    first, before = answer(network), kept()
    with monkeypatch.context() as patch:
        patch.setattr(Converted, "_traced", None)
        assert torch.equal(answer(network), first)  # from memory
        assert torch.equal(answer(copy.deepcopy(network)), first)  # from the file, as in another process
    network.conv_out.weight.data.mul_(1.1)
    changed = answer(network)
    torch.testing.assert_close(changed, network(X, torch.full((2,), 5.0), CONTEXT), rtol=0, atol=CLOSE)
    assert (changed - first).abs().max() > 100 * CLOSE
    (made,) = (cache_folder() / name for name in kept() - before if name.endswith(".bin"))
    content = made.read_bytes()
    made.unlink()  # what maps the whole one goes on
    made.write_bytes(content[:100])
    assert torch.equal(answer(copy.deepcopy(network)), changed)
    assert made.read_bytes() == content


@torch.no_grad()
def test_a_network_that_is_widened_computes_in_float32_from_then_on() -> None:
    network = nn.Conv2d(4, 4, 3).bfloat16()
    running = Converted(network)
    rounded, exact = running(X.bfloat16()).float(), network.float()(X)
    assert relative(running(X), exact) < 1e-5 < relative(rounded, exact)


def test_conversions_used_longest_ago_make_room(monkeypatch: pytest.MonkeyPatch) -> None:
    network, other = nn.Conv2d(4, 4, 3), nn.Conv2d(4, 4, 3)
    with torch.no_grad():
        one = Converted(network)(X)
        monkeypatch.setattr(backend, "ROOM", 0)
        Converted(other)(X)
        assert len(kept()) == 2, "the newest alone stays"
        assert torch.equal(Converted(network)(X), one)  # what is in memory needs no file
        torch.testing.assert_close(Converted(network)(X[..., :9]), network(X[..., :9]))


def test_a_record_keeps_the_backend_and_draws_the_picture_again() -> None:
    one = results(generate(MODEL, asked("openvino")))[0]
    assert one.request.backend == "openvino"
    assert one.record.machine.openvino == backend.version()
    assert results(replay(MODEL, one.record))[0].png() == one.png()
    assert one.record.differences(MODEL) == []
    other = one.record.model_copy(update={"machine": one.record.machine.model_copy(update={"openvino": "1.0"})})
    assert "openvino" in other.differences(MODEL)[0]
    assert results(generate(MODEL, asked(None)))[0].record.machine.openvino is None


def test_networks_are_their_own_between_two_steps() -> None:
    events = generate(MODEL, asked("openvino"))
    next(events)
    assert not any("forward" in vars(module) for module in NETWORK.modules())
    events.close()


def test_weights_are_let_go_of_once_they_are_converted(tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    save_model(file, NETWORK, {}, torch.bfloat16)
    whole, model = read(file, whole=True), read(file)
    same = drawn(asked("openvino", steps=2), whole)
    assert not any(parameter.is_meta for parameter in whole.network.parameters())
    assert torch.equal(drawn(asked("openvino", steps=2), model), same)
    assert all(parameter.is_meta for parameter in model.network.denoiser.unet.parameters())
    assert next(model.network.denoiser.parameters()).dtype == next(whole.network.denoiser.parameters()).dtype
    for fields in ({}, {"pag_scale": 2.0}):  # the second is converted from the file, read once more
        other = drawn(asked("openvino", steps=2, **fields), whole)
        assert torch.equal(drawn(asked("openvino", steps=2, **fields), model), other)


def test_another_autoencoder_keeps_its_weights_beside_networks_that_let_go_of_theirs(tmp_path: Path) -> None:
    file, other = tmp_path / "model.safetensors", copy.deepcopy(NETWORK.first_stage)
    save_model(file, NETWORK, {}, torch.float32)
    for index, one in enumerate(other.parameters()):
        one.data += 0.05 * keyed_normal(one.shape, 5, index)
    save_autoencoder(tmp_path / "vae.safetensors", other, {})
    vae, model = WeightsFile.read(tmp_path / "vae.safetensors"), read(file, dtype=torch.float32)
    for fields in ({"autoencoder": vae}, {}, {"autoencoder": vae}, {"autoencoder": vae, "pag_scale": 2.0}):
        mine, there = (drawn(asked(on, steps=2, **fields), model if on else MODEL) for on in ("openvino", None))
        assert (mine - there).abs().max() < CLOSE


def test_a_picture_is_drawn_again_with_one_copy_of_the_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the record's type, which here is not what the backend would choose where bfloat16 is fast."""
    file, models = tmp_path / "model.safetensors", []
    save_model(file, NETWORK, {}, torch.float32)
    first = results(generate(read(file, dtype=torch.float32), asked("openvino", steps=2)))[0]
    (tmp_path / "cat.png").write_bytes(first.png())

    def seen(*name: Any, **how: Any) -> Model:
        models.append(read(*name, **how))
        return models[-1]

    monkeypatch.setattr(backend, "read", seen)
    words = ["replay", str(tmp_path / "cat.png"), "-m", str(file), "-o", str(tmp_path / "again")]
    assert CliRunner().invoke(application(), words, catch_exceptions=False).exit_code == 0
    assert (tmp_path / "again" / "cat-replay.png").read_bytes() == first.png()
    assert all(parameter.is_meta for parameter in models[0].network.denoiser.unet.parameters())


def relative(x: Tensor, exact: Tensor) -> float:
    return float((x - exact).square().mean().sqrt() / exact.square().mean().sqrt())


@pytest.mark.parametrize("slot", ["classes", "vector_width"])
def test_bfloat16_rounds_neither_timestep_nor_class(slot: str) -> None:
    """OpenVINO in bfloat16 would multiply the timestep in it: 20 % error where torch's bfloat16 has 1.5 %."""
    network = small(**{slot: 1000 if slot == "classes" else 3})
    network.time_embedding.linear_out.weight.data *= 20
    vector = torch.full((2, 1), 997.0) if slot == "classes" else torch.full((2, 3), 0.3)
    told = torch.full((2,), 997.3), CONTEXT, vector
    exact = network(X, *told)
    network, low = network.bfloat16(), (X.bfloat16(), told[0], CONTEXT.bfloat16(), vector)
    with torch.no_grad():
        rounded, ours = network(*low).float(), Converted(network)(*low).float()
    assert relative(ours, exact) < 1.5 * relative(rounded, exact)


class Unheard(nn.Module):
    """What has no counterpart in OpenVINO."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(4, 4))

    def forward(self, x: Tensor) -> Tensor:
        return torch.linalg.eigvals(x * self.weight).real


def test_what_cannot_be_converted_is_refused() -> None:
    with pytest.raises(InputError, match=r"Unheard cannot be converted for OpenVINO .*; take backend 'torch'"):
        Converted(Unheard())(torch.ones(1, 1, 4, 4))


def test_a_gradient_is_refused() -> None:
    x = torch.zeros(1, 4, 8, 8, requires_grad=True)
    with pytest.raises(InputError, match="gives no gradient"):
        Converted(nn.Conv2d(4, 4, 3))(x)


def test_a_missing_package_is_named_before_anything_is_drawn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "openvino", None)
    with pytest.raises(InputError, match=r"pip install latentkit\[openvino\]"):
        next(generate(MODEL, asked("openvino")))


def test_other_devices_and_pictures_in_strips_are_refused() -> None:
    with pytest.raises(InputError, match="on the CPU and the model lies on meta"):
        check(asked("openvino"), copy.deepcopy(NETWORK).to("meta"))
    with pytest.raises(InputError, match="4096x2048"):
        check(asked("openvino", width=4096, height=2048), NETWORK)
    with pytest.raises(InputError, match="leave out low memory"):
        check(asked("openvino", width=32, height=32), NETWORK, low_memory=True)
    check(asked(None, width=4096, height=2048), NETWORK, low_memory=True)


def test_the_package_reports_nothing_over_the_network() -> None:
    backend.version()
    assert sys.modules["openvino_telemetry"] is None
