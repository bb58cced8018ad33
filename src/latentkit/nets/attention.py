"""Attention: over pixels within a picture and from pixels to context tokens."""

import math
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from latentkit.nets.layers import Linear, bf16_on_cpu, fast_on_cpu, fused_for, group_norm, normalised, zeroed

PORTION = 1 << 21
"""Scores that `_MatrixAttention` works on at a time: few enough for the cache; half as many on the way back."""
TILE = 16
"""Width of the tiles that matrix products are fast in; Stable Diffusion's heads of 40 are filled up to it."""


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, *, causal: bool = False) -> Tensor:
    """softmax(q k^T / sqrt(d)) v: `b h n d`, `b h m d`, `b h m d -> b h n d`; `mask` is boolean `b m`.

    With `causal` (and no mask) a query sees the keys up to its own place.
    """
    if causal:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True)
    allowed = None if mask is None else mask[:, None, None, :].expand(len(q), -1, -1, -1)
    if bf16_on_cpu(q):
        return _MatrixAttention.apply(q, k, v, allowed) if torch.is_grad_enabled() else _attended(q, k, v, allowed)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=allowed)


class _MatrixAttention(torch.autograd.Function):
    """Attention of bfloat16 `b h n d` on a CPU as matrix products, a portion of the scores at a time.

    torch's own kernel takes two to six times as long there. As there, the scores are computed again on the way back,
    so that only q, k and v are kept.
    """

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, allowed: Tensor | None) -> Tensor:
        """`allowed` is boolean `b 1 1 m`."""
        ctx.save_for_backward(q, k, v, allowed)
        return _attended(q, k, v, allowed)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        """The gradients by q, k and v (Dao et al. 2022, appendix B.2)."""
        q, k, v, allowed = ctx.saved_tensors
        by_q, by_k, by_v = (_unwritten(part) for part in (q, k, v))
        scale = q.shape[3] ** -0.5
        for rows, heads, chunks in _portions(q, k, PORTION // 2):
            k_, v_ = _together(k[rows, heads] * scale), _together(v[rows, heads])
            sums: list[Tensor] = []
            for chunk in chunks:
                part = rows, heads, chunk
                q_, slope = _together(q[part]), _together(gradient[part])
                weights = _scores(q_, k_, allowed, rows).softmax(-1, dtype=torch.float32)
                by_weights = torch.bmm(slope, v_.mT).float()
                by_scores = torch._softmax_backward_data(by_weights, weights, -1, torch.float32).to(q.dtype)
                by_q[part] = torch.bmm(by_scores, k_).view_as(by_q[part])
                shares = torch.bmm(by_scores.mT, q_), torch.bmm(weights.to(v.dtype).mT, slope)
                sums = [a.float().add_(b) for a, b in zip(sums, shares)] if sums else list(shares)
            for whole, share in zip((by_k, by_v), (sums[0] * scale, sums[1])):
                whole[rows, heads] = share.view_as(whole[rows, heads])
        return by_q, by_k, by_v, None


def _attended(q: Tensor, k: Tensor, v: Tensor, allowed: Tensor | None) -> Tensor:
    """The values that each query gets, `b h n d`."""
    y, width, room = _unwritten(q), q.shape[3], q.new_empty(0)
    for rows, heads, chunks in _portions(q, k, PORTION):
        k_, v_ = _together(k[rows, heads] * width**-0.5), _together(F.pad(v[rows, heads], (0, -width % TILE)))
        for chunk in chunks:
            part = rows, heads, chunk
            q_ = _together(q[part])
            shape = *q_.shape[:2], k_.shape[1]
            room = room if len(room) else q.new_empty(math.prod(shape))  # for all portions: the first is the largest
            weights = _scores(q_, k_, allowed, rows, room[: math.prod(shape)].view(shape))
            torch.softmax(weights, -1, out=weights)  # float32 inside
            y[part] = torch.bmm(weights, v_)[..., :width].view_as(y[part])
    return y


def _unwritten(like: Tensor) -> Tensor:
    """Memory for `b h n d`, laid out as `b n h d`."""
    return torch.empty_like(like.transpose(1, 2), memory_format=torch.contiguous_format).transpose(1, 2)


def _portions(q: Tensor, k: Tensor, most: int) -> Iterator[tuple[slice, slice, list[slice]]]:
    """Rows, heads, and the chunks of queries: whole rows at a time, or heads of one, or queries of one head."""
    b, h, n, m = *q.shape[:3], k.shape[2]
    for rows in _slices(b, most // (h * n * m)):
        for heads in _slices(h, most // (n * m)):
            yield rows, heads, _slices(n, most // m)


def _slices(length: int, size: int) -> list[slice]:
    size = max(1, size)
    return [slice(start, start + size) for start in range(0, length, size)]


def _together(part: Tensor) -> Tensor:
    """`b h n d -> (b h) n d`, for products of each picture and head, which copy nothing more."""
    return part.flatten(0, 1)


def _scores(q: Tensor, scaled: Tensor, allowed: Tensor | None, rows: slice, room: Tensor | None = None) -> Tensor:
    """What the softmax is taken of, `(b h) n m`, of the queries and the scaled keys; in `room` if that is given."""
    scores = torch.bmm(q, scaled.mT, out=room)
    if allowed is not None:
        kept = allowed[rows]
        scores.unflatten(0, (len(kept), -1)).masked_fill_(~kept, float("-inf"))
    return scores


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
        self.q = Linear(width, inner, bias=qkv_bias)
        self.k = Linear(context_width or width, inner, bias=qkv_bias)
        self.v = Linear(context_width or width, inner, bias=qkv_bias)
        self.out = Linear(inner, width)

    def forward(
        self,
        x: Tensor,
        context: Tensor | None = None,
        mask: Tensor | None = None,
        *,
        causal: bool = False,
        perturbed: bool = False,
    ) -> Tensor:
        """`mask` is boolean `b m`, True where a context token counts; `causal` as in `attend`.

        `perturbed` gives each token its own value alone (the identity for an attention map: Ahn et al. 2024).
        """
        if perturbed:
            return self.out(self.v(x))
        source = x if context is None else context
        q, k, v = (
            rearrange(t, "b n (h d) -> b h n d", h=self.heads) for t in (self.q(x), self.k(source), self.v(source))
        )
        return self.out(rearrange(attend(q, k, v, mask, causal=causal), "b h n d -> b n (h d)"))


class FeedForward(nn.Module):
    """Linear to twice 4 `width`, GEGLU gate, linear back: `b n d -> b n d` (Shazeer 2020)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.project = Linear(width, 8 * width)
        self.out = Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        """The first half is the value, the second the gate."""
        if fast_on_cpu(x) and not torch.is_grad_enabled():
            (value, value_bias), (gate, gate_bias) = zip(self.project.weight.chunk(2), self.project.bias.chunk(2))
            fused = fused_for(x)
            if fused is None:
                return self.out(F.linear(x, value, value_bias).mul_(F.gelu(F.linear(x, gate, gate_bias))))
            opened = fused(x, gate, gate_bias, "gelu", [], "none")
            return self.out(fused.binary(x, opened, value, value_bias, "mul"))
        value, gate = self.project(x).chunk(2, dim=-1)
        return self.out(value * F.gelu(gate))


class TransformerBlock(nn.Module):
    """Self-attention, cross-attention, feed-forward, each on a LayerNorm and added: `b n d -> b n d`.

    Without a context width the second attention is a self-attention too, as in the released code; with `cross_only`
    the first one looks at the context too (the x4 upscaler).
    """

    def __init__(self, width: int, heads: int, context_width: int | None, *, cross_only: bool = False) -> None:
        super().__init__()
        self.cross_only = cross_only
        self.norm_self = nn.LayerNorm(width)
        self.self_attention = Attention(width, heads, context_width if cross_only else None)
        self.norm_cross = nn.LayerNorm(width)
        self.cross_attention = Attention(width, heads, context_width)
        self.norm_feed = nn.LayerNorm(width)
        self.feed_forward = FeedForward(width)

    def forward(self, x: Tensor, context: Tensor | None, mask: Tensor | None, perturbed: bool = False) -> Tensor:
        """`context` is `b m d_context` or None; `perturbed` as in `Attention`, for the self-attention."""
        if self.cross_only:
            x = x + self.self_attention(self.norm_self(x), context, mask)
        else:
            x = x + self.self_attention(self.norm_self(x), perturbed=perturbed)
        x = x + self.cross_attention(self.norm_cross(x), context, mask)
        return x + self.feed_forward(self.norm_feed(x))


class SpatialTransformer(nn.Module):
    """Pixels as tokens through `depth` transformer blocks, added to the input: `b c h w -> b c h w`.

    `linear` makes the projections linear layers (SD 2, XL) instead of 1x1 convolutions (SD 1, the 2021 models): the
    same arithmetic, another layout on disk. Source: Rombach et al. 2022, appendix E.2.1.
    """

    def __init__(
        self,
        channels: int,
        heads: int,
        depth: int,
        context_width: int | None = None,
        *,
        linear: bool = True,
        cross_only: bool = False,
    ) -> None:
        super().__init__()
        self.norm = group_norm(channels, 1e-6)
        self.linear = linear
        self.project_in = Linear(channels, channels) if linear else nn.Conv2d(channels, channels, 1)
        self.blocks = nn.ModuleList(
            TransformerBlock(channels, heads, context_width, cross_only=cross_only) for _ in range(depth)
        )
        self.project_out = zeroed(Linear(channels, channels) if linear else nn.Conv2d(channels, channels, 1))

    def forward(
        self, x: Tensor, context: Tensor | None = None, mask: Tensor | None = None, perturbed: bool = False
    ) -> Tensor:
        """`context` is `b n d`; `perturbed` as in `Attention`, for the self-attention."""
        h = normalised(self.norm, x, silu=False)
        if not self.linear:
            h = self.project_in(h)
        tokens = rearrange(h, "b c h w -> b (h w) c").contiguous()  # once, not in every norm
        if self.linear:
            tokens = self.project_in(tokens)
        for block in self.blocks:
            tokens = block(tokens, context, mask, perturbed)
        if self.linear:
            tokens = self.project_out(tokens)
        h = rearrange(tokens, "b (h w) c -> b c h w", h=x.shape[2])
        return x + (h if self.linear else self.project_out(h))


class PixelAttention(nn.Module):
    """One self-attention over pixels, added to its input: `b c h w -> b c h w`.

    The autoencoders' (one head, eps 1e-6), and that of the 2021 U-Nets without tokens (eps 1e-5).
    """

    def __init__(self, channels: int, heads: int = 1, eps: float = 1e-6) -> None:
        super().__init__()
        self.norm = group_norm(channels, eps)
        self.attention = Attention(channels, heads, qkv_bias=True)

    def forward(self, x: Tensor, perturbed: bool = False) -> Tensor:
        """Added to the input; `perturbed` as in `Attention`."""
        tokens = rearrange(normalised(self.norm, x, silu=False), "b c h w -> b (h w) c")
        tokens = self.attention(tokens, perturbed=perturbed)
        return x + rearrange(tokens, "b (h w) c -> b c h w", h=x.shape[2])
