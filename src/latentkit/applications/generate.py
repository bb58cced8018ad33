"""The only path to pixels: requests become plans, one loop runs every plan and yields what happens."""

import logging
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from latentkit.applications.backend import check, running
from latentkit.applications.metadata import MAX_BATCH, Record, chunks, machine
from latentkit.applications.plan import Prepare, from_noise
from latentkit.applications.request import OPTIONS, PICTURES, Request, ask, known, told
from latentkit.applications.rules import resolve
from latentkit.applications.tasks import image_to_image, inpaint, upscale
from latentkit.applications.tasks.adapters import knowing, opened, unsaid, wearing, within
from latentkit.checkpoints.files import Model
from latentkit.data.pictures import tiff_of, to_png, to_tiff
from latentkit.data.range import Range, stated
from latentkit.diffusion.noise import PictureNoise
from latentkit.diffusion.samplers.driver import sample
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

    `values` is the range that the model's pictures were read by, where one was stated.
    """

    number: int
    picture: Tensor
    record: Record
    values: Range | None = None

    @property
    def request(self) -> Request:
        """The request with every choice filled in: it draws this picture again."""
        return self.record.request

    def png(self) -> bytes:
        """The PNG file, with the record in its text chunks."""
        return to_png(self.picture, chunks(self.record))

    def file(self) -> tuple[str, bytes]:
        """Suffix and bytes of the file to write: PNG, or 16-bit TIFF (without record) for more than 4 channels.

        Of a model with a stated range: TIFF (without record) of values by it.
        """
        if self.values is not None:
            return "tiff", tiff_of(self.values.to_values(self.picture))
        return ("png", self.png()) if len(self.picture) <= 4 else ("tiff", to_tiff(self.picture))


def generate(
    model: Model, requests: Request | Sequence[Request], *, count: int = 1, exact: bool = False
) -> Iterator[Progress | Result]:
    """Draw `count` pictures of each request: events of progress, and each picture as it is finished.

    Picture i of a request has seed + i; its noise is that of a single picture with that seed, whatever else is drawn.
    `exact` draws one at a time, so that the pictures too equal single ones bit by bit. Closing the iterator cancels
    between two steps. Errors: InputError before anything is drawn, or for a picture that is not finite.
    """
    if count < 1:
        raise InputError(f"{count} pictures asked for; at least 1 is drawn", exit_code=2)
    asked = [requests] if isinstance(requests, Request) else list(requests)
    defaults = model.provenance.get("defaults", {})
    jobs: list[Request] = []
    held: dict[str, Any] = {}
    for request in asked:
        full = opened(resolve(request, model.network, defaults), model.network, held)
        check(full, model.network)
        _warn(model.network, full)
        if (last := known(full.seed) + count - 1) >= 2**63:
            raise InputError(f"seeds {full.seed} to {last} asked for; allowed are 0 to {2**63 - 1}", exit_code=2)
        jobs += [full.model_copy(update={"seed": known(full.seed) + i}) for i in range(count)]
    done = 0
    for rows in _batches(model.network, jobs, exact):
        yield from _draw(model, {row: jobs[row] for row in rows}, done / len(jobs), len(rows) / len(jobs))
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
    check(request, model.network)
    model = model._replace(name=record.model) if model.digest == record.digest else model
    for event in _draw(model, dict.fromkeys(range(record.batch), request), 0.0, 1.0):
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


def _draw(model: Model, jobs: dict[int, Request], before: float, part: float) -> Iterator[Progress | Result]:
    """One batch: its progress, then its pictures. `before` and `part` are shares of the whole work."""
    network, requests, pixels = model.network, list(jobs.values()), None
    values = stated(model.provenance, model.name)
    for event in _sample(network, requests):
        if isinstance(event, Tensor):
            pixels = event
        else:
            step, steps, x0, evaluations = event
            yield Progress(tuple(jobs), step, steps, before + part * step / steps, x0, evaluations)
    assert pixels is not None
    made_with = machine(model, requests[0].backend)
    for row, (number, request) in enumerate(jobs.items()):
        record = Record(
            request=request, model=model.name, digest=model.digest, row=row, batch=len(requests), machine=made_with
        )
        yield Result(number, pixels[row].clone(), record, values)  # cloned out of inference mode: it is the caller's


@torch.inference_mode()
def _sample(network: LatentDiffusion, requests: Sequence[Request]) -> Iterator[tuple[int, int, Tensor, int] | Tensor]:
    """(step, steps, x0, evaluations) after each step, and last the pixels `b c h w` in [-1, 1] on the CPU."""
    first = requests[0]
    shape = network.latent_shape(known(first.height), known(first.width))
    noise = PictureNoise([known(request.seed) for request in requests], shape)
    worn, engine = wearing(network, first), running(network, first)
    with worn, engine, knowing(network, first):
        plan = APPLICATIONS[known(first.task)](network, requests, noise)
    steps, x = len(plan.sigmas) - 1, plan.x
    options = {name: value for name in OPTIONS if (value := getattr(first, name)) is not None}
    denoise = within(engine, within(worn, plan.denoise))
    later = plan.later and (plan.later[0], within(engine, plan.later[1]))
    walk = sample(known(first.sampler), denoise, x, plan.sigmas, noise, later=later, **options)
    for number, step in enumerate(walk, start=1):
        x = step.x
        yield number, steps, step.x0, step.evaluations
    with engine:
        pixels = plan.finish(x)
    for request, latent, picture in zip(requests, x, pixels):
        if not (torch.isfinite(latent).all() and torch.isfinite(picture).all()):
            what = f"the picture with seed {request.seed} holds NaN or infinite values and was not drawn"
            raise InputError(f"{what}: lower the guidance scale ({request.guidance_scale}), or take another model")
    yield pixels.clamp(-1, 1).cpu()
