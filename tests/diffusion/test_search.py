"""The searched spacing: least cost against every choice there is, the error of a step in closed form, a better path."""

import itertools
import math

import numpy as np
import pytest
import torch
from ideal import gaussian, gaussian_path, mixture

from latentkit.diffusion.samplers.driver import Point, sample
from latentkit.diffusion.schedule import NoiseSchedule
from latentkit.diffusion.search import LATER, choose, follow, local_errors, search
from latentkit.diffusion.spacing import space
from latentkit.errors import InputError

FLOW = NoiseSchedule("flow")


@pytest.mark.parametrize("steps", [1, 2, 3, 5, 8])
@pytest.mark.parametrize("seed", [0, 1])
def test_the_choice_is_the_best_of_all(steps: int, seed: int) -> None:
    last = 8
    costs = np.triu(np.random.default_rng(seed).random((last + 1, last + 1)), 1)
    costs[costs == 0] = np.inf

    def cost(chosen: tuple[int, ...]) -> float:
        ends = itertools.pairwise((0, *chosen, last))
        return sum(LATER**k * costs[i, j] for k, (i, j) in enumerate(ends))

    best = min(itertools.combinations(range(1, last), steps - 1), key=cost)
    assert choose(costs, steps) == [0, *best, last]


def test_the_error_of_a_step_on_gaussian_data_in_closed_form() -> None:
    mean, std = 0.4, 0.7
    start = torch.randn(3, 2, 4, 4, dtype=torch.float64) * 9
    sigmas = [9.0, 3.0, 1.0, 0.2, 0.0]
    path = [gaussian_path(start, mean, std, 9.0, sigma) for sigma in sigmas]
    points = [Point(x, gaussian(mean, std)(x, sigma).x0, sigma) for x, sigma in zip(path, sigmas)]
    costs = local_errors(points)
    for i, j in itertools.product(range(5), repeat=2):
        if j <= i:
            assert costs[i, j] == np.inf
            continue
        s, t = sigmas[i], sigmas[j]
        kept = (std**2 + s * t) / (std**2 + s**2)  # of x - mean, by Euler's rule
        exact = math.sqrt((std**2 + t**2) / (std**2 + s**2))
        spread = (path[i] - mean).square().flatten(1).mean(1).sqrt().mean()
        assert costs[i, j] == pytest.approx(float(abs(kept - exact) * spread) / math.sqrt(1 + t * t), rel=1e-9)


def test_the_path_is_the_exact_one_and_begins_and_ends_where_it_should() -> None:
    grid = space("beta", FLOW, 60)
    x = torch.randn(2, 3, 4, 4, dtype=torch.float64) * grid[0]
    points = list(follow(gaussian(0.2, 0.5), x, grid))
    assert [point.sigma for point in points] == grid.tolist()
    torch.testing.assert_close(points[0].x, x)
    for point in points[2:]:
        torch.testing.assert_close(point.x, gaussian_path(x, 0.2, 0.5, grid[0], point.sigma), rtol=0.02, atol=0.02)


@pytest.mark.parametrize("steps", [6, 8])
def test_it_finds_where_the_path_bends_and_comes_nearer_than_what_it_was_chosen_from(steps: int) -> None:
    mean, std, generator = 0.2, 0.1, torch.Generator().manual_seed(6)
    denoise = gaussian(mean, std)
    warm, other = (torch.randn(8, 3, 4, 4, dtype=torch.float64, generator=generator) * 1e7 for _ in range(2))
    found = np.array(search(denoise, warm, space("beta", FLOW, 60), steps))
    assert found.shape == (steps + 1,)
    assert np.sum((found > std / 10) & (found < 10 * std)) >= steps - 2
    exact = gaussian_path(other, mean, std, 1e7, 0)

    def error(sigmas: np.ndarray) -> float:
        *_, last = sample("euler", denoise, other, sigmas, None)
        return float((last.x - exact).square().mean().sqrt())

    assert error(found) < 0.6 * min(error(space(name, FLOW, steps)) for name in ("beta", "uniform", "karras"))


def test_it_is_a_pure_function() -> None:
    centres = torch.randn(6, 3, 4, 4, generator=torch.Generator().manual_seed(5))
    denoise = mixture(centres, 0.2)
    x, grid = torch.randn(2, 3, 4, 4) * 1e7, space("beta", FLOW, 20)
    before = x.clone()
    assert search(denoise, x, grid, 4) == search(denoise, x, grid, 4)
    assert torch.equal(x, before)


@pytest.mark.parametrize("steps", [0, 9])
def test_a_wrong_number_of_steps_is_refused(steps: int) -> None:
    with pytest.raises(InputError, match=f"{steps} steps asked of a search over 8; allowed are 1 to 8"):
        choose(np.ones((9, 9)), steps)
