"""Can it learn at all? Each part must learn one batch by heart, in a few dozen real training steps, or says so."""

import itertools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from latentkit.applications.fit.measure import rehearse
from latentkit.applications.stages.train_diffusion import build_model
from latentkit.data.dataset import Pictures
from latentkit.data.loader import Batch, collate
from latentkit.diffusion.noise import keyed_normal
from latentkit.model.first_stage import FirstStage
from latentkit.training import distributed
from latentkit.training.diffusion import DiffusionObjective
from latentkit.training.first_stage.autoencoder import AutoencoderObjective
from latentkit.training.recipe import AutoencoderRecipe, DiffusionRecipe

PICTURES = 8
MOST_STEPS = 150
PASS = 0.5  # of the error that can be had without learning


class Verdict(NamedTuple):
    """What one part was found to do."""

    part: str
    passed: bool
    words: str


def selftest(autoencoder: AutoencoderRecipe, diffusion: DiffusionRecipe, train: Pictures) -> list[Verdict]:
    """Verdicts on the data, the first stage, the second stage, and its condition where it has one.

    `train` is of one shape.
    """
    batch = _batch(train, _evenly(list(range(len(train)))))
    found = [_data(batch["pixels"], train)]
    if found[0].passed:
        device = distributed.pick_device(diffusion.schedule.device)
        first_stage, verdict = _first_stage(_short(autoencoder), batch, device)
        found.append(verdict)
        found += _second_stage(_short(diffusion), first_stage, train, batch, device)
    return found


def told_apart(train: Pictures, recipe: DiffusionRecipe) -> list[int]:
    """A few pictures of which each has another caption or class."""
    items = train.source.items
    said = {item.caption or "" if recipe.text is not None else item.label: index for index, item in enumerate(items)}
    return _evenly(list(said.values()))


def _evenly(rows: list[int]) -> list[int]:
    count = len(rows)
    return [rows[i * count // PICTURES] for i in range(PICTURES)] if count > PICTURES else rows


def _batch(train: Pictures, rows: list[int]) -> Batch:
    """The batch that a loader makes, of pictures of our choice."""
    return collate(train, 0, range(len(rows)), [train.view(row, 0) for row in rows])


def _short(recipe: Any) -> Any:
    """The recipe with a warm-up that fits a short run."""
    optimiser = recipe.optimiser.model_copy(update={"warmup": min(5, recipe.optimiser.warmup)})
    return recipe.model_copy(update={"optimiser": optimiser})


def _data(pixels: Tensor, train: Pictures) -> Verdict:
    spread = float((pixels - pixels.mean(0)).abs().mean())
    if spread < 1e-3:
        words = f"the {len(pixels)} pictures looked at are all the same: there is nothing to learn"
        return Verdict("data", False, words)
    return Verdict("data", True, f"{len(train)} pictures, which differ from each other")


def _learn(
    recipe: Any,
    objective: Any,
    batch: dict[str, Any],
    error: Callable[[float], float],
    floor: float,
    new_draws: bool = False,
) -> Verdict:
    """Train on `batch` until `error(loss)` is below `PASS` of `floor`, which can be had without learning.

    With `new_draws` its random choices are new in every step.
    """
    left = [math.inf]
    recipe = recipe.model_copy(update={"schedule": recipe.schedule.model_copy(update={"batch": len(batch["draw"])})})

    def watch(step: int, loss: float) -> bool:
        if step % 10 == 0 or step == MOST_STEPS or not math.isfinite(loss):
            left.append(error(loss))
            return left[-1] < PASS * floor or step == MOST_STEPS or not math.isfinite(loss)
        return False

    rounds = itertools.count(step=len(batch["draw"]) if new_draws else 0)
    rehearse(recipe, objective, lambda: ([{**batch, "draw": batch["draw"] + first}] for first in rounds), watch)
    share = left[-1] / floor if floor > 0 else math.inf
    return Verdict("", share < PASS, f"{left[-1]:.3g} against {floor:.3g}")


def _first_stage(recipe: AutoencoderRecipe, batch: dict[str, Any], device: torch.device) -> tuple[FirstStage, Verdict]:
    torch.manual_seed(recipe.seed)
    first_stage = FirstStage(recipe.network, recipe.network.picture_channels).to(device)
    autoencoder = first_stage.autoencoder
    assert autoencoder is not None
    pixels = batch["pixels"].to(device)

    @torch.inference_mode()
    def error(loss: float) -> float:
        return float((autoencoder.decode(autoencoder.encode(pixels).mean) - pixels).abs().mean())

    floor = float((pixels - pixels.mean(0)).abs().mean())
    objective = AutoencoderObjective(autoencoder, recipe.loss, recipe.seed)
    small = {name: batch[name] for name in ("step", "index", "draw", "pixels")}
    # With the same noise in every step the noise would be learnt, in place of the pictures.
    verdict = _learn(recipe, objective, small, error, floor, new_draws=True)
    learns = "gives its pictures back" if verdict.passed else "does not learn to give pictures back"
    words = f"{learns}: error {verdict.words} for their average"
    return first_stage.eval().requires_grad_(False), Verdict("first stage", verdict.passed, words)


def _second_stage(
    recipe: DiffusionRecipe, first_stage: FirstStage, train: Pictures, batch: dict[str, Any], device: torch.device
) -> list[Verdict]:
    def encoded(batch: dict[str, Any]) -> dict[str, Any]:
        with torch.no_grad():
            moments = first_stage.moments(batch["pixels"].to(device))
        return {name: value for name, value in batch.items() if name != "pixels"} | {"moments": moments}

    def fresh() -> DiffusionObjective:
        model = build_model(recipe, first_stage, train.source, train.shapes[0])
        return DiffusionObjective(model.to(device), recipe.loss, recipe.seed)

    batch = encoded(batch)
    mean, log_variance = batch["moments"].chunk(2, 1)
    spread = (mean.var((0, 2, 3), correction=0) + log_variance.exp().mean((0, 2, 3))).sqrt()
    first_stage.set_statistics(mean.mean((0, 2, 3)), spread.clamp_min(1e-6))
    objective = fresh()
    with torch.no_grad():
        start = float(objective.loss("", batch, {})[0])
    verdict = _learn(recipe, objective, batch, lambda loss: loss, start)
    learns = "learns to take noise away" if verdict.passed else "does not learn to take noise away"
    found = [Verdict("second stage", verdict.passed, f"{learns}: loss {verdict.words} at the start")]
    if objective.model.conditioners:
        found.append(_condition(recipe, Told(fresh()), encoded(_batch(train, told_apart(train, recipe)))))
    return found


class Told:
    """The second stage where all pictures have one noise so strong that only the condition tells them apart."""

    def __init__(self, objective: DiffusionObjective) -> None:
        self.inner = objective
        self.module = objective.module
        self.elementwise = objective.elementwise
        self.turns = objective.turns

    def loss(self, turn: str, batch: dict[str, Any], shared: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        """Squared error with every picture's condition given."""
        model = self.inner.model
        x0 = model.first_stage.from_moments(batch["moments"])
        eps = keyed_normal(x0.shape[1:], "selftest").to(x0.device).expand_as(x0)
        told = {name: list(model.conditioner(name).from_batch(batch)) for name in model.conditioners}
        sigma = torch.full((len(x0),), model.denoiser.schedule.sigma_max, dtype=torch.float64)
        return self.inner.errors(x0, sigma, eps, told).mean(), {}


def _condition(recipe: DiffusionRecipe, objective: Told, batch: dict[str, Any]) -> Verdict:
    kind = "captions" if recipe.text is not None else "classes"
    if len(batch["draw"]) < 2:
        return Verdict("condition", False, f"all pictures have the same {kind}: they tell nothing apart")
    x0 = objective.inner.model.first_stage.from_moments(batch["moments"])
    floor = float((x0 - x0.mean(0)).square().mean())
    verdict = _learn(recipe, objective, batch, lambda loss: loss, floor)
    learns = f"the {kind} tell pictures apart" if verdict.passed else f"the {kind} do not reach the network"
    return Verdict("condition", verdict.passed, f"{learns}: loss {verdict.words} without them")
