"""Structural similarity against its definition, written as loops, and against cases known in closed form."""

import math

import pytest
import torch
import torch.nn.functional as F

from latentkit.evaluation.metrics import similarity
from latentkit.evaluation.metrics.similarity import WEIGHTS, ms_ssim, ssim


def looped(a, b, size=11):
    """(similarity, contrast and structure) of one channel in [0, 1], a window at a time (Wang et al. 2004)."""
    window = torch.tensor(
        [
            [math.exp(-((i - (size - 1) / 2) ** 2 + (j - (size - 1) / 2) ** 2) / 4.5) for j in range(size)]
            for i in range(size)
        ],
        dtype=torch.float64,
    )
    window /= window.sum()
    rows = []
    for top in range(a.shape[0] - size + 1):
        for left in range(a.shape[1] - size + 1):
            x, y = (p[top : top + size, left : left + size] for p in (a, b))
            mx, my = (window * x).sum(), (window * y).sum()
            vx, vy = (window * (x - mx) ** 2).sum(), (window * (y - my) ** 2).sum()
            cov = (window * (x - mx) * (y - my)).sum()
            structure = (2 * cov + 0.0009) / (vx + vy + 0.0009)
            rows.append(torch.stack([(2 * mx * my + 0.0001) / (mx**2 + my**2 + 0.0001) * structure, structure]))
    return torch.stack(rows).mean(0)


def noisy(height, width, channels=1):
    a = torch.rand(channels, height, width, dtype=torch.float64) * 2 - 1
    return a, (a + 0.3 * torch.randn_like(a)).clamp(-1, 1)


def test_equals_loops_over_windows():
    a, b = noisy(17, 14, 2)
    expected = sum(float(looped((a[c] + 1) / 2, (b[c] + 1) / 2)[0]) for c in range(2)) / 2
    assert ssim(a, b) == pytest.approx(expected, rel=1e-10)


def test_flat_pictures_in_closed_form():
    """Two flat pictures differ in luminance alone: (2 m n + C1) / (m^2 + n^2 + C1)."""
    a, b = torch.full((3, 32, 32), -0.5), torch.full((3, 32, 32), 0.5)
    assert ssim(a, b) == pytest.approx((2 * 0.25 * 0.75 + 1e-4) / (0.25**2 + 0.75**2 + 1e-4), rel=1e-9)
    assert ssim(a, a) == pytest.approx(1.0)


def test_bands_of_rows_change_nothing(monkeypatch):
    a, b = noisy(40, 16)
    whole = ssim(a, b)
    monkeypatch.setattr(similarity, "ROWS", 7)
    assert ssim(a, b) == pytest.approx(whole, rel=1e-12)


def test_pictures_smaller_than_a_window():
    a, b = noisy(5, 5)
    assert ssim(a, b) == pytest.approx(float(looped((a[0] + 1) / 2, (b[0] + 1) / 2, size=5)[0]), rel=1e-10)
    assert ms_ssim(a, b).scales == 1


def test_several_scales_multiply_contrasts_and_the_last_luminance():
    a, b = noisy(24, 30)
    x, y = (a[0] + 1) / 2, (b[0] + 1) / 2
    fine = looped(x, y)
    coarse = looped(*(F.avg_pool2d(p[None, None], 2)[0, 0] for p in (x, y)))
    total = WEIGHTS[0] + WEIGHTS[1]
    found = ms_ssim(a, b)
    assert found.scales == 2
    assert found.value == pytest.approx(
        float(fine[1]) ** (WEIGHTS[0] / total) * float(coarse[0]) ** (WEIGHTS[1] / total), rel=1e-9
    )


def test_five_scales_from_176_pixels_on():
    a, b = noisy(176, 180)
    assert ms_ssim(a, b).scales == 5
    assert ms_ssim(a[:, :175], b[:, :175]).scales == 4
    assert ms_ssim(a, a).value == pytest.approx(1.0)


def test_opposite_pictures_count_as_zero():
    """Structure below zero has no root."""
    a = torch.rand(1, 24, 24) * 2 - 1
    assert ms_ssim(a, -a).value == 0.0
