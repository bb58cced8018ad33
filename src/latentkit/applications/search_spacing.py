"""The spacing "searched": the noise levels that suit one model, found on its own prompts and kept in its file."""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import cycle, islice
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from latentkit.applications.generate import CELLS_AT_ONCE
from latentkit.applications.plan import from_noise
from latentkit.applications.request import ask, resolve, told
from latentkit.checkpoints.description import describe
from latentkit.checkpoints.files import Model
from latentkit.diffusion.noise import PictureNoise
from latentkit.diffusion.search import choose, follow, local_errors
from latentkit.errors import InputError
from latentkit.model.latent_diffusion import LatentDiffusion

SAMPLES = 16
FINE = 60
GRID = "beta"


class Found(NamedTuple):
    """The lists found, each with its end 0, one for each number of steps."""

    sigmas: tuple[tuple[float, ...], ...]


def search_spacing(model: Model, counts: Sequence[int]) -> Iterator[float | Found]:
    """The share of the work that is done, step by step, and last the levels found for each of `counts` steps.

    Guidance and prompts are the model's own. Errors: InputError, before any work, for numbers that are not allowed.
    """
    network, fine = model.network, min(FINE, model.network.architecture.schedule.steps)
    for steps in counts:
        if not 1 <= steps <= fine:
            raise InputError(f"a spacing of {steps} steps is asked for; the search finds 1 to {fine}", exit_code=2)
    shape = network.latent_shape(*network.architecture.size)
    size = max(1, min(SAMPLES, CELLS_AT_ONCE // (shape[1] * shape[2])))
    costs = np.zeros((fine + 1, fine + 1))
    defaults = model.provenance.get("defaults", {})
    for start in range(0, SAMPLES, size):
        seeds = range(start, min(SAMPLES, start + size))
        said = islice(cycle(words(model)), start, seeds.stop)
        asked = [ask(seed=seed, steps=fine, spacing=GRID, **told(network, text)) for seed, text in zip(seeds, said)]
        requests = [resolve(request, network, defaults) for request in asked]
        with torch.inference_mode():
            plan = from_noise(network, requests, PictureNoise(list(seeds), shape))
        points = []
        path = follow(plan.denoise, plan.x, plan.sigmas)
        for done in range(fine + 1):
            with torch.inference_mode():
                points.append(next(path))
            yield (start + len(seeds) * done / fine) / SAMPLES
        costs += local_errors(points) * (len(seeds) / SAMPLES)
    grid = [float(sigma) for sigma in plan.sigmas]
    yield Found(tuple(tuple(grid[i] for i in choose(costs, steps)) for steps in sorted(set(counts))))


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
