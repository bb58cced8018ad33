"""The ways that bfloat16 goes on a CPU: the same values and gradients as the plain operations in float64."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from latentkit.nets import attention, layers


def apart(ours: Tensor, exact: Tensor) -> float:
    """The largest difference, relative to the largest value."""
    return ((ours.double() - exact).abs().max() / exact.abs().max()).item()


def random(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


def picture(*shape: int) -> Tensor:
    return (3 * random(*shape) + 2).bfloat16().contiguous(memory_format=torch.channels_last).requires_grad_()


def norm(channels: int) -> nn.GroupNorm:
    module = layers.group_norm(channels, 1e-5)
    module.weight.data, module.bias.data = random(channels), random(channels + 1)[1:]
    return module


@pytest.mark.parametrize("portion", [1, 700, 1 << 19])
@pytest.mark.parametrize("silu", [True, False])
@pytest.mark.parametrize("modulated", [True, False])
def test_norm_has_the_values_and_gradients_of_float64(
    modulated: bool, silu: bool, portion: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(layers, "PORTION", portion)
    module, x, slope = norm(96), picture(3, 96, 10, 6), random(3, 96, 10, 6).bfloat16()
    modulation = (random(3, 96).requires_grad_(), random(96, 3).T.requires_grad_()) if modulated else None
    by = [x, module.weight, module.bias, *(modulation or ())]
    ours = layers.normalised(module, x, modulation, silu=silu)
    exact = F.group_norm(x.double(), 32, module.weight.double(), module.bias.double(), module.eps)
    if modulation is not None:
        exact = exact * (1 + modulation[0].double()[:, :, None, None]) + modulation[1].double()[:, :, None, None]
    exact = F.silu(exact) if silu else exact
    assert ours.dtype == torch.bfloat16
    assert ours.is_contiguous(memory_format=torch.channels_last)
    assert apart(ours, exact) < 4e-3
    found, true = torch.autograd.grad(ours, by, slope), torch.autograd.grad(exact, by, slope.double())
    assert apart(found[0], true[0].double()) < 6e-3
    assert all(apart(a, b.double()) < 1e-5 for a, b in zip(found[1:], true[1:], strict=True))


@pytest.mark.parametrize("mean", [2, 600])
def test_norm_without_a_gradient_is_that_with_one(mean: float) -> None:
    """The second is of nearly plain pictures, of whose variance torch's kernel loses all."""
    module, x = norm(64).bfloat16(), (picture(2, 64, 64, 64) + mean).detach()
    with torch.no_grad():
        drawn = layers.normalised(module, x)
    assert drawn.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(drawn, layers.normalised(module, x.requires_grad_()))
    exact = F.group_norm(x.double(), 32, module.weight.double(), module.bias.double(), module.eps)
    assert apart(drawn, F.silu(exact)) < 5e-3


def test_heads_of_any_width_are_filled_up_to_tiles() -> None:
    q, k, v = (random(1, 2, 20 + width, width).bfloat16() for width in (40, 40, 40))
    with torch.no_grad():
        drawn = attention.attend(q, k, v)
    assert drawn.shape == q.shape
    assert apart(drawn, F.scaled_dot_product_attention(q.double(), k.double(), v.double())) < 1e-2


def test_norm_is_finite_where_rounding_makes_a_variance_negative() -> None:
    x = torch.linspace(130, 250, 100).bfloat16()[:, None, None, None].repeat(1, 32, 27, 31)
    x = x.contiguous(memory_format=torch.channels_last)
    assert torch.isfinite(layers.normalised(norm(32), x)).all()


def test_norm_keeps_nothing_but_its_input() -> None:
    kept: list[Tensor] = []
    x = picture(2, 64, 16, 16)

    def keep(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        layers.normalised(norm(64), x)
    large = [tensor for tensor in kept if tensor.numel() >= x.numel()]
    assert {tensor.data_ptr() for tensor in large} == {x.data_ptr()}


@pytest.mark.parametrize("side", [1, 8])
def test_norm_of_a_picture_with_its_channels_first_is_the_plain_one(side: int) -> None:
    module, x = norm(64), random(2, 64, side, side).bfloat16()
    assert torch.equal(layers.normalised(module, x), F.silu(module(x)))


@pytest.mark.parametrize("modulated", [True, False])
def test_float32_goes_through_the_plain_operations(modulated: bool) -> None:
    module, x = norm(64), random(2, 64, 8, 8).contiguous(memory_format=torch.channels_last)
    scale, shift = random(2, 64), random(64, 2).T
    plain = module(x)
    plain = torch.addcmul(shift[:, :, None, None], plain, 1 + scale[:, :, None, None]) if modulated else plain
    assert torch.equal(layers.normalised(module, x, (scale, shift) if modulated else None), F.silu(plain))


@pytest.mark.parametrize("portion", [1, 400, 3000, 1 << 20])
@pytest.mark.parametrize("masked", [True, False])
def test_attention_has_the_values_and_gradients_of_float64(
    masked: bool, portion: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attention, "PORTION", portion)
    q, k, v = (random(2, 4, n, 32).bfloat16().requires_grad_() for n in (50, 20, 21))
    v = v[:, :, 1:]
    mask = random(2, 20) > 0 if masked else None
    ours = attention.attend(q, k, v, mask)
    allowed = None if mask is None else mask[:, None, None, :]
    exact = F.scaled_dot_product_attention(q.double(), k.double(), v.double(), attn_mask=allowed)
    assert apart(ours, exact) < 1e-2
    slope = random(2, 4, 50, 32).bfloat16()
    found, true = (torch.autograd.grad(y, (q, k, v), slope.to(y.dtype)) for y in (ours, exact))
    assert all(apart(a, b.double()) < 2e-2 for a, b in zip(found, true, strict=True))


def test_attention_keeps_no_scores() -> None:
    kept: list[int] = []
    q = random(1, 2, 64, 8).bfloat16().requires_grad_()

    def keep(tensor: Tensor) -> Tensor:
        kept.append(tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        attention.attend(q, q, q)
    assert kept == [q.numel()] * 3


def test_attention_works_on_few_scores_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[int] = []

    def spied(softmax: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def spy(scores: Tensor, *rest: object, **options: object) -> Tensor:
            sizes.append(scores.numel())
            return softmax(scores, *rest, **options)

        return spy

    monkeypatch.setattr(torch, "softmax", spied(torch.softmax))
    monkeypatch.setattr(Tensor, "softmax", spied(Tensor.softmax))  # on the way back
    monkeypatch.setattr(attention, "PORTION", 1 << 12)
    q = random(2, 2, 256, 8).bfloat16().requires_grad_()
    attention.attend(q, q, q).sum().backward()
    assert max(sizes) == 1 << 12
    assert sum(sizes) == 2 * (2 * 2 * 256 * 256)


def test_float32_attention_goes_through_the_kernel() -> None:
    q = random(1, 2, 64, 8)
    assert torch.equal(attention.attend(q, q, q), F.scaled_dot_product_attention(q, q, q))


@pytest.mark.parametrize("size", [(32, 16), (15, 16), (17, 23)])
@pytest.mark.parametrize("odd", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_upsampling_is_repetition_and_convolution(
    size: tuple[int, int], odd: bool, dtype: torch.dtype, layout: torch.memory_format
) -> None:
    module = layers.Upsample(8).to(dtype).to(memory_format=layout)  # type: ignore[call-overload]
    x = random(2, 8, *size).to(dtype).requires_grad_()
    error = 1e-2 if dtype == torch.bfloat16 else 1e-5
    wanted = (2 * size[0] - odd, 2 * size[1])
    exact = F.interpolate(x.double(), wanted, mode="nearest")
    exact = F.conv2d(exact, module.conv.weight.double(), module.conv.bias.double(), padding=1)  # type: ignore[union-attr]
    ours = module(x, wanted) if odd else module(x)
    assert ours.shape == exact.shape
    assert apart(ours, exact) < error
    by, slope = [x, *module.parameters()], random(*exact.shape).to(dtype)
    found, true = torch.autograd.grad(ours, by, slope), torch.autograd.grad(exact, by, slope.double())
    assert all(apart(a, b.double()) < error for a, b in zip(found, true, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_upsampling_of_large_pictures_multiplies_less(dtype: torch.dtype) -> None:
    def operations(count: int, side: int) -> int:
        with FlopCounterMode(display=False) as counter:
            layers.Upsample(8).to(dtype)(random(count, 8, side, side).to(dtype))
        return counter.get_total_flops()

    merging, few = 2 * 16 * 9 * 8 * 8, {torch.float32: 15, torch.bfloat16: 31}[dtype]
    assert operations(1, few) == 2 * 8 * 8 * 9 * 4 * few * few
    assert operations(1, few + 1) == 2 * 8 * 8 * 16 * (few + 1) ** 2 + merging
    merged = dtype == torch.bfloat16
    assert operations(16, 8) == 2 * 8 * 8 * (16 if merged else 9 * 4) * 16 * 8 * 8 + merging * merged


def test_what_is_traced_goes_the_plain_way() -> None:
    """At any size: what is merged, and what only torch has, would stay in it."""
    with torch.no_grad():
        upsample = torch.jit.trace(layers.Upsample(8), random(1, 8, 16, 16))  # type: ignore[no-untyped-call]
        feed = torch.jit.trace(attention.FeedForward(8), random(1, 7, 8))  # type: ignore[no-untyped-call]
        compiled = torch.compile(attention.FeedForward(8), backend="eager", fullgraph=True)(random(1, 7, 8))
    assert "conv_transpose" not in str(upsample.inlined_graph)
    assert "mkldnn" not in str(feed.inlined_graph)
    assert compiled.shape == (1, 7, 8)


def test_only_bfloat16_on_a_cpu_is_laid_out_anew() -> None:
    x = random(2, 8, 4, 4)
    assert layers.laid_out(x) is x
    assert layers.laid_out(x.bfloat16()).is_contiguous(memory_format=torch.channels_last)
    assert not layers.laid_out(x.bfloat16().to("meta")).is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_feed_forward_without_gradients_is_that_with_them(
    fused: bool, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not fused:
        monkeypatch.setattr(layers, "FUSED", {})
    module, x = attention.FeedForward(32).to(dtype), random(2, 7, 32).to(dtype)
    exact = attention.FeedForward(32).double()
    exact.load_state_dict(module.state_dict())
    with torch.no_grad():
        drawn = module(x)
    error = 1e-2 if dtype == torch.bfloat16 else 1e-5
    assert apart(drawn, exact(x.double())) < 2 * error
    assert apart(drawn, module(x).double()) < error
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert apart(module.float()(x), exact(x.double())) < 2e-2


@pytest.mark.parametrize("bias", [True, False])
def test_a_large_linear_layer_is_torchs_and_does_not_depend_on_the_batch(
    bias: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []

    def counted(x: Tensor, weight: Tensor, bias: Tensor | None, *others: object) -> Tensor:
        calls.append(x.dtype)
        return own(x, weight, bias, *others) if own else F.linear(x, weight, bias)

    own = layers.FUSED.get(torch.float32)
    monkeypatch.setattr(layers, "FUSED", dict.fromkeys((torch.float32, torch.bfloat16), counted))
    module, x = layers.Linear(256, 256, bias=bias), random(2, 256, 256)
    plain = F.linear(x, module.weight, module.bias)
    assert torch.equal(module(x), plain)
    assert not calls  # with gradients it is torch's
    with torch.no_grad():
        both = module(x)
        assert apart(both, plain.double()) < 1e-5
        assert torch.equal(both[:1], module(x[:1]))
        assert len(calls) == 2
        for small in (x[:, :255], x[0], x[:, 0]):
            assert apart(module(small), F.linear(small, module.weight, module.bias).double()) < 1e-5
        assert module.double()(x.double()).dtype == torch.float64
        assert module.bfloat16()(x.bfloat16()).dtype == torch.bfloat16
        with torch.autocast("cpu", torch.bfloat16):
            assert module.float()(x).dtype == torch.bfloat16
        tangent = torch.func.jvp(module, (x,), (x,))[1]
        assert apart(tangent, F.linear(x, module.weight).double()) < 1e-5
        traced = torch.jit.trace(module, x, check_trace=False)  # type: ignore[no-untyped-call]
    assert len(calls) == 2
    assert "mkldnn" not in str(traced.inlined_graph)


def test_one_mask_for_all_pictures_is_that_of_each(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "PORTION", 1)
    q, mask = random(3, 2, 5, 16).bfloat16(), torch.tensor([[True, False, True, True, False]])
    with torch.no_grad():
        one, each = attention.attend(q, q, q, mask), attention.attend(q, q, q, mask.expand(3, -1))
    assert torch.equal(one, each)
