"""What stands beside the latent: a small picture to be made larger, and depth."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import tiny_model
from torch import Tensor

from latentkit.applications.attachment import Attachment, Guide
from latentkit.applications.generate import Result, generate, replay
from latentkit.applications.metadata import read
from latentkit.applications.plan import from_noise
from latentkit.applications.request import Inpainting, Request, TextToImage, known
from latentkit.applications.rules import fills, resolve
from latentkit.applications.tasks import upscale
from latentkit.checkpoints.files import Model
from latentkit.data.pictures import to_png, to_tensor
from latentkit.diffusion.noise import PictureNoise, keyed_normal
from latentkit.diffusion.schedule import NoiseSchedule
from latentkit.errors import InputError
from latentkit.model.conditioners.clip import ClipConfig
from latentkit.model.conditioners.numbers import UPSCALER_NUMBERS
from latentkit.model.latent_diffusion import LatentDiffusion, fit_network
from latentkit.model.presets import PRESETS
from latentkit.nets.clip import ClipTextConfig


def made(**fields: Any) -> LatentDiffusion:
    """The tiny model with another shape, every weight random."""
    plain = tiny_model()
    network = replace(plain.architecture.network, classes=fields.pop("classes", None), vector_width=None)
    schedule = NoiseSchedule(kind="scaled_linear", beta_start=0.0001, beta_end=0.02)
    whole = replace(plain.architecture, network=network, schedule=schedule, prediction="v", **fields)
    model = LatentDiffusion(fit_network(whole), {} if whole.clip else plain.state())
    for index, (name, one) in enumerate(model.named_parameters()):
        drawn = keyed_normal(one.shape, 1, index, name)
        one.data = drawn * one[0].numel() ** -0.5 if one.ndim > 1 else 0.1 * drawn + float(name.endswith("weight"))
    return model.eval().requires_grad_(False)


PLAIN = tiny_model()
CLIP = ClipConfig((ClipTextConfig(width=32, layers=1, heads=2),))
UPSCALER = made(classes=1000, text=None, clip=CLIP, numbers=UPSCALER_NUMBERS, concat_channels=3)
LARGER = Model(UPSCALER, {"defaults": {"steps": 2}}, "larger")
DEPTH = Model(made(concat_channels=1), {"defaults": {"steps": 2}}, "depth")
ODD = made(concat_channels=2)


def attached(folder: Path, picture: Tensor) -> Attachment:
    path = folder / "picture.png"
    path.write_bytes(to_png(picture))
    return Attachment.read(path)


@pytest.fixture
def small(tmp_path: Path) -> Attachment:
    return attached(tmp_path, keyed_normal((3, 8, 11), 3, "small").clamp(-1, 1))


def ramp(scale: float = 1.0) -> Tensor:
    return torch.linspace(-scale, scale, 32).expand(1, 32, 32)


def results(model: Model, *asked: Request) -> list[Result]:
    found = [event for event in generate(model, list(asked)) if isinstance(event, Result)]
    return sorted(found, key=lambda result: result.number)


def seen(model: Model, request: Request, prepare: Any, monkeypatch: pytest.MonkeyPatch) -> tuple[Tensor, Tensor | None]:
    """The rows that the U-Net is given for the first step, and its vector."""
    network, calls = model.network, []
    full = resolve(request, network, {})
    shape = network.latent_shape(known(full.height), known(full.width))
    plan = prepare(network, [full], PictureNoise([known(full.seed)], shape))
    forward = network.denoiser.unet.forward

    def watched(x: Tensor, *told: Any, **how: Any) -> Tensor:
        calls.append((x, told[2]))
        return forward(x, *told, **how)

    monkeypatch.setattr(network.denoiser.unet, "forward", watched)
    plan.denoise(plan.x, float(plan.sigmas[0]))
    monkeypatch.undo()
    return calls[0]


def test_upscaling_is_told_the_noised_small_picture_and_its_level(
    small: Attachment, monkeypatch: pytest.MonkeyPatch
) -> None:
    request = Request(init=small, prompt="cat", seed=5, noise_level=300)
    rows, vector = seen(LARGER, request, upscale.prepare, monkeypatch)
    assert rows.shape == (2, 7, 8, 10)
    assert vector is not None
    assert vector.tolist() == [[300.0], [300.0]]
    clean = to_tensor(known(small.picture), 3)[:, :, :10]
    power = torch.linspace(0.0001**0.5, 0.02**0.5, 1000, dtype=torch.float64).square().neg().add(1).cumprod(0)[300]
    noised = power.sqrt() * clean + (1 - power).sqrt() * keyed_normal((3, 8, 10), 5, "small")
    torch.testing.assert_close(rows[:, 4:], noised.float().expand(2, -1, -1, -1), rtol=0, atol=1e-6)


def test_a_picture_becomes_as_many_times_larger_as_the_first_stage_makes_it(small: Attachment) -> None:
    full = resolve(Request(init=small, prompt="cat"), LARGER.network, {})
    assert (full.task, full.height, full.width, full.noise_level, full.strength) == ("upscaling", 32, 40, 20, None)
    one = results(LARGER, Request(init=small, prompt="cat", seed=1))[0]
    assert one.picture.shape == (3, 32, 40)
    other = results(LARGER, Request(init=small, prompt="cat", seed=1, noise_level=200))[0]
    assert (one.picture - other.picture).abs().max() > 1e-2
    asked = results(LARGER, Request(init=small, prompt="cat", seed=1, width=48, height=32))[0]
    assert asked.picture.shape == (3, 32, 48)


def test_depth_is_stretched_and_only_its_order_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    request = TextToImage(prompt="cat", seed=5, depth=attached(tmp_path, ramp()))
    rows, _ = seen(DEPTH, request, from_noise, monkeypatch)
    assert rows.shape == (2, 5, 8, 8)
    line = rows[0, 4, 3]
    assert (line.min(), line.max()) == (-1, 1)
    assert (line.diff() > 0).all()
    torch.testing.assert_close(line[1:-1].diff(), line[1:-1].diff().mean().expand(5), rtol=0.05, atol=0)
    pale = seen(DEPTH, request.model_copy(update={"depth": attached(tmp_path, ramp(0.5))}), from_noise, monkeypatch)
    torch.testing.assert_close(pale[0], rows, rtol=0, atol=0.02)
    flat = seen(DEPTH, request.model_copy(update={"depth": attached(tmp_path, 0 * ramp())}), from_noise, monkeypatch)
    assert (flat[0][:, 4] == -1).all()


def test_depth_goes_with_pictures_too(tmp_path: Path) -> None:
    init, depth = attached(tmp_path, keyed_normal((3, 32, 32), 3).clamp(-1, 1)), attached(tmp_path, ramp())
    turned = attached(tmp_path, -ramp())
    for fields in ({"strength": 0.5}, {"mask": attached(tmp_path, ramp())}):
        one, other = results(
            DEPTH, *(Request(prompt="cat", seed=1, init=init, depth=each, **fields) for each in (depth, turned))
        )
        assert (one.record.batch, other.record.batch) == (2, 2)
        assert (one.picture - other.picture).abs().max() > 1e-2
        alone = results(DEPTH, Request(prompt="cat", seed=1, init=init, depth=turned, **fields))[0]
        torch.testing.assert_close(other.picture, alone.picture, rtol=0, atol=5e-5)


def test_batches_equal_singles_and_records_draw_again(tmp_path: Path, small: Attachment) -> None:
    for model, fields in (
        (LARGER, {"init": small}),
        (DEPTH, {"depth": attached(tmp_path, ramp())}),
    ):
        asked = [Request(prompt=words, seed=4, **fields) for words in ("cat", "red heart")]
        together = results(model, *asked)
        assert [one.record.batch for one in together] == [2, 2]
        for request, one in zip(asked, together):
            torch.testing.assert_close(one.picture, results(model, request)[0].picture, rtol=0, atol=5e-5)
        record = read(together[1].png(), "a.png")
        (name,) = fields
        with pytest.raises(InputError, match=f"needs the {name} picture whose pixels have"):
            next(replay(model, record))
        record = record.model_copy(update={"request": record.request.model_copy(update=fields)})
        (again,) = [event for event in replay(model, record) if isinstance(event, Result)]
        assert again.png() == together[1].png()


def test_what_released_models_take_beside_their_latent() -> None:
    expected = {
        "sd1.5-inpainting": "mask", "sd2-inpainting": "mask", "sdxl-inpainting": "mask", "inpainting_big": "mask",
        "sd2-depth": "depth", "x4-upscaler": "small picture", "bsr_sr": "small picture",
    }  # fmt: skip
    assert {name: fills(preset.architecture) for name, preset in PRESETS.items()} == {
        name: expected.get(name) for name in PRESETS
    }


def test_what_cannot_be_done(tmp_path: Path, small: Attachment) -> None:
    depth, wide = attached(tmp_path, ramp()), attached(tmp_path, torch.zeros(3, 32, 32))
    for network, request, message in (
        (LARGER.network, TextToImage(prompt="x"), "only makes a picture larger: give --init"),
        (LARGER.network, Request(prompt="x", init=small, strength=0.5), "upscaling takes no strength"),
        (LARGER.network, Request(task="image-to-image", init=small), "only makes a picture larger"),
        (
            LARGER.network,
            Request(init=small, noise_level=351),
            "level 351 is asked for; this model takes 0 to 350",
        ),
        (LARGER.network, Request(init=wide), "has 128x128 pixels, far more than the 32x32"),
        (PLAIN, Request(task="upscaling", init=small), "does not make pictures larger"),
        (PLAIN, TextToImage(prompt="x", noise_level=3), "takes no noise level; upscaling and"),
        (PLAIN, TextToImage(prompt="x", depth=depth), "takes no depth picture"),
        (DEPTH.network, TextToImage(prompt="x"), "draws by a depth picture: give --depth"),
        (DEPTH.network, Inpainting(wide, wide), "draws by a depth picture"),
        (ODD, TextToImage(prompt="x"), "takes something beside its latent"),
        (PLAIN, TextToImage(prompt="x", guidance_model=Guide("1" * 64, DEPTH)), "takes other pictures than this"),
    ):
        with pytest.raises(InputError, match=message) as caught:
            resolve(request, network, {})
        assert caught.value.exit_code == 2
