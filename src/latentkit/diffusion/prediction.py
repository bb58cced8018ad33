"""What a network predicts: scalings around it, its training target and the weight of its loss."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from latentkit.diffusion.schedule import NoiseSchedule


class Prediction(NamedTuple):
    """x0 = c_skip(sigma) x + c_out(sigma) F(c_in(sigma) x), all on sigma tensors that broadcast against x.

    `target(x0, eps, sigma)` is what F should be. `c_out` converts a weight on the error of x0 into one on F's.
    `sigma_data` is the deviation of the data that the scalings are made for.
    """

    name: str
    c_skip: Callable[[Tensor], Tensor]
    c_out: Callable[[Tensor], Tensor]
    c_in: Callable[[Tensor], Tensor]
    target: Callable[[Tensor, Tensor, Tensor], Tensor]
    sigma_data: float = 1.0


def _vp_in(sigma: Tensor) -> Tensor:
    return torch.rsqrt(1 + sigma * sigma)


EPS = Prediction("eps", torch.ones_like, torch.neg, _vp_in, lambda x0, eps, sigma: eps)
"""The noise, as in DDPM and Stable Diffusion 1."""

SCORE = Prediction("score", torch.ones_like, torch.clone, torch.ones_like, lambda x0, eps, sigma: -eps)
"""sigma times the score, of an unscaled x (Song & Ermon 2019; the variance-exploding column of EDM's table 1)."""

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


def edm(sigma_data: float) -> Prediction:
    """EDM's preconditioning (Karras et al. 2022, table 1); with `sigma_data` 1 it is -v."""

    def c_in(sigma: Tensor) -> Tensor:
        return torch.rsqrt(sigma * sigma + sigma_data**2)

    return Prediction(
        "edm",
        lambda sigma: sigma_data**2 / (sigma * sigma + sigma_data**2),
        lambda sigma: sigma * sigma_data * c_in(sigma),
        c_in,
        lambda x0, eps, sigma: (sigma * x0 / sigma_data - sigma_data * eps) * c_in(sigma),
        sigma_data,
    )


EDM = edm(0.5)
"""EDM's own, for data of deviation 0.5: pixels in [-1, 1]."""

PREDICTIONS = {p.name: p for p in (EPS, V, X0, FLOW, EDM, SCORE)}


def consistency(inner: Prediction, schedule: NoiseSchedule, sigma_data: float = 0.5, scale: float = 10.0) -> Prediction:
    """The boundary scaling of a latent consistency model around what it was distilled from (`inner`).

    f = c_skip x_vp + c_out x0 with s = `scale` timestep, c_skip = sigma_data^2 / (s^2 + sigma_data^2) and
    c_out = s / sqrt(s^2 + sigma_data^2): the noisy latent itself at timestep 0. The target stays that of `inner`.
    Source: Luo et al. 2023, section 4.1, with the constants of its code.
    """

    def boundary(sigma: Tensor) -> tuple[Tensor, Tensor]:
        timestep = schedule.to_timestep(sigma.detach().cpu().double().numpy())
        s = scale * torch.as_tensor(timestep).to(sigma)
        return sigma_data**2 / (s * s + sigma_data**2), s * torch.rsqrt(s * s + sigma_data**2)

    def c_skip(sigma: Tensor) -> Tensor:
        keep, take = boundary(sigma)
        return keep * _vp_in(sigma) + take * inner.c_skip(sigma)

    return inner._replace(c_skip=c_skip, c_out=lambda sigma: boundary(sigma)[1] * inner.c_out(sigma))


def to_x0(prediction: Prediction, output: Tensor, x: Tensor, sigma: Tensor) -> Tensor:
    """The estimate of x0 that a network's `output` at `x` stands for."""
    return prediction.c_skip(sigma) * x + prediction.c_out(sigma) * output


def from_x0(prediction: Prediction, x0: Tensor, x: Tensor, sigma: Tensor) -> Tensor:
    """The output that stands for the estimate `x0` at `x`; `sigma` is above 0."""
    return prediction.target(x0, (x - x0) / sigma, sigma)


def convert(output: Tensor, x: Tensor, sigma: Tensor, source: Prediction, to: Prediction) -> Tensor:
    """A network's `output` under `source`, said as a network of prediction `to` would."""
    return from_x0(to, to_x0(source, output, x, sigma), x, sigma)


def step_divergence(share: Tensor, error: Tensor, sigma: Tensor, after: Tensor) -> Tensor:
    """KL of the true step from `sigma` to `after` from the one drawn with a learned variance, nats per element.

    `share` is where the variance's logarithm lies from the posterior's (0) to the forward step's (1), `error` that of
    x0. Source: Nichol & Dhariwal 2021, equations 4 and 15.
    """
    wider = share * torch.log((1 + after**-2) / (1 + sigma**-2))
    return 0.5 * (wider - 1 + torch.exp(-wider) * (1 + (after**-2 - sigma**-2) * error * error))


def _uniform_weight(prediction: Prediction, sigma: Tensor) -> Tensor:
    return torch.ones_like(sigma)


def _min_snr(prediction: Prediction, sigma: Tensor) -> Tensor:
    """min(SNR, 5) on the error of x0 (Hang et al. 2023, eq. 6), as a weight on the error of F."""
    snr = sigma**-2
    return torch.clamp(snr, max=5.0) * prediction.c_out(sigma) ** 2


def _edm_weight(prediction: Prediction, sigma: Tensor) -> Tensor:
    """1 / sigma^2 + 1 / sigma_data^2 on the error of x0 (Karras et al. 2022, table 1), as a weight on F's."""
    return (sigma**-2 + prediction.sigma_data**-2) * prediction.c_out(sigma) ** 2


WEIGHTS: dict[str, Callable[[Prediction, Tensor], Tensor]] = {
    "uniform": _uniform_weight,
    "min_snr": _min_snr,
    "edm": _edm_weight,
}
"""Loss weights on the squared error of F."""
