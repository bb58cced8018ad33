"""LoRAs and ControlNets of a request: read for the model that draws, and LoRAs put on it while it answers."""

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from latentkit.applications.attachment import WeightsFile
from latentkit.applications.request import Request, known
from latentkit.checkpoints.adapters.controlnet_names import read_control
from latentkit.checkpoints.adapters.lora_files import read_lora
from latentkit.diffusion.samplers.driver import Denoise, Denoised
from latentkit.errors import InputError
from latentkit.model.latent_diffusion import LatentDiffusion
from latentkit.nets.lora import Adapted

READERS = {"lora": ("LoRA", read_lora), "control": ("ControlNet", read_control)}
"""Fields of a request that begin with a file of weights: what it is, and what reads it for a model."""


def opened(request: Request, network: LatentDiffusion, held: dict[str, Any]) -> Request:
    """The request with its files of weights read for the model; `held` keeps what was read, by digest.

    Errors: InputError for a file that is not at hand or does not fit the model.
    """
    update = {}
    for field, (kind, reader) in READERS.items():
        entries = getattr(request, field) or ()
        for file, *_ in entries:
            if file.digest not in held:
                if file.path is None:
                    missing = f"the {kind} whose file has the sha256 {file.digest[:16]}..."
                    raise InputError(f"the request needs {missing}; give its file", exit_code=2)
                held[file.digest] = reader(file.path, network)
        if entries:
            update[field] = tuple(
                (WeightsFile(file.digest, file.path, held[file.digest]), *rest) for file, *rest in entries
            )
    return request.model_copy(update=update)


def wearing(network: LatentDiffusion, request: Request) -> AbstractContextManager[Any]:
    """A context, to be entered as often as wanted, in which the model has the request's LoRAs on."""
    if not request.lora:
        return nullcontext()
    with torch.inference_mode(False), torch.no_grad():
        adapted = Adapted(network, [(known(file.content).changes, weight) for file, weight in request.lora])
    adapted.remove()
    return adapted


def within(context: AbstractContextManager[Any], denoise: Denoise) -> Denoise:
    """`denoise`, each call inside of the context."""

    def inside(x: Tensor, sigma: float) -> Denoised:
        with context:
            return denoise(x, sigma)

    return inside
