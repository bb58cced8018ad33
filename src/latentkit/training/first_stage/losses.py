"""Differences between two pictures that a person sees: edges and structure at several scales, no outside weights."""

import torch
import torch.nn.functional as F
from torch import Tensor


def pyramid_l1(a: Tensor, b: Tensor, levels: int = 3) -> Tensor:
    """Mean absolute difference of the Laplacian pyramids of two `b c h w`, summed over `levels` bands.

    A band is a picture less its own 2x2 means; the last level is the coarse rest. Stops where a side becomes odd.
    """
    difference = a - b
    total = difference.new_zeros(())
    for _ in range(levels):
        if difference.shape[2] % 2 or difference.shape[3] % 2:
            break
        coarse = F.avg_pool2d(difference, 2)
        total = total + (difference - F.interpolate(coarse, scale_factor=2.0, mode="nearest")).abs().mean()
        difference = coarse
    return total + difference.abs().mean()


def structure(a: Tensor, b: Tensor, scales: int = 3, window: int = 8) -> Tensor:
    """1 - structural similarity of two `b c h w` in [-1, 1], averaged over `scales` halvings (Wang et al. 2003).

    Taken on intensities in [0, 1], where the luminance term is defined. Means and variances come from
    `window` x `window` boxes at stride `window` / 2, which costs little on a CPU.
    """
    c1, c2 = 0.01**2, 0.03**2
    a, b = (a + 1) / 2, (b + 1) / 2
    total, used = a.new_zeros(()), 0
    for _ in range(scales):
        size = min(window, a.shape[2], a.shape[3])
        moments = F.avg_pool2d(torch.cat([a, b, a * a, b * b, a * b], dim=1), size, stride=max(1, size // 2))
        mean_a, mean_b, square_a, square_b, product = moments.chunk(5, dim=1)
        covariance = product - mean_a * mean_b
        variances = square_a - mean_a**2 + square_b - mean_b**2
        similarity = (2 * mean_a * mean_b + c1) * (2 * covariance + c2)
        similarity = similarity / ((mean_a**2 + mean_b**2 + c1) * (variances + c2))
        total, used = total + (1 - similarity).mean(), used + 1
        if min(a.shape[2], a.shape[3]) < 4:
            break
        a, b = F.avg_pool2d(a, 2), F.avg_pool2d(b, 2)
    return total / used


def high_bands_l1(a: Tensor, b: Tensor, levels: int = 2) -> Tensor:
    """Mean absolute difference of the Haar wavelets' high bands of two `b c h w`, over `levels` (LiteVAE 2024, 3.3).

    Orthonormal; stops where a side becomes odd, and is zero where one is odd at once.
    """
    low = a - b
    parts = []
    for _ in range(levels):
        if low.shape[2] % 2 or low.shape[3] % 2:
            break
        even, odd = low[..., 0::2, :], low[..., 1::2, :]
        smooth, steep = even + odd, even - odd
        bands = [smooth[..., 0::2] - smooth[..., 1::2], steep[..., 0::2] + steep[..., 1::2]]
        bands.append(steep[..., 0::2] - steep[..., 1::2])
        parts.append(torch.cat(bands, 1).abs().mean() / 2)
        low = (smooth[..., 0::2] + smooth[..., 1::2]) / 2
    return torch.stack(parts).mean() if parts else low.sum() * 0


def focal_frequency(a: Tensor, b: Tensor) -> Tensor:
    """Squared distance of the spectra of two `b c h w`, each frequency weighted by its own distance.

    The weight is the distance over the largest of its channel, and no gradient goes through it (Jiang et al. 2021,
    eq. 6 to 9, alpha 1).
    """
    distance = torch.fft.rfft2(a - b, norm="ortho")
    square = distance.real.square() + distance.imag.square()
    weight = square.detach().sqrt()
    weight = weight / weight.amax((2, 3), keepdim=True).clamp_min(1e-12)
    # a real signal's spectrum is symmetric: all columns but the first and, of an even width, the last count twice
    twice = torch.full((square.shape[3],), 2.0, dtype=square.dtype, device=square.device)
    twice[0] = 1.0
    if a.shape[3] % 2 == 0:
        twice[-1] = 1.0
    total: Tensor = (weight * square * twice).sum((2, 3)).mean()
    return total / (a.shape[2] * a.shape[3])
