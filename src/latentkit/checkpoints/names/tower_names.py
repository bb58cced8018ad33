"""The names that other programs give the weights of text and image towers, generated from a tower's config.

Sources: transformers `modeling_clip.py`; OpenCLIP `transformer.py`; CompVis/latent-diffusion `x_transformer.py`;
Stability-AI/generative-models `encoders/modules.py` and stablediffusion `modules.py` for the places in single files.
"""

import re
from collections.abc import Collection, Iterable, Iterator, Mapping

import torch
from torch import Tensor

from latentkit.checkpoints.names.rename import Pair, prefixed
from latentkit.errors import InputError
from latentkit.model.latent_diffusion import Architecture
from latentkit.nets.clip import ClipImageConfig, ClipTextConfig
from latentkit.nets.towers import BertTextConfig

UNUSED = tuple(
    re.compile(pattern)
    for pattern in (
        r".*\.position_ids",  # numbers 0 to 76
        r".*\.(logit_scale|attn_mask)",
        r"cond_stage_model\.model\.(transformer\.resblocks\.23\..*|text_projection)",  # behind SD 2's context
        r"cond_stage_model\.transformer\.to_logits\..*",
        r"embedder\.model\.(?!visual\.).*",  # the text tower beside unCLIP's image tower
        r"noise_augmentor\..*",  # its schedule
        r"(cond_stage_model|conditioner\.embedders\.0)\.(text_projection|transformer\.text_projection\.weight)",
        r"embedding_manager\..*",  # of a trainer of textual inversions
    )
)
"""Tensors of single files that belong to text and image towers and take no part in a picture."""

ROOT = "cond_stage_model."
COMFY = re.compile(r"cond_stage_model\.clip_([lgh])\.")
"""What ComfyUI's own names of towers begin with, in files that some of its versions saved."""


def unused(name: str) -> bool:
    """Whether a tensor of a single file is one of `UNUSED`."""
    return any(pattern.fullmatch(name) for pattern in UNUSED)


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


def ldm_bert(config: BertTextConfig) -> list[Pair]:
    """The same in diffusers' LDMBertModel."""
    pairs = [Pair("embed_tokens.weight", ("token_embedding.weight",))]
    pairs.append(Pair("embed_positions.weight", ("position_embedding",)))
    for i in range(config.layers):
        theirs, ours = f"layers.{i}", f"blocks.{i}"
        pairs += _layer(f"{theirs}.self_attn_layer_norm", f"{ours}.norm_attention")
        for name in "qkv":
            pairs += _layer(f"{theirs}.self_attn.{name}_proj", f"{ours}.attention.{name}", ["weight"])
        pairs += _layer(f"{theirs}.self_attn.out_proj", f"{ours}.attention.out")
        pairs += _layer(f"{theirs}.final_layer_norm", f"{ours}.norm_feed")
        pairs += _layer(f"{theirs}.fc1", f"{ours}.feed_in")
        pairs += _layer(f"{theirs}.fc2", f"{ours}.feed_out")
    return prefixed([*pairs, *_layer("layer_norm", "norm_out")], "model.")


def bert_logits(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What LDMBertModel has behind its encoder, which takes no part in a picture: zeros."""
    words = tensors["model.embed_tokens.weight"]
    return {"to_logits.weight": torch.zeros_like(words), "to_logits.bias": torch.zeros_like(words[:, 0])}


def single_file_pairs(architecture: Architecture, names: Collection[str] = ()) -> list[Pair]:
    """Every tensor of the conditioners in the single files of CompVis and Stability, prefixes included.

    OpenAI's towers (quick_gelu) stand there as transformers names them, OpenCLIP's as OpenCLIP does unless the file's
    `names` have it as transformers does.
    """
    pairs: list[Pair] = []
    towers = architecture.clip.towers if architecture.clip else ()
    for index, tower in enumerate(towers):
        theirs = f"conditioner.embedders.{index}." if architecture.clip and architecture.clip.vector_width else ROOT
        open_clip = tower.activation == "gelu" and f"{theirs}transformer.text_model.final_layer_norm.bias" not in names
        named = open_clip_text(tower) if open_clip else hugging_face_text(tower)
        place = "model." if open_clip else "transformer."
        pairs += prefixed(named, theirs + place, f"conditioners.text.towers.{index}.")
    if architecture.bert:
        pairs += prefixed(bert_text(architecture.bert), ROOT + "transformer.", "conditioners.text.encoder.")
    if architecture.layout:
        pairs += prefixed(bert_text(architecture.layout), ROOT + "transformer.", "conditioners.layout.encoder.")
    if architecture.map:
        pairs.append(Pair(ROOT + "channel_mapper.weight", ("conditioners.map.mixing.weight",), axes=2))
    if architecture.label:
        pairs.append(Pair(ROOT + "embedding.weight", ("conditioners.label.embedding.weight",)))
    if architecture.image:
        theirs = "embedder.model." if architecture.image.slot == "vector" else ROOT + "model."
        pairs += prefixed(open_clip_image(architecture.image.tower), theirs, "conditioners.image.tower.")
    return pairs


def modern(name: str, root: str = "") -> str:
    """Today's name of a text tower's tensor below `root` that other versions write without `text_model.`.

    Single files older than 2023 do (`root` "cond_stage_model.transformer."), and transformers since its version 5.6.
    """
    below = name.removeprefix(root)
    flat = name.startswith(root) and below.startswith(("embeddings.", "encoder.", "final_layer_norm."))
    return f"{root}text_model.{below}" if flat else name


def of_comfy(names: Iterable[str]) -> dict[str, str]:
    """Each name as single files have it, where ComfyUI's own names of towers (`COMFY`) stand in some."""
    names = list(names)
    kinds = {match[1] for name in names if (match := COMFY.match(name))}
    places = {"l": ROOT, "h": ROOT}
    if "g" in kinds:
        places |= {"l": "conditioner.embedders.0.", "g": f"conditioner.embedders.{int('l' in kinds)}."}
    return {name: COMFY.sub(lambda match: places[match[1]], name) for name in names}


def folder_pairs(architecture: Architecture) -> dict[str, list[Pair]]:
    """Every tensor of the conditioners in a diffusers folder, by sub-folder; InputError for what it cannot hold."""
    others = ("text", "label", "layout", "map")
    if what := next((name for name in others if getattr(architecture, name)), None):
        raise InputError(f"diffusers' layout has no place for this model's {what} conditioner; only for CLIP's towers")
    folders: dict[str, list[Pair]] = {}
    if architecture.bert:
        folders["bert"] = prefixed(ldm_bert(architecture.bert), "", "conditioners.text.encoder.")
    towers = architecture.clip.towers if architecture.clip else ()
    for index, tower in enumerate(towers):
        folder = "text_encoder" if tower.projection is None else "text_encoder_2"
        folders[folder] = prefixed(hugging_face_text(tower), "", f"conditioners.text.towers.{index}.")
    if architecture.image:
        folders["image_encoder"] = prefixed(
            hugging_face_image(architecture.image.tower), "", "conditioners.image.tower."
        )
        if architecture.image.slot == "vector":
            folders["image_normalizer"] = [Pair(name, (f"conditioners.image.{name}",)) for name in ("mean", "std")]
    return folders
