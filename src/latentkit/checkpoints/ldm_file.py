"""Whole models in one file, in the layout of CompVis's and Stability's released code, read and written."""

import json
import re
from collections.abc import Collection, Mapping
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from latentkit.checkpoints.detect import DESCRIPTION, Found, single_file
from latentkit.checkpoints.files import Shapes, affordable, short
from latentkit.checkpoints.names.ldm_names import EMA, FIRST_STAGE, UNET, autoencoder_pairs, unet_pairs
from latentkit.checkpoints.names.rename import Complaints, Pair, finite, given, prefixed, taken
from latentkit.checkpoints.names.tower_names import ROOT, modern, of_comfy, single_file_pairs, unused
from latentkit.checkpoints.storage.archive import Archive, read_archive
from latentkit.checkpoints.storage.tensors import model_spec, write_tensors
from latentkit.checkpoints.storage.vocabulary import has_bert, is_shipped, read_bert
from latentkit.errors import InputError, together
from latentkit.model.first_stage import FirstStage
from latentkit.model.latent_diffusion import Architecture, LatentDiffusion
from latentkit.model.presets import PRESETS
from latentkit.nets.tiny import TinyConfig

OUR_UNET, OUR_FIRST_STAGE = "denoiser.unet.", "first_stage.autoencoder."
TEXT_ROOT = "cond_stage_model.transformer."
IGNORED = {
    "losses of the first stage": r"first_stage_model\.loss\..*",
    "buffers of the noise schedule": (
        r"(low_scale_model\.|noise_augmentor\.)?((sqrt_(one_minus_|recip_|recipm1_)?|log_one_minus_)?alphas_cumprod(_prev)?"
        r"|betas|sqrt_recipm?1?_alphas_cumprod|posterior_(variance|log_variance_clipped|mean_coef[12])|lvlb_weights|logvar"
        r"|scale_factor)|denoiser\.(sigmas|log_sigmas)|v_pred|ztsnr|edm_(mean|std)"
    ),
    "averaged weights": r"model_ema\..*",
    "a depth estimator, which is not run": r"depth_model\..*",
    "counters of training": r"(.*\.)?(num_batches_tracked|global_step)",
}
"""Tensors that take no part in a picture, by what they are."""
PLAIN = "weights in whose place their averages are"
TWICE = "the first stage a second time"
AUGMENTOR = "parts of a text or image tower that take no part"
OF_EMBEDDINGS = {f"conditioners.image.{kind}": f"noise_augmentor.data_{kind}" for kind in ("mean", "std")}
"""unCLIP's mean and deviation of embedded pictures."""


class Match(NamedTuple):
    """A file's tensors set against the model that it seems to hold."""

    found: Found
    model: LatentDiffusion
    """Without weights, on the meta device."""
    state: dict[str, Tensor]
    complaints: Complaints
    ignored: dict[str, list[str]]
    averaged: bool
    """Whether `state` has the U-Net's averaged weights."""
    averages: bool
    """Whether the file has them."""


def built(architecture: Architecture, state: dict[str, Any], what: str) -> LatentDiffusion:
    """The model without weights; InputError where its parts do not fit, or are more than can be meant."""
    affordable(what, [architecture.network, architecture.first_stage, *architecture.towers()])
    try:
        with torch.device("meta"), Shapes():
            return LatentDiffusion(architecture, state)
    except Exception as error:
        raise InputError(f"{what}: its architecture cannot be built: {short(error)}") from None


def single_pairs(model: LatentDiffusion, names: Collection[str] = ()) -> list[Pair]:
    """Every parameter of the model beside its released name; InputError for what that layout cannot hold.

    `names` are those of a file that is read (see `single_file_pairs`).
    """
    architecture = model.architecture
    coder = model.first_stage.autoencoder
    lacking = {
        "no text encoder of one's own; only CLIP's towers, the 2021 transformer, classes": architecture.text,
        "no diffusion on pixels; this model has no autoencoder": coder is None or None,
        "no latent consistency model; diffusers' and our own do": architecture.consistency,
    }
    together(
        *(partial(_refuse, what) for what, there in lacking.items() if there is not None),
        lambda: unet_pairs(model.denoiser.unet),
        lambda: coder and autoencoder_pairs(coder),
    )
    assert coder is not None
    return [
        *prefixed(unet_pairs(model.denoiser.unet), UNET, OUR_UNET),
        *prefixed(autoencoder_pairs(coder), FIRST_STAGE, OUR_FIRST_STAGE),
        *single_file_pairs(architecture, names),
    ]


def _refuse(what: str) -> None:
    raise InputError(f"the CompVis layout holds {what}")


def _averages(tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """The names of the U-Net's tensors with those of their averages, where the file has all of them."""
    names = {name: EMA + name.removeprefix("model.").replace(".", "") for name in tensors if name.startswith(UNET)}
    return names if set(names.values()) <= tensors.keys() else {}


def _renamed(tensors: Mapping[str, Tensor], what: str) -> dict[str, Tensor]:
    """The tensors under the names that text towers have in today's files; InputError where two come to one name."""
    renamed: dict[str, Tensor] = {}
    for name, new in of_comfy(tensors).items():
        new = modern(new, TEXT_ROOT)
        if new in renamed:
            raise InputError(f"{what}: holds {new} twice, under the names of two versions")
        renamed[new] = tensors[name]
    return renamed


def _seconds(tensors: Mapping[str, Tensor], pairs: list[Pair]) -> set[str]:
    """Names of the first stage's tensors in the place of a conditioner that this model does not have.

    inpainting_big saves it twice: it encodes the condition too (`__is_first_stage__`).
    """
    if any(pair.theirs.startswith(ROOT) for pair in pairs):
        return set()
    copies = {ROOT + name.removeprefix(FIRST_STAGE): name for name in tensors if name.startswith(FIRST_STAGE)}
    return {name for name in copies.keys() & tensors.keys() if tensors[name].shape == tensors[copies[name]].shape}


def match(
    archive: Archive, what: str, averaged: bool | None = None, folder: Path | None = None, *, keep: bool = False
) -> Match:
    """What the archive holds, and every tensor of it accounted for.

    `averaged` takes the U-Net's averaged weights; None: as the released code did, for the 2021 models where they are
    there, and not for Stable Diffusion. `folder` may hold the vocabulary of a model with BERT's (see `read_bert`),
    which is in no such file; `keep` as in `taken`. Errors: InputError where the kind of model cannot be known.
    """
    tensors = _renamed(archive.tensors, what)
    found = single_file(archive._replace(tensors=tensors), what)
    of_2021 = not (found.architecture.clip or "latentkit" in found.name)
    averages = _averages(tensors)
    used = averages if (of_2021 if averaged is None else averaged) else {}
    if averaged and not averages:
        raise InputError(f"{what}: has no averaged weights, or not all of them")
    state = dict(found.state)
    rows = tensors.get("cond_stage_model.embedding.weight")
    if found.architecture.label and rows is not None and "label" not in state:
        state["label"] = {"classes": [str(n) for n in range(len(rows) - found.architecture.label.null)]}
    if found.architecture.bert and not state.get("text", {}).get("tokenizer") and folder and has_bert(folder):
        state["text"] = {"tokenizer": read_bert(folder)}
    model = built(found.architecture, state, what)
    pairs = single_pairs(model, tensors)
    seconds = _seconds(tensors, pairs)
    buffers = dict(model.named_buffers())
    expected = {name: tensor for name, tensor in model.state_dict().items() if name not in buffers}
    ours, complaints = taken(pairs, tensors | {name: tensors[used[name]] for name in used}, expected, keep=keep)
    ignored: dict[str, list[str]] = {PLAIN: list(used)} if used else {}
    for name in tensors.keys() - {pair.theirs for pair in pairs} - set(used.values()):
        kind = next((kind for kind, pattern in IGNORED.items() if re.fullmatch(pattern, name)), None)
        if kind is None and unused(name):
            kind = AUGMENTOR
        if name in seconds:
            kind = TWICE
        if kind is None:
            complaints.unknown.append(name)
        else:
            ignored.setdefault(kind, []).append(name)
    ours |= statistics(model, [0.0], [1 / found.latent_scale])
    for name, theirs in OF_EMBEDDINGS.items():
        if name in ours and theirs in tensors:
            ignored[AUGMENTOR].remove(theirs)
            tensor = tensors[theirs].reshape(1, -1).float()
            if tensor.shape != ours[name].shape or not finite(tensor):
                complaints.shape.append(theirs)
            ours[name] = tensor
    return Match(found, model, ours, complaints, ignored, bool(used), bool(averages))


def statistics(model: LatentDiffusion, mean: Any, std: Any) -> dict[str, Tensor]:
    """The buffers of a model that was read: mean and deviation of raw latents (one number, or one by channel)."""
    channels = model.first_stage.latent_channels
    found = {name: torch.zeros(buffer.shape) for name, buffer in model.named_buffers()}
    found |= {name: torch.ones(buffer.shape) for name, buffer in model.named_buffers() if name.endswith("std")}
    found["first_stage.latent_mean"] = torch.tensor(mean, dtype=torch.float32).expand(channels).clone()
    found["first_stage.latent_std"] = torch.tensor(std, dtype=torch.float32).expand(channels).clone()
    return found


def filled(
    model: LatentDiffusion, state: Mapping[str, Tensor], device: torch.device, dtype: torch.dtype | None
) -> LatentDiffusion:
    """The model with its weights, frozen; what is of the type and on the device already is mapped, never copied."""
    buffers = dict(model.named_buffers())
    ready = {
        name: tensor.to(device, torch.float32 if name in buffers else dtype or tensor.dtype)
        for name, tensor in state.items()
    }
    model.load_state_dict(ready, assign=True)
    return model.eval().requires_grad_(False)


def read_single(
    path: str | Path,
    device: str | torch.device = "cpu",
    dtype: torch.dtype | None = None,
    averaged: bool | None = None,
) -> tuple[LatentDiffusion, Found]:
    """The model in a .ckpt or .safetensors file of the released code, and what was found; `dtype` None: as stored.

    `averaged`: see `match`. Errors: InputError names every tensor that is missing, left over or wrong.
    """
    matched = match(read_archive(Path(path)), str(path), averaged, Path(path).parent)
    matched.complaints.refuse(str(path))
    return filled(matched.model, matched.state, torch.device(device), dtype), matched.found


def folded(
    stage: FirstStage, scale: float, dtype: torch.dtype | None = None, prefix: str = OUR_FIRST_STAGE
) -> dict[str, Tensor]:
    """The autoencoder's outermost convolutions for latents that others multiply with `scale` and shift by nothing.

    Our latents are (raw - mean) / std by channel; theirs are raw times `scale`. So raw latents become
    (raw - mean) / (std scale), exactly, by changing the last 1x1 convolution of the encoder and the first of the
    decoder, in `dtype` (None: the weights'). Empty where there is nothing to change. Errors: InputError for a codebook,
    whose distances it would change.
    """
    mean, std = (part.double().cpu() for part in (stage.latent_mean, stage.latent_std))
    ratio = std * scale
    assert stage.autoencoder is not None
    if torch.allclose(ratio, torch.ones_like(ratio), rtol=1e-6) and not mean.any():
        return {}
    if isinstance(stage.autoencoder.config, TinyConfig):
        raise InputError(
            "latent statistics by channel cannot be folded into a tiny autoencoder, which bounds its latents"
        )
    if stage.autoencoder.config.codes:
        raise InputError("latent statistics cannot be folded into an autoencoder with a codebook")
    to, back = stage.autoencoder.to_moments, stage.autoencoder.from_latent
    rows = torch.cat([1 / ratio, torch.ones_like(ratio)])
    shift = torch.cat([-mean / ratio, -2 * ratio.log()])
    kinds = {
        "to_moments.weight": to.weight.double().cpu() * rows[:, None, None, None],
        "to_moments.bias": _bias(to).double().cpu() * rows + shift,
        "from_latent.weight": back.weight.double().cpu() * ratio[:, None, None],
        "from_latent.bias": _bias(back).double().cpu() + back.weight.double().cpu()[:, :, 0, 0] @ mean,
    }
    return {prefix + name: tensor.to(dtype or to.weight.dtype) for name, tensor in kinds.items()}


def _bias(layer: torch.nn.Conv2d) -> Tensor:
    assert layer.bias is not None
    return layer.bias


def usual_scale(stage: FirstStage) -> float:
    """The one factor on raw latents that this has, or Stable Diffusion's where it has statistics by channel."""
    mean, std = stage.latent_mean, stage.latent_std
    one = not mean.any() and torch.allclose(std, std[:1].expand_as(std), rtol=1e-6)
    return round(1 / float(std[0]), 7) if one else 0.18215


def write_single(
    path: str | Path,
    model: LatentDiffusion,
    title: str,
    dtype: torch.dtype | None = None,
    licence: str | None = None,
    date: str | None = None,
) -> None:
    """Write the model in the released layout with ModelSpec metadata; `dtype` None: as it is; `date`: see `model_spec`.

    Errors: InputError names what that layout cannot hold.
    """
    pairs = single_pairs(model)
    architecture = model.architecture
    _refuse_unsaid(architecture, model.state())
    scale = usual_scale(model.first_stage)
    tensors = given(pairs, model.state_dict() | folded(model.first_stage, scale, dtype))
    if dtype is not None:
        tensors = {name: tensor.to(dtype) for name, tensor in tensors.items()}
    if architecture.image and architecture.image.slot == "vector":
        tensors |= {theirs: model.state_dict()[ours].float() for ours, theirs in OF_EMBEDDINGS.items()}
    if architecture.prediction == "v":
        tensors["v_pred"] = torch.zeros(0)
    if architecture.schedule.zero_terminal:
        tensors["ztsnr"] = torch.zeros(0)
    document = {"architecture": asdict(architecture), "state": model.state(), "latent_scale": scale}
    height, width = architecture.size
    metadata = {
        DESCRIPTION: json.dumps(document, ensure_ascii=False, allow_nan=False),
        **model_spec(
            spec_name(architecture),
            title,
            date,
            resolution=f"{width}x{height}",
            prediction_type={"eps": "epsilon"}.get(architecture.prediction, architecture.prediction),
            license=licence,
        ),
    }
    write_tensors(Path(path), tensors, metadata)


def _refuse_unsaid(architecture: Architecture, state: Mapping[str, Any]) -> None:
    """InputError for what other programs take to be Stable Diffusion's own, because this layout has no word for it."""
    known = [preset.architecture for preset in PRESETS.values()]
    image = architecture.image
    schedules = [own.schedule for own in known if (own.clip is None) == (architecture.clip is None)]
    noises = [own.image.noise for own in known if own.image]
    text = state.get("text", {}).get("tokenizer") if architecture.clip else None
    for wrong, what in (
        (architecture.prediction not in ("eps", "v"), f"prediction {architecture.prediction!r}, only eps and v"),
        (
            replace(architecture.schedule, zero_terminal=False) not in schedules,
            f"noise schedule as this {architecture.schedule.kind!r} one, only those of released models",
        ),
        (image and image.noise not in noises, "noise of its own on embedded pictures, only unCLIP's cosine"),
        (text and not is_shipped(text), "vocabulary of one's own, only CLIP's"),
    ):
        if wrong:
            raise InputError(f"the CompVis layout holds no {what}; our own layout does")


def spec_name(architecture: Architecture) -> str:
    """ModelSpec's name of the kind of model, and of kinds that it does not list the one that programs use."""
    network, image = architecture.network, architecture.image
    concat = {5: "inpainting", 1: "depth"}.get(architecture.concat_channels)
    if network.context_width == 1280 and architecture.numbers:
        return "stable-diffusion-xl-v1-refiner"
    if network.context_width == 2048:
        return f"stable-diffusion-xl-v1-{concat or 'base'}"
    if network.context_width == 768:
        return "-".join(["stable-diffusion-v1", *(["variations"] if image else [concat] if concat else [])])
    if network.context_width != 1024:
        return "latent-diffusion"
    if network.classes:
        return "stable-diffusion-x4-upscaler"
    if image:
        return f"stable-diffusion-v2-unclip-{'l' if image.tower.projection == 768 else 'h'}"
    return f"stable-diffusion-v2-{concat or ('768-v' if architecture.prediction == 'v' else '512')}"
