"""The command `latentkit`: parse, call, show. Commands import what is heavy inside themselves."""

import logging
import signal
import sys
from types import FrameType
from typing import Annotated

import typer

from latentkit.errors import InputError

LOG = logging.getLogger("latentkit")


def main() -> None:
    """Run the command and exit: 0 done, 1 failed, 2 typed wrong, 130 Ctrl-C, 143 SIGTERM."""
    signal.signal(signal.SIGTERM, _terminated)
    try:
        application()(prog_name="latentkit")
    except InputError as error:
        if LOG.isEnabledFor(logging.DEBUG):
            raise
        print(f"latentkit: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        sys.exit(130)


def _terminated(number: int, _frame: FrameType | None) -> None:
    sys.exit(128 + number)


def application() -> typer.Typer:
    """Every command under its name."""
    from latentkit.cli.data import app as data
    from latentkit.cli.evaluate import app as evaluate
    from latentkit.cli.generate import generate
    from latentkit.cli.models import convert, diff, inspect
    from latentkit.cli.paper import app as paper
    from latentkit.cli.reconstruct import reconstruct
    from latentkit.cli.replay import replay
    from latentkit.cli.report import report
    from latentkit.cli.samplers import compare_samplers, samplers
    from latentkit.cli.search_spacing import search_spacing
    from latentkit.cli.train import fit, train

    app = typer.Typer(no_args_is_help=True, rich_markup_mode=None, pretty_exceptions_enable=False)
    app.callback()(options)
    drawing = (generate, replay, samplers, compare_samplers, search_spacing)
    for command in (*drawing, fit, train, report, reconstruct, inspect, convert, diff):
        app.command()(command)
    app.add_typer(data, name="data")
    app.add_typer(evaluate, name="evaluate")
    app.add_typer(paper, name="paper")
    return app


def _version(wanted: bool) -> None:
    if wanted:
        from latentkit import __version__

        typer.echo(f"latentkit {__version__}")
        raise typer.Exit


def options(
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="Show where an error came from.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Show no progress.")] = False,
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """A complete latent diffusion system: train both stages on your own pictures, and draw with them."""
    LOG.setLevel(logging.DEBUG if verbose else logging.ERROR if quiet else logging.INFO)
