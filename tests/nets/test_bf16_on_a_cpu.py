"""The paths that bfloat16 takes on a CPU: the same values and gradients as the plain operations in float64."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

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


@pytest.mark.parametrize("portion", [1, 1 << 19])
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


@pytest.mark.parametrize("modulated", [True, False])
def test_float32_goes_through_the_plain_operations(modulated: bool) -> None:
    module, x = norm(64), random(2, 64, 8, 8).contiguous(memory_format=torch.channels_last)
    scale, shift = random(2, 64), random(64, 2).T
    plain = module(x)
    plain = torch.addcmul(shift[:, :, None, None], plain, 1 + scale[:, :, None, None]) if modulated else plain
    assert torch.equal(layers.normalised(module, x, (scale, shift) if modulated else None), F.silu(plain))


@pytest.mark.parametrize("masked", [True, False])
def test_attention_has_the_values_and_gradients_of_float64(masked: bool) -> None:
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


def test_only_small_scores_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    called: list[int] = []
    kernel = F.scaled_dot_product_attention

    def spy(q: Tensor, *rest: Tensor, **options: Tensor | None) -> Tensor:
        called.append(q.shape[2])
        return kernel(q, *rest, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(F, "scaled_dot_product_attention", spy)
    for n in (512, 513):
        x = random(1, 1, n, 8).bfloat16()
        attention.attend(x, x, x)
    assert called == [513]
