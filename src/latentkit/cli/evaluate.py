"""`latentkit evaluate`: measure a model. Each command imports what it needs inside itself."""

from pathlib import Path
from typing import Annotated

import typer

from latentkit.cli.reconstruct import LowMemory

app = typer.Typer(help="Measure a model.", no_args_is_help=True)


@app.callback()
def evaluate() -> None:
    """Measure a model."""


@app.command()
def likelihood(
    data: Annotated[Path, typer.Argument(help="Folder of pictures, or a .tar shard.")],
    model: Annotated[
        str, typer.Option("--model", "-m", help="A shipped model, a model file or a run folder.")
    ] = "emoji",
    count: Annotated[int, typer.Option("-n", min=0, help="Pictures, the first ones; 0 is all.")] = 100,
    steps: Annotated[int, typer.Option(min=2, help="Noise levels that the bound is estimated at.")] = 100,
    flow_steps: Annotated[
        int, typer.Option(min=0, help="Steps of the exact value, of models that draw pixels; 0 leaves it out.")
    ] = 40,
    seed: Annotated[int, typer.Option(min=0, help="Seed of everything random.")] = 0,
    json: Annotated[bool, typer.Option("--json", help="Print everything that was found as JSON.")] = False,
) -> None:
    """Count the bits per dimension that pictures cost under a model, told their captions: lower is better."""
    import logging

    from latentkit.checkpoints.files import load
    from latentkit.data.source import open_source
    from latentkit.evaluation.likelihood import likelihood, lines

    shown = logging.getLogger("latentkit").isEnabledFor(logging.INFO)
    source = open_source(data, shown)
    loaded = load(model)
    found = likelihood(loaded, source, count=count or None, steps=steps, flow_steps=flow_steps, seed=seed, shown=shown)
    if json:
        import json as writer

        described = {"model": loaded.name, "digest": loaded.digest, "data": source.fingerprint, **found.document()}
        typer.echo(writer.dumps(described))
    else:
        typer.echo("\n".join(lines(found)))


@app.command("first-stage")
def first_stage(
    data: Annotated[Path, typer.Argument(help="Folder of pictures, or a .tar shard.")],
    model: Annotated[
        str, typer.Option("--model", "-m", help="A shipped model, a model file or a run folder.")
    ] = "emoji",
    count: Annotated[int, typer.Option("-n", min=0, help="Pictures, evenly taken; 0 is all.")] = 0,
    lpips: Annotated[
        tuple[Path, Path] | None,
        typer.Option(metavar="TRUNK HEADS", help="Weights of VGG16 or AlexNet, and of LPIPS's layers for it."),
    ] = None,
    low_memory: LowMemory = False,
    json: Annotated[bool, typer.Option("--json", help="Print everything that was found as JSON.")] = False,
) -> None:
    """Measure how well a first stage gives pictures back, each at its own size.

    Do I need to train my own? Compare this on your pictures, of a model that you have and of one that you trained.
    """
    import logging
    from contextlib import nullcontext

    from latentkit.data.source import open_source
    from latentkit.evaluation.first_stage import evaluate, lines, open_distance, open_first_stage

    shown = logging.getLogger("latentkit").isEnabledFor(logging.INFO)
    distance = open_distance(*lpips) if lpips else None
    opened = open_first_stage(model)
    source = open_source(data, shown, opened.values)
    if distance is not None:
        distance = distance.to(opened.first_stage.latent_mean.device)
    with opened.first_stage.in_strips() if low_memory else nullcontext():
        found = evaluate(
            opened.first_stage, source, count=count or None, background=opened.background, lpips=distance, shown=shown
        )
    if json:
        import json as writer

        described = {"model": opened.name, "digest": opened.digest, "data": source.fingerprint, **found.document()}
        typer.echo(writer.dumps(described))
    else:
        typer.echo("\n".join(lines(found)))
