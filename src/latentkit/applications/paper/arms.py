"""Runs that are compared at equal time: their plan on disk, and the time that each of them really took."""

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeVar

import torch
import yaml
from pydantic import BaseModel, ConfigDict, ValidationError

from latentkit.applications.fit.division import duration
from latentkit.applications.fit.measure import Measured
from latentkit.applications.fit.plan import machine
from latentkit.checkpoints.files import invalid
from latentkit.data.source import Source
from latentkit.errors import InputError
from latentkit.evaluation import journal
from latentkit.training import distributed
from latentkit.training.recipe import AutoencoderRecipe, DataRecipe, DiffusionRecipe
from latentkit.training.run.progress import say
from latentkit.training.run.store import FileCalls, make_folder, persist, replace_file

PLAN, MEASURED = "plan.yaml", "measured.yaml"
OURS = {MEASURED, f"tmp-{MEASURED}", f"tmp-{PLAN}"}
"""All that a folder may hold before there is a plan."""
SHIPPED_DATA = "data/emoji"
SPLITS = ("train", "holdout")
SAVES = 8  # checkpoints of a run, at least
LOGS = 4  # lines of its journals between two of them
T = TypeVar("T", bound=BaseModel)


class Asked(BaseModel):
    """What the person asked for; `pictures` is the fingerprint of the data."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    command: str
    data: str
    pictures: str
    size: int
    minutes: float
    seed: int
    first_stages: dict[str, str] = {}
    """The sha256 of those that were taken from elsewhere."""


class Arm(BaseModel):
    """One of the runs, and what a step of it was measured to cost."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str
    recipe: AutoencoderRecipe | DiffusionRecipe
    measured: Measured


Clock = Literal["thread_seconds", "seconds"]
"""What is shared equally: seconds that all threads of a processor compute, or the seconds that an accelerator takes."""


class Plan(BaseModel):
    """All that was decided before the first step; `seconds` is each arm's time by `clock`, of `threads` together."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    format: Literal[1] = 1
    asked: Asked
    machine: dict[str, Any]
    clock: Clock
    threads: int
    seconds: float
    arms: list[Arm]


class Begun(BaseModel):
    """What steps were measured to cost before there was a plan, by the arm's name."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    asked: Asked
    arms: dict[str, Measured]


class Spent(NamedTuple):
    """Seconds that the steps of a run took, and those that all its threads computed in them."""

    seconds: float
    thread_seconds: float


def data_recipe(data: str, source: Source, size: int) -> DataRecipe:
    """The pictures of `data` at `size` px, three channels; its own splits where it has both of `SPLITS`."""
    train, holdout = SPLITS if set(SPLITS) <= {item.split for item in source.items} else (None, None)
    transform: Any = {"size": size, "channels": 3, "background": "white"}
    return DataRecipe(path=data, split=train, holdout=holdout, transform=transform)


def planned(
    asked: Asked,
    part: float,
    recipes: Mapping[str, AutoencoderRecipe | DiffusionRecipe],
    measured: Mapping[str, Measured],
    *,
    points: int = 1,
) -> Plan:
    """The plan: every recipe gets as many steps as fit into an equal share of `part` of the minutes asked for.

    With `points` the averages of the weights are stored that often, evenly, the last at the end.
    """
    device = distributed.pick_device().type
    clock: Clock = "thread_seconds" if device == "cpu" else "seconds"
    threads = torch.get_num_threads() if device == "cpu" else 1
    seconds = 60 * asked.minutes * part * threads / len(recipes)
    arms = []
    for name, recipe in recipes.items():
        steps = points * max(1, round(seconds / cost(measured[name], clock) / points))
        log = max(1, steps // (SAVES * LOGS))
        schedule = {"steps": steps, "save_every": LOGS * log, "log_every": log}
        change: dict[str, Any] = {"schedule": recipe.schedule.model_copy(update=schedule)}
        if points > 1:
            change["averaging"] = recipe.averaging.model_copy(update={"snapshot_every": steps // points})
        arms.append(Arm(name=name, recipe=recipe.model_copy(update=change), measured=measured[name]))
    return Plan(asked=asked, machine=machine(device), clock=clock, threads=threads, seconds=seconds, arms=arms)


def cost(measured: Measured, clock: Clock) -> float:
    """Seconds of a step by a clock."""
    return measured.thread_seconds if clock == "thread_seconds" else measured.seconds


def costs(folder: Path, asked: Asked, names: Iterable[str], measure: Callable[[str], Measured]) -> dict[str, Measured]:
    """What a step of each arm costs; each is kept in `folder` as it comes, so that what was stopped goes on."""
    begun = _read(folder / MEASURED, Begun)
    found = dict(begun.arms) if begun and begun.asked == asked else {}
    for name in names:
        if name not in found:
            say(f"measuring a step of {name}")
            found[name] = measure(name)
            _save(folder / MEASURED, Begun(asked=asked, arms=found))
    return found


def save(folder: Path, plan: Plan) -> None:
    """Write the plan, whole or not at all."""
    _save(folder / PLAN, plan)
    (folder / MEASURED).unlink(missing_ok=True)


def _save(path: Path, what: BaseModel) -> None:
    calls = FileCalls()
    text = yaml.safe_dump(what.model_dump(mode="json"), sort_keys=False, allow_unicode=True, width=120)

    def write() -> None:
        make_folder(calls, path.parent.absolute())
        replace_file(calls, path, [text.encode()])

    persist(calls, f"{path.stem} {path}", write)


def read(folder: Path) -> Plan | None:
    """The plan in a folder, if there is one; InputError where it cannot be read."""
    return _read(folder / PLAN, Plan)


def _read(path: Path, kind: type[T]) -> T | None:
    if not path.exists():
        return None
    try:
        return kind.model_validate(yaml.safe_load(path.read_bytes()))
    except yaml.YAMLError as error:
        raise InputError(f"{path} is not YAML ({error}); put it back as it was, or name another folder") from None
    except ValidationError as error:
        raise invalid(error, f"{path}") from None


def load(folder: Path, asked: Asked) -> Plan | None:
    """The plan to go on by, if there is one; InputError where the folder holds something else."""
    plan = read(folder)
    if plan is None:
        if folder.exists() and (not folder.is_dir() or {entry.name for entry in folder.iterdir()} - OURS):
            raise InputError(f"{folder} is there already and holds no {PLAN}; name another folder with -o")
        return None
    before, now = plan.asked.model_dump(), asked.model_dump()
    if before != now:
        lines = "\n".join(f"  {key}: {before[key]} -> {now[key]}" for key in before if before[key] != now[key])
        raise InputError(
            f"{folder} was made by other settings (there -> asked for):\n{lines}\n"
            "Ask for the same again to go on, or name another folder with -o. Nothing was changed."
        )
    return plan


def announce(plan: Plan, number: int) -> None:
    """Say which arm (from 0) comes next, and how long it and the rest train on a machine that does nothing else."""
    arm, left = plan.arms[number], duration((len(plan.arms) - number) * plan.seconds / plan.threads)
    place = f"{number + 1} of {len(plan.arms)}"
    say(f"{arm.name}, {place}: {arm.recipe.schedule.steps} steps; this and the rest train for about {left}")


def spent(run: Path) -> Spent:
    """The time of a run's steps by the trainer's own clock, of work that was kept: what a kill undid is not counted."""
    portions: list[dict[str, float]] = []
    for line in journal.lines(run / "timings.jsonl"):
        if "since" in line:
            portions = [kept for kept in portions if kept["step"] <= line["since"]] + [line]
    return Spent(*(sum(portion[name] for portion in portions) for name in Spent._fields))


def times(arm: Arm, run: Path, plan: Plan) -> dict[str, float]:
    """What an arm's run took, by both clocks and by the plan's, and the pictures that it saw in that time."""
    taken, pictures = spent(run)._asdict(), arm.recipe.schedule.steps * arm.recipe.schedule.batch
    computed = taken[plan.clock]
    return {**taken, "computed": computed, "trained_on": pictures, "training_speed": pictures / computed}
