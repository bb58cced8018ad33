"""`latentkit search-spacing`: levels found on a model's own prompts, kept in a file, and drawn with."""

import json
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny import tiny_model

from latentkit.applications import search_spacing as application
from latentkit.applications.request import ask
from latentkit.applications.rules import resolve
from latentkit.checkpoints import description
from latentkit.checkpoints.files import Model, load, save_model
from latentkit.diffusion.samplers.driver import sample
from latentkit.diffusion.spacing import space
from latentkit.errors import InputError

Run = Callable[..., int]
PROMPTS = ["red heart", "pizza"]


@pytest.fixture
def run(run: Run, monkeypatch: pytest.MonkeyPatch) -> Run:
    """Runs the command in a folder that holds the model `tiny.safetensors`; gives the exit code."""
    monkeypatch.setattr(application, "FINE", 8)
    monkeypatch.setattr(application, "SAMPLES", 3)
    recipe = {"sampling": {"prompts": PROMPTS}}
    save_model("tiny.safetensors", tiny_model(), {"defaults": {"steps": 3, "guidance_scale": 1.5}, "recipe": recipe})
    return run


SEARCH = ("search-spacing", "-m", "tiny.safetensors")


def test_what_is_found_is_kept_and_drawn_with(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    weights = load("tiny.safetensors").network.state_dict()
    assert run(*SEARCH, "--steps", "4", "--steps", "2", "--into", "new.safetensors") == 0
    printed = capsys.readouterr()
    lines = printed.out.splitlines()
    assert [line.split(":")[0] for line in lines] == ["2", "4", "new.safetensors"]
    assert "searching" in printed.err
    model = load("new.safetensors")
    found = model.network.architecture.searched
    assert [len(sigmas) for sigmas in found] == [3, 5]
    assert all(sigmas[0] == 1e7 and sigmas[-1] == 0 and (np.diff(sigmas) < 0).all() for sigmas in found)
    assert lines[0].startswith("2: " + " ".join(f"{sigma:.5g}" for sigma in found[0]) + "  off by ")
    assert model.provenance == load("tiny.safetensors").provenance
    assert all((tensor == weights[name]).all() for name, tensor in model.network.state_dict().items())
    assert load("tiny.safetensors").network.architecture.searched == ()

    assert run(*SEARCH[:2], "new.safetensors", "--steps", "3", "--steps", "2", "--into", "new.safetensors") == 0
    assert [len(sigmas) for sigmas in load("new.safetensors").network.architecture.searched] == [3, 4, 5]
    assert run("generate", "-m", "new.safetensors", "--spacing", "searched", "--steps", "5", "--seed", "1") == 0
    assert run("generate", "-m", "tiny.safetensors", "--spacing", "searched", "x") == 2
    assert "this model holds no searched spacing; `latentkit search-spacing` finds one" in capsys.readouterr().err


def test_nothing_is_written_over_and_nothing_half_written(
    run: Run, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    Path("other.safetensors").write_text("mine")
    assert run(*SEARCH, "--steps", "2", "--into", "other.safetensors") == 2
    assert "other.safetensors exists and is not overwritten; name a new file" in capsys.readouterr().err
    assert Path("other.safetensors").read_text() == "mine"
    before = Path("tiny.safetensors").read_bytes()

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(description.os, "fsync", full)
    assert run(*SEARCH, "--steps", "2", "--into", "tiny.safetensors") == 1
    assert "could not be written to tiny.safetensors: No space left on device" in capsys.readouterr().err
    assert Path("tiny.safetensors").read_bytes() == before
    assert sorted(os.listdir()) == ["other.safetensors", "tiny.safetensors"]


@pytest.mark.parametrize("steps", ["0", "9"])
def test_a_number_that_cannot_be_searched_is_refused(run: Run, capsys: pytest.CaptureFixture[str], steps: str) -> None:
    assert run(*SEARCH, "--steps", steps) == 2
    assert f"a spacing of {steps} steps is asked for; the search finds 1 to 8" in capsys.readouterr().err


def test_the_work_is_told_in_shares_and_divides_into_batches_without_a_change(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = load("tiny.safetensors", dtype=torch.float32)
    *shares, whole = application.search_spacing(model, [3])
    assert isinstance(whole, application.Found)
    assert shares == sorted(shares)
    assert shares[-1] == pytest.approx(1)
    monkeypatch.setattr(application, "CELLS_AT_ONCE", 1)
    *single, parts = application.search_spacing(model, [3])
    assert isinstance(parts, application.Found)
    assert len(single) == 3 * len(shares)
    assert parts.sigmas == whole.sigmas
    assert parts.errors == pytest.approx(whole.errors, rel=1e-4)


def test_of_the_lists_tried_the_nearest_is_taken_and_its_distance_is_true(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = load("tiny.safetensors", dtype=torch.float32)
    *_, found = application.search_spacing(model, [3, 5])
    assert isinstance(found, application.Found)
    each = []
    for later in application.TRIED:
        monkeypatch.setattr(application, "TRIED", (later,))
        *_, alone = application.search_spacing(model, [3, 5])
        assert isinstance(alone, application.Found)
        each.append(alone.errors)
    assert found.errors == pytest.approx([min(pair) for pair in zip(*each)])

    def latents(sigmas: np.ndarray) -> torch.Tensor:
        (requests,) = application._batches(model, 8, model.provenance["defaults"])
        with torch.inference_mode():
            plan = application._plan(model.network, requests)
            *_, last = sample("dpm++2m", plan.denoise, plan.x, sigmas, None)
            return last.x.clone()

    schedule = model.network.architecture.schedule
    many = latents(space("beta", schedule, 8))
    for sigmas, error in ((found.sigmas[0], found.errors[0]), (space("uniform", schedule, 3), found.usual[0])):
        apart = (latents(np.array(sigmas)) - many).square().mean((1, 2, 3)) / many.square().mean((1, 2, 3))
        assert float(apart.sqrt().mean()) == pytest.approx(error, rel=1e-5)


def test_it_is_searched_on_the_models_own_words() -> None:
    text, classes, neither = tiny_model(), tiny_model(text=False, label=True), tiny_model(text=False)
    recipe = {"recipe": {"sampling": {"prompts": PROMPTS}}}
    assert application.words(Model(text, recipe)) == PROMPTS
    assert application.words(Model(classes)) == ["animal", "food", "symbol"]
    for network in (text, neither):
        for provenance in ({}, {"recipe": 3}, {"recipe": {"sampling": {"prompts": [1]}}}):
            assert application.words(Model(network, provenance)) == [None]


def test_a_hostile_list_in_a_file_is_refused_before_drawing() -> None:
    network = tiny_model()
    network.architecture = replace(network.architecture, searched=((1.0, 2.0, 0.0),))
    with pytest.raises(InputError, match="gives no 2 falling steps here"):
        resolve(ask(prompt="x", spacing="searched", steps=2), network, {})


def test_the_description_alone_is_another(run: Run) -> None:
    assert run(*SEARCH, "--steps", "2", "--into", "new.safetensors") == 0

    def split(name: str) -> tuple[dict, bytes]:
        data = Path(name).read_bytes()
        size = int.from_bytes(data[:8], "little")
        assert size % 8 == 0
        return json.loads(data[8 : 8 + size]), data[8 + size :]

    (old, weights), (new, same) = split("tiny.safetensors"), split("new.safetensors")
    assert weights == same
    documents = [json.loads(header.pop("__metadata__").pop("latentkit")) for header in (old, new)]
    assert old == new
    searched = documents[1]["architecture"].pop("searched")
    assert documents[0]["architecture"].pop("searched") == []
    assert len(searched) == 1
    assert documents[0] == documents[1]
