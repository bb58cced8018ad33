"""Latents by one factor for all channels, in place of a mean and a deviation of each."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from latentkit.applications.generate import draw
from latentkit.applications.stages.train import train
from latentkit.checkpoints.diffusers_folder import read_folder, write_folder
from latentkit.checkpoints.files import load, save_autoencoder
from latentkit.data.pictures import decode, to_png, to_tensor
from latentkit.model.first_stage import FirstStage
from latentkit.nets.autoencoder import AutoencoderConfig
from latentkit.training.recipe import parse_recipe


def test_one_factor_for_all_channels_is_exported_as_such(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    (tmp_path / "pictures").mkdir()
    for number in range(4):
        (tmp_path / "pictures" / f"{number}.png").write_bytes(to_png(torch.rand(3, 16, 16) * 2 - 1))
        (tmp_path / "pictures" / f"{number}.txt").write_text("noise")
    config = AutoencoderConfig(latent_channels=4, channels=32, multipliers=(1, 2), blocks=1, stem=1)
    first = FirstStage(config, 3).requires_grad_(False)
    assert first.autoencoder is not None
    with torch.no_grad():  # channels of other means and widths
        first.autoencoder.to_moments.weight[:4] *= torch.tensor([1.0, 2.0, 4.0, 8.0])[:, None, None, None]
        first.autoencoder.to_moments.bias[:4] += torch.tensor([0.0, 3.0, -1.0, 0.5])
    save_autoencoder(tmp_path / "first.safetensors", first, {})
    recipe: dict[str, Any] = {
        "stage": "diffusion",
        "name": "small",
        "first_stage": str(tmp_path / "first.safetensors"),
        "data": {"path": str(tmp_path / "pictures"), "transform": {"size": 16}},
        "network": {"channels": 32, "multipliers": [1, 2], "blocks": 1, "depth": [0, 1], "middle_depth": 1, "heads": 2}
        | {"linear_projection": False},
        "clip": {"towers": [{"width": 32, "layers": 1, "heads": 2}]},
        "noise": {"kind": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012},
        "prediction": "eps",
        "averaging": {"power": []},
        "schedule": {"steps": 1, "batch": 2, "sample_every": None},
        "sampling": {"steps": 2},
    }
    path = train(parse_recipe(recipe), tmp_path / "run")
    model = load(path, dtype=torch.float32)
    stage = model.network.first_stage
    pictures = [to_tensor(decode(file.read_bytes(), "a"), 3) for file in (tmp_path / "pictures").glob("*.png")]
    mean, log_variance = first.moments(torch.stack(pictures)).double().chunk(2, dim=1)
    together = (mean.var(correction=0) + log_variance.exp().mean()).sqrt()
    assert stage.latent_mean.tolist() == [0] * 4
    assert stage.latent_std.tolist() == pytest.approx([float(together)] * 4, rel=1e-5)

    recipe["whitening"] = True
    white = load(train(parse_recipe(recipe), tmp_path / "white"), dtype=torch.float32).network.first_stage
    each = (mean.var((0, 2, 3), correction=0) + log_variance.exp().mean((0, 2, 3))).sqrt()
    assert white.latent_mean.tolist() == pytest.approx(mean.mean((0, 2, 3)).tolist(), abs=1e-4)
    assert white.latent_std.tolist() == pytest.approx(each.tolist(), rel=1e-4)

    (ours,) = draw(model.network, model.provenance["defaults"], ["noise"], [0])
    write_folder(tmp_path / "export", model.network)
    told = json.loads((tmp_path / "export" / "vae" / "config.json").read_text())
    assert told["scaling_factor"] == pytest.approx(1 / float(together), rel=1e-5)
    back = read_folder(tmp_path / "export", dtype=torch.float32)
    name = "autoencoder.to_moments.weight"
    assert torch.equal(back.first_stage.state_dict()[name], stage.state_dict()[name]), "nothing is folded into it"
    (theirs,) = draw(back, model.provenance["defaults"], ["noise"], [0])
    assert ours.std() > 0.01
    assert torch.allclose(ours, theirs, atol=1e-4)
