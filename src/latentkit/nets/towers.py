"""Text encoder: token ids to context tokens and one pooled vector."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from latentkit.errors import InputError
from latentkit.nets.attention import Attention


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


class TextBlock(nn.Module):
    """Pre-norm self-attention and a GELU feed-forward of 4 times the width: `b n d -> b n d`."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norm_attention = nn.LayerNorm(width)
        self.attention = Attention(width, heads, qkv_bias=True)
        self.norm_feed = nn.LayerNorm(width)
        self.feed_in = nn.Linear(width, 4 * width)
        self.feed_out = nn.Linear(4 * width, width)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        """`mask` is boolean `b n`, True where a token counts."""
        h = self.norm_attention(x)
        x = x + self.attention(h, h, mask)
        return x + self.feed_out(F.gelu(self.feed_in(self.norm_feed(x))))


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
