"""Nearest training pictures, and the ratio that tells copies from new pictures."""

import pytest
import torch

from latentkit.errors import InputError
from latentkit.evaluation.metrics.neighbours import memorisation, nearest


def test_nearest_against_loops():
    queries, reference = torch.randn(300, 6), torch.randn(11, 6)
    found = nearest(queries, reference)
    for i in (0, 1, 299):  # the last one lies in another chunk
        distances = [float((queries[i] - row).square().mean().sqrt()) for row in reference]
        assert int(found.place[i]) == distances.index(min(distances))
        assert float(found.distance[i]) == pytest.approx(min(distances), rel=1e-5)


def test_apart_leaves_each_picture_itself_out():
    rows = torch.arange(300.0)[:, None] ** 2
    found = nearest(rows, rows, apart=True)
    assert found.place[:3].tolist() == [1, 0, 1]
    assert found.place[299] == 298
    assert float(nearest(rows, rows).distance.max()) == 0


def test_ratio_of_copies_and_of_new_pictures():
    training, held = torch.randn(100, 16), torch.randn(40, 16)
    new = memorisation(torch.randn(40, 16), held, training)
    assert 0.8 < new.ratio < 1.2
    copied = memorisation(training[:30] + 1e-3 * torch.randn(30, 16), held, training)
    assert copied.ratio < 0.01
    assert copied.copies == 30
    assert copied.nearest.place.tolist() == list(range(30))
    assert new.copies <= 3


def test_without_held_out_pictures_training_ones_are_the_scale():
    training = torch.randn(50, 16)
    assert 0.7 < memorisation(torch.randn(40, 16), None, training).ratio < 1.3
    assert memorisation(training, None, training).ratio < 1e-6


def test_a_set_of_equal_pictures_has_no_scale():
    same = torch.ones(5, 4)
    assert memorisation(same, None, same).ratio != memorisation(same, None, same).ratio  # nan, and no crash


def test_nothing_to_compare_with():
    with pytest.raises(InputError, match="0 pictures"):
        nearest(torch.randn(2, 4), torch.empty(0, 4))
    with pytest.raises(InputError, match="1 pictures"):
        nearest(torch.randn(1, 4), torch.randn(1, 4), apart=True)
