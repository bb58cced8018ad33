"""`latentkit search-spacing`: find the noise levels that suit a model at few steps."""

from pathlib import Path
from typing import Annotated

import typer


def search_spacing(
    model: Annotated[str, typer.Option("--model", "-m", help="A shipped model, a model file or a run folder.")],
    steps: Annotated[list[int] | None, typer.Option(help="Steps to find a spacing for [default: 6, 8 and 10].")] = None,
    into: Annotated[
        Path | None, typer.Option(help="Write the model with what was found to this file: a new one, or its own.")
    ] = None,
) -> None:
    """Find the noise levels at which few steps best keep to a model's path of many.

    Prints a line for each number of steps: the levels, and how far from many steps latents drawn with them are, against
    the spacing that the model draws with otherwise. In a file written with --into, `--spacing searched` draws with
    them; other numbers of steps lie in between.
    """
    import io
    import sys

    from latentkit.applications.search_spacing import Found, keep
    from latentkit.applications.search_spacing import search_spacing as run
    from latentkit.checkpoints.files import find, load
    from latentkit.training.run.progress import quiet

    loaded = load(model)
    found = None
    with typer.progressbar(length=1000, label="searching", file=io.StringIO() if quiet() else sys.stderr) as bar:
        for event in run(loaded, steps or [6, 8, 10]):
            if isinstance(event, Found):
                found = event
            else:
                bar.update(round(1000 * event) - bar.pos)
    assert found is not None
    if into is not None:
        keep(loaded.network, found, find(model), into)
    for sigmas, error, usual in zip(*found):
        levels = " ".join(f"{sigma:.5g}" for sigma in sigmas)
        typer.echo(f"{len(sigmas) - 1}: {levels}  off by {error:.2%}, usual spacing {usual:.2%}")
    if into is not None:
        typer.echo(into)
