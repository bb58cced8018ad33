"""The names that other programs give the weights of text and image towers, generated from a tower's config.

A `Pair` is one tensor of theirs and the tensors of ours that it holds. `taken` and `given` go one way and the other.
"""

from collections.abc import Iterable, Iterator, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from latentkit.nets.clip import ClipImageConfig, ClipTextConfig
from latentkit.nets.towers import BertTextConfig


class Pair(NamedTuple):
    """A tensor of theirs, and those of ours that it holds one after another along its first axis."""

    theirs: str
    ours: tuple[str, ...]
    transposed: bool = False
    """Theirs is a matrix that multiplies from the other side."""


def prefixed(pairs: Iterable[Pair], theirs: str, ours: str = "") -> list[Pair]:
    """The pairs with a prefix before each side's names."""
    return [Pair(theirs + p.theirs, tuple(ours + name for name in p.ours), p.transposed) for p in pairs]


def taken(pairs: Iterable[Pair], tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Our tensors, views of theirs; KeyError names a tensor that is missing."""
    state: dict[str, Tensor] = {}
    for theirs, ours, transposed in pairs:
        tensor = tensors[theirs].T if transposed else tensors[theirs]
        state |= zip(ours, tensor.chunk(len(ours)), strict=True)
    return state


def given(pairs: Iterable[Pair], state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Their tensors, contiguous."""
    tensors: dict[str, Tensor] = {}
    for theirs, ours, transposed in pairs:
        tensor = torch.cat([state[name] for name in ours]) if len(ours) > 1 else state[ours[0]]
        tensors[theirs] = (tensor.T if transposed else tensor).contiguous()
    return tensors


def _layer(theirs: str, ours: str, kinds: Iterable[str] = ("weight", "bias")) -> Iterator[Pair]:
    yield from (Pair(f"{theirs}.{kind}", (f"{ours}.{kind}",)) for kind in kinds)


def _hugging_face_blocks(layers: int) -> Iterator[Pair]:
    for i in range(layers):
        theirs, ours = f"encoder.layers.{i}", f"blocks.{i}"
        yield from _layer(f"{theirs}.layer_norm1", f"{ours}.norm_attention")
        for name in "qkv":
            yield from _layer(f"{theirs}.self_attn.{name}_proj", f"{ours}.attention.{name}")
        yield from _layer(f"{theirs}.self_attn.out_proj", f"{ours}.attention.out")
        yield from _layer(f"{theirs}.layer_norm2", f"{ours}.norm_feed")
        yield from _layer(f"{theirs}.mlp.fc1", f"{ours}.feed_in")
        yield from _layer(f"{theirs}.mlp.fc2", f"{ours}.feed_out")


def hugging_face_text(config: ClipTextConfig, prefix: str = "text_model.") -> list[Pair]:
    """transformers' CLIPTextModel, and CLIPTextModelWithProjection where the tower has a projection.

    Since its version 5.6 transformers writes the former with an empty `prefix`.
    """
    pairs = [
        Pair("embeddings.token_embedding.weight", ("token_embedding.weight",)),
        Pair("embeddings.position_embedding.weight", ("position_embedding",)),
        *_hugging_face_blocks(config.layers),
        *_layer("final_layer_norm", "norm_out"),
    ]
    projection = [Pair("text_projection.weight", ("projection.weight",))] if config.projection else []
    return prefixed(pairs, prefix) + projection


def hugging_face_image(config: ClipImageConfig) -> list[Pair]:
    """transformers' CLIPVisionModelWithProjection."""
    pairs = [
        Pair("embeddings.class_embedding", ("class_embedding",)),
        Pair("embeddings.patch_embedding.weight", ("patches.weight",)),
        Pair("embeddings.position_embedding.weight", ("position_embedding",)),
        *_layer("pre_layrnorm", "norm_in"),
        *_hugging_face_blocks(config.layers),
        *_layer("post_layernorm", "norm_out"),
    ]
    return [*prefixed(pairs, "vision_model."), Pair("visual_projection.weight", ("projection.weight",))]


def _open_clip_blocks(layers: int) -> Iterator[Pair]:
    for i in range(layers):
        theirs, ours = f"transformer.resblocks.{i}", f"blocks.{i}"
        yield from _layer(f"{theirs}.ln_1", f"{ours}.norm_attention")
        for kind in ("weight", "bias"):
            yield Pair(f"{theirs}.attn.in_proj_{kind}", tuple(f"{ours}.attention.{name}.{kind}" for name in "qkv"))
        yield from _layer(f"{theirs}.attn.out_proj", f"{ours}.attention.out")
        yield from _layer(f"{theirs}.ln_2", f"{ours}.norm_feed")
        yield from _layer(f"{theirs}.mlp.c_fc", f"{ours}.feed_in")
        yield from _layer(f"{theirs}.mlp.c_proj", f"{ours}.feed_out")


def open_clip_text(config: ClipTextConfig) -> list[Pair]:
    """OpenCLIP's text tower, whose q, k and v are one matrix and whose projection multiplies from the right."""
    projection = [Pair("text_projection", ("projection.weight",), transposed=True)] if config.projection else []
    return [
        Pair("positional_embedding", ("position_embedding",)),
        Pair("token_embedding.weight", ("token_embedding.weight",)),
        *_open_clip_blocks(config.layers),
        *_layer("ln_final", "norm_out"),
        *projection,
    ]


def open_clip_image(config: ClipImageConfig) -> list[Pair]:
    """The image tower of OpenCLIP and of OpenAI's CLIP."""
    pairs = [
        Pair("class_embedding", ("class_embedding",)),
        Pair("positional_embedding", ("position_embedding",)),
        Pair("conv1.weight", ("patches.weight",)),
        *_layer("ln_pre", "norm_in"),
        *_open_clip_blocks(config.layers),
        *_layer("ln_post", "norm_out"),
        Pair("proj", ("projection.weight",), transposed=True),
    ]
    return prefixed(pairs, "visual.")


def bert_text(config: BertTextConfig) -> list[Pair]:
    """The 2021 encoder (x-transformers): attention and feed-forward are layers of their own there."""
    pairs = [
        Pair("token_emb.weight", ("token_embedding.weight",)),
        Pair("pos_emb.emb.weight", ("position_embedding",)),
    ]
    for i in range(config.layers):
        attention, feed, ours = f"attn_layers.layers.{2 * i}", f"attn_layers.layers.{2 * i + 1}", f"blocks.{i}"
        pairs += _layer(f"{attention}.0", f"{ours}.norm_attention")
        for name in "qkv":
            pairs += _layer(f"{attention}.1.to_{name}", f"{ours}.attention.{name}", ["weight"])
        pairs += _layer(f"{attention}.1.to_out", f"{ours}.attention.out")
        pairs += _layer(f"{feed}.0", f"{ours}.norm_feed")
        pairs += _layer(f"{feed}.1.net.0.0", f"{ours}.feed_in")
        pairs += _layer(f"{feed}.1.net.2", f"{ours}.feed_out")
    return [*pairs, *_layer("norm", "norm_out")]
