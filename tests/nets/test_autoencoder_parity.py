"""The autoencoder with stem 1 against diffusers' AutoencoderKL, on small random shapes."""

from typing import Any

import pytest
import torch
from peer import AUTOENCODER, copy_weights, distance, randomise

from latentkit.nets.autoencoder import Autoencoder, AutoencoderConfig

pytestmark = pytest.mark.parity

SHAPES = {
    "three levels": AutoencoderConfig(channels=32, multipliers=(1, 2, 2), blocks=1),
    "wide latent, two blocks": AutoencoderConfig(
        picture_channels=4, latent_channels=16, channels=32, multipliers=(1, 3), blocks=2
    ),
    "no attention": AutoencoderConfig(channels=32, multipliers=(1, 2), blocks=1, attention=False),
}


def peer(config: AutoencoderConfig) -> Any:
    diffusers: Any = pytest.importorskip("diffusers")
    levels = len(config.multipliers)
    model = diffusers.AutoencoderKL(
        in_channels=config.picture_channels,
        out_channels=config.picture_channels,
        latent_channels=config.latent_channels,
        block_out_channels=tuple(config.channels * multiplier for multiplier in config.multipliers),
        layers_per_block=config.blocks,
        down_block_types=("DownEncoderBlock2D",) * levels,
        up_block_types=("UpDecoderBlock2D",) * levels,
        norm_num_groups=32,
        mid_block_add_attention=config.attention,
    )
    return model.eval()


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-10)])
@pytest.mark.parametrize("shape", SHAPES)
@torch.no_grad()
def test_autoencoder_equals_its_peer(shape: str, dtype: torch.dtype, tolerance: float) -> None:
    config = SHAPES[shape]
    ours, theirs = Autoencoder(config).to(dtype).eval(), peer(config).to(dtype)
    randomise(ours, 1)
    copy_weights(ours, theirs, AUTOENCODER)
    pixels = torch.randn(2, config.picture_channels, 24, 16, dtype=dtype)
    posterior, expected = ours.encode(pixels), theirs.encode(pixels).latent_dist
    assert expected.mean.std() > 0.1
    assert distance(posterior.mean.to(dtype), expected.mean) < max(tolerance, 1e-6)  # the posterior is float32
    assert distance(posterior.log_variance.to(dtype), expected.logvar) < max(tolerance, 1e-6)
    moments = ours.to_moments(ours.encoder(pixels))
    assert distance(moments, theirs.quant_conv(theirs.encoder(pixels))) < tolerance
    z = torch.randn(expected.mean.shape, dtype=dtype)
    decoded = theirs.decode(z).sample
    assert decoded.std() > 0.1
    assert distance(ours.decode(z), decoded) < tolerance
