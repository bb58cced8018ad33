"""The perceptual part of the first stage's loss: its network from known weights, or one trained on the pictures.

Our own network learns, without labels, to repair spoilt pictures: its features then hold what pictures of this kind
are made of. No statistic of the batch enters, so that any division of a batch is one run.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, Self

import torch
import torch.nn.functional as F
from pydantic import BaseModel, ConfigDict, Field, model_validator
from torch import Tensor, nn

from latentkit.diffusion.noise import keyed_normal, keyed_uniform
from latentkit.errors import InputError
from latentkit.nets.perceptual import OwnTrunk, PerceptualDistance, load_heads, load_trunk

HOLE, HOLES = 8, 1 / 3
"""Side in pixels and share of the blocks that are left out."""

RELEASED = {"vgg16": ("vgg16-397923af.pth", "vgg.pth"), "alexnet": ("alexnet-owt-7be5be79.pth", "alex.pth")}
"""Files of the trunk and of LPIPS's layers, as they are released."""


class Perceptual(BaseModel):
    """Which network compares pictures as a person would, and how much that counts."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    weight: float = Field(default=0.5, gt=0)
    network: Literal["own", "vgg16", "alexnet"] = "own"
    """`own` is trained on the pictures before the autoencoder is."""
    weights: str | None = None
    """A file of torchvision's state dict of that network."""
    heads: str | None = None
    """A file of LPIPS's linear layers for it."""
    steps: int = Field(default=1000, ge=1)
    """How long `own` is trained."""

    @model_validator(mode="after")
    def _files(self) -> Self:
        if (self.network == "own") != (self.weights is None) or (self.network == "own") != (self.heads is None):
            raise ValueError(
                f"network {self.network} takes {'no' if self.network == 'own' else 'both'} weights and heads"
            )
        return self


def read_tensors(path: str | Path) -> dict[str, Tensor]:
    """The named tensors of a safetensors file, or of a pickle that holds nothing else; InputError where it does not."""
    file = Path(path)
    if not file.is_file():
        raise InputError(f"no file {str(path)!r}", exit_code=2)
    try:
        if file.suffix == ".safetensors":
            from safetensors.torch import load_file

            found: Any = load_file(file)
        else:
            found = torch.load(file, map_location="cpu", weights_only=True)
    except Exception:  # what the readers say of other files is of their own insides
        said = "give a state dict as torch.save writes it, or a .safetensors file"
        raise InputError(f"{path} cannot be read as weights; {said}") from None
    if not isinstance(found, Mapping) or not all(isinstance(value, Tensor) for value in found.values()):
        raise InputError(f"{path} holds something other than named tensors; give a state dict")
    return dict(found)


def check_files(settings: Perceptual, key: str) -> None:
    """InputError where a file of the settings, which stand at `key` of a recipe, is not there."""
    if settings.weights is None or settings.heads is None:
        return
    trunk, heads = RELEASED[settings.network]
    sources = {
        "weights": f"torchvision's {settings.network}, {trunk} of download.pytorch.org/models",
        "heads": f"LPIPS's layers for it, {heads} of lpips/weights/v0.1 in github.com/richzhang/PerceptualSimilarity",
    }
    for name, source in sources.items():
        path = getattr(settings, name)
        if not Path(path).is_file():
            raise InputError(
                f"{key}.{name}: no file {path!r}; it is {source}, which you bring. To train without: "
                f"{key}='{{network: own}}', which learns from your pictures first, or {key}=null",
                exit_code=2,
            )


def read_distance(settings: Perceptual) -> PerceptualDistance:
    """LPIPS from the files that `settings` names; errors as `load_trunk`."""
    assert settings.network != "own"
    assert settings.weights is not None
    assert settings.heads is not None
    distance = PerceptualDistance(load_trunk(settings.network, read_tensors(settings.weights), settings.weights))
    load_heads(distance, read_tensors(settings.heads), settings.heads)
    return distance.requires_grad_(False)


class FeatureObjective:
    """From spoilt pictures, every stage tells the clean picture at its own resolution (Vincent et al. 2010)."""

    def __init__(self, trunk: OwnTrunk, seed: int) -> None:
        self.trunk = trunk
        self.seed = seed
        channels = trunk.config.picture_channels
        self.tell = nn.ModuleList(nn.Conv2d(width, channels, 1) for width in trunk.widths)
        self.module: nn.Module = nn.ModuleDict({"trunk": trunk, "tell": self.tell})

    def turns(self) -> dict[str, list[tuple[str, nn.Parameter]]]:
        """All parameters, one optimiser."""
        return {"features": list(self.module.named_parameters())}

    def loss(self, turn: str, batch: dict[str, Any], shared: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        """The mean over stages of squared errors; what is spoilt is keyed by (seed, draw)."""
        clean = batch["pixels"]
        found = self.trunk(self._spoilt(clean, [int(draw) for draw in batch["draw"]]))
        errors = []
        for number, (features, tell) in enumerate(zip(found, self.tell, strict=True)):
            target = F.avg_pool2d(clean, 2**number, ceil_mode=True, count_include_pad=False)
            size = [min(sides) for sides in zip(features.shape[2:], target.shape[2:], strict=True)]
            told = tell(features).float()[:, :, : size[0], : size[1]]
            errors.append((told - target[:, :, : size[0], : size[1]]).square().mean())
        loss = torch.stack(errors).mean()
        return loss, {"denoising": loss.detach()}

    def _spoilt(self, clean: Tensor, draws: list[int]) -> Tensor:
        """Noise of deviation up to 1, and a third of the blocks of 8x8 gray."""
        _, channels, height, width = clean.shape
        noise, kept = [], []
        for draw in draws:
            level = float(keyed_uniform((1,), self.seed, "level", draw))
            noise.append(level * keyed_normal((channels, height, width), self.seed, "spoilt", draw))
            blocks = keyed_uniform((1, -(-height // HOLE), -(-width // HOLE)), self.seed, "holes", draw) > HOLES
            kept.append(blocks.repeat_interleave(HOLE, 1).repeat_interleave(HOLE, 2)[:, :height, :width])
        return (clean + torch.stack(noise).to(clean)) * torch.stack(kept).to(clean)
