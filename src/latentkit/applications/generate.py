"""The only path to pixels: requests become plans, one loop runs every plan and yields what happens."""

import itertools
import logging
from collections.abc import Generator, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from latentkit.applications.backend import check, running
from latentkit.applications.metadata import MAX_BATCH, PartName, Record, chunks, machine
from latentkit.applications.plan import NotFiniteError, Plan, Prepare, checked, from_noise
from latentkit.applications.request import OPTIONS, PICTURES, Request, ask, known, told
from latentkit.applications.rules import resolve
from latentkit.applications.tasks import image_to_image, inpaint, upscale
from latentkit.applications.tasks.adapters import decoding, knowing, opened, unsaid, wearing, within
from latentkit.checkpoints.files import Model, Place
from latentkit.checkpoints.parts import Parts
from latentkit.data.pictures import to_png, to_range, to_tiff
from latentkit.data.range import Range, ends_in_alpha, stated
from latentkit.diffusion.noise import PictureNoise
from latentkit.diffusion.samplers.driver import Denoise, Denoised, sample
from latentkit.errors import InputError
from latentkit.model.conditioners.text import TextConditioner
from latentkit.model.latent_diffusion import LatentDiffusion

APPLICATIONS: dict[str, Prepare] = {
    "text-to-image": from_noise,
    "class-to-image": from_noise,
    "layout-to-image": from_noise,
    "semantic-to-image": from_noise,
    "unconditional": from_noise,
    "image-to-image": image_to_image.prepare,
    "inpainting": inpaint.prepare,
    "upscaling": upscale.prepare,
    "variation": from_noise,
}
CELLS_AT_ONCE = 1 << 14
"""Latent cells of one batch: 32 pictures of 16x16 cells (at most), 4 of 64x64, one of 128x128."""
OWN = ("prompt", "label", "negative", "seed", "layout", *PICTURES)
"""Fields in which the pictures of one batch may differ."""
PARTS: dict[PartName, str] = {
    "conditioners": "the text encoder",
    "denoiser": "the network",
    "refiner": "the refiner",
    "first_stage": "the first stage",
}
"""What a person calls the parts."""
WATCHED = 8


class Progress(NamedTuple):
    """`step` of `steps` of the batch that draws the pictures numbered `pictures` is done; `share` of the whole job.

    `x0` `b c h w` are their latents as estimated now (`first_stage.decode` shows them), valid until the next event.
    """

    pictures: tuple[int, ...]
    step: int
    steps: int
    share: float
    x0: Tensor
    evaluations: int
    """Calls of the network for each of them so far (a guided call, of all its branches, is one)."""


class Result(NamedTuple):
    """A finished picture: its number, `c h w` in [-1, 1], and the record of how it was drawn.

    `values` is the range that the model's pictures were read by, where one was stated; `alpha` says that the last
    channel is alpha.
    """

    number: int
    picture: Tensor
    record: Record
    values: Range | None = None
    alpha: bool = False

    @property
    def request(self) -> Request:
        """The request with every choice filled in: it draws this picture again."""
        return self.record.request

    def png(self) -> bytes:
        """The PNG file, with the record in its text chunks; InputError for channels that it cannot hold."""
        if not self._fits:
            raise InputError(f"PNG cannot hold {len(self.picture)} plain channels: `file` gives a TIFF")
        return to_png(self.picture, chunks(self.record))

    def file(self) -> tuple[str, bytes]:
        """Suffix and bytes of the file to write: PNG, or 16-bit TIFF (without record) for channels it cannot hold.

        Of a model with a stated range: TIFF (without record) of values by it.
        """
        if self.values is not None:
            return "tiff", to_range(self.picture, self.values, alpha=self.alpha)
        return ("png", self.png()) if self._fits else ("tiff", to_tiff(self.picture))

    @property
    def _fits(self) -> bool:
        return len(self.picture) in (1, 3) or self.alpha


def generate(
    model: Model,
    requests: Request | Sequence[Request],
    *,
    count: int = 1,
    exact: bool = False,
    low_memory: bool = False,
) -> Iterator[Progress | Result]:
    """Draw `count` pictures of each request: events of progress, and each picture as it is finished.

    Picture i of a request has seed + i; its noise is that of a single picture with that seed, whatever else is drawn.
    `exact` draws one at a time, so that the pictures too equal single ones bit by bit. Closing the iterator cancels
    between two steps. With `low_memory`, and for a model that was loaded so, a part of the model is on its device only
    while it is needed, and pictures pass the first stage in strips: the same pictures up to float error. Errors:
    InputError before anything is drawn, or for a picture that is not finite.
    """
    if count < 1:
        raise InputError(f"{count} pictures asked for; at least 1 is drawn", exit_code=2)
    asked = [requests] if isinstance(requests, Request) else list(requests)
    defaults = model.provenance.get("defaults", {})
    jobs: list[Request] = []
    held: dict[str, Any] = {}
    for request in asked:
        full = opened(resolve(request, model.network, defaults), model.network, held)
        check(full, model.network, low_memory or model.place is not None)
        _warn(model.network, full)
        if (last := known(full.seed) + count - 1) >= 2**63:
            raise InputError(f"seeds {full.seed} to {last} asked for; allowed are 0 to {2**63 - 1}", exit_code=2)
        jobs += [full.model_copy(update={"seed": known(full.seed) + i}) for i in range(count)]
    done, way = 0, _Way(low_memory or model.place is not None, set())
    for rows in _batches(model.network, jobs, exact):
        yield from _draw(model, {row: jobs[row] for row in rows}, way, done / len(jobs), len(rows) / len(jobs))
        done += len(rows)


def _warn(network: LatentDiffusion, request: Request) -> None:
    """Say where a text is longer than what the model's encoder reads, or does not say what was given for it."""
    for name in unsaid(request):
        logging.getLogger("latentkit").warning(f"no prompt says {name!r}: that textual inversion has no effect")
    text = network.conditioner("text") if "text" in network.conditioners else None
    if not isinstance(text, TextConditioner):
        return
    for name in ("prompt", "negative"):
        words = getattr(request, name) or ""
        if (count := text.count(words)) > text.room:
            cut = f"{text.room} of the {count} tokens of the {name} {words[:40]!r}... are read; the rest has no effect"
            logging.getLogger("latentkit").warning(cut)


def replay(model: Model, record: Record) -> Iterator[Progress | Result]:
    """Draw the picture of a record again, in a batch of the size that it was drawn in."""
    request = opened(resolve(record.request, model.network, {}), model.network, {})
    check(request, model.network, bool(record.strips))
    model = model._replace(name=record.model) if model.digest == record.digest else model
    way = _Way(bool(record.strips), set(), record.wide or ())
    for event in _draw(model, dict.fromkeys(range(record.batch), request), way, 0.0, 1.0):
        if isinstance(event, Progress) or event.number == record.row:
            yield event


def draw(
    network: LatentDiffusion, defaults: dict[str, Any], words: Sequence[str | None], seeds: Sequence[int]
) -> Iterator[Tensor]:
    """Pictures `c h w` for prompts (or classes, or nothing) and seeds, in their order: for sheets and measurements.

    `defaults` are sampling settings (fields of `Request`).
    """
    requests = [ask(seed=seed, **told(network, text)) for text, seed in zip(words, seeds, strict=True)]
    waiting: dict[int, Tensor] = {}
    following = 0
    for event in generate(Model(network, {"defaults": defaults}), requests):
        if isinstance(event, Result):
            waiting[event.number] = event.picture
        while following in waiting:
            yield waiting.pop(following)
            following += 1


def _batches(network: LatentDiffusion, jobs: Sequence[Request], exact: bool) -> Iterator[list[int]]:
    """The numbers of the jobs, those that can be drawn together together."""
    alike: dict[Request, list[int]] = {}
    for index, job in enumerate(jobs):
        alike.setdefault(job.model_copy(update=dict.fromkeys(OWN)), []).append(index)
    for job, rows in alike.items():
        _, height, width = network.latent_shape(known(job.height), known(job.width))
        size = 1 if exact else max(1, min(MAX_BATCH, CELLS_AT_ONCE // (height * width)))
        for start in range(0, len(rows), size):
            yield rows[start : start + size]


class _Way(NamedTuple):
    """How batches are drawn: `low` in memory, the parts called `wide` in float32; of parts `told` a person was told."""

    low: bool
    told: set[PartName]
    wide: tuple[PartName, ...] = ()


def _draw(model: Model, jobs: dict[int, Request], way: _Way, before: float, part: float) -> Iterator[Progress | Result]:
    """One batch: its progress, then its pictures. `before` and `part` are shares of the whole work."""
    requests, pixels = list(jobs.values()), None
    model = model._replace(network=decoding(model.network, requests[0]))
    values = stated(model.provenance, model.name)
    in_strips = model.network.first_stage.in_strips() if way.low else nullcontext()
    with in_strips, Parts(_groups(model, requests[0]), way.low, way.wide) as parts:
        for event in _sample(model.network, requests, parts, way.told):
            if isinstance(event, Tensor):
                pixels = event
            else:
                step, steps, x0, evaluations = event
                yield Progress(tuple(jobs), step, steps, before + part * step / steps, x0, evaluations)
        wide = tuple(name for name in PARTS if name in parts.wide)
    assert pixels is not None
    made_with = machine(model, requests[0].backend)
    for row, (number, request) in enumerate(jobs.items()):
        record = Record(
            request=request,
            model=model.name,
            digest=model.digest,
            row=row,
            batch=len(requests),
            machine=made_with,
            wide=wide or None,
            strips=way.low or None,
        )
        picture = pixels[row].clone()  # out of inference mode: it is the caller's
        yield Result(number, picture, record, values, ends_in_alpha(model.provenance, len(picture)))


def _groups(model: Model, request: Request) -> dict[str, list[tuple[nn.Module, Place | None]]]:
    """The modules that draw the request, by the part whose turn is theirs."""
    network, place = model.network, model.place
    weaker, refiner = (known(guide.model) if guide else None for guide in (request.guidance_model, request.refiner))
    both = [(other.network, other.place) for other in (weaker, refiner) if other]
    steps = [(network.denoiser, place), *((known(file.content), place) for file, *_ in request.control or ())]
    if weaker:
        steps.append((weaker.network.denoiser, weaker.place))
    first_stage: list[tuple[nn.Module, Place | None]] = [(network.first_stage, place)]
    return {
        "conditioners": [(network.conditioners, place), *((other.conditioners, there) for other, there in both)],
        "denoiser": [*steps, *(first_stage if request.threshold else [])],
        "refiner": [(refiner.network.denoiser, refiner.place)] if refiner else [],
        "first_stage": first_stage,
    }


@torch.inference_mode()
def _sample(
    network: LatentDiffusion, requests: Sequence[Request], parts: Parts, told: set[PartName]
) -> Iterator[tuple[int, int, Tensor, int] | Tensor]:
    """(step, steps, x0, evaluations) after each step, and last the pixels `b c h w` in [-1, 1] on the CPU.

    What a part makes of finite values is finite: a part of 16 bits with which it is not does its work again in float32.
    """
    first, x = requests[0], None
    engine = running(network, first)
    while True:
        try:
            if x is None:
                plan, noise = _prepared(network, requests, parts, engine)
                x = yield from _walked(network, first, plan, noise, parts, engine)
            parts.turn("first_stage")
            with engine:
                pixels = checked(plan.finish(x), "first_stage")
            break
        except NotFiniteError as fault:
            if not parts.widen(fault.part):
                seed = requests[fault.row].seed
                what = f"the picture with seed {seed} holds NaN or infinite values and was not drawn"
                advice = f"lower the guidance scale ({first.guidance_scale}), or take another model"
                raise InputError(f"{what}: {advice}") from None
            if fault.part not in told:
                told.add(fault.part)
                what = f"the values of {PARTS[fault.part]} left the range of the model's 16-bit type"
                logging.getLogger("latentkit").warning(f"{what}: its part of the work is done again in float32")
    yield pixels.clamp(-1, 1).cpu()


def _prepared(
    network: LatentDiffusion, requests: Sequence[Request], parts: Parts, engine: AbstractContextManager[Any]
) -> tuple[Plan, PictureNoise]:
    """What the batch's application prepares."""
    first = requests[0]
    shape = network.latent_shape(known(first.height), known(first.width))
    noise = PictureNoise([known(request.seed) for request in requests], shape)
    parts.turn("conditioners", *(["first_stage"] if first.init else []))
    with wearing(network, first, "conditioners"), engine, knowing(network, first):
        return APPLICATIONS[known(first.task)](network, requests, noise), noise


def _walked(
    network: LatentDiffusion,
    first: Request,
    plan: Plan,
    noise: PictureNoise,
    parts: Parts,
    engine: AbstractContextManager[Any],
) -> Generator[tuple[int, int, Tensor, int], None, Tensor]:
    """The events of the plan's steps, and their end."""
    parts.turn("denoiser")
    worn = wearing(network, first, "denoiser")
    options = {name: value for name in OPTIONS if (value := getattr(first, name)) is not None}
    denoise = _watched(within(engine, within(worn, plan.denoise)), parts, "denoiser", "first_stage")
    later = plan.later and (plan.later[0], _watched(within(engine, plan.later[1]), parts, "refiner", "denoiser"))
    steps, x = len(plan.sigmas) - 1, plan.x
    walk = sample(known(first.sampler), denoise, x, plan.sigmas, noise, later=later, **options)
    for number, step in enumerate(walk, start=1):
        x = step.x
        yield number, steps, step.x0, step.evaluations
    return checked(x, "refiner" if later else "denoiser")


def _watched(denoise: Denoise, parts: Parts, part: PartName, before: PartName) -> Denoise:
    """`denoise`, for which `part` comes when it is first called; NotFiniteError once its estimates are not finite.

    They are looked at in the first and each `WATCHED`-th call: a GPU must finish all that was asked of it for a look.
    """
    calls = itertools.count()

    def watched(x: Tensor, sigma: float) -> Denoised:
        number = next(calls)
        if number == 0:
            checked(x, before)
            parts.turn(part)
        found = denoise(x, sigma)
        if number % WATCHED == 0:
            checked(found.x0, part)
        return found

    return watched
