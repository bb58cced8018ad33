"""Request: one job of drawing or editing, filled alike by the command line, Python and every later front door."""

import hashlib
import re
import secrets
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, PlainSerializer, PlainValidator, ValidationError

from latentkit.checkpoints.files import invalid
from latentkit.data.pictures import Picture, decode
from latentkit.diffusion.samplers.driver import sampler
from latentkit.diffusion.spacing import space
from latentkit.errors import InputError
from latentkit.model.latent_diffusion import LatentDiffusion

T = TypeVar("T")
Task = Literal["text-to-image", "class-to-image", "unconditional", "image-to-image"]
NEEDS = {"text-to-image": "prompt", "class-to-image": "label", "image-to-image": "init"}
FALLBACK = {
    "sampler": "dpm++2m",
    "spacing": "uniform",
    "steps": 12,
    "guidance_scale": 2.0,
    "guidance_low": 0.0,
    "guidance_high": 1e9,
}
"""Sampling settings of a model whose file names none."""
STRENGTH = 0.6
MAX_PICTURE_BYTES = 1 << 28


@dataclass(frozen=True)
class Attachment:
    """A picture that belongs to a request: the sha256 of its pixels, and the picture where it is at hand.

    Only the digest is ever written into a file or read from one.
    """

    digest: str
    picture: Picture | None = field(default=None, compare=False, repr=False)

    @staticmethod
    def read(path: str | Path) -> "Attachment":
        """The picture in a file; InputError where it cannot be used."""
        try:
            if Path(path).stat().st_size > MAX_PICTURE_BYTES:
                raise InputError(f"{path}: is larger than {MAX_PICTURE_BYTES >> 20} MB")
            picture = decode(Path(path).read_bytes(), str(path))
        except OSError as error:
            raise InputError(f"{path}: cannot be read: {error.strerror or error}", exit_code=2) from None
        array = picture.array
        content = hashlib.sha256(f"{array.shape}{array.dtype}{picture.has_alpha}".encode() + array.tobytes())
        return Attachment(content.hexdigest(), picture)


def _attachment(value: Any) -> Attachment:
    if isinstance(value, Attachment):
        return value
    if isinstance(value, str) and re.fullmatch(r"[0-9a-f]{64}", value):
        return Attachment(value)
    raise ValueError("a picture is given as Attachment.read(path)")


Attached = Annotated[Attachment, PlainValidator(_attachment), PlainSerializer(lambda value: value.digest)]


class Request(BaseModel):
    """One picture to draw. What is None is the model's own choice, and is filled in by `resolve`."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)

    task: Task | None = None
    """None: told by what is given."""
    prompt: str | None = Field(default=None, max_length=10_000)
    label: str | None = Field(default=None, max_length=1_000)
    """A class name."""
    negative: str = Field(default="", max_length=10_000)
    """What guidance leads away from."""
    seed: int | None = Field(default=None, ge=0, lt=2**63)
    """None: drawn at random."""
    width: int | None = Field(default=None, ge=1, le=8192)
    height: int | None = Field(default=None, ge=1, le=8192)
    sampler: str | None = Field(default=None, max_length=100)
    spacing: str | None = Field(default=None, max_length=100)
    steps: int | None = Field(default=None, ge=1)
    guidance_scale: float | None = Field(default=None, ge=0, le=1000)
    """1 is no guidance."""
    guidance_low: float | None = Field(default=None, ge=0)
    guidance_high: float | None = Field(default=None, gt=0)
    """Guidance works at the noise levels (sigmas) from low to high."""
    init: Attached | None = None
    """The picture that image-to-image starts from."""
    strength: float | None = Field(default=None, gt=0, le=1)
    """Share of the path that image-to-image does again."""


def ask(**fields: Any) -> Request:
    """A `Request`; InputError says which field is wrong, and the nearest name of one that does not exist."""
    try:
        return Request(**fields)
    except ValidationError as error:
        raise invalid(error, "request", Request.model_fields, exit_code=2) from None


TextToImage = partial(ask, task="text-to-image")
ClassToImage = partial(ask, task="class-to-image")
Unconditional = partial(ask, task="unconditional")


def ImageToImage(init: str | Path | Attachment, **fields: Any) -> Request:
    """A request that starts from a picture (a file, or an `Attachment`)."""
    attached = init if isinstance(init, Attachment) else Attachment.read(init)
    return ask(task="image-to-image", init=attached, **fields)


def told(network: LatentDiffusion, words: str | None) -> dict[str, str | None]:
    """The field that `words` go into: the prompt, or the class of a model that knows only classes."""
    return {"label" if "text" not in network.conditioners and "label" in network.conditioners else "prompt": words}


def resolve(request: Request, network: LatentDiffusion, defaults: dict[str, Any]) -> Request:
    """The request with nothing left open: from itself, else the model's `defaults`, else `FALLBACK`.

    Errors: InputError where the model cannot do it (no text encoder, a class or sampler it does not know, a size).
    """
    try:
        suggested = Request.model_validate(defaults).model_dump(exclude_none=True)
    except ValidationError as error:
        raise invalid(error, "the model's sampling defaults", FALLBACK) from None
    height, width = network.architecture.size
    open_fields = {**FALLBACK, "height": height, "width": width, "seed": secrets.randbelow(2**32)}
    open_fields |= {name: suggested[name] for name in FALLBACK if name in suggested}
    open_fields["task"] = request.task or _task(request)
    if request.init is not None:
        open_fields["strength"] = STRENGTH
    if not network.conditioners:
        open_fields["guidance_scale"] = 1.0
    filled = {name: value for name, value in open_fields.items() if getattr(request, name) is None}
    full = request.model_copy(update=filled)
    _check(full, network)
    return full


def _task(request: Request) -> Task:
    for task in ("image-to-image", "text-to-image", "class-to-image"):
        if getattr(request, NEEDS[task]) is not None:
            return task
    return "unconditional"


def _check(request: Request, network: LatentDiffusion) -> None:
    """Every rule that one field alone does not show."""
    needed = NEEDS.get(str(request.task))
    if needed and getattr(request, needed) is None:
        raise InputError(f"{request.task} needs a {needed}; none was given", exit_code=2)
    if request.init is not None and request.init.picture is None:
        missing = f"the init picture whose pixels have the sha256 {request.init.digest[:16]}..."
        raise InputError(f"the request needs {missing}; give its file", exit_code=2)
    if request.task == "unconditional" and (request.prompt or request.label):
        raise InputError("unconditional drawing takes neither prompt nor label; leave them out", exit_code=2)
    if request.task != "image-to-image" and (request.init or request.strength):
        raise InputError(f"{request.task} takes no init picture and no strength; use image-to-image", exit_code=2)
    takes = {"text": ("prompt", "negative"), "label": ("label",)}
    for conditioner, fields in takes.items():
        given = [name for name in fields if getattr(request, name)]
        if given and conditioner not in network.conditioners:
            instead = ", ".join(takes[name][0] for name in network.conditioners) or "no condition at all"
            raise InputError(f"this model takes no {given[0]}; it takes: {instead}", exit_code=2)
    if request.guidance_scale != 1 and not network.conditioners:
        raise InputError(
            f"guidance scale {request.guidance_scale} has nothing to guide: this model takes no condition; use 1",
            exit_code=2,
        )
    if request.negative and request.guidance_scale == 1:
        raise InputError("a negative prompt has no effect at guidance scale 1; give another scale", exit_code=2)
    low, high = known(request.guidance_low), known(request.guidance_high)
    if low >= high:
        raise InputError(f"guidance is asked for at sigmas {low} to {high}; low must be below high", exit_code=2)
    sampler(known(request.sampler))
    space(known(request.spacing), network.architecture.schedule, known(request.steps))
    network.latent_shape(known(request.height), known(request.width))


def known(value: T | None) -> T:
    """A field of a resolved request, which is never None."""
    assert value is not None, "the request is not resolved"
    return value
