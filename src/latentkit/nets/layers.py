"""The blocks that both networks are made of: norms, residual blocks, resampling, time embedding."""

import math
from collections.abc import Iterator
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import forward_ad

PORTION = 1 << 19
"""Elements that `_ChannelsLastNorm` works on at a time."""


def _fused() -> dict[torch.dtype, Any]:
    """oneDNN's linear layer, and what is done to its result in one pass, without a gradient, by type.

    Not where torch was built without it, or the machine has no instructions for it.
    """
    own = torch.ops.mkldnn
    if not (torch.backends.mkldnn.is_available() and hasattr(own, "_linear_pointwise")):
        return {}
    types = [torch.float32] + [torch.bfloat16] * own._is_mkldnn_bf16_supported()
    return dict.fromkeys(types, own._linear_pointwise)


FUSED = _fused()


def group_norm(channels: int, eps: float) -> nn.GroupNorm:
    """GroupNorm of 32 groups, or of the largest power of two that divides `channels`."""
    return nn.GroupNorm(math.gcd(32, channels), channels, eps=eps)


def bf16_on_cpu(x: Tensor) -> bool:
    """Whether `x` goes the ways that are faster for bfloat16 on a CPU."""
    return x.device.type == "cpu" and x.dtype == torch.bfloat16


def fast_on_cpu(x: Tensor) -> bool:
    """Whether `x` goes the ways that are faster for both types on a CPU; traced, compiled or forward-differentiated,
    it goes the plain one."""
    followed = torch.jit.is_tracing() or torch.compiler.is_compiling()  # type: ignore[attr-defined]
    followed = followed or forward_ad._current_level >= 0
    return x.device.type == "cpu" and x.dtype in (torch.float32, torch.bfloat16) and not followed


def fused_for(x: Tensor) -> Any:
    """What `FUSED` has for `x`; None where a gradient or autocast's type is asked for."""
    asked = torch.is_grad_enabled() or torch.is_autocast_enabled("cpu")
    return FUSED.get(x.dtype) if fast_on_cpu(x) and not asked else None


ONEDNN_PRODUCTS = 1 << 24
"""Multiplications of each picture in a linear layer from which on oneDNN's pays in float32."""


class Linear(nn.Linear):
    """torch's; of many tokens `b n d` in float32 on a CPU oneDNN's, which takes some three quarters of the time."""

    def forward(self, x: Tensor) -> Tensor:
        """`... d_in -> ... d`."""
        if x.ndim == 3 and x.dtype == self.weight.dtype == torch.float32:
            fused = fused_for(x) if x.shape[1] * self.in_features * self.out_features >= ONEDNN_PRODUCTS else None
            if fused is not None:
                return fused(x, self.weight, self.bias, "none", [], "none")
        return super().forward(x)


def laid_out(x: Tensor) -> Tensor:
    """`x` as convolutions are fastest on it: channels last in bfloat16 on a CPU, elsewhere as it came."""
    return x.contiguous(memory_format=torch.channels_last) if bf16_on_cpu(x) else x


def zeroed(module: nn.Module) -> nn.Module:
    """`module` with its parameters at zero: a residual branch that starts as nothing."""
    for parameter in module.parameters():
        nn.init.zeros_(parameter)
    return module


def normalised(
    norm: nn.GroupNorm, x: Tensor, modulation: tuple[Tensor, Tensor] | None = None, *, silu: bool = True
) -> Tensor:
    """`norm`, then scale and shift of `modulation` (`b c` each, scale around 0), then SiLU: `b c h w -> b c h w`."""
    channels_last = x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()
    if bf16_on_cpu(x) and channels_last:
        weight, bias = norm.weight.float()[None], norm.bias.float()[None]
        if modulation is not None:
            scale, shift = (part.float() for part in modulation)
            weight, bias = weight * (1 + scale), torch.addcmul(shift, bias, 1 + scale)
        weight, bias = (part.expand(len(x), -1).unflatten(1, (norm.num_groups, -1)) for part in (weight, bias))
        if not torch.is_grad_enabled():
            return _forward(x, weight, bias, norm.eps, silu)[0]
        return _ChannelsLastNorm.apply(x, weight, bias, norm.eps, silu)
    h = norm(x)
    if modulation is not None:
        scale, shift = (part[:, :, None, None] for part in modulation)
        h = torch.addcmul(shift, h, 1 + scale)
    return F.silu(h) if silu else h


class _ChannelsLastNorm(torch.autograd.Function):
    """GroupNorm, with SiLU if asked for, of a channels-last bfloat16 `b c h w` on a CPU; weight and bias `b g c/g`.

    torch's own kernel takes two to ten times as long for the gradient, and where the mean is many times the deviation,
    as in nearly plain pictures, its variance is wrong. This computes in float32, some pictures or pixels at a time, and
    once more on the way back, so that only the input is kept. (Functions can be made in no other way than by class.)
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, eps: float, silu: bool) -> Tensor:
        """See `_forward`."""
        y, statistics = _forward(x, weight, bias, eps, silu)
        ctx.save_for_backward(x, weight, bias, *statistics)
        ctx.silu = silu
        return y

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        """The gradients by x, weight and bias."""
        x, weight, bias, *statistics = ctx.saved_tensors
        by_x, by_weight, by_bias = torch.empty_like(x), torch.empty_like(weight), torch.empty_like(weight)

        def of_part(part: Tensor, slope: Tensor) -> tuple[Tensor, Tensor]:
            """Pixels and the gradient by what went into SiLU, float32."""
            pixels, slope = part.float(), slope.float()
            if ctx.silu:
                z = torch.addcmul(shift, pixels, scale)
                torch.ops.aten.silu_backward.grad_input(slope, z, grad_input=slope)
            return pixels, slope

        rows = _rows(x, gradient, by_x, weight, bias, by_weight, by_bias)
        for (x_, slope_, by_x_, weight_, bias_, by_weight_, by_bias_), (mean, rate) in zip(rows, statistics):
            scale = rate * weight_
            shift = torch.addcmul(bias_, mean, scale, value=-1).flatten(1)[:, None]
            scale = scale.flatten(1)[:, None]
            sums = []
            for part, slope in _pieces(x_, slope_):
                pixels, slope = of_part(part, slope)
                sums.append(torch.stack([slope.sum(1), (slope * pixels).sum(1)]))
            total = _total(sums)
            level, tilt = total.unflatten(2, weight_.shape[1:])
            a, b = _group_means(total * weight_.flatten(1), weight_, x_)
            linear = (a * mean - b) * rate**3
            constant = -linear * mean - a * rate
            linear, constant = (part.expand_as(weight_).flatten(1)[:, None] for part in (linear, constant))
            for part, given, written in _pieces(x_, slope_, by_x_):
                pixels, slope = (pixels, slope) if part.shape == x_.shape else of_part(part, given)
                pixels = torch.addcmul(constant, pixels, linear, out=pixels)
                written.copy_(pixels.addcmul_(slope, scale))
            torch.mul(tilt - level * mean, rate, out=by_weight_)
            by_bias_.copy_(level)
        return by_x, by_weight, by_bias, None, None


def _forward(x: Tensor, weight: Tensor, bias: Tensor, eps: float, silu: bool) -> tuple[Tensor, list[Tensor]]:
    """(x - mean) / std * weight + bias, mean and std of a group's channels and pixels (Wu & He 2018).

    Besides, mean and 1 / std of some pictures at a time, `2 b g 1`.
    """
    y, statistics = torch.empty_like(x), []
    for x_, y_, weight_, bias_ in _rows(x, y, weight, bias):
        sums = []
        for (part,) in _pieces(x_):
            pixels = part.float()
            sums.append(torch.stack([pixels.sum(1), (pixels * pixels).sum(1)]))
        mean, square = _group_means(_total(sums), weight_, x_)
        rate = torch.addcmul(square, mean, mean, value=-1).clamp_min_(0).add_(eps).rsqrt_()
        scale = rate * weight_
        shift = torch.addcmul(bias_, mean, scale, value=-1).flatten(1)[:, None]
        scale = scale.flatten(1)[:, None]
        for part, written in _pieces(x_, y_):
            pixels = pixels if part.shape == x_.shape else part.float()
            z = torch.addcmul(shift, pixels, scale, out=pixels)
            written.copy_(F.silu(z, inplace=True) if silu else z)
        statistics.append(torch.stack([mean, rate]))
    return y, statistics


def _total(parts: list[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.stack(parts).sum(0)


def _group_means(sums: Tensor, table: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    """Two sums over pixels, `2 b c`, as means over pixels and channels of each group, `b g 1` each."""
    first, second = sums.unflatten(2, table.shape[1:]).mean(3, keepdim=True).div_(x.shape[1])
    return first, second


def _rows(*tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Some rows of each at a time, so few that float32 copies stay in the cache; `b c h w` comes as `b (h w) c`."""
    rows = max(1, PORTION // tensors[0][0].numel())
    tables = (t.permute(0, 2, 3, 1).flatten(1, 2) if t.ndim == 4 else t for t in tensors)
    return zip(*(table.split(rows) for table in tables), strict=True)


def _pieces(*tables: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Some pixels of each `b n c` at a time, for the same reason; all of them where they are few."""
    pixels = max(1, PORTION // (tables[0].shape[0] * tables[0].shape[2]))
    return zip(*(table.split(pixels, 1) for table in tables), strict=True)


class ResidualBlock(nn.Module):
    """norm, SiLU, conv, twice, with the embedding added (or as scale and shift) between: `b c_in h w -> b c_out h w`.

    `embedding_width` None makes it the autoencoder's block (no embedding). `resample` "down" halves height and width
    between norm and convolution, "up" doubles them. Source: Dhariwal & Nichol 2021, B.
    """

    def __init__(
        self,
        c_in: int,
        c_out: int,
        embedding_width: int | None = None,
        *,
        scale_shift: bool = False,
        dropout: float = 0.0,
        eps: float = 1e-5,
        resample: Literal["down", "up"] | None = None,
    ) -> None:
        super().__init__()
        self.scale_shift = scale_shift
        self.resample = resample
        self.norm_in = group_norm(c_in, eps)
        self.conv_in = nn.Conv2d(c_in, c_out, 3, padding=1)
        if embedding_width is not None:
            self.embedding = nn.Linear(embedding_width, c_out * (2 if scale_shift else 1))
        self.norm_out = group_norm(c_out, eps)
        self.dropout = nn.Dropout(dropout)
        self.conv_out = zeroed(nn.Conv2d(c_out, c_out, 3, padding=1))
        self.skip: nn.Module = nn.Identity() if c_in == c_out else nn.Conv2d(c_in, c_out, 1)

    def forward(self, x: Tensor, embedding: Tensor | None = None, size: tuple[int, int] | None = None) -> Tensor:
        """`embedding` is `b d`, already through SiLU; `size` is what "up" gives where the level below it was odd."""
        h = normalised(self.norm_in, x)
        if self.resample is not None:
            h, x = _resampled(h, self.resample, size), _resampled(x, self.resample, size)
        h = self.conv_in(h)
        if embedding is None:
            h = normalised(self.norm_out, h)
        elif self.scale_shift:
            scale, shift = self.embedding(embedding).chunk(2, dim=1)
            h = normalised(self.norm_out, h, (scale, shift))
        else:
            h = normalised(self.norm_out, h + self.embedding(embedding)[:, :, None, None])
        return torch.add(self.skip(x), self.conv_out(self.dropout(h)))


def _resampled(x: Tensor, direction: str, size: tuple[int, int] | None) -> Tensor:
    """Means of 2x2 pixels (fewer at an odd edge), or each pixel four times."""
    if direction == "down":
        return F.avg_pool2d(x, 2, ceil_mode=True, count_include_pad=False)
    h, w = x.shape[2:]
    return F.interpolate(x, size or (2 * h, 2 * w), mode="nearest")


class Downsample(nn.Module):
    """Halve height and width by a strided 3x3 convolution.

    `asymmetric` pads right and below only, as the released autoencoders do; the U-Net pads all sides.
    """

    def __init__(self, channels: int, *, asymmetric: bool = False) -> None:
        super().__init__()
        self.asymmetric = asymmetric
        self.conv = nn.Conv2d(channels, channels, 3, stride=2, padding=0 if asymmetric else 1)

    def forward(self, x: Tensor) -> Tensor:
        """`b c h w -> b c h/2 w/2`."""
        return self.conv(F.pad(x, (0, 1, 0, 1)) if self.asymmetric else x)


MERGED_CELLS = {torch.float32: 256, torch.bfloat16: 1024}
"""Cells from which on merging the kernel of an upsampling pays on a CPU: of each picture in float32, where no picture
depends on how many others are drawn with it; of all in bfloat16."""
MERGING = torch.tensor([[0, 0, 1], [0, 1, 1], [1, 1, 0], [1, 0, 0]], dtype=torch.float32, device="cpu")
"""Three taps on doubled pixels as four on the pixels themselves."""


class Upsample(nn.Module):
    """Double height and width: nearest neighbour, then a 3x3 convolution.

    Each 2x2 pixels of the doubled picture are one, so that a transposed 4x4 convolution does the same with 4/9 of the
    multiplications.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor, size: tuple[int, int] | None = None) -> Tensor:
        """`b c h w -> b c 2h 2w`, or to `size` where the level below it was odd."""
        b, _, h, w = x.shape
        if fast_on_cpu(x) and size in (None, (2 * h, 2 * w)):
            cells = h * w * (b if x.dtype == torch.bfloat16 else 1)
            if cells >= MERGED_CELLS[x.dtype]:
                return self.doubled(x, self.merged())
        return self.conv(F.interpolate(x, size or (2 * h, 2 * w), mode="nearest"))

    def merged(self) -> Tensor:
        """The kernel of the transposed convolution, laid out as is made soonest."""
        weight = self.conv.weight
        order, back = ((1, 2, 3, 0), (0, 3, 1, 2)) if weight.is_contiguous() else ((0, 2, 3, 1), (3, 0, 1, 2))
        taps = weight.float().permute(order).flatten(1, 2)
        kernel = torch.kron(MERGING, MERGING) @ taps
        return kernel.unflatten(1, (4, 4)).permute(back).to(weight.dtype)

    def doubled(self, x: Tensor, merged: Tensor, neighbours: int = 0) -> Tensor:
        """`b c h w -> b c 2h 2w` by the transposed convolution, without the rows of `neighbours` above and below."""
        return F.conv_transpose2d(x, merged, self.conv.bias, stride=2, padding=(1 + 2 * neighbours, 1))


def sinusoids(timestep: Tensor, width: int) -> Tensor:
    """`b -> b width`: cosines then sines, periods 2 pi to 2 pi 1e4, float32 (CompVis's order)."""
    half = width // 2
    # In the released code's order of operations: one ulp here is 3e-5 in the wave at timestep 999.
    rates = torch.exp(-math.log(1e4) * torch.arange(half, dtype=torch.float32, device=timestep.device) / half)
    angles = timestep.float()[:, None] * rates
    wave = torch.cat([angles.cos(), angles.sin()], dim=1)
    return F.pad(wave, (0, width - 2 * half))


class EmbeddingMLP(nn.Module):
    """Linear, SiLU, linear: `b d_in -> b d`, used for the timestep and for the vector slot."""

    def __init__(self, d_in: int, width: int) -> None:
        super().__init__()
        self.linear_in = nn.Linear(d_in, width)
        self.linear_out = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        """Computed in the layers' type."""
        return self.linear_out(F.silu(self.linear_in(x.to(self.linear_in.weight.dtype))))
