"""Inpainting: masks that ask for all and for nothing, what is kept, and what stands beside the latent."""

from collections.abc import Callable
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
from latentkit.applications.request import ImageToImage, Inpainting, Request, TextToImage, known
from latentkit.applications.rules import resolve
from latentkit.applications.tasks import inpaint
from latentkit.checkpoints.files import Model
from latentkit.data.pictures import to_png, to_tensor
from latentkit.diffusion.noise import PictureNoise, keyed_normal
from latentkit.errors import InputError
from latentkit.model.latent_diffusion import LatentDiffusion, fit_network

NETWORK = tiny_model()
MODEL = Model(NETWORK, {"defaults": {"steps": 3}}, "tiny", "0" * 64)
Make = Callable[[Tensor], Attachment]


def inpainting_model(text: bool = True) -> LatentDiffusion:
    """The tiny model with a mask and a masked picture beside its latent."""
    plain = tiny_model(text=text)
    network = LatentDiffusion(fit_network(replace(plain.architecture, concat_channels=5)), plain.state())
    weights = plain.state_dict()
    wider = network.denoiser.unet.conv_in.weight
    weights["denoiser.unet.conv_in.weight"] = keyed_normal(wider.shape, 1, "wider") * wider[0].numel() ** -0.5
    network.load_state_dict(weights)
    return network.eval().requires_grad_(False)


NINE = inpainting_model()
SEES = Model(NINE, {"defaults": {"steps": 3}}, "nine", "1" * 64)


@pytest.fixture
def make(tmp_path: Path) -> Make:
    def written(picture: Tensor) -> Attachment:
        path = tmp_path / "picture.png"
        path.write_bytes(to_png(picture))
        return Attachment.read(path)

    return written


@pytest.fixture
def init(make: Make) -> Attachment:
    return make(keyed_normal((3, 32, 32), 3, "picture").mul(0.5).clamp(-1, 1))


def pixels_of(attached: Attachment) -> Tensor:
    return to_tensor(known(attached.picture), 3)


def halves() -> Tensor:
    """White on the right, cells and all."""
    mask = torch.full((1, 32, 32), -1.0)
    mask[:, :, 16:] = 1
    return mask


def results(model: Model, *asked: Request, **how: Any) -> list[Result]:
    found = [event for event in generate(model, list(asked), **how) if isinstance(event, Result)]
    return sorted(found, key=lambda result: result.number)


def drawn(model: Model, asked: Request) -> Tensor:
    return results(model, asked)[0].picture


@pytest.mark.parametrize("sampler", ["dpm++2m", "euler_ancestral", "heun"])
def test_masks_that_ask_for_nothing_and_for_all(make: Make, init: Attachment, sampler: str) -> None:
    same = {"prompt": "cat", "seed": 3, "sampler": sampler}
    nothing, everything = make(-torch.ones(1, 32, 32)), make(torch.ones(1, 32, 32))
    pixels = pixels_of(init)
    for model in (MODEL, SEES):
        assert (drawn(model, Inpainting(init, nothing, **same)) - pixels).abs().max() < 1e-6
    through = NETWORK.first_stage.decode(NETWORK.first_stage.encode(pixels[None]))[0].clamp(-1, 1)
    unpasted = drawn(MODEL, Inpainting(init, nothing, paste=False, **same))
    torch.testing.assert_close(unpasted, through, rtol=0, atol=1e-4)
    for strength in (0.4, 1.0):
        again = drawn(MODEL, ImageToImage(init, strength=strength, **same))
        assert torch.equal(drawn(MODEL, Inpainting(init, everything, strength=strength, **same)), again)
    whole = drawn(MODEL, TextToImage(**same))
    torch.testing.assert_close(drawn(MODEL, Inpainting(init, everything, **same)), whole, rtol=0, atol=1e-4)


@pytest.mark.parametrize("model", [MODEL, SEES], ids=["any model", "inpainting model"])
def test_what_is_black_is_kept_to_the_bit_and_what_is_white_is_drawn(
    make: Make, init: Attachment, model: Model
) -> None:
    mask = make(halves())
    pixels = pixels_of(init)
    pasted = drawn(model, Inpainting(init, mask, prompt="cat", seed=3))
    assert (pasted[:, :, :16] - pixels[:, :, :16]).abs().max() < 1e-6
    assert (pasted[:, :, 16:] - pixels[:, :, 16:]).abs().mean() > 0.05
    whole = drawn(model, Inpainting(init, mask, prompt="cat", seed=3, paste=False))
    assert torch.equal(whole[:, :, 16:], pasted[:, :, 16:])
    assert (whole[:, :, :16] - pixels[:, :, :16]).abs().max() > 1e-3


def test_gray_lies_between(make: Make, init: Attachment) -> None:
    shade = halves()
    shade[:, :, 12:16] = -0.6
    soft = drawn(MODEL, Inpainting(init, make(shade), prompt="cat", seed=3))
    hard, whole = (drawn(MODEL, Inpainting(init, make(halves()), prompt="cat", seed=3, paste=p)) for p in (True, False))
    torch.testing.assert_close(soft[:, :, 12:16], torch.lerp(hard, whole, 0.2)[:, :, 12:16], rtol=0, atol=2e-3)


def test_a_thin_stroke_opens_its_whole_cell(make: Make, init: Attachment) -> None:
    """Nearest sampling would lose it."""
    mask = -torch.ones(1, 32, 32)
    mask[:, 10, 3:30] = 1
    picture = drawn(MODEL, Inpainting(init, make(mask), prompt="cat", seed=3))
    kept = drawn(MODEL, Inpainting(init, make(-torch.ones(1, 32, 32)), prompt="cat", seed=3, paste=False))
    assert (picture - kept)[:, 10, 3:30].abs().mean() > 0.05


def test_extending_adds_pixels_and_keeps_the_picture(init: Attachment) -> None:
    pixels = pixels_of(init)
    for model in (MODEL, SEES):
        wider = drawn(model, Inpainting(init, extend=(8, 0, 16, 8), prompt="cat", seed=3))
        assert wider.shape == (3, 40, 56)
        assert (wider[:, :32, 8:40] - pixels).abs().max() < 1e-6
        assert wider[:, :, 40:].std() > 0.05
    request = resolve(Inpainting(init, extend=(8, 0, 16, 8)), NETWORK, {})
    picture, mask = inpaint.canvas(request, NETWORK)
    assert torch.equal(picture[:, :32, :8], picture[:, :32, 8:9].expand(3, 32, 8))
    assert mask.sum() == 40 * 56 - 32 * 32


def test_edges_that_make_no_cell_are_cut_and_an_asked_size_is_covered(make: Make) -> None:
    init, mask = make(torch.zeros(3, 35, 38)), make(-torch.ones(1, 35, 38))
    full = resolve(Inpainting(init, mask), NETWORK, {})
    assert (full.height, full.width, full.strength, full.paste) == (32, 32, 1.0, True)
    picture, whole = inpaint.canvas(full, NETWORK)
    assert picture.shape == (3, 32, 32)
    assert not whole.any()
    picture, whole = inpaint.canvas(resolve(Inpainting(init, mask, height=64, width=64), NETWORK, {}), NETWORK)
    assert (picture.shape, whole.shape) == ((3, 64, 64), (1, 64, 64))


def test_what_an_inpainting_model_sees(make: Make, init: Attachment) -> None:
    pixels = pixels_of(init)[None]
    holes = (halves() + 1)[None] / 2
    gray, black = pixels.clone(), pixels.clone()
    gray[..., 16:], black[..., 16:] = 0, -1
    cells = torch.zeros(1, 1, 8, 8)
    cells[..., 4:] = 1
    encode = NINE.first_stage.encode
    assert torch.equal(inpaint.seen(NINE, pixels, holes), torch.cat([cells, encode(gray)], 1))
    old = inpainting_model(text=False)
    assert torch.equal(inpaint.seen(old, pixels, holes), torch.cat([encode(black), cells * 2 - 1], 1))
    requests = [resolve(Inpainting(init, make(halves()), prompt="cat", seed=1), NINE, {})]
    rows: list[Tensor] = []
    forward = NINE.denoiser.unet.forward
    NINE.denoiser.unet.forward = lambda x, *a, **k: rows.append(x) or forward(x, *a, **k)  # type: ignore
    plan = inpaint.prepare(NINE, requests, PictureNoise([1], NINE.latent_shape(32, 32)))
    plan.denoise(plan.x, float(plan.sigmas[0]))
    del NINE.denoiser.unet.forward
    assert rows[0].shape == (2, 9, 8, 8)
    assert torch.equal(rows[0][:, 4:], inpaint.seen(NINE, pixels, holes).expand(2, -1, -1, -1))


@pytest.mark.parametrize("model", [MODEL, SEES], ids=["any model", "inpainting model"])
def test_a_batch_equals_its_singles_and_its_records_draw_again(make: Make, init: Attachment, model: Model) -> None:
    mask, other = make(halves()), make(-halves())
    asked = [Inpainting(init, one, prompt="cat", seed=5 + i) for i, one in enumerate((mask, other))]
    together = results(model, *asked)
    assert [one.record.batch for one in together] == [2, 2]
    for request, one, attached in zip(asked, together, (mask, other)):
        torch.testing.assert_close(one.picture, drawn(model, request), rtol=0, atol=5e-5)
        record = read(one.png(), "a.png")
        assert record == one.record
        with pytest.raises(InputError, match="needs the init picture"):
            next(replay(model, record))
        given = record.request.model_copy(update={"init": init})
        with pytest.raises(
            InputError, match=f"needs the mask picture whose pixels have the sha256 {attached.digest[:9]}"
        ):
            next(replay(model, record.model_copy(update={"request": given})))
    one = results(model, asked[0])[0]
    record = one.record.model_copy(update={"request": one.request.model_copy(update={"init": init, "mask": mask})})
    (again,) = [event for event in replay(model, record) if isinstance(event, Result)]
    assert again.png() == one.png()


def test_a_guide_sees_what_the_model_sees(make: Make, init: Attachment) -> None:
    mask, itself = make(halves()), Guide("1" * 64, SEES)
    guided = drawn(SEES, Inpainting(init, mask, prompt="cat", seed=3, guidance_model=itself, guidance_scale=4.0))
    alone = drawn(SEES, Inpainting(init, mask, prompt="cat", seed=3, guidance_scale=1.0))
    torch.testing.assert_close(guided, alone, rtol=0, atol=1e-5)


def test_what_cannot_be_done(make: Make, init: Attachment) -> None:
    mask, small = make(halves()), make(torch.ones(1, 16, 32))
    large = make(torch.zeros(3, 90, 90))
    slot = tiny_model()
    slot.architecture = replace(slot.architecture, concat_channels=3)
    for network, request, message in (
        (NETWORK, Inpainting(init), "needs a mask .* none of them"),
        (NETWORK, Inpainting(init, mask, (1, 0, 0, 0)), "both of them"),
        (NETWORK, Inpainting(init, extend=(0, 0, 0, 0)), "adds no pixel"),
        (NETWORK, Inpainting(init, small), "mask has 32x16 pixels and the init picture 32x32"),
        (NETWORK, Request(mask=mask), "inpainting needs an init"),
        (NETWORK, Request(task="image-to-image", init=init, mask=mask), "image-to-image takes no mask"),
        (NETWORK, TextToImage(prompt="x", paste=False), "takes no paste"),
        (NETWORK, Inpainting(large, make(torch.ones(1, 90, 90))), "has 90x90 pixels, far more than the 32x32"),
        (NINE, TextToImage(prompt="x"), "draws only what a mask leaves open"),
    ):
        with pytest.raises(InputError, match=message) as caught:
            resolve(request, network, {})
        assert caught.value.exit_code == 2
    with pytest.raises(InputError, match=r"extend\.3: must be at least 0"):
        Inpainting(init, extend=(0, 0, 0, -8))
    assert resolve(Inpainting(init, mask, seed=1), NETWORK, {}).task == "inpainting"
    assert resolve(Request(init=init, extend=(8, 0, 0, 0)), NETWORK, {}).task == "inpainting"
