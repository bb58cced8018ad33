"""Tiny autoencoders: diffusers' numbers, sizes that are published, strips, gradients, refusals."""

from typing import Any

import pytest
import torch
from peer import distance, randomise
from torch import Tensor

from latentkit.errors import InputError
from latentkit.model.presets import TINY
from latentkit.nets import tiny
from latentkit.nets.tiny import TinyAutoencoder, TinyConfig

RELEASED = TINY["taesd"]
SHAPES = {
    "4 channels": RELEASED,
    "16 channels": TINY["taesd3"],
    "other": TinyConfig((2, 1), latent_channels=3, channels=8, picture_channels=2),
}


def made(config: TinyConfig, dtype: torch.dtype) -> TinyAutoencoder:
    network = TinyAutoencoder(config).to(dtype).eval().requires_grad_(False)
    randomise(network, 1)
    for parameter in network.parameters():
        parameter.mul_(0.7)
    return network


def peer(network: TinyAutoencoder) -> Any:
    """diffusers' network with the same weights, which have one order in both."""
    diffusers: Any = pytest.importorskip("diffusers")
    config = network.config
    theirs = diffusers.AutoencoderTiny(
        in_channels=config.picture_channels,
        out_channels=config.picture_channels,
        encoder_block_out_channels=(config.channels,) * len(config.blocks),
        decoder_block_out_channels=(config.channels,) * len(config.blocks),
        num_encoder_blocks=config.blocks,
        num_decoder_blocks=config.blocks[::-1],
        latent_channels=config.latent_channels,
    ).eval()
    ours, names = list(network.state_dict().values()), list(theirs.state_dict())
    assert len(ours) == len(names)
    theirs = theirs.to(ours[0].dtype)
    theirs.load_state_dict(dict(zip(names, ours)))
    return theirs


def pixels_for(config: TinyConfig, dtype: torch.dtype) -> Tensor:
    return torch.rand(1, config.picture_channels, 32, 24, dtype=dtype) * 2 - 1


@pytest.mark.parity
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-10)])
@pytest.mark.parametrize("shape", SHAPES)
@torch.no_grad()
def test_a_tiny_autoencoder_equals_its_peer(shape: str, dtype: torch.dtype, tolerance: float) -> None:
    ours = made(SHAPES[shape], dtype)
    theirs, pixels = peer(ours), pixels_for(SHAPES[shape], dtype)
    latents = theirs.encode(pixels).latents
    assert latents.std() > 0.1
    assert distance(ours.encode(pixels).mean, latents) < tolerance
    z = 3 * torch.randn_like(latents)
    decoded = theirs.decode(z).sample
    assert decoded.std() > 0.1
    assert distance(ours.decode(z), decoded) < tolerance


def test_released_sizes() -> None:
    with torch.device("meta"):
        network = TinyAutoencoder(RELEASED)
    halves = [sum(p.numel() for p in half.parameters()) for half in (network.encoder, network.decoder)]
    assert halves == [1_222_532, 1_222_531]
    assert RELEASED.downsampling == 8


@pytest.mark.parametrize("elements", [1, 1200])
@pytest.mark.parametrize("config", [TinyConfig((1, 2, 1), channels=8), SHAPES["other"]], ids=["three levels", "two"])
@torch.no_grad()
def test_strips_have_the_values_of_the_whole(
    config: TinyConfig, elements: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    network = made(config, torch.float64)
    pixels = torch.rand(1, config.picture_channels, 32 * config.downsampling, 2 * config.downsampling).double() * 2 - 1
    z = torch.randn(1, config.latent_channels, 32, 2).double()
    whole, drawn = network.encode(pixels).mean, network.decode(z)
    monkeypatch.setattr(tiny, "ELEMENTS", elements)
    rows: list[int] = []
    for part in (network.encoder, network.decoder):
        part.register_forward_pre_hook(lambda _, given: rows.append(given[0].shape[2]))
    torch.testing.assert_close(network.encode(pixels).mean, whole, rtol=0, atol=1e-12)
    torch.testing.assert_close(network.decode(z), drawn, rtol=0, atol=1e-12)
    assert len(rows) >= 4
    assert max(rows) < 32 * config.downsampling


def test_a_halo_is_as_wide_as_what_has_a_say() -> None:
    """Of one level: five convolutions."""
    config = TinyConfig((1,), latent_channels=1, channels=1, picture_channels=1)
    network = made(config, torch.float64)
    for parameter in network.parameters():
        parameter.abs_()
    assert config.halo == 5
    z = torch.zeros(1, 1, 21, 21, dtype=torch.float64, requires_grad=True)
    (slope,) = torch.autograd.grad(network.decode(z + 0.5)[0, 0, 10, 10], z)
    reached = slope[0, 0].abs().sum(1).nonzero().flatten()
    assert (int(reached[0]), int(reached[-1])) == (5, 15)


def test_gradients_pass_with_and_without_checkpointing() -> None:
    network = TinyAutoencoder(SHAPES["other"])
    x = pixels_for(SHAPES["other"], torch.float32)
    found = []
    for on in (False, True):
        network.set_checkpointing(on)
        loss = network.decode_rounded(network.encode(x).mean).square().mean()
        found.append(torch.autograd.grad(loss, list(network.parameters())))
    for one, other in zip(*found):
        torch.testing.assert_close(one, other)
    assert all(slope.abs().max() > 0 for slope in found[0])


@torch.no_grad()
def test_what_cannot_be_is_refused(unchecked: None) -> None:
    network = made(SHAPES["other"], torch.float32)
    for shape, message in (((1, 3, 8, 8), "3 channels, 8x8 px; it takes 2"), ((1, 2, 9, 8), "8x9 px; it takes")):
        with pytest.raises(InputError, match=message):
            network.encode(torch.zeros(shape))
    for fields in ({"blocks": ()}, {"blocks": (1, 0)}, {"blocks": (1,), "channels": 0}):
        with pytest.raises(InputError, match="must be at least 1"):
            TinyConfig(**fields)
