"""Requests for guidance: what each does to a picture, what it costs, and that its record draws the picture again."""

import json
from typing import Any

import pytest
import torch
from tiny import tiny_model
from torch import Tensor

from latentkit.applications.attachment import Guide
from latentkit.applications.generate import Result, generate, replay
from latentkit.applications.metadata import a1111, chunks, read
from latentkit.applications.request import Request, TextToImage, Unconditional
from latentkit.applications.rules import FALLBACK, resolve
from latentkit.checkpoints.files import Model

NETWORK = tiny_model()
MODEL = Model(NETWORK, {"defaults": {"steps": 3}}, "tiny", "0" * 64)
WEAK = Guide("1" * 64, Model(tiny_model(label=True), {}, "weak", "1" * 64))
PIXELS = Model(tiny_model(text=False, latent=False), {"defaults": {"steps": 3}}, "pixels")
WAYS: dict[str, dict[str, Any]] = {
    "several": {"also": [["dog", 0.5], ["pizza", -0.3]]},
    "rescale": {"guidance_rescale": 0.7},
    "apg": {"guidance_kind": "apg"},
    "cfg++": {"guidance_kind": "cfg++"},
    "autoguidance": {"guidance_model": WEAK},
    "perturbed attention": {"pag_scale": 3.0},
    "perturbed attention alone": {"pag_scale": 3.0, "guidance_scale": 1.0},
    "eta": {"sampler": "euler_ancestral", "eta": 0.5},
    "churn": {"sampler": "edm", "churn": 0.3},
    "all": {
        "also": [["dog", 0.5]], "guidance_rescale": 0.5, "guidance_kind": "apg", "guidance_model": WEAK,
        "pag_scale": 1.0, "guidance_low": 0.1, "guidance_high": 50.0,
    },
}  # fmt: skip


def requests(**fields: Any) -> list[Request]:
    return [TextToImage(prompt=prompt, seed=7 + i, **fields) for i, prompt in enumerate(("red heart", "cat"))]


def results(model: Model, asked: Request | list[Request]) -> list[Result]:
    found = [event for event in generate(model, asked) if isinstance(event, Result)]
    return sorted(found, key=lambda result: result.number)


def drawn(model: Model = MODEL, **fields: Any) -> Tensor:
    words = {"prompt": "cat"} if model is MODEL else {}
    return results(model, Request(seed=1, **words, **fields))[0].picture


@pytest.mark.parametrize("way", WAYS)
def test_each_way_changes_the_picture_and_a_batch_equals_its_singles(way: str) -> None:
    fields = WAYS[way]
    together = results(MODEL, requests(**fields))
    assert [one.record.batch for one in together] == [2, 2]
    plain = {name: fields[name] for name in ("sampler", "guidance_scale") if name in fields}
    for request, one, other in zip(requests(**fields), together, results(MODEL, requests(**plain))):
        torch.testing.assert_close(one.picture, results(MODEL, request)[0].picture, rtol=0, atol=5e-5)
        assert (one.picture - other.picture).abs().max() > 1e-3


@pytest.mark.parametrize("way", WAYS)
def test_its_record_draws_the_picture_again_to_the_byte(way: str) -> None:
    one = results(MODEL, requests(**WAYS[way]))[1]
    record = read(one.png(), "a.png")
    assert record == one.record
    if record.request.guidance_model is not None:
        assert record.request.guidance_model.model is None
        update = {"request": record.request.model_copy(update={"guidance_model": WEAK})}
        record = record.model_copy(update=update)
    again = [event for event in replay(MODEL, record) if isinstance(event, Result)]
    assert again[0].png() == one.png()


def test_records_of_plain_requests_are_what_they_always_were() -> None:
    """Older pictures replay to the byte only if nothing is written that was not asked for."""
    request = json.loads(chunks(results(MODEL, requests()[0])[0].record)["latentkit"])["request"]
    assert set(request) == {"task", "prompt", "negative", "seed", "width", "height", *FALLBACK}


def test_what_is_written_for_other_programs() -> None:
    first = results(MODEL, requests(**WAYS["several"], sampler="euler_ancestral", eta=0.25))[0]
    assert a1111(first.record).startswith("red heart AND dog :0.5 AND pizza :-0.3\nSteps: 3, Sampler: Euler a, ")
    assert ", Eta: 0.25, " in a1111(first.record)


@pytest.mark.parametrize(
    "nothing",
    [
        {"guidance_kind": "cfg"},
        {"guidance_rescale": 0.0},
        {"pag_scale": 0.0},
        {"guidance_low": 0.0, "guidance_high": 1e9},
    ],
)
def test_what_asks_for_nothing_is_nothing(nothing: dict[str, Any]) -> None:
    assert torch.equal(drawn(**nothing), drawn())


@pytest.mark.parametrize("way", [way for way in WAYS if way not in ("eta", "churn", "several", "all")])
def test_outside_the_interval_there_is_none(way: str) -> None:
    outside = {"guidance_low": 1e8, "guidance_high": 1e9}
    assert torch.equal(drawn(**WAYS[way], **outside), drawn(guidance_scale=1.0))


def test_cfg_plus_is_not_plain_guidance_of_its_scale() -> None:
    """Fresh noise is relative to the negative, also at scale 1, where the estimate is the positive."""
    for scale in (0.6, 1.0):
        plain = drawn(guidance_scale=scale)
        assert (drawn(guidance_kind="cfg++", guidance_scale=scale) - plain).abs().max() > 1e-3
    assert torch.equal(drawn(guidance_kind="cfg++"), drawn(guidance_kind="cfg++", guidance_scale=0.6))


def test_guidance_by_itself_and_by_the_same_words_is_none() -> None:
    itself = Guide("0" * 64, MODEL)
    assert torch.equal(drawn(guidance_model=itself, guidance_scale=4.0), drawn(guidance_scale=1.0))
    same = drawn(guidance_kind="apg", negative="cat")
    torch.testing.assert_close(same, drawn(guidance_scale=1.0), rtol=0, atol=1e-5)
    assert not torch.equal(drawn(guidance_model=WEAK, guidance_scale=4.0), drawn(guidance_scale=1.0))


def test_the_same_words_again_are_a_stronger_scale() -> None:
    """negative + s ((1 + w) (positive - negative))."""
    torch.testing.assert_close(
        drawn(also=[["cat", 0.5]], guidance_scale=2.0), drawn(guidance_scale=3.0), rtol=0, atol=1e-4
    )
    torch.testing.assert_close(drawn(also=[["dog", 0.0]]), drawn(), rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    ("fields", "rows"),
    [
        ({"guidance_scale": 1.0}, [1]),
        ({}, [2]),
        ({"guidance_low": 1e8}, [1]),
        ({"also": [["dog", 0.5], ["pizza", 1.0]]}, [4]),
        ({"also": [["dog", 0.5]], "guidance_scale": 1.0}, [3]),
        ({"pag_scale": 2.0}, [2, 1]),
        ({"pag_scale": 2.0, "guidance_scale": 1.0}, [1, 1]),
        ({"guidance_model": Guide("0" * 64, MODEL)}, [1, 1]),
    ],
)
def test_what_it_costs(fields: dict[str, Any], rows: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    calls, forward = [], NETWORK.denoiser.unet.forward
    monkeypatch.setattr(
        NETWORK.denoiser.unet, "forward", lambda x, *a, **k: calls.append(len(x)) or forward(x, *a, **k)
    )
    drawn(steps=1, sampler="euler", **fields)
    assert calls == rows


def test_autoguidance_guides_what_knows_no_words() -> None:
    weak = tiny_model(text=False, latent=False)
    for parameter in weak.denoiser.parameters():
        parameter.data *= 0.9
    guide = Guide("2" * 64, Model(weak, {}, "weak"))
    assert resolve(Unconditional(guidance_model=guide), PIXELS.network, {}).guidance_scale == FALLBACK["guidance_scale"]
    assert not torch.equal(drawn(PIXELS, guidance_model=guide), drawn(PIXELS))
    assert torch.equal(drawn(PIXELS, guidance_model=guide, guidance_low=1e8), drawn(PIXELS))


def test_a_threshold_keeps_pixels_in_range(monkeypatch: pytest.MonkeyPatch) -> None:
    def widest(**fields: Any) -> float:
        """The largest of the pixels before they are clamped."""
        seen, decode = [], PIXELS.network.first_stage.decode
        monkeypatch.setattr(PIXELS.network.first_stage, "decode", lambda z: seen.append(decode(z)) or seen[-1])
        drawn(PIXELS, **fields)
        monkeypatch.undo()
        return float(seen[-1].abs().max())

    assert widest() > 1.05
    assert widest(threshold=0.9) <= 1 + 1e-5


def test_the_peers_names_of_samplers() -> None:
    full = resolve(TextToImage(prompt="x", sampler="DPM++ 2M Karras"), NETWORK, {"spacing": "uniform"})
    assert (full.sampler, full.spacing) == ("dpm++2m", "karras")
    full = resolve(TextToImage(prompt="x", sampler="Euler a", spacing="kl_optimal"), NETWORK, {})
    assert (full.sampler, full.spacing) == ("euler_ancestral", "kl_optimal")
