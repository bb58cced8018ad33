"""What a command of this room writes: its figures as JSON, with all that they were made of, and as Markdown."""

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from latentkit import __version__
from latentkit.applications.paper.arms import Plan
from latentkit.training.recipe import resolved
from latentkit.training.run.store import FileCalls, replace_file

Row = dict[str, Any]
Columns = Mapping[str, Callable[[Row], str]]


def markdown(columns: Columns, rows: Sequence[Row]) -> str:
    """A table, one line a row, numbers to the right."""
    cells = [[show(row) for show in columns.values()] for row in rows]
    widths = [max(map(len, column)) for column in zip(columns, *cells, strict=True)]
    lines = [list(columns), [f"{'-' * (width - 1)}:" for width in widths], *cells]
    return "\n".join(
        "| " + " | ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)) + " |" for line in lines
    )


def write(folder: Path, plan: Plan, rows: Sequence[Row], text: str, **more: Any) -> Path:
    """Write `results.json` and `table.md`; returns the path of the table."""
    arms = {arm.name: {"recipe": resolved(arm.recipe), "measured": arm.measured.model_dump()} for arm in plan.arms}
    found = {
        "asked": plan.asked.model_dump(),
        "machine": {**plan.machine, "latentkit": __version__},
        "seconds": plan.seconds,
        **more,
        "rows": [{**row, **arms[row["name"]]} for row in rows],
    }
    replace_file(FileCalls(), folder / "results.json", [json.dumps(found, indent=1).encode(), b"\n"])
    replace_file(FileCalls(), folder / "table.md", [text.encode(), b"\n"])
    return folder / "table.md"


def kept(path: Path, make: Callable[[], Row]) -> Row:
    """The figures in a file, made and written there if it is absent."""
    if not path.exists():
        replace_file(FileCalls(), path, [json.dumps(make(), indent=1).encode(), b"\n"])
    found: Row = json.loads(path.read_bytes())
    return found
