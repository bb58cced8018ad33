"""CLIP's towers: text to context tokens and one projected vector, pictures to one projected vector."""

from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from latentkit.errors import InputError
from latentkit.nets.towers import TextBlock

Activation = Literal["quick_gelu", "gelu"]


@dataclass(frozen=True)
class ClipTextConfig:
    """The shape of a CLIP text tower, and which of its states are the context (Radford et al. 2021, section 2.4)."""

    __pydantic_config__ = {"extra": "forbid"}  # noqa: RUF012

    vocabulary: int = 49408
    length: int = 77
    """Tokens of a window, its start and its end included."""
    width: int = 768
    layers: int = 12
    heads: int = 12
    hidden: int | None = None
    """Width of the feed-forward; None: 4 times `width`."""
    activation: Activation = "quick_gelu"
    """OpenAI's towers were trained with "quick_gelu", OpenCLIP's with "gelu"."""
    projection: int | None = None
    """Width of the vector made of the last layer's state at the end of the text; None: no vector."""
    skip: int = 0
    """Last blocks that the context leaves out."""
    final_norm: bool = True
    """The context goes through the last LayerNorm, whichever block it comes from."""
    pad: int | None = None
    """Id behind the end of the text; None: the end token itself."""

    def __post_init__(self) -> None:
        _check("CLIP text tower", self.width, self.heads)
        if not 0 <= self.skip < self.layers:
            raise InputError(f"CLIP text tower skips {self.skip} of its {self.layers} blocks; one at least must remain")
        if self.length < 3:
            raise InputError(f"CLIP text tower has windows of {self.length} tokens; 3 are the least")


@dataclass(frozen=True)
class ClipImageConfig:
    """The shape of a CLIP image tower (a vision transformer)."""

    __pydantic_config__ = {"extra": "forbid"}  # noqa: RUF012

    size: int = 224
    """Height and width of the pictures that it sees, pixels."""
    patch: int = 14
    width: int = 1024
    layers: int = 24
    heads: int = 16
    hidden: int | None = None
    """Width of the feed-forward; None: 4 times `width`."""
    activation: Activation = "quick_gelu"
    projection: int = 768
    """Width of the vector that it makes."""

    def __post_init__(self) -> None:
        _check("CLIP image tower", self.width, self.heads)
        if self.patch < 1 or self.size % self.patch:
            raise InputError(f"CLIP image tower of {self.size} px is not a whole number of {self.patch} px patches")


def _check(what: str, width: int, heads: int) -> None:
    if heads < 1 or width % heads:
        raise InputError(f"{what} has width {width}, which is no multiple of its {heads} heads")


VIT_L_TEXT = ClipTextConfig()
"""OpenAI's ViT-L/14."""
VIT_H_TEXT = ClipTextConfig(width=1024, layers=24, heads=16, activation="gelu", projection=1024, pad=0)
"""OpenCLIP's ViT-H/14."""
VIT_BIGG_TEXT = ClipTextConfig(width=1280, layers=32, heads=20, activation="gelu", projection=1280, pad=0)
"""OpenCLIP's ViT-bigG/14."""
VIT_L_IMAGE = ClipImageConfig()
VIT_H_IMAGE = ClipImageConfig(width=1280, layers=32, activation="gelu", projection=1024)


class ClipText(nn.Module):
    """Causal pre-norm transformer over windows of tokens."""

    def __init__(self, config: ClipTextConfig) -> None:
        super().__init__()
        self.config = config
        self.token_embedding = nn.Embedding(config.vocabulary, config.width)
        nn.init.normal_(self.token_embedding.weight, std=0.02)
        self.position_embedding = nn.Parameter(torch.empty(config.length, config.width).normal_(std=0.01))
        self.blocks = nn.ModuleList(
            TextBlock(config.width, config.heads, hidden=config.hidden, activation=config.activation)
            for _ in range(config.layers)
        )
        self.norm_out = nn.LayerNorm(config.width)
        self.projection = nn.Linear(config.width, config.projection, bias=False) if config.projection else None

    def forward(
        self, ids: Int[Tensor, "b n"], end: int, skip: int = 0, learnt: Float[Tensor, "m d"] | None = None
    ) -> tuple[Float[Tensor, "b n d"], Float[Tensor, "b p"] | None]:
        """Context, and the vector where the tower has a projection.

        The vector is taken where the token `end` first stands, of all blocks whatever is skipped. (The original code
        takes the largest id, which is another place once tokens were added behind the vocabulary.) `skip` leaves out
        more blocks than the config does. Ids from the vocabulary's size on are rows of `learnt`. InputError where no
        block would remain.
        """
        config = self.config
        depth = config.layers - config.skip - skip
        if not 0 < depth <= config.layers:
            most = config.layers - config.skip - 1
            raise InputError(f"clip skip {skip} is asked for; this text tower allows 0 to {most}", exit_code=2)
        x = self._embedded(ids, learnt) + self.position_embedding[: ids.shape[1]]
        context = x
        for number, block in enumerate(self.blocks[: depth if self.projection is None else None], start=1):
            x = block(x, causal=True)
            if number == depth:
                context = x
        if config.final_norm:
            context = self.norm_out(context)
        if self.projection is None:
            return context, None
        place = (ids == end).int().argmax(1)
        return context, self.projection(self.norm_out(x[torch.arange(len(x), device=x.device), place]))

    def _embedded(self, ids: Tensor, learnt: Tensor | None) -> Tensor:
        if learnt is None:
            return self.token_embedding(ids)
        own = ids < self.config.vocabulary
        rows = learnt.to(self.token_embedding.weight)[(ids - self.config.vocabulary).clamp(min=0)]
        return torch.where(own[..., None], self.token_embedding(torch.where(own, ids, 0)), rows)


class ClipImage(nn.Module):
    """Vision transformer: patches and one class token, whose last state is projected."""

    def __init__(self, config: ClipImageConfig) -> None:
        super().__init__()
        self.config = config
        self.patches = nn.Conv2d(3, config.width, config.patch, stride=config.patch, bias=False)
        self.class_embedding = nn.Parameter(torch.empty(config.width).normal_(std=config.width**-0.5))
        places = (config.size // config.patch) ** 2 + 1
        self.position_embedding = nn.Parameter(torch.empty(places, config.width).normal_(std=config.width**-0.5))
        self.norm_in = nn.LayerNorm(config.width)
        self.blocks = nn.ModuleList(
            TextBlock(config.width, config.heads, hidden=config.hidden, activation=config.activation)
            for _ in range(config.layers)
        )
        self.norm_out = nn.LayerNorm(config.width)
        self.projection = nn.Linear(config.width, config.projection, bias=False)

    def forward(self, pixels: Float[Tensor, "b c h w"]) -> Float[Tensor, "b p"]:
        """`pixels` are of the config's size and normalised by CLIP's mean and deviation."""
        x = self.patches(pixels).flatten(2).transpose(1, 2)
        x = torch.cat([self.class_embedding.expand(len(x), 1, -1), x], dim=1) + self.position_embedding
        x = self.norm_in(x)
        for block in self.blocks:
            x = block(x)
        return self.projection(self.norm_out(x[:, 0]))
