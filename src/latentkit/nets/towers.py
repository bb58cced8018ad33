"""Text encoders: one trained jointly with the U-Net, and that of the 2021 text models; CLIP's are in `clip.py`."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from latentkit.errors import InputError
from latentkit.nets.attention import Attention
from latentkit.nets.layers import Linear


def quick_gelu(x: Tensor) -> Tensor:
    """x sigmoid(1.702 x), as OpenAI's CLIP computes GELU."""
    return x * torch.sigmoid(1.702 * x)


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"gelu": F.gelu, "quick_gelu": quick_gelu}


@dataclass(frozen=True)
class TextEncoderConfig:
    """The shape of a text encoder trained jointly with the U-Net (Rombach et al. 2022, appendix E.2.1)."""

    __pydantic_config__ = {"extra": "forbid"}  # noqa: RUF012

    vocabulary: int = 4096
    """Token count; the tokenizer's own size wins where a tokenizer is trained."""
    length: int = 24
    """Tokens per caption: longer ones are cut, shorter ones padded."""
    width: int = 256
    layers: int = 4
    heads: int = 4

    def __post_init__(self) -> None:
        if self.width % self.heads:
            raise InputError(f"text encoder width {self.width} is no multiple of its {self.heads} heads")

    @property
    def context_width(self) -> int:
        """Width of the context tokens that it makes."""
        return self.width

    @property
    def vector_width(self) -> int:
        """Width of the vector that it makes."""
        return self.width


class TextBlock(nn.Module):
    """Pre-norm self-attention and a feed-forward (4 times the width unless `hidden`), each added: `b n d -> b n d`.

    `inner` is the width of all heads together where it is not `width`; q, k, v then carry no bias (the 2021 encoder).
    """

    def __init__(
        self, width: int, heads: int, *, hidden: int | None = None, activation: str = "gelu", inner: int | None = None
    ) -> None:
        super().__init__()
        self.activation = ACTIVATIONS[activation]
        self.norm_attention = nn.LayerNorm(width)
        self.attention = Attention(width, heads, inner=inner, qkv_bias=inner is None)
        self.norm_feed = nn.LayerNorm(width)
        self.feed_in = Linear(width, hidden or 4 * width)
        self.feed_out = Linear(hidden or 4 * width, width)

    def forward(self, x: Tensor, mask: Tensor | None = None, *, causal: bool = False) -> Tensor:
        """`mask` is boolean `b n`, True where a token counts; `causal` hides from a token those behind it."""
        h = self.norm_attention(x)
        x = x + self.attention(h, h, mask, causal=causal)
        return x + self.feed_out(self.activation(self.feed_in(self.norm_feed(x))))


class TextEncoder(nn.Module):
    """Bidirectional transformer: ids `b n` to (context `b n d`, vector `b d`); id 0 is padding."""

    def __init__(self, config: TextEncoderConfig) -> None:
        super().__init__()
        self.config = config
        self.token_embedding = nn.Embedding(config.vocabulary, config.width)
        self.position_embedding = nn.Parameter(torch.empty(config.length, config.width).normal_(std=0.02))
        nn.init.normal_(self.token_embedding.weight, std=0.02)
        self.blocks = nn.ModuleList(TextBlock(config.width, config.heads) for _ in range(config.layers))
        self.norm_out = nn.LayerNorm(config.width)

    def forward(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """The vector is the mean of the context over tokens that are not padding."""
        mask = ids != 0
        x = self.token_embedding(ids) + self.position_embedding
        for block in self.blocks:
            x = block(x, mask)
        context = self.norm_out(x)
        weight = mask.to(context.dtype)[:, :, None]
        return context, (context * weight).sum(1) / weight.sum(1)


@dataclass(frozen=True)
class BertTextConfig:
    """The shape of the 2021 models' encoder of BERT's tokens, or of layout tokens (Rombach et al. 2022, table 17)."""

    __pydantic_config__ = {"extra": "forbid"}  # noqa: RUF012

    vocabulary: int = 30522
    length: int = 77
    width: int = 1280
    layers: int = 32
    heads: int = 8
    head_width: int = 64

    @property
    def context_width(self) -> int:
        """Width of the context tokens that it makes."""
        return self.width

    @property
    def vector_width(self) -> int:
        """It makes no vector."""
        return 0


class BertText(nn.Module):
    """Bidirectional pre-norm transformer without a mask, padding seen like any token: ids `b n -> b n d`."""

    def __init__(self, config: BertTextConfig) -> None:
        super().__init__()
        self.config = config
        self.token_embedding = nn.Embedding(config.vocabulary, config.width)
        self.position_embedding = nn.Parameter(torch.empty(config.length, config.width).normal_(std=0.02))
        nn.init.normal_(self.token_embedding.weight, std=0.02)
        self.blocks = nn.ModuleList(
            TextBlock(config.width, config.heads, inner=config.heads * config.head_width) for _ in range(config.layers)
        )
        self.norm_out = nn.LayerNorm(config.width)

    def forward(self, ids: Tensor) -> Tensor:
        """`n` at most the config's length."""
        x = self.token_embedding(ids) + self.position_embedding[: ids.shape[1]]
        for block in self.blocks:
            x = block(x)
        return self.norm_out(x)
