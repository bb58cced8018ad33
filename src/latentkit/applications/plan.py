"""Plan: a batch of requests prepared for the sampler, and what every application prepares alike."""

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from latentkit.applications.attachment import Guide
from latentkit.applications.metadata import PartName
from latentkit.applications.request import Request, Terms, known
from latentkit.applications.tasks.places import placed
from latentkit.data.pictures import resize, to_tensor
from latentkit.diffusion import guidance
from latentkit.diffusion.noise import PictureNoise, keyed_normal
from latentkit.diffusion.samplers.driver import Denoise
from latentkit.diffusion.spacing import space
from latentkit.model.conditioners.image import ImagePrompt
from latentkit.model.conditioners.prompt import Prompt
from latentkit.model.conditioning import Conditioning, merge
from latentkit.model.denoiser import GUIDANCE
from latentkit.model.latent_diffusion import LatentDiffusion
from latentkit.nets.controlnet import HINT_CELL, ROWS, Control, kind_number


class Plan(NamedTuple):
    """What the loop runs: `x` `b c h w` at `sigmas[0]`, down `sigmas` with `denoise`, to pixels by `finish`."""

    x: Tensor
    sigmas: np.ndarray
    denoise: Denoise
    finish: Callable[[Tensor], Tensor]
    later: tuple[int, Denoise] | None = None
    """The step from which on another denoiser takes the place of `denoise`."""


class NotFiniteError(ArithmeticError):
    """A part gave NaN or infinite values for the picture of that row."""

    def __init__(self, part: PartName, row: int = 0) -> None:
        super().__init__(part, row)
        self.part, self.row = part, row


def checked(values: Tensor, part: PartName) -> Tensor:
    """The same rows; NotFiniteError where one holds NaN or infinite values."""
    if not torch.isfinite(values).all():
        rows = torch.isfinite(values).flatten(1).all(1)
        raise NotFiniteError(part, int(rows.logical_not().nonzero()[0]))
    return values


Prepare = Callable[[LatentDiffusion, Sequence[Request], PictureNoise], Plan]
"""An application: resolved requests that differ only in words, seeds and pictures, to their plan."""
NOT_REFINED = ("refiner", "lora", "control")
"""Fields that speak of the first model alone."""


def sigmas_of(network: LatentDiffusion, request: Request) -> np.ndarray:
    """The noise levels of a resolved request."""
    made = network.architecture
    return space(known(request.spacing), made.schedule, known(request.steps), made.searched)


def encoded(network: LatentDiffusion, pictures: Tensor) -> Tensor:
    """The latents of pictures `b c h w`, one at a time, so that a batch equals its singles."""
    return checked(torch.cat([network.first_stage.encode(one[None]) for one in pictures]), "first_stage")


def conditioned(network: LatentDiffusion, values: dict[str, list[Any]], count: int) -> Conditioning:
    """`LatentDiffusion.condition`, with finite values."""
    found = network.condition(values, count)
    for slot in (found.context, found.vector, found.concat):
        if slot is not None:
            checked(slot, "conditioners")
    return found


def fitted(x: Tensor, height: int, width: int, multiple: int, *, alpha: bool = False) -> Tensor:
    """A picture `c h w` that is less than `multiple` pixels larger without its edges; any other one covers the size."""
    if 0 <= x.shape[1] - height < multiple and 0 <= x.shape[2] - width < multiple:
        return middle(x, height, width)
    return covered(x, height, width, alpha=alpha)


def covered(x: Tensor, height: int, width: int, *, alpha: bool = False) -> Tensor:
    """A picture `c h w` scaled to cover `height` x `width` pixels and cut to them about the middle."""
    scale = max(height / x.shape[1], width / x.shape[2])
    scaled = (max(height, round(x.shape[1] * scale)), max(width, round(x.shape[2] * scale)))
    return middle(resize(x, *scaled, alpha=alpha), height, width)


def middle(x: Tensor, height: int, width: int) -> Tensor:
    """The `height` x `width` pixels about the middle of `c h w`."""
    top, left = (x.shape[1] - height) // 2, (x.shape[2] - width) // 2
    return x[:, top : top + height, left : left + width]


def path_of(network: LatentDiffusion, request: Request) -> np.ndarray:
    """The noise levels that are visited: of the whole way, or of the last share of it that `strength` names."""
    sigmas = sigmas_of(network, request)
    if request.strength is None:
        return sigmas
    steps = len(sigmas) - 1
    return sigmas[steps - max(1, round(steps * known(request.strength))) :]


def refined(network: LatentDiffusion, requests: Sequence[Request]) -> tuple[int, Denoise] | None:
    """`Plan.later` of requests with a refiner: it is told the same words, by what is its own.

    Source: Podell et al. 2023, section 2.5, with the switch of its released code.
    """
    first = requests[0]
    if first.refiner is None:
        return None
    asked = [request.model_copy(update=dict.fromkeys(NOT_REFINED)) for request in requests]
    return switch_step(network, first), guided(
        known(first.refiner.model).network, asked, path=sigmas_of(network, first)
    )


def switch_step(network: LatentDiffusion, request: Request) -> int:
    """The number of the first step that the request's refiner does."""
    schedule, share = network.architecture.schedule, known(request.refiner_switch)
    first = round(schedule.steps * (1 - share))
    positions = schedule.position(path_of(network, request)[:-1])
    return int(np.count_nonzero(positions > first - 1e-6))


def guided(
    network: LatentDiffusion,
    requests: Sequence[Request],
    beside: Conditioning | None = None,
    path: np.ndarray | None = None,
) -> Denoise:
    """The model told what the requests say, and guided as the first of them asks; made for one run.

    `beside` is what it is told beside words, whatever it is guided by: rows of its concat slot. `path` are the noise
    levels of the whole way (None: those that the first request asks of this model).
    """
    first, count = requests[0], len(requests)
    controls, hints = _controlled(network, first, count)
    bind = partial(network.denoiser.bind, controls=controls)
    always = merge([beside or Conditioning(), _depths(network, requests), _strength(network, first, count), hints])
    asked = _told(network, requests)
    told = [merge([conditioned(network, asked, count), always])]
    for words, _ in first.also or ():
        name = "text" if "text" in network.conditioners else "label"
        more = {**asked, name: [_worded(first, name, words)] * count}
        told.append(merge([conditioned(network, more, count), always]))
    alone = bind(told[0])
    path = sigmas_of(network, first) if path is None else path
    steered = (first.guidance_scale != 1 or first.guidance_kind == "cfg++") and not network.architecture.distilled
    pair = guidance.itself(alone)
    if first.also or (steered and first.guidance_model is None):
        weights = (1.0, *(weight for _, weight in first.also or ()))
        joint = bind(Conditioning.cat([merge([_absent(network, requests), _away(always)]), *told]))
        pair = guidance.together(joint, weights)
    if first.also:
        alone = guidance.positive(pair)
    if first.guidance_model is not None:
        pair = guidance.apart(_weaker(first.guidance_model, asked, count, always), alone)
    denoise = alone
    if steered or first.pag_scale:
        interval = known(first.guidance_low), known(first.guidance_high)
        denoise = guidance.guide(pair, alone, _rule(first, path, partial(bind, told[0], True)), interval)
    if first.threshold is None:
        return denoise
    return guidance.thresholded(denoise, first.threshold, network.first_stage.decode, network.first_stage.encode)


def _strength(network: LatentDiffusion, request: Request, count: int) -> Conditioning:
    """The guidance scale, for a model that is told it."""
    if not network.architecture.distilled:
        return Conditioning()
    device = network.first_stage.latent_mean.device
    return Conditioning(extras={GUIDANCE: torch.full((count,), known(request.guidance_scale), device=device)})


def _controlled(network: LatentDiffusion, request: Request, count: int) -> tuple[list[Control], Conditioning]:
    """The request's ControlNets, and `count` rows of their hints."""
    controls, hints = [], {}
    _, height, width = network.latent_shape(known(request.height), known(request.width))
    sigmas = path_of(network, request)
    for number, (file, attached, weight, *more) in enumerate(request.control or ()):
        name, net = f"hint{number}", known(file.content)
        pixels = to_tensor(known(attached.picture), net.hint_channels)
        pixels = (covered(pixels, HINT_CELL * height, HINT_CELL * width) + 1) / 2
        hints[name] = pixels.expand(count, -1, -1, -1).to(network.first_stage.latent_mean.device)
        terms = more[0] if more else Terms()
        if terms.guess or terms.pooled or net.pooled:
            hints[name + ROWS] = torch.ones(count, dtype=torch.bool, device=hints[name].device)
        kind = kind_number(terms.kind) if terms.kind else 0
        controls.append(Control(net, name, weight, terms.guess, terms.pooled, kind, *_interval(sigmas, terms)))
    return controls, Conditioning(extras=hints)


def _interval(sigmas: np.ndarray, terms: Terms) -> tuple[float, float]:
    """The noise levels (above, up to) of the steps that lie wholly in the share of all steps."""
    steps = len(sigmas) - 1
    inside = [i for i in range(steps) if i / steps >= terms.start and (i + 1) / steps <= terms.end]
    if not inside:
        return math.inf, math.inf
    high = math.inf if inside[0] == 0 else float(sigmas[inside[0]])
    return (-math.inf if inside[-1] == steps - 1 else float(sigmas[inside[-1] + 1])), high


def _away(always: Conditioning) -> Conditioning:
    """The same on the side that guidance leads away from, where ControlNets in guess mode do not answer."""
    rows = {name: torch.zeros_like(value) for name, value in always.extras.items() if name.endswith(ROWS)}
    return replace(always, extras=always.extras | rows)


def _depths(network: LatentDiffusion, requests: Sequence[Request]) -> Conditioning:
    """The requests' depth pictures in latent cells, each stretched to [-1, 1] (a flat one is -1)."""
    if requests[0].depth is None:
        return Conditioning()
    height, width = known(requests[0].height), known(requests[0].width)
    rows = torch.stack([covered(to_tensor(known(known(r.depth).picture), 1), height, width) for r in requests])
    _, *cells = network.latent_shape(height, width)
    rows = F.interpolate(rows, cells, mode="bicubic", align_corners=False)
    low, high = rows.amin((1, 2, 3), keepdim=True), rows.amax((1, 2, 3), keepdim=True)
    rows = 2 * (rows - low) / (high - low).clamp_min(1e-6) - 1
    return Conditioning(concat=rows.to(network.first_stage.latent_mean.device))


def _rule(request: Request, path: np.ndarray, disturbed: Callable[[], Denoise]) -> guidance.Rule:
    """How the request wants two estimates made one; `disturbed` makes the model with its attention perturbed."""
    scale = known(request.guidance_scale)
    rule = guidance.linear(scale)
    if request.guidance_kind == "cfg++":
        rule = guidance.plus(scale)
    elif request.guidance_kind == "apg":
        rule = guidance.projected(scale, path)
    if request.pag_scale:
        rule = guidance.perturbed(rule, disturbed(), request.pag_scale)
    return guidance.rescaled(rule, request.guidance_rescale) if request.guidance_rescale else rule


def _told(network: LatentDiffusion, requests: Sequence[Request]) -> dict[str, list[Any]]:
    """What the requests say, by conditioner; what one does not say is absent."""
    said: dict[str, list[Any]] = {
        "text": [_worded(r, "text", r.prompt) for r in requests],
        "label": [r.label for r in requests],
        "image": [_shown(network, r) for r in requests],
    }
    said |= _numbers(network, requests) | placed(network, requests)
    return {name: _filled(network, name, values) for name, values in said.items() if name in network.conditioners}


def _absent(network: LatentDiffusion, requests: Sequence[Request]) -> Conditioning:
    """The rows that guidance leads away from."""
    words = [_worded(request, "text", request.negative or None) for request in requests]
    values = {"text": _filled(network, "text", words)} if "text" in network.conditioners else {}
    values |= _numbers(network, requests, away=True)
    if "map" in network.conditioners:
        values |= {"map": placed(network, requests)["map"]}
    return conditioned(network, values, len(requests))


def _worded(request: Request, name: str, words: str | None) -> str | Prompt | None:
    """What the conditioner called `name` is told for words of the request."""
    return Prompt(words, request.clip_skip - 1) if name == "text" and request.clip_skip else words


def _shown(network: LatentDiffusion, request: Request) -> ImagePrompt | None:
    """The request's picture to draw variations of, and noise on what the model makes of it."""
    image = network.architecture.image
    if request.variation is None or image is None:
        return None
    picture = to_tensor(known(request.variation.picture), 3)
    if request.noise_level is None:
        return ImagePrompt(picture)
    return ImagePrompt(
        picture, request.noise_level, keyed_normal((1, image.tower.projection), known(request.seed), "variation")
    )


def _numbers(network: LatentDiffusion, requests: Sequence[Request], away: bool = False) -> dict[str, list[Any]]:
    """The upscaler's level of noise, or sizes; `away`: on the side that guidance leads away from."""
    config = network.architecture.numbers
    if config is None:
        return {}
    if not config.says:
        level = requests[0].noise_level
        return {"numbers": [config.default if level is None else (level,)] * len(requests)}
    first = requests[0]
    pairs = {name: pair[::-1] for name in ("original_size", "crop", "target_size") if (pair := getattr(first, name))}
    score = first.negative_aesthetic_score if away else first.aesthetic_score
    said = pairs | ({} if score is None else {"aesthetic_score": score})
    return {"numbers": [config.drawn(known(first.height), known(first.width), away, **said)] * len(requests)}


def _filled(network: LatentDiffusion, name: str, values: list[Any]) -> list[Any]:
    nothing = network.conditioner(name).absent(len(values))
    return [other if value is None else value for value, other in zip(values, nothing)]


def _weaker(guide: Guide, asked: dict[str, list[Any]], count: int, always: Conditioning) -> Denoise:
    """The guidance model told the same, as far as it understands."""
    network = known(guide.model).network
    understood = {name: values for name, values in asked.items() if name in network.conditioners}
    beside = Conditioning(concat=always.concat if network.architecture.concat_channels else None)
    return network.denoiser.bind(merge([conditioned(network, understood, count), beside]))


def from_noise(network: LatentDiffusion, requests: Sequence[Request], noise: PictureNoise) -> Plan:
    """Text-to-image, class-to-image, variations, unconditional drawing: pure noise and the whole path."""
    sigmas = sigmas_of(network, requests[0])
    device = network.first_stage.latent_mean.device
    start = noise.initial().to(device) * network.architecture.schedule.initial_std(float(sigmas[0]))
    return Plan(start, sigmas, guided(network, requests), network.first_stage.decode, refined(network, requests))
