"""The 2021 super-resolution model in whole drawings against diffusers' pipeline of it, from its own saved folder."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peer_pipelines import NOISE, SCHEDULERS
from PIL import Image

from latentkit.applications.attachment import Attachment
from latentkit.applications.generate import Result, generate
from latentkit.applications.request import Request
from latentkit.checkpoints.files import load

pytestmark = pytest.mark.parity
STEPS, SEED = 6, 7


def pipeline(kind: str) -> Any:
    """Random, of the released one's build: a codebook's latents, and the small picture beside them."""
    diffusers: Any = pytest.importorskip("diffusers")
    torch.manual_seed(3)
    unet = diffusers.UNet2DModel(
        sample_size=32,
        in_channels=6,
        out_channels=3,
        layers_per_block=1,
        block_out_channels=(32, 64),
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=32,
    )
    vqvae = diffusers.VQModel(
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(32, 32, 64),
        latent_channels=3,
        num_vq_embeddings=400,
        sample_size=64,
        scaling_factor=1.0,
    )
    torch.nn.init.normal_(vqvae.quantize.embedding.weight)
    name, fields, _ = SCHEDULERS[kind]
    scheduler = getattr(diffusers, name)(**NOISE | fields | {"beta_start": 0.0015, "beta_end": 0.0155})
    pipe = diffusers.LDMSuperResolutionPipeline(vqvae=vqvae, unet=unet, scheduler=scheduler)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.mark.parametrize("kind", SCHEDULERS)
def test_small_pictures_become_the_large_ones_that_diffusers_draws(kind: str, tmp_path: Path) -> None:
    pipe = pipeline(kind)
    pipe.save_pretrained(tmp_path / "saved")
    small = Image.fromarray((np.random.default_rng(1).random((32, 64, 3)) * 255).astype(np.uint8))
    small.save(tmp_path / "small.png")
    generator = torch.Generator("cpu").manual_seed(SEED)
    theirs = pipe(small, num_inference_steps=STEPS, eta=0.0, generator=generator, output_type="np").images[0]
    asked = Request(init=Attachment.read(tmp_path / "small.png"), seed=SEED, steps=STEPS, **SCHEDULERS[kind][2])
    drawn = next(event for event in generate(load(tmp_path / "saved"), asked) if isinstance(event, Result))
    assert drawn.request.task == "upscaling"
    assert drawn.request.noise_level is None
    assert drawn.picture.shape == (3, 128, 256)
    ours = (drawn.picture.permute(1, 2, 0).numpy() + 1) / 2
    assert theirs.std() > 0.05
    # A latent that lies on the border of two codes may be decoded as either: those few cells are the only ones apart.
    assert np.abs(ours - theirs).max() < 1e-4
