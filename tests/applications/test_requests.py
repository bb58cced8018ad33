"""Requests: what is asked, what the model suggests, what cannot be done."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import tiny_model

from latentkit.applications.attachment import Attachment, Guide
from latentkit.applications.generate import generate
from latentkit.applications.request import (
    ClassToImage,
    ImageToImage,
    Request,
    TextToImage,
    Unconditional,
    ask,
    told,
)
from latentkit.applications.rules import FALLBACK, resolve
from latentkit.checkpoints.files import Model
from latentkit.data.pictures import to_png
from latentkit.errors import InputError

WORDS, CLASSES, NOTHING = tiny_model(), tiny_model(text=False, label=True), tiny_model(text=False)
GUIDE = Guide("0" * 64, Model(WORDS))
OTHER = Guide("1" * 64, Model(tiny_model(), name="other"))
OTHER.model.network.first_stage.latent_std.mul_(2)  # type: ignore[union-attr]
FLAT = tiny_model()
FLAT.architecture = replace(FLAT.architecture, network=replace(FLAT.architecture.network, middle_depth=0))


@pytest.fixture
def picture(tmp_path: Path) -> Path:
    path = tmp_path / "picture.png"
    path.write_bytes(to_png(torch.linspace(-1, 1, 3 * 20 * 30).view(3, 20, 30)))
    return path


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"promt": "x"}, "'promt' is unknown; did you mean 'prompt'"),
        ({"steps": "12"}, "steps: must be a whole number"),
        ({"steps": 0}, "must be at least 1"),
        ({"seed": -1}, "must be at least 0"),
        ({"seed": 2**63}, "less than"),
        ({"strength": 0.0}, "greater than 0"),
        ({"strength": 1.01}, "must be at most 1"),
        ({"guidance_scale": float("nan")}, "finite"),
        ({"width": 9000}, "8192"),
        ({"prompt": "x" * 10_001}, "10000"),
        ({"task": "text-to-video"}, "task"),
        ({"init": "/etc/passwd"}, "Attachment.read"),
        ({"guidance_model": "/etc/passwd"}, "Guide.read"),
        ({"guidance_kind": "cfg+"}, "must be 'cfg', 'cfg..' or 'apg'"),
        ({"also": []}, "also"),
        ({"also": [["x", 1.0]] * 9}, "also"),
        ({"also": [["x", 1e3]]}, "weight of also 1: must be at most 100"),
        ({"also": [["x" * 2001, 1.0]]}, "prompt of also 1: must have"),
        ({"also": "x:1"}, "also: must be a list"),
        ({"guidance_rescale": 1.1}, "must be at most 1"),
        ({"threshold": 0.0}, "must be greater than 0"),
        ({"pag_scale": -1.0}, "must be at least 0"),
    ],
)
def test_wrong_fields(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message) as caught:
        ask(**fields)
    assert caught.value.exit_code == 2


def test_what_is_asked_goes_before_what_the_model_suggests() -> None:
    full = resolve(TextToImage(prompt="red heart", steps=5), WORDS, {"steps": 7, "sampler": "euler"})
    assert (full.steps, full.sampler, full.spacing) == (5, "euler", FALLBACK["spacing"])
    assert (full.width, full.height, full.task) == (32, 32, "text-to-image")
    assert full.seed is not None
    assert resolve(full, WORDS, {"steps": 9}) == full
    again = Request.model_validate_json(full.model_dump_json(exclude_none=True))
    assert again == full


def test_the_task_is_told_by_what_is_given(picture: Path) -> None:
    assert resolve(Request(prompt="x"), WORDS, {}).task == "text-to-image"
    assert resolve(Request(label="food"), CLASSES, {}).task == "class-to-image"
    assert resolve(Request(), WORDS, {}).task == "unconditional"
    init = Attachment.read(picture)
    full = resolve(Request(prompt="x", init=init), WORDS, {})
    assert (full.task, full.strength) == ("image-to-image", 0.6)
    assert resolve(Request(), NOTHING, {}).guidance_scale == 1
    assert told(WORDS, "x") == {"prompt": "x"}
    assert told(CLASSES, "x") == {"label": "x"}


@pytest.mark.parametrize(
    ("model", "request_", "message"),
    [
        (NOTHING, TextToImage(prompt="x"), "takes no prompt; it takes: no condition at all"),
        (CLASSES, TextToImage(prompt="x"), "takes no prompt; it takes: label"),
        (WORDS, ClassToImage(label="food"), "takes no label; it takes: prompt"),
        (WORDS, TextToImage(), "text-to-image needs a prompt"),
        (WORDS, Unconditional(prompt="x"), "neither prompt nor label"),
        (WORDS, TextToImage(prompt="x", strength=0.5), "strength 0.5 says .*give one \\(--init PICTURE"),
        (NOTHING, Unconditional(guidance_scale=2.0), "nothing to guide"),
        (WORDS, TextToImage(prompt="x", negative="y", guidance_scale=1.0), "negative prompt has no effect"),
        (WORDS, TextToImage(prompt="x", guidance_low=5.0, guidance_high=5.0), "low must be below high"),
        (WORDS, TextToImage(prompt="x", sampler="dpm++2n"), r"did you mean 'dpm\+\+2m'"),
        (WORDS, TextToImage(prompt="x", spacing="karas"), "did you mean 'karras'"),
        (WORDS, TextToImage(prompt="x", steps=5000), "5000 sampler steps"),
        (WORDS, TextToImage(prompt="x", width=33), "multiples of 8"),
        (WORDS, TextToImage(prompt="x", sampler="DPM++ 2M Karras", spacing="uniform"), "names the spacing 'karras'"),
        (WORDS, Request(also=[["x", 1.0]]), "more prompts are asked for beside none"),
        (WORDS, TextToImage(prompt="x", guidance_kind="cfg++", guidance_scale=1.5), "cfg.., whose scales are 0 to 1"),
        (WORDS, TextToImage(prompt="x", guidance_kind="apg", guidance_scale=1.0), "kind 'apg' has no effect"),
        (WORDS, TextToImage(prompt="x", guidance_rescale=0.5, guidance_scale=1.0), "rescale has no effect"),
        (WORDS, TextToImage(prompt="x", guidance_model=GUIDE, guidance_scale=1.0), "a guidance model has no effect"),
        (WORDS, TextToImage(prompt="x", guidance_model=GUIDE, negative="y"), "or the negative prompt; give one"),
        (
            WORDS,
            TextToImage(prompt="x", guidance_model=Guide("2" * 64)),
            "guidance model whose file has the sha256 2222",
        ),
        (NOTHING, Request(guidance_model=OTHER), "'other' was trained on other latents"),
        (WORDS, TextToImage(prompt="x", guidance_model=OTHER), "'other' was trained on other latents"),
        (WORDS, TextToImage(prompt="x", threshold=0.9), "is for models that draw pixels"),
        (FLAT, TextToImage(prompt="x", pag_scale=1.0), "this model's middle has no attention"),
        (WORDS, TextToImage(prompt="x", sampler="euler", eta=0.5), "takes no eta; these do: .*euler_ancestral"),
        (WORDS, TextToImage(prompt="x", sampler="euler", churn=5.0), "takes no churn; these do: .*edm"),
        (WORDS, TextToImage(prompt="x", sampler="euler_ancestral", eta=2.0), "eta 2 is asked of .*which takes 0 to 1"),
        (WORDS, Request(init=Attachment("0" * 64)), "needs the init picture whose pixels have the sha256 0000"),
    ],
)
def test_what_a_model_cannot_do(model: Any, request_: Request, message: str) -> None:
    with pytest.raises(InputError, match=message) as caught:
        resolve(request_, model, {})
    assert caught.value.exit_code == 2


def test_wrong_suggestions_of_a_model_file_are_named() -> None:
    with pytest.raises(InputError, match="sampling defaults: 'stebs' is unknown; did you mean 'steps'"):
        resolve(Request(), WORDS, {"stebs": 3})


def test_a_huge_file_is_not_read(picture: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("latentkit.applications.attachment.MAX_PICTURE_BYTES", 10)
    with pytest.raises(InputError, match="is larger than"):
        Attachment.read(picture)


def test_an_attached_picture_travels_as_its_digest(picture: Path, tmp_path: Path) -> None:
    request = ImageToImage(picture, prompt="x")
    written = json.loads(request.model_dump_json())
    assert written["init"] == Attachment.read(picture).digest
    assert Request.model_validate_json(request.model_dump_json()) == request
    other = tmp_path / "other.png"
    other.write_bytes(to_png(torch.zeros(3, 20, 30)))
    assert Attachment.read(other) != request.init
    with pytest.raises(InputError, match="cannot be read"):
        ImageToImage(tmp_path / "none.png")


def test_a_text_longer_than_the_encoder_reads_is_said(caplog: pytest.LogCaptureFixture) -> None:
    words = "green apple on a red heart and a slice of pizza"
    for prompt, negative in (("red heart", ""), (words, words)):
        next(generate(Model(WORDS, {}), TextToImage(prompt=prompt, negative=negative, seed=1)))
        said = [record.getMessage() for record in caplog.records]
        assert len(said) == 2 * bool(negative)
    assert said[0].startswith("7 of the ")
    assert "tokens of the prompt 'green apple on a red heart" in said[0]
    assert "of the negative" in said[1]
