"""Parts whose 16-bit values overflow are computed again in float32; parts of a model are in memory for their turn."""

import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import family
import pytest
import torch
from tiny import tiny_model

from latentkit.applications import generate as generating
from latentkit.applications.attachment import Guide
from latentkit.applications.generate import Progress, Result, generate, replay
from latentkit.applications.metadata import machine, read
from latentkit.applications.request import TextToImage
from latentkit.checkpoints import parts
from latentkit.checkpoints.files import Model, Place, load, save_model
from latentkit.checkpoints.ldm_file import write_single
from latentkit.checkpoints.parts import Parts
from latentkit.errors import InputError
from latentkit.model.latent_diffusion import LatentDiffusion

ASKED = TextToImage(prompt="cat", seed=7, steps=3, guidance_scale=1.5)
MANY = 6e4
"""Deviation of weights that float16 holds, and whose products it does not."""
PARTS = ("conditioners", "denoiser", "first_stage")


def results(events: Iterator[Progress | Result]) -> list[Result]:
    return [event for event in events if isinstance(event, Result)]


def overflowing(*names: str) -> LatentDiffusion:
    """A model in float16 in which those parts' values leave its range on their way to a norm."""
    model: Any = family.model("SD 1")
    layers = {
        "conditioners": model.conditioners["text"].towers[0].blocks[0].feed_out,
        "denoiser": model.denoiser.unet.conv_in,
        "first_stage": model.first_stage.autoencoder.decoder.conv_in,
    }
    for name in names:
        weight = layers[name].weight
        weight.data *= MANY / float(weight.abs().max())
    return model.half()  # type: ignore[no-any-return]


def picture(network: LatentDiffusion) -> torch.Tensor:
    return results(generate(Model(network), ASKED))[0].picture


@pytest.mark.parametrize("part", PARTS)
def test_a_part_that_overflows_works_again_in_float32(part: str, caplog: pytest.LogCaptureFixture) -> None:
    network = overflowing(part)
    model = Model(network, name="tiny", sha256="1" * 64)
    with caplog.at_level(logging.WARNING, "latentkit"):
        drawn = results(generate(model, ASKED, count=2, exact=True))
    assert [one.record.wide for one in drawn] == [(part,)] * 2
    told = [record.getMessage() for record in caplog.records]
    assert told == [
        f"the values of {generating.PARTS[part]} left the range of the model's 16-bit type: "  # type: ignore[index]
        "its part of the work is done again in float32"
    ]
    assert {parameter.dtype for parameter in network.parameters()} == {torch.float16}
    by_hand = overflowing(part)
    getattr(by_hand, part).float()
    for one in drawn:
        assert one.picture.isfinite().all()
    assert torch.equal(drawn[0].picture, picture(by_hand))
    record = read(drawn[1].png(), "it")
    caplog.clear()
    again = next(event for event in replay(model, record) if isinstance(event, Result))
    assert not caplog.records
    assert again.png() == drawn[1].png()


def test_several_parts_that_overflow() -> None:
    (drawn,) = results(generate(Model(overflowing(*PARTS)), ASKED))
    assert drawn.record.wide == PARTS


def test_only_the_part_that_overflows_works_again(monkeypatch: pytest.MonkeyPatch) -> None:
    network = overflowing("first_stage")
    calls = []
    forward = network.denoiser.forward
    monkeypatch.setattr(network.denoiser, "forward", lambda *a, **k: (calls.append(1), forward(*a, **k))[1])
    steps = [event.step for event in generate(Model(network), ASKED) if isinstance(event, Progress)]
    assert steps == list(range(1, 4))
    assert len(calls) == 3


def test_steps_on_values_that_are_not_finite_are_few(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    plain = family.model("SD 1")
    forward = plain.denoiser.forward

    def failing(*args: Any, **options: Any) -> torch.Tensor:
        calls.append(1)
        answer: torch.Tensor = forward(*args, **options)
        return answer * float("nan") if len(calls) > 2 else answer

    monkeypatch.setattr(plain.denoiser, "forward", failing)
    with pytest.raises(InputError, match="seed 7 holds NaN"):
        list(generate(Model(plain), ASKED.model_copy(update={"steps": 50})))
    assert len(calls) == generating.WATCHED + 1


@pytest.mark.parametrize("part", PARTS)
def test_what_float32_does_not_hold_either_is_an_error(part: str) -> None:
    network = overflowing(part)
    for parameter in getattr(network, part).parameters():
        parameter.data.fill_(float("inf"))
    with pytest.raises(InputError, match="seed 7 holds NaN or infinite values and was not drawn"):
        list(generate(Model(network), ASKED))


@pytest.fixture(params=["latentkit", "ldm", "ldm in float16"])
def path(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A model file in one of the layouts."""
    path = tmp_path / "model.safetensors"
    if request.param == "latentkit":
        save_model(path, tiny_model(), {})
    else:
        network = family.model("SD 1", torch.float16 if "16" in request.param else torch.float32)
        write_single(path, network, "model")
    return path


def test_low_memory_draws_the_same_pictures(path: Path) -> None:
    asked = [ASKED, ASKED.model_copy(update={"prompt": "dog"})]
    usual, low = load(path, "cpu"), load(path, "cpu", low_memory=True)
    assert low.place == Place(torch.device("cpu"))
    assert machine(low) == machine(usual)
    stored = [parameter.data_ptr() for parameter in low.network.parameters()]
    drawn = results(generate(low, asked))
    assert [parameter.data_ptr() for parameter in low.network.parameters()] == stored
    assert [one.record.strips for one in drawn] == [True, True]
    for one, other in zip(drawn, results(generate(usual, asked, low_memory=True)), strict=True):
        assert torch.equal(one.picture, other.picture)
    for one, other in zip(drawn, results(generate(usual, asked)), strict=True):
        torch.testing.assert_close(
            one.picture, other.picture, rtol=0, atol=5e-2 if machine(usual).dtype != "float32" else 1e-4
        )
        assert other.record.strips is None
    (again,) = results(replay(usual, read(drawn[1].png(), "it")))
    assert again.png() == drawn[1].png()


def test_parts_are_brought_for_their_turn_and_no_longer(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = load(path, "cpu", low_memory=True)
    brought: list[tuple[str, torch.device]] = []
    gone: list[str] = []
    names = {parameter: name.split(".")[0] for name, parameter in model.network.named_parameters()}
    stored = {parameter.data_ptr(): name for parameter, name in names.items()}
    monkeypatch.setattr(parts, "bring", lambda p, place: brought.append((names[p], place.device)))
    monkeypatch.setattr(parts, "let_go", lambda tensors: gone.extend(stored[t.data_ptr()] for t in tensors))
    events = generate(model, ASKED)
    next(events)
    assert [*dict.fromkeys(name for name, _ in brought)] == ["conditioners", "denoiser"]
    assert set(gone) == {"conditioners"}
    list(events)
    assert [*dict.fromkeys(name for name, _ in brought)] == ["conditioners", "denoiser", "first_stage"]
    assert [*dict.fromkeys(gone)] == ["conditioners", "denoiser", "first_stage"]
    assert len(brought) == len(gone) == len(stored)


def test_parts_of_a_model_on_another_device_rest_on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model()
    there = torch.device("meta")
    model.first_stage.to(there)
    moves: list[str] = []
    monkeypatch.setattr(parts, "bring", lambda parameter, place: moves.append(place.device.type))
    count = len(list(model.first_stage.parameters()))
    with Parts({"first_stage": [(model.first_stage, None)]}, low=True) as owner:
        assert moves == ["cpu"] * count
        assert {place.device for place in owner._lent.values()} == {there}
    assert moves == ["cpu"] * count + ["meta"] * count


def test_a_refiner_comes_after_the_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    paths = [tmp_path / "base.safetensors", tmp_path / "refiner.safetensors"]
    for path, name in zip(paths, ("XL", "refiner")):
        write_single(path, family.model(name), name)
    asked = TextToImage(prompt="cat", seed=7, steps=6, refiner=Guide.read(paths[1], "cpu"))
    usual = results(generate(load(paths[0], "cpu"), asked, low_memory=True))[0]
    turns: list[tuple[str, ...]] = []
    turn = Parts.turn
    monkeypatch.setattr(Parts, "turn", lambda self, *names: (turns.append(names), turn(self, *names))[1])
    resting = asked.model_copy(update={"refiner": Guide.read(paths[1], "cpu", low_memory=True)})
    turns.clear()
    low = results(generate(load(paths[0], "cpu", low_memory=True), resting))[0]
    assert [*dict.fromkeys(turns)][-5:] == [("conditioners",), ("denoiser",), ("refiner",), ("first_stage",), ()]
    assert torch.equal(low.picture, usual.picture)
