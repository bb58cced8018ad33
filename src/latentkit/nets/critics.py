"""The critic of the adversarial first stage: real or decoded, one verdict per patch of a picture."""

from dataclasses import dataclass
from itertools import pairwise

from jaxtyping import Float
from torch import Tensor, nn

from latentkit.errors import InputError
from latentkit.nets.layers import laid_out

SLOPE = 0.2
"""Of the leaky ReLU below zero."""
LARGEST_MULTIPLIER = 8


@dataclass(frozen=True)
class CriticConfig:
    """The shape of a patch critic; the published one is the default, but for its batch norms."""

    __pydantic_config__ = {"extra": "forbid"}  # noqa: RUF012

    channels: int = 64
    """Width of the first layer; it doubles with each halving of the picture, eight times at most."""
    layers: int = 3
    """Halvings of height and width: a verdict sees 16, 34 or 70 pixels a side with 1, 2 or 3."""

    def __post_init__(self) -> None:
        for name in ("channels", "layers"):
            if getattr(self, name) < 1:
                raise InputError(f"critic {name} is {getattr(self, name)}; it must be at least 1")

    @property
    def smallest(self) -> int:
        """The least side of a picture in pixels."""
        return 3 * 2**self.layers


class PatchCritic(nn.Module):
    """Strided 4x4 convolutions down to a map of verdicts (Isola et al. 2017, appendix 6.1.2), without any norm.

    Without batch norm a verdict depends on its own picture alone, whatever the batch and the number of processes.
    """

    def __init__(self, picture_channels: int, config: CriticConfig) -> None:
        super().__init__()
        self.config = config
        widths = [config.channels * min(2**level, LARGEST_MULTIPLIER) for level in range(config.layers + 1)]
        layers: list[nn.Module] = []
        for level, (c_in, c_out) in enumerate(pairwise([picture_channels, *widths])):
            convolution = nn.Conv2d(c_in, c_out, 4, stride=2 if level < config.layers else 1, padding=1)
            nn.init.kaiming_normal_(convolution.weight, SLOPE)  # keeps the size of activations, as no norm does it
            layers += [convolution, nn.LeakyReLU(SLOPE)]
        self.layers = nn.Sequential(*layers)
        self.verdict = nn.Conv2d(widths[-1], 1, 4, padding=1)

    def forward(self, pixels: Float[Tensor, "b c h w"]) -> Float[Tensor, "b 1 hp wp"]:
        """Verdicts: above zero for real."""
        if min(pixels.shape[2:]) < self.config.smallest:
            raise InputError(
                f"a critic of {self.config.layers} layers takes pictures of at least {self.config.smallest} px a side, "
                f"these are {pixels.shape[3]}x{pixels.shape[2]}; use fewer layers"
            )
        return self.verdict(self.layers(laid_out(pixels)))
