"""The spacing "searched": the noise levels that suit one model, found on its own prompts and kept in its file."""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import cycle
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from latentkit.applications.generate import CELLS_AT_ONCE
from latentkit.applications.plan import Plan, from_noise
from latentkit.applications.request import Request, ask, known, told
from latentkit.applications.rules import resolve
from latentkit.checkpoints.description import describe
from latentkit.checkpoints.files import Model
from latentkit.diffusion.noise import PictureNoise
from latentkit.diffusion.samplers.driver import sample
from latentkit.diffusion.search import TEACHER, choose, follow, local_errors
from latentkit.diffusion.spacing import space
from latentkit.errors import InputError
from latentkit.model.latent_diffusion import LatentDiffusion

SAMPLES = 16
FINE = 60
GRID = "beta"
TRIED = (1.0, 1.15, 1.3)
"""By how much an error may count more than one a step before it."""


class Found(NamedTuple):
    """The levels found for each number of steps, every list with its end 0.

    `errors` are the distances of latents drawn with them from those of many steps, as shares of the latents' size;
    `usual` are the same of the spacing that the model draws with otherwise.
    """

    sigmas: tuple[tuple[float, ...], ...]
    errors: tuple[float, ...]
    usual: tuple[float, ...]


@torch.inference_mode()
def search_spacing(model: Model, counts: Sequence[int]) -> Iterator[float | Found]:
    """The share of the work that is done, step by step, and last the levels found for each of `counts` steps.

    Guidance and prompts are the model's own. Of the lists chosen under several weights of later errors, the one that
    draws nearest to many steps is taken. Errors: InputError, before any work, for numbers that are not allowed.
    """
    network, schedule = model.network, model.network.architecture.schedule
    fine, counts = min(FINE, schedule.steps), sorted(set(counts))
    for steps in counts:
        if not 1 <= steps <= fine:
            raise InputError(f"a spacing of {steps} steps is asked for; the search finds 1 to {fine}", exit_code=2)
    defaults = model.provenance.get("defaults", {})
    usual = str(resolve(ask(seed=0), network, defaults).spacing)
    batches = list(_batches(model, fine, defaults))
    work = SAMPLES * (fine + 1 + sum((len(TRIED) + 1) * steps for steps in counts))
    done, costs, ends = 0, np.zeros((fine + 1, fine + 1)), []
    for requests in batches:
        plan, points = _plan(network, requests), []
        for point in follow(plan.denoise, plan.x, plan.sigmas):
            points.append(point)
            done += len(requests)
            yield done / work
        costs += local_errors(points) * (len(requests) / SAMPLES)
        ends.append(points[-1].x)
    best, otherwise = [], []
    for steps in counts:
        lists = [plan.sigmas[choose(costs, steps, later)] for later in TRIED]
        errors = []
        for sigmas in (*lists, space(usual, schedule, steps, network.architecture.searched)):
            apart = 0.0
            for requests, end in zip(batches, ends):
                drawn = _plan(network, requests)
                x = drawn.x
                for step in sample(TEACHER, drawn.denoise, x, sigmas, None):
                    x = step.x
                    done += len(requests)
                    yield done / work
                apart += float((_size(x - end) / _size(end)).sum())
            errors.append(apart / SAMPLES)
        *tried, others = errors
        least = min(range(len(TRIED)), key=tried.__getitem__)
        best.append((tuple(map(float, lists[least])), tried[least]))
        otherwise.append(others)
    yield Found(tuple(sigmas for sigmas, _ in best), tuple(error for _, error in best), tuple(otherwise))


def _size(x: Tensor) -> Tensor:
    return x.square().flatten(1).mean(1).sqrt()


def _batches(model: Model, fine: int, defaults: dict[str, Any]) -> Iterator[list[Request]]:
    """What is drawn in the search, as many at a time as any drawing takes."""
    network = model.network
    _, height, width = network.latent_shape(*network.architecture.size)
    size = max(1, min(SAMPLES, CELLS_AT_ONCE // (height * width)))
    said = list(zip(range(SAMPLES), cycle(words(model))))
    asked = [ask(seed=seed, steps=fine, spacing=GRID, **told(network, text)) for seed, text in said]
    for start in range(0, SAMPLES, size):
        yield [resolve(request, network, defaults) for request in asked[start : start + size]]


def _plan(network: LatentDiffusion, requests: Sequence[Request]) -> Plan:
    """One run: guidance may hold a state of its own."""
    shape = network.latent_shape(*network.architecture.size)
    return from_noise(network, requests, PictureNoise([known(request.seed) for request in requests], shape))


def words(model: Model) -> list[str | None]:
    """What the model draws while it is searched: its recipe's prompts, else its classes, or nothing."""
    recipe = model.provenance.get("recipe")
    sampling = recipe.get("sampling") if isinstance(recipe, dict) else None
    prompts = sampling.get("prompts") if isinstance(sampling, dict) else None
    if isinstance(prompts, list | tuple) and prompts and all(isinstance(prompt, str) for prompt in prompts):
        return list(prompts)
    state = model.network.state()
    return list(state["label"]["classes"]) if "label" in state and "text" not in state else [None]


def keep(network: LatentDiffusion, found: Found, source: Path, target: Path) -> None:
    """Write the model file `source` to `target` with the lists found; those for other numbers of steps stay.

    Errors: InputError where `target` is another file that exists.
    """
    if target.exists() and not target.samefile(source):
        raise InputError(f"{target} exists and is not overwritten; name a new file, or {source} itself", exit_code=2)
    lists = {len(sigmas): sigmas for sigmas in (*network.architecture.searched, *found.sigmas)}
    describe(source, target, replace(network.architecture, searched=tuple(lists[count] for count in sorted(lists))))
