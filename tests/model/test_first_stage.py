"""FirstStage: its stations, the standard scale of model latents, and the identity."""

import os

import pytest
import torch
from torch import Tensor

from latentkit.model import first_stage
from latentkit.model.first_stage import FirstStage
from latentkit.nets.autoencoder import Autoencoder, AutoencoderConfig
from latentkit.nets.strips import Strips

CONFIG = AutoencoderConfig(latent_channels=2, channels=16, multipliers=(1, 2), blocks=1, stem=2)
MEAN, STD = torch.tensor([1.5, -0.5]), torch.tensor([2.0, 0.25])


@pytest.fixture
def stage() -> FirstStage:
    stage = FirstStage(CONFIG, 3).eval()
    stage.set_statistics(MEAN, STD)
    return stage


@pytest.fixture
def pixels() -> Tensor:
    return torch.rand(4, 3, 16, 8) * 2 - 1


@torch.no_grad()
def test_stations(stage: FirstStage, pixels: Tensor) -> None:
    moments = stage.moments(pixels)
    assert moments.shape == (4, 4, 4, 2)
    z = stage.encode(pixels)
    assert z.shape == (4, stage.latent_channels, 16 // stage.downsampling, 8 // stage.downsampling)
    assert stage.decode(z).shape == pixels.shape


@torch.no_grad()
def test_model_latents_are_the_posteriors_mean_on_the_standard_scale(stage: FirstStage, pixels: Tensor) -> None:
    raw = stage.moments(pixels)[:, :2]
    expected = (raw - MEAN[:, None, None]) / STD[:, None, None]
    torch.testing.assert_close(stage.encode(pixels), expected)
    torch.testing.assert_close(stage.standardise(raw), expected)


@torch.no_grad()
def test_statistics_of_the_raw_latents_make_model_latents_standard(stage: FirstStage, pixels: Tensor) -> None:
    raw = stage.moments(pixels)[:, :2]
    stage.set_statistics(raw.mean((0, 2, 3)), raw.std((0, 2, 3), correction=0))
    z = stage.encode(pixels)
    torch.testing.assert_close(z.mean((0, 2, 3)), torch.zeros(2), atol=1e-5, rtol=0)
    torch.testing.assert_close(z.std((0, 2, 3), correction=0), torch.ones(2))


@torch.no_grad()
def test_decoding_undoes_the_scale(stage: FirstStage) -> None:
    assert stage.autoencoder is not None
    raw = torch.randn(2, 2, 4, 4)
    torch.testing.assert_close(stage.decode(stage.standardise(raw)), stage.autoencoder.decode(raw))


@torch.no_grad()
def test_a_posterior_sample_has_its_deviation(stage: FirstStage) -> None:
    mean, log_variance = torch.randn(1, 2, 3, 3), torch.randn(1, 2, 3, 3)
    moments, noise = torch.cat([mean, log_variance], 1), torch.randn(1, 2, 3, 3)
    drawn = stage.from_moments(moments, noise) - stage.from_moments(moments)
    torch.testing.assert_close(drawn, (0.5 * log_variance).exp() * noise / STD[:, None, None])


@torch.no_grad()
def test_it_takes_and_gives_float32_whatever_it_computes_in(stage: FirstStage, pixels: Tensor) -> None:
    assert stage.autoencoder is not None
    stage.autoencoder.bfloat16()
    assert stage.dtype == torch.bfloat16
    z = stage.encode(pixels)
    assert z.dtype == stage.decode(z).dtype == torch.float32


def test_statistics_are_saved_with_the_weights(stage: FirstStage) -> None:
    other = FirstStage(CONFIG, 3)
    other.load_state_dict(stage.state_dict())
    assert torch.equal(other.latent_mean, MEAN)
    assert torch.equal(other.latent_std, STD)


def test_the_identity_gives_pixels_back(pixels: Tensor) -> None:
    identity = FirstStage(None, 3)
    assert (identity.downsampling, identity.latent_channels) == (1, 3)
    assert torch.equal(identity.encode(pixels), pixels)
    assert torch.equal(identity.decode(pixels), pixels)
    assert torch.equal(identity.from_moments(identity.moments(pixels), torch.randn_like(pixels)), pixels)
    assert not list(identity.parameters())


def test_the_identity_has_a_scale_too(pixels: Tensor) -> None:
    identity = FirstStage(None, 3)
    identity.set_statistics(torch.tensor([0.1, 0.2, 0.3]), torch.tensor([0.5, 1.0, 2.0]))
    z = identity.encode(pixels)
    torch.testing.assert_close(z[:, 2], (pixels[:, 2] - 0.3) / 2.0)
    torch.testing.assert_close(identity.decode(z), pixels)


def test_large_pictures_pass_in_strips_with_the_same_values(monkeypatch: pytest.MonkeyPatch) -> None:
    stage = FirstStage(AutoencoderConfig(channels=32, multipliers=(1, 2), blocks=1, latent_channels=3), 3).eval()
    pixels = torch.rand(1, 3, 16, 24, generator=torch.Generator().manual_seed(1)) * 2 - 1
    used: list[str | None] = []

    def spy(network: Autoencoder, spill: str | None) -> Strips:
        used.append(spill)
        return Strips(network, spill)

    monkeypatch.setattr(first_stage, "Strips", spy)
    with torch.no_grad():
        whole = stage.encode(pixels)
        drawn = stage.decode(whole)
        assert not used
        monkeypatch.setitem(first_stage.WHOLE_PIXELS, "cpu", 16 * 24 - 1)
        torch.testing.assert_close(stage.encode(pixels), whole, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(stage.decode(whole), drawn, rtol=1e-4, atol=1e-5)
        assert used == [None, None]
        with stage.in_strips(False):
            torch.testing.assert_close(stage.decode(whole), drawn, rtol=0, atol=0)
        assert used == [None, None]
        monkeypatch.setattr(os, "sysconf", lambda name: 1)
        torch.testing.assert_close(stage.decode(whole), drawn, rtol=1e-4, atol=1e-5)
        assert used[2] is not None
    stage.decode(whole)
    assert len(used) == 3, "with gradients the network is run whole"


def test_an_accelerator_takes_pictures_whole_as_far_as_its_memory_goes(monkeypatch: pytest.MonkeyPatch) -> None:
    stage = FirstStage(AutoencoderConfig(channels=32, multipliers=(1, 2), blocks=1, latent_channels=3), 3).eval()
    need = 3 * 16 * 24 * 64 * 4
    monkeypatch.setattr(first_stage, "WHOLE_PIXELS", {})  # a CPU that counts as one
    for free, count, whole in (
        (2 * need, 1, True),
        (2 * need - 2, 1, False),
        (2 * need, 2, False),
        (4 * need, 2, True),
    ):
        monkeypatch.setattr(first_stage, "free_memory", lambda device, free=free: free)
        with torch.no_grad():
            assert (stage._strips(16 * 24, count) is None) == whole
            with stage.in_strips(False):
                assert stage._strips(16 * 24, count) is None
    monkeypatch.setattr(first_stage, "free_memory", lambda device: 1 << 60)
    with torch.no_grad():
        assert stage._strips(first_stage.WHOLE_ELSEWHERE + 1, 1) is not None


def test_the_free_memory_of_a_device_is_asked_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (1000, 2000))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 300)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 100)
    assert first_stage.free_memory(torch.device("cuda", 0)) == 1200
    monkeypatch.setattr(os, "sysconf", {"SC_AVPHYS_PAGES": 7, "SC_PAGE_SIZE": 4}.get)
    assert first_stage.free_memory(torch.device("cpu")) == 28
