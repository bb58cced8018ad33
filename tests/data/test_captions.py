"""Other words for a picture: how often, which, and always the same for a draw."""

from collections import Counter

import pytest

from latentkit.data.captions import caption_of
from latentkit.data.source import Item

HEART = Item("a", 8, 8, 3, "uint8", "0" * 64, caption="red heart suit", keywords=("love", "card game", "romance"))


def test_no_share_and_no_keywords_change_nothing():
    assert {caption_of(HEART, 0.0, 1, draw) for draw in range(50)} == {"red heart suit"}
    assert {caption_of(HEART._replace(keywords=()), 1.0, 1, draw) for draw in range(50)} == {"red heart suit"}
    assert caption_of(HEART._replace(caption=None, keywords=()), 1.0, 1, 0) == ""


@pytest.mark.parametrize("share", [0.25, 0.75])
def test_the_share_is_kept_and_every_other_form_comes(share):
    found = Counter(caption_of(HEART, share, 7, draw) for draw in range(4000))
    shuffled = {"red suit heart", "heart red suit", "heart suit red", "suit red heart", "suit heart red"}
    # A sixth of the shuffled ones fall on the caption itself.
    assert found["red heart suit"] / 4000 == pytest.approx(1 - share + share / 12, abs=0.03)
    assert sum(found[words] for words in shuffled) / 4000 == pytest.approx(share * 5 / 12, abs=0.03)
    keyed = found.keys() - shuffled - {"red heart suit"}
    assert {"love", "card game", "romance", "romance love", "card game love romance"} <= keyed
    assert len(keyed) == 3 + 6 + 6


def test_a_draw_always_says_the_same_and_seeds_differ():
    said = [[caption_of(HEART, 1.0, seed, draw) for draw in range(30)] for seed in (1, 1, 2)]
    assert said[0] == said[1] != said[2]


def test_a_picture_without_a_caption_has_its_keywords():
    said = {caption_of(HEART._replace(caption=None), 1.0, 0, draw) for draw in range(200)}
    assert "" not in said
    assert "love" in said
