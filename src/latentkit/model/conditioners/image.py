"""Pictures through a CLIP image tower: unCLIP's vector with its level of noise, and image variations' one token."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from latentkit.diffusion.schedule import NoiseSchedule
from latentkit.errors import InputError
from latentkit.model.conditioning import Conditioning
from latentkit.nets.clip import VIT_H_IMAGE, VIT_L_IMAGE, ClipImage, ClipImageConfig
from latentkit.nets.layers import sinusoids

MEAN = (0.48145466, 0.4578275, 0.40821073)
STD = (0.26862954, 0.26130258, 0.27577711)
"""Of the pictures in 0..1 that CLIP was trained on."""


@dataclass(frozen=True)
class ImageConfig:
    """A CLIP image tower and the slot that its vector fills."""

    __pydantic_config__ = {"extra": "forbid"}  # noqa: RUF012

    tower: ClipImageConfig
    slot: Literal["vector", "context"] = "vector"
    """"vector": with noise and its level (unCLIP); "context": as one token (image variations)."""
    noise: NoiseSchedule = field(default_factory=lambda: NoiseSchedule(kind="cosine"))

    @property
    def context_width(self) -> int:
        """Width of the context token, 0 if none."""
        return self.tower.projection if self.slot == "context" else 0

    @property
    def vector_width(self) -> int:
        """Width of the vector, 0 if none."""
        return 2 * self.tower.projection if self.slot == "vector" else 0


UNCLIP_H_IMAGE = ImageConfig(VIT_H_IMAGE)
UNCLIP_L_IMAGE = ImageConfig(VIT_L_IMAGE)
VARIATION_IMAGE = ImageConfig(VIT_L_IMAGE, slot="context")


class ImagePrompt(NamedTuple):
    """A picture `3 h w` in [-1, 1], with `noise` of the embedding's width at a level (a timestep) of the schedule."""

    picture: Tensor
    level: int = 0
    noise: Tensor | None = None


class ImageConditioner(nn.Module):
    """Pictures to the vector slot or to the context slot; the absent picture is zeros.

    `mean` and `std` (`1 p`) standardise the embedding before noise is added, and are undone after (Ramesh et al. 2022,
    section 2.1).
    """

    mean: Tensor
    std: Tensor

    def __init__(self, config: ImageConfig) -> None:
        super().__init__()
        self.config = config
        self.tower = ClipImage(config.tower)
        self.register_buffer("mean", torch.zeros(1, config.tower.projection))
        self.register_buffer("std", torch.ones(1, config.tower.projection))

    def from_batch(self, batch: dict[str, Any]) -> list[ImagePrompt | None]:
        """Refused: pictures are not conditions of training yet."""
        raise InputError("a model that is told pictures cannot be trained; train one that is told captions or classes")

    def absent(self, count: int) -> list[None]:
        """What stands for "no picture"."""
        return [None] * count

    def forward(self, values: Sequence[ImagePrompt | None]) -> Conditioning:
        """Rows for the pictures, on the tower's device; InputError for a level that the schedule has not."""
        rows = torch.cat([self._row(value) for value in values])
        return Conditioning(vector=rows) if self.config.slot == "vector" else Conditioning(context=rows[:, None])

    def _row(self, value: ImagePrompt | None) -> Tensor:
        width = self.config.vector_width or self.config.context_width
        if value is None:
            return self.mean.new_zeros(1, width)
        pixels = prepared(value.picture, self.config.tower.size).to(self.tower.patches.weight)
        embedded = self.tower(pixels[None]).float()
        if self.config.slot == "context":
            return embedded
        return torch.cat([self._noised(embedded, value), self._level(value.level)], 1)

    def _noised(self, embedded: Tensor, value: ImagePrompt) -> Tensor:
        """sqrt(alpha_bar) z + sqrt(1 - alpha_bar) noise, z the standardised embedding."""
        steps = self.config.noise.steps
        if not 0 <= value.level < steps:
            raise InputError(f"noise level {value.level} is asked for; allowed are 0 to {steps - 1}", exit_code=2)
        sigma = float(self.config.noise.sigmas[value.level])
        z = (embedded - self.mean) / self.std
        if value.noise is not None:
            z = z + sigma * value.noise.to(z)
        return z / (1 + sigma * sigma) ** 0.5 * self.std + self.mean

    def _level(self, level: int) -> Tensor:
        return sinusoids(torch.tensor([level], device=self.mean.device), self.config.tower.projection)

    def state(self) -> dict[str, Any]:
        """Nothing."""
        return {}


def prepared(picture: Tensor, size: int) -> Tensor:
    """A picture `3 h w` in [-1, 1] as CLIP sees it: shorter side to `size` (bicubic, antialiased), cut, scaled."""
    height, width = picture.shape[1:]
    short = min(height, width)
    shape = (size * height // short, size * width // short)
    x = F.interpolate(picture[None].float(), shape, mode="bicubic", antialias=True)[0].clamp(-1, 1) / 2 + 0.5
    top, left = (shape[0] - size) // 2, (shape[1] - size) // 2
    x = x[:, top : top + size, left : left + size]
    mean, std = (torch.tensor(values, device=x.device)[:, None, None] for values in (MEAN, STD))
    return (x - mean) / std
