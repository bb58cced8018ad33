"""The U-Net's own promises: slots, sizes, checkpointing, the silent start, refusals."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from peer import randomise

from latentkit.errors import InputError
from latentkit.nets.attention import TransformerBlock
from latentkit.nets.layers import sinusoids
from latentkit.nets.unet import UNet, UNetConfig

CONFIG = UNetConfig(channels=32, multipliers=(1, 2), depth=(0, 1), blocks=1, heads=2, context_width=12, vector_width=10)


def inputs(batch: int = 2, height: int = 8, width: int = 8) -> dict[str, torch.Tensor]:
    return {
        "x": torch.randn(batch, 4, height, width),
        "timestep": torch.linspace(0, 999, batch),
        "context": torch.randn(batch, 5, 12),
        "vector": torch.randn(batch, 10),
    }


def test_an_untrained_network_answers_zero() -> None:
    answer = UNet(CONFIG)(**inputs())
    assert torch.equal(answer, torch.zeros(2, 4, 8, 8))


def test_checkpointing_gives_equal_gradients() -> None:
    network, given = UNet(CONFIG), inputs()
    randomise(network, 1)
    gradients = []
    for network.checkpointing in (False, True):
        network.zero_grad()
        network(**given).square().mean().backward()
        gradients.append({name: p.grad.clone() for name, p in network.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys() == dict(network.named_parameters()).keys()
    assert all(torch.equal(gradients[0][name], gradients[1][name]) for name in gradients[0])
    assert all(gradient.abs().max() > 0 for gradient in gradients[0].values())


def test_checkpointing_keeps_fewer_activations() -> None:
    network = UNet(CONFIG)
    randomise(network, 1)
    kept = []
    for network.checkpointing in (False, True):
        sizes: list[int] = []

        def pack(tensor: torch.Tensor, sizes: list[int] = sizes) -> torch.Tensor:
            sizes.append(tensor.numel())
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            network(**inputs())
        kept.append(sum(sizes))
    assert kept[1] < kept[0] / 2


@pytest.mark.parametrize(("height", "width"), [(9, 7), (1, 1), (5, 8), (13, 2)])
@torch.no_grad()
def test_any_size_works(height: int, width: int) -> None:
    network = UNet(replace(CONFIG, multipliers=(1, 2, 2), depth=(0, 0, 1)))
    randomise(network, 1)
    assert network(**inputs(2, height, width)).shape == (2, 4, height, width)


@torch.no_grad()
def test_rows_do_not_see_each_other() -> None:
    network = UNet(CONFIG)
    randomise(network, 1)
    given = inputs(3)
    together = network(**given)
    for row in range(3):
        alone = network(**{name: value[row : row + 1] for name, value in given.items()})
        torch.testing.assert_close(together[row : row + 1], alone, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("slot", ["timestep", "context", "vector"])
@pytest.mark.parametrize("scale_shift", [False, True])
@torch.no_grad()
def test_every_input_reaches_the_output(slot: str, scale_shift: bool) -> None:
    network = UNet(replace(CONFIG, scale_shift=scale_shift))
    randomise(network, 1)
    given = inputs()
    changed = {**given, slot: given[slot].flip(0) + 1}
    assert (network(**given) - network(**changed)).abs().max() > 1e-3


@torch.no_grad()
def test_masked_tokens_do_not_count() -> None:
    network, given = UNet(CONFIG), inputs()
    randomise(network, 1)
    mask = torch.tensor([[True, True, False, False, False], [True] * 5])
    other = given["context"].clone()
    other[0, 2:] = 100.0
    masked = network(**given, mask=mask)
    torch.testing.assert_close(network(**{**given, "context": other}, mask=mask), masked)
    assert (network(**given) - masked).abs().max() > 1e-3


@torch.no_grad()
def test_it_computes_in_bfloat16() -> None:
    network, given = UNet(CONFIG), inputs()
    randomise(network, 1)
    exact = network(**given)
    half = network.bfloat16()(**{k: v if k == "timestep" else v.bfloat16() for k, v in given.items()})
    assert half.dtype == torch.bfloat16
    assert (half - exact).abs().max() < 0.1 * exact.abs().max()


def test_timestep_waves_are_cosines_then_sines() -> None:
    waves = sinusoids(torch.tensor([0.0, 2.0]), 8)
    rates = 10000.0 ** (-torch.arange(4) / 4)
    torch.testing.assert_close(waves[0], torch.tensor([1.0] * 4 + [0.0] * 4))
    torch.testing.assert_close(waves[1], torch.cat([(2 * rates).cos(), (2 * rates).sin()]))
    assert sinusoids(torch.tensor([1.0]), 7).shape == (1, 7)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"depth": (0, 1, 1)}, r"multipliers \(1, 2\) and depth \(0, 1, 1\) differ in length"),
        ({"multipliers": (), "depth": ()}, "are empty"),
        ({"heads": None}, "heads=None and head_width=None; give exactly one"),
        ({"head_width": 8}, "heads=2 and head_width=8; give exactly one"),
        ({"heads": 3}, "level of width 64 cannot be split by heads=3"),
        ({"heads": 0}, "cannot be split by heads=0"),
        ({"heads": None, "head_width": 24}, "cannot be split by head_width=24"),
        ({"heads": 7, "depth": (0, 0), "middle_depth": 1}, "level of width 64 cannot be split by heads=7"),
        ({"channels": 0}, "channels is 0; it must be at least 1"),
        ({"plain_attention": True}, "plain attention takes no context"),
        ({"plain_attention": True, "context_width": None, "depth": (0, 2)}, "plain attention takes no context and a"),
        ({"context_width": None, "cross_only": 1}, "cross_only is 1, but there is no context"),
        ({"classes": 3}, "classes=3 and vector_width=10; give one of them"),
        ({"classes": 0, "vector_width": None}, "classes=0 and vector_width=None"),
        ({"blocks": 0}, "blocks is 0; it must be at least 1"),
    ],
)
def test_a_wrong_shape_is_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        replace(CONFIG, **fields)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"context": None}, "context slot of width 12; it was given one of width None"),
        ({"context": torch.zeros(2, 5, 13)}, "context slot of width 12; it was given one of width 13"),
        ({"vector": None}, "vector slot of width 10; it was given one of width None"),
        ({"vector": torch.zeros(2, 9)}, "vector slot of width 10; it was given one of width 9"),
    ],
)
def test_a_slot_that_does_not_fit_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        UNet(CONFIG)(**{**inputs(), **changes})


def test_a_slot_that_the_network_lacks_is_refused() -> None:
    network = UNet(replace(CONFIG, context_width=None, vector_width=None))
    given = inputs()
    with pytest.raises(InputError, match="context slot of width None; it was given one of width 12"):
        network(**given)
    assert network(given["x"], given["timestep"]).shape == given["x"].shape


@pytest.mark.parametrize(("height", "width"), [(8, 8), (9, 7), (1, 2)])
@torch.no_grad()
def test_residual_resampling_works_at_any_size(height: int, width: int) -> None:
    network = UNet(replace(CONFIG, multipliers=(1, 2, 2), depth=(0, 0, 1), residual_resampling=True))
    randomise(network, 1)
    assert network(**inputs(2, height, width)).shape == (2, 4, height, width)


@torch.no_grad()
def test_the_class_number_reaches_the_output_and_is_checked() -> None:
    network = UNet(replace(CONFIG, vector_width=None, classes=400))
    randomise(network, 1)
    given = inputs()
    answers = [network(**{**given, "vector": torch.full((2, 1), number)}) for number in (349.0, 350.0)]
    assert (answers[0] - answers[1]).abs().max() > 1e-3
    with pytest.raises(InputError, match="vector slot of width 1; it was given one of width 10"):
        network(**given)


@torch.no_grad()
def test_a_block_that_only_looks_at_the_context_does_not_mix_pixels() -> None:
    x, context = torch.randn(1, 6, 32), torch.randn(1, 5, 12)
    other = torch.cat([torch.randn(1, 1, 32), x[:, 1:]], 1)
    moved = []
    for cross_only in (False, True):
        block = TransformerBlock(32, 4, 12, cross_only=cross_only)
        randomise(block, 1)
        moved.append((block(x, context, None) - block(other, context, None))[:, 1:].abs().max())
    assert moved[0] > 1e-3 > 1e-5 > moved[1]
