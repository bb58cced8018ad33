"""Conditioners: captions and classes to rows, what is absent, what is refused; and Conditioning itself."""

import json

import pytest
import torch

from latentkit.errors import InputError
from latentkit.model.conditioners import Conditioner
from latentkit.model.conditioners.label import LabelConditioner, LabelConfig
from latentkit.model.conditioners.text import TextConditioner, train_tokenizer
from latentkit.model.conditioning import Conditioning, merge
from latentkit.nets.towers import TextEncoderConfig

CAPTIONS = ["red heart", "a slice of pizza", "red apple", "flag: Curaçao", "家 house", "Red Heart"] * 3
CONFIG = TextEncoderConfig(vocabulary=300, length=8, width=16, layers=1, heads=2)


@pytest.fixture(scope="module")
def tokenizer() -> str:
    return train_tokenizer(CAPTIONS, 300)


@pytest.fixture
def text(tokenizer: str) -> TextConditioner:
    return TextConditioner(CONFIG, tokenizer).eval()


@pytest.fixture
def label() -> LabelConditioner:
    return LabelConditioner(LabelConfig(width=16), ["cat", "dog"])


def test_both_are_conditioners(text: TextConditioner, label: LabelConditioner) -> None:
    assert isinstance(text, Conditioner)
    assert isinstance(label, Conditioner)


@pytest.mark.parametrize("caption", ["red heart", "flag: curaçao", "家 house", "naïve 🍕 never seen", "a\tb"])
def test_the_tokenizer_gives_every_text_back(tokenizer: str, caption: str) -> None:
    from tokenizers import Tokenizer

    read = Tokenizer.from_str(tokenizer)
    assert read.decode(read.encode(caption).ids).strip() == caption
    assert 256 < read.get_vocab_size() <= 300


def test_the_tokenizer_is_a_function_of_the_set_of_captions(tokenizer: str) -> None:
    assert train_tokenizer(reversed(CAPTIONS), 300) == tokenizer
    assert json.loads(tokenizer)["model"]["type"] == "BPE"


def test_tokens_are_cut_ended_and_padded(text: TextConditioner) -> None:
    pad, end = 0, 1
    rows = text.tokens(["red", "", "   ", "red heart " * 20, "RED "])
    assert rows.shape == (5, 8)
    assert rows[1].tolist() == rows[2].tolist() == [end] + [pad] * 7
    length = int((rows[0] != pad).sum())
    assert rows[0, length - 1] == end
    assert (rows[0, length:] == pad).all()
    assert rows[3, -1] == end
    assert (rows[3] != pad).all()
    assert rows[4].tolist() == rows[0].tolist()


@torch.no_grad()
def test_rows_of_captions(text: TextConditioner) -> None:
    told = text(["red heart", "a slice of pizza"])
    assert told.context is not None
    assert told.vector is not None
    assert told.context.shape == (2, 8, text.context_width)
    assert told.vector.shape == (2, text.vector_width)
    assert (told.vector[0] - told.vector[1]).abs().max() > 1e-3


@torch.no_grad()
def test_what_is_absent_is_one_row_for_all(text: TextConditioner, label: LabelConditioner) -> None:
    for conditioner in (text, label):
        told = conditioner([*conditioner.absent(2)])
        for slot in (told.context, told.vector):
            assert slot is not None
            torch.testing.assert_close(slot[0], slot[1], atol=0, rtol=0)
    absent, given = text(["", "red"]).vector, label([None, "dog"]).vector
    for vector in (absent, given):
        assert vector is not None
        assert (vector[0] - vector[1]).abs().max() > 1e-3


@torch.no_grad()
def test_classes_are_rows_of_the_embedding_the_last_for_none(label: LabelConditioner) -> None:
    told = label(["dog", "cat", None])
    assert told.vector is not None
    assert told.context is not None
    assert torch.equal(told.vector, label.embedding.weight[[1, 0, 2]])
    assert torch.equal(told.context[:, 0], told.vector)


def test_values_of_a_training_batch(text: TextConditioner, label: LabelConditioner) -> None:
    batch = {"caption": ["a", "b"], "label": torch.tensor([1, -1])}
    assert text.from_batch(batch) == ["a", "b"]
    assert label.from_batch(batch) == ["dog", None]


def test_an_unknown_class_is_refused(label: LabelConditioner) -> None:
    with pytest.raises(InputError, match="class 'dgo' is unknown; did you mean 'dog'"):
        label(["dgo"])


def test_a_tokenizer_that_cannot_be_used_is_refused(tokenizer: str) -> None:
    with pytest.raises(InputError, match="tokenizer cannot be read"):
        TextConditioner(CONFIG, tokenizer[: len(tokenizer) // 2])
    with pytest.raises(InputError, match="the encoder 100"):
        TextConditioner(TextEncoderConfig(vocabulary=100, length=8, width=16, layers=1, heads=2), tokenizer)


def rows(count: int, start: float = 0.0) -> Conditioning:
    values = torch.arange(float(count)) + start
    return Conditioning(
        context=values[:, None, None].expand(count, 3, 2),
        mask=torch.ones(count, 3, dtype=torch.bool),
        vector=values[:, None],
        concat=values[:, None, None, None],
        extras={"hint": values[:, None]},
    )


def same(one: Conditioning, two: Conditioning) -> bool:
    slots = ("context", "mask", "vector", "concat")
    return one.extras.keys() == two.extras.keys() and all(
        torch.equal(a, b)
        for a, b in [
            *((getattr(one, slot), getattr(two, slot)) for slot in slots),
            *((one.extras[name], two.extras[name]) for name in one.extras),
        ]
    )


def test_rows_are_taken_and_joined_with_all_their_slots() -> None:
    whole = rows(5)
    assert same(Conditioning.cat([whole.take(slice(0, 2)), whole.take(torch.tensor([2, 3, 4]))]), whole)
    assert same(Conditioning.cat([rows(2), rows(3, 2.0)]), whole)
    assert same(whole.to(torch.device("cpu")), whole)
    assert Conditioning().take(slice(0, 1)) == Conditioning()


@pytest.mark.parametrize("order", [1, -1])
def test_rows_of_different_slots_are_not_joined(order: int) -> None:
    parts = [Conditioning(vector=torch.zeros(1, 2)), Conditioning()][::order]
    with pytest.raises(AssertionError, match="different slots"):
        Conditioning.cat(parts)


def test_merging_puts_contexts_one_after_another_and_vectors_side_by_side() -> None:
    one = Conditioning(context=torch.zeros(2, 3, 4), vector=torch.zeros(2, 5), extras={"a": torch.zeros(2)})
    two = Conditioning(context=torch.ones(2, 1, 4), vector=torch.ones(2, 1), extras={"b": torch.ones(2)})
    both = merge([one, two])
    assert both.context is not None
    assert both.vector is not None
    assert both.context[0, :, 0].tolist() == [0, 0, 0, 1]
    assert both.vector[0].tolist() == [0, 0, 0, 0, 0, 1]
    assert both.extras.keys() == {"a", "b"}
    assert both.mask is None
    assert both.concat is None
    assert merge([]) == Conditioning()


@pytest.mark.parametrize("masked_first", [True, False])
def test_merging_keeps_masks_beside_their_tokens(masked_first: bool) -> None:
    masked = Conditioning(context=torch.zeros(1, 2, 4), mask=torch.tensor([[True, False]]))
    parts = [masked, Conditioning(vector=torch.zeros(1, 2)), Conditioning(context=torch.ones(1, 1, 4))]
    mask = merge(parts if masked_first else parts[::-1]).mask
    assert mask is not None
    assert mask.tolist() == [[True, False, True] if masked_first else [True, True, False]]


def test_joining_pads_shorter_contexts_with_tokens_that_do_not_count() -> None:
    short, long = Conditioning(context=torch.ones(1, 2, 4)), Conditioning(context=torch.ones(1, 3, 4))
    both = Conditioning.cat([short, long])
    assert both.context is not None
    assert both.mask is not None
    assert both.context[0].sum(1).tolist() == [4, 4, 0]
    assert both.mask.tolist() == [[True, True, False], [True, True, True]]
    masked = Conditioning(context=torch.ones(1, 3, 4), mask=torch.tensor([[True, False, True]]))
    again = Conditioning.cat([masked, short])
    assert again.mask is not None
    assert again.mask.tolist() == [[True, False, True], [True, True, False]]
    assert Conditioning.cat([long, long]).mask is None
