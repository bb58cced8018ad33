"""What is said about a picture in one draw: its caption, or now and then other words for it."""

from latentkit.data.source import Item
from latentkit.diffusion.noise import keyed_bits


def caption_of(item: Item, share: float, seed: int, draw: int) -> str:
    """The caption of `item`, empty where it has none; for `share` of its draws, where it has keywords, other words.

    Half of those are some of its keywords in any order, half the caption's words shuffled: a pure function of (seed,
    draw).
    """
    said = item.caption or ""
    if not share or not item.keywords:
        return said
    words = said.split()
    chance, kind, most, *order = keyed_bits(3 + max(len(words), len(item.keywords)), seed, "words", draw).tolist()
    if chance >= share * 2**64:
        return said
    if kind % 2 or not words:
        return " ".join(_shuffled(item.keywords, order)[: 1 + most % len(item.keywords)])
    return " ".join(_shuffled(words, order))


def _shuffled(words: list[str] | tuple[str, ...], order: list[int]) -> list[str]:
    return [word for _, _, word in sorted(zip(order, range(len(words)), words, strict=False))]
