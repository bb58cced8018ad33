"""`latentkit reconstruct`: what a first stage gives back of pictures."""

from pathlib import Path
from typing import Annotated

import typer

from latentkit.errors import InputError

LowMemory = Annotated[
    bool, typer.Option("--low-memory", help="Pass pictures of any size in strips: the same values on the least memory.")
]


def reconstruct(
    pictures: Annotated[list[Path], typer.Argument(help="Picture files, of any size.")],
    model: Annotated[
        str, typer.Option("--model", "-m", help="A shipped model, a model file or a run folder.")
    ] = "emoji",
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder for what is written.")] = Path("out"),
    times: Annotated[float, typer.Option(min=0, help="What errors are multiplied by, to be seen.")] = 8.0,
    only: Annotated[
        bool, typer.Option("--only", help="Write the plain reconstruction, in the picture's own sample type.")
    ] = False,
    low_memory: LowMemory = False,
    json: Annotated[bool, typer.Option("--json", help="Print a line of JSON per picture.")] = False,
) -> None:
    """Show pictures beside what a first stage gives back of them, and beside the errors.

    Prints each path and its PSNR; never writes over a file.
    """
    import logging
    from contextlib import nullcontext

    from latentkit.cli.output import check_folder, write_new
    from latentkit.data.pictures import decode, keeps_alpha, to_tensor
    from latentkit.data.source import track
    from latentkit.evaluation.first_stage import open_first_stage
    from latentkit.evaluation.reconstruction import as_stored, beside, psnr
    from latentkit.evaluation.reconstruction import reconstruct as passed

    for path in pictures:
        if not path.is_file():
            said = "is a folder; name the pictures in it" if path.is_dir() else "does not exist"
            raise InputError(f"picture {path} {said}", exit_code=2)
    opened = open_first_stage(model)
    check_folder(out)
    shown = logging.getLogger("latentkit").isEnabledFor(logging.INFO)
    for path in track(pictures, len(pictures), "reconstructing", shown):
        source = decode(path.read_bytes(), str(path), opened.values)
        try:
            original = to_tensor(source, opened.first_stage.picture_channels, opened.background)
        except InputError as error:
            raise InputError(f"{path}: {error}") from None
        with opened.first_stage.in_strips() if low_memory else nullcontext():
            other = passed(opened.first_stage, original).picture
        if only:
            tiff = path.suffix.lower() in (".tif", ".tiff")
            suffix, data = as_stored(other, source, opened.values, tiff)
        else:
            suffix, data = "png", beside(original, other, times, keeps_alpha(source.colours, len(original)))
        written, quality = write_new(out, f"{path.stem}-reconstruction", suffix, data), psnr(original, other)
        if json:
            import json as writer

            line = {"path": str(written), "picture": str(path), "psnr": quality, "times": None if only else times}
            typer.echo(writer.dumps(line))
        else:
            typer.echo(f"{written}  {quality:.2f} dB" + ("" if only else f"  errors x{times:g}"))
