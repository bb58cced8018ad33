"""The whole way from a folder of pictures to one model file and its report; each step done is not done again."""

import os
import shlex
import time
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from latentkit.applications.fit.choice import choose, model_name
from latentkit.applications.fit.division import Costs, divide, duration, parse_budget
from latentkit.applications.fit.measure import measure_autoencoder, measure_diffusion
from latentkit.applications.fit.plan import FILE, Asked, Counted, FitPlan, compare, describe, load, planned, save
from latentkit.applications.fit.selftest import selftest
from latentkit.applications.fit.summary import write_report
from latentkit.applications.pictures import open_data
from latentkit.applications.stages.train import train
from latentkit.applications.stages.train_diffusion import multiple
from latentkit.data import report
from latentkit.data.source import Source, open_source
from latentkit.errors import InputError
from latentkit.training import distributed
from latentkit.training.recipe import AutoencoderRecipe, DiffusionRecipe, resolved
from latentkit.training.run.progress import say
from latentkit.training.run.store import FileCalls, persist, replace_file


class Fitted(NamedTuple):
    """What a fit wrote: its plan, and unless it was a dry run the model file and the report."""

    plan: Path
    model: Path | None = None
    report: Path | None = None


def fit(
    folder: str | Path,
    name: str | None = None,
    *,
    budget: str | None = None,
    size: int | None = None,
    condition: str = "auto",
    seed: int = 0,
    steps: tuple[int, int] | None = None,
    dry_run: bool = False,
    run: str | Path | None = None,
) -> Fitted:
    """Train both stages on the pictures in `folder` and write RUN/NAME.safetensors and RUN/report.html.

    `run` is runs/NAME unless given. `budget` is a time like "30m"; `size` pixels a side; `condition` auto, text, label
    or none; `steps` of both stages instead of what budget or data suggest. With `dry_run` it ends with a self-test
    after the plan. The same call goes on where it was stopped. Errors: InputError.
    """
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise InputError("fit runs on one process; plan with --dry-run and give the recipes in plan.yaml to torchrun")
    if budget is not None:
        parse_budget(budget)
    if not 0 <= seed < 2**32:
        raise InputError(f"seed {seed} is not in 0 to {2**32 - 1}", exit_code=2)
    if steps is not None and min(steps) < 1:
        raise InputError(f"steps {steps[0]} and {steps[1]}: each stage needs at least one", exit_code=2)
    if name is not None and name != model_name(name):
        raise InputError(f"name {name!r} cannot be a file's name; {model_name(name)!r} can", exit_code=2)
    name = name or model_name(Path(folder).expanduser().resolve().name)
    run = Path(run) if run is not None else Path("runs") / name
    if run.resolve().is_relative_to(Path(folder).expanduser().resolve()):
        raise InputError(f"the run {run} would lie among the pictures of {folder}; name another place with --into")
    begun = time.monotonic()
    plan = load(run)
    source = open_source(folder)
    say(report.describe(report.inspect(source)))
    asked = Asked(
        folder=str(folder), data=source.fingerprint, name=name,
        budget=budget, size=size, condition=condition, seed=seed, steps=steps,
    )  # fmt: skip
    fresh = plan is None
    if plan is None:
        plan = _plan(source, asked, run, begun)
        save(run, plan)
        say(f"\nplan ({run / FILE}):\n{describe(plan)}\n")
    else:
        compare(run, plan, asked)
        say(f"\ngoing on by the plan in {run / FILE}:\n{describe(plan)}\n")
    if dry_run:
        _rehearse(plan)
        return Fitted(run / FILE)
    if fresh:
        say(
            f"this should end at about {time.strftime('%H:%M', time.localtime(time.time() + plan.expected.training))}\n"
        )
    done = _train(plan, run, source)
    if fresh:
        say(f"took {duration(time.monotonic() - begun)}; planned {duration(plan.expected.total)}")
    return done


def _plan(source: Source, asked: Asked, run: Path, begun: float) -> FitPlan:
    """Choose, measure and divide."""
    device = distributed.pick_device().type
    choice = choose(
        source, asked.folder, run, asked.name,
        size=asked.size, condition=asked.condition, seed=asked.seed, device=device,
    )  # fmt: skip
    train, held = open_data(
        choice.diffusion.data, asked.seed, multiple(choice.diffusion, choice.autoencoder.network.downsampling)
    )
    say("measuring both stages on this machine")
    first = measure_autoencoder(choice.autoencoder, train)
    second = measure_diffusion(choice.diffusion, choice.autoencoder, train)
    costs = Costs(
        first=first,
        second=second,
        first_batch=choice.autoencoder.schedule.batch,
        second_batch=choice.diffusion.schedule.batch,
        pictures=len(train),
        held=len(held),
        spent=time.monotonic() - begun,
    )
    division = divide(costs, parse_budget(asked.budget) if asked.budget else None, asked.steps)
    apart = 0 if held.source is train.source else len(held)
    counted = Counted(training=len(train), held_out=apart, rejected=len(source.rejected))
    return planned(asked, counted, choice, {"autoencoder": first, "diffusion": second}, division)


def _rehearse(plan: FitPlan) -> None:
    """The self-test in words; InputError where a part cannot learn."""
    square = plan.diffusion.data.transform.model_copy(update={"buckets": False})
    data = plan.diffusion.data.model_copy(update={"transform": square})
    train, _ = open_data(data, plan.asked.seed, plan.autoencoder.network.downsampling)
    verdicts = selftest(plan.autoencoder, plan.diffusion, train)
    for verdict in verdicts:
        say(f"  {'can learn' if verdict.passed else 'CANNOT LEARN':<12}  {verdict.part}: {verdict.words}")
    failed = [verdict.part for verdict in verdicts if not verdict.passed]
    if failed:
        raise InputError(f"the self-test failed for: {', '.join(failed)}. Nothing was trained; see the lines above")
    say("every part can learn; the same command without --dry-run trains by this plan")


def _train(plan: FitPlan, run: Path, source: Source) -> Fitted:
    """Both stages, the model file and the report; what is there already is left as it is."""
    name = plan.asked.name
    model, page = run / f"{name}.safetensors", run / "report.html"
    _stage(plan.autoencoder, run / "autoencoder", "first stage")
    trained = _stage(plan.diffusion, run / "diffusion", "second stage")
    content = trained.read_bytes()
    fresh = not model.exists() or model.read_bytes() != content
    if fresh:
        persist(FileCalls(), str(model), lambda: replace_file(FileCalls(), model, [content]))
    if fresh or not page.exists():
        say("drawing pictures for the report")
        text = write_report(plan, run, model, source)
        persist(FileCalls(), str(page), lambda: replace_file(FileCalls(), page, [text.encode()]))
    words = '"a few words" ' if plan.diffusion.text else ""
    words = f"--label {shlex.quote(source.classes[0])} " if plan.diffusion.label else words
    say(f"look at {page}; draw with: latentkit generate {words}-n 4 -m {shlex.quote(str(run))}")
    return Fitted(run / FILE, model, page)


def _stage(recipe: AutoencoderRecipe | DiffusionRecipe, folder: Path, name: str) -> Path:
    """The stage's model file, trained unless it is there and of this very recipe."""
    path = folder / "model.safetensors"
    if path.exists() and _recipe_of(folder) == resolved(recipe):
        say(f"{name}: finished ({path})")
        return path
    say(f"{name}: {recipe.schedule.steps} steps in {folder}")
    return train(recipe, folder)


def _recipe_of(folder: Path) -> Any:
    try:
        return yaml.safe_load((folder / "recipe.yaml").read_bytes())
    except (OSError, yaml.YAMLError):
        return None
