"""`latentkit data`: look at a data set before training on it."""

from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(help="Look at a data set.", no_args_is_help=True)


@app.callback()
def data() -> None:
    """Look at a data set before training on it."""


@app.command()
def check(
    folder: Annotated[Path, typer.Argument(help="Folder of pictures, or a .tar shard.")],
    json: Annotated[bool, typer.Option("--json", help="Print everything that was found as JSON.")] = False,
    sheet: Annotated[Path | None, typer.Option(help="Write a contact sheet to this PNG file.")] = None,
) -> None:
    """Count what a data set holds: sizes, channels, captions, classes, duplicates, and files that cannot be used."""
    from latentkit.data import report
    from latentkit.data.pictures import to_png
    from latentkit.data.source import open_source
    from latentkit.errors import InputError

    if sheet is not None and sheet.exists():
        raise InputError(f"{sheet} exists and is not overwritten; name another file for the sheet")
    source = open_source(folder)
    found = report.inspect(source)
    if sheet is not None:
        drawn = to_png(report.sheet(source))
        try:
            sheet.write_bytes(drawn)
        except OSError as error:
            raise InputError(f"{sheet} could not be written: {error.strerror or error}") from None
        found["sheet"] = str(sheet)
    if json:
        import json as writer

        typer.echo(writer.dumps(found, ensure_ascii=False, indent=2))
    else:
        typer.echo(report.describe(found) + (f"\n  sheet       {sheet}" if sheet else ""))
