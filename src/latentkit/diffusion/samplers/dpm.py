"""DPM-Solver++ in several steps: exponential integrators in lambda = -log sigma with x0 a polynomial."""

import math
from functools import partial

import torch
from torch import Tensor

from latentkit.diffusion.samplers.driver import SamplerEntry, Walk
from latentkit.diffusion.samplers.euler import ETA
from latentkit.diffusion.samplers.quadrature import exponential, half


def multistep(walk: Walk, x: Tensor, order: int, midpoint: bool, eta: float = 0.0) -> Tensor:
    """Of `order` in x0 at the last points; first order at the start, from a cap, and into 0.

    `midpoint` takes half the slope at order 2 instead of its integral. `eta` 1 is the reverse SDE, its noise Brownian.
    Source: Lu et al. 2022 b, algorithms 2 and 3 and appendix B.5.
    """
    x, x0 = walk.estimate(x)
    sigma, after = walk.sigma, walk.after
    known = [(x0, sigma), *reversed(walk.past)][: walk.order(order) if after else 1]
    rate, ratio = 1 + eta, after / sigma
    walk_on = ratio**rate
    if len(known) == 1:
        out = walk.mix(x, x0, walk_on)
    elif len(known) == 2:
        earlier, at = known[1]
        weights = half(at, sigma, after, rate) if midpoint else exponential([sigma, at], sigma, after, rate)
        out = torch.lerp(earlier, x0, weights[0] / (1 - walk_on), out=walk.spare(x, x0))
        out = torch.lerp(out, x, walk_on, out=out)
    else:
        weights = exponential([at for _, at in known], sigma, after, rate)
        out = torch.mul(x, walk_on, out=walk.spare(x, x0))
        for (value, _), weight in zip(known, weights):
            out.add_(value, alpha=weight)
    walk.remember(x0, order - 1)
    if eta and after:
        out.add_(walk.between(sigma, after), alpha=after * math.sqrt(-math.expm1(2 * eta * math.log(ratio))))
    return out


SAMPLERS = {
    "dpm++2m": SamplerEntry(
        partial(multistep, order=2, midpoint=True),
        2,
        1,
        False,
        "DPM-Solver++(2M), Lu et al. 2022 b, algorithm 2",
        "10 to 25 steps of nearly every model",
        ("DPM++ 2M", "dpmpp_2m", "DPMSolverMultistepScheduler", "EDMDPMSolverMultistepScheduler"),
    ),
    "dpm++3m": SamplerEntry(
        partial(multistep, order=3, midpoint=True),
        3,
        1,
        False,
        "DPM-Solver++(3M), Lu et al. 2022 b, appendix B, with the whole weight of the second derivative",
        "10 to 25 steps without or with weak guidance",
    ),
    "dpm++2m_sde": SamplerEntry(
        partial(multistep, order=2, midpoint=True, eta=1.0),
        2,
        1,
        True,
        "SDE-DPM-Solver++(2M), Lu et al. 2022 b; Brownian noise",
        "the best pictures of latent models, 20 to 40 steps",
        ("DPM++ 2M SDE", "dpmpp_2m_sde", "dpmpp_2m_sde_gpu"),
        ETA,
    ),
    "dpm++2m_sde_heun": SamplerEntry(
        partial(multistep, order=2, midpoint=False, eta=1.0),
        2,
        1,
        True,
        "dpm++2m_sde with the slope's exact integral (k-diffusion)",
        "the best pictures of latent models, 20 to 40 steps",
        ("DPM++ 2M SDE Heun", "dpmpp_2m_sde_heun", "dpmpp_2m_sde_heun_gpu"),
        ETA,
    ),
    "dpm++3m_sde": SamplerEntry(
        partial(multistep, order=3, midpoint=True, eta=1.0),
        2,
        1,
        True,
        "dpm++2m_sde with one point more (k-diffusion), the whole weight of the second derivative; noise keeps order 2",
        "the best pictures of latent models, from 30 steps on",
        ("DPM++ 3M SDE", "dpmpp_3m_sde", "dpmpp_3m_sde_gpu"),
        ETA,
    ),
}
