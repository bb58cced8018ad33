"""Drawing: a batch equals its singles, a record draws its picture again, and a caller may stop at any step."""

import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import tifffile
import torch
from PIL import Image
from tiny import tiny_model

from latentkit.applications import generate as generating
from latentkit.applications.generate import Progress, Result, draw, generate, replay
from latentkit.applications.plan import from_noise
from latentkit.applications.request import Attachment, ImageToImage, Request, TextToImage, Unconditional
from latentkit.applications.rules import resolve
from latentkit.applications.tasks import image_to_image
from latentkit.checkpoints.files import Model
from latentkit.data.pictures import to_png
from latentkit.diffusion.noise import PictureNoise
from latentkit.errors import InputError

NETWORK = tiny_model()
MODEL = Model(NETWORK, {"defaults": {"steps": 3}}, "tiny", "0" * 64)
PROMPTS = ("red heart", "green apple", "cat")
REQUESTS = [TextToImage(prompt=prompt, seed=7) for prompt in PROMPTS]


def results(events: Iterator[Progress | Result]) -> list[Result]:
    found = [event for event in events if isinstance(event, Result)]
    return sorted(found, key=lambda result: result.number)


@pytest.fixture
def picture(tmp_path: Path) -> Path:
    path = tmp_path / "picture.png"
    ramp = torch.linspace(-1, 1, 64).expand(3, 40, 64)
    path.write_bytes(to_png(ramp))
    return path


@pytest.mark.parametrize("sampler", ["dpm++2m", "euler_ancestral"])
def test_a_batch_equals_its_singles(sampler: str) -> None:
    requests = [request.model_copy(update={"sampler": sampler}) for request in REQUESTS]
    together, exactly = results(generate(MODEL, requests)), results(generate(MODEL, requests, exact=True))
    for request, one, exact in zip(requests, together, exactly):
        single = results(generate(MODEL, request))[0]
        torch.testing.assert_close(one.picture, single.picture, rtol=0, atol=2e-5)
        assert torch.equal(exact.picture, single.picture)
        assert exact.record == single.record
    assert not torch.equal(together[0].picture, together[1].picture)
    assert [one.record.row for one in together] == [0, 1, 2]


def test_noise_of_a_batch_is_bit_equal_to_that_of_singles() -> None:
    full = [resolve(request.model_copy(update={"seed": 7 + i}), NETWORK, {}) for i, request in enumerate(REQUESTS)]
    shape = NETWORK.latent_shape(32, 32)
    together = from_noise(NETWORK, full, PictureNoise([7, 8, 9], shape)).x
    alone = [from_noise(NETWORK, [one], PictureNoise([7 + i], shape)).x for i, one in enumerate(full)]
    assert torch.equal(together, torch.cat(alone))


def test_seeds_count_up_and_pictures_that_differ_in_size_or_steps_are_drawn_apart() -> None:
    mixed = [REQUESTS[0], REQUESTS[1].model_copy(update={"steps": 2, "width": 40}), REQUESTS[2]]
    drawn = results(generate(MODEL, mixed, count=2))
    assert [one.number for one in drawn] == [0, 1, 2, 3, 4, 5]
    assert [one.request.seed for one in drawn] == [7, 8] * 3
    assert [one.record.batch for one in drawn] == [4, 4, 2, 2, 4, 4]
    assert drawn[2].picture.shape == (3, 32, 40)
    assert drawn[4].request.prompt == "cat"


def test_a_record_draws_its_picture_again_to_the_bit() -> None:
    for one in results(generate(MODEL, REQUESTS)):
        (again,) = results(replay(MODEL._replace(name="moved"), one.record))
        assert torch.equal(again.picture, one.picture)
        assert again.png() == one.png()


def test_what_differs_from_the_record_is_told() -> None:
    record = results(generate(MODEL, REQUESTS[0]))[0].record
    assert record.differences(MODEL) == []
    other = record.model_copy(update={"machine": record.machine.model_copy(update={"threads": 77, "torch": "1.0"})})
    told = "; ".join(other.differences(MODEL._replace(sha256="1" * 64)))
    assert "model tiny (1111111111) instead of tiny (0000000000)" in told
    assert "torch" in told
    assert "threads 1 instead of 77" in told


def test_closing_stops_between_two_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    forward = NETWORK.denoiser.forward
    monkeypatch.setattr(NETWORK.denoiser, "forward", lambda *a: calls.append(1) or forward(*a))
    events = generate(MODEL, REQUESTS[0].model_copy(update={"guidance_scale": 1.0}))
    first = next(events)
    assert isinstance(first, Progress)
    assert (first.step, first.steps, first.pictures, first.x0.shape) == (1, 3, (0,), (1, 4, 8, 8))
    assert first.x0.is_inference()
    assert not torch.is_inference_mode_enabled()
    events.close()  # type: ignore[attr-defined]
    assert len(calls) == 1


def test_progress_counts_the_whole_job() -> None:
    events = generate(MODEL, REQUESTS, exact=True)
    shares = [event.share for event in events if isinstance(event, Progress)]
    assert shares == pytest.approx([i / 9 for i in range(1, 10)])


def test_pictures_belong_to_the_caller() -> None:
    picture = results(generate(MODEL, REQUESTS[0]))[0].picture
    assert not picture.is_inference()
    assert -1 <= picture.min() <= picture.max() <= 1


def test_guidance_leads_away_from_the_negative_and_only_where_asked() -> None:
    def drawn(**fields: Any) -> torch.Tensor:
        return results(generate(MODEL, TextToImage(prompt="cat", seed=1, **fields)))[0].picture

    plain, free = drawn(guidance_scale=2.0), drawn(guidance_scale=1.0)
    assert not torch.equal(plain, drawn(guidance_scale=2.0, negative="dog"))
    assert not torch.equal(plain, free)
    assert torch.equal(free, drawn(guidance_scale=2.0, guidance_low=1e8, guidance_high=1e9))
    assert not torch.equal(drawn(guidance_scale=0.0), free)


def test_a_picture_that_is_not_finite_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    decode = NETWORK.first_stage.decode
    monkeypatch.setattr(NETWORK.first_stage, "decode", lambda z: decode(z) * float("nan"))
    with pytest.raises(InputError, match="seed 7 holds NaN"):
        list(generate(MODEL, REQUESTS[0]))


def test_nothing_is_drawn_before_all_is_checked() -> None:
    with pytest.raises(InputError, match="takes no label"):
        next(generate(MODEL, [REQUESTS[0], Request(label="x")]))
    with pytest.raises(InputError, match="at least 1"):
        next(generate(MODEL, REQUESTS[0], count=0))


def test_no_picture_gets_a_seed_that_its_record_may_not_hold() -> None:
    with pytest.raises(InputError, match=f"seeds {2**63 - 1} to {2**63} asked for"):
        next(generate(MODEL, TextToImage(prompt="cat", seed=2**63 - 1), count=2))


def test_batches_are_bounded_by_their_latent_cells(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(generating, "CELLS_AT_ONCE", 2 * 8 * 8)
    drawn = results(generate(MODEL, REQUESTS))
    assert [(one.record.row, one.record.batch) for one in drawn] == [(0, 2), (1, 2), (0, 1)]


def test_image_to_image_keeps_more_the_weaker_it_is(picture: Path) -> None:
    def redone(strength: float) -> torch.Tensor:
        request = ImageToImage(picture, prompt="cat", seed=3, strength=strength, steps=50)
        return results(generate(MODEL, request))[0].picture

    pixels = image_to_image.picture(resolve(ImageToImage(picture), NETWORK, {}), 3)
    assert pixels.shape == (3, 32, 32)
    through = NETWORK.first_stage.decode(NETWORK.first_stage.encode(pixels[None]))[0].clamp(-1, 1)
    distances = [float((redone(s) - through).abs().mean()) for s in (0.001, 0.3, 0.9)]
    assert distances[0] < 0.1
    assert distances == sorted(distances)
    whole = results(generate(MODEL, TextToImage(prompt="cat", seed=3, steps=50)))[0].picture
    torch.testing.assert_close(redone(1.0), whole, rtol=0, atol=1e-4)


def test_strength_chooses_the_share_of_steps(picture: Path) -> None:
    for strength, steps in ((0.001, 1), (0.5, 5), (0.75, 8), (1.0, 10)):
        request = resolve(ImageToImage(picture, strength=strength, steps=10), NETWORK, {})
        plan = image_to_image.prepare(NETWORK, [request], PictureNoise([1], NETWORK.latent_shape(32, 32)))
        assert len(plan.sigmas) == steps + 1


def test_draw_gives_pictures_in_order_for_any_model() -> None:
    pictures = list(draw(NETWORK, {"steps": 2}, [*PROMPTS, None], [0, 1, 2, 3]))
    assert torch.equal(pictures[2], list(draw(NETWORK, {"steps": 2}, [*PROMPTS[:2], "cat", "x"], [0, 1, 2, 9]))[2])
    assert len(pictures) == 4
    classes, pixels = tiny_model(text=False, label=True), tiny_model(text=False, latent=False)
    assert next(draw(classes, {"steps": 1}, ["food"], [0])).shape == (3, 32, 32)
    assert next(draw(pixels, {"steps": 1}, [None], [0])).shape == (3, 8, 8)


@pytest.mark.parametrize(
    ("channels", "alpha", "suffix", "mode"),
    [
        (1, False, "png", "L"),
        (2, True, "png", "LA"),
        (2, None, "png", "LA"),
        (2, False, "tiff", None),
        (3, False, "png", "RGB"),
        (3, None, "png", "RGB"),
        (4, True, "png", "RGBA"),
        (4, False, "tiff", None),
        (5, False, "tiff", None),
        (5, None, "tiff", None),
    ],
)
def test_channels_that_no_png_holds_go_to_tiff(
    channels: int, alpha: bool | None, suffix: str, mode: str | None
) -> None:
    provenance = {"defaults": {"steps": 1}} | ({} if alpha is None else {"alpha": alpha})
    result = results(generate(Model(tiny_model(channels=channels, text=False), provenance), Unconditional(seed=1)))[0]
    found, data = result.file()
    assert (found, data[:2]) == (suffix, b"II" if suffix == "tiff" else b"\x89P")
    if mode is None:
        assert tifffile.imread(io.BytesIO(data)).shape[-1] == channels
        with pytest.raises(InputError, match=f"cannot hold {channels} plain channels"):
            result.png()
    else:
        assert Image.open(io.BytesIO(data)).mode == mode


def test_attachments_of_one_batch_may_differ(tmp_path: Path, picture: Path) -> None:
    other = tmp_path / "other.png"
    other.write_bytes(to_png(-torch.linspace(-1, 1, 32).expand(3, 32, 32)))
    requests = [ImageToImage(Attachment.read(path), seed=1, strength=0.3) for path in (picture, other)]
    together = results(generate(MODEL, requests))
    assert [one.record.batch for one in together] == [2, 2]
    single = results(generate(MODEL, requests[1]))[0].picture
    torch.testing.assert_close(together[1].picture, single, rtol=0, atol=2e-5)
