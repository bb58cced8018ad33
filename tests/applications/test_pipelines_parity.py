"""Whole drawings with the pipelines that diffusers saves, against diffusers: the same seed, latents and pictures."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peer_pipelines import (
    NEGATIVE,
    PROMPT,
    SCALE,
    SCHEDULERS,
    SEED,
    SIZE,
    STEPS,
    agree,
    ours,
    pipeline,
    scheduler,
    theirs,
)
from PIL import Image

import latentkit

pytestmark = pytest.mark.parity


@pytest.fixture(scope="module", params=["SD 1", "XL"])
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, latentkit.Model]:
    folder = tmp_path_factory.mktemp("pipeline")
    theirs = pipeline(request.param, folder)
    theirs.save_pretrained(folder / "saved")
    return theirs, latentkit.load(folder / "saved", "cpu")


@pytest.mark.parametrize(
    ("kind", "negative", "size"), [("DDIM", "", 64), ("DDIM", NEGATIVE, 48), ("DPM++(2M)", NEGATIVE, 64)]
)
def test_text_to_image(kind: str, negative: str, size: int, pair: tuple[Any, latentkit.Model]) -> None:
    """At 48 pixels XL is told of other sizes than it was trained at; "" is XL's zeros and SD 1's empty prompt."""
    pipe, model = pair
    fields = {"seed": SEED, "steps": STEPS, "guidance_scale": SCALE, "width": size, **scheduler(pipe, kind)}
    mine = ours(model, latentkit.TextToImage(prompt=PROMPT, negative=negative, **fields))
    asked: dict[str, Any] = {"num_inference_steps": STEPS, "guidance_scale": SCALE, "height": SIZE, "width": size}
    if negative:
        asked["negative_prompt"] = negative
    agree(mine, theirs(pipe, prompt=PROMPT, **asked))
    other = ours(model, latentkit.TextToImage(prompt="a green car", negative=negative, **fields))
    assert (mine[0] - other[0]).abs().max() / mine[0].std() > 1e-2  # words have a say


@pytest.mark.parametrize("kind", ["AutoencoderKL", "AutoencoderTiny"])
def test_another_autoencoder(kind: str, pair: tuple[Any, latentkit.Model], tmp_path: Path) -> None:
    """In the place of the pipeline's own; of the same scale, but for a tiny one, which has its own."""
    import diffusers

    pipe, model = pair
    own, scale = pipe.vae, pipe.vae.config.scaling_factor
    shape: dict[str, Any] = {"block_out_channels": (32, 64), "latent_channels": 4}
    blocks: dict[str, Any] = {
        "down_block_types": ("DownEncoderBlock2D",) * 2,
        "up_block_types": ("UpDecoderBlock2D",) * 2,
    }
    if kind == "AutoencoderTiny":
        shape = {"encoder_block_out_channels": (32, 32), "decoder_block_out_channels": (32, 32)}
        blocks, scale = {"num_encoder_blocks": (1, 2), "num_decoder_blocks": (2, 1)}, 0.7
    made: Any = getattr(diffusers, kind)
    other = made(**shape, **blocks, scaling_factor=scale)
    other.save_pretrained(tmp_path / "vae")
    fields = {"prompt": PROMPT, "seed": SEED, "steps": STEPS, "guidance_scale": SCALE, **scheduler(pipe, "DDIM")}
    file = latentkit.WeightsFile.read(tmp_path / "vae")
    mine = ours(model, latentkit.TextToImage(**fields, autoencoder=file))
    asked: dict[str, Any] = {"num_inference_steps": STEPS, "guidance_scale": SCALE, "height": SIZE, "width": SIZE}
    try:
        pipe.vae = other
        agree(mine, theirs(pipe, prompt=PROMPT, **asked))
    finally:
        pipe.vae = own


@pytest.mark.parametrize("kind", SCHEDULERS)
def test_image_to_image(kind: str, pair: tuple[Any, latentkit.Model], tmp_path: Path) -> None:
    """The peer draws the latent from the encoder's distribution, ours is its mean: it is given the mean."""
    import diffusers

    pipe, model = pair
    name = type(pipe).__name__.replace("Pipeline", "Img2ImgPipeline")
    image_to_image: Any = getattr(diffusers, name)
    fields = scheduler(pipe, kind)
    parts = {**pipe.components, "requires_safety_checker": False}
    pipe = image_to_image(**(parts if "XL" not in name else {**pipe.components, "add_watermarker": False}))
    pipe.set_progress_bar_config(disable=True)
    pixels = np.random.default_rng(0).integers(0, 256, (8, 8, 3), np.uint8).repeat(8, 0).repeat(8, 1)
    picture = Image.fromarray(pixels)
    picture.save(tmp_path / "init.png")
    with torch.no_grad():
        z = pipe.vae.encode(pipe.image_processor.preprocess(picture)).latent_dist.mode()
    start = z * pipe.vae.config.scaling_factor
    mine = ours(
        model,
        latentkit.ImageToImage(
            tmp_path / "init.png", prompt=PROMPT, negative=NEGATIVE, seed=SEED, steps=STEPS, strength=0.6,
            guidance_scale=SCALE, **fields,
        ),
    )  # fmt: skip
    asked = {"num_inference_steps": STEPS, "guidance_scale": SCALE, "negative_prompt": NEGATIVE, "strength": 0.6}
    agree(mine, theirs(pipe, prompt=PROMPT, image=start, **asked))
