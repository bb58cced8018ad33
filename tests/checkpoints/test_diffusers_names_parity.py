"""Networks that diffusers made load under its names, and compute the same."""

import json
from typing import Any

import pytest
import torch

from latentkit.checkpoints.names.diffusers_configs import autoencoder_config, autoencoder_json, unet_config, unet_json
from latentkit.checkpoints.names.diffusers_names import autoencoder_pairs, unet_pairs
from latentkit.checkpoints.names.rename import given, taken
from latentkit.nets.autoencoder import Autoencoder
from latentkit.nets.unet import UNet

pytestmark = pytest.mark.parity

CROSS = {
    "down_block_types": ("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
    "block_out_channels": (32, 64, 64),
    "layers_per_block": 1,
}
XL = {
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "block_out_channels": (32, 64, 128),
    "layers_per_block": 1,
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 8,
}
PLAIN = {
    "down_block_types": ("DownBlock2D", "AttnDownBlock2D", "AttnDownBlock2D"),
    "up_block_types": ("AttnUpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
    "block_out_channels": (32, 64, 64),
    "layers_per_block": 1,
    "attention_head_dim": 32,
}
UNETS: dict[str, dict[str, Any]] = {
    "SD 1": CROSS | {"cross_attention_dim": 24, "attention_head_dim": 8},
    "SD 1 inpainting": CROSS | {"cross_attention_dim": 24, "attention_head_dim": 8, "in_channels": 9},
    "SD 2": CROSS | {"cross_attention_dim": 40, "attention_head_dim": [2, 4, 4], "use_linear_projection": True},
    "x4 upscaler": {
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        "block_out_channels": (32, 64, 96),
        "in_channels": 7,
        "cross_attention_dim": 40,
        "attention_head_dim": 8,
        "use_linear_projection": True,
        "num_class_embeds": 50,
        "only_cross_attention": (True, True, False),
    },
    "unCLIP": CROSS
    | {
        "cross_attention_dim": 40,
        "attention_head_dim": [2, 4, 4],
        "use_linear_projection": True,
        "class_embed_type": "projection",
        "projection_class_embeddings_input_dim": 20,
    },
    "XL": XL
    | {
        "cross_attention_dim": 48,
        "attention_head_dim": [2, 4, 8],
        "transformer_layers_per_block": [1, 2, 3],
        "projection_class_embeddings_input_dim": 68,
    },
    "XL refiner": {
        **XL,
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        "cross_attention_dim": 40,
        "attention_head_dim": [2, 4, 8],
        "transformer_layers_per_block": 2,
        "projection_class_embeddings_input_dim": 60,
    },
    "plain attention": PLAIN,
    "plain attention, residual resampling": PLAIN
    | {
        "down_block_types": ("ResnetDownsampleBlock2D", "AttnDownBlock2D", "AttnDownBlock2D"),
        "up_block_types": ("AttnUpBlock2D", "AttnUpBlock2D", "ResnetUpsampleBlock2D"),
        "resnet_time_scale_shift": "scale_shift",
        "attn_norm_num_groups": 32,
        "downsample_type": "resnet",
        "upsample_type": "resnet",
    },
}


def random(module: Any) -> Any:
    """The peer with no parameter at its start, activations near 1."""
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in module.parameters():
            fan_in = parameter[0].numel() if parameter.ndim > 1 else 4
            parameter.copy_(torch.randn_like(parameter) / fan_in**0.5 + (parameter.ndim == 1) * 0.5)
    return module.eval()


def distance(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    return ((ours - theirs).abs().max() / theirs.abs().max()).item()


@pytest.mark.parametrize("family", UNETS)
@torch.no_grad()
def test_a_unet_loads_runs_and_goes_back(family: str) -> None:
    import diffusers

    kind: Any = diffusers.UNet2DModel if "plain" in family else diffusers.UNet2DConditionModel
    theirs: Any = random(kind(sample_size=8, **UNETS[family]))
    config, place = unet_config("config.json", json.loads(theirs.to_json_string()))
    ours = UNet(config)
    pairs = unet_pairs(ours, place)
    tensors = theirs.state_dict()
    assert sorted(pair.theirs for pair in pairs) == sorted(tensors)
    state, complaints = taken(pairs, tensors, ours.state_dict())
    assert not complaints
    back = given(pairs, state)
    assert all(torch.equal(back[name], tensors[name]) for name in tensors)
    again = kind.from_config(unet_json(config, 8, place, 8))
    again.load_state_dict(back, strict=True)

    ours.load_state_dict(state)
    for dtype, tolerance in ((torch.float32, 1e-5), (torch.float64, 1e-10)):
        ours, theirs, again = ours.to(dtype).eval(), theirs.to(dtype), again.to(dtype).eval()
        x, timestep = torch.randn(2, config.channels_in, 8, 12, dtype=dtype), torch.tensor([3.0, 951.7])
        given_ours: dict[str, Any] = {}
        given_theirs: dict[str, Any] = {}
        if config.context_width:
            given_ours["context"] = given_theirs["encoder_hidden_states"] = torch.randn(
                2, 5, config.context_width, dtype=dtype
            )
        if config.classes:
            given_theirs["class_labels"] = torch.tensor([3, 41])
            given_ours["vector"] = torch.tensor([[3.0], [41.0]])
        elif config.vector_width and place == "class_embedding":
            given_ours["vector"] = given_theirs["class_labels"] = torch.randn(2, config.vector_width, dtype=dtype)
        elif config.vector_width:
            count = (config.vector_width - 20) // 8
            pooled, ids = torch.randn(2, config.vector_width - 8 * count, dtype=dtype), torch.rand(2, count) * 1024
            waves = theirs.add_time_proj(ids.flatten()).reshape(2, -1).to(dtype)
            given_ours["vector"] = torch.cat([pooled, waves], 1)
            given_theirs["added_cond_kwargs"] = {"text_embeds": pooled, "time_ids": ids}
        expected = theirs(x, timestep, **given_theirs).sample
        assert expected.std() > 0.1
        assert distance(ours(x, timestep, **given_ours), expected) < tolerance
        assert torch.equal(again(x, timestep, **given_theirs).sample, expected)


AUTOENCODERS: dict[str, dict[str, Any]] = {
    "kl": {"latent_channels": 4, "scaling_factor": 0.3},
    "kl f16": {"latent_channels": 6, "attended": 1, "latents_mean": [0.5] * 6, "latents_std": [2.0] * 6},
    "vq": {"latent_channels": 3, "num_vq_embeddings": 40},
    "vq without attention": {"latent_channels": 3, "num_vq_embeddings": 40, "mid_block_add_attention": False},
    "vq f16": {"latent_channels": 5, "num_vq_embeddings": 40, "attended": 2},
}


@pytest.mark.parametrize("family", AUTOENCODERS)
@torch.no_grad()
def test_an_autoencoder_loads_runs_and_goes_back(family: str) -> None:
    import diffusers

    fields = dict(AUTOENCODERS[family])
    attended = fields.pop("attended", 0)
    kind: Any = diffusers.VQModel if "vq" in family else diffusers.AutoencoderKL
    theirs: Any = random(
        kind(
            block_out_channels=(32, 64, 64),
            layers_per_block=1,
            down_block_types=("DownEncoderBlock2D",) * (3 - attended) + ("AttnDownEncoderBlock2D",) * attended,
            up_block_types=("AttnUpDecoderBlock2D",) * attended + ("UpDecoderBlock2D",) * (3 - attended),
            **fields,
        )
    )
    config, statistics = autoencoder_config("config.json", json.loads(theirs.to_json_string()))
    ours = Autoencoder(config)
    pairs = autoencoder_pairs(ours)
    tensors = theirs.state_dict()
    assert sorted(pair.theirs for pair in pairs) == sorted(tensors)
    state, complaints = taken(pairs, tensors, ours.state_dict())
    assert not complaints
    back = given(pairs, state)
    again = kind.from_config(autoencoder_json(config, 16, 0.3))
    again.load_state_dict(back, strict=True)
    assert all(torch.equal(back[name], tensors[name]) for name in tensors)
    assert statistics.std[0] == pytest.approx(
        2 / 0.18215 if family == "kl f16" else 1 / fields.get("scaling_factor", 0.18215)
    )
    assert statistics.mean == ((0.5,) * 6 if family == "kl f16" else (0.0,) * config.latent_channels)

    ours.load_state_dict(state)
    for dtype, tolerance in ((torch.float32, 1e-5), (torch.float64, 1e-10)):
        ours, theirs, again = ours.to(dtype).eval(), theirs.to(dtype), again.to(dtype).eval()
        pixels = torch.randn(2, 3, 16, 24, dtype=dtype)
        expected = theirs.quant_conv(theirs.encoder(pixels))
        assert distance(ours.to_moments(ours.encoder(pixels)), expected) < tolerance
        z = expected[:, : config.latent_channels]
        drawn = theirs.decode(z).sample
        assert drawn.std() > 0.1
        assert distance(ours.decode(z), drawn) < tolerance
        assert torch.equal(again.decode(z).sample, drawn)
