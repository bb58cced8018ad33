"""The paper's figures 6 and 7 in miniature: the same diffusion at every downsampling, trained for equal time."""

import itertools
import time
from collections.abc import Callable, Mapping
from functools import cache, partial
from pathlib import Path

import torch
from torch import Tensor

from latentkit.applications.fit.measure import Measured, rehearse
from latentkit.applications.generate import draw
from latentkit.applications.paper.arms import (
    Arm,
    Asked,
    Clock,
    Plan,
    announce,
    cost,
    costs,
    data_recipe,
    load,
    planned,
    read,
    save,
    times,
)
from latentkit.applications.paper.figure import curves
from latentkit.applications.paper.first_stages import first_stages, networks
from latentkit.applications.paper.table import Columns, Row, kept, markdown, write
from latentkit.applications.pictures import open_data, write_sheet
from latentkit.applications.stages.train import train
from latentkit.applications.stages.train_diffusion import IDENTITY, build_model, sampling_defaults
from latentkit.checkpoints import files
from latentkit.checkpoints.storage.digest import Digest
from latentkit.data.pictures import decode, to_tensor
from latentkit.data.source import Source, open_source, track
from latentkit.errors import InputError
from latentkit.evaluation.metrics.features import NETWORK, features
from latentkit.evaluation.metrics.frechet import frechet
from latentkit.evaluation.metrics.kid import kid
from latentkit.model.first_stage import FirstStage
from latentkit.training.diffusion import DiffusionObjective
from latentkit.training.ema import reconstruct
from latentkit.training.recipe import DataRecipe, DiffusionRecipe, parse_recipe
from latentkit.training.run.interrupt import told
from latentkit.training.run.progress import quiet, say
from latentkit.training.run.store import FileCalls, replace_file

COMMAND = "paper compression"
CHANNELS = 64
FACTORS = (2, 4, 8, 16)
FIRST, TRAINING, DRAWING = 0.2, 0.5, 0.35
"""Of the minutes: for first stages where they must be trained; of the rest, for training and for drawing."""
POINTS = 4
"""Times in a run at which pictures are drawn; twice as many pictures at the last one."""
STEPS = 10
WIDTH = 0.1
"""Relative width of the average of weights that draws, the same share of a run at any of its points."""
FEWEST, MOST = 8, 500
COMPARED = 2000
SHEET = 12
DRAWN = "drawn.png"
LEAST_TIMED, TIMED = 3, 3.0  # steps, and seconds of them, that are measured


def recipes(data: DataRecipe, seed: int, trained: Mapping[int, Path]) -> dict[str, DiffusionRecipe]:
    """Every arm by its name, their lengths to be found; downsampling 1 is diffusion on pixels."""
    found = {}
    for factor, path in {1: IDENTITY, **trained}.items():
        values = {
            "stage": "diffusion",
            "name": f"f{factor}",
            "seed": seed,
            "first_stage": str(path),
            "data": data.model_dump(),
            "network": {
                "channels": CHANNELS,
                "multipliers": [1, 2],
                "blocks": 1,
                "depth": [0, 0],
                "heads": 4,
                "scale_shift": True,
            },
            "loss": {"sigma": {"mean": 1.0, "std": 1.5}},
            "optimiser": {"name": "muon", "lr": 2e-3, "weight_decay": 0.01, "warmup": 20, "decay": 0.4},
            "averaging": {"power": [WIDTH]},
            "schedule": {"steps": 1, "batch": 16, "precision": "bf16", "sample_every": None},
            "sampling": {"sampler": "lms", "spacing": "beta", "steps": STEPS, "guidance_scale": 1.0},
        }
        recipe = parse_recipe(values)
        assert isinstance(recipe, DiffusionRecipe)
        found[recipe.name] = recipe
    return found


@told()
def compression(data: str, folder: Path, *, minutes: float, trained: Path, size: int = 64, seed: int = 0) -> Path:
    """Train and measure the second stage at every downsampling in `folder`; returns the path of the table.

    First stages come from `trained`, the folder of the other command, where that has finished them, and else are
    trained first. The same call goes on. Errors: InputError, also for a folder made by other settings.
    """
    cell = 2 * max(FACTORS)
    if size % cell:
        raise InputError(f"size {size} is no multiple of {cell}, which the largest downsampling needs", exit_code=2)
    source, own = open_source(data), folder / "first-stages"
    given = None if own.exists() else _given(trained, source, size)
    part = 1.0 if given else 1 - FIRST
    asked = Asked(
        command=COMMAND, data=data, pictures=source.fingerprint, size=size, minutes=minutes, seed=seed,
        first_stages={str(factor): Digest(path)() for factor, path in (given or {}).items()},
    )  # fmt: skip
    plan = load(folder, asked)
    if plan is None:
        pictures = data_recipe(data, source, size)
        paths = given or {factor: own / f"kl-f{factor}" / files.RUN_MODEL for factor in FACTORS}
        plan = _plan(folder, asked, part * TRAINING, recipes(pictures, seed, paths), source)
        save(folder, plan)
    if given is None:
        first_stages(data, own, minutes=FIRST * minutes, size=size, seed=seed, kinds=("kl",))
    count = _count(plan, part * DRAWING)
    known, held = (cache(lambda side=side: _features(plan, side)) for side in (0, 1))
    reference = kept(folder / "reference.json", lambda: _reference(held(), known()))
    rows = []
    for number, arm in enumerate(plan.arms):
        announce(plan, number)
        rows.append(_finished(arm, folder / arm.name, plan, count, known))
    sheets = [to_tensor(decode((folder / arm.name / DRAWN).read_bytes(), DRAWN), 3) for arm in plan.arms]
    write_sheet(folder / DRAWN, sheets, 1)
    return _write(folder, plan, rows, reference)


def _given(trained: Path, source: Source, size: int) -> dict[int, Path] | None:
    """The KL first stages of the other command's folder by downsampling, None where it has not made them."""
    found = {factor: trained / f"kl-f{factor}" / files.RUN_MODEL for factor in FACTORS}
    plan = read(trained)
    if plan is None or not all(path.is_file() for path in found.values()):
        say(f"{trained} does not hold all first stages: they are trained first")
        return None
    if (plan.asked.pictures, plan.asked.size) != (source.fingerprint, size):
        raise InputError(
            f"the first stages in {trained} were trained on {plan.asked.data} at {plan.asked.size} px, not on these "
            "pictures at this size; name another folder with --first-stages (of one that is not there they are trained)"
        )
    return found


def _plan(folder: Path, asked: Asked, part: float, found: Mapping[str, DiffusionRecipe], source: Source) -> Plan:
    """Measure every arm on latents drawn at random, and give each as many steps as fit into its share."""
    configs = {f"f{factor}": config for factor, config in networks("kl").items()}

    def measure(name: str) -> Measured:
        return _measured(found[name], FirstStage(configs.get(name), 3), source)

    return planned(asked, part, found, costs(folder, asked, found, measure), points=POINTS)


def _measured(recipe: DiffusionRecipe, first_stage: FirstStage, source: Source) -> Measured:
    size, batch = recipe.data.transform.size, recipe.schedule.batch
    side = size // first_stage.downsampling
    model = build_model(recipe, first_stage, source, (size, size))
    rows = torch.arange(batch)
    moments = torch.randn(batch, 2 * first_stage.latent_channels, side, side)
    made = {"step": 0, "index": rows, "draw": rows, "moments": moments}
    marks: list[tuple[float, float]] = []

    def watch(step: int, loss: float) -> bool:
        marks.append((time.monotonic(), time.process_time()))
        return len(marks) > LEAST_TIMED and marks[-1][1] - marks[0][1] >= TIMED

    rehearse(recipe, DiffusionObjective(model, recipe.loss, recipe.seed), lambda: itertools.repeat([made]), watch)
    seconds, computed = ((last - first) / (len(marks) - 1) for first, last in zip(marks[0], marks[-1], strict=True))
    return Measured(seconds=seconds, thread_seconds=computed, memory=0)


def _count(plan: Plan, part: float) -> int:
    """Pictures drawn at a point (twice as many at the last): all arms' fit into `part` of the minutes.

    A picture takes a third of a training step's time, which has a way forward and two back, for each step of drawing.
    """
    picture = sum(cost(arm.measured, plan.clock) / arm.recipe.schedule.batch for arm in plan.arms) * STEPS / 3
    fitting = 60 * plan.asked.minutes * part * plan.threads / (picture * (POINTS + 1))
    return max(FEWEST, min(MOST, round(fitting)))


def _features(plan: Plan, side: int) -> Tensor:
    """Features of at most `COMPARED` training (0) or held-out (1) pictures, evenly taken."""
    recipe = plan.arms[0].recipe
    pictures = open_data(recipe.data, recipe.seed, 1)[side]
    count = min(COMPARED, len(pictures))
    places = (place * len(pictures) // count for place in range(count))
    return features(pictures.view(place, 0)[1] for place in track(places, count, "looking at pictures", not quiet()))


def _reference(held: Tensor, known: Tensor) -> Row:
    """What held-out pictures reach, where there are enough of them."""
    return {"pictures": len(held), "kid": kid(held, known).mean if len(held) >= FEWEST else None}


def _finished(arm: Arm, run: Path, plan: Plan, count: int, known: Callable[[], Tensor]) -> Row:
    """Train an arm and draw at each of its points, or take what is there."""
    model, last = train(arm.recipe, run), arm.recipe.schedule.steps
    points = []
    for step in range(last // POINTS, last + 1, last // POINTS):
        number = count * (2 if step == last else 1)
        make = partial(_point, arm, model, step, number, plan.clock, known)
        points.append(kept(run / f"point-{step:08d}.json", make))
    recipe = arm.recipe
    assert isinstance(recipe, DiffusionRecipe)
    taken = times(arm, run, plan)
    for number, point in enumerate(points, start=1):
        point["computed"] = taken["computed"] * number / POINTS
    return {
        "name": arm.name,
        "digest": Digest(model)(),
        **{key: value for key, value in points[-1].items() if key not in ("step", "computed")},
        **taken,
        "points": points,
    }


def _point(arm: Arm, path: Path, step: int, count: int, clock: Clock, known: Callable[[], Tensor]) -> Row:
    """Draw with the average of an arm's weights up to a step, and compare."""
    recipe, model = arm.recipe, files.load(path).network
    assert isinstance(recipe, DiffusionRecipe)
    weights = dict(model.named_parameters())
    for name, value in reconstruct([path.parent / "snapshots" / f"step-{step:08d}.safetensors"], WIDTH).items():
        weights[name].copy_(value)
    now = time.process_time if clock == "thread_seconds" else time.monotonic
    begun = now()
    drawing = draw(model, sampling_defaults(recipe), [None] * count, range(count))
    drawn = list(track(drawing, count, f"drawing by {arm.name} at step {step}", not quiet()))
    seconds = now() - begun
    if step == recipe.schedule.steps:
        write_sheet(path.parent / DRAWN, drawn[:SHEET], SHEET)
    seen = features(drawn)
    return {
        "step": step,
        "drawn": count,
        "drawing_speed": count / seconds,
        "kid": kid(seen, known())._asdict(),
        "frechet": frechet(seen, known()),
        "latents": list(model.latent_shape(*model.architecture.size)),
        "parameters": sum(p.numel() for p in model.denoiser.parameters()),
    }


def _write(folder: Path, plan: Plan, rows: list[Row], reference: Row) -> Path:
    size, clock = plan.asked.size, "thread-seconds" if plan.clock == "thread_seconds" else "seconds"
    real = reference["kid"] is not None
    lead = (
        f"The same network trained for {plan.seconds:.0f} {clock} at each downsampling on pictures of {size} px; "
        f"{rows[0]['drawn']} pictures drawn in {STEPS} steps by each. Distances are to the training pictures, "
        f"in features of {NETWORK}"
        + (
            f"; {reference['pictures']} held-out pictures have a KID x 1000 of {1e3 * reference['kid']:.2f}."
            if real
            else "."
        )
    )
    shares = [f"{number}/{POINTS}" for number in range(1, POINTS + 1)]
    over: Columns = {"downsampling": COLUMNS["downsampling"]} | {
        f"KID x 1000 at {share} of the time": partial(_kid_at, number) for number, share in enumerate(shares)
    }
    series = {row["name"]: [(point["computed"], 1e3 * point["kid"]["mean"]) for point in row["points"]] for row in rows}
    drawing = curves(f"{clock} of training", "KID x 1000", series)
    replace_file(FileCalls(), folder / "kid.svg", [drawing.encode()])
    text = f"{lead}\n\n{markdown(COLUMNS, rows)}\n\n{markdown(over, rows)}"
    return write(folder, plan, rows, text, network=NETWORK, held_out=reference)


def _kid_at(number: int, row: Row) -> str:
    return f"{1e3 * row['points'][number]['kid']['mean']:.2f}"


COLUMNS: Columns = {
    "downsampling": lambda row: row["name"].removeprefix("f"),
    "latents": lambda row: "x".join(map(str, row["latents"])),
    "parameters": lambda row: f"{row['parameters']:,}",
    "seconds": lambda row: f"{row['computed']:.0f}",
    "pictures seen": lambda row: f"{row['trained_on']:,}",
    "training, pictures/s": lambda row: f"{row['training_speed']:.1f}",
    "drawing, pictures/s": lambda row: f"{row['drawing_speed']:.1f}",
    "KID x 1000": lambda row: f"{1e3 * row['kid']['mean']:.2f}",
    "Frechet": lambda row: f"{row['frechet']:.2f}",
}
