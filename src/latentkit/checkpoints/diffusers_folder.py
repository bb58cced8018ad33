"""Whole models as a diffusers folder, read and written: U-Net, autoencoder, CLIP towers, tokenizers, scheduler."""

import re
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from latentkit.checkpoints.ldm_file import OUR_FIRST_STAGE, OUR_UNET, built, filled, folded, statistics, usual_scale
from latentkit.checkpoints.names import diffusers_names, tiny_names, tower_configs, tower_names
from latentkit.checkpoints.names.diffusers_configs import (
    VERSION,
    Statistics,
    autoencoder_config,
    autoencoder_json,
    real,
    unet_config,
    unet_json,
)
from latentkit.checkpoints.names.rename import Complaints, Pair, given, prefixed, taken
from latentkit.checkpoints.names.tower_configs import (
    image_config,
    image_json,
    preprocessor_json,
    text_config,
    text_json,
)
from latentkit.checkpoints.storage.archive import read_json, read_part, variants
from latentkit.checkpoints.storage.folders import whole_folder
from latentkit.checkpoints.storage.tensors import write_json, write_tensors
from latentkit.checkpoints.storage.vocabulary import Vocabulary, read_bert, read_clip, write_bert, write_clip
from latentkit.diffusion.schedule import NoiseSchedule
from latentkit.errors import InputError, together
from latentkit.model.conditioners.clip import ClipConfig
from latentkit.model.conditioners.image import ImageConfig
from latentkit.model.conditioners.numbers import UPSCALER_NUMBERS, NumbersConfig
from latentkit.model.denoiser import ConsistencyConfig, PredictionName
from latentkit.model.latent_diffusion import Architecture, LatentDiffusion
from latentkit.nets.autoencoder import AutoencoderConfig
from latentkit.nets.tiny import TinyConfig
from latentkit.nets.unet import UNetConfig

INDEX = "model_index.json"
PARTS = {
    "unet": ("UNet2DConditionModel", "UNet2DModel"),
    "vae": ("AutoencoderKL", "VQModel", tiny_names.CLASS),
    "vqvae": ("AutoencoderKL", "VQModel"),
    "text_encoder": ("CLIPTextModel",),
    "text_encoder_2": ("CLIPTextModelWithProjection",),
    "tokenizer": ("CLIPTokenizer", "CLIPTokenizerFast", "BertTokenizer", "BertTokenizerFast"),
    "tokenizer_2": ("CLIPTokenizer", "CLIPTokenizerFast"),
    "bert": (tower_configs.BERT,),
    "image_encoder": ("CLIPVisionModelWithProjection",),
    "image_normalizer": ("StableUnCLIPImageNormalizer",),
}
"""Parts that are run, and the classes that they may have."""
LEFT = {
    "safety_checker", "feature_extractor", "image_processor", "watermarker", "watermark", "depth_estimator",
    "image_noising_scheduler", "low_res_scheduler", "scheduler",
}  # fmt: skip
"""Parts of any class: they are left aside, or read as numbers."""
NOT_READ = sorted(LEFT - {"scheduler", "image_noising_scheduler"})
LIBRARIES = {"diffusers", "transformers", "stable_diffusion", "latent_diffusion"}
SCHEDULES = {"linear": "linear", "scaled_linear": "scaled_linear", "squaredcos_cap_v2": "cosine"}
LEFT_EMPTY = ("StableDiffusionPipeline", "StableDiffusionInpaintPipeline", "LatentConsistencyModelPipeline")
"""Pipelines whose safety checker is left out."""
LCM = "LCMScheduler"
SCHEDULERS = {
    f"{name}Scheduler"
    for name in (
        "DDIM", "DDIMInverse", "DDIMParallel", "DDPM", "DDPMParallel", "DEISMultistep", "DPMSolverMultistep",
        "DPMSolverMultistepInverse", "DPMSolverSDE", "DPMSolverSinglestep", "EulerAncestralDiscrete", "EulerDiscrete",
        "HeunDiscrete", "KDPM2AncestralDiscrete", "KDPM2Discrete", "LCM", "LMSDiscrete", "PNDM", "SASolver", "TCD",
        "UniPCMultistep",
    )
}  # fmt: skip
"""Classes that take noise laid out by betas and steps by their number, whichever way they step."""
OTHERWISE = {"sigma_data": None, "use_flow_sigmas": False, "timestep_type": "discrete"}
"""Fields by which such a class becomes one of another noise, and what they say where it does not."""
OWN = {"image_normalizer": "stable_diffusion", "bert": "latent_diffusion"}
"""Parts whose classes are those of a pipeline."""
FILES = {"feature_extractor": "preprocessor_config.json"}
"""Files of parts whose fields do not stand in config.json or scheduler_config.json."""
LOW_RESOLUTION = NoiseSchedule(kind="scaled_linear", beta_start=0.0001, beta_end=0.02)
"""The noise that the x4 upscaler's small picture gets."""
PREDICTIONS = {"epsilon": "eps", "v_prediction": "v", "sample": "x0"}
USUAL = {"beta_schedule": "linear", "prediction_type": "epsilon"}
"""What diffusers takes for fields that are not written."""


class Folder(NamedTuple):
    """A folder's tensors set against the model that it seems to hold."""

    model: LatentDiffusion
    """Without weights, on the meta device."""
    state: dict[str, Tensor]
    complaints: Complaints
    ignored: dict[str, list[str]]
    """Parts and tensors that take no part in a picture, by what they are."""


def is_folder(path: Path) -> bool:
    """Whether a folder is one that diffusers wrote."""
    return (path / INDEX).is_file()


def read_folder(
    path: str | Path,
    device: str | torch.device = "cpu",
    dtype: torch.dtype | None = None,
    variant: str | None = None,
) -> LatentDiffusion:
    """The model in a diffusers folder; `dtype` None: as stored. Only its CLIP towers and tokenizers are understood.

    `variant`: see `read_part`; parts that have none of it are read plain.
    Errors: InputError names parts, fields and tensors that cannot be run, are missing or left over.
    """
    found = match_folder(Path(path), variant)
    found.complaints.refuse(str(path))
    return filled(found.model, found.state, torch.device(device), dtype)


def match_folder(path: Path, variant: str | None = None, *, keep: bool = False) -> Folder:
    """What the folder holds, and every tensor of it accounted for; `keep` as in `taken`."""
    if variant is not None and variant not in (known := variants(path)):
        got = f"{path}: no part has weights of the variant {variant!r}"
        raise InputError(f"{got}; there is {', '.join(known) or 'none'}", exit_code=2)
    index = read_json(path / INDEX)
    kinds = _parts(path, index)
    unet_json_ = read_json(path / "unet" / "config.json") | {"_class_name": kinds["unet"]}
    network, place = unet_config(str(path / "unet" / "config.json"), unet_json_)
    coder = "vqvae" if "vqvae" in kinds else "vae"
    coder_json = read_json(path / coder / "config.json") | {"_class_name": kinds[coder]}
    first_stage, scaling = _first_stage(str(path / coder / "config.json"), coder_json)
    towers, state = _towers(path, kinds)
    size = _cells(path, unet_json_.get("sample_size") or 64) * first_stage.downsampling
    schedule, prediction = _schedule(path / "scheduler" / "scheduler_config.json")
    consistency = _consistency(path, unet_json_.get("time_cond_proj_dim"))
    absent = "zero" if index.get("force_zeros_for_empty_prompt") and len(towers) > 1 else "empty"
    clip = ClipConfig(tuple(towers), absent=absent) if towers else None  # type: ignore[arg-type]
    bert = None
    if "bert" in kinds:
        bert = tower_configs.bert_config(str(path / "bert"), read_json(path / "bert" / "config.json"))
        state = read_bert(path / "tokenizer")
    image = None
    if "image_encoder" in kinds:
        tower = image_config(str(path), read_json(path / "image_encoder" / "config.json"))
        image = ImageConfig(tower, slot="vector" if network.vector_width else "context")
        noising = path / "image_noising_scheduler" / "scheduler_config.json"
        if noising.is_file():
            image = replace(image, noise=_schedule(noising)[0])
    architecture = Architecture(
        network=network,
        first_stage=first_stage,
        picture_channels=first_stage.picture_channels,
        concat_channels=network.channels_in - first_stage.latent_channels,
        size=(size, size),
        schedule=schedule,
        prediction=prediction,
        consistency=consistency,
        clip=clip,
        bert=bert,
        numbers=_numbers(network, place, clip, unet_json_.get("addition_time_embed_dim"), size),
        image=image,
    )
    model = built(architecture, {"text": {"tokenizer": state}} if clip or bert else {}, str(path))
    found = _matched(path, model, place, coder, scaling, variant, keep)
    aside = [name for name in NOT_READ if index.get(name) not in (None, [None, None])]
    return found._replace(ignored=found.ignored | {"parts that are not run": aside})


def _cells(path: Path, said: Any) -> int:
    """The side of the latents that the network was trained on, of a sample_size that is one number or two."""
    cells = said[0] if isinstance(said, list) and said else said
    if type(cells) is not int or not 0 < cells < 1 << 16:
        raise InputError(f"{path}: sample_size is {str(said)[:80]!r}; give a whole number above 0, or two")
    return cells


def _first_stage(what: str, values: Mapping[str, Any]) -> tuple[AutoencoderConfig | TinyConfig, Statistics]:
    """Our config of an autoencoder of any class, and the statistics that its latents are scaled with."""
    if values["_class_name"] != tiny_names.CLASS:
        return autoencoder_config(what, values)
    config, scale, shift = tiny_names.tiny_config(what, values)
    return config, Statistics((shift,) * config.latent_channels, (1 / scale,) * config.latent_channels)


def _matched(
    path: Path, model: LatentDiffusion, place: str, coder: str, scaling: Statistics, variant: str | None, keep: bool
) -> Folder:
    complaints = Complaints()
    aside: list[str] = []
    state = statistics(model, scaling.mean, scaling.std)
    expected = model.state_dict()
    for folder, pairs in _pairs(model, place, coder).items():
        tensors = {_modern(folder, name): tensor for name, tensor in read_part(path / folder, variant).items()}
        own = {name: expected[name] for pair in pairs for name in pair.ours}
        ours, wrong = taken(pairs, tensors, own, keep=keep)
        left = tensors.keys() - {pair.theirs for pair in pairs}
        numbers = {name for name in left if re.fullmatch(r"(.*\.)?position_ids|to_logits\..*", name)}
        aside += [f"{folder}/{name}" for name in numbers]
        wrong.unknown += left - numbers
        for kind in Complaints.WORDS:
            setattr(wrong, kind, [f"{folder}/{name}" for name in getattr(wrong, kind)])
        complaints.extend(wrong)
        state |= ours
    return Folder(model, state, complaints, {"tensors that take no part in a picture": aside})


def _modern(folder: str, name: str) -> str:
    if folder.startswith("text_encoder"):
        return tower_names.modern(name)
    return diffusers_names.modern(name) if folder in ("vae", "vqvae") else name


def _pairs(model: LatentDiffusion, place: str, coder: str = "vae") -> dict[str, list[Pair]]:
    """Every parameter beside its name, by sub-folder; InputError for what the layout cannot hold."""
    if model.first_stage.autoencoder is None:
        raise InputError("the diffusers layout holds no diffusion on pixels; this model has no autoencoder")
    unet = prefixed(diffusers_names.unet_pairs(model.denoiser.unet, place), "", OUR_UNET)
    if model.architecture.distilled:
        unet.append(Pair("time_embedding.cond_proj.weight", ("denoiser.guidance_embedding.weight",)))
    return {
        "unet": unet,
        coder: prefixed(diffusers_names.autoencoder_pairs(model.first_stage.autoencoder), "", OUR_FIRST_STAGE),
        **tower_names.folder_pairs(model.architecture),
    }


def _parts(path: Path, index: Mapping[str, Any]) -> dict[str, str]:
    """The class of each part that is run; InputError names foreign ones. No class is looked up."""
    kinds: dict[str, str] = {}
    for name, entry in index.items():
        if name.startswith("_") or not isinstance(entry, list) or entry == [None, None]:
            continue
        if name in LEFT:
            continue
        if len(entry) != 2 or str(entry[0]) not in LIBRARIES or name not in PARTS or entry[1] not in PARTS[name]:
            known = ", ".join(PARTS.get(name, ())) or "none of that name"
            raise InputError(f"{path / INDEX}: part {name[:80]!r} is of {str(entry)[:80]}; known are {known}")
        kinds[name] = entry[1]
    for name in ("unet", "vae"):
        if name not in kinds and not (name == "vae" and "vqvae" in kinds):
            raise InputError(f"{path / INDEX}: names no {name}; only latent diffusion with a U-Net is read")
    return kinds


def _towers(path: Path, kinds: Mapping[str, str]) -> tuple[list[Any], str | None]:
    """The text towers, and their tokenizer's JSON text."""
    towers, texts = [], []
    for end in ("", "_2"):
        if f"text_encoder{end}" not in kinds:
            continue
        vocabulary = read_clip(path / f"tokenizer{end}") if f"tokenizer{end}" in kinds else Vocabulary(None, None)
        file = path / f"text_encoder{end}" / "config.json"
        values = read_json(file) | {"architectures": [kinds[f"text_encoder{end}"]]}
        towers.append(text_config(str(file), values, pad=vocabulary.pad, penultimate="text_encoder_2" in kinds))
        texts.append(vocabulary.tokenizer)
    if len(set(texts)) > 1:
        raise InputError(f"{path}: its two tokenizers have different vocabularies; they must have one")
    return towers, texts[0] if texts else None


def _numbers(network: UNetConfig, place: str, clip: ClipConfig | None, width: Any, size: int) -> NumbersConfig | None:
    """What the network is told in numbers, from the width that the rest of its vector leaves."""
    if network.classes:
        return UPSCALER_NUMBERS
    if place != "add_embedding" or not network.vector_width or not isinstance(width, int) or width < 1:
        return None
    count = (network.vector_width - (clip.vector_width if clip else 0)) // width
    if count not in (5, 6):
        raise InputError(f"the U-Net's vector has room for {count} numbers of width {width}; 6 (XL) or 5 (refiner)")
    return NumbersConfig((size, size, 0, 0, size, size) if count == 6 else (size, size, 0, 0, 6), width=width)


def _schedule(path: Path) -> tuple[NoiseSchedule, PredictionName]:
    values = read_json(path)
    if (name := str(values.get("_class_name", "DDIMScheduler"))) not in SCHEDULERS:
        raise InputError(f"{path}: _class_name is {name[:80]!r}, which is not read; only schedulers of betas are")
    for field, plain in OTHERWISE.items():
        if (value := values.get(field, plain)) != plain:
            raise InputError(f"{path}: {field} is {str(value)[:80]!r}, which asks for other noise than that of betas")
    told = [str(values.get(name, usual))[:80] for name, usual in USUAL.items()]
    kind, prediction = SCHEDULES.get(told[0]), PREDICTIONS.get(told[1])
    if kind is None or prediction is None:
        raise InputError(
            f"{path}: beta_schedule is {told[0]!r} and prediction_type {told[1]!r}; known are "
            f"{', '.join(SCHEDULES)} and {', '.join(PREDICTIONS)}"
        )
    steps = values.get("num_train_timesteps", 1000)
    if type(steps) is not int or not 0 < steps <= 100_000 or values.get("trained_betas") is not None:
        raise InputError(f"{path}: num_train_timesteps is {str(steps)[:80]!r}, or betas are listed; neither is read")
    if kind == "cosine":  # it has no betas to begin and end with
        return NoiseSchedule(kind="cosine", steps=steps), cast(PredictionName, prediction)
    betas = [values.get("beta_start", 0.0001), values.get("beta_end", 0.02)]
    if not all(map(real, betas)):
        raise InputError(f"{path}: beta_start and beta_end are {str(betas)[:80]}; give numbers")
    schedule = NoiseSchedule(
        kind=cast(Any, kind),
        beta_start=float(betas[0]),
        beta_end=float(betas[1]),
        steps=steps,
        zero_terminal=bool(values.get("rescale_betas_zero_snr", False)),
    )
    return schedule, cast(PredictionName, prediction)


def _consistency(path: Path, width: Any) -> ConsistencyConfig | None:
    """What makes it a latent consistency model: its scheduler, or that its U-Net is told a guidance scale."""
    values = read_json(path / "scheduler" / "scheduler_config.json")
    told = values.get("_class_name") == LCM
    if not told and width is None:
        return None
    scale = values.get("timestep_scaling", 10.0) if told else 10.0
    if not real(scale) or scale <= 0:
        raise InputError(f"{path}: timestep_scaling is {repr(scale)[:80]}; give a number above 0")
    if width is not None and (type(width) is not int or not 4 <= width <= 1 << 16):
        raise InputError(f"{path}: time_cond_proj_dim is {str(width)[:80]!r}; give a whole number from 4 on")
    return ConsistencyConfig(float(scale), width)


def write_folder(path: str | Path, model: LatentDiffusion, dtype: torch.dtype | None = None) -> None:
    """Write the model as a diffusers folder with every file that its pipelines ask for; `dtype` None: as it is.

    Errors: InputError names all that the layout cannot hold, and a disk that refuses; nothing is written then.
    """
    root, architecture = Path(path), model.architecture
    place = "class_embedding" if architecture.image and architecture.image.slot == "vector" else "add_embedding"
    coder = "vqvae" if architecture.network.plain_attention or architecture.bert else "vae"
    _refuse(model, place)
    scale = usual_scale(model.first_stage)
    changed = model.state_dict() | folded(model.first_stage, scale, dtype)
    stage = architecture.first_stage
    assert stage is not None
    cells = architecture.size[0] // stage.downsampling
    wave = architecture.numbers.width if architecture.numbers and architecture.numbers.width else 256
    configs: dict[str, dict[str, Any]] = {
        "unet": unet_json(architecture.network, cells, place, wave),
        coder: (
            tiny_names.tiny_json(stage, scale)
            if isinstance(stage, TinyConfig)
            else autoencoder_json(stage, architecture.size[0], scale)
        ),
        "scheduler": _scheduler_json(architecture),
    }
    if (consistent := architecture.consistency) is not None:
        configs["unet"]["time_cond_proj_dim"] = consistent.guidance_width
        configs["scheduler"] |= {
            "_class_name": LCM,
            "original_inference_steps": 50,
            "set_alpha_to_one": True,
            "timestep_scaling": consistent.scale,
        }
    pairs = _pairs(model, place, coder)
    towers = architecture.clip.towers if architecture.clip else ()
    ends = ["" if tower.projection is None else "_2" for tower in towers]
    for end, tower in zip(ends, towers):
        configs[f"text_encoder{end}"] = text_json(tower)
    text = model.state().get("text", {}).get("tokenizer")
    if architecture.bert:
        if text is None:
            raise InputError("diffusers' layout needs the vocabulary of this model's texts, which it does not have")
        configs["bert"] = tower_configs.bert_json(architecture.bert)
    if architecture.image:
        configs["image_encoder"] = image_json(architecture.image.tower)
        if architecture.image.slot == "vector":
            width = architecture.image.tower.projection
            configs["image_normalizer"] = {"_class_name": "StableUnCLIPImageNormalizer", "embedding_dim": width}
            configs["image_noising_scheduler"] = _noising(architecture.image.noise)
        configs["feature_extractor"] = preprocessor_json(architecture.image.tower)
    if architecture.network.classes:
        configs["low_res_scheduler"] = _noising(LOW_RESOLUTION)
    if root.exists() and any(root.iterdir()):
        raise InputError(f"{root} is not empty and is not overwritten; name another folder", exit_code=2)
    with whole_folder(root) as new:
        for folder, fields in configs.items():
            name = FILES.get(folder, "scheduler_config.json" if folder.endswith("scheduler") else "config.json")
            write_json(new / folder / name, fields)
        for folder, named in pairs.items():
            tensors = given(named, changed)
            if dtype is not None:
                tensors = {name: tensor.to(dtype) for name, tensor in tensors.items()}
            if folder == "bert":
                tensors |= tower_names.bert_logits(tensors)
            stem = "diffusion_pytorch_model" if folder in ("unet", coder, "image_normalizer") else "model"
            write_tensors(new / folder / f"{stem}.safetensors", tensors, {"format": "pt"})
        if architecture.bert:
            write_bert(new / "tokenizer", text, architecture.bert.length)
        for end, tower in zip(ends, towers):
            write_clip(new / f"tokenizer{end}", Vocabulary(text, tower.pad), tower.length)
        write_json(new / INDEX, _index(architecture, configs, [f"tokenizer{end}" for end in ends]))


def _refuse(model: LatentDiffusion, place: str) -> None:
    """InputError with all that the layout cannot hold."""
    architecture, coder = model.architecture, model.first_stage.autoencoder
    of_first_stage: list[Callable[[], object]] = [lambda: _pairs(model, place)]
    if coder is not None:
        of_first_stage = [
            lambda: diffusers_names.autoencoder_pairs(coder),
            lambda: folded(model.first_stage, usual_scale(model.first_stage)),
        ]
    together(
        lambda: diffusers_names.unet_pairs(model.denoiser.unet, place),
        lambda: unet_json(architecture.network, 1, place),
        *of_first_stage,
        lambda: tower_names.folder_pairs(architecture),
        lambda: _scheduler_json(architecture),
    )


def _noising(schedule: NoiseSchedule) -> dict[str, Any]:
    """The scheduler that puts noise on a condition."""
    kinds = {ours: theirs for theirs, ours in SCHEDULES.items()}
    if schedule.kind not in kinds:
        raise InputError(
            f"the diffusers layout holds no noise {schedule.kind!r} on a condition; only {', '.join(kinds)}"
        )
    betas = {} if schedule.kind == "cosine" else {"beta_start": schedule.beta_start, "beta_end": schedule.beta_end}
    return {
        "_class_name": "DDPMScheduler",
        "_diffusers_version": VERSION,
        "beta_schedule": kinds[schedule.kind],
        "clip_sample": True,
        "num_train_timesteps": schedule.steps,
        "prediction_type": "epsilon",
        **betas,
    }


def _scheduler_json(architecture: Architecture) -> dict[str, Any]:
    schedule = architecture.schedule
    kinds = {ours: theirs for theirs, ours in SCHEDULES.items()}
    predictions = {ours: theirs for theirs, ours in PREDICTIONS.items()}
    if schedule.kind not in kinds or architecture.prediction not in predictions:
        raise InputError(
            f"the diffusers layout of this family holds no schedule {schedule.kind!r} with the prediction "
            f"{architecture.prediction!r}; only {', '.join(kinds)} with {', '.join(predictions)}"
        )
    return {
        "_class_name": "DDIMScheduler",
        "_diffusers_version": VERSION,
        "beta_schedule": kinds[schedule.kind],
        "beta_start": schedule.beta_start,
        "beta_end": schedule.beta_end,
        "clip_sample": False,
        "num_train_timesteps": schedule.steps,
        "prediction_type": predictions[architecture.prediction],
        "rescale_betas_zero_snr": schedule.zero_terminal,
        "set_alpha_to_one": False,
        "skip_prk_steps": True,
        "steps_offset": 1,
        "timestep_spacing": "trailing" if schedule.zero_terminal else "leading",
    }


def _index(architecture: Architecture, configs: Mapping[str, Any], tokenizers: list[str]) -> dict[str, Any]:
    clip, concat = architecture.clip, architecture.concat_channels
    xl = clip is not None and clip.vector_width > 0
    if architecture.bert:
        kind = "LDMTextToImagePipeline"
    elif clip is None:
        kind = "LDMPipeline"
    elif architecture.network.classes:
        kind = "StableDiffusionUpscalePipeline"
    elif architecture.image:
        kind = "StableUnCLIPImg2ImgPipeline"
    elif xl and len(clip.towers) == 1:
        kind = "StableDiffusionXLImg2ImgPipeline"
    else:
        task = {5: "Inpaint", 1: "Depth2Img"}.get(concat, "")
        kind = f"StableDiffusion{'XL' if xl else ''}{task}Pipeline"
        if architecture.distilled and kind == "StableDiffusionPipeline":
            kind = "LatentConsistencyModelPipeline"
    index: dict[str, Any] = {"_class_name": kind, "_diffusers_version": VERSION}
    classes: dict[str, str] = {}
    for name, fields in configs.items():
        towers = "text_encoder" in name or name in ("image_encoder", "bert")
        classes[name] = fields["architectures"][0] if towers else fields.get("_class_name", "CLIPImageProcessor")
        library = "transformers" if towers or name == "feature_extractor" else "diffusers"
        index[name] = [OWN.get(name, library), classes[name]]
    if architecture.bert:
        index["tokenizer"] = ["transformers", "BertTokenizer"]
    index |= {name: ["transformers", "CLIPTokenizer"] for name in tokenizers}
    if xl and clip is not None:
        index["force_zeros_for_empty_prompt"] = clip.absent == "zero"
        if len(clip.towers) == 1:
            index |= {"text_encoder": [None, None], "tokenizer": [None, None], "requires_aesthetics_score": True}
        index |= {"image_encoder": [None, None], "feature_extractor": [None, None]}
    elif clip is not None and kind in LEFT_EMPTY:
        index |= {"safety_checker": [None, None], "feature_extractor": [None, None], "image_encoder": [None, None]}
        index["requires_safety_checker"] = False
    return index
