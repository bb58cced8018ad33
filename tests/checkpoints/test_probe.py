"""The probe against the exact predictors of Gaussian data, whatever their scale."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import family
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from typer.testing import CliRunner

import latentkit
from latentkit.checkpoints.layouts import open_model, report
from latentkit.checkpoints.ldm_file import write_single
from latentkit.checkpoints.probe import probed_prediction
from latentkit.cli import application
from latentkit.model.conditioning import Conditioning
from latentkit.model.denoiser import Denoiser
from latentkit.model.latent_diffusion import LatentDiffusion
from latentkit.model.presets import PRESETS, Preset


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
    architecture = replace(SMALL, prediction=prediction)  # type: ignore[arg-type]
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
    tensors = {name: tensor for name, tensor in load_file(path).items() if name != "v_pred"}
    save_file(tensors, path)
    network = latentkit.load(path, "cpu").network
    assert network.architecture == (large if prediction == "v" else PRESETS["sd2.1-base"].architecture)
    assert network.denoiser.prediction.name == prediction
    assert f"{path} does not say what its network predicts; asked, the network predicts {prediction}" in caplog.text
    assert report(path)["prediction"] == prediction
    CliRunner().invoke(
        application(), ["convert", str(path), str(tmp_path / "folder"), "--to", "diffusers"], catch_exceptions=False
    )
    assert open_model(tmp_path / "folder").model.architecture.prediction == prediction
    save_file(tensors, path, {"modelspec.prediction_type": "epsilon"})
    caplog.clear()
    assert latentkit.load(path, "cpu").network.architecture.prediction == "eps"
    assert not caplog.text
