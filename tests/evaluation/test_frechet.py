"""The Frechet distance against closed forms and against the root of the covariances' product."""

import numpy as np
import pytest
import torch

from latentkit.errors import InputError
from latentkit.evaluation.metrics.frechet import frechet


def direct(x, y):
    """Through the eigenvalues of the product of both covariances."""
    x, y = x.double().numpy(), y.double().numpy()
    s, t = np.cov(x.T), np.cov(y.T)
    roots = np.sqrt(np.linalg.eigvals(s @ t).real.clip(0))
    return ((x.mean(0) - y.mean(0)) ** 2).sum() + np.trace(s + t) - 2 * roots.sum()


@pytest.mark.parametrize("counts", [(40, 50), (40, 4), (3, 4)])
def test_equals_the_root_of_the_product(counts):
    x, y = torch.randn(counts[0], 6) @ torch.randn(6, 6), torch.randn(counts[1], 6) + 1
    assert frechet(x, y) == pytest.approx(direct(x, y), rel=1e-5)


def test_one_feature_in_closed_form():
    """Normal distributions on a line: (m - n)^2 + (s - t)^2."""
    x, y = torch.tensor([[-1.0], [1.0]]), torch.tensor([[2.0], [8.0]])
    assert frechet(x, y) == pytest.approx(5.0**2 + (2**0.5 - 18**0.5) ** 2)


def test_equal_sets_and_shifted_ones():
    x = torch.randn(5, 30)
    assert frechet(x, x) == pytest.approx(0.0, abs=1e-9)
    assert frechet(x, x + 2) == pytest.approx(4.0 * 30)


def test_one_picture_has_no_covariance():
    with pytest.raises(InputError, match="at least two pictures"):
        frechet(torch.randn(1, 4), torch.randn(9, 4))
