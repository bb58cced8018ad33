"""Attention: over pixels within a picture and from pixels to context tokens."""

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from latentkit.nets.layers import group_norm, normalised, zeroed

MOST_SCORES = 1 << 18
"""Queries times keys of a head, up to which `attend` multiplies matrices: what is kept for the way back stays small."""


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """softmax(q k^T / sqrt(d)) v: `b h n d`, `b h m d`, `b h m d -> b h n d`; `mask` is boolean `b m`.

    In bfloat16 on a CPU as plain matrix products: torch's kernel takes 2 to 7 times as long there on the way back.
    """
    allowed = None if mask is None else mask[:, None, None, :]
    if q.device.type != "cpu" or q.dtype != torch.bfloat16 or q.shape[2] * k.shape[2] > MOST_SCORES:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=allowed)
    scores = (q * q.shape[3] ** -0.5) @ k.transpose(2, 3)
    if allowed is not None:
        scores = scores.masked_fill(~allowed, float("-inf"))
    return scores.softmax(-1) @ v


class Attention(nn.Module):
    """Multi-head attention, queries from `x`, keys and values from `context` (self-attention when None).

    `x` is `b n d`, `context` is `b m d_context`. q, k, v carry no bias unless `qkv_bias`.
    """

    def __init__(
        self,
        width: int,
        heads: int,
        context_width: int | None = None,
        *,
        inner: int | None = None,
        qkv_bias: bool = False,
    ) -> None:
        super().__init__()
        inner = inner or width
        self.heads = heads
        self.q = nn.Linear(width, inner, bias=qkv_bias)
        self.k = nn.Linear(context_width or width, inner, bias=qkv_bias)
        self.v = nn.Linear(context_width or width, inner, bias=qkv_bias)
        self.out = nn.Linear(inner, width)

    def forward(self, x: Tensor, context: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
        """`mask` is boolean `b m`, True where a context token counts."""
        source = x if context is None else context
        q, k, v = (
            rearrange(t, "b n (h d) -> b h n d", h=self.heads) for t in (self.q(x), self.k(source), self.v(source))
        )
        return self.out(rearrange(attend(q, k, v, mask), "b h n d -> b n (h d)"))


class FeedForward(nn.Module):
    """Linear to twice 4 `width`, GEGLU gate, linear back: `b n d -> b n d` (Shazeer 2020)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.project = nn.Linear(width, 8 * width)
        self.out = nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        """The first half is the value, the second the gate."""
        value, gate = self.project(x).chunk(2, dim=-1)
        return self.out(value * F.gelu(gate))


class TransformerBlock(nn.Module):
    """Self-attention, cross-attention, feed-forward, each on a LayerNorm and added: `b n d -> b n d`.

    Without a context width the second attention is a self-attention too, as in the released code.
    """

    def __init__(self, width: int, heads: int, context_width: int | None) -> None:
        super().__init__()
        self.norm_self = nn.LayerNorm(width)
        self.self_attention = Attention(width, heads)
        self.norm_cross = nn.LayerNorm(width)
        self.cross_attention = Attention(width, heads, context_width)
        self.norm_feed = nn.LayerNorm(width)
        self.feed_forward = FeedForward(width)

    def forward(self, x: Tensor, context: Tensor | None, mask: Tensor | None) -> Tensor:
        """`context` is `b m d_context` or None."""
        x = x + self.self_attention(self.norm_self(x))
        x = x + self.cross_attention(self.norm_cross(x), context, mask)
        return x + self.feed_forward(self.norm_feed(x))


class SpatialTransformer(nn.Module):
    """Pixels as tokens through `depth` transformer blocks, added to the input: `b c h w -> b c h w`.

    `linear` makes the projections linear layers (SD 2, XL) instead of 1x1 convolutions (SD 1, the 2021 models): the
    same arithmetic, another layout on disk. Source: Rombach et al. 2022, appendix E.2.1.
    """

    def __init__(
        self, channels: int, heads: int, depth: int, context_width: int | None = None, *, linear: bool = True
    ) -> None:
        super().__init__()
        self.norm = group_norm(channels, 1e-6)
        self.linear = linear
        self.project_in = nn.Linear(channels, channels) if linear else nn.Conv2d(channels, channels, 1)
        self.blocks = nn.ModuleList(TransformerBlock(channels, heads, context_width) for _ in range(depth))
        self.project_out = zeroed(nn.Linear(channels, channels) if linear else nn.Conv2d(channels, channels, 1))

    def forward(self, x: Tensor, context: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
        """`context` is `b n d`."""
        h = normalised(self.norm, x, silu=False)
        if not self.linear:
            h = self.project_in(h)
        tokens = rearrange(h, "b c h w -> b (h w) c")
        if self.linear:
            tokens = self.project_in(tokens)
        for block in self.blocks:
            tokens = block(tokens, context, mask)
        if self.linear:
            tokens = self.project_out(tokens)
        h = rearrange(tokens, "b (h w) c -> b c h w", h=x.shape[2])
        return x + (h if self.linear else self.project_out(h))


class PixelAttention(nn.Module):
    """One single-head self-attention over pixels, the autoencoder's middle: `b c h w -> b c h w`."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = group_norm(channels, 1e-6)
        self.attention = Attention(channels, 1, qkv_bias=True)

    def forward(self, x: Tensor) -> Tensor:
        """Added to the input."""
        tokens = self.attention(rearrange(normalised(self.norm, x, silu=False), "b c h w -> b (h w) c"))
        return x + rearrange(tokens, "b (h w) c -> b c h w", h=x.shape[2])
