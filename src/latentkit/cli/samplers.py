"""`latentkit samplers` and `latentkit compare-samplers`: which there are, and what they draw."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from torch import Tensor

    from latentkit.applications.compare_samplers import Drawn

LABEL_HEIGHT = 13  # pixels of a line of Pillow's own bitmap font, and some air


def samplers(
    json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    spacings: Annotated[bool, typer.Option("--spacings", help="The spacings instead.")] = False,
) -> None:
    """Every sampler: order, evaluations a step, whether it is random, what it is good for, its names elsewhere."""
    import json as notation

    from latentkit.diffusion.samplers.driver import table
    from latentkit.diffusion.spacing import ALIASES, SPACINGS

    rows: list[dict[str, object]]
    if spacings:
        rows = [
            {
                "name": name,
                "options": list(entry.options),
                "source": entry.source,
                "elsewhere": [alias for alias, own in ALIASES.items() if own.partition(":")[0] == name],
            }
            for name, entry in SPACINGS.items()
        ]
    else:
        rows = [
            {
                "name": name,
                "order": entry.order or None,
                "evaluations": entry.evaluations,
                "random": entry.stochastic,
                "good for": entry.good_for,
                "options": list(entry.options),
                "source": entry.source,
                "elsewhere": list(entry.names),
            }
            for name, entry in table().items()
        ]
    typer.echo(notation.dumps(rows, indent=1, ensure_ascii=False) if json else _table(rows))


def _table(rows: list[dict[str, object]]) -> str:
    def shown(value: object) -> str:
        if isinstance(value, list):
            return ", ".join(map(str, value))
        return {"True": "yes", "False": "", "None": "-"}.get(str(value), str(value))

    cells = [list(rows[0]), *([shown(value) for value in row.values()] for row in rows)]
    widths = [max(len(line[i]) for line in cells) for i in range(len(cells[0]))]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(line, widths)).rstrip() for line in cells)


def compare_samplers(
    prompts: Annotated[list[str] | None, typer.Argument(help="What to draw; several draw several rows.")] = None,
    model: Annotated[
        str, typer.Option("--model", "-m", help="A shipped model, a model file or a run folder.")
    ] = "emoji",
    sampler: Annotated[
        list[str] | None, typer.Option(help='A sampler to show, perhaps with its spacing: "heun karras"; repeatable.')
    ] = None,
    steps: Annotated[list[int] | None, typer.Option(help="A step count to show; repeatable.")] = None,
    seed: Annotated[int, typer.Option(help="Seed of every picture.")] = 0,
    guidance: Annotated[float | None, typer.Option(help="Guidance scale; 1 is none.")] = None,
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder for the sheet.")] = Path("out"),
    json: Annotated[bool, typer.Option("--json", help="Print a line of JSON per sampler and step count.")] = False,
) -> None:
    """Draw a sheet: samplers by step counts, with the distance to the 200-step picture under each. Prints its path.

    The distance is the root mean square difference of the pixels in % of their range; a random sampler has none.
    """
    import json as notation

    from latentkit.applications.compare_samplers import compare
    from latentkit.applications.request import ask, told
    from latentkit.checkpoints.files import load
    from latentkit.cli.output import check_folder, show, write_new
    from latentkit.data.pictures import to_png
    from latentkit.diffusion.samplers.driver import split_name, table

    loaded = load(model)
    words = prompts or loaded.provenance.get("recipe", {}).get("sampling", {}).get("prompts", [None])[:1]
    requests = [ask(seed=seed, guidance_scale=guidance, **told(loaded.network, each)) for each in words or [None]]
    methods = [split_name(name) for name in sampler] if sampler else [(name, None) for name in table()]
    check_folder(out)
    found: list[Drawn] = []
    for drawn in show(compare(loaded, requests, methods, steps or [4, 8, 12, 20])):
        found.append(drawn)
        if json:
            apart = None if drawn.distance is None else [round(float(d), 6) for d in drawn.distance]
            told_ = {"sampler": drawn.sampler, "spacing": drawn.spacing, "steps": drawn.steps}
            typer.echo(notation.dumps(told_ | {"evaluations": drawn.evaluations, "distance": apart}))
    typer.echo(write_new(out, "samplers", "png", to_png(_sheet(found))))


def _sheet(found: "list[Drawn]") -> "Tensor":
    """A row of each sampler and spacing, a column of each step count; what is what is written under each cell."""
    from latentkit.data.pictures import grid, visible

    cells = []
    for drawn in found:
        name = drawn.sampler if drawn.spacing is None else f"{drawn.sampler} {drawn.spacing}"
        apart = "random" if drawn.distance is None else f"{100 * float(drawn.distance.mean()):.1f} %"
        pictures = grid([visible(picture, alpha=False) for picture in drawn.pictures], len(drawn.pictures))
        cells.append(_labelled(pictures, f"{name}", f"{drawn.evaluations} ev.  {apart}"))
    return grid(cells, len({drawn.steps for drawn in found}))


def _labelled(picture: "Tensor", *lines: str) -> "Tensor":
    """The picture `c h w` in RGB with lines of text under it."""
    import numpy as np
    import torch
    from PIL import Image, ImageDraw

    picture = picture.expand(3, -1, -1) if len(picture) < 3 else picture
    width = max([picture.shape[2], *(6 * len(line) + 4 for line in lines)])
    label = Image.new("L", (width, LABEL_HEIGHT * len(lines)), 255)
    for number, line in enumerate(lines):
        ImageDraw.Draw(label).text((2, LABEL_HEIGHT * number), line, fill=0)
    text = torch.from_numpy(np.array(label)).float()[None].expand(3, -1, -1) / 127.5 - 1
    whole = torch.ones(3, picture.shape[1] + text.shape[1], width)
    whole[:, : picture.shape[1], : picture.shape[2]] = picture
    whole[:, picture.shape[1] :] = text
    return whole
