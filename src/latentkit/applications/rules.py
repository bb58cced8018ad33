"""Rules of requests: what is left open is filled in, and what cannot be done is refused."""

import secrets
from typing import Any, Literal, cast

import torch
from pydantic import ValidationError

from latentkit.applications.attachment import Guide
from latentkit.applications.plan import path_of, switch_step
from latentkit.applications.request import OPTIONS, PICTURES, Request, Task, canvas_size, known, models_of
from latentkit.applications.tasks import places
from latentkit.checkpoints.files import Model, invalid
from latentkit.diffusion.samplers.driver import split_name, table
from latentkit.errors import InputError
from latentkit.model.conditioners.clip import ClipConditioner
from latentkit.model.latent_diffusion import Architecture, LatentDiffusion

TAKES = {
    "image-to-image": ("init", "strength"),
    "inpainting": ("init", "strength", "mask", "extend", "paste"),
    "upscaling": ("init",),
}
"""Fields that only some tasks take."""
NEEDS = {
    "image-to-image": "init", "inpainting": "init", "upscaling": "init", "variation": "variation",
    "text-to-image": "prompt", "class-to-image": "label", "layout-to-image": "layout",
    "semantic-to-image": "semantic_map",
}  # fmt: skip
"""What a task cannot do without; where no task is named, the first whose need is given is meant."""
FALLBACK = {
    "sampler": "dpm++2m",
    "spacing": "uniform",
    "steps": 12,
    "guidance_scale": 2.0,
    "guidance_low": 0.0,
    "guidance_high": 1e9,
}
"""Sampling settings of a model whose file names none."""
SLOTS = {
    "mask": "this model draws only what a mask leaves open of a picture: give --init PICTURE and --mask PICTURE",
    "depth": "this model draws by a depth picture: give --depth PICTURE (white is near)",
    "small picture": "this model only makes a picture larger: give --init PICTURE",
    "other": "this model takes something beside its latent that no task here gives; it cannot draw",
}
"""What a model's concat slot holds, and what is missing without it."""
STRENGTH = {"image-to-image": 0.6, "inpainting": 1.0}
"""Of tasks that start from a picture, where none is asked for."""
LARGER = 4
"""Times the pixels that a model was trained at, up to which a picture's own size says what is drawn."""
NOISE_MOST = 350
"""Level of the noise that the released upscaler was trained with up to."""
NOISE_LEVEL = 20
"""Of the noise on the small picture, where none is asked for (the released upscaler's)."""
VARIED_LEVEL = 0
"""Of the noise on what a variation is told of its picture, where none is asked for (the released model's)."""
CONSISTENT = {"sampler": "lcm", "spacing": "lcm", "steps": 4, "guidance_scale": 8.5}
"""Sampling settings of latent consistency models whose file names none (their pipeline's)."""
REFINED = ("text-to-image", "image-to-image", "class-to-image", "unconditional")
"""Tasks whose last steps a refiner may do."""
REFINER_SWITCH = 0.8
"""Share of the noise levels that the base model does before the refiner, where none is asked for (SD XL's)."""
NUMBERS = ("original_size", "crop", "target_size", "aesthetic_score", "negative_aesthetic_score")
"""Fields that a model is told as numbers."""
CFG_PLUS_SCALE = 0.6
"""Guidance scale of CFG++, whose scales end at 1, where none is asked for (Chung et al. 2024)."""


def resolve(request: Request, network: LatentDiffusion, defaults: dict[str, Any]) -> Request:
    """The request with nothing left open: from itself, else the model's `defaults`, else `FALLBACK`.

    Errors: InputError where the model cannot do it (no text encoder, a class or sampler it does not know, a size).
    """
    try:
        suggested = Request.model_validate(defaults).model_dump(exclude_none=True)
    except ValidationError as error:
        raise invalid(error, "the model's sampling defaults", FALLBACK) from None
    height, width = network.architecture.size
    usual = FALLBACK
    if network.architecture.consistency is not None:
        usual = FALLBACK | CONSISTENT | ({} if network.architecture.distilled else {"guidance_scale": 1.0})
    open_fields = {**usual, "height": height, "width": width, "seed": secrets.randbelow(2**32)}
    if not _led(network) and request.guidance_model is None:
        open_fields["guidance_scale"] = 1.0
    open_fields |= {name: suggested[name] for name in FALLBACK if name in suggested}
    open_fields["task"] = request.task or _task(request, network)
    if open_fields["task"] in STRENGTH:
        open_fields["strength"] = STRENGTH[open_fields["task"]]
    if open_fields["task"] == "inpainting":
        open_fields |= {"paste": True, **_own_size(request, network, 1)}
    if open_fields["task"] == "semantic-to-image":
        open_fields |= _own_size(request, network, 1)
    if open_fields["task"] == "upscaling":
        open_fields |= _own_size(request, network, network.first_stage.downsampling)
        if network.architecture.numbers:
            open_fields["noise_level"] = NOISE_LEVEL
    if request.variation is not None and _noisy(network):
        open_fields["noise_level"] = VARIED_LEVEL
    if request.refiner is not None:
        open_fields["refiner_switch"] = REFINER_SWITCH
    if not _leaves_out(network) and request.guidance_model is None:
        open_fields["guidance_scale"] = 1.0
    if request.guidance_kind == "cfg++":
        open_fields["guidance_scale"] = CFG_PLUS_SCALE
    filled = {name: value for name, value in open_fields.items() if getattr(request, name) is None}
    if request.sampler is not None:
        filled |= _names(request.sampler, request.spacing)
    full = request.model_copy(update=filled)
    _check(full, network)
    return full


def _leaves_out(network: LatentDiffusion) -> bool:
    """Whether there is a condition that can be left out."""
    return bool(network.conditioners.keys() - {"map"})


def _led(network: LatentDiffusion) -> bool:
    """Whether guidance is usual: for layouts, and classes without a row for none, no released model learnt it."""
    label = network.architecture.label
    return bool(network.conditioners.keys() & {"text", "image"}) or (label is not None and label.null)


def _words(field: str) -> str:
    return field.replace("_", " ")


def _names(sampler: str, spacing: str | None) -> dict[str, str]:
    """Our names of a sampler and, where its name says one too, of the spacing: "DPM++ 2M Karras" is two choices."""
    name, implied = split_name(sampler)
    if implied is not None and spacing not in (None, implied):
        got = f"sampler {sampler!r} names the spacing {implied!r}, and spacing {spacing!r} is asked for too"
        raise InputError(f"{got}; give one of them", exit_code=2)
    return {"sampler": name} if implied is None else {"sampler": name, "spacing": implied}


def _own_size(request: Request, network: LatentDiffusion, times: int) -> dict[str, int]:
    """The own size of the init picture or the semantic map, so many `times`, less what makes no whole latent."""
    given = request.init or request.semantic_map
    if given is None or given.picture is None or (request.height and request.width):
        return {}
    height, width = (times * side for side in canvas_size(request))
    (usual, wide), step = network.architecture.size, network.multiple
    if height * width > LARGER * usual * wide:
        raise InputError(
            f"the picture to draw has {width}x{height} pixels, far more than the {wide}x{usual} that this model was "
            "trained at; say at which size to draw (--size)",
            exit_code=2,
        )
    return {"height": max(step, height // step * step), "width": max(step, width // step * step)}


def _task(request: Request, network: LatentDiffusion) -> Task:
    if request.init is not None and fills(network.architecture) == "small picture":
        return "upscaling"
    if request.mask is not None or request.extend is not None:
        return "inpainting"
    given = (task for task in NEEDS if getattr(request, NEEDS[task]) is not None)
    return next((cast(Task, task) for task in given), "unconditional")


def _check(request: Request, network: LatentDiffusion) -> None:
    """Every rule that one field alone does not show."""
    needed = NEEDS.get(str(request.task))
    if needed and getattr(request, needed) is None:
        article = "an" if needed == "init" else "a"
        raise InputError(f"{request.task} needs {article} {_words(needed)}; none was given", exit_code=2)
    if request.task == "unconditional" and (request.prompt or request.label):
        raise InputError("unconditional drawing takes neither prompt nor label; leave them out", exit_code=2)
    _check_pictures(request, network)
    places.check(request, network)
    takes = {
        "text": ("prompt", "negative"), "label": ("label",), "image": ("variation",), "layout": ("layout",),
        "map": ("semantic_map",),
    }  # fmt: skip
    for conditioner, fields in takes.items():
        given = [name for name in fields if getattr(request, name)]
        if given and conditioner not in network.conditioners:
            known_ones = [_words(takes[name][0]) for name in network.conditioners if name in takes]
            instead = ", ".join(known_ones) or "no condition at all"
            raise InputError(f"this model takes no {_words(given[0])}; it takes: {instead}", exit_code=2)
    if request.also and not (request.prompt or request.label):
        raise InputError("more prompts are asked for beside none; give the first one too", exit_code=2)
    _check_guidance(request, network)
    _check_noise_level(request, network)
    _check_words(request, network)
    if request.refiner is not None:
        _check_refiner(request.refiner, request, network)
    elif request.refiner_switch is not None:
        raise InputError("a refiner switch is given without a refiner; give the model too", exit_code=2)
    _check_numbers(request, network)
    entries = table()
    for option in OPTIONS:
        value, allowed = getattr(request, option), entries[known(request.sampler)].options.get(option)
        if value is not None and allowed is None:
            those = ", ".join(name for name, entry in entries.items() if option in entry.options)
            raise InputError(f"sampler {request.sampler!r} takes no {option}; these do: {those}", exit_code=2)
        if value is not None and allowed is not None and not allowed[0] <= value <= allowed[1]:
            range_ = f"{allowed[0]:g} to {allowed[1]:g}"
            raise InputError(
                f"{option} {value:g} is asked of sampler {request.sampler!r}, which takes {range_}", exit_code=2
            )
    path_of(network, request)
    network.latent_shape(known(request.height), known(request.width))


def _check_pictures(request: Request, network: LatentDiffusion) -> None:
    """Every rule of the pictures that a request starts from."""
    hints = [("hint", hint) for _, hint, *_ in request.control or ()]
    for name, attached in [*((name, getattr(request, name)) for name in PICTURES), *hints]:
        if attached is not None and attached.picture is None:
            missing = f"the {_words(name)} picture whose pixels have the sha256 {attached.digest[:16]}..."
            option = "map" if name == "semantic_map" else name
            raise InputError(f"the request needs {missing}; give its file (--{option} FILE)", exit_code=2)
    takes = TAKES.get(str(request.task), ())
    if request.init and "init" not in takes:
        raise InputError(f"{request.task} takes no init picture; use image-to-image", exit_code=2)
    if request.strength and "init" not in takes:
        got = f"strength {request.strength} says how much of an init picture is drawn again, and none is given"
        raise InputError(f"{got}; give one (--init PICTURE)", exit_code=2)
    for task, fields in TAKES.items():
        for name in fields:
            if name not in takes and getattr(request, name) is not None:
                raise InputError(f"{request.task} takes no {_words(name)}; {task} does", exit_code=2)
    if request.task == "inpainting":
        _check_inpainting(request)
    slot = fills(network.architecture)
    if (
        slot is not None
        and not {
            "mask": request.task == "inpainting",
            "depth": request.depth is not None,
            "small picture": request.task == "upscaling",
            "other": False,
        }[slot]
    ):
        raise InputError(SLOTS[slot], exit_code=2)
    if request.depth is not None and slot != "depth":
        raise InputError("this model takes no depth picture; leave it out, or take one trained with it", exit_code=2)
    if request.task == "upscaling" and slot != "small picture":
        raise InputError("this model does not make pictures larger; an upscaler does, or image-to-image", exit_code=2)


def _check_inpainting(request: Request) -> None:
    """There is a mask for the init picture, or something is added to it."""
    if (request.mask is None) == (request.extend is None):
        got = "none" if request.mask is None else "both"
        raise InputError(
            f"inpainting needs a mask (white is repainted) or the pixels to add at each side; {got} of them is given",
            exit_code=2,
        )
    if request.extend is not None and not any(request.extend):
        raise InputError("extend adds no pixel at any side; give left, top, right and bottom", exit_code=2)
    if request.mask is not None:
        height, width = canvas_size(request)
        rows, columns = known(request.mask.picture).array.shape[:2]
        if (rows, columns) != (height, width):
            raise InputError(
                f"the mask has {columns}x{rows} pixels and the init picture {width}x{height}; they must be of one size",
                exit_code=2,
            )


def fills(architecture: Architecture) -> Literal["mask", "depth", "small picture", "other"] | None:
    """What stands in the model's concat slot, as far as its shape tells: one of `SLOTS`."""
    channels = architecture.concat_channels
    if not channels:
        return None
    latent = architecture.first_stage.latent_channels if architecture.first_stage else architecture.picture_channels
    if channels == latent + 1:
        return "mask"
    if channels == 1:
        return "depth"
    return "small picture" if channels == architecture.picture_channels else "other"


def _check_guidance(request: Request, network: LatentDiffusion) -> None:
    """Every rule of the fields that guidance is asked for by."""
    scale, kind, guide = known(request.guidance_scale), request.guidance_kind, request.guidance_model
    if scale != 1 and not _leaves_out(network) and guide is None:
        raise InputError(
            f"guidance scale {scale} has nothing to guide: this model takes no condition that can be left out; use 1, "
            "or give a guidance model",
            exit_code=2,
        )
    if network.architecture.distilled:
        low, high = known(request.guidance_low), known(request.guidance_high)
        interval = (low, high) != (FALLBACK["guidance_low"], FALLBACK["guidance_high"])
        idle: dict[str, Any] = {"a negative prompt": request.negative, "a guidance model": guide, "guidance kind": kind}
        for what, given in {
            **idle,
            "guidance rescale": request.guidance_rescale,
            "a guidance interval": interval,
        }.items():
            if given:
                raise InputError(
                    f"{what} has no effect: this model was distilled with its guidance, and is told the scale alone",
                    exit_code=2,
                )
    if kind == "cfg++" and scale > 1:
        raise InputError(f"guidance scale {scale} is asked for with cfg++, whose scales are 0 to 1", exit_code=2)
    if scale == 1 and kind != "cfg++":
        rescale = request.guidance_rescale if not request.pag_scale else None
        idle = {
            "a negative prompt": request.negative,
            "a negative aesthetic score": request.negative_aesthetic_score,
            "a guidance model": guide,
            "guidance rescale": rescale,
        }
        for what, given in {**idle, f"guidance kind {kind!r}": kind}.items():
            if given:
                raise InputError(f"{what} has no effect at guidance scale 1; give another scale", exit_code=2)
    low, high = known(request.guidance_low), known(request.guidance_high)
    if low >= high:
        raise InputError(f"guidance is asked for at sigmas {low} to {high}; low must be below high", exit_code=2)
    if guide is not None:
        _check_guide(guide, request, network)
    if request.pag_scale and not network.architecture.network.middle_depth:
        raise InputError(
            "perturbed attention has nothing to perturb: this model's middle has no attention", exit_code=2
        )
    if request.threshold is not None and network.first_stage.autoencoder is not None:
        instead = "guidance rescale or guidance kind 'apg' tame high scales here"
        raise InputError(
            f"a threshold is for models that draw pixels, and this one draws latents; {instead}", exit_code=2
        )


def _check_guide(guide: Guide, request: Request, network: LatentDiffusion) -> None:
    """A guidance model must be at hand and speak of the same latents."""
    if request.negative:
        raise InputError("guidance leads away from the guidance model or the negative prompt; give one", exit_code=2)
    if guide.model is None:
        missing = f"the guidance model whose file has the sha256 {guide.digest[:16]}..."
        raise InputError(f"the request needs {missing}; give its file (--guidance-model FILE)", exit_code=2)
    if guide.model.network.architecture.concat_channels not in (0, network.architecture.concat_channels):
        raise InputError(f"guidance model {guide.model.name!r} takes other pictures than this model", exit_code=2)
    _check_latents(network, guide.model, "guidance model")


def _check_latents(network: LatentDiffusion, model: Model, what: str) -> None:
    """Another model of a request must speak of the same latents."""
    own, other = network.first_stage, model.network.first_stage
    shape = (own.latent_channels, own.downsampling) == (other.latent_channels, other.downsampling)
    if not shape or not all(
        torch.allclose(ours, theirs.to(ours), rtol=1e-3, atol=1e-3)
        for ours, theirs in ((own.latent_mean, other.latent_mean), (own.latent_std, other.latent_std))
    ):
        got = f"{what} {model.name!r} was trained on other latents than this model"
        raise InputError(f"{got}; take one of the same first stage", exit_code=2)


def _check_refiner(refiner: Guide, request: Request, network: LatentDiffusion) -> None:
    """A refiner must be at hand, speak of the same latents, understand the request, and have steps to do."""
    if request.task not in REFINED:
        raise InputError(f"{request.task} takes no refiner; {' and '.join(REFINED)} do", exit_code=2)
    if request.guidance_model is not None:
        raise InputError("a guidance model and a refiner are asked for; give one of them", exit_code=2)
    if refiner.model is None:
        missing = f"the refiner whose file has the sha256 {refiner.digest[:16]}..."
        raise InputError(f"the request needs {missing}; give its file (--refiner FILE)", exit_code=2)
    other = refiner.model.network
    if other.architecture.concat_channels:
        raise InputError(
            f"refiner {refiner.model.name!r} takes pictures beside its latent; it refines none", exit_code=2
        )
    for conditioner, field in (("text", "prompt"), ("label", "label")):
        if getattr(request, field) and conditioner not in other.conditioners:
            raise InputError(f"refiner {refiner.model.name!r} takes no {field}; take one that does", exit_code=2)
    _check_latents(network, refiner.model, "refiner")
    steps, first = len(path_of(network, request)) - 1, switch_step(network, request)
    if not 0 < first < steps:
        whose = "the refiner" if first else "the model before it"
        got = f"with the refiner switch at {request.refiner_switch:g}, {whose} has none of the {steps} steps to do"
        raise InputError(f"{got}; give more steps or another switch", exit_code=2)


def _check_numbers(request: Request, network: LatentDiffusion) -> None:
    """Only what the model, or its refiner, is told in numbers."""
    refiner = request.refiner and request.refiner.model
    models = [network, *([refiner.network] if refiner else [])]
    told = {name for model in models if model.architecture.numbers for name in model.architecture.numbers.says}
    for name in NUMBERS:
        if getattr(request, name) is not None and name.removeprefix("negative_") not in told:
            told_ones = ", ".join(sorted(told)).replace("_", " ") or "no sizes and no score"
            got = f"this model is not told {name.replace('_', ' ')}"
            raise InputError(f"{got}; it is told {told_ones}", exit_code=2)
    for name in ("original_size", "target_size"):
        if 0 in (getattr(request, name) or ()):
            raise InputError(f"{name.replace('_', ' ')} has a side of no pixels; give both", exit_code=2)


def _noisy(network: LatentDiffusion) -> bool:
    """Whether the model takes noise on what it is told of a picture."""
    image = network.architecture.image
    return image is not None and image.slot == "vector"


def _check_noise_level(request: Request, network: LatentDiffusion) -> None:
    """A level of noise is for upscaling and for variations by unCLIP, up to what each was trained with."""
    level = request.noise_level
    if level is None:
        return
    image = network.architecture.image
    if request.task == "upscaling" and network.architecture.numbers:
        most = NOISE_MOST
    elif request.variation is not None and image is not None and _noisy(network):
        most = image.noise.steps - 1
    else:
        raise InputError(f"{request.task} takes no noise level; upscaling and variations by unCLIP do", exit_code=2)
    if level > most:
        raise InputError(f"noise level {level} is asked for; this model takes 0 to {most}", exit_code=2)


def _check_words(request: Request, network: LatentDiffusion) -> None:
    """Clip skip and textual inversions are CLIP's, and each inversion has a name of its own."""
    for model in models_of(request, network):
        text = dict(model.conditioners.items()).get("text")
        for field in ("clip_skip", "embedding"):
            if getattr(request, field) is not None and not isinstance(text, ClipConditioner):
                what = {"clip_skip": "clip skip", "embedding": "textual inversion"}[field]
                raise InputError(f"this model takes no {what}; models with CLIP's text towers do", exit_code=2)
        if request.clip_skip is not None and isinstance(text, ClipConditioner):
            most = min(tower.layers - tower.skip for tower in text.config.towers)
            if request.clip_skip > most:
                raise InputError(
                    f"clip skip {request.clip_skip} is asked for; this model takes 1 to {most}", exit_code=2
                )
    names = [name.casefold() for _, name in request.embedding or () if name is not None]
    if len(set(names)) < len(names):
        raise InputError(f"two textual inversions have one name of {names}; give each its own: FILE:NAME", exit_code=2)
