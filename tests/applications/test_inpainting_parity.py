"""Inpainting with the second Stable Diffusion and XL, with and without channels for it, against diffusers."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import family
import pytest
import torch
from peer_pipelines import NEGATIVE, PROMPT, SCALE, SCHEDULERS, SEED, SIZE, agree, ours, scheduler, theirs
from PIL import Image

import latentkit
from latentkit.checkpoints.diffusers_folder import write_folder

pytestmark = pytest.mark.parity
STEPS = 5


@pytest.fixture(scope="module", params=["SD 2 of 9 channels", "XL of 4 channels", "XL of 9 channels"])
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, latentkit.Model]:
    """The peer's pipeline of a folder that we wrote, and our model of it."""
    import diffusers as untyped

    diffusers: Any = untyped
    name, folder = request.param.split(" of ")[0], tmp_path_factory.mktemp("inpainting") / "model"
    architecture = family.ARCHITECTURES[name]
    if "9" in request.param:
        network = replace(architecture.network, channels_in=9)
        architecture = replace(architecture, network=network, concat_channels=5, prediction="eps")
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(family.ARCHITECTURES, name, architecture)
        write_folder(folder, family.model(name))
    pipe = diffusers.DiffusionPipeline.from_pretrained(folder, local_files_only=True)
    if "4" in request.param:
        assert type(pipe) is diffusers.StableDiffusionXLPipeline
        pipe = diffusers.StableDiffusionXLInpaintPipeline(**pipe.components, add_watermarker=False)
    assert "Inpaint" in type(pipe).__name__
    pipe.set_progress_bar_config(disable=True)
    # The peer draws from the posterior; its mean makes both start from one latent, and leaves the seed to the noise.
    scale = pipe.vae.config.scaling_factor
    pipe._encode_vae_image = lambda image, generator: pipe.vae.encode(image).latent_dist.mode() * scale
    return pipe, latentkit.load(folder, "cpu")


@pytest.mark.parametrize("kind", SCHEDULERS)
def test_inpainting(kind: str, pair: tuple[Any, latentkit.Model], tmp_path: Path) -> None:
    pipe, model = pair
    cells = torch.randint(0, 256, (8, 8, 3), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    mask = torch.zeros(SIZE, SIZE, dtype=torch.uint8)
    mask[16:48, 24:] = 255
    files = {"image": cells.repeat_interleave(8, 0).repeat_interleave(8, 1), "mask_image": mask}
    asked: dict[str, Any] = {name: Image.fromarray(pixels.numpy()) for name, pixels in files.items()}
    for name, picture in asked.items():
        picture.save(tmp_path / f"{name}.png")
    same = scheduler(pipe, kind)
    asked |= {"prompt": PROMPT, "negative_prompt": NEGATIVE, "height": SIZE, "width": SIZE, "strength": 0.8}
    there = theirs(pipe, **asked, num_inference_steps=STEPS, guidance_scale=SCALE)
    request = latentkit.Inpainting(
        tmp_path / "image.png", tmp_path / "mask_image.png", prompt=PROMPT, negative=NEGATIVE, seed=SEED, steps=STEPS,
        guidance_scale=SCALE, strength=0.8, paste=False, **same,
    )  # fmt: skip
    agree(ours(model, request), there)
