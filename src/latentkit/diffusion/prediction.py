"""What a network predicts: scalings around it, its training target and the weight of its loss."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor


class Prediction(NamedTuple):
    """x0 = c_skip(sigma) x + c_out(sigma) F(c_in(sigma) x), all on sigma tensors that broadcast against x.

    `target(x0, eps, sigma)` is what F should be. `c_out` converts a weight on the error of x0 into one on F's.
    """

    name: str
    c_skip: Callable[[Tensor], Tensor]
    c_out: Callable[[Tensor], Tensor]
    c_in: Callable[[Tensor], Tensor]
    target: Callable[[Tensor, Tensor, Tensor], Tensor]


def _vp_in(sigma: Tensor) -> Tensor:
    return torch.rsqrt(1 + sigma * sigma)


EPS = Prediction("eps", torch.ones_like, torch.neg, _vp_in, lambda x0, eps, sigma: eps)
"""The noise, as in DDPM and Stable Diffusion 1."""

V = Prediction(
    "v",
    lambda sigma: 1 / (1 + sigma * sigma),
    lambda sigma: -sigma * _vp_in(sigma),
    _vp_in,
    lambda x0, eps, sigma: (eps - sigma * x0) * _vp_in(sigma),
)
"""alpha eps - sigma_vp x0 (Salimans & Ho 2022, eq. 7), as in Stable Diffusion 2 at 768 px."""

X0 = Prediction("x0", torch.zeros_like, torch.ones_like, _vp_in, lambda x0, eps, sigma: x0)
"""The clean latent itself."""

FLOW = Prediction(
    "flow",
    lambda sigma: 1 / (1 + sigma),
    lambda sigma: -sigma / (1 + sigma),
    lambda sigma: 1 / (1 + sigma),
    lambda x0, eps, sigma: eps - x0,
)
"""The velocity eps - x0 of the straight path (1 - t) x0 + t eps, t = sigma / (1 + sigma) (rectified flow)."""

PREDICTIONS = {p.name: p for p in (EPS, V, X0, FLOW)}


def _uniform_weight(prediction: Prediction, sigma: Tensor) -> Tensor:
    return torch.ones_like(sigma)


def _min_snr(prediction: Prediction, sigma: Tensor) -> Tensor:
    """min(SNR, 5) on the error of x0 (Hang et al. 2023, eq. 6), as a weight on the error of F."""
    snr = sigma**-2
    return torch.clamp(snr, max=5.0) * prediction.c_out(sigma) ** 2


WEIGHTS: dict[str, Callable[[Prediction, Tensor], Tensor]] = {"uniform": _uniform_weight, "min_snr": _min_snr}
"""Loss weights on the squared error of F."""
