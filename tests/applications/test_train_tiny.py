"""A tiny autoencoder is trained by the recipe of any first stage."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from latentkit.applications.stages.train import train
from latentkit.checkpoints.files import load_autoencoder
from latentkit.errors import InputError
from latentkit.nets.tiny import TinyAutoencoder
from latentkit.training.recipe import AutoencoderRecipe, parse_recipe

CRITIC = {"start": 2, "warmup": 1, "ramp": 2, "network": {"channels": 4, "layers": 1}}


def recipe(folder: Path, **changes: Any) -> Any:
    return parse_recipe(
        {
            "stage": "autoencoder",
            "name": "small",
            "data": {"path": str(folder), "transform": {"size": 16, "channels": 3, "crop": "random"}},
            "network": {"blocks": [1, 1], "channels": 8, "latent_channels": 4},
            "optimiser": {"warmup": 0},
            "averaging": {"power": []},
            "schedule": {"steps": 6, "batch": 2, "save_every": 3, "sample_every": 6, "log_every": 2, "device": "cpu"},
        }
        | changes
    )


def test_a_tiny_autoencoder_learns_with_and_without_its_encoder_and_with_a_critic(tmp_path: Path) -> None:
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    generator = torch.Generator().manual_seed(2)
    for number in range(6):
        pixels = torch.randint(0, 256, (4, 4, 3), generator=generator, dtype=torch.uint8).numpy()
        Image.fromarray(pixels).resize((24, 16)).save(pictures / f"{number}.png")
    path = train(recipe(pictures, loss={"adversarial": CRITIC}, checkpointing=True), tmp_path / "run")
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert lines[-2]["critic/loss"] > 0
    assert len(lines[-1]["validation/latent_std"]) == 4
    stage = load_autoencoder(path)
    assert isinstance(stage.autoencoder, TinyAutoencoder)
    further = train(recipe(pictures, start=str(path), frozen_encoder=True), tmp_path / "further")
    before, after = (load_autoencoder(each).state_dict() for each in (path, further))
    changed = {name.split(".")[1] for name, one in before.items() if not torch.equal(one, after[name])}
    assert changed == {"decoder"}


def test_what_is_wrong_with_its_network_is_said_by_key(tmp_path: Path) -> None:
    assert isinstance(recipe(tmp_path), AutoencoderRecipe)
    for network, message in (
        ({"blocks": [1, "x"]}, r"network\.blocks\.1: "),
        ({"blocks": [1], "multipliers": [1]}, r"network\.multipliers: unknown key"),
        ({"blocks": 2, "channles": 8}, r"network\.channles: unknown key; did you mean 'channels'"),
        ({"blocks": [0]}, "must be at least 1"),
    ):
        with pytest.raises(InputError, match=message):
            recipe(tmp_path, network=network)
