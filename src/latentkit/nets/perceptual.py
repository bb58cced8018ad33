"""Networks whose features say how different two pictures look to a person: trunks of VGG16 and AlexNet, and our own."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from latentkit.errors import InputError
from latentkit.nets.layers import laid_out

TrunkName = Literal["vgg16", "alexnet"]
Convolution = tuple[int, int, int, int, int, int]  # place in torchvision's list, c_in, c_out, kernel, stride, padding
SHIFT, SCALE = (-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)
"""What LPIPS takes from and divides by, of pictures in [-1, 1]: ImageNet's mean and deviation there."""
TINY = 1e-10


def _vgg16() -> list[list[Convolution]]:
    stages, place, c_in = [], 0, 3
    for width, count in ((64, 2), (128, 2), (256, 3), (512, 3), (512, 3)):
        stage: list[Convolution] = []
        for _ in range(count):
            stage.append((place, c_in, width, 3, 1, 1))
            place, c_in = place + 2, width  # a ReLU follows
        stages.append(stage)
        place += 1  # and a pooling
    return stages


ALEXNET: list[list[Convolution]] = [
    [(0, 3, 64, 11, 4, 2)],
    [(3, 64, 192, 5, 1, 2)],
    [(6, 192, 384, 3, 1, 1)],
    [(8, 384, 256, 3, 1, 1)],
    [(10, 256, 256, 3, 1, 1)],
]
STAGES = {"vgg16": _vgg16(), "alexnet": ALEXNET}
POOLED = {"vgg16": (False, True, True, True, True), "alexnet": (False, True, True, False, False)}
"""Whether pooling comes before a stage: 2x2 there, 3x3 at stride 2 here."""


def _convolutions(shapes: Sequence[Sequence[int]]) -> nn.Sequential:
    """Convolutions of (c_in, c_out, kernel, stride, padding), a ReLU after each, at He et al.'s (2015) scale."""
    layers: list[nn.Module] = []
    for c_in, c_out, kernel, stride, padding in shapes:
        convolution = nn.Conv2d(c_in, c_out, kernel, stride, padding)
        nn.init.kaiming_normal_(convolution.weight)
        layers += [convolution, nn.ReLU()]
    return nn.Sequential(*layers)


class Trunk(nn.Module):
    """The convolutions of VGG16 (Simonyan & Zisserman 2015) or AlexNet (Krizhevsky 2014), up to five stages' ends."""

    def __init__(self, name: TrunkName) -> None:
        super().__init__()
        self.name = name
        self.stages = nn.ModuleList(_convolutions([shape for _, *shape in stage]) for stage in STAGES[name])
        self.widths = [stage[-1][2] for stage in STAGES[name]]
        self.smallest = {"vgg16": 16, "alexnet": 31}[name]

    def forward(self, pixels: Float[Tensor, "b c h w"]) -> list[Tensor]:
        """RGB in [-1, 1] to the features after each stage's last ReLU."""
        shift, scale = (pixels.new_tensor(values)[:, None, None] for values in (SHIFT, SCALE))
        h, found = laid_out((pixels - shift) / scale), []
        for stage, pooled in zip(self.stages, POOLED[self.name], strict=True):
            if pooled:
                h = F.max_pool2d(h, 2 if self.name == "vgg16" else 3, 2)
            h = stage(h)
            found.append(h)
        return found


@dataclass(frozen=True)
class FeatureConfig:
    """The shape of our own feature network."""

    __pydantic_config__ = {"extra": "forbid"}  # noqa: RUF012

    picture_channels: int = 3
    widths: tuple[int, ...] = (32, 64, 128, 192)
    """Of each stage; each but the first halves height and width."""


class OwnTrunk(nn.Module):
    """Two 3x3 convolutions a stage, no norm: features of any pictures, once it is trained on them."""

    def __init__(self, config: FeatureConfig) -> None:
        super().__init__()
        self.config = config
        self.widths = list(config.widths)
        self.smallest = 2 ** (len(config.widths) - 1)
        self.stages = nn.ModuleList()
        c_in = config.picture_channels
        for width in config.widths:
            self.stages.append(_convolutions([(c_in, width, 3, 1, 1), (width, width, 3, 1, 1)]))
            c_in = width

    def forward(self, pixels: Float[Tensor, "b c h w"]) -> list[Tensor]:
        """The features after each stage."""
        h, found = laid_out(pixels), []
        for number, stage in enumerate(self.stages):
            h = stage(F.avg_pool2d(h, 2) if number else h)
            found.append(h)
        return found


class PerceptualDistance(nn.Module):
    """Distance of two pictures: features of unit length at each place, squared differences, weighted by channel.

    Zhang et al. 2018 (LPIPS), eq. 1. Pictures of other than `channels` channels are seen as groups of so many, the
    last one filled up with its last channel, and distances averaged over groups.
    """

    def __init__(self, trunk: Trunk | OwnTrunk, channels: int = 3) -> None:
        super().__init__()
        self.trunk = trunk
        self.channels = channels
        self.heads = nn.ParameterList(torch.full((width,), 1 / len(trunk.widths)) for width in trunk.widths)
        self.requires_grad_(False)

    def forward(self, a: Float[Tensor, "b c h w"], b: Float[Tensor, "b c h w"]) -> Float[Tensor, " b"]:
        """One number for each pair of pictures in [-1, 1]; `b` is the one that gets no gradient."""
        if min(a.shape[2:]) < self.trunk.smallest:
            raise InputError(
                f"this perceptual network takes pictures of at least {self.trunk.smallest} px a side, these are "
                f"{a.shape[3]}x{a.shape[2]}; use larger ones, or leave it out"
            )
        with torch.no_grad():
            known = [_unit(found) for found in self.trunk(self._grouped(b))]
        seen = self.trunk(self._grouped(a))
        distances = [
            torch.einsum("bchw,c->bhw", (_unit(found) - other).square(), head).mean((1, 2))
            for found, other, head in zip(seen, known, self.heads, strict=True)
        ]
        return torch.stack(distances).sum(0).view(a.shape[0], -1).mean(1)

    def _grouped(self, x: Tensor) -> Tensor:
        """`b c h w -> (b groups) channels h w`."""
        missing = -x.shape[1] % self.channels
        if missing:
            x = torch.cat([x, x[:, -1:].expand(-1, missing, -1, -1)], 1)
        return x.reshape(-1, self.channels, *x.shape[2:])


def _unit(features: Tensor) -> Tensor:
    # Inside the root: its slope at zero is infinite, and black pictures have features of zero.
    return features / (features.square().sum(1, keepdim=True) + TINY**2).sqrt().add(TINY)


def load_trunk(name: TrunkName, weights: Mapping[str, Tensor], where: str) -> Trunk:
    """The trunk with the weights of torchvision's `vgg16` or `alexnet` state dict; its classifier is left out.

    Errors: InputError names a key that is missing or unknown, or of another shape; `where` is what the file is called.
    """
    trunk = Trunk(name)
    names = {
        f"features.{place}.{kind}": f"stages.{i}.{2 * j}.{kind}"
        for i, stage in enumerate(STAGES[name])
        for j, (place, *_) in enumerate(stage)
        for kind in ("weight", "bias")
    }
    given = {key: value for key, value in weights.items() if not key.startswith("classifier.")}
    trunk.load_state_dict(_renamed(given, names, trunk.state_dict(), f"{where}: these are not {name}'s weights"))
    return trunk.requires_grad_(False)


def load_heads(distance: PerceptualDistance, weights: Mapping[str, Tensor], where: str) -> None:
    """Give a distance LPIPS's linear layers (`lin0.model.1.weight` ..., `1 c 1 1` each); errors as `load_trunk`."""
    flat = {key: value.reshape(-1) for key, value in weights.items()}
    names = {f"lin{level}.model.1.weight": f"heads.{level}" for level in range(len(distance.heads))}
    own = {key: value for key, value in distance.state_dict().items() if key.startswith("heads.")}
    found = _renamed(flat, names, own, f"{where}: these are not LPIPS's linear layers for this trunk")
    distance.load_state_dict(found, strict=False)


def _renamed(
    given: Mapping[str, Tensor], names: Mapping[str, str], own: Mapping[str, Tensor], problem: str
) -> dict[str, Tensor]:
    """The given tensors under our names; InputError for any that is missing, unknown or of another shape."""
    missing, unknown = sorted(set(names) - set(given)), sorted(set(given) - set(names))
    if missing or unknown:
        said = [f"{what} {', '.join(keys[:3])}" for what, keys in (("missing", missing), ("unknown", unknown)) if keys]
        raise InputError(f"{problem} ({'; '.join(said)})")
    for key, name in names.items():
        if given[key].shape != own[name].shape:
            raise InputError(f"{problem} ({key} is {[*given[key].shape]}, not {[*own[name].shape]})")
    return {name: given[key] for key, name in names.items()}
