"""ControlNet: new ones add nothing, several add up, wrong hints are refused."""

from typing import Any

import pytest
import torch
from peer import UNET, copy_weights, distance, randomise
from torch import Tensor

from latentkit.diffusion.schedule import NoiseSchedule
from latentkit.errors import InputError
from latentkit.model.conditioning import Conditioning
from latentkit.model.denoiser import Denoiser
from latentkit.nets.controlnet import Control, ControlNet, residuals
from latentkit.nets.unet import UNet, UNetConfig

CONFIG = UNetConfig(channels=32, multipliers=(1, 2), depth=(1, 0), heads=4, context_width=24, blocks=1)


def random(seed: int) -> ControlNet:
    network = ControlNet(CONFIG).eval()
    randomise(network, seed)
    return network


def inputs() -> tuple[Tensor, Tensor, Tensor]:
    return torch.randn(2, 4, 6, 4), torch.tensor([10.0, 700.0]), torch.randn(2, 5, 24)


def summed(controls: list[Control], hints: dict[str, Tensor]) -> Any:
    torch.manual_seed(0)
    x, timestep, context = inputs()
    return residuals(controls, hints, x, timestep, context, None, None)


@torch.no_grad()
def test_a_new_one_adds_nothing_and_a_trained_one_something() -> None:
    unet = UNet(CONFIG).eval()
    randomise(unet, 1)
    x, timestep, context = inputs()
    hint = torch.rand(2, 3, 48, 32)
    plain = unet(x, timestep, context)
    nothing = ControlNet(CONFIG).eval()(x, timestep, hint, context)
    assert [part.shape for part in nothing] == [part.shape for part in random(2)(x, timestep, hint, context)]
    assert torch.equal(unet(x, timestep, context, residuals=nothing), plain)
    moved = unet(x, timestep, context, residuals=random(2)(x, timestep, hint, context))
    assert (moved - plain).abs().max() > 0.1
    with pytest.raises(ValueError, match="zip"):
        unet(x, timestep, context, residuals=nothing[:-1])


@torch.no_grad()
def test_every_residual_has_its_place() -> None:
    unet = UNet(CONFIG).eval()
    randomise(unet, 1)
    x, timestep, context = inputs()
    answers = ControlNet(CONFIG).eval()(x, timestep, torch.rand(2, 3, 48, 32), context)
    plain = unet(x, timestep, context)
    for index in range(len(answers)):
        one = [part + (place == index) * torch.randn_like(part) for place, part in enumerate(answers)]
        assert (unet(x, timestep, context, residuals=one) - plain).abs().max() > 1e-2


@pytest.mark.parity
@torch.no_grad()
def test_the_peers_unet_takes_the_same_residuals() -> None:
    from test_unet_parity import peer

    ours, theirs = UNet(CONFIG).eval(), peer(CONFIG)
    randomise(ours, 1)
    copy_weights(ours, theirs, UNET)
    x, timestep, context = inputs()
    answers = random(2)(x, timestep, torch.rand(2, 3, 48, 32), context)
    added = {"down_block_additional_residuals": answers[:-1], "mid_block_additional_residual": answers[-1]}
    expected = theirs(x, timestep, context, **added).sample
    assert distance(ours(x, timestep, context, residuals=answers), expected) < 1e-5


@torch.no_grad()
def test_weights_scale_and_several_add_up() -> None:
    first, second, hints = random(2), random(3), {"a": torch.rand(2, 3, 48, 32), "b": torch.rand(2, 3, 48, 32)}
    one, other = (summed([control], hints) for control in (Control(first, "a"), Control(second, "b")))
    both = summed([Control(first, "a", 0.5), Control(second, "b", -2.0)], hints)
    for total, a, b in zip(both, one, other):
        torch.testing.assert_close(total, 0.5 * a - 2 * b)
    assert all(not part.any() for part in summed([Control(first, "a", 0.0)], hints))
    assert summed([], hints) is None


@torch.no_grad()
def test_the_denoiser_hands_the_scaled_latent_alone_and_each_row_its_hint() -> None:
    denoiser = Denoiser(UNetConfig(**{**CONFIG.__dict__, "channels_in": 6}), NoiseSchedule(kind="scaled_linear"), "eps")
    randomise(denoiser, 1)
    control = Control(random(2), "hint0")
    x, _, context = inputs()
    told = Conditioning(context, concat=torch.randn(2, 2, 6, 4), extras={"hint0": torch.rand(2, 3, 48, 32)})
    sigma = torch.full((2,), 3.0, dtype=torch.float64)
    answer = denoiser(x, sigma, told, controls=[control])
    for row in (0, 1):
        alone = denoiser(x[row : row + 1], sigma[:1], told.take(slice(row, row + 1)), controls=[control])
        torch.testing.assert_close(answer[row : row + 1], alone, rtol=0, atol=1e-4)
    assert (answer - denoiser(x, sigma, told)).abs().max() > 0.1
    seen: list[Tensor] = []
    control.network.forward = lambda x, *a: seen.append(x) or ControlNet.forward(control.network, x, *a)  # type: ignore
    denoiser.bind(told, controls=[control])(x, 3.0)
    torch.testing.assert_close(seen[0], x / (1 + 3.0**2) ** 0.5)


def test_hints_of_another_size_or_kind_are_refused() -> None:
    x, timestep, context = inputs()
    for shape in ((2, 3, 40, 32), (2, 1, 48, 32)):
        with pytest.raises(InputError, match=r"takes a hint of \(3, 48, 32\); it was given one of"):
            random(2)(x, timestep, torch.rand(shape), context)
    with pytest.raises(InputError, match="context slot of width 24"):
        random(2)(x, timestep, torch.rand(2, 3, 48, 32))
