"""A page that stands alone: text, tables, pictures as data URIs and curves as SVG, no script and no outside file."""

import base64
import math
from collections.abc import Mapping, Sequence
from html import escape
from typing import NamedTuple

Points = Sequence[tuple[float, float]]

# Ordered hues that stay apart on white and on black, also for most colour-blind readers.
COLOURS = (
    "#2a78d6", "#1baa7a", "#c98500", "#d8572a", "#8a5cd0", "#5f6b7a",
    "#c2407a", "#2f9fb5", "#7f8f12", "#8f5a3c", "#b08fe0", "#e08a8a",
)  # fmt: skip
WIDTH, HEIGHT, LEFT, BOTTOM, TOP, RIGHT = 560, 260, 58, 34, 12, 14
MOST_POINTS = 400  # a curve; more are averaged

STYLE = """
:root { color-scheme: light dark; --ink: #1b2126; --dim: #5b6670; --line: #d7dce0; --page: #ffffff; --card: #f6f8f9; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e8ecef; --dim: #9aa5ae; --line: #363e45; --page: #14181b; --card: #1c2226; }
}
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 2rem 1.25rem 4rem; max-width: 1180px; background: var(--page); color: var(--ink);
       font: 16px/1.5 system-ui, sans-serif; }
h1 { font-size: 1.8rem; margin: 0 0 .25rem; } h2 { font-size: 1.2rem; margin: 2.5rem 0 .75rem; }
p { max-width: 75ch; } .dim, figcaption { color: var(--dim); font-size: .85rem; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; display: block; overflow-x: auto; }
td, th { text-align: left; vertical-align: top; padding: .3rem 1.25rem .3rem 0; border-bottom: 1px solid var(--line); }
th { font-weight: 600; color: var(--dim); }
.row { display: flex; flex-wrap: wrap; gap: 1rem; }
figure { margin: 0; } figcaption { max-width: 22ch; overflow-wrap: anywhere; }
figure.wide figcaption { max-width: 75ch; }
img { max-width: 100%; border: 1px solid var(--line); background: var(--card); display: block; }
.small img { width: 112px; image-rendering: auto; }
.wide img { width: min(100%, 640px); }
.pair { display: flex; gap: .25rem; }
.said { border-left: 4px solid var(--line); padding-left: .75rem; }
svg { max-width: 100%; height: auto; background: var(--card); border-radius: 6px; }
svg text { fill: var(--dim); font: 11px system-ui, sans-serif; } svg .grid { stroke: var(--line); }
pre { background: var(--card); padding: .75rem; overflow-x: auto; font-size: .8rem; border-radius: 6px; }
"""


class Figure(NamedTuple):
    """A PNG with what is said under it."""

    png: bytes
    caption: str = ""


def page(title: str, lead: str, sections: Sequence[tuple[str, str]]) -> str:
    """The whole HTML page: a title, one line under it, and sections of (heading, HTML made by this file)."""
    body = "".join(f"<section><h2>{escape(heading)}</h2>{content}</section>\n" for heading, content in sections)
    head = '<meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">'
    return (
        f'<!doctype html>\n<html lang="en"><head>{head}<title>{escape(title)}</title><style>{STYLE}</style></head>\n'
        f'<body><h1>{escape(title)}</h1><p class="dim">{escape(lead)}</p>\n{body}</body></html>\n'
    )


def paragraph(text: str) -> str:
    """A paragraph of plain text."""
    return f"<p>{escape(text)}</p>"


def table(rows: Sequence[Sequence[object]], header: Sequence[str] = ()) -> str:
    """A table of plain values."""
    head = "".join(f"<th>{escape(cell)}</th>" for cell in header)
    body = "".join("<tr>" + "".join(f"<td>{escape(str(cell))}</td>" for cell in row) + "</tr>" for row in rows)
    return "<table>" + (f"<thead><tr>{head}</tr></thead>" if head else "") + f"<tbody>{body}</tbody></table>"


def folded(title: str, text: str) -> str:
    """Preformatted text that opens on a click."""
    return f"<details><summary>{escape(title)}</summary><pre>{escape(text)}</pre></details>"


def picture(figure: Figure) -> str:
    """One wide picture."""
    return f'<figure class="wide">{_image(figure)}</figure>'


def pictures(figures: Sequence[Figure]) -> str:
    """Small pictures side by side, each over its caption."""
    return '<div class="row small">' + "".join(f"<figure>{_image(f)}</figure>" for f in figures) + "</div>"


def pairs(figures: Sequence[tuple[Figure, Figure]]) -> str:
    """Small pictures that are looked at by twos, each pair kept together."""
    kept = "".join(
        '<div class="pair">' + "".join(f"<figure>{_image(f)}</figure>" for f in pair) + "</div>" for pair in figures
    )
    return f'<div class="row small">{kept}</div>'


def verdict(sentences: Sequence[str]) -> str:
    """What the figures mean, a paragraph each, set apart."""
    return '<div class="said">' + "".join(paragraph(sentence) for sentence in sentences) + "</div>"


def beside(*parts: str) -> str:
    """Parts made by this file, side by side where there is room."""
    return '<div class="row">' + "".join(f"<div>{part}</div>" for part in parts) + "</div>"


def _image(figure: Figure) -> str:
    data = base64.b64encode(figure.png).decode()
    caption = f"<figcaption>{escape(figure.caption)}</figcaption>" if figure.caption else ""
    return f'<img alt="{escape(figure.caption, quote=True)}" src="data:image/png;base64,{data}">{caption}'


def chart(title: str, series: Mapping[str, Points], *, log: bool = False, over_time: bool = True) -> str:
    """Curves of (step, value) as SVG; points that are not finite (or not above 0 on a `log` axis) are left out.

    Last values are said of curves `over_time` alone.
    """
    kept = {name: _thinned([p for p in points if _shown(p, log)]) for name, points in series.items()}
    kept = {name: points for name, points in kept.items() if points}
    caption = f"<figcaption>{escape(title)}</figcaption>"
    if not kept:
        return f'<figure class="wide">{caption}<p class="dim">No values were recorded.</p></figure>'
    xs = [x for points in kept.values() for x, _ in points]
    ys = [math.log10(y) if log else y for points in kept.values() for _, y in points]
    x_low, x_high = min(xs), max(max(xs), min(xs) + 1)
    y_low, y_high = min(ys), max(ys)
    margin = (y_high - y_low) * 0.05 or abs(y_high) * 0.1 or 1.0
    y_low, y_high = y_low - margin, y_high + margin

    def across(x: float) -> float:
        return LEFT + (x - x_low) / (x_high - x_low) * (WIDTH - LEFT - RIGHT)

    def down(y: float) -> float:
        return HEIGHT - BOTTOM - (y - y_low) / (y_high - y_low) * (HEIGHT - BOTTOM - TOP)

    marks = []
    for value in _ticks(x_low, x_high):
        place = f'x="{across(value):.1f}" y="{HEIGHT - BOTTOM + 16}"'
        marks.append(f'<text {place} text-anchor="middle">{value:,.6g}</text>')
    for value in _log_ticks(y_low, y_high) if log else _ticks(y_low, y_high, 5):
        y = down(math.log10(value) if log else value)
        label = f"{value:.4g}"
        marks.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        marks.append(f'<text x="{LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{label}</text>')
    lines, legend = [], []
    for number, (name, points) in enumerate(kept.items()):
        colour = COLOURS[number % len(COLOURS)]
        path = " ".join(f"{across(x):.1f},{down(math.log10(y) if log else y):.1f}" for x, y in points)
        lines.append(f'<polyline fill="none" stroke="{colour}" stroke-width="1.8" points="{path}"/>')
        x, y = points[-1]
        end = f'cx="{across(x):.1f}" cy="{down(math.log10(y) if log else y):.1f}"'
        lines.append(f'<circle {end} r="2.5" fill="{colour}"/>')
        last = f" <b>{y:.4g}</b>" if over_time else ""
        legend.append(f'<span style="color:{colour}">&#9632;</span> {escape(name)}{last}')
    label = escape(title, quote=True)
    return (
        f'<figure class="wide">{caption}<svg role="img" aria-label="{label}" viewBox="0 0 {WIDTH} {HEIGHT}" '
        f'width="{WIDTH}" height="{HEIGHT}">{"".join(marks)}{"".join(lines)}</svg>'
        f"<figcaption>{'last: ' if over_time else ''}{' &nbsp; '.join(legend)}</figcaption></figure>"
    )


def _shown(point: tuple[float, float], log: bool) -> bool:
    return all(isinstance(v, int | float) and math.isfinite(v) for v in point) and (point[1] > 0 or not log)


def _thinned(points: Points) -> Points:
    """At most `MOST_POINTS` points, means of equal runs."""
    run = -(-len(points) // MOST_POINTS)
    if run <= 1:
        return points
    parts = [points[i : i + run] for i in range(0, len(points), run)]
    return [(part[-1][0], sum(y for _, y in part) / len(part)) for part in parts]


def _ticks(low: float, high: float, count: int = 6) -> list[float]:
    """Round numbers between `low` and `high`."""
    rough = (high - low) / count
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * m for m in (1, 2, 5, 10) if power * m >= rough)
    return [i * step for i in range(math.ceil(low / step), math.floor(high / step) + 1)]


def _log_ticks(low: float, high: float) -> list[float]:
    """Round numbers between 10**low and 10**high: powers of ten, with 2 and 5 between them where those are few."""
    for digits in ((1,), (1, 2, 5), (1, 2, 3, 4, 5, 6, 8)):
        powers = range(math.floor(low), math.ceil(high) + 1)
        found = [digit * 10.0**power for power in powers for digit in digits]
        found = [value for value in found if low <= math.log10(value) <= high]
        if len(found) >= 3:
            return found
    return _ticks(10**low, 10**high, 4)
