"""`latentkit data`: look at a data set before training on it."""

from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from latentkit.data.latents import Stored

app = typer.Typer(help="Look at a data set, and at what is kept of it.", no_args_is_help=True)


@app.callback()
def data() -> None:
    """Look at a data set before training on it, and at the latents that are kept of it."""


@app.command()
def check(
    folder: Annotated[Path, typer.Argument(help="Folder of pictures, or a .tar shard.")],
    json: Annotated[bool, typer.Option("--json", help="Print everything that was found as JSON.")] = False,
    sheet: Annotated[Path | None, typer.Option(help="Write a contact sheet to this file, NAME.png.")] = None,
) -> None:
    """Count what a data set holds: sizes, channels, captions, classes, duplicates, and files that cannot be used."""
    from latentkit.data import report
    from latentkit.data.pictures import to_png
    from latentkit.data.source import open_source
    from latentkit.errors import InputError

    if sheet is not None and sheet.suffix.lower() != ".png":
        raise InputError(
            f"the sheet is a PNG, {sheet} is not named so; name it {sheet.with_suffix('.png')}", exit_code=2
        )
    if sheet is not None and sheet.exists():
        raise InputError(f"{sheet} exists and is not overwritten; name another file for the sheet", exit_code=2)
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


@app.command()
def cache(
    clear: Annotated[bool, typer.Option("--clear", help="Delete all that no running process uses.")] = False,
) -> None:
    """Show the latents kept between runs: their place, sizes, pictures and last use.

    They lie in ~/.cache/latentkit/latents (below XDG_CACHE_HOME where that is set), are made by the training of a
    second stage, and are made again where they are missing. They grow without bound: clear them now and then.
    Beside them lie networks converted for `--backend openvino`, made again as well.
    """
    from latentkit.applications import backend
    from latentkit.data import latents

    folder = latents.cache_folder()
    gone, left = latents.clear(folder) if clear else ([], latents.stored(folder))
    typer.echo(f"{folder}: {sum(one.size for one in left) / 1e6:,.1f} MB" + _freed(gone))
    for one in left:
        used = "in use" if one.busy else "used " + datetime.fromtimestamp(one.used).strftime("%Y-%m-%d %H:%M")
        typer.echo(f"  {one.size / 1e6:10,.1f} MB  {used:<21}  {one.source}")
    if files := backend.conversions():
        size = sum(file.stat().st_size for file in files) / 1e6
        for file in files if clear else ():
            file.unlink(missing_ok=True)
        told = f"0.0 MB; {len(files)} files deleted, {size:,.1f} MB freed" if clear else f"{size:,.1f} MB"
        typer.echo(f"{backend.cache_folder()}: {told}")


def _freed(gone: "list[Stored]") -> str:
    return f"; {len(gone)} caches deleted, {sum(one.size for one in gone) / 1e6:,.1f} MB freed" if gone else ""
