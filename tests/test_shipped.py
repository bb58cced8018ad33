"""The model in the package is what README says: its size, where it came from, and that it draws what it is told."""

from pathlib import Path

import pytest
import torch
from test_retrieval import retrieval

import latentkit
from latentkit.applications.stages.train_autoencoder import measure
from latentkit.checkpoints.files import find
from latentkit.data.dataset import Pictures, Transform
from latentkit.data.source import Source, open_source
from latentkit.training.recipe import parse_recipe, read_recipe, resolved

__all__ = ["retrieval"]  # the fixture

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def source() -> Source:
    return open_source(ROOT / "data" / "emoji")


@pytest.fixture(scope="module")
def emoji() -> latentkit.Model:
    return latentkit.load("emoji", device="cpu", dtype=torch.float32)


def test_it_is_small(emoji: latentkit.Model) -> None:
    assert find("emoji").stat().st_size < 32e6
    assert sum(p.numel() for p in emoji.network.parameters()) <= 15e6


def test_it_comes_from_the_committed_recipe_and_data(emoji: latentkit.Model, source: Source) -> None:
    provenance = emoji.provenance
    committed = resolved(read_recipe(str(ROOT / "recipes" / "emoji.yaml"), []))
    trained = resolved(parse_recipe({"whitening": True, **provenance["recipe"]}))  # there was no other way then
    assert {**trained, "sampling": None} == {**committed, "sampling": None}
    assert provenance["defaults"] == {k: v for k, v in committed["sampling"].items() if k != "prompts"}
    assert provenance["data"] == source.select("train").fingerprint
    assert provenance["steps"] == committed["schedule"]["steps"]


def test_its_first_stage_gives_held_out_glyphs_back(emoji: latentkit.Model, source: Source) -> None:
    autoencoder = emoji.network.first_stage.autoencoder
    assert autoencoder is not None
    held = Pictures(source.select("holdout"), Transform(size=64, channels=3, background="white"), 0)
    figures = measure(autoencoder, held)
    assert figures["psnr"] > 29
    assert figures["psnr_box"] > 29


@pytest.mark.slow
def test_it_draws_what_it_is_told(emoji: latentkit.Model, source: Source, retrieval: object) -> None:
    train = source.select("train")
    reference = retrieval.glyphs(train, 64)
    chosen = torch.arange(0, len(train), 28)
    captions = [train.items[i].caption or "" for i in chosen]
    drawn = retrieval.drawn(emoji, captions, "captions")
    figures = retrieval.obeyed(drawn, reference, retrieval.identical(reference), chosen)
    assert figures["first"] > 0.95, figures
