"""What lies between encoder and decoder: straight-through gradients, codes, levels, nothing at all."""

import math

import pytest
import torch
from peer import randomise

from latentkit.errors import InputError
from latentkit.nets.autoencoder import Autoencoder, AutoencoderConfig
from latentkit.nets.bottleneck import Codebook, Levels, straight_through

SMALL = {"channels": 16, "multipliers": (1, 2), "blocks": 1, "attention": False}


def test_straight_through_is_exact_and_hands_the_gradient_on() -> None:
    z = torch.tensor([1e8, -0.3, 1e-9], requires_grad=True)
    rounded = torch.tensor([0.1, 0.7, 3.0])
    out = straight_through(z, rounded)
    assert torch.equal(out, rounded), "z + (rounded - z) would lose 0.1 beside 1e8"
    (out * torch.tensor([2.0, 3.0, 5.0])).sum().backward()
    assert z.grad is not None
    assert z.grad.tolist() == [2, 3, 5]


def test_a_codebook_hands_gradients_to_latents_and_its_errors_to_their_own_side() -> None:
    book = Codebook(2, 1)
    book.vectors.data = torch.tensor([[0.0], [1.0]])
    z = torch.tensor([0.2, 0.9, 0.6]).reshape(1, 1, 1, 3).requires_grad_()
    (book(z) * 7).sum().backward()
    assert z.grad is not None
    assert z.grad.flatten().tolist() == [7, 7, 7]
    assert book.vectors.grad is None
    index = book.nearest(z)
    assert index.flatten().tolist() == [0, 1, 1]
    to_codes, to_latents = book.errors(z, index)
    for error in (to_codes, to_latents):
        assert float(error.detach()) == pytest.approx((0.2**2 + 0.1**2 + 0.4**2) / 3)
    z.grad = None
    to_codes.backward()
    assert z.grad is None
    assert book.vectors.grad is not None
    # d/de of (e - z)^2 / 3, summed over the cells of each code
    torch.testing.assert_close(book.vectors.grad.flatten(), torch.tensor([-0.4, 2 * (0.1 + 0.4)]) / 3)
    book.vectors.grad = None
    to_latents.backward()
    assert book.vectors.grad is None
    torch.testing.assert_close(z.grad.flatten(), torch.tensor([0.4, -0.2, -0.8]) / 3)


@pytest.mark.parametrize("count", [2, 3, 4, 5, 8])
def test_levels_round_to_their_number_of_values(count: int) -> None:
    levels = Levels((count,))
    bounded = levels.bound(torch.linspace(-30, 30, 20001).reshape(1, 1, -1, 1))
    values = levels(bounded)
    half = count // 2
    expected = torch.arange(-half, count - half) / half
    assert torch.equal(values.unique(), expected)
    assert bounded.abs().max() < 1 + 0.01
    assert torch.equal(levels(values), values), "what was rounded stays"
    assert torch.equal(levels(torch.tensor([[[[-9.0]], [[9.0]]]])).flatten(), expected[[0, -1]]), "never beyond them"
    share = torch.bincount(((values + 1) * half).round().long().flatten(), minlength=count)
    assert float(levels.bound(torch.zeros(1, 1, 1, 1))) == pytest.approx(0, abs=1e-6)
    assert share.min() > 0


def test_levels_by_hand() -> None:
    """Mentzer et al. 2023, section 3: an odd number L is tanh(z) * (L - 1) / 2, rounded."""
    levels = Levels((3, 5))
    z = torch.tensor([0.3, 0.7]).reshape(1, 2, 1, 1).requires_grad_()
    bounded = levels.bound(z)
    expected = [math.tanh(0.3) * 1.001, math.tanh(0.7) * 2.001 / 2]
    assert bounded.flatten().tolist() == pytest.approx(expected)
    out = levels(bounded)
    assert out.flatten().tolist() == [0, 0.5]
    out.sum().backward()
    assert z.grad is not None
    slopes = [(1 - math.tanh(0.3) ** 2) * 1.001, (1 - math.tanh(0.7) ** 2) * 2.001 / 2]
    assert z.grad.flatten().tolist() == pytest.approx(slopes)


@pytest.mark.parametrize("kind", [{"codes": 9}, {"levels": (3, 4, 5)}, {"variance": False}])
def test_what_has_no_posterior_ends_in_its_latents(kind: dict[str, object]) -> None:
    network = Autoencoder(AutoencoderConfig(**SMALL, latent_channels=3, **kind))  # type: ignore[arg-type]
    randomise(network, 1)
    assert network.to_moments.weight.shape[0] == 3
    pixels = torch.randn(1, 3, 8, 12)
    found = network.encode(pixels)
    assert found.log_variance.max() < -29
    decoded = network.decode(found.mean)
    assert decoded.shape == pixels.shape
    decoded.sum().backward()
    grad = network.encoder.conv_in.weight.grad
    assert grad is not None
    assert grad.abs().sum() > 0, "rounding hands the gradient on"
    if "levels" in kind:
        assert found.mean.abs().max() < 1.01


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"levels": (3, 3)}, r"levels are \(3, 3\); give one number of at least 2 for each of the 4 latent channels"),
        ({"levels": (3, 3, 1, 3)}, "at least 2"),
        ({"levels": (3,) * 4, "codes": 8}, "to codes or to levels"),
    ],
)
def test_wrong_levels_are_refused(fields: dict[str, object], message: str) -> None:
    with pytest.raises(InputError, match=message):
        AutoencoderConfig(**fields)  # type: ignore[arg-type]


@pytest.mark.parametrize("levels", [0, 1, 2, 3, 4, 5])
def test_downsampling_from_1_to_32_by_levels_alone(levels: int) -> None:
    config = AutoencoderConfig(channels=4, multipliers=(1,) * (levels + 1), blocks=1)
    assert config.downsampling == 2**levels
    pixels = torch.randn(1, 3, 2**levels * 2, 2**levels)
    network = Autoencoder(config)
    assert network.encode(pixels).mean.shape == (1, 4, 2, 1)


def test_checkpointing_changes_nothing_but_memory() -> None:
    network = Autoencoder(AutoencoderConfig(**SMALL))  # type: ignore[arg-type]
    randomise(network, 2)
    pixels, found = torch.randn(1, 3, 8, 8), []
    for on in (False, True):
        network.set_checkpointing(on)
        network.zero_grad()
        network.decode(network.encode(pixels).mean).square().sum().backward()
        found.append([p.grad.clone() for p in network.parameters() if p.grad is not None])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
    kept: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x.numel()) or x, lambda x: x):
        for on in (False, True):
            network.set_checkpointing(on)
            kept.append(-1)
            network.encode(pixels)
    plain, saving = kept[1 : kept.index(-1, 1)], kept[kept.index(-1, 1) + 1 :]
    assert sum(saving) < 0.7 * sum(plain)
