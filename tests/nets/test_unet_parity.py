"""The U-Net against diffusers' UNet2DConditionModel, on small random shapes of each family."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from peer import UNET, copy_weights, distance, randomise

from latentkit.nets.unet import UNet, UNetConfig

pytestmark = pytest.mark.parity

SD1 = UNetConfig(
    channels=32, multipliers=(1, 2), depth=(1, 0), heads=4, context_width=24, linear_projection=False, blocks=2
)
SD2 = replace(SD1, heads=None, head_width=8, linear_projection=True, channels_in=9)
SDXL = UNetConfig(
    channels=32, multipliers=(1, 2, 4), depth=(0, 1, 2), middle_depth=2, heads=None, head_width=16, context_width=40,
    vector_width=48, blocks=1,
)  # fmt: skip
ODD = replace(SD1, channels=96, multipliers=(1, 2, 2), depth=(0, 1, 2), blocks=1, middle_depth=2)
FAMILIES = {"sd1": SD1, "sd2": SD2, "sdxl": SDXL, "96 channels": ODD}


def peer(config: UNetConfig) -> Any:
    """The same architecture in diffusers."""
    diffusers: Any = pytest.importorskip("diffusers")
    levels = len(config.multipliers)
    widths = tuple(config.channels * multiplier for multiplier in config.multipliers)
    kinds = ["CrossAttn" if depth else "" for depth in config.depth]
    depth = tuple(max(1, d) for d in config.depth)
    # This peer's attention_head_dim is a number of heads.
    heads = tuple(config.head_count(width) for width in widths)
    model = diffusers.UNet2DConditionModel(
        sample_size=8,
        in_channels=config.channels_in,
        out_channels=config.channels_out,
        block_out_channels=widths,
        layers_per_block=config.blocks,
        down_block_types=tuple(f"{kind}DownBlock2D" for kind in kinds),
        up_block_types=tuple(f"{kind}UpBlock2D" for kind in reversed(kinds)),
        transformer_layers_per_block=(*depth[: levels - 1], config.middle_depth),
        reverse_transformer_layers_per_block=tuple(reversed(depth)),
        attention_head_dim=heads,
        cross_attention_dim=config.context_width,
        use_linear_projection=config.linear_projection,
        addition_embed_type="text_time" if config.vector_width else None,
        addition_time_embed_dim=4 if config.vector_width else None,
        projection_class_embeddings_input_dim=config.vector_width,
    )
    return model.eval()


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-10)])
@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_unet_equals_its_peer(family: str, dtype: torch.dtype, tolerance: float) -> None:
    config = FAMILIES[family]
    ours = UNet(config).to(dtype).eval()
    randomise(ours, 1)
    theirs = peer(config).to(dtype)
    copy_weights(ours, theirs, UNET)
    x = torch.randn(2, config.channels_in, 12, 8, dtype=dtype)
    context = torch.randn(2, 5, config.context_width or 0, dtype=dtype)
    timestep = torch.tensor([3.0, 951.7])
    vector, added = None, None
    if config.vector_width:
        pooled, ids = torch.randn(2, config.vector_width - 6 * 4, dtype=dtype), torch.randint(0, 1024, (2, 6))
        added = {"text_embeds": pooled, "time_ids": ids}
        vector = torch.cat([pooled, theirs.add_time_proj(ids.flatten()).reshape(2, -1).to(dtype)], dim=1)
    expected = theirs(x, timestep, context, added_cond_kwargs=added).sample
    assert expected.std() > 0.1
    assert distance(ours(x, timestep.to(dtype), context, vector), expected) < tolerance


@torch.no_grad()
def test_odd_sizes_and_a_context_mask_equal_the_peers() -> None:
    ours, theirs = UNet(SD1).eval(), peer(SD1)
    randomise(ours, 2)
    copy_weights(ours, theirs, UNET)
    x, context, timestep = torch.randn(2, 4, 9, 7), torch.randn(2, 6, 24), torch.tensor([10.0, 500.0])
    mask = torch.arange(6)[None] < torch.tensor([[6], [2]])
    expected = theirs(x, timestep, context, encoder_attention_mask=mask).sample
    assert distance(ours(x, timestep, context, None, mask), expected) < 1e-5
    assert distance(ours(x, timestep, context), expected) > 1e-3
