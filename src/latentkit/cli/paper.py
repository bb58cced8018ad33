"""`latentkit paper`: tables and figures of the latent diffusion paper, made again in miniature."""

from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(help="Make tables and figures of the paper again, in miniature.", no_args_is_help=True)

Data = Annotated[str, typer.Argument(help="Folder of pictures, or a .tar shard.")]
Minutes = Annotated[float, typer.Option(min=0.01, help="Time in all, on a machine that does nothing else.")]
Size = Annotated[int, typer.Option(min=16, help="Pixels a side, a multiple of 16.")]
Seed = Annotated[int, typer.Option(min=0, max=2**32 - 1, help="Seed of everything random.")]


@app.callback()
def paper() -> None:
    """Make tables and figures of the paper again, in miniature."""


@app.command("first-stages")
def first_stages(
    data: Data = "data/emoji",
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder of the runs and the table.")] = Path(
        "runs/paper/first-stages"
    ),
    minutes: Minutes = 40.0,
    size: Size = 64,
    seed: Seed = 0,
) -> None:
    """Train first stages of downsampling 2, 4, 8 and 16, with KL and with VQ, for equal time, and compare them.

    Prints the table, which is in the folder too, with a sheet of reconstructions and every figure as JSON. The same
    command goes on where it was stopped.
    """
    from latentkit.applications.paper.first_stages import first_stages

    typer.echo(first_stages(data, out, minutes=minutes, size=size, seed=seed).read_text(), nl=False)


@app.command()
def compression(
    data: Data = "data/emoji",
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder of the runs and the table.")] = Path(
        "runs/paper/compression"
    ),
    first_stages: Annotated[
        Path, typer.Option(help="Folder of the other command, whose KL first stages are taken if they are there.")
    ] = Path("runs/paper/first-stages"),
    minutes: Minutes = 50.0,
    size: Size = 64,
    seed: Seed = 0,
) -> None:
    """Train the same diffusion on pixels and at downsampling 2, 4, 8 and 16 for equal time, and compare what they draw.

    Prints the table, which is in the folder too, with curves, a sheet of drawn pictures and every figure as JSON. The
    same command goes on where it was stopped.
    """
    from latentkit.applications.paper.compression import compression

    path = compression(data, out, minutes=minutes, trained=first_stages, size=size, seed=seed)
    typer.echo(path.read_text(), nl=False)
