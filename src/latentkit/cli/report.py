"""`latentkit report`: the health of a run, as a page."""

from pathlib import Path
from typing import Annotated

import typer


def report(
    run: Annotated[Path, typer.Argument(help="Folder of a first stage's run, or of a fit; it may still be going on.")],
) -> None:
    """Write RUN/health.html: what a first stage gives back, how its latents lie, and what is wrong where it is.

    Prints the page's path.
    """
    import logging

    from latentkit.applications.stages.health import write_health

    typer.echo(write_health(run, logging.getLogger("latentkit").isEnabledFor(logging.INFO)))
