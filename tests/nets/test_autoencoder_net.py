"""The autoencoder's own promises: stems and shapes, the posterior, refusals."""

from typing import Any

import pytest
import torch
from peer import randomise

from latentkit.errors import InputError
from latentkit.nets.autoencoder import Autoencoder, AutoencoderConfig
from latentkit.nets.bottleneck import Codebook, Posterior, posterior


@pytest.mark.parametrize("channels", [1, 3, 4])
@pytest.mark.parametrize("stem", [1, 2, 4])
@torch.no_grad()
def test_a_stem_folds_pixels_and_gives_them_back(stem: int, channels: int) -> None:
    config = AutoencoderConfig(
        picture_channels=channels, latent_channels=6, channels=16, multipliers=(1, 2), blocks=1, stem=stem
    )
    assert config.downsampling == 2 * stem
    network = Autoencoder(config)
    pixels = torch.randn(2, channels, 8 * stem, 4 * stem)
    z = network.encode(pixels).mean
    assert z.shape == (2, 6, 4, 2)
    assert network.decode(z).shape == pixels.shape
    assert network.encoder.conv_in.weight.shape[1] == network.decoder.conv_out.weight.shape[0] == channels * stem**2


@torch.no_grad()
def test_the_stem_is_orderly() -> None:
    """Each of a cell's pixels has its own channel, in and out in the same order."""
    network = Autoencoder(AutoencoderConfig(picture_channels=1, channels=4, multipliers=(1,), blocks=1, stem=2))
    pixels = torch.arange(16.0).reshape(1, 1, 4, 4)
    folded = torch.nn.functional.pixel_unshuffle(pixels, 2)
    assert folded[0, :, 0, 0].tolist() == [0, 1, 4, 5]
    seen: list[torch.Tensor] = []
    network.encoder.conv_in.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    network.decoder.conv_out.register_forward_hook(lambda module, inputs, output: folded)
    assert torch.equal(network.decode(network.encode(pixels).mean), pixels)
    assert torch.equal(seen[0], folded)


@torch.no_grad()
def test_it_computes_in_bfloat16_with_a_posterior_in_float32() -> None:
    network = Autoencoder(AutoencoderConfig(channels=16, multipliers=(1, 2), blocks=1)).bfloat16()
    randomise(network, 1)
    answer = network.encode(torch.randn(1, 3, 8, 8).bfloat16())
    assert answer.mean.dtype == answer.log_variance.dtype == torch.float32


def test_the_posterior_is_split_and_clamped() -> None:
    moments = torch.tensor([1.0, -2.0, 99.0, -99.0]).reshape(1, 4, 1, 1)
    mean, log_variance = posterior(moments)
    assert mean.flatten().tolist() == [1, -2]
    assert log_variance.flatten().tolist() == [20, -30]


def test_posterior_samples_and_their_divergence() -> None:
    mean, log_variance = (
        torch.randn(1, 4, 8, 8, dtype=torch.float64),
        0.5 * torch.randn(1, 4, 8, 8, dtype=torch.float64),
    )
    drawn = Posterior(mean, log_variance)
    noise = torch.randn_like(mean)
    torch.testing.assert_close(drawn.sample(noise), mean + log_variance.exp().sqrt() * noise)
    ours = torch.distributions.Normal(mean, log_variance.exp().sqrt())
    standard = torch.distributions.Normal(torch.zeros_like(mean), torch.ones_like(mean))
    torch.testing.assert_close(drawn.kl(), torch.distributions.kl_divergence(ours, standard).mean())
    assert Posterior(torch.zeros(1, 1, 2, 2), torch.zeros(1, 1, 2, 2)).kl() == 0


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"stem": 3}, "stem is 3; allowed are 1, 2, 4, 8, 16 and 32"),
        ({"multipliers": ()}, r"multipliers are \(\); give one of at least 1 per level"),
        ({"multipliers": (1, 0)}, r"multipliers are \(1, 0\)"),
        ({"attention_levels": 5}, "attention_levels is 5; it has 4 levels"),
        ({"attention_levels": -1}, "attention_levels is -1"),
        ({"codes": 0}, "codes is 0; give at least 1"),
        ({"latent_channels": 0}, "latent_channels is 0; it must be at least 1"),
    ],
)
def test_a_wrong_shape_is_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        AutoencoderConfig(**fields)


@pytest.mark.parametrize("shape", [(1, 4, 8, 8), (1, 3, 8, 10), (1, 3, 9, 8)])
def test_pictures_that_do_not_fit_are_refused(shape: tuple[int, ...]) -> None:
    network = Autoencoder(AutoencoderConfig(channels=16, multipliers=(1, 2), blocks=1, stem=2))
    with pytest.raises(InputError, match=rf"got pictures of {shape[1]} channels, {shape[3]}x{shape[2]} px; it takes 3"):
        network.encode(torch.zeros(shape))


@torch.no_grad()
def test_a_codebook_takes_the_nearest_code_of_each_cell() -> None:
    book = Codebook(50, 3)
    book.ROWS = 7  # several portions
    randomise(book, 1)
    z = torch.randn(2, 3, 5, 4)
    expected = torch.cdist(z.movedim(1, -1).reshape(-1, 3), book.vectors).argmin(1).view(2, 5, 4)
    assert torch.equal(book.nearest(z), expected)
    assert torch.equal(book(z)[1, :, 4, 2], book.vectors[expected[1, 4, 2]])
    assert torch.equal(book.bfloat16().nearest(book(z)), book.nearest(z))


@torch.no_grad()
def test_latents_before_a_codebook_are_certain_and_are_rounded_on_the_way_back() -> None:
    network = Autoencoder(AutoencoderConfig(channels=16, multipliers=(1, 2), blocks=1, codes=20, latent_channels=3))
    randomise(network, 1)
    found = network.encode(torch.randn(1, 3, 8, 8))
    assert found.mean.shape == (1, 3, 4, 4)
    torch.testing.assert_close(found.sample(torch.randn(found.mean.shape)), found.mean, atol=1e-5, rtol=0)
    assert network.codebook is not None
    assert torch.equal(network.decode(found.mean), network.decode(network.codebook(found.mean)))
