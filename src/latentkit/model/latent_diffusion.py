"""LatentDiffusion: first stage, conditioners and denoiser as one module. No loops, no optimiser."""

import copy
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, cast

from torch import nn

from latentkit.diffusion.schedule import NoiseSchedule
from latentkit.errors import InputError
from latentkit.model.conditioners import Conditioner
from latentkit.model.conditioners.bert import BertConditioner
from latentkit.model.conditioners.clip import ClipConditioner, ClipConfig
from latentkit.model.conditioners.image import ImageConditioner, ImageConfig
from latentkit.model.conditioners.label import LabelConditioner, LabelConfig
from latentkit.model.conditioners.layout import LayoutConditioner
from latentkit.model.conditioners.map import MapConditioner, MapConfig
from latentkit.model.conditioners.numbers import NumbersConditioner, NumbersConfig
from latentkit.model.conditioners.text import TextConditioner
from latentkit.model.conditioning import Conditioning, merge
from latentkit.model.denoiser import ConsistencyConfig, Denoiser, PredictionName
from latentkit.model.first_stage import FirstStage, FirstStageConfig
from latentkit.nets.towers import BertTextConfig, TextEncoderConfig
from latentkit.nets.unet import UNetConfig

CONDITIONERS: dict[str, tuple[str, Callable[..., nn.Module]]] = {
    "text": ("text", TextConditioner),
    "clip": ("text", ClipConditioner),
    "bert": ("text", BertConditioner),
    "label": ("label", LabelConditioner),
    "numbers": ("numbers", NumbersConditioner),
    "image": ("image", ImageConditioner),
    "layout": ("layout", LayoutConditioner),
    "map": ("map", MapConditioner),
}
"""Fields of `Architecture`: what the conditioner is called in the model, and what makes it of config and state.

Vectors stand side by side in this order.
"""


@dataclass(frozen=True)
class Architecture:
    """All that fixes the shape of a latent diffusion model."""

    __pydantic_config__ = {"extra": "forbid"}  # noqa: RUF012

    network: UNetConfig
    first_stage: FirstStageConfig | None = None
    """None: the identity first stage, diffusion on pixels."""
    picture_channels: int = 3
    concat_channels: int = 0
    """Channels of the concat slot, beside the latent's: a mask and a masked picture, depth, a small picture.

    Those that a semantic map makes are not among them.
    """
    size: tuple[int, int] = (64, 64)
    """Height and width that it was trained at, pixels."""
    schedule: NoiseSchedule = field(default_factory=NoiseSchedule)
    prediction: PredictionName = "flow"
    learned_variance: bool = False
    """The network says the variance of a step too (improved DDPM): its output has twice the latent's channels."""
    consistency: ConsistencyConfig | None = None
    searched: tuple[tuple[float, ...], ...] = ()
    """Falling noise levels found on this model, one list for each number of steps: the spacing "searched"."""
    text: TextEncoderConfig | None = None
    label: LabelConfig | None = None
    clip: ClipConfig | None = None
    """CLIP text towers in the place of `text`."""
    bert: BertTextConfig | None = None
    """The 2021 models' text transformer in the place of `text`."""
    numbers: NumbersConfig | None = None
    image: ImageConfig | None = None
    layout: BertTextConfig | None = None
    """The transformer that reads labelled boxes."""
    map: MapConfig | None = None

    def __post_init__(self) -> None:
        given = [name for name in self.conditions() if CONDITIONERS[name][0] == "text"]
        if len(given) > 1:
            raise InputError(f"a model has one text encoder, this one {' and '.join(given)}; keep one of them")
        cell = self.first_stage.downsampling if self.first_stage else 1
        if self.map and self.map.cell != cell:
            raise InputError(
                f"its semantic map has cells of {self.map.cell} pixels, its latents of {cell}; make them equal"
            )

    def conditions(self) -> dict[str, Any]:
        """The configs of its conditioners, by field."""
        fields = {name: getattr(self, name) for name in CONDITIONERS}
        return {name: config for name, config in fields.items() if config is not None}

    @property
    def beside(self) -> int:
        """All channels of the concat slot."""
        return self.concat_channels + (self.map.channels if self.map else 0)

    @property
    def distilled(self) -> bool:
        """Guidance is inside of the network, which is told its scale."""
        return self.consistency is not None and self.consistency.guidance_width is not None

    def towers(self) -> list[Any]:
        """The configs of the transformers in its conditioners; each has `layers`."""
        towers: list[Any] = [self.text, self.bert, self.layout, *(self.clip.towers if self.clip else ())]
        towers.append(self.image and self.image.tower)
        return [tower for tower in towers if tower is not None]


def fit_network(architecture: Architecture) -> Architecture:
    """The architecture with the U-Net's channels and slot widths derived from the parts that feed it."""
    latent = architecture.first_stage.latent_channels if architecture.first_stage else architecture.picture_channels
    parts = architecture.conditions().values()
    contexts = [part.context_width for part in parts if part.context_width]
    if len(set(contexts)) > 1:
        raise InputError(f"conditioners make contexts of widths {contexts}; give them the same width")
    vector = sum(part.vector_width for part in parts)
    network = replace(
        architecture.network,
        channels_in=latent + architecture.beside,
        channels_out=latent * (1 + architecture.learned_variance),
        context_width=contexts[0] if contexts else None,
        vector_width=None if architecture.network.classes else vector or None,
    )
    return replace(architecture, network=network)


class LatentDiffusion(nn.Module):
    """The whole model. `state` rebuilds what the architecture does not hold: tokenizer, class names."""

    def __init__(self, architecture: Architecture, state: dict[str, Any]) -> None:
        super().__init__()
        self.architecture = architecture
        self.first_stage = FirstStage(architecture.first_stage, architecture.picture_channels)
        parts: dict[str, nn.Module] = {}
        for kind, config in architecture.conditions().items():
            name, make = CONDITIONERS[kind]
            parts[name] = make(config, **state.get(name, {}))
        self.conditioners = nn.ModuleDict(parts)
        self.denoiser = Denoiser(
            architecture.network,
            architecture.schedule,
            architecture.prediction,
            architecture.learned_variance,
            architecture.consistency,
        )

    def conditioner(self, name: str) -> Conditioner:
        """The conditioner called `name` (see `CONDITIONERS`)."""
        return cast(Conditioner, self.conditioners[name])

    def condition(self, values: dict[str, list[Any]], count: int) -> Conditioning:
        """Rows for `count` pictures from `values` by conditioner name; what is not given is absent.

        Errors: InputError for values of a conditioner that this model does not have.
        """
        for name, given in values.items():
            if name not in self.conditioners and any(given):
                takes = ", ".join(self.conditioners) or "no condition at all"
                raise InputError(f"this model has no conditioner {name!r}; it takes: {takes}", exit_code=2)
        parts = []
        for name in self.conditioners:
            conditioner = self.conditioner(name)
            part = conditioner(values[name] if name in values else conditioner.absent(count))
            parts.append(part.to(self.first_stage.latent_mean.device))
        return merge(parts)

    def state(self) -> dict[str, Any]:
        """What rebuilds the model besides architecture and weights."""
        return {name: self.conditioner(name).state() for name in self.conditioners}

    def with_first_stage(self, first_stage: FirstStage) -> "LatentDiffusion":
        """The same model, of which all else is shared, with another first stage."""
        other = copy.copy(self)
        other._modules = self._modules | {"first_stage": first_stage}
        config = first_stage.autoencoder.config if first_stage.autoencoder else None
        other.architecture = replace(self.architecture, first_stage=config)
        return other

    @property
    def multiple(self) -> int:
        """What height and width of a picture must be multiples of, pixels."""
        return self.first_stage.downsampling * 2 ** (len(self.architecture.network.multipliers) - 1)

    def latent_shape(self, height: int, width: int) -> tuple[int, int, int]:
        """`c h w` of the latent of a picture of `height` x `width` pixels; InputError unless it divides."""
        factor = self.multiple
        if height < factor or width < factor or height % factor or width % factor:
            raise InputError(
                f"size {width}x{height} does not fit this model; width and height must be multiples of {factor}",
                exit_code=2,
            )
        cell = self.first_stage.downsampling
        return self.first_stage.latent_channels, height // cell, width // cell
