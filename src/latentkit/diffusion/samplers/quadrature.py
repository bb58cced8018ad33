"""Weights of multistep rules: exact integrals of the polynomial through known points (host arithmetic, float64)."""

import math
from collections.abc import Sequence

import numpy as np


def _solve(nodes: Sequence[float], moments: Sequence[float]) -> list[float]:
    """w with sum_j w_j nodes_j^k = moments_k: integrates every polynomial through the nodes exactly."""
    return np.linalg.solve(np.vander(nodes, increasing=True).T, moments).tolist()


def _nodes(sigmas: Sequence[float], start: float, after: float) -> tuple[list[float], float]:
    """Where `sigmas` lie in log sigma, `start` being 0 and `after` 1, and the width of the interval."""
    width = math.log(start / after)
    return [math.log(start / sigma) / width for sigma in sigmas], width


def exponential(sigmas: Sequence[float], start: float, after: float, rate: float = 1.0) -> list[float]:
    """Weights of the estimates x0 at `sigmas` in the exact step from `start` to `after` with x0 a polynomial.

    x0 is a polynomial in lambda = -log sigma, and the step is x' = e^(-rate h) x + sum_j w_j x0_j, h the width in
    lambda: rate 1 is the probability flow, 2 the reverse SDE. Source: Lu et al. 2022 b, eq. 9 and appendix B; at
    order 3 the weight of the second derivative is the integral's own, twice that of the authors' code, with which the
    rule is of order 2.
    """
    nodes, width = _nodes(sigmas, start, after)
    moments = [-math.expm1(-rate * width)]
    for k in range(1, len(nodes)):
        moments.append(1 - k / (rate * width) * moments[-1])
    return _solve(nodes, moments)


def half(other: float, start: float, after: float, rate: float = 1.0, whole: float | None = None) -> list[float]:
    """Weights of x0 at (`start`, `other`): half of `whole` on the slope between them, the midpoint's second order.

    `whole` is 1 - e^(-rate h) unless given (Lu et al. 2022 b, algorithm 2; UniPC's B(h), Zhao et al. 2023).
    """
    (node,), width = _nodes([other], start, after)
    total = -math.expm1(-rate * width)
    slope = (total if whole is None else whole) / (2 * node)
    return [total - slope, slope]


def exponential_noise(sigmas: Sequence[float], start: float, after: float) -> list[float]:
    """Weights of the noise (x - x0) / sigma at `sigmas` in x' = x + sum_j w_j noise_j: polynomial in log sigma.

    Source: DEIS with the log-rho polynomial (Zhang & Chen 2023, eq. 15).
    """
    nodes, width = _nodes(sigmas, start, after)
    moments = [after - start]
    for k in range(1, len(nodes)):
        moments.append(after + k / width * moments[-1])
    return _solve(nodes, moments)


def polynomial(sigmas: Sequence[float], start: float, after: float) -> list[float]:
    """Weights of the noise at `sigmas` in x' = x + sum_j w_j noise_j: polynomial in sigma (Adams-Bashforth, LMS)."""
    width = after - start
    return _solve([(sigma - start) / width for sigma in sigmas], [width / (k + 1) for k in range(len(sigmas))])


ADAMS = ((1,), (3 / 2, -1 / 2), (23 / 12, -16 / 12, 5 / 12), (55 / 24, -59 / 24, 37 / 24, -9 / 24))


def fixed(order: int, start: float, after: float) -> list[float]:
    """Weights of the noise in x' = x + sum_j w_j noise_j, as if all steps were equal (Adams-Bashforth)."""
    return [(after - start) * weight for weight in ADAMS[order - 1]]
