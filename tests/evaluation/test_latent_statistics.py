"""Statistics of latents in closed form, and against torch's own."""

import math

import pytest
import torch

from latentkit.evaluation.latents import BINS, spectrum, statistics


def test_channels_by_their_values():
    """Two sizes; the second channel is minus twice the first."""
    first = torch.randn(1, 8, 8)
    second = torch.randn(1, 4, 6)
    latents = [torch.cat([x + 3, -2 * x]) for x in (first, second)]
    found = statistics(latents)
    cells = torch.cat([x.flatten() for x in (first, second)]).double()
    assert found.mean.tolist() == pytest.approx([float(cells.mean()) + 3, -2 * float(cells.mean())], abs=1e-6)
    std = float(cells.std(correction=0))
    assert found.std.tolist() == pytest.approx([std, 2 * std], rel=1e-6)
    assert found.correlation.flatten().tolist() == pytest.approx([1, -1, -1, 1])


def test_kurtosis_of_two_values_and_of_an_outlier():
    """Plus and minus one: 1 - 3; a share p of ones, q of zeros: (1 - 6 p q) / p q."""
    even = torch.tensor([1.0, -1.0]).repeat(50).reshape(1, 10, 10)
    alone = torch.zeros(1, 10, 10)
    alone[0, 0, 0] = 1.0
    found = statistics([torch.cat([even, alone])])
    assert float(found.kurtosis[0]) == pytest.approx(-2.0)
    assert float(found.kurtosis[1]) == pytest.approx((1 - 6 * 0.0099) / 0.0099)


def test_histograms_are_densities():
    (bars,) = statistics([torch.randn(1, 200, 200)]).histograms
    width = bars[1][0] - bars[0][0]
    assert sum(density * width for _, density in bars) == pytest.approx(1.0, abs=1e-3)
    middle = min(bars, key=lambda bar: abs(bar[0]))
    assert middle[1] == pytest.approx(1 / math.sqrt(2 * math.pi), rel=0.05)


def test_a_channel_that_is_constant_is_finite():
    found = statistics([torch.ones(2, 4, 4)])
    assert found.std.tolist() == [0, 0]
    assert all(torch.isfinite(part).all() for part in (found.kurtosis, found.correlation))


def test_white_noise_is_flat():
    points = spectrum(torch.randn(3, 24, 40) for _ in range(40))
    assert len(points) == BINS
    assert all(power == pytest.approx(1.0, abs=0.15) for _, power in points)


def test_a_wave_has_its_own_frequency_alone():
    """A cosine of amplitude 1 has power n / 4 at each of its two places of n."""
    row = torch.cos(2 * math.pi * torch.arange(32) * 4 / 32)  # 1/8 cycle a pixel
    points = spectrum([row.expand(1, 32, 32) + 5.0])
    shown = [(frequency, power) for frequency, power in points if power > 1e-9]
    ((frequency, power),) = shown
    assert abs(frequency - 1 / 8) <= 1 / (2 * BINS)
    radius = torch.fft.fftfreq(32)[:, None].square() + torch.fft.fftfreq(32)[None].square()
    ring = ((radius.sqrt() > 3 / 32) & (radius.sqrt() <= 4 / 32)).sum()
    assert power == pytest.approx(2 * 1024 / 4 / float(ring))
