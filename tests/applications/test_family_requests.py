"""Requests of Stable Diffusion's family: what is refused, what a record draws again, what is said on the way."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import family
import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from latentkit.applications.attachment import Attachment, Guide, WeightsFile
from latentkit.applications.generate import Result, generate, replay
from latentkit.applications.metadata import a1111, read
from latentkit.applications.plan import switch_step
from latentkit.applications.request import ImageToImage, Request, TextToImage, ask
from latentkit.applications.rules import resolve
from latentkit.checkpoints.files import Model, load_model, save_model
from latentkit.data.pictures import to_png
from latentkit.diffusion.noise import keyed_normal
from latentkit.errors import InputError
from latentkit.model.conditioners.image import ImageConfig
from latentkit.model.denoiser import ConsistencyConfig, guidance_waves
from latentkit.model.latent_diffusion import Architecture, LatentDiffusion
from latentkit.nets.clip import ClipImageConfig

SEEN = ClipImageConfig(size=28, width=32, layers=1, heads=2, projection=16)


def network(architecture: Architecture) -> LatentDiffusion:
    """A random model of it, always the same."""
    made = LatentDiffusion(architecture, {})
    for index, (name, one) in enumerate(made.named_parameters()):
        drawn = keyed_normal(one.shape, 1, index, name)
        one.data = drawn * one[0].numel() ** -0.5 if one.ndim > 1 else 0.1 * drawn + float(name.endswith("weight"))
    return made.eval().requires_grad_(False)


SD1_SHAPE, V2_SHAPE = family.ARCHITECTURES["SD 1"], family.ARCHITECTURES["SD 2"]
SD1, XL, REFINER = (Model(family.model(name), {}, name) for name in ("SD 1", "XL", "refiner"))
SD2 = Model(network(V2_SHAPE), {}, "SD 2")
UNCLIP = Model(
    network(replace(V2_SHAPE, network=replace(V2_SHAPE.network, vector_width=32), image=ImageConfig(SEEN))),
    {},
    "unCLIP",
)
LCM = Model(network(replace(SD1_SHAPE, consistency=ConsistencyConfig(guidance_width=8))), {}, "LCM")
OTHER = Model(family.model("refiner", scale=0.5), {}, "other")
GUIDE = Guide("1" * 64, REFINER)
FEW: dict[str, Any] = {"steps": 5, "seed": 3, "sampler": "euler_ancestral"}


def drawn(model: Model, request: Request) -> Result:
    (result,) = [event for event in generate(model, request) if isinstance(event, Result)]
    return result


@pytest.fixture
def picture(tmp_path: Path) -> Attachment:
    path = tmp_path / "picture.png"
    path.write_bytes(to_png(torch.linspace(-1, 1, 3 * 40 * 32).view(3, 40, 32)))
    return Attachment.read(path)


@pytest.fixture
def inversion(tmp_path: Path) -> WeightsFile:
    """Two vectors for both towers of XL."""
    save_file({"clip_l": torch.ones(2, 32), "clip_g": torch.ones(2, 48)}, tmp_path / "cat.safetensors")
    return WeightsFile.read(tmp_path / "cat.safetensors")


@pytest.mark.parametrize(
    ("model", "fields", "message"),
    [
        (SD1, {"original_size": (64, 64)}, "is not told original size; it is told no sizes and no score"),
        (XL, {"aesthetic_score": 5.0}, "not told aesthetic score; it is told crop, original size, target size"),
        (REFINER, {"target_size": (64, 64)}, "not told target size; it is told aesthetic score, crop, original size"),
        (XL, {"negative_aesthetic_score": 5.0}, "is not told negative aesthetic score"),
        (XL, {"original_size": (64, 0)}, "original size has a side of no pixels"),
        (REFINER, {"negative_aesthetic_score": 1.0, "guidance_scale": 1.0}, "negative aesthetic score has no effect"),
        (XL, {"refiner_switch": 0.5}, "a refiner switch is given without a refiner"),
        (XL, {"refiner": Guide("2" * 64)}, r"needs the refiner whose file has the sha256 22222.*--refiner FILE"),
        (XL, {"refiner": GUIDE, "guidance_model": GUIDE}, "a guidance model and a refiner are asked for"),
        (XL, {"refiner": Guide("3" * 64, OTHER)}, "refiner 'other' was trained on other latents"),
        (XL, {"refiner": Guide("4" * 64, Model(family.model("SD 1 inpainting"), {}, "in"))}, "'in' takes pictures"),
        (XL, {"refiner": Guide("5" * 64, Model(family.model("churches"), {}, "ch"))}, "'ch' takes no prompt"),
        (XL, {"refiner": GUIDE, "steps": 1}, "switch at 0.8, the refiner has none of the 1 steps"),
        (SD1, {"clip_skip": 4}, "clip skip 4 is asked for; this model takes 1 to 3"),
        (XL, {"clip_skip": 3}, "clip skip 3 is asked for; this model takes 1 to 2"),
        (SD1, {"noise_level": 3}, "text-to-image takes no noise level"),
        (LCM, {"negative": "dog"}, "a negative prompt has no effect: this model was distilled"),
        (LCM, {"guidance_kind": "apg"}, "guidance kind has no effect: this model was distilled"),
        (LCM, {"guidance_high": 5.0}, "a guidance interval has no effect: this model was distilled"),
        (LCM, {"guidance_rescale": 0.5}, "guidance rescale has no effect: this model was distilled"),
        (LCM, {"guidance_model": Guide("6" * 64, SD1)}, "a guidance model has no effect: this model was distilled"),
    ],
)
def test_what_a_model_cannot_do(model: Model, fields: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message) as caught:
        resolve(TextToImage(prompt="a cat", **fields), model.network, {})
    assert caught.value.exit_code == 2


def test_what_pictures_cannot_do(picture: Attachment, inversion: WeightsFile) -> None:
    classes = family.model("classes")
    for model, request, message in (
        (SD1.network, Request(prompt="x", variation=picture), "this model takes no variation; it takes: prompt"),
        (classes, Request(label="cat", variation=picture), "this model takes no variation; it takes: label"),
        (UNCLIP.network, Request(variation=picture, noise_level=1000), "noise level 1000 .* takes 0 to 999"),
        (UNCLIP.network, Request(task="variation", prompt="x"), "variation needs a variation; none was given"),
        (UNCLIP.network, Request(variation=Attachment("0" * 64)), "needs the variation picture whose pixels"),
        (classes, Request(label="cat", clip_skip=2), "this model takes no clip skip"),
        (classes, Request(label="cat", embedding=((inversion, None),)), "this model takes no textual inversion"),
        (XL.network, Request(prompt="x", embedding=((inversion, "a"), (inversion, "A"))), "have one name"),
        (
            XL.network,
            Request(prompt="x", init=picture, strength=0.1, refiner=GUIDE),
            "switch at 0.8, the model before it has none of the 1 steps",
        ),
        (
            family.model("SD 1 inpainting"),
            Request(prompt="x", init=picture, extend=(0, 0, 8, 0), refiner=GUIDE),
            "inpainting takes no refiner; text-to-image and image-to-image",
        ),
    ):
        with pytest.raises(InputError, match=message) as caught:
            resolve(request, model, {})
        assert caught.value.exit_code == 2


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"refiner_switch": 1.0}, "refiner_switch: must be less than 1"),
        ({"refiner_switch": 0.0}, "refiner_switch: must be greater than 0"),
        ({"clip_skip": 0}, "clip_skip: must be at least 1"),
        ({"aesthetic_score": 11.0}, "aesthetic_score: must be at most 10"),
        ({"original_size": (64,)}, "original_size"),
        ({"embedding": ()}, "embedding"),
    ],
)
def test_wrong_fields(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        ask(**fields)


@pytest.mark.parametrize(("switch", "steps", "first"), [(0.8, 10, 8), (0.5, 10, 5), (0.55, 10, 6), (0.75, 4, 3)])
def test_the_switch_is_a_share_of_the_trained_levels(switch: float, steps: int, first: int) -> None:
    """Trailing timesteps of 10 steps are 999, 899 ... 99: those from 1000 (1 - switch) on are the first model's."""
    asked = TextToImage(prompt="x", refiner=GUIDE, refiner_switch=switch, steps=steps, spacing="trailing")
    full = resolve(asked, XL.network, {})
    assert switch_step(XL.network, full) == first
    assert resolve(asked.model_copy(update={"refiner_switch": None, "steps": 10}), XL.network, {}).refiner_switch == 0.8


def test_everything_of_xl_is_in_the_record_and_draws_again(inversion: WeightsFile) -> None:
    request = TextToImage(
        prompt="a <cat>", negative="dog", original_size=(64, 48), crop=(1, 2), target_size=(40, 32), refiner=GUIDE,
        aesthetic_score=7.0, clip_skip=2, embedding=((inversion, "<cat>"),), **FEW,
    )  # fmt: skip
    first = drawn(XL, request)
    for field in ("original_size", "crop", "target_size", "refiner", "aesthetic_score", "clip_skip", "embedding"):
        other = drawn(
            XL,
            request.model_copy(update={field: None, "aesthetic_score": None} if field == "refiner" else {field: None}),
        )
        assert not torch.equal(first.picture, other.picture), field
    record = read(first.png(), "x.png")
    written = json.loads(record.request.model_dump_json(exclude_none=True))
    assert (written["refiner"], written["embedding"]) == ("1" * 64, [[inversion.digest, "<cat>"]])
    assert (written["crop"], written["refiner_switch"], written["clip_skip"]) == ([1, 2], 0.8, 2)
    assert "Clip skip: 2, Refiner: refiner [1111111111], Refiner switch at: 0.8" in a1111(first.record)
    steps: tuple[tuple[dict[str, Any], str | None], ...] = (
        ({}, "needs the refiner whose file"),
        ({"refiner": GUIDE}, r"needs the textual inversion whose file has the sha256.*--embedding FILE"),
        ({"embedding": ((inversion, "<cat>"),)}, None),
    )
    for update, missing in steps:
        record = record.model_copy(update={"request": record.request.model_copy(update=update)})
        if missing:
            with pytest.raises(InputError, match=missing):
                next(replay(XL, record))
    (again,) = [event for event in replay(XL, record) if isinstance(event, Result)]
    assert again.png() == first.png()


def test_a_refiner_draws_the_end_of_image_to_image(picture: Attachment) -> None:
    asked: dict[str, Any] = {"prompt": "cat", "strength": 0.6, **FEW}
    alone = drawn(XL, ImageToImage(picture, **asked))
    assert not torch.equal(drawn(XL, ImageToImage(picture, refiner=GUIDE, **asked)).picture, alone.picture)


def test_an_inversion_has_its_files_name_and_is_gone_after_the_picture(
    inversion: WeightsFile, caplog: pytest.LogCaptureFixture
) -> None:
    plain = drawn(XL, TextToImage(prompt="a cat", **FEW))
    given = drawn(XL, TextToImage(prompt="a cat", embedding=((inversion, None),), **FEW))
    assert given.request.embedding == ((inversion, "cat"),)
    assert not torch.equal(given.picture, plain.picture)
    assert torch.equal(drawn(XL, TextToImage(prompt="a cat", **FEW)).picture, plain.picture)
    assert not caplog.records
    said_in: tuple[dict[str, Any], ...] = ({"negative": "cat"}, {"also": (("cat", 0.5),)}, {})
    for words in said_in:
        drawn(XL, TextToImage(prompt="dog", embedding=((inversion, None),), **words, **FEW))
    (said,) = [record.getMessage() for record in caplog.records]
    assert said == "no prompt says 'cat': that textual inversion has no effect"


def test_a_guidance_model_reads_the_same_words(inversion: WeightsFile) -> None:
    weaker: dict[str, Any] = {"guidance_model": Guide("8" * 64, XL), "guidance_scale": 3.0, **FEW}
    plain = drawn(XL, TextToImage(prompt="a cat", **weaker))
    for more in ({"embedding": ((inversion, None),)}, {"clip_skip": 2}):
        other = drawn(XL, TextToImage(prompt="a cat", **weaker, **more))
        assert not torch.equal(other.picture, plain.picture)


def test_an_inversion_for_another_model_is_refused(inversion: WeightsFile) -> None:
    with pytest.raises(InputError, match="textual inversion 'cat' has vectors of shape"):
        next(generate(SD1, TextToImage(prompt="cat", embedding=((inversion, None),))))


def test_variations_of_a_picture(picture: Attachment) -> None:
    """Words are free; the level of noise counts; a batch equals its singles; the record asks for the picture."""
    request = Request(variation=picture, **FEW)
    first = drawn(UNCLIP, request)
    assert (first.request.task, first.request.noise_level) == ("variation", 0)
    updates: tuple[dict[str, Any], ...] = ({"noise_level": 500}, {"prompt": "cat"}, {"seed": 4})
    for update in updates:
        assert not torch.equal(drawn(UNCLIP, request.model_copy(update=update)).picture, first.picture)
    two = [event for event in generate(UNCLIP, request, count=2) if isinstance(event, Result)]
    assert [one.record.batch for one in two] == [2, 2]
    torch.testing.assert_close(two[0].picture, first.picture, rtol=0, atol=5e-5)
    begun = drawn(UNCLIP, Request(init=picture, variation=picture, **FEW))
    assert begun.request.task == "image-to-image"
    assert not torch.equal(begun.picture, drawn(UNCLIP, Request(init=picture, **FEW)).picture)
    refined = Request(init=picture, variation=picture, refiner=Guide("7" * 64, SD2), **FEW)  # which sees no picture
    assert not torch.equal(drawn(UNCLIP, refined).picture, begun.picture)
    record = read(first.png(), "x.png")
    with pytest.raises(InputError, match="needs the variation picture whose pixels"):
        next(replay(UNCLIP, record))
    record = record.model_copy(update={"request": record.request.model_copy(update={"variation": picture})})
    (again,) = [event for event in replay(UNCLIP, record) if isinstance(event, Result)]
    assert again.png() == first.png()


def test_a_consistency_model_draws_in_four_steps_and_is_told_its_scale(tmp_path: Path) -> None:
    request = TextToImage(prompt="a cat", seed=3)
    first = drawn(LCM, request)
    got = first.request
    assert (got.sampler, got.spacing, got.steps, got.guidance_scale) == ("lcm", "lcm", 4, 8.5)
    other = drawn(LCM, TextToImage(prompt="a cat", seed=3, guidance_scale=2.0))
    assert (first.picture - other.picture).abs().max() > 1e-3
    told = replace(SD1_SHAPE, consistency=ConsistencyConfig())
    plain = resolve(request, LatentDiffusion(told, {}), {})
    assert (plain.sampler, plain.guidance_scale) == ("lcm", 1.0)
    assert resolve(request, LCM.network, {"steps": 8, "sampler": "euler"}).steps == 8
    save_model(tmp_path / "lcm.safetensors", LCM.network, {}, torch.float32)
    again, _ = load_model(tmp_path / "lcm.safetensors")
    assert again.architecture == LCM.network.architecture
    assert torch.equal(drawn(Model(again), request).picture, first.picture)


def test_waves_of_a_guidance_scale() -> None:
    """Of scale 1 + w: sin and cos of 1000 w at rates from 1 to 1e-4, both ends included."""
    rates = np.geomspace(1, 1e-4, 4)
    for scale in (1.0, 8.5):
        angles = 1000 * (scale - 1) * rates
        wanted = torch.tensor([*np.sin(angles), *np.cos(angles), 0.0])
        got = guidance_waves(torch.tensor([scale]), 9)[0]
        torch.testing.assert_close(got, wanted.float(), rtol=0, atol=2e-3)
