"""What a picture file says of its own making: the line that other programs read, and the exact request."""

import io
import json
import platform
from typing import Annotated, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, StringConstraints, ValidationError

import latentkit
from latentkit.applications.attachment import Guide
from latentkit.applications.backend import version
from latentkit.applications.request import Request
from latentkit.checkpoints.files import Model, Place, compute_type, invalid
from latentkit.errors import InputError

FORMAT: Literal[1] = 1
KEY = "latentkit"
MAX_RECORD = 100_000
"""Characters of a record: far more than the longest request takes."""
MAX_BATCH = 32
A1111_SAMPLERS = {
    "euler": "Euler", "euler_ancestral": "Euler a", "ddim": "DDIM", "lcm": "LCM", "heun": "Heun", "dpm2": "DPM2",
    "dpm2_ancestral": "DPM2 a", "lms": "LMS", "plms": "PLMS", "dpm++2m": "DPM++ 2M", "dpm++2m_sde": "DPM++ 2M SDE",
    "dpm++2m_sde_heun": "DPM++ 2M SDE Heun", "dpm++3m_sde": "DPM++ 3M SDE", "dpm++2s_ancestral": "DPM++ 2S a",
    "dpm++sde": "DPM++ SDE", "dpm_adaptive": "DPM adaptive", "unipc": "UniPC",
}  # fmt: skip
A1111_SPACINGS = {
    "uniform": "SGM Uniform", "karras": "Karras", "exponential": "Exponential", "polyexponential": "Polyexponential",
    "kl_optimal": "KL Optimal", "ays_sd1": "Align Your Steps", "simple": "Simple", "normal": "Normal",
    "beta_sigma": "Beta",
}  # fmt: skip
Text = Annotated[str, StringConstraints(max_length=300)]
PartName = Literal["conditioners", "denoiser", "refiner", "first_stage"]
"""Parts of what draws a picture, in the order of their turns."""


class Machine(BaseModel):
    """What must be the same for the same bytes."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    latentkit: Text
    torch: Text
    device: Text
    threads: int = Field(ge=1, le=4096)
    dtype: Literal["float32", "bfloat16", "float16"]
    openvino: Text | None = None
    """Its version, where it is the backend."""


class Record(BaseModel):
    """One picture's request, resolved, with the model and the machine that drew it.

    `row` and `batch`: its place in the batch, on whose size the last bits of a matrix product depend.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    format: Literal[1] = FORMAT
    request: Request
    model: Text
    digest: str = Field(pattern=r"^([0-9a-f]{64})?$")
    row: int = Field(ge=0)
    batch: int = Field(ge=1, le=MAX_BATCH)
    machine: Machine
    wide: tuple[PartName, ...] | None = None
    """Parts that computed in float32, because their values left the range of the model's type."""
    strips: Literal[True] | None = None
    """It passed the first stage in strips, whatever its size."""

    def differences(self, model: Model) -> list[str]:
        """What differs here from where the picture was drawn, each as a phrase; empty where bytes are promised."""
        found = []
        if model.digest != self.digest:
            found.append(f"model {model.name} ({model.digest[:10]}) instead of {self.model} ({self.digest[:10]})")
        here, there = machine(model, self.request.backend).model_dump(), self.machine.model_dump()
        return found + [f"{name} {here[name]} instead of {there[name]}" for name in there if here[name] != there[name]]


def machine(model: Model, backend: str | None = None) -> Machine:
    """This machine, with the device and type that `model` computes in; InputError for a backend not at hand."""
    parameter = next(model.network.denoiser.parameters())
    place = model.place or Place(parameter.device, parameter.dtype)
    dtype = place.dtype or compute_type(parameter.dtype, place.device)
    if place.device.type == "cuda":
        device = f"cuda {torch.cuda.get_device_name(place.device)}"
    else:
        fast = (torch.cpu._is_avx512_bf16_supported(), torch.cpu._is_amx_tile_supported())
        extras = [name for name, there in zip(("bf16", "amx"), fast) if there]
        device = " ".join([platform.machine(), torch.backends.cpu.get_cpu_capability(), *extras])
    return Machine(
        latentkit=latentkit.__version__,
        torch=torch.__version__,
        device=device,
        threads=torch.get_num_threads(),
        dtype=str(dtype).removeprefix("torch."),  # type: ignore[arg-type]
        openvino=version() if backend == "openvino" else None,
    )


def chunks(record: Record) -> dict[str, str]:
    """The text chunks of a PNG: `parameters` (A1111's form) and our own, which `read` takes."""
    return {"parameters": a1111(record), KEY: record.model_dump_json(exclude_none=True)}


def a1111(record: Record) -> str:
    """The line that A1111 writes and that galleries read: prompt, negative prompt, settings."""
    request = record.request
    settings = {
        "Steps": request.steps,
        "Sampler": A1111_SAMPLERS.get(str(request.sampler), request.sampler),
        "Schedule type": A1111_SPACINGS.get(str(request.spacing), request.spacing),
        "CFG scale": request.guidance_scale,
        "Seed": request.seed,
        "Size": f"{request.width}x{request.height}",
        "Model hash": record.digest[:10] or None,
        "Model": record.model,
        "Class": request.label,
        "Denoising strength": request.strength,
        "Clip skip": request.clip_skip,
        "VAE hash": request.autoencoder and request.autoencoder.digest[:10],
        "Refiner": _named(request.refiner),
        "Refiner switch at": request.refiner_switch,
        "Eta": request.eta,
        "Sigma churn": request.churn,
        "Version": f"latentkit {record.machine.latentkit}",
    }
    line = ", ".join(f"{key}: {_quoted(str(value))}" for key, value in settings.items() if value is not None)
    negative = [f"Negative prompt: {request.negative}"] if request.negative else []
    prompts = [request.prompt or "", *(f"{words} :{weight:g}" for words, weight in request.also or ())]
    return "\n".join([" AND ".join(prompts), *negative, line])


def _named(model: Guide | None) -> str | None:
    """Name and hash of another model of the request."""
    return f"{model.model.name if model.model else ''} [{model.digest[:10]}]".lstrip() if model else None


def _quoted(value: str) -> str:
    return json.dumps(value, ensure_ascii=False) if any(mark in value for mark in ",:\n") else value


def read(data: bytes, name: str) -> Record:
    """The record in the bytes of a PNG called `name`; InputError where there is none or it is not as we write it."""
    from PIL import Image

    try:
        text = Image.open(io.BytesIO(data), formats=("PNG",)).info.get(KEY)
    except Exception:  # Pillow's readers raise many types on hostile bytes
        raise InputError(f"{name}: is not a PNG, or a damaged one") from None
    if not isinstance(text, str):
        raise InputError(f"{name}: does not say how it was drawn; latentkit writes that into the PNG files it draws")
    if len(text) > MAX_RECORD:
        raise InputError(f"{name}: its record has {len(text)} characters; at most {MAX_RECORD} are read")
    try:
        record = Record.model_validate_json(text)
    except ValidationError as error:
        first = error.errors()[0]
        if first["loc"] == ("format",) and first["type"] == "literal_error":
            got = f"{name}: its record has format {first['input']!r}"
            raise InputError(f"{got}; this version reads format {FORMAT}: update latentkit") from None
        raise invalid(error, f"{name}: its record is invalid") from None
    if record.row >= record.batch:
        raise InputError(f"{name}: its record is invalid: row {record.row} of a batch of {record.batch}")
    return record
