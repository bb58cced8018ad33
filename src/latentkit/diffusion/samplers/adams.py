"""Linear multistep rules on dx/dsigma = (x - x0) / sigma, which is the noise: LMS, PLMS, iPNDM, DEIS."""

import torch
from torch import Tensor

from latentkit.diffusion.samplers.driver import SamplerEntry, Walk
from latentkit.diffusion.samplers.heun import trapezoid
from latentkit.diffusion.samplers.quadrature import exponential_noise, fixed, polynomial


def lms(walk: Walk, x: Tensor, order: int = 4) -> Tensor:
    """The noise a polynomial in sigma through the last points, exactly integrated, into 0 too (k-diffusion)."""
    x, x0 = walk.estimate(x)
    sigmas = [walk.sigma, *(sigma for _, sigma in reversed(walk.past))][:order]
    return _integrate(walk, x, x0, polynomial(sigmas, walk.sigma, walk.after), order)


def ipndm(walk: Walk, x: Tensor, order: int = 4) -> Tensor:
    """Adams-Bashforth with the coefficients of equal steps (Zhang & Chen 2023, eq. 54); begun by lower orders."""
    x, x0 = walk.estimate(x)
    return _integrate(walk, x, x0, fixed(min(order, len(walk.past) + 1), walk.sigma, walk.after), order)


def plms(walk: Walk, x: Tensor) -> Tensor:
    """`ipndm` begun by a trapezoid, which costs one evaluation more (Liu et al. 2022, as released with the paper)."""
    if walk.past:
        return ipndm(walk, x)
    x, x0 = walk.estimate(x)
    walk.remember(torch.sub(x, x0, out=walk.spare(x, x0)), 3)
    return trapezoid(walk, x, x0, walk.sigma)


def deis(walk: Walk, x: Tensor, order: int = 3) -> Tensor:
    """The noise a polynomial in log sigma through the last points, exactly integrated; first order into 0.

    Below 15 steps the order falls towards the end, as the peers' does. Source: Zhang & Chen 2023, log-rho DEIS.
    """
    x, x0 = walk.estimate(x)
    sigmas = [walk.sigma, *(sigma for _, sigma in reversed(walk.past))][: walk.order(order)]
    weights = exponential_noise(sigmas, walk.sigma, walk.after) if walk.after else [-walk.sigma]
    return _integrate(walk, x, x0, weights, order)


def _integrate(walk: Walk, x: Tensor, x0: Tensor, weights: list[float], order: int) -> Tensor:
    """x + sum_j w_j noise_j, newest first; remembers sigma times the noise."""
    out = torch.lerp(x0, x, 1 + weights[0] / walk.sigma, out=walk.spare(x, x0))
    for (value, sigma), weight in zip(reversed(walk.past), weights[1:]):
        out.add_(value, alpha=weight / sigma)
    if order > 1:
        walk.forget(order - 2)
        walk.remember(torch.sub(x, x0, out=walk.spare(x, x0, out)), order - 1)
    return out


SAMPLERS = {
    "lms": SamplerEntry(
        lms,
        4,
        1,
        False,
        "Adams-Bashforth for any steps (k-diffusion)",
        "comparison with older pictures",
        ("LMSDiscreteScheduler",),
        {"order": (1, 4)},
    ),
    "plms": SamplerEntry(
        plms,
        4,
        1,
        False,
        "Liu et al. 2022 (PNDM), as Stable Diffusion was released; order 4 where steps are equal in sigma, else 2",
        "the pictures of the first releases",
        ("PNDMScheduler",),
    ),
    "ipndm": SamplerEntry(
        ipndm,
        4,
        1,
        False,
        "Zhang & Chen 2023, eq. 54; order 4 where steps are equal in sigma, else 2",
        "3 to 8 steps on a searched spacing",
        ("IPNDMScheduler",),
        {"order": (1, 4)},
    ),
    "deis": SamplerEntry(
        deis,
        3,
        1,
        False,
        "Zhang & Chen 2023, log-rho",
        "8 to 20 steps",
        ("DEISMultistepScheduler",),
        {"order": (1, 3)},
    ),
}
