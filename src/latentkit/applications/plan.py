"""Plan: a batch of requests prepared for the sampler, and what every application prepares alike."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from latentkit.applications.attachment import Guide
from latentkit.applications.request import Request, known
from latentkit.data.pictures import resize, to_tensor
from latentkit.diffusion import guidance
from latentkit.diffusion.noise import PictureNoise
from latentkit.diffusion.samplers.driver import Denoise
from latentkit.diffusion.spacing import space
from latentkit.model.conditioning import Conditioning, merge
from latentkit.model.latent_diffusion import LatentDiffusion
from latentkit.nets.controlnet import HINT_CELL, Control


class Plan(NamedTuple):
    """What the loop runs: `x` `b c h w` at `sigmas[0]`, down `sigmas` with `denoise`, to pixels by `finish`."""

    x: Tensor
    sigmas: np.ndarray
    denoise: Denoise
    finish: Callable[[Tensor], Tensor]


Prepare = Callable[[LatentDiffusion, Sequence[Request], PictureNoise], Plan]
"""An application: resolved requests that differ only in words, seeds and pictures, to their plan."""


def sigmas_of(network: LatentDiffusion, request: Request) -> np.ndarray:
    """The noise levels of a resolved request."""
    made = network.architecture
    return space(known(request.spacing), made.schedule, known(request.steps), made.searched)


def encoded(network: LatentDiffusion, pictures: Tensor) -> Tensor:
    """The latents of pictures `b c h w`, one at a time, so that a batch equals its singles."""
    return torch.cat([network.first_stage.encode(one[None]) for one in pictures])


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


def last_part(network: LatentDiffusion, request: Request) -> np.ndarray:
    """The noise levels of the share of the path that `strength` names."""
    sigmas = sigmas_of(network, request)
    steps = len(sigmas) - 1
    return sigmas[steps - max(1, round(steps * known(request.strength))) :]


def guided(network: LatentDiffusion, requests: Sequence[Request], beside: Conditioning | None = None) -> Denoise:
    """The model told what the requests say, and guided as the first of them asks; made for one run.

    `beside` is what it is told beside words, whatever it is guided by: rows of its concat slot.
    """
    first, count = requests[0], len(requests)
    controls, hints = _controlled(network, first, count)
    bind = partial(network.denoiser.bind, controls=controls)
    always = merge([beside or Conditioning(), _depths(network, requests), hints])
    asked = _told(network, requests)
    told = [merge([network.condition(asked, count), always])]
    for words, _ in first.also or ():
        name = "text" if "text" in network.conditioners else "label"
        told.append(merge([network.condition({**asked, name: [words] * count}, count), always]))
    alone = bind(told[0])
    steered = first.guidance_scale != 1 or first.guidance_kind == "cfg++"
    pair = guidance.itself(alone)
    if first.also or (steered and first.guidance_model is None):
        weights = (1.0, *(weight for _, weight in first.also or ()))
        joint = bind(Conditioning.cat([merge([_absent(network, requests), always]), *told]))
        pair = guidance.together(joint, weights)
    if first.also:
        alone = guidance.positive(pair)
    if first.guidance_model is not None:
        pair = guidance.apart(_weaker(first.guidance_model, asked, count, always), alone)
    denoise = alone
    if steered or first.pag_scale:
        interval = known(first.guidance_low), known(first.guidance_high)
        denoise = guidance.guide(pair, alone, _rule(network, first, partial(bind, told[0], True)), interval)
    if first.threshold is None:
        return denoise
    return guidance.thresholded(denoise, first.threshold, network.first_stage.decode, network.first_stage.encode)


def _controlled(network: LatentDiffusion, request: Request, count: int) -> tuple[list[Control], Conditioning]:
    """The request's ControlNets, and `count` rows of their hints."""
    controls, hints = [], {}
    _, height, width = network.latent_shape(known(request.height), known(request.width))
    for number, (file, attached, weight) in enumerate(request.control or ()):
        name, net = f"hint{number}", known(file.content)
        pixels = to_tensor(known(attached.picture), net.hint_channels)
        pixels = (covered(pixels, HINT_CELL * height, HINT_CELL * width) + 1) / 2
        hints[name] = pixels.expand(count, -1, -1, -1).to(network.first_stage.latent_mean.device)
        controls.append(Control(net, name, weight))
    return controls, Conditioning(extras=hints)


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


def _rule(network: LatentDiffusion, request: Request, disturbed: Callable[[], Denoise]) -> guidance.Rule:
    """How the request wants two estimates made one; `disturbed` makes the model with its attention perturbed."""
    scale = known(request.guidance_scale)
    rule = guidance.linear(scale)
    if request.guidance_kind == "cfg++":
        rule = guidance.plus(scale)
    elif request.guidance_kind == "apg":
        rule = guidance.projected(scale, sigmas_of(network, request))
    if request.pag_scale:
        rule = guidance.perturbed(rule, disturbed(), request.pag_scale)
    return guidance.rescaled(rule, request.guidance_rescale) if request.guidance_rescale else rule


def _told(network: LatentDiffusion, requests: Sequence[Request]) -> dict[str, list[Any]]:
    """What the requests say, by conditioner; what one does not say is absent."""
    said: dict[str, list[Any]] = {"text": [r.prompt for r in requests], "label": [r.label for r in requests]}
    said |= _numbers(network, requests)
    return {name: _filled(network, name, values) for name, values in said.items() if name in network.conditioners}


def _absent(network: LatentDiffusion, requests: Sequence[Request]) -> Conditioning:
    """The rows that guidance leads away from."""
    words = [request.negative or None for request in requests]
    values = {"text": _filled(network, "text", words)} if "text" in network.conditioners else {}
    return network.condition({**values, **_numbers(network, requests, away=True)}, len(requests))


def _numbers(network: LatentDiffusion, requests: Sequence[Request], away: bool = False) -> dict[str, list[Any]]:
    """The upscaler's level of noise, or sizes; `away`: on the side that guidance leads away from."""
    config = network.architecture.numbers
    if config is None:
        return {}
    if requests[0].noise_level is not None:
        return {"numbers": [(request.noise_level,) for request in requests]}
    return {"numbers": [config.drawn(known(r.height), known(r.width), away) for r in requests]}


def _filled(network: LatentDiffusion, name: str, values: list[Any]) -> list[Any]:
    nothing = network.conditioner(name).absent(len(values))
    return [other if value is None else value for value, other in zip(values, nothing)]


def _weaker(guide: Guide, asked: dict[str, list[Any]], count: int, always: Conditioning) -> Denoise:
    """The guidance model told the same, as far as it understands."""
    network = known(guide.model).network
    understood = {name: values for name, values in asked.items() if name in network.conditioners}
    beside = Conditioning(concat=always.concat if network.architecture.concat_channels else None)
    return network.denoiser.bind(merge([network.condition(understood, count), beside]))


def from_noise(network: LatentDiffusion, requests: Sequence[Request], noise: PictureNoise) -> Plan:
    """Text-to-image, class-to-image and unconditional drawing: pure noise and the whole path."""
    sigmas = sigmas_of(network, requests[0])
    device = network.first_stage.latent_mean.device
    start = noise.initial().to(device) * network.architecture.schedule.initial_std(float(sigmas[0]))
    return Plan(start, sigmas, guided(network, requests), network.first_stage.decode)
