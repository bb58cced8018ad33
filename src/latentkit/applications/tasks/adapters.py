"""LoRAs, ControlNets, inversions and autoencoder of a request: read for the model that draws, and lent to it."""

from contextlib import AbstractContextManager, ExitStack, nullcontext
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from latentkit.applications.attachment import WeightsFile
from latentkit.applications.request import Request, known, models_of
from latentkit.checkpoints.adapters.control_files import read_control
from latentkit.checkpoints.adapters.inversions import Inversion, read_inversion
from latentkit.checkpoints.adapters.lora_files import read_lora
from latentkit.checkpoints.adapters.survey import instead
from latentkit.checkpoints.exchange import first_stage_for
from latentkit.diffusion.samplers.driver import Denoise, Denoised
from latentkit.errors import InputError
from latentkit.model.conditioners.clip import ClipConditioner, mentions
from latentkit.model.latent_diffusion import LatentDiffusion
from latentkit.nets.controlnet import kind_number
from latentkit.nets.lora import Adapted


def _inversion(path: Path, network: LatentDiffusion) -> Inversion:
    """The textual inversion there, whose vectors are of the widths that the model takes."""
    found = read_inversion(path)
    with _text(network).knowing({found.name: found.vectors}):
        return found


def _text(network: LatentDiffusion) -> ClipConditioner:
    return cast(ClipConditioner, network.conditioners["text"])


READERS = {
    "lora": ("LoRA", read_lora),
    "control": ("ControlNet", read_control),
    "embedding": ("textual inversion", _inversion),
    "autoencoder": ("autoencoder", first_stage_for),
}
"""Fields of a request that are, or begin with, a file of weights: what it is, and what reads it for a model."""
OPTIONS = {"autoencoder": "vae"}
"""What a field's option is called, where not as the field."""


def opened(request: Request, network: LatentDiffusion, held: dict[str, Any]) -> Request:
    """The request with its files of weights read for the model; `held` keeps what was read, by digest.

    Errors: InputError for a file that is not at hand or does not fit the model.
    """
    update: dict[str, Any] = {}
    for field in READERS:
        given = getattr(request, field)
        if isinstance(given, WeightsFile):
            update[field] = _read(field, given, network, held)
        elif given:
            update[field] = tuple((_read(field, file, network, held), *rest) for file, *rest in given)
    _check_kinds(update.get("control", ()))
    if "embedding" in update:
        update["embedding"] = tuple((file, name or known(file.content).name) for file, name in update["embedding"])
    return request.model_copy(update=update)


def _read(field: str, file: WeightsFile, network: LatentDiffusion, held: dict[str, Any]) -> WeightsFile:
    """The file with what is read there."""
    kind, reader = READERS[field]
    key = f"{field} {file.digest}"
    if key not in held:
        if file.path is None:
            missing = f"the {kind} whose file has the sha256 {file.digest[:16]}..."
            raise InputError(
                f"the request needs {missing}; give its file (--{OPTIONS.get(field, field)} FILE)", exit_code=2
            )
        try:
            held[key] = reader(file.path, network)
        except InputError as error:
            raise error if field == "autoencoder" else instead(error, file.path, f"a {kind}") from None
    return WeightsFile(file.digest, file.path, held[key])


def _check_kinds(entries: tuple[Any, ...]) -> None:
    """A ControlNet of several kinds of hint is told which; others are not."""
    for file, _, _, *terms in entries:
        kind, fusion = terms[0].kind if terms else None, known(file.content).fusion
        count = 0 if fusion is None else len(fusion.kinds)
        if kind is None and count:
            raise InputError(f"this ControlNet takes hints of {count} kinds; say which, as in :kind=canny", exit_code=2)
        if kind is not None and kind_number(kind) >= count:
            got = f"kind {kind!r} is number {kind_number(kind)}, and this ControlNet has {count or 'no'} kinds"
            raise InputError(f"hint {got}", exit_code=2)


def decoding(network: LatentDiffusion, request: Request) -> LatentDiffusion:
    """The model with the request's autoencoder."""
    return network.with_first_stage(request.autoencoder.content) if request.autoencoder else network


def knowing(network: LatentDiffusion, request: Request) -> AbstractContextManager[Any]:
    """A context in which the request's textual inversions stand for words, whichever of its models reads them."""
    contexts = ExitStack()
    learnt = {known(name): known(file.content).vectors for file, name in request.embedding or ()}
    for each in models_of(request, network) if learnt else ():
        contexts.enter_context(_text(each).knowing(learnt))
    return contexts


def unsaid(request: Request) -> list[str]:
    """The names of the request's textual inversions that none of its prompts says."""
    prompts = [request.prompt or "", request.negative, *(words for words, _ in request.also or ())]
    names = [known(name) for _, name in request.embedding or ()]
    return [name for name in names if not any(list(mentions(prompt, [name])) for prompt in prompts)]


def wearing(network: LatentDiffusion, request: Request, part: str = "") -> AbstractContextManager[Any]:
    """A context, to be entered as often as wanted, in which the model, or a part of it, has the request's LoRAs on."""
    adapters = [(known(file.content).changes, weight) for file, weight in request.lora or ()]
    ours = [({name: c[name] for name in c if name.startswith(part)}, weight) for c, weight in adapters]
    if not any(changes for changes, _ in ours):
        return nullcontext()
    with torch.inference_mode(False), torch.no_grad():
        adapted = Adapted(network, ours)
    adapted.remove()
    return adapted


def within(context: AbstractContextManager[Any], denoise: Denoise) -> Denoise:
    """`denoise`, each call inside of the context."""

    def inside(x: Tensor, sigma: float) -> Denoised:
        with context:
            return denoise(x, sigma)

    return inside
