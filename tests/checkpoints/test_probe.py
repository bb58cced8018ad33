"""The probe against the exact predictors of Gaussian data, whatever their scale."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import family
import heads_fixture
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from typer.testing import CliRunner

import latentkit
from latentkit.checkpoints import probe
from latentkit.checkpoints.layouts import open_model, report
from latentkit.checkpoints.ldm_file import write_single
from latentkit.checkpoints.parts import Parts
from latentkit.checkpoints.probe import HEADS, OTHER_WIDTH, Compared, probed_prediction
from latentkit.checkpoints.storage.archive import read_archive
from latentkit.cli import application
from latentkit.model.conditioners.label import LabelConfig
from latentkit.model.conditioning import Conditioning
from latentkit.model.denoiser import Denoiser
from latentkit.model.latent_diffusion import LatentDiffusion
from latentkit.model.presets import PRESETS, Preset
from latentkit.nets.attention import Attention


@pytest.mark.parametrize("deviation", [0.3, 1.0])
@pytest.mark.parametrize("prediction", ["eps", "v"])
def test_exact_predictors_are_told_apart(prediction: str, deviation: float, monkeypatch: pytest.MonkeyPatch) -> None:
    config = replace(family.UNET, context_width=None)
    denoiser = Denoiser(config, family.SCHEDULE, "eps")

    def exact(x: Tensor, sigma: Tensor, conditioning: Any) -> Tensor:
        level = float(sigma)
        x0 = deviation**2 / (deviation**2 + level**2) * x
        eps = (x - x0) / level
        return (eps if prediction == "eps" else (eps - level * x0) / (1 + level**2) ** 0.5).float()

    monkeypatch.setattr(denoiser, "network", exact)
    assert probed_prediction(denoiser, Conditioning(), 4) == prediction


def trained(prediction: str) -> LatentDiffusion:
    """A small model of Stable Diffusion 2's kind, trained for a moment on plain pictures of deviation 1."""
    torch.manual_seed(0)
    architecture = replace(SMALL, prediction=prediction)
    model = LatentDiffusion(architecture, {})
    denoiser, schedule = model.denoiser, architecture.schedule
    with torch.no_grad():
        told = model.condition({}, 1)
    optimiser = torch.optim.AdamW(denoiser.parameters(), 3e-3)
    for _ in range(200):
        x0 = torch.randn(8, 4, 1, 1).expand(-1, -1, 8, 8)
        sigma = torch.from_numpy(schedule.at(1000 * torch.rand(8).double().numpy()))
        rows, eps = sigma.float()[:, None, None, None], torch.randn_like(x0)
        answer = denoiser.network(x0 + rows * eps, sigma, Conditioning.cat([told] * 8))
        loss = (answer - denoiser.prediction.target(x0, eps, rows)).square().mean()
        optimiser.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimiser.step()
    assert loss < 0.7  # 1 for a network that says nothing
    return model.eval().requires_grad_(False)


SMALL = replace(
    family.ARCHITECTURES["SD 2"],
    network=replace(family.V2, channels=32, multipliers=(1,), depth=(0,)),
)


@pytest.mark.parametrize("prediction", ["eps", "v"])
def test_a_file_that_says_nothing_is_loaded_as_what_its_network_predicts(
    prediction: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The file of a network trained here, without its metadata and its mark, is one of two presets of its shapes."""
    large = replace(SMALL, prediction="v", size=(48, 48))
    monkeypatch.setitem(PRESETS, "sd2.1-base", Preset(replace(SMALL, prediction="eps")))
    monkeypatch.setitem(PRESETS, "sd2.1", Preset(large))
    path = tmp_path / "model.safetensors"
    write_single(path, trained(prediction), "test")
    assert open_model(path).certain
    turns: list[tuple[str, ...]] = []
    monkeypatch.setattr(Parts, "turn", lambda self, *names, turn=Parts.turn: turns.append(names) or turn(self, *names))
    tensors = {name: tensor for name, tensor in load_file(path).items() if name != "v_pred"}
    save_file(tensors, path)
    network = latentkit.load(path, "cpu").network
    assert network.architecture == (large if prediction == "v" else PRESETS["sd2.1-base"].architecture)
    assert network.denoiser.prediction.name == prediction
    assert f"{path} does not say what its network predicts; asked, the network predicts {prediction}" in caplog.text
    assert not any(turns)
    assert latentkit.load(path, "cpu", low_memory=True).network.denoiser.prediction.name == prediction
    assert turns[-3:] == [("conditioners",), ("denoiser",), ()]
    assert report(path)["prediction"] == prediction
    CliRunner().invoke(
        application(), ["convert", str(path), str(tmp_path / "folder"), "--to", "diffusers"], catch_exceptions=False
    )
    assert open_model(tmp_path / "folder").model.architecture.prediction == prediction
    save_file(tensors, path, {"modelspec.prediction_type": "epsilon"})
    caplog.clear()
    assert latentkit.load(path, "cpu").network.architecture.prediction == "eps"
    assert not caplog.text


@pytest.fixture
def heads(monkeypatch: pytest.MonkeyPatch) -> None:
    """The shape of the small networks of `heads_fixture.py` is that of a preset whose heads are in doubt."""
    monkeypatch.setitem(PRESETS, "cin256", Preset(heads_fixture.ONE, 1.0))
    monkeypatch.setattr(probe, "OTHER_WIDTH", heads_fixture.WIDTH)
    monkeypatch.setattr(probe, "SIDE", 16)


@pytest.mark.parametrize("name", ["one", "many"])
def test_heads_are_told_by_the_network_itself(
    name: str, heads: None, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two networks trained with other heads each, in files of equal names and shapes that say nothing."""
    path = Path(__file__).with_name(f"heads-{name}.safetensors")
    assert not read_archive(path).metadata
    wanted = {"one": heads_fixture.ONE, "many": heads_fixture.MANY}[name]
    network = latentkit.load(path, "cpu").network
    assert network.architecture.network == wanted.network
    assert network.denoiser.unet.config == wanted.network
    assert f"{path} does not say how many attention heads its network has; asked, it errs by" in caplog.text
    assert {"one": "taken with one", "many": "taken with heads 2 wide"}[name] in caplog.text
    report(path)
    assert caplog.text.count("does not say how many attention heads") == 2
    layers = [module for module in network.denoiser.modules() if isinstance(module, Attention)]
    assert {layer.heads for layer in layers} == {{"one": 1, "many": 16}[name]}
    CliRunner().invoke(
        application(), ["convert", str(path), str(tmp_path / "own"), "--to", "latentkit"], catch_exceptions=False
    )
    assert open_model(tmp_path / "own").model.architecture.network == wanted.network
    half = tmp_path / "half.safetensors"
    save_file({key: tensor.half() for key, tensor in load_file(path).items()}, half)
    turns: list[tuple[str, ...]] = []
    monkeypatch.setattr(Parts, "turn", lambda self, *names, turn=Parts.turn: turns.append(names) or turn(self, *names))
    assert latentkit.load(half, "cpu", low_memory=True).network.architecture.network == wanted.network
    assert turns == [("first_stage",), ("conditioners",), ("denoiser",), ()]


def test_heads_that_cannot_be_told_are_the_presets(
    heads: None, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = LatentDiffusion(heads_fixture.MANY, {"label": {"classes": ["cat", "dog"]}})
    path = tmp_path / "model.safetensors"
    write_single(path, model, "test")
    save_file(load_file(path), path)
    assert latentkit.load(path, "cpu").network.architecture.network == heads_fixture.ONE.network
    assert "which does not tell: taken with one, as released" in caplog.text


@pytest.mark.parametrize(
    ("errors", "apart", "second"),
    [
        ((0.2, 0.3), 9.0, False),
        ((0.3, 0.2), -9.0, True),
        ((0.3, 0.2), -3.0, None),  # by chance
        ((0.200, 0.201), 9.0, None),  # of no weight
        ((0.99, 0.95), -9.0, None),  # of networks that know nothing
    ],
)
def test_a_comparison_says_so_where_it_cannot_tell(
    errors: tuple[float, float], apart: float, second: bool | None
) -> None:
    assert Compared(errors, apart).second is second


def test_a_file_that_says_its_heads_is_not_asked(heads: None, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "model.safetensors"
    write_single(path, LatentDiffusion(heads_fixture.MANY, {"label": {"classes": ["cat", "dog"]}}), "test")
    assert latentkit.load(path, "cpu").network.architecture.network == heads_fixture.MANY.network
    assert not caplog.text


@pytest.mark.parametrize("name", HEADS)
def test_every_preset_in_doubt_has_one_head_and_another_number_that_fits(name: str) -> None:
    network = PRESETS[name].architecture.network
    assert network.heads == 1
    assert replace(network, heads=None, head_width=OTHER_WIDTH).head_count(network.channels) > 1


def test_models_that_must_be_told_something_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """A text transformer without vocabulary gets ids; a model without "no class" gets the first class."""
    told = probe._told(family.model("text of 2021"), 3)
    assert told.context is not None
    assert told.context.shape == (3, 7, 24)
    model = family.model("classes")
    without = replace(model.architecture, label=LabelConfig(24, vector=False, null=False))
    first = LatentDiffusion(without, {"label": {"classes": ["cat", "dog"]}})
    row = first.state_dict()["conditioners.label.embedding.weight"][0]
    context = probe._told(first, 2).context
    assert context is not None
    assert torch.equal(context[1, 0], row)
