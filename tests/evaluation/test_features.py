"""The feature network: fixed, the same for every picture alone or in company, any channels and sizes."""

import pytest
import torch

from latentkit.diffusion.noise import keyed_normal
from latentkit.evaluation.metrics.features import NETWORK, WIDTH, features

GOLDEN = [0.341328, 0.521199, 0.025868, 0.330762, 0.088507]


def noise(count: int, channels: int = 3, side: int = 16) -> list[torch.Tensor]:
    return [keyed_normal((channels, side, side), "features", i).clamp(-1, 1) for i in range(count)]


def test_golden_values_go_with_the_name():
    """Other weights need another name: figures of equal names must compare."""
    found = features([keyed_normal((3, 64, 64), "golden").clamp(-1, 1)])
    assert NETWORK == "latentkit-random-conv-v1"
    assert found.shape == (1, WIDTH)
    torch.testing.assert_close(found[0, [0, 100, 200, 900, -1]], torch.tensor(GOLDEN), rtol=1e-4, atol=1e-5)


def test_a_picture_has_the_same_features_in_any_company():
    pictures = noise(70)
    together = features(pictures)
    assert together.shape == (70, WIDTH)
    alone = torch.cat([features([pictures[0]]), features([pictures[69]])])
    torch.testing.assert_close(together[[0, 69]], alone)


@pytest.mark.parametrize("channels", [1, 2, 3, 4, 7])
def test_any_number_of_channels(channels):
    first, second = features(noise(2, channels))
    assert torch.isfinite(first).all()
    assert (first - second).abs().max() > 1e-3


def test_gray_is_seen_as_rgb_of_three_equal_channels():
    (gray,) = noise(1, 1)
    torch.testing.assert_close(features([gray]), features([gray.expand(3, -1, -1)]))


def test_other_sizes_are_brought_to_one():
    small = torch.linspace(-1, 1, 32).expand(3, 32, 32)
    large = torch.linspace(-1, 1, 256).expand(3, 256, 256)
    near = (features([small]) - features([large])).norm()
    far = (features([small]) - features([-large])).norm()
    assert near < 0.1 * far


def test_no_pictures_are_no_features():
    assert features([]).shape == (0, WIDTH)
