"""Names of towers elsewhere: every key of the peers' full-size models once, both ways without a changed bit."""

import json
import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from latentkit.checkpoints.tower_names import (
    Pair,
    bert_text,
    given,
    hugging_face_image,
    hugging_face_text,
    open_clip_image,
    open_clip_text,
    prefixed,
    taken,
)
from latentkit.nets.clip import (
    VIT_BIGG_TEXT,
    VIT_H_IMAGE,
    VIT_H_TEXT,
    VIT_L_IMAGE,
    VIT_L_TEXT,
    ClipImage,
    ClipImageConfig,
    ClipText,
    ClipTextConfig,
)
from latentkit.nets.towers import BertText, BertTextConfig

TEXT = {
    "L": (VIT_L_TEXT, 123.06),
    "H of 23 blocks": (replace(VIT_H_TEXT, layers=23, projection=None), 340.39),
    "H": (VIT_H_TEXT, 354.03),
    "bigG": (VIT_BIGG_TEXT, 694.66),
}
"""Shapes and millions of parameters (SD XL's paper: 817 million in L and bigG together)."""
IMAGES = {"L": (VIT_L_IMAGE, 303.97), "H": (VIT_H_IMAGE, 632.08)}


def millions(module: nn.Module) -> float:
    return round(sum(parameter.numel() for parameter in module.parameters()) / 1e6, 2)


def shapes(tensors: Any) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}


def one_to_one(pairs: Sequence[Pair], ours: nn.Module, theirs: dict[str, Tensor]) -> None:
    """Every tensor of both sides is mapped once, and has the shape that the other side has for it."""
    assert sorted(pair.theirs for pair in pairs) == sorted(theirs)
    assert sorted(name for pair in pairs for name in pair.ours) == sorted(ours.state_dict())
    assert shapes(taken(pairs, theirs)) == shapes(ours.state_dict())
    assert shapes(given(pairs, ours.state_dict())) == shapes(theirs)


@pytest.mark.parity
@pytest.mark.parametrize("name", TEXT)
def test_every_key_of_full_size_text_towers(name: str) -> None:
    transformers: Any = pytest.importorskip("transformers")
    config, count = TEXT[name]
    with torch.device("meta"):
        ours = ClipText(config)
        settings = transformers.CLIPTextConfig(
            hidden_size=config.width, num_hidden_layers=config.layers, num_attention_heads=config.heads,
            intermediate_size=4 * config.width, hidden_act=config.activation, projection_dim=config.width,
        )  # fmt: skip
        kind = transformers.CLIPTextModelWithProjection if config.projection else transformers.CLIPTextModel
        theirs = kind(settings)
    assert millions(ours) == count
    state = theirs.state_dict()
    one_to_one(hugging_face_text(config, "text_model." if config.projection else ""), ours, state)
    if not config.projection:
        state = {f"text_model.{key}": value for key, value in state.items()}
        one_to_one(hugging_face_text(config), ours, state)


@pytest.mark.parity
@pytest.mark.parametrize("name", IMAGES)
def test_every_key_of_full_size_image_towers(name: str) -> None:
    transformers: Any = pytest.importorskip("transformers")
    config, count = IMAGES[name]
    with torch.device("meta"):
        ours = ClipImage(config)
        settings = transformers.CLIPVisionConfig(
            hidden_size=config.width, num_hidden_layers=config.layers, num_attention_heads=config.heads, patch_size=14,
            intermediate_size=4 * config.width, hidden_act=config.activation, projection_dim=config.projection,
        )  # fmt: skip
        theirs = transformers.CLIPVisionModelWithProjection(settings)
    assert millions(ours) == count
    one_to_one(hugging_face_image(config), ours, theirs.state_dict())


BLOCK = {
    "ln_1.weight": (24,), "ln_1.bias": (24,), "attn.in_proj_weight": (72, 24), "attn.in_proj_bias": (72,),
    "attn.out_proj.weight": (24, 24), "attn.out_proj.bias": (24,), "ln_2.weight": (24,), "ln_2.bias": (24,),
    "mlp.c_fc.weight": (96, 24), "mlp.c_fc.bias": (96,), "mlp.c_proj.weight": (24, 96), "mlp.c_proj.bias": (24,),
}  # fmt: skip
OPEN_TEXT = {
    "positional_embedding": (9, 24), "token_embedding.weight": (60, 24), "ln_final.weight": (24,),
    "ln_final.bias": (24,), "text_projection": (24, 20),
    **{f"transformer.resblocks.{i}.{name}": shape for i in (0, 1) for name, shape in BLOCK.items()},
}  # fmt: skip
OPEN_IMAGE = {
    "visual.class_embedding": (24,), "visual.positional_embedding": (10, 24), "visual.conv1.weight": (24, 3, 4, 4),
    "visual.ln_pre.weight": (24,), "visual.ln_pre.bias": (24,), "visual.ln_post.weight": (24,),
    "visual.ln_post.bias": (24,), "visual.proj": (24, 16),
    **{f"visual.transformer.resblocks.{i}.{name}": shape for i in (0, 1) for name, shape in BLOCK.items()},
}  # fmt: skip
TINY_TEXT = ClipTextConfig(
    vocabulary=60, length=9, width=24, layers=2, heads=4, activation="gelu", projection=20, pad=0
)
TINY_IMAGE = ClipImageConfig(size=12, patch=4, width=24, layers=2, heads=4, activation="gelu", projection=16)
TINY_BERT = BertTextConfig(vocabulary=50, length=7, width=24, layers=2)


def test_every_key_of_open_clips_towers() -> None:
    for ours, pairs, expected in (
        (ClipText(TINY_TEXT), open_clip_text(TINY_TEXT), OPEN_TEXT),
        (ClipImage(TINY_IMAGE), open_clip_image(TINY_IMAGE), OPEN_IMAGE),
    ):
        one_to_one(pairs, ours, {name: torch.empty(shape) for name, shape in expected.items()})


@pytest.mark.parity
@torch.no_grad()
def test_open_clips_text_tower_is_what_diffusers_reads_it_as() -> None:
    transformers: Any = pytest.importorskip("transformers")
    loaders: Any = pytest.importorskip("diffusers.loaders.single_file_utils")
    config = replace(TINY_TEXT, projection=24)
    ours = ClipText(config).eval()
    written = given(prefixed(open_clip_text(config), "conditioner.embedders.1.model."), ours.state_dict())
    theirs = transformers.CLIPTextModelWithProjection(
        transformers.CLIPTextConfig(
            vocab_size=60,
            max_position_embeddings=9,
            hidden_size=24,
            num_hidden_layers=2,
            num_attention_heads=4,
            intermediate_size=96,
            hidden_act="gelu",
            projection_dim=24,
            eos_token_id=59,
            bos_token_id=58,
        )
    ).eval()
    read = loaders.convert_open_clip_checkpoint(theirs, written, prefix="conditioner.embedders.1.model.")
    theirs.load_state_dict(read, strict=True)
    ids = torch.tensor([[58, 7, 8, 59, 0, 0, 0, 0, 0]])
    context, vector = ours(ids, 59)
    expected = theirs(ids)
    torch.testing.assert_close(context, expected.last_hidden_state)
    torch.testing.assert_close(vector, expected.text_embeds)


@pytest.mark.parametrize(
    ("pairs", "ours"),
    [
        (hugging_face_text(TINY_TEXT), ClipText(TINY_TEXT)),
        (hugging_face_image(TINY_IMAGE), ClipImage(TINY_IMAGE)),
        (open_clip_text(TINY_TEXT), ClipText(TINY_TEXT)),
        (open_clip_image(TINY_IMAGE), ClipImage(TINY_IMAGE)),
        (bert_text(TINY_BERT), BertText(TINY_BERT)),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_there_and_back_changes_no_bit(pairs: list[Pair], ours: nn.Module, dtype: torch.dtype) -> None:
    named = prefixed(pairs, "theirs.", "ours.")
    theirs = {
        key: torch.randn(tensor.shape).to(dtype)
        for key, tensor in given(named, {f"ours.{key}": value for key, value in ours.state_dict().items()}).items()
    }
    back = given(named, taken(named, theirs))
    assert back.keys() == theirs.keys()
    assert all(torch.equal(back[key], theirs[key]) and back[key].is_contiguous() for key in theirs)


def test_a_missing_tensor_is_named() -> None:
    with pytest.raises(KeyError, match="token_emb"):
        taken(bert_text(TINY_BERT), {})


@torch.no_grad()
def test_the_2021_text_transformer_gives_what_the_original_gave() -> None:
    from safetensors import safe_open

    folder = os.environ.get("LATENTKIT_VECTORS")
    path = Path(folder or ".") / "bert_text_like.safetensors"
    if folder is None or not path.is_file():
        reason = "LATENTKIT_VECTORS names no folder with bert_text_like.safetensors: the 2021 encoder is not compared"
        print(reason)
        pytest.skip(reason)
    with safe_open(path, "pt") as file:
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        shape = json.loads(file.metadata()["config"])
    config = BertTextConfig(shape["num_tokens"], shape["max_seq_len"], shape["dim"], shape["depth"])
    pairs = prefixed(bert_text(config), "sd.cond_stage_model.transformer.")
    left = {key for key in tensors if key.startswith("sd.")} - {pair.theirs for pair in pairs}
    assert {key.split(".")[-2] for key in left} == {"to_logits"}
    ours = BertText(config).double().eval()
    ours.load_state_dict({key: value.double() for key, value in taken(pairs, tensors).items()})
    difference = (ours(tensors["io.tokens"]) - tensors["io.y"]).abs().max()
    assert difference < 1e-10 * tensors["io.y"].abs().max()
