"""The patch critic: what a verdict sees, and that it depends on nothing else."""

import pytest
import torch

from latentkit.errors import InputError
from latentkit.nets.critics import CriticConfig, PatchCritic


@pytest.mark.parametrize(("layers", "seen"), [(1, 16), (2, 34), (3, 70)])
def test_a_verdict_sees_its_patch_and_no_more(layers: int, seen: int) -> None:
    critic = PatchCritic(2, CriticConfig(channels=4, layers=layers))
    pixels = torch.randn(1, 2, 128, 128, requires_grad=True)
    verdicts = critic(pixels)
    middle = verdicts.shape[2] // 2
    (slope,) = torch.autograd.grad(verdicts[0, 0, middle, middle], pixels)
    rows = slope[0].abs().sum((0, 2)).nonzero().flatten()
    assert int(rows[-1] - rows[0]) + 1 == seen


def test_a_verdict_depends_on_its_own_picture_alone() -> None:
    critic = PatchCritic(1, CriticConfig(channels=8, layers=2)).train()
    pictures = torch.randn(3, 1, 16, 24)
    together = critic(pictures)
    for picture, verdict in zip(pictures, together, strict=True):
        torch.testing.assert_close(critic(picture[None])[0], verdict)
    assert together.shape == (3, 1, 2, 4)


def test_activations_keep_their_size() -> None:
    critic = PatchCritic(3, CriticConfig()).requires_grad_(False)
    assert 0.2 < float(critic.layers(torch.randn(2, 3, 64, 64))[..., 2:-2, 2:-2].square().mean()) < 5


def test_the_smallest_picture_passes_and_a_smaller_one_is_refused() -> None:
    for layers in (1, 2, 3):
        config = CriticConfig(channels=4, layers=layers)
        critic = PatchCritic(3, config)
        assert critic(torch.zeros(1, 3, config.smallest, config.smallest)).numel() >= 1
        with pytest.raises(InputError, match=f"at least {config.smallest} px a side.*use fewer layers"):
            critic(torch.zeros(1, 3, config.smallest, config.smallest - 1))


def test_wrong_shapes_are_refused() -> None:
    with pytest.raises(InputError, match="critic layers is 0"):
        CriticConfig(layers=0)
