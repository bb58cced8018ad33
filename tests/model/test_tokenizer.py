"""Tokenizers: known ids, 10,000 strings against transformers' CLIP tokenizer, BERT's word pieces, refusals."""

import gzip
import random
from typing import Any

import pytest

from latentkit.errors import InputError
from latentkit.model.conditioners.tokenizer import END, PIECES, SHIPPED, START, clip_tokenizer, from_json, word_pieces

RANGES = (
    (0x20, 0x250), (0x300, 0x330), (0x370, 0x530), (0x590, 0x700), (0x900, 0x980), (0x1E00, 0x2100), (0x3040, 0x3100),
    (0x4E00, 0x4F00), (0xAC00, 0xAD00), (0xFB00, 0xFB10), (0xFE00, 0xFE10), (0x1D400, 0x1D420), (0x1F300, 0x1F650),
)  # fmt: skip
WORDS = [
    "a photo of", "CAT", "it's", "WE'LL", "don't", "2026", "3.14", "</w>", START, END, END.upper(), "naïve", "Straße",
    "İstanbul", "ﬁre", "e\u0301t\u00e9", "日本語", "한국어", "привет", "שלום", "ไทย", "👩‍🍳", "¼", "\u200b", "\u00a0",
    "\t\n", "  ", "\x00", "\x85", "\u2028", "_", "&amp;", "!!!", "...",
]  # fmt: skip


def strings(count: int) -> list[str]:
    """Random mixtures of letters of many scripts and of words."""
    draw = random.Random(1)
    letters = [chr(code) for low, high in RANGES for code in range(low, high)]
    return [
        draw.choice(["", " "]).join(
            draw.choice(WORDS) if draw.random() < 0.3 else "".join(draw.choices(letters, k=draw.randint(1, 6)))
            for _ in range(draw.randint(0, 8))
        )
        for _ in range(count)
    ]


def test_ids_that_everybody_knows() -> None:
    tokenizer = clip_tokenizer()
    assert tokenizer.get_vocab_size() == 49408
    assert [tokenizer.token_to_id(token) for token in ("!", "!</w>", START, END)] == [0, 256, 49406, 49407]
    assert tokenizer.encode("A photo\tof a  CAT").ids == [320, 1125, 539, 320, 2368]
    assert tokenizer.encode("").ids == []


@pytest.mark.parity
def test_ten_thousand_strings_have_the_reference_ids() -> None:
    transformers: Any = pytest.importorskip("transformers")
    lines = gzip.decompress(SHIPPED.read_bytes()).decode().splitlines()[1:48895]
    merges = [tuple(line.split()) for line in lines]
    tokenizer = clip_tokenizer()
    theirs = transformers.CLIPTokenizer(vocab=tokenizer.get_vocab(), merges=merges)
    asked = strings(10_000)
    assert len(set(asked)) > 8_500
    expected = theirs(asked, add_special_tokens=False)["input_ids"]
    assert [one.ids for one in tokenizer.encode_batch(asked)] == expected


@pytest.mark.parity
def test_word_pieces_have_the_reference_ids() -> None:
    transformers: Any = pytest.importorskip("transformers")
    pieces = [
        *PIECES,
        *"abcdefghijklmnopqrstuvwxyz0123456789.,!'",
        "cat",
        "photo",
        "##o",
        "##s",
        "日",
        "本",
        "istanbul",
    ]
    vocabulary = {piece: number for number, piece in enumerate(pieces)}
    ours, theirs = word_pieces(vocabulary), transformers.BertTokenizer(vocab=dict(vocabulary))
    asked = [*strings(500), "A photo of cats [SEP] x", "çats, don't!"]
    assert [one.ids for one in ours.encode_batch(asked)] == theirs(asked)["input_ids"]
    assert ours.encode("cats").tokens == ["[CLS]", "cat", "##s", "[SEP]"]


def test_what_is_no_vocabulary_of_berts_is_refused() -> None:
    with pytest.raises(InputError, match=r"lacks \[PAD\], \[MASK\]"):
        word_pieces({"[UNK]": 0, "[CLS]": 1, "[SEP]": 2})


def test_a_tokenizer_that_cannot_be_read_is_refused() -> None:
    with pytest.raises(InputError, match="tokenizer cannot be read"):
        from_json('{"model": 3}')
