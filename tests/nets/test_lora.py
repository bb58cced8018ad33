"""LoRA: changes against hand-made ones and peft's, and the base untouched."""

import pytest
import torch
from torch import Tensor, nn

from latentkit.errors import InputError
from latentkit.nets.lora import Adapted, Change


def random(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


def test_a_linear_change_is_up_down_by_alpha_over_rank() -> None:
    weight, down, up = random(6, 5), random(2, 5), random(6, 2)
    expected = weight + 0.7 * (3 / 2) * up @ down
    torch.testing.assert_close(Change(down, up, alpha=3.0).applied(weight, 0.7), expected)
    torch.testing.assert_close(Change(down, up).applied(weight, 1.0), weight + up @ down)
    assert torch.equal(Change(down, up).applied(weight, 0.0), weight)


@pytest.mark.parametrize("middle", [True, False])
def test_a_convolution_s_change_is_what_two_convolutions_do(middle: bool) -> None:
    weight, x = random(6, 5, 3, 3), random(1, 5, 8, 8)
    up = random(6, 2, 1, 1)
    if middle:
        down, core = random(2, 5, 1, 1), random(2, 2, 3, 3)
        change = Change(down, up, middle=core)
        beside = nn.functional.conv2d(nn.functional.conv2d(x, down), core, padding=1)
    else:
        down = random(2, 5, 3, 3)
        change = Change(down, up)
        beside = nn.functional.conv2d(x, down, padding=1)
    expected = nn.functional.conv2d(x, weight, padding=1) + nn.functional.conv2d(beside, up)
    found = nn.functional.conv2d(x, change.applied(weight, 1.0), padding=1)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_a_linear_lora_fits_a_one_by_one_convolution() -> None:
    weight, down, up = random(6, 5, 1, 1), random(2, 5), random(6, 2)
    torch.testing.assert_close(Change(down, up).applied(weight, 1.0)[..., 0, 0], weight[..., 0, 0] + up @ down)


def test_loha_is_the_product_of_two() -> None:
    weight, parts = random(6, 5), [random(2, 5), random(6, 2), random(3, 5), random(6, 3)]
    change = Change(parts[0], parts[1], alpha=1.0, second=Change(parts[2], parts[3]))
    expected = weight + (parts[1] @ parts[0]) * (parts[3] @ parts[2]) / 2
    torch.testing.assert_close(change.applied(weight, 1.0), expected)


def test_dora_gives_rows_or_columns_their_norms() -> None:
    weight, down, up = random(6, 5), random(2, 5), random(6, 2)
    rows = Change(down, up, magnitude=torch.arange(1.0, 7.0)[:, None]).applied(weight, 1.0)
    torch.testing.assert_close(rows.norm(dim=1), torch.arange(1.0, 7.0))
    plain = weight + up @ down
    torch.testing.assert_close(rows / rows.norm(dim=1, keepdim=True), plain / plain.norm(dim=1, keepdim=True))
    columns = Change(down, up, magnitude=torch.arange(1.0, 6.0)[None]).applied(weight, 1.0)
    torch.testing.assert_close(columns.norm(dim=0), torch.arange(1.0, 6.0))
    square = Change(random(2, 5), random(5, 2), magnitude=torch.ones(1, 5)).applied(random(5, 5), 1.0)
    torch.testing.assert_close(square.norm(dim=0), torch.ones(5))
    half = Change(down, up, magnitude=torch.ones(6, 1)).applied(weight, 0.5)
    torch.testing.assert_close(half, (weight + plain / plain.norm(dim=1, keepdim=True)) / 2)
    with pytest.raises(InputError, match="4 magnitudes"):
        Change(down, up, magnitude=torch.ones(4)).applied(weight, 1.0)


def test_layers_agree_with_peft() -> None:
    peft = pytest.importorskip("peft", reason="peft is not installed")
    for dora in (False, True):
        layer = nn.Sequential(nn.Linear(5, 6))
        network = nn.Sequential(nn.Linear(5, 6))
        network.load_state_dict(layer.state_dict())
        config = peft.LoraConfig(r=2, lora_alpha=3, target_modules=["0"], use_dora=dora, init_lora_weights=False)
        theirs = peft.get_peft_model(layer, config).eval()
        inner = theirs.base_model.model[0]
        magnitude = inner.lora_magnitude_vector.default.weight * 1.3 if dora else None
        if magnitude is not None:
            inner.lora_magnitude_vector.default.weight.data = magnitude
        change = Change(inner.lora_A.default.weight, inner.lora_B.default.weight, 3.0, magnitude=magnitude)
        Adapted(network, [({"0.weight": change}, 1.0)])
        torch.testing.assert_close(network(random(4, 5)), theirs(random(4, 5)))


def test_adapters_add_up_and_leave_the_base_as_it_was() -> None:
    linear, convolution, x = nn.Linear(5, 6), nn.Conv2d(2, 2, 3), random(4, 5).bfloat16()
    network = nn.Sequential(linear, convolution).bfloat16()
    convolution.weight.data = convolution.weight.data.contiguous(memory_format=torch.channels_last)
    before = {name: weight.clone() for name, weight in network.state_dict().items()}
    places = {name: weight.data_ptr() for name, weight in network.named_parameters()}
    plain = linear(x)
    first, second = Change(random(1, 5), random(6, 1)), Change(random(2, 5), random(6, 2))
    kernel = Change(random(1, 2, 3, 3), random(2, 1, 1, 1))
    adapted = Adapted(network, [({"0.weight": first, "1.weight": kernel}, 0.5), ({"0.weight": second}, -1.0)])
    exact = before["0.weight"].float() + 0.5 * first.product() - second.product()
    assert torch.equal(linear.weight, exact.bfloat16())
    assert convolution.weight.is_contiguous(memory_format=torch.channels_last)
    adapted.remove()
    assert torch.equal(linear(x), plain)
    assert {name: weight.data_ptr() for name, weight in network.named_parameters()} == places
    assert all(torch.equal(weight, before[name]) for name, weight in network.state_dict().items())


@pytest.mark.parametrize(
    ("name", "change", "said"),
    [
        ("2.weight", Change(random(1, 5), random(6, 1)), "changes 2.weight, which"),
        ("0.weight", Change(random(1, 4), random(6, 1)), r"\(6, 4\); it is \(6, 5\)"),
    ],
)
def test_what_does_not_fit_is_refused_and_nothing_changed(name: str, change: Change, said: str) -> None:
    linear = nn.Linear(5, 6)
    network = nn.Sequential(linear)
    weight = linear.weight.data_ptr()
    with pytest.raises(InputError, match=said):
        Adapted(network, [({"0.weight": Change(random(1, 5), random(6, 1)), name: change}, 1.0)])
    assert linear.weight.data_ptr() == weight
