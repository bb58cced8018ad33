"""Samplers side by side: the same pictures by each, at several step counts, and how far each is from the limit."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from latentkit.applications.generate import Progress, Result, generate
from latentkit.applications.request import Request
from latentkit.checkpoints.files import Model
from latentkit.diffusion.samplers.driver import sampler

LIMIT_STEPS = 200
LIMIT_SAMPLER = "heun"


@dataclass(frozen=True)
class Drawn:
    """Pictures `b c h w` by one sampler, the evaluations that each took, and their distances from the limit.

    A distance is the root mean square difference of the pixels, in parts of their range; the limit is what every
    deterministic sampler tends to: `LIMIT_STEPS` steps of `LIMIT_SAMPLER`. A stochastic sampler has none.
    """

    sampler: str
    spacing: str | None
    steps: int
    evaluations: int
    pictures: Tensor
    distance: Tensor | None


def compare(
    model: Model, requests: Sequence[Request], methods: Sequence[tuple[str, str | None]], steps: Sequence[int]
) -> Iterator[Progress | Drawn]:
    """Every (sampler, spacing) at every step count, with the progress of the whole; None is the request's spacing.

    Errors: InputError for an unknown name before anything is drawn.
    """
    entries = {name: sampler(name) for name, _ in methods}
    jobs = [(LIMIT_SAMPLER, None, LIMIT_STEPS), *((*method, count) for method in methods for count in steps)]
    work = [count * max(1, sampler(name).evaluations) for name, _, count in jobs]
    limit, done = None, 0
    for (name, spacing, count), part in zip(jobs, work):
        change = {"sampler": name, "steps": count} | ({"spacing": spacing} if spacing else {})
        pictures: dict[int, Tensor] = {}
        evaluations = 0
        for event in generate(model, [request.model_copy(update=change) for request in requests]):
            if isinstance(event, Result):
                pictures[event.number] = event.picture
            else:
                evaluations = event.evaluations
                yield event._replace(share=(done + part * event.share) / sum(work))
        done += part
        drawn = torch.stack([pictures[i] for i in range(len(requests))])
        if limit is None:
            limit = drawn
            continue
        apart = None if entries[name].stochastic else (drawn - limit).square().mean((1, 2, 3)).sqrt() / 2
        yield Drawn(name, spacing, count, evaluations, drawn, apart)


def evaluations_until(found: Sequence[Drawn], within: float) -> int | None:
    """The fewest evaluations from which on one method's mean distance stays `within` (0.01 is 1 %); None: never."""
    fewest = None
    for drawn in sorted(found, key=lambda drawn: drawn.evaluations, reverse=True):
        if drawn.distance is None or not float(drawn.distance.mean()) <= within:
            break
        fewest = drawn.evaluations
    return fewest
