"""Perceptual distance: the heads' arithmetic by hand, the trunks' shapes, names of the community's weights."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from latentkit.errors import InputError
from latentkit.nets.perceptual import (
    FeatureConfig,
    OwnTrunk,
    PerceptualDistance,
    load_heads,
    load_trunk,
)


class Given(nn.Module):
    """A trunk that shows what it is told."""

    widths = (2,)
    smallest = 1

    def forward(self, pixels: Tensor) -> list[Tensor]:
        return [pixels[:, :2]]


def plain() -> PerceptualDistance:
    """A distance of pictures of two channels whose features are they themselves."""
    distance = PerceptualDistance(OwnTrunk(FeatureConfig(widths=(2,))), channels=2)
    distance.trunk = Given()
    return distance


def test_the_heads_by_hand() -> None:
    """Zhang et al. 2018, eq. 1: unit features, squared difference, weighted by channel, mean over places."""
    distance = plain()
    distance.heads[0].data = torch.tensor([2.0, 0.5])
    a = torch.tensor([[3.0, 0.0], [4.0, 1.0]]).reshape(1, 2, 1, 2)  # (3, 4) and (0, 1)
    b = torch.tensor([[1.0, 5.0], [0.0, 0.0]]).reshape(1, 2, 1, 2)  # (1, 0) and (5, 0)
    first = 2 * (0.6 - 1) ** 2 + 0.5 * 0.8**2
    second = 2 * 1 + 0.5 * 1
    assert float(distance(a, b)) == pytest.approx((first + second) / 2)


def test_pictures_of_any_channels_are_seen_in_groups() -> None:
    torch.manual_seed(0)
    distance = PerceptualDistance(OwnTrunk(FeatureConfig(widths=(4, 6))), channels=3)
    a, b = torch.randn(2, 12, 8, 8), torch.randn(2, 12, 8, 8)
    groups = [distance(a[:, i : i + 3], b[:, i : i + 3]) for i in range(0, 12, 3)]
    torch.testing.assert_close(distance(a, b), torch.stack(groups).mean(0))
    gray = distance(a[:, :1], b[:, :1])
    torch.testing.assert_close(gray, distance(a[:, :1].expand(-1, 3, -1, -1), b[:, :1].expand(-1, 3, -1, -1)))
    four = distance(a[:, :4], b[:, :4])
    last = distance(a[:, 3:4].expand(-1, 3, -1, -1), b[:, 3:4].expand(-1, 3, -1, -1))
    torch.testing.assert_close(four, (groups[0] + last) / 2)


def test_its_gradient_is_finite_where_features_are_zero() -> None:
    """The root of a sum of squares has an infinite slope at zero, as in the original."""
    distance = plain()
    a = torch.zeros(1, 2, 2, 2, requires_grad=True)
    distance(a, torch.ones(1, 2, 2, 2)).sum().backward()
    assert a.grad is not None
    assert a.grad.isfinite().all()


def test_gradients_go_to_the_first_picture_alone() -> None:
    distance = PerceptualDistance(OwnTrunk(FeatureConfig(widths=(3, 3)))).double()
    a, b = torch.randn(1, 3, 4, 4).double().requires_grad_(), torch.randn(1, 3, 4, 4).double().requires_grad_()
    assert torch.autograd.gradcheck(lambda x: distance(x, b.detach()), (a,))
    distance(a, b).sum().backward()
    assert a.grad is not None
    assert b.grad is None
    assert all(parameter.grad is None for parameter in distance.parameters())


def community(name: str) -> nn.Sequential:
    """The convolutional part of torchvision's network, as its source lists it."""
    if name == "alexnet":
        return nn.Sequential(
            nn.Conv2d(3, 64, 11, stride=4, padding=2), nn.ReLU(), nn.MaxPool2d(3, 2),
            nn.Conv2d(64, 192, 5, padding=2), nn.ReLU(), nn.MaxPool2d(3, 2),
            nn.Conv2d(192, 384, 3, padding=1), nn.ReLU(), nn.Conv2d(384, 256, 3, padding=1), nn.ReLU(),
            nn.Conv2d(256, 256, 3, padding=1), nn.ReLU(),
        )  # fmt: skip
    layers: list[nn.Module] = []
    c_in = 3
    for width in (64, 64, "M", 128, 128, "M", 256, 256, 256, "M", 512, 512, 512, "M", 512, 512, 512, "M"):
        if width == "M":
            layers.append(nn.MaxPool2d(2, 2))
        else:
            layers += [nn.Conv2d(c_in, width, 3, padding=1), nn.ReLU()]
            c_in = width
    return nn.Sequential(*layers)


ENDS = {"vgg16": (3, 8, 15, 22, 29), "alexnet": (1, 4, 7, 9, 11)}
"""The last layer of each stage whose features LPIPS compares."""


@pytest.mark.parametrize("name", ["vgg16", "alexnet"])
@torch.no_grad()
def test_a_trunk_with_the_community_s_weights_sees_what_theirs_sees(name: str) -> None:
    theirs = community(name)
    weights = {f"features.{key}": value for key, value in theirs.state_dict().items()}
    weights["classifier.1.weight"] = torch.zeros(4, 4)
    trunk = load_trunk(name, weights, "a file")  # type: ignore[arg-type]
    pixels = torch.rand(1, 3, 35, 40) * 2 - 1
    mean = torch.tensor([0.485, 0.456, 0.406])[:, None, None]
    std = torch.tensor([0.229, 0.224, 0.225])[:, None, None]
    x, expected = ((pixels + 1) / 2 - mean) / std, []
    for place, layer in enumerate(theirs):
        x = layer(x)
        if place in ENDS[name]:
            expected.append(x)
    for found, known in zip(trunk(pixels), expected, strict=True):
        torch.testing.assert_close(found, known, rtol=1e-3, atol=1e-4)
    small = torch.zeros(1, 3, trunk.smallest, trunk.smallest)
    assert trunk(small)[-1].shape[2] >= 1


def test_whole_lpips_against_its_formula() -> None:
    theirs = community("alexnet")
    trunk = load_trunk("alexnet", {f"features.{k}": v for k, v in theirs.state_dict().items()}, "a file")
    distance = PerceptualDistance(trunk)
    heads = {f"lin{i}.model.1.weight": torch.rand(1, width, 1, 1) for i, width in enumerate(trunk.widths)}
    load_heads(distance, heads, "another")
    a, b = torch.rand(2, 3, 32, 32), torch.rand(2, 3, 32, 32)
    expected = torch.zeros(2)
    with torch.no_grad():
        for head, f, g in zip(heads.values(), trunk(a), trunk(b), strict=True):
            apart = (F.normalize(f, dim=1, eps=1e-10) - F.normalize(g, dim=1, eps=1e-10)) ** 2
            expected += F.conv2d(apart, head).mean((1, 2, 3))
    torch.testing.assert_close(distance(a, b), expected)


def test_names_of_weights_are_checked() -> None:
    good = {f"features.{key}": value for key, value in community("alexnet").state_dict().items()}
    with pytest.raises(InputError, match=r"w\.pth: these are not alexnet's weights \(missing features\.0\.bias\)"):
        load_trunk("alexnet", {k: v for k, v in good.items() if k != "features.0.bias"}, "w.pth")
    with pytest.raises(InputError, match=r"unknown features\.99\.bias"):
        load_trunk("alexnet", good | {"features.99.bias": torch.zeros(1)}, "w.pth")
    with pytest.raises(InputError, match=r"features\.0\.weight is \[1\], not \[64, 3, 11, 11\]"):
        load_trunk("alexnet", good | {"features.0.weight": torch.zeros(1)}, "w.pth")
    distance = PerceptualDistance(OwnTrunk(FeatureConfig(widths=(4, 6))))
    with pytest.raises(InputError, match=r"LPIPS's linear layers for this trunk \(missing lin1"):
        load_heads(distance, {"lin0.model.1.weight": torch.zeros(1, 4, 1, 1)}, "heads.pth")


def test_pictures_that_are_too_small_are_refused() -> None:
    distance = PerceptualDistance(OwnTrunk(FeatureConfig()))
    with pytest.raises(InputError, match="at least 8 px a side, these are 8x7"):
        distance(torch.zeros(1, 3, 7, 8), torch.zeros(1, 3, 7, 8))
