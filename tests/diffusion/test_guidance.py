"""Classifier-free guidance: the identities that hold whatever the network."""

import pytest
import torch
from torch import Tensor

from latentkit.diffusion.guidance import classifier_free
from latentkit.diffusion.samplers.driver import Denoised

X = torch.randn(3, 2, 4, 4, generator=torch.Generator().manual_seed(1))


def positive(x: Tensor, sigma: float) -> Denoised:
    return Denoised(torch.tanh(x) / (1 + sigma))


def negative(x: Tensor, sigma: float) -> Denoised:
    return Denoised(torch.sin(x) / (2 + sigma))


def both(x: Tensor, sigma: float) -> Denoised:
    """Negative rows first."""
    low, high = x.chunk(2)
    assert torch.equal(low, high)
    return Denoised(torch.cat([negative(low, sigma).x0, positive(high, sigma).x0]))


def unreached(x: Tensor, sigma: float) -> Denoised:
    raise AssertionError("called though guidance is off")


def test_scale_one_is_the_positive_alone() -> None:
    assert classifier_free(unreached, positive, 1.0) is positive


def test_equal_conditions_change_nothing() -> None:
    def same(x: Tensor, sigma: float) -> Denoised:
        return Denoised(torch.cat([positive(half, sigma).x0 for half in x.chunk(2)]))

    for scale in (0.0, 0.3, 3.0, 7.5, -2.0):
        assert torch.equal(classifier_free(same, positive, scale)(X, 2.0).x0, positive(X, 2.0).x0)


def test_the_formula_and_its_anchor() -> None:
    low, high = negative(X, 2.0).x0, positive(X, 2.0).x0
    guided = classifier_free(both, positive, 4.0)(X, 2.0)
    torch.testing.assert_close(guided.x0, low + 4.0 * (high - low))
    assert guided.anchor is not None
    assert torch.equal(guided.anchor, low)
    assert torch.equal(classifier_free(both, positive, 0.0)(X, 2.0).x0, low)


@pytest.mark.parametrize("sigma", [0.1, 6.0])
def test_outside_the_interval_there_is_none(sigma: float) -> None:
    assert torch.equal(classifier_free(unreached, positive, 4.0, (0.2, 5.0))(X, sigma).x0, positive(X, sigma).x0)


@pytest.mark.parametrize("sigma", [0.2, 1.0, 5.0])
def test_inside_the_interval_and_at_its_ends_there_is(sigma: float) -> None:
    inside = classifier_free(both, unreached, 4.0, (0.2, 5.0))(X, sigma).x0
    assert torch.equal(inside, classifier_free(both, unreached, 4.0)(X, sigma).x0)


def test_guidance_composes() -> None:
    """Guiding with an already guided positive is guidance of the product's strength from the same negative."""

    def twice(x: Tensor, sigma: float) -> Denoised:
        half = x.chunk(2)[0]
        return Denoised(torch.cat([negative(half, sigma).x0, classifier_free(both, positive, 2.0)(half, sigma).x0]))

    torch.testing.assert_close(
        classifier_free(twice, positive, 3.0)(X, 1.0).x0, classifier_free(both, positive, 6.0)(X, 1.0).x0
    )
