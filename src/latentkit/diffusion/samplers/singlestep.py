"""DPM-Solver rules that look ahead inside one interval, of fixed and of adaptive steps."""

import math

import torch
from torch import Tensor

from latentkit.diffusion.samplers.driver import SamplerEntry, Walk, ancestral
from latentkit.diffusion.samplers.euler import ETA

ACCEPTED = 0.81
"""Share by which the next step may shrink for this one to stand."""
SMALL = 0.0078 / 0.05
"""Numbers below this are as accurate as this one: k-diffusion's absolute tolerance over its relative one."""
FIRST_STRIDE = 0.05


def dpm_2s(walk: Walk, x: Tensor, eta: float = 1.0) -> Tensor:
    """x0 in the middle (of log sigma) for the whole interval, then ancestral noise; plain Euler into 0.

    Source: DPM-Solver++(2S), Lu et al. 2022 b, algorithm 1 with r = 1/2 (k-diffusion, `sample_dpmpp_2s_ancestral`).
    """
    sigma = walk.sigma
    down, up = ancestral(sigma, walk.after, eta)
    x, x0 = walk.estimate(x)
    if down == 0:
        return walk.mix(x, x0, 0.0, up)
    middle = math.sqrt(sigma * down)
    _, between0 = walk.estimate(walk.mix(x, x0, middle / sigma), middle)
    return walk.mix(x, between0, down / sigma, up)


def dpm_sde(walk: Walk, x: Tensor, eta: float = 1.0) -> Tensor:
    """`dpm_2s` whose way to the middle is noisy too, both noises of one Brownian path (k-diffusion)."""
    sigma, after = walk.sigma, walk.after
    x, x0 = walk.estimate(x)
    if after == 0:
        return walk.mix(x, x0, 0.0)
    middle = math.sqrt(sigma * after)
    _, between0 = walk.estimate(_noisy(walk, x, x0, middle, eta), middle)
    return _noisy(walk, x, between0, after, eta)


def _noisy(walk: Walk, x: Tensor, x0: Tensor, after: float, eta: float) -> Tensor:
    down, up = ancestral(walk.sigma, after, eta)
    out = walk.mix(x, x0, down / walk.sigma)
    return out.add_(walk.between(walk.sigma, after), alpha=up) if up else out


def adaptive(walk: Walk, x: Tensor, tolerance: float = 0.05, order: int = 3) -> Tensor:
    """As many steps of DPM-Solver between two sigmas as the relative tolerance asks; plain Euler into 0.

    Two rules that share evaluations, of `order` and one less, differ by the error; the worst picture of a batch
    decides. Source: Lu et al. 2022 a, appendix C, with k-diffusion's step control.
    """
    sigma, after = walk.sigma, walk.after
    walk.carried = walk.carried or FIRST_STRIDE
    while sigma > after * (1 + 1e-9):
        x, x0 = walk.estimate(x, sigma)
        if after == 0:
            return walk.mix(x, x0, 0.0)
        ahead = max(after, sigma * math.exp(-walk.carried))
        lower, higher = _pair(walk, x, (x - x0) / sigma, sigma, ahead, order)
        scale = torch.maximum(lower.abs(), x.abs()).clamp_(min=SMALL).mul_(tolerance)
        worst = ((lower - higher) / scale).double().square().flatten(1).mean(1).max().sqrt().item()
        factor = 1 + math.atan((1 / (worst + 1e-8)) ** (1 / order) - 1)
        walk.carried *= factor
        if factor >= ACCEPTED:
            x, sigma = higher, ahead
    return x


def _pair(walk: Walk, x: Tensor, noise: Tensor, sigma: float, after: float, order: int) -> tuple[Tensor, Tensor]:
    """The steps of order 1 and 2, or 2 and 3 (Lu et al. 2022 a, algorithms 1, 4 and 5)."""
    width = math.log(sigma / after)

    def noise_at(share: float, moved: Tensor) -> Tensor:
        level = sigma * math.exp(-share * width)
        moved, x0 = walk.estimate(moved, level)
        return (moved - x0) / level

    def on(share: float) -> Tensor:
        return x + noise * (sigma * math.expm1(-share * width))

    if order == 2:
        return on(1.0), on(1.0) + (noise_at(0.5, on(0.5)) - noise) * (after - sigma)
    first, second = 1 / 3, 2 / 3
    bend = noise_at(first, on(first)) - noise
    level = sigma * math.exp(-second * width)
    moved = on(second) - bend * (level * second / first * (math.expm1(second * width) / (second * width) - 1))
    curve = (noise_at(second, moved) - noise) * (after / second * (math.expm1(width) / width - 1))
    return on(1.0) + bend * ((after - sigma) / (2 * first)), on(1.0) - curve


SAMPLERS = {
    "dpm++2s_ancestral": SamplerEntry(
        dpm_2s,
        2,
        2,
        True,
        "DPM-Solver++(2S), Lu et al. 2022 b, algorithm 1, with ancestral noise (k-diffusion)",
        "variety with fine detail, at two evaluations a step; eta 0 is DPM-Solver++(2S) itself",
        ("DPM++ 2S a", "dpmpp_2s_ancestral", "DPMSolverSinglestepScheduler"),
        ETA,
    ),
    "dpm++sde": SamplerEntry(
        dpm_sde,
        2,
        2,
        True,
        "DPM-Solver++(2S) on the reverse SDE (k-diffusion)",
        "the finest detail in 10 to 20 steps, at two evaluations a step",
        ("DPM++ SDE", "dpmpp_sde", "dpmpp_sde_gpu", "DPMSolverSDEScheduler"),
        ETA,
    ),
    "dpm_adaptive": SamplerEntry(
        adaptive,
        3,
        3,
        False,
        "DPM-Solver-12 and -23, Lu et al. 2022 a, appendix C; the evaluations are those of one step of its own",
        "accuracy to a tolerance; few sigmas leave its steps free",
        ("DPM adaptive",),
        {"tolerance": (1e-6, 1.0), "order": (2, 3)},
    ),
}
