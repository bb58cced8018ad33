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

from latentkit.checkpoints.names.rename import Pair, given, prefixed, taken
from latentkit.checkpoints.names.tower_names import (
    bert_text,
    folder_pairs,
    hugging_face_image,
    hugging_face_text,
    modern,
    open_clip_image,
    open_clip_text,
    single_file_pairs,
    unused,
)
from latentkit.errors import InputError
from latentkit.model.latent_diffusion import LatentDiffusion
from latentkit.model.presets import PRESETS
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
    state, complaints = taken(pairs, theirs, ours.state_dict())
    assert not complaints, complaints.lines()
    assert shapes(state) == shapes(ours.state_dict())
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
        one_to_one(pairs, ours, {name: torch.zeros(shape) for name, shape in expected.items()})


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
    expected = {f"ours.{name}": value for name, value in ours.state_dict().items()}
    theirs = {name: torch.randn(tensor.shape).to(dtype) for name, tensor in given(named, expected).items()}
    state, complaints = taken(named, theirs, expected)
    assert not complaints
    back = given(named, state)
    assert back.keys() == theirs.keys()
    assert all(torch.equal(back[name], theirs[name]) and back[name].is_contiguous() for name in theirs)


ROOTS = {
    "sd1.5": {"cond_stage_model.transformer.text_model.": 196},
    "sd2.1": {"cond_stage_model.model.": 2 + 23 * 12 + 2},
    "sdxl": {"conditioner.embedders.0.transformer.text_model.": 196, "conditioner.embedders.1.model.": 5 + 32 * 12},
    "sdxl-refiner": {"conditioner.embedders.0.model.": 5 + 32 * 12},
    "sd2.1-unclip-h": {"cond_stage_model.model.": 2 + 23 * 12 + 2, "embedder.model.visual.": 8 + 32 * 12},
    "sd2.1-unclip-l": {"cond_stage_model.model.": 2 + 23 * 12 + 2, "embedder.model.visual.": 8 + 24 * 12},
    "txt2img-1p4B": {"cond_stage_model.transformer.": 2 + 32 * 13 + 2},
    "cin256-v2": {"cond_stage_model.embedding.weight": 1},
}
"""Beginnings of names of single files, and how many tensors of the conditioners have them."""


@pytest.mark.parametrize("name", ROOTS)
def test_every_tensor_of_full_size_conditioners_has_its_place_in_a_single_file(name: str) -> None:
    architecture = PRESETS[name].architecture
    with torch.device("meta"):
        model = LatentDiffusion(architecture, {"label": {"classes": list(map(str, range(1000)))}})
    pairs = single_file_pairs(architecture)
    ours = {key for key in model.state_dict() if key.startswith("conditioners.")}
    assert sorted(name for pair in pairs for name in pair.ours) == sorted(ours - STATISTICS)
    assert {r: sum(p.theirs.startswith(r) for p in pairs) for r in ROOTS[name]} == ROOTS[name]
    assert sum(ROOTS[name].values()) == len(pairs) == len({pair.theirs for pair in pairs})
    assert not any(unused(pair.theirs) for pair in pairs)


STATISTICS = {"conditioners.image.mean", "conditioners.image.std"}


@pytest.mark.parametrize(
    ("name", "folders"),
    [
        ("sd1.5", ["text_encoder"]),
        ("sdxl", ["text_encoder", "text_encoder_2"]),
        ("sdxl-refiner", ["text_encoder_2"]),
        ("sd2.1-unclip-l", ["text_encoder", "image_encoder", "image_normalizer"]),
    ],
)
def test_every_tensor_of_full_size_conditioners_has_its_place_in_a_folder(name: str, folders: list[str]) -> None:
    with torch.device("meta"):
        model = LatentDiffusion(PRESETS[name].architecture, {})
    found = folder_pairs(PRESETS[name].architecture)
    assert list(found) == folders
    ours = [name for name in model.state_dict() if name.startswith("conditioners.")]
    assert sorted(name for pairs in found.values() for pair in pairs for name in pair.ours) == sorted(ours)


@pytest.mark.parametrize(("name", "what"), [("semantic_synthesis256", "map"), ("cin256", "label")])
def test_what_a_folder_cannot_hold_is_named(name: str, what: str) -> None:
    with pytest.raises(InputError, match=f"no place for this model's {what} conditioner"):
        folder_pairs(PRESETS[name].architecture)


@pytest.mark.parametrize(
    "name",
    [
        "cond_stage_model.transformer.text_model.embeddings.position_ids",
        "cond_stage_model.model.transformer.resblocks.23.ln_1.weight",
        "cond_stage_model.model.text_projection",
        "conditioner.embedders.1.model.logit_scale",
        "embedder.model.token_embedding.weight",
        "noise_augmentor.betas",
        "cond_stage_model.transformer.to_logits.weight",
    ],
)
def test_tensors_that_take_no_part_are_known(name: str) -> None:
    assert unused(name)
    assert not unused("x" + name.replace("position_ids", "position").replace("logit_scale", "x"))


def test_names_of_other_versions_are_brought_up_to_date() -> None:
    root = "cond_stage_model.transformer."
    assert modern(root + "encoder.layers.0.x", root) == root + "text_model.encoder.layers.0.x"
    assert modern("final_layer_norm.bias") == "text_model.final_layer_norm.bias"
    for name in (root + "text_model.encoder.x", "first_stage_model.encoder.x", root + "token_emb.weight"):
        assert modern(name, root) == name


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
    state, complaints = taken(pairs, tensors, ours.state_dict())
    assert not complaints
    ours.load_state_dict({name: value.double() for name, value in state.items()})
    difference = (ours(tensors["io.tokens"]) - tensors["io.y"]).abs().max()
    assert difference < 1e-10 * tensors["io.y"].abs().max()
