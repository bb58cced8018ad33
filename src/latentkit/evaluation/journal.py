"""The journals of a run, read: metrics and timings as they were written, line by line."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

Curves = dict[str, list[tuple[float, float]]]


def lines(path: Path) -> Iterator[dict[str, Any]]:
    """The JSON lines of a journal, none where it is absent; a torn last one is left out."""
    for line in path.read_text().splitlines() if path.exists() else ():
        try:
            yield json.loads(line)
        except ValueError:
            continue


def curves(path: Path) -> Curves:
    """Every number of a journal by its name, as (step, value); of a row of numbers each by `NAME/PLACE`."""
    found: Curves = {}
    for line in lines(path):
        for name, value in line.items():
            row = {f"{name}/{i}": one for i, one in enumerate(value)} if isinstance(value, list) else {name: value}
            for each, number in row.items():
                if each != "step" and isinstance(number, int | float):
                    found.setdefault(each, []).append((line["step"], number))
    return found
