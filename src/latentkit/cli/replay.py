"""`latentkit replay`: draw a picture again from what it says of its own making."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from latentkit.errors import InputError

if TYPE_CHECKING:
    from latentkit.applications.attachment import Attachment, Guide, WeightsFile
    from latentkit.applications.metadata import Record

LARGEST = 1 << 28
OPTIONS = {"semantic_map": "map"}
"""What a field's option is called, where not as the field."""
PNG, END = b"\x89PNG\r\n\x1a\n", b"IEND\xaeB`\x82"


def replay(
    picture: Annotated[Path, typer.Argument(help="A PNG that latentkit drew.")],
    model: Annotated[str | None, typer.Option("--model", "-m", help="The model that drew it, unless shipped.")] = None,
    init: Annotated[Path | None, typer.Option(help="The picture it started from (image-to-image, inpainting).")] = None,
    mask: Annotated[Path | None, typer.Option(help="The mask of its inpainting.")] = None,
    depth: Annotated[Path | None, typer.Option(help="The depth picture that it was drawn by.")] = None,
    semantic_map: Annotated[Path | None, typer.Option("--map", help="The semantic map that it was drawn by.")] = None,
    variation: Annotated[Path | None, typer.Option(help="The picture that it is a variation of.")] = None,
    lora: Annotated[list[Path] | None, typer.Option(help="A LoRA that it was drawn with; repeatable.")] = None,
    control: Annotated[list[Path] | None, typer.Option(help="A ControlNet that it was drawn with; repeatable.")] = None,
    hint: Annotated[list[Path] | None, typer.Option(help="The picture of a ControlNet; repeatable.")] = None,
    vae: Annotated[Path | None, typer.Option(help="The autoencoder that it was drawn with.")] = None,
    embedding: Annotated[
        list[Path] | None, typer.Option(help="A textual inversion that it was drawn with; repeatable.")
    ] = None,
    guidance_model: Annotated[str | None, typer.Option(help="The guidance model that it was drawn with.")] = None,
    refiner: Annotated[str | None, typer.Option(help="The refiner that it was drawn with.")] = None,
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder for the picture.")] = Path("out"),
) -> None:
    """Draw a picture again: the same bytes with the same model, versions, threads and kind of machine.

    Exits with 1 where the bytes differ, after writing the picture and saying why.
    """
    import os

    import torch

    from latentkit.applications.attachment import Attachment, Guide, WeightsFile
    from latentkit.applications.backend import read as converting
    from latentkit.applications.generate import replay as run
    from latentkit.applications.metadata import read
    from latentkit.checkpoints.files import load, shipped
    from latentkit.cli.models import located
    from latentkit.cli.output import check_folder, show, write_new
    from latentkit.data.maps import decode_map
    from latentkit.data.pictures import decode
    from latentkit.training.run.progress import say, warn

    original = _bytes(picture)
    cut = original.startswith(PNG) and END not in original
    try:
        record = read(original, str(picture))
    except InputError:
        if not cut:
            raise
        raise InputError(
            f"{picture}: is a truncated PNG, and what says how it was drawn is lost with its end"
        ) from None
    pictures = {"init": init, "mask": mask, "depth": depth, "semantic_map": semantic_map, "variation": variation}
    for field, path in pictures.items():
        if path is not None:
            found = Attachment.read(path, decode_map if field == "semantic_map" else decode)
            record = _given(record, field, found, str(path), picture)
        elif (wanted := getattr(record.request, field)) is not None:
            other = "another picture" if field == "init" else f"a {field.replace('_', ' ')} picture"
            digest = f"whose pixels have the sha256 {wanted.digest[:16]}"
            raise InputError(
                f"{picture} was drawn from {other} ({digest}); give it with --{OPTIONS.get(field, field)} PICTURE",
                exit_code=2,
            )
    weights = (("lora", 0, lora), ("embedding", 0, embedding), ("control", 0, control), ("control", 1, hint))
    for field, place, files in weights:
        for path in files or ():
            given = Attachment.read(path) if place else WeightsFile.read(path)
            record = _among(record, field, place, given, f"{path} is no {'hint' if place else field} of {picture}")
    if vae is not None:
        record = _given(record, "autoencoder", WeightsFile.read(located(vae)), str(vae), picture)
    if model is None and record.model not in shipped():
        raise InputError(f"{picture} was drawn by {record.model!r}, which is not shipped; give it with -m", exit_code=2)
    there = record.machine
    device = "cuda" if there.device.startswith("cuda") and torch.cuda.is_available() else "cpu"
    if there.threads <= 4 * (os.cpu_count() or 1):
        torch.set_num_threads(there.threads)
    dtype = getattr(torch, there.dtype)
    named = model or record.model
    if record.request.backend == "openvino" and not record.request.lora:
        loaded = converting(named, dtype=dtype)
    else:
        loaded = load(named, device, dtype)
    for field, name in (("guidance_model", guidance_model), ("refiner", refiner)):
        if name is not None:
            record = _given(record, field, Guide.read(name, device, dtype), name, picture)
    differences = record.differences(loaded)
    for difference in differences:
        say(f"latentkit: {difference}")
    events = run(loaded, record)
    check_folder(out)
    for result in show(events):
        suffix, data = result.file()
        typer.echo(write_new(out, f"{picture.stem}-replay", suffix, data))
        if data != original:
            why = "it is truncated" if cut else "; ".join(differences)
            why = why or "the file was changed, or this machine computes in another way"
            warn(f"latentkit: the bytes differ from {picture}: {why}")
            raise typer.Exit(1)


def _given(
    record: "Record", field: str, given: "Attachment | Guide | WeightsFile", name: str, picture: Path
) -> "Record":
    """The record with what it names by its digest; InputError where `name` is not that."""
    wanted = getattr(record.request, field)
    if wanted != given:
        kept = wanted.digest[:16] if wanted else "none"
        got = f"{name} is not the {field.replace('_', ' ')} of {picture}"
        raise InputError(f"{got}: its sha256 is {given.digest[:16]}, wanted is {kept}", exit_code=2)
    return record.model_copy(update={"request": record.request.model_copy(update={field: given})})


def _among(record: "Record", field: str, place: int, given: "Attachment | WeightsFile", wrong: str) -> "Record":
    """The record with `given` at a `place` of those entries of a field that name it by its digest."""
    entries = getattr(record.request, field) or ()
    if all(entry[place] != given for entry in entries):
        kept = ", ".join(entry[place].digest[:16] for entry in entries) or "none"
        raise InputError(f"{wrong}: its sha256 is {given.digest[:16]}, wanted is {kept}", exit_code=2)
    filled = tuple(
        tuple(given if number == place and part == given else part for number, part in enumerate(entry))
        for entry in entries
    )
    return record.model_copy(update={"request": record.request.model_copy(update={field: filled})})


def _bytes(path: Path) -> bytes:
    try:
        if path.stat().st_size > LARGEST:
            raise InputError(f"{path}: is larger than {LARGEST >> 20} MB")
        return path.read_bytes()
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror or error}", exit_code=2) from None
