"""The kernel distance against its definition, written as loops, and against cases known in closed form."""

import pytest
import torch

from latentkit.errors import InputError
from latentkit.evaluation.metrics.kid import kid, mmd2


def loops(x, y):
    def kernel(a, b):
        return (float(a.double() @ b.double()) / len(a) + 1) ** 3

    n, m = len(x), len(y)
    within_x = sum(kernel(x[i], x[j]) for i in range(n) for j in range(n) if i != j) / (n * (n - 1))
    within_y = sum(kernel(y[i], y[j]) for i in range(m) for j in range(m) if i != j) / (m * (m - 1))
    return within_x + within_y - 2 * sum(kernel(a, b) for a in x for b in y) / (n * m)


def test_equals_a_direct_double_loop():
    x, y = torch.randn(7, 5), torch.randn(4, 5) + 0.5
    assert mmd2(x, y) == pytest.approx(loops(x, y), rel=1e-10)


def test_two_points_in_closed_form():
    """Sets {a, a} and {b, b}: k(a, a) + k(b, b) - 2 k(a, b)."""
    x, y = torch.tensor([[1.0], [1.0]]), torch.tensor([[2.0], [2.0]])
    assert mmd2(x, y) == pytest.approx(2.0**3 + 5.0**3 - 2 * 3.0**3)


def test_unbiased():
    """Over many draws from one source the mean is 0 within its own deviation; the biased estimate is far above."""
    generator = torch.Generator().manual_seed(1)
    values = torch.tensor([mmd2(*torch.randn(2, 12, 4, generator=generator)) for _ in range(400)])
    error = float(values.std() / 20)
    assert abs(float(values.mean())) < 3 * error
    assert error < 0.1  # while the diagonal that is left out would add about 2 k(x, x) / n = 2 * 8 / 12


def test_a_shift_is_found_and_grows():
    x, y = torch.randn(200, 8), torch.randn(200, 8)
    near, far = kid(x, y + 0.3), kid(x, y + 1.0)
    assert kid(x, y).mean < 3 * kid(x, y).std
    assert 2 * near.std < near.mean < far.mean


def test_order_does_not_matter():
    x, y = torch.randn(20, 6), torch.randn(15, 6)
    assert mmd2(x[torch.randperm(20)], y[torch.randperm(15)]) == pytest.approx(mmd2(x, y), rel=1e-9)
    assert mmd2(y, x) == pytest.approx(mmd2(x, y), rel=1e-9)


def test_says_how_many_and_repeats():
    x, y = torch.randn(30, 4), torch.randn(21, 4)
    first = kid(x, y, seed=3)
    assert (first.size, first.subsets, first.first, first.second) == (10, 100, 30, 21)
    assert kid(x, y, seed=3) == first
    assert kid(x, y, seed=4).mean != first.mean
    assert first.std > 0


def test_too_few_pictures():
    with pytest.raises(InputError, match="at least two pictures"):
        mmd2(torch.randn(1, 4), torch.randn(9, 4))
    with pytest.raises(InputError, match="at least four"):
        kid(torch.randn(3, 4), torch.randn(9, 4))
