"""The `config.json` of transformers' CLIP towers from the configs of ours, and back."""

import json
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from pydantic import TypeAdapter, ValidationError

from latentkit.errors import InputError
from latentkit.model.conditioners.image import MEAN, STD
from latentkit.nets.clip import ClipImageConfig, ClipTextConfig
from latentkit.nets.towers import BertTextConfig

VERSION = "4.57.0"
"""Of the transformers whose fields are written; later ones read them too."""
BLOCKS = {
    "width": "hidden_size",
    "layers": "num_hidden_layers",
    "heads": "num_attention_heads",
    "hidden": "intermediate_size",
    "activation": "hidden_act",
    "projection": "projection_dim",
}
TEXT = {**BLOCKS, "vocabulary": "vocab_size", "length": "max_position_embeddings"}
IMAGE = {**BLOCKS, "size": "image_size", "patch": "patch_size"}
"""Our fields and theirs."""
BERT = "LDMBertModel"
LDM_BERT = {
    "vocabulary": "vocab_size",
    "length": "max_position_embeddings",
    "width": "d_model",
    "layers": "encoder_layers",
    "heads": "encoder_attention_heads",
    "head_width": "head_dim",
}
"""The same of diffusers' class for the 2021 encoder, whose own values for what is not written are ours too."""
EPS = 1e-5
_TEXT, _IMAGE = TypeAdapter(ClipTextConfig), TypeAdapter(ClipImageConfig)


def text_config(what: str, values: Mapping[str, Any], *, pad: int | None, penultimate: bool) -> ClipTextConfig:
    """The tower of a text encoder's config.json; InputError names a field that cannot be run.

    `pad` is its tokenizer's (None: the end token); `penultimate` makes the context the state before the last block
    without the last norm, as SD XL's pipelines do.
    """
    fields = _fields(what, values, TEXT, vocab_size=49408, max_position_embeddings=77, projection_dim=512)
    fields |= {"pad": pad, "skip": int(penultimate), "final_norm": not penultimate}
    if "CLIPTextModelWithProjection" not in str(values.get("architectures")):
        fields["projection"] = None
    try:
        return _TEXT.validate_json(json.dumps(fields), strict=True)
    except ValidationError as error:
        raise _wrong(what, error) from None


def image_config(what: str, values: Mapping[str, Any]) -> ClipImageConfig:
    """The tower of an image encoder's config.json; errors as `text_config`."""
    if values.get("num_channels", 3) != 3:
        raise InputError(f"{what}: num_channels is {str(values['num_channels'])[:80]!r}; only 3 are run")
    try:
        return _IMAGE.validate_json(json.dumps(_fields(what, values, IMAGE, projection_dim=512)), strict=True)
    except ValidationError as error:
        raise _wrong(what, error) from None


def bert_config(what: str, values: Mapping[str, Any]) -> BertTextConfig:
    """The 2021 encoder of a config.json; errors as `text_config`."""
    usual = asdict(BertTextConfig())
    fields = {ours: values.get(theirs, usual[ours]) for ours, theirs in LDM_BERT.items()}
    for theirs, number in fields.items():
        if type(number) is not int or not 0 < number < 1 << 20:
            raise InputError(f"{what}: {LDM_BERT[theirs]} is {str(number)[:80]!r}; give a whole number above 0")
    for name, wanted in (("activation_function", "gelu"), ("encoder_ffn_dim", 4 * fields["width"])):
        if values.get(name, wanted if name != "encoder_ffn_dim" else 5120) != wanted:
            raise InputError(f"{what}: {name} is {str(values.get(name))[:80]!r}; only {wanted!r} is run")
    return BertTextConfig(**fields)


def bert_json(config: BertTextConfig) -> dict[str, Any]:
    """The config.json of our 2021 encoder."""
    fields = {theirs: getattr(config, ours) for ours, theirs in LDM_BERT.items()}
    return {
        "architectures": [BERT],
        "activation_function": "gelu",
        "encoder_ffn_dim": 4 * config.width,
        "model_type": "ldmbert",
        "pad_token_id": 0,
        "transformers_version": VERSION,
        **fields,
    }


def _fields(what: str, values: Mapping[str, Any], names: Mapping[str, str], **defaults: int) -> dict[str, Any]:
    """Our fields of their values; `defaults` are what transformers takes for fields that are not written."""
    given = {"hidden_act": "quick_gelu", "layer_norm_eps": EPS, **defaults, **values}
    missing = [theirs for theirs in names.values() if theirs not in given]
    if missing:
        raise InputError(f"{what}: fields {missing} are missing")
    if given["layer_norm_eps"] != EPS:
        raise InputError(f"{what}: layer_norm_eps is {str(given['layer_norm_eps'])[:80]!r}; only {EPS} is run")
    fields = {ours: given[theirs] for ours, theirs in names.items()}
    usual = isinstance(fields["width"], int) and fields["hidden"] == 4 * fields["width"]
    return fields | ({"hidden": None} if usual else {})


def _wrong(what: str, error: ValidationError) -> InputError:
    first = error.errors()[0]
    if not first["loc"]:
        return InputError(f"{what}: {first['msg'].removeprefix('Value error, ')}")
    name = {**TEXT, **IMAGE}.get(str(first["loc"][0]), str(first["loc"][0]))
    return InputError(f"{what}: {name} is {str(first['input'])[:80]!r}; {first['msg']}")


def text_json(config: ClipTextConfig, start: int = 49406, end: int = 49407) -> dict[str, Any]:
    """The config.json of our text tower, whose tokenizer's first and last ids are `start` and `end`.

    InputError where its context is none that diffusers' pipelines take.
    """
    if (config.skip, config.final_norm) not in ((0, True), (1, False)):
        raise InputError(
            f"diffusers' pipelines take the last state with the last norm, or the state before it without; this text "
            f"tower has skip {config.skip} and final_norm {config.final_norm}"
        )
    kind = "CLIPTextModelWithProjection" if config.projection else "CLIPTextModel"
    return {
        "architectures": [kind],
        "bos_token_id": start,
        "eos_token_id": end,
        "pad_token_id": end if config.pad is None else config.pad,
        "model_type": "clip_text_model",
        **_json(config, TEXT),
        "projection_dim": config.projection or config.width,
    }


def image_json(config: ClipImageConfig) -> dict[str, Any]:
    """The config.json of our image tower."""
    return {
        "architectures": ["CLIPVisionModelWithProjection"],
        "model_type": "clip_vision_model",
        "num_channels": 3,
        **_json(config, IMAGE),
    }


def preprocessor_json(config: ClipImageConfig) -> dict[str, Any]:
    """The preprocessor_config.json of what prepares pictures for our image tower."""
    side = {"height": config.size, "width": config.size}
    return {
        "image_processor_type": "CLIPImageProcessor",
        "crop_size": side,
        "do_center_crop": True,
        "do_convert_rgb": True,
        "do_normalize": True,
        "do_rescale": True,
        "do_resize": True,
        "image_mean": list(MEAN),
        "image_std": list(STD),
        "resample": 3,
        "rescale_factor": 1 / 255,
        "size": {"shortest_edge": config.size},
    }


def _json(config: Any, names: Mapping[str, str]) -> dict[str, Any]:
    fields = {theirs: getattr(config, ours) for ours, theirs in names.items()}
    hidden = config.hidden or 4 * config.width
    return {**fields, "intermediate_size": hidden, "layer_norm_eps": EPS, "transformers_version": VERSION}
