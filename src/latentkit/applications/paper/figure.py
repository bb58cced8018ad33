"""Curves as one SVG file that needs nothing else."""

import math
from collections.abc import Mapping, Sequence
from html import escape

from latentkit.evaluation.report import COLOURS

WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 640, 360, 64, 56, 16, 48
GAP = 14.0  # between two names, pixels


def curves(across: str, down: str, series: Mapping[str, Sequence[tuple[float, float]]]) -> str:
    """Named curves of (x, y) over what is `across`, y logarithmic; points that are not above zero are left out."""
    kept = {name: [(x, math.log10(y)) for x, y in points if y > 0] for name, points in series.items()}
    kept = {name: points for name, points in kept.items() if points}
    every = [point for points in kept.values() for point in points] or [(1.0, 0.0)]
    right = max(x for x, _ in every)
    low, high = min(y for _, y in every) - 0.05, max(y for _, y in every) + 0.05

    def place(x: float, y: float) -> tuple[float, float]:
        return (
            LEFT + x / right * (WIDTH - LEFT - RIGHT),
            HEIGHT - BOTTOM - (y - low) / (high - low) * (HEIGHT - BOTTOM - TOP),
        )

    parts = [_text(WIDTH / 2, HEIGHT - 10, across), _text(LEFT, TOP - 4, down)]
    for digit, power in ((d, p) for p in range(math.floor(low), math.ceil(high)) for d in (1, 2, 5)):
        value = math.log10(digit) + power
        if low <= value <= high:
            y = place(0, value)[1]
            parts.append(f'<line x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}" stroke="#ccc"/>')
            parts.append(_text(LEFT - 6, y + 4, f"{digit * 10.0**power:g}", "end"))
    for quarter in range(5):
        x = right * quarter / 4
        parts.append(_text(place(x, low)[0], HEIGHT - BOTTOM + 18, f"{x:.0f}"))
    ends = sorted((place(*points[-1])[1], name) for name, points in kept.items())
    before = -GAP
    for (y, name), colour in ((end, COLOURS[list(kept).index(end[1]) % len(COLOURS)]) for end in ends):
        points = [place(*point) for point in kept[name]]
        path = " ".join(f"{a:.1f},{b:.1f}" for a, b in points)
        parts.append(f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="2"/>')
        parts += [f'<circle cx="{a:.1f}" cy="{b:.1f}" r="3" fill="{colour}"/>' for a, b in points]
        before = max(y, before + GAP)
        parts.append(_text(points[-1][0] + 8, before + 4, name, "start", colour))
    style = 'font-family="sans-serif" font-size="12"'
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" {style}>'
    return f'{head}<rect width="100%" height="100%" fill="#fff"/>{"".join(parts)}</svg>\n'


def _text(x: float, y: float, words: str, anchor: str = "middle", colour: str = "#444") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" fill="{colour}">{escape(words)}</text>'
