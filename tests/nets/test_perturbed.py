"""The perturbed pass: the middle's self-attention maps are the identity, and nothing else changes."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from peer import UNET, copy_weights, distance, randomise
from test_unet_parity import FAMILIES
from test_unet_parity import peer as diffusers_of

from latentkit.diffusion.schedule import NoiseSchedule
from latentkit.model.conditioning import Conditioning
from latentkit.model.denoiser import Denoiser
from latentkit.nets.unet import UNet, UNetConfig

SMALL = UNetConfig(channels=32, multipliers=(1, 2), depth=(0, 1), blocks=1, heads=2)


@pytest.mark.parity
@pytest.mark.parametrize("family", ["sd1", "sdxl"])
@torch.no_grad()
def test_it_is_the_peers(family: str) -> None:
    from diffusers.models.attention_processor import PAGIdentitySelfAttnProcessor2_0

    config = FAMILIES[family]
    ours, theirs = UNet(config).eval(), diffusers_of(config)
    randomise(ours, 1)
    copy_weights(ours, theirs, UNET)
    processors: dict[str, Any] = theirs.attn_processors
    middle = [name for name in processors if name.startswith("mid_block") and ".attn1." in name]
    assert len(middle) == config.middle_depth
    theirs.set_attn_processor(processors | {name: PAGIdentitySelfAttnProcessor2_0() for name in middle})
    x, context = torch.randn(1, config.channels_in, 8, 8), torch.randn(1, 5, config.context_width or 0)
    timestep, vector, added = torch.tensor([300.0]), None, None
    if config.vector_width:
        pooled, ids = torch.randn(1, config.vector_width - 6 * 4), torch.randint(0, 1024, (1, 6))
        added = {"text_embeds": pooled.expand(2, -1), "time_ids": ids.expand(2, -1)}
        vector = torch.cat([pooled, theirs.add_time_proj(ids.flatten()).reshape(1, -1)], dim=1)
    both = theirs(x.expand(2, -1, -1, -1), timestep, context.expand(2, -1, -1), added_cond_kwargs=added).sample
    plain, perturbed = (ours(x, timestep, context, vector, perturbed=switch) for switch in (False, True))
    assert distance(plain, both[:1]) < 1e-5
    assert distance(perturbed, both[1:]) < 1e-5
    assert distance(perturbed, plain) > 1e-3


@pytest.mark.parametrize("plain", [False, True])
@torch.no_grad()
def test_only_the_middle_is_touched(plain: bool) -> None:
    without = replace(SMALL, plain_attention=plain, middle_depth=0)
    for config, same in ((without, True), (replace(without, middle_depth=1), False)):
        network = UNet(config)
        randomise(network, 1)
        given = torch.randn(2, 4, 8, 8), torch.tensor([3.0, 500.0])
        assert torch.equal(network(*given, perturbed=True), network(*given)) == same


@torch.no_grad()
def test_a_bound_denoiser_passes_it_on() -> None:
    denoiser = Denoiser(SMALL, NoiseSchedule(), "flow").eval()
    randomise(denoiser.unet, 1)
    x = torch.randn(2, 4, 8, 8)
    plain, perturbed = (denoiser.bind(Conditioning(), perturbed=switch)(x, 2.0).x0 for switch in (False, True))
    assert torch.equal(plain, denoiser.bind(Conditioning())(x, 2.0).x0)
    assert not torch.allclose(perturbed, plain)
