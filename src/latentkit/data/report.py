"""What a data set holds, counted: sizes, channels, duplicates, captions, classes, and the files that are not used."""

import math
from collections import Counter, defaultdict
from statistics import median
from typing import Any

from torch import Tensor

from latentkit.data.pictures import BadPicture, Picture, grid, resize, to_tensor
from latentkit.data.source import Source

RATIOS = ("1:3", "1:2", "9:16", "2:3", "3:4", "1:1", "4:3", "3:2", "16:9", "2:1", "3:1")
SHOWN = 20


def inspect(source: Source) -> dict[str, Any]:
    """The counts of a data set, as plain values for JSON."""
    items = source.items
    same = defaultdict(list)
    for item in items:
        same[item.digest].append(item.key)
    labels = Counter(item.label for item in items)
    captions = [item.caption for item in items if item.caption]
    longest = max((item for item in items if item.caption), key=lambda item: len(item.caption or ""), default=None)
    return {
        "folder": str(source.root),
        "kind": source.kind,
        "pictures": len(items),
        "fingerprint": source.fingerprint,
        "width": _range([item.width for item in items]),
        "height": _range([item.height for item in items]),
        "sizes": _counts(f"{item.width}x{item.height}" for item in items),
        "aspects": _counts(_ratio(item.width, item.height) for item in items),
        "channels": _counts(item.channels for item in items),
        "depths": _counts(item.depth for item in items),
        "alpha": sum(item.alpha for item in items),
        "transparent": sum(item.transparent for item in items),
        "notes": _counts(note for item in items for note in item.notes),
        "duplicates": sorted(keys for keys in same.values() if len(keys) > 1),
        "captions": {
            "count": len(captions),
            "missing": len(items) - len(captions),
            "distinct": len(set(captions)),
            "longest": len(longest.caption or "") if longest else 0,
            "longest_key": longest.key if longest else None,
        },
        "keywords": sum(bool(item.keywords) for item in items),
        "classes": {name: labels[name] for name in source.classes},
        "splits": _counts(item.split for item in items if item.split),
        "rejected": [{"key": key, "reason": reason} for key, reason in source.rejected],
    }


def _range(values: list[int]) -> dict[str, int]:
    return {"least": min(values), "median": int(median(values)), "most": max(values)}


def _counts(values: Any) -> dict[str, int]:
    return {str(value): count for value, count in sorted(Counter(values).items(), key=lambda pair: (-pair[1], pair))}


def _ratio(width: int, height: int) -> str:
    def distance(name: str) -> float:
        across, down = name.split(":")
        return abs(math.log(width / height) - math.log(int(across) / int(down)))

    return min(RATIOS, key=distance)


def describe(found: dict[str, Any]) -> str:
    """The counts as lines to read."""
    lines = [
        f"{found['folder']}: {found['pictures']:,} pictures ({found['kind']})",
        f"  width       {_span(found['width'])}",
        f"  height      {_span(found['height'])}",
        f"  sizes       {_short(found['sizes'])}",
        f"  aspects     {_short(found['aspects'])}",
        f"  channels    {_short(found['channels'])}; alpha in {found['alpha']:,}, used in {found['transparent']:,}",
        f"  samples     {_short(found['depths'])}",
    ]
    captions = found["captions"]
    if captions["count"]:
        said = f"{captions['count']:,}, {captions['distinct']:,} distinct, {captions['missing']:,} missing"
        lines.append(f"  captions    {said}; longest {captions['longest']} characters ({captions['longest_key']})")
    else:
        lines.append("  captions    none")
    if found["keywords"]:
        lines.append(f"  keywords    in {found['keywords']:,}")
    if found["classes"]:
        lines.append(f"  classes     {len(found['classes'])}: {_short(found['classes'])}")
    if found["splits"]:
        lines.append(f"  splits      {_short(found['splits'])}")
    extra = sum(len(keys) - 1 for keys in found["duplicates"])
    lines.append(f"  duplicates  {extra:,}" + (" (same bytes)" if extra else ""))
    lines += [f"    {' = '.join(keys[:4])}{' = ...' if len(keys) > 4 else ''}" for keys in found["duplicates"][:SHOWN]]
    lines += [f"  note        {note}: {count:,}" for note, count in found["notes"].items()]
    rejected = found["rejected"]
    lines.append(f"  not used    {len(rejected):,}")
    lines += [f"    {row['key']}: {row['reason']}" for row in rejected[:SHOWN]]
    if len(rejected) > SHOWN:
        lines.append(f"    and {len(rejected) - SHOWN:,} more (--json lists all)")
    return "\n".join(lines)


def _span(values: dict[str, int]) -> str:
    return f"{values['least']} to {values['most']}, median {values['median']}"


def _short(counts: dict[str, int]) -> str:
    first = list(counts.items())[:8]
    more = f", and {len(counts) - len(first)} more" if len(counts) > len(first) else ""
    return ", ".join(f"{name} ({count:,})" for name, count in first) + more


def sheet(source: Source, count: int = 64, side: int = 96) -> Tensor:
    """A contact sheet `3 H W` of up to `count` pictures, evenly taken, each inside `side` x `side` pixels on white."""
    chosen = sorted({i * len(source) // count for i in range(count)} if len(source) > count else range(len(source)))
    cells = []
    for index in chosen:
        try:
            picture = source.read(index)
        except BadPicture:
            continue
        x = to_tensor(_visible(picture), 3)
        scale = side / max(x.shape[1:])
        cells.append(resize(x, max(1, round(x.shape[1] * scale)), max(1, round(x.shape[2] * scale))))
    return grid(cells)


def _visible(picture: Picture) -> Picture:
    """A picture of colours that can be shown: of two channels the first, of more than three the first three."""
    shown = 1 if picture.colours < 3 else 3
    return picture if picture.colours in (1, 3) else Picture(picture.array[..., :shown], False)
