"""The plan of a fit on disk: what was asked, found, measured and decided, before the first step."""

import platform
from pathlib import Path
from typing import Any, Literal

import torch
import yaml
from pydantic import BaseModel, ConfigDict, ValidationError

from latentkit.applications.fit.choice import Choice, Reason
from latentkit.applications.fit.division import LEAST_STEPS, SAVED_EVERY, Division, duration
from latentkit.applications.fit.measure import Measured
from latentkit.checkpoints.files import invalid
from latentkit.errors import InputError
from latentkit.training.recipe import AutoencoderRecipe, DiffusionRecipe
from latentkit.training.run.store import FileCalls, make_folder, persist, replace_file

FILE = "plan.yaml"
HEADER = (
    "# Made by latentkit fit before its first step. The same command goes on by this plan and measures nothing again.\n"
)


class Asked(BaseModel):
    """What the person asked for; `data` is the fingerprint of the pictures and their words."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    folder: str
    data: str
    name: str
    budget: str | None
    size: int | None
    condition: str
    seed: int
    steps: tuple[int, int] | None = None


class Counted(BaseModel):
    """Pictures that train, that are held out, and files that are not used."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    training: int
    held_out: int
    rejected: int


class FitPlan(BaseModel):
    """All that `latentkit fit` decided; the two recipes are what it trains."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    format: Literal[1] = 1
    asked: Asked
    pictures: Counted
    reasons: list[Reason]
    machine: dict[str, Any]
    measured: dict[str, Measured]
    expected: Division
    autoencoder: AutoencoderRecipe
    diffusion: DiffusionRecipe


def planned(
    asked: Asked, counted: Counted, choice: Choice, measured: dict[str, Measured], division: Division
) -> FitPlan:
    """The plan with the lengths of both recipes filled in."""
    steps = {"autoencoder": division.first_steps, "diffusion": division.second_steps}
    recipes = {"autoencoder": choice.autoencoder, "diffusion": choice.diffusion}
    lengthened: dict[str, Any] = {}
    for stage, recipe in recipes.items():
        count, step = steps[stage], measured[stage].seconds
        schedule = recipe.schedule.model_copy(
            update={
                "steps": count,
                "micro_batch": measured[stage].micro_batch,
                "save_every": max(1, min(count, round(SAVED_EVERY / step))),
                "log_every": max(1, count // 200),
                "sample_every": max(1, -(-count // division.looks)),
            }
        )
        optimiser = recipe.optimiser.model_copy(update={"warmup": min(recipe.optimiser.warmup, max(1, count // 20))})
        lengthened[stage] = recipe.model_copy(update={"schedule": schedule, "optimiser": optimiser})
    return FitPlan(
        asked=asked, pictures=counted, reasons=choice.reasons, machine=machine(choice.autoencoder.schedule.device),
        measured=measured, expected=division, **lengthened,
    )  # fmt: skip


def machine(device: str) -> dict[str, Any]:
    """What the times were measured on."""
    return {
        "device": torch.cuda.get_device_name(device) if device != "cpu" else _processor(),
        "threads": torch.get_num_threads(),
        "system": platform.system(),
        "python": platform.python_version(),
        "torch": str(torch.__version__),
    }


def _processor() -> str:
    """The processor's name where the system tells it."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    named = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(named, platform.processor() or platform.machine())


def save(run: Path, plan: FitPlan) -> Path:
    """Write the plan, whole or not at all."""
    calls = FileCalls()
    text = HEADER + yaml.safe_dump(plan.model_dump(mode="json"), sort_keys=False, allow_unicode=True, width=120)

    def write() -> None:
        make_folder(calls, run.absolute())
        replace_file(calls, run / FILE, [text.encode()])

    persist(calls, f"plan {run / FILE}", write)
    return run / FILE


def load(run: Path) -> FitPlan | None:
    """The plan of a run, if it has one.

    InputError where it cannot be read, or where the folder holds something else.
    """
    path = run / FILE
    if not path.exists():
        if run.exists() and (not run.is_dir() or {entry.name for entry in run.iterdir()} - {f"tmp-{FILE}"}):
            raise InputError(f"{run} is there already and holds no {FILE}; name another run. Nothing was changed.")
        return None
    try:
        return FitPlan.model_validate(yaml.safe_load(path.read_bytes()))
    except yaml.YAMLError as error:
        raise InputError(f"{path} is not YAML ({error}); put it back as it was, or name another run") from None
    except ValidationError as error:
        raise invalid(error, f"{path}") from None


def compare(run: Path, plan: FitPlan, asked: Asked) -> None:
    """InputError with the differences where something else is asked for than the plan was made for."""
    before, now = plan.asked.model_dump(), asked.model_dump()
    if Path(plan.asked.folder).resolve() == Path(asked.folder).resolve():
        now["folder"] = before["folder"]
    if before != now:
        lines = [f"  {key}: {before[key]} -> {now[key]}" for key in before if before[key] != now[key] and key != "data"]
        if before["data"] != now["data"]:
            lines.append("  data: the pictures or their captions have changed")
        raise InputError(
            f"{run} was planned for something else (plan -> asked for):\n" + "\n".join(lines) + "\n"
            "Ask for the same again to go on, or name another run with --name or --into. Nothing was changed."
        )


def describe(plan: FitPlan) -> str:
    """The plan as a table to read."""
    expected = plan.expected
    stages = (
        ("first stage", plan.autoencoder.schedule, plan.measured["autoencoder"], expected.first),
        ("second stage", plan.diffusion.schedule, plan.measured["diffusion"], expected.second),
    )
    rows = [("pictures", f"{plan.pictures.training} to train on", f"{plan.pictures.held_out} held out"), *plan.reasons]
    for name, schedule, measured, seconds in stages:
        cost = f"{measured.seconds:.3g} s a step, {measured.memory / 1e9:.2f} GB: about {duration(seconds)}"
        rows.append((name, f"{schedule.steps:,} steps of {schedule.batch}", cost))
    other = duration(expected.planning + expected.latents + expected.report)
    rows.append(
        ("the rest", f"{expected.samples} pictures drawn", f"planning, latents, figures and report: about {other}")
    )
    rows.append(("in all", f"about {duration(expected.total)}", f"budget {plan.asked.budget or 'none'}"))
    if expected.little:
        rows.append(
            ("too little", "for a model", f"fewer than {LEAST_STEPS} steps a stage learn nothing: give it more time")
        )
    first, second = (max(len(row[i]) for row in rows) for i in (0, 1))
    return "\n".join(f"  {what:<{first}}  {value:<{second}}  {why}" for what, value, why in rows)
