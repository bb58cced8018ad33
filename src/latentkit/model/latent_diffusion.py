"""LatentDiffusion: first stage, conditioners and denoiser as one module. No loops, no optimiser."""

from dataclasses import dataclass, field, replace
from typing import Any, cast

from torch import nn

from latentkit.diffusion.schedule import NoiseSchedule
from latentkit.errors import InputError
from latentkit.model.conditioners import Conditioner
from latentkit.model.conditioners.label import LabelConditioner, LabelConfig
from latentkit.model.conditioners.text import TextConditioner
from latentkit.model.conditioning import Conditioning, merge
from latentkit.model.denoiser import Denoiser, PredictionName
from latentkit.model.first_stage import FirstStage
from latentkit.nets.autoencoder import AutoencoderConfig
from latentkit.nets.towers import TextEncoderConfig
from latentkit.nets.unet import UNetConfig


@dataclass(frozen=True)
class Architecture:
    """All that fixes the shape of a latent diffusion model."""

    __pydantic_config__ = {"extra": "forbid"}  # noqa: RUF012

    network: UNetConfig
    first_stage: AutoencoderConfig | None = None
    """None: the identity first stage, diffusion on pixels."""
    picture_channels: int = 3
    size: tuple[int, int] = (64, 64)
    """Height and width that it was trained at, pixels."""
    schedule: NoiseSchedule = field(default_factory=NoiseSchedule)
    prediction: PredictionName = "flow"
    text: TextEncoderConfig | None = None
    label: LabelConfig | None = None


def fit_network(architecture: Architecture) -> Architecture:
    """The architecture with the U-Net's channels and slot widths derived from the parts that feed it."""
    latent = architecture.first_stage.latent_channels if architecture.first_stage else architecture.picture_channels
    widths = [part.width for part in (architecture.text, architecture.label) if part is not None]
    if len(set(widths)) > 1:
        raise InputError(f"text and label conditioners have widths {widths}; give them the same width")
    network = replace(
        architecture.network,
        channels_in=latent,
        channels_out=latent,
        context_width=widths[0] if widths else None,
        vector_width=sum(widths) or None,
    )
    return replace(architecture, network=network)


class LatentDiffusion(nn.Module):
    """The whole model. `state` rebuilds what the architecture does not hold: tokenizer, class names."""

    def __init__(self, architecture: Architecture, state: dict[str, Any]) -> None:
        super().__init__()
        self.architecture = architecture
        self.first_stage = FirstStage(architecture.first_stage, architecture.picture_channels)
        parts: dict[str, nn.Module] = {}
        if architecture.text is not None:
            parts["text"] = TextConditioner(architecture.text, state["text"]["tokenizer"])
        if architecture.label is not None:
            parts["label"] = LabelConditioner(architecture.label, state["label"]["classes"])
        self.conditioners = nn.ModuleDict(parts)
        self.denoiser = Denoiser(architecture.network, architecture.schedule, architecture.prediction)

    def conditioner(self, name: str) -> Conditioner:
        """The conditioner called `name` ("text", "label")."""
        return cast(Conditioner, self.conditioners[name])

    def condition(self, values: dict[str, list[Any]], count: int) -> Conditioning:
        """Rows for `count` pictures from `values` by conditioner name; what is not given is absent."""
        parts = []
        for name in self.conditioners:
            conditioner = self.conditioner(name)
            parts.append(conditioner(values[name] if name in values else conditioner.absent(count)))
        return merge(parts)

    def state(self) -> dict[str, Any]:
        """What rebuilds the model besides architecture and weights."""
        return {name: self.conditioner(name).state() for name in self.conditioners}

    def latent_shape(self, height: int, width: int) -> tuple[int, int, int]:
        """`c h w` of the latent of a picture of `height` x `width` pixels; InputError unless it divides."""
        factor = self.first_stage.downsampling * 2 ** (len(self.architecture.network.multipliers) - 1)
        if height < factor or width < factor or height % factor or width % factor:
            raise InputError(
                f"size {width}x{height} does not fit this model; width and height must be multiples of {factor}",
                exit_code=2,
            )
        cell = self.first_stage.downsampling
        return self.first_stage.latent_channels, height // cell, width // cell
