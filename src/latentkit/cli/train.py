"""`latentkit train` and `latentkit fit`: models of your own pictures."""

import os
from pathlib import Path
from typing import Annotated

import typer


def train(
    recipe: Annotated[Path, typer.Argument(help="Recipe file, one of recipes/*.yaml or your own.")],
    overrides: Annotated[list[str] | None, typer.Argument(help="Changes to it, like schedule.steps=100.")] = None,
    into: Annotated[Path | None, typer.Option(help="Run folder [default: runs/ and the recipe's name].")] = None,
) -> None:
    """Train one stage by a recipe, or go on with a run that was stopped. Prints the model file's path."""
    from latentkit.applications.stages.train import train
    from latentkit.training.recipe import check_effect, read_recipe

    read = read_recipe(str(recipe), overrides or [])
    check_effect(read)
    path = train(read, into)
    if int(os.environ.get("RANK", 0)) == 0:
        typer.echo(path)


def fit(
    folder: Annotated[Path, typer.Argument(help="Folder of pictures; captions, classes or metadata are used.")],
    name: Annotated[str | None, typer.Option(help="Name of the model [default: the folder's].")] = None,
    budget: Annotated[str | None, typer.Option(help="Time to spend, like 30m, 2h or 1h30m.")] = None,
    size: Annotated[int | None, typer.Option(help="Pixels a side [default: by pictures and device].")] = None,
    condition: Annotated[str, typer.Option(help="What it is told: auto, text, label or none.")] = "auto",
    seed: Annotated[int, typer.Option(help="Seed of everything random.")] = 0,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Plan, test that everything can learn, and stop.")] = False,
    into: Annotated[Path | None, typer.Option(help="Run folder [default: runs/NAME].")] = None,
) -> None:
    """Train a whole model of a folder of pictures: plan, first stage, second stage, report.

    The same command goes on where it was stopped. Prints the paths of the model file and the report (of the plan
    with --dry-run).
    """
    from latentkit.applications.fit import fit

    done = fit(folder, name, budget=budget, size=size, condition=condition, seed=seed, dry_run=dry_run, run=into)
    for path in (done.model, done.report) if done.model else (done.plan,):
        typer.echo(path)
