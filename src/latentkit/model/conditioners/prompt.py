"""Emphasis in prompts: which words count more or less, and where a new window begins.

The grammar is the one that AUTOMATIC1111's interface made common: `(word)` counts 1.1 times, `[word]` 1/1.1 times,
`(word:1.3)` 1.3 times; nested ones multiply; a backslash before a bracket or a backslash makes it a plain letter; a
bracket that is never closed reaches to the end; `BREAK` begins a new window.
"""

import re
from typing import NamedTuple

from latentkit.errors import InputError

STEP = 1.1
HEAVIEST = 100.0
_TOKEN = re.compile(r"\\[()\[\]\\]|[()\[\]]|:\s*(?P<weight>[+-]?(?:\d+\.?\d*|\.\d+))\s*\)|[\\:]|[^\\()\[\]:]+")
_BREAK = re.compile(r"\s*\bBREAK\b\s*")


class Prompt(NamedTuple):
    """A prompt (None: no prompt), and how many more of the towers' last blocks to leave out than the model does.

    This clip skip is diffusers' count; AUTOMATIC1111's begins at 1.
    """

    text: str | None
    skip: int = 0


class Piece(NamedTuple):
    """A stretch of text whose tokens count `weight` times."""

    text: str
    weight: float


def escaped(text: str) -> str:
    """`text` such that `pieces` finds no emphasis in it."""
    return re.sub(r"([\\()\[\]])", r"\\\1", text)


def pieces(prompt: str) -> list[list[Piece]]:
    """The pieces of a prompt, those between two `BREAK`s together; InputError where a weight passes 100."""
    found: list[tuple[str, float]] = []
    opened: dict[str, list[int]] = {"(": [], "[": []}

    def close(bracket: str, factor: float) -> None:
        start = opened[bracket].pop()
        found[start:] = [(text, weight * factor) for text, weight in found[start:]]

    for match in _TOKEN.finditer(prompt):
        token, weight = match[0], match["weight"]
        if token in opened:
            opened[token].append(len(found))
        elif weight is not None and opened["("]:
            close("(", float(weight))
        elif token == ")" and opened["("]:
            close("(", STEP)
        elif token == "]" and opened["["]:
            close("[", 1 / STEP)
        else:
            plain = len(token) == 2 and token[0] == "\\"
            found.append((token[1] if plain else token, 1.0))
    for bracket, factor in (("(", STEP), ("[", 1 / STEP)):
        while opened[bracket]:
            close(bracket, factor)
    heaviest = max((abs(weight) for _, weight in found), default=0.0)
    if not heaviest <= HEAVIEST:
        raise InputError(
            f"emphasis multiplies to {heaviest:g} in a prompt; at most {HEAVIEST:g} is allowed", exit_code=2
        )
    return _windows(found)


def _windows(found: list[tuple[str, float]]) -> list[list[Piece]]:
    """Neighbours of one weight joined, so that words are not torn apart, and cut where the prompt breaks."""
    joined: list[Piece] = []
    for text, weight in found:
        if joined and joined[-1].weight == weight:
            joined[-1] = Piece(joined[-1].text + text, weight)
        else:
            joined.append(Piece(text, weight))
    windows: list[list[Piece]] = [[]]
    for text, weight in joined:
        first, *others = _BREAK.split(text)
        windows[-1].append(Piece(first, weight))
        windows += [[Piece(other, weight)] for other in others]
    return windows
