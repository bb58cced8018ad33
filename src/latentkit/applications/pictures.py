"""What both stages do first: open the data, keep some pictures back, and show pictures to a person."""

from collections.abc import Sequence
from pathlib import Path

from torch import Tensor

from latentkit.data.dataset import Pictures
from latentkit.data.pictures import grid, to_png, visible
from latentkit.data.source import Source, open_source
from latentkit.errors import InputError
from latentkit.training.recipe import DataRecipe
from latentkit.training.run.store import FileCalls, replace_file

HOLDOUT_PERCENT = 5


def open_data(data: DataRecipe, seed: int, multiple: int) -> tuple[Pictures, Pictures]:
    """Training and held-out pictures.

    Held out are the items of the split `holdout`, or about 5 % fixed by their digests (at least one; with fewer than
    ten pictures none are kept back and the same ones serve for both).
    """
    source = open_source(data.path, values=data.transform.range)
    if data.holdout is not None:
        train = source.select(data.split) if data.split else _outside(source, data.holdout)
        held = source.select(data.holdout)
    else:
        chosen = source.select(data.split) if data.split else source
        train, held = _keep_back(chosen)
    if data.transform.size % multiple:
        raise InputError(
            f"size {data.transform.size} is not a multiple of {multiple}, which this network needs; "
            f"nearest: {max(multiple, round(data.transform.size / multiple) * multiple)}"
        )
    still = data.transform.model_copy(update={"crop": "center", "flips": "", "zoom": 1})
    return (
        Pictures(train, data.transform, seed, multiple=multiple),
        Pictures(held, still, seed, multiple=multiple),
    )


def _outside(source: Source, split: str) -> Source:
    return source.subset(i for i, item in enumerate(source.items) if item.split != split)


def _keep_back(source: Source) -> tuple[Source, Source]:
    """About 5 % of the pictures by digest, so that a picture stays on its side when others come or go."""
    if len(source) < 10:
        return source, source
    held = [i for i, item in enumerate(source.items) if int(item.digest[:8], 16) % 100 < HOLDOUT_PERCENT]
    held = held or [min(range(len(source)), key=lambda i: source.items[i].digest)]
    kept = set(held)
    digests = {source.items[i].digest for i in held}
    train = [i for i in range(len(source)) if i not in kept and source.items[i].digest not in digests]
    return source.subset(train or range(len(source))), source.subset(held)


def write_sheet(path: Path, pictures: Sequence[Tensor], columns: int | None = None, *, alpha: bool = False) -> None:
    """A sheet of pictures `c h w`, the last channel perhaps `alpha`, as one PNG, written whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    replace_file(FileCalls(), path, [to_png(grid([visible(p, alpha) for p in pictures], columns))])
