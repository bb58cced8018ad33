"""Tokenizers of released text towers: CLIP's byte pairs, whose vocabulary is shipped, and BERT's word pieces.

CLIP's original code repairs mis-decoded text (ftfy) and HTML entities first; this does not, and neither does
transformers without ftfy: composed letters (NFC), single spaces and lower case are all the cleaning there is.
"""

import gzip
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from latentkit.errors import InputError

START, END = "<|startoftext|>", "<|endoftext|>"
SHIPPED = Path(__file__).resolve().parents[2] / "models" / "clip-vocabulary.txt.gz"
TOKENS = 49408
"""Tokens of CLIP's vocabulary: 256 bytes, 256 that end a word, the merges, start and end."""
WORDS = r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"
"""What CLIP takes for a word."""
PIECES = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")


def byte_pairs(vocabulary: Mapping[str, int], merges: Sequence[tuple[str, str]]) -> Any:
    """A `tokenizers.Tokenizer` that splits words as CLIP does (Radford et al. 2021, section 2.4); no start, no end."""
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

    pairs = models.BPE(dict(vocabulary), list(merges), end_of_word_suffix="</w>", unk_token=END)
    tokenizer = Tokenizer(pairs)
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.NFC(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Lowercase()]
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(WORDS), behavior="removed", invert=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([START, END])
    return tokenizer


@cache
def clip_tokenizer() -> Any:
    """The tokenizer of every released CLIP, from the vocabulary that the package ships."""
    lines = gzip.decompress(SHIPPED.read_bytes()).decode().split("\n")
    alphabet = _alphabet()
    merges: list[tuple[str, str]] = []
    for line in lines[1 : 1 + TOKENS - 2 * len(alphabet) - 2]:
        first, second = line.split()
        merges.append((first, second))
    tokens = [*alphabet, *(byte + "</w>" for byte in alphabet), *(a + b for a, b in merges), START, END]
    return byte_pairs({token: number for number, token in enumerate(tokens)}, merges)


def _alphabet() -> list[str]:
    """One printable letter for each byte: those that are printable first, then the others."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    rest = 256 - len(printable)
    return [*map(chr, printable), *(chr(256 + number) for number in range(rest))]


def word_pieces(vocabulary: Mapping[str, int]) -> Any:
    """BERT's uncased tokenizer, a `tokenizers.Tokenizer` that puts [CLS] before a text and [SEP] behind it.

    InputError names the special tokens that the vocabulary lacks.
    """
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

    missing = [piece for piece in PIECES if piece not in vocabulary]
    if missing:
        raise InputError(f"the vocabulary lacks {', '.join(missing)}: it is not one of BERT's")
    tokenizer = Tokenizer(models.WordPiece(dict(vocabulary), unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece(prefix="##")
    tokenizer.add_special_tokens(list(PIECES))
    tokenizer.post_processor = processors.BertProcessing(("[SEP]", vocabulary["[SEP]"]), ("[CLS]", vocabulary["[CLS]"]))
    return tokenizer


def from_json(text: str) -> Any:
    """The tokenizer that its JSON text describes; InputError where it does not."""
    from tokenizers import Tokenizer

    try:
        return Tokenizer.from_str(text)
    except Exception as error:
        raise InputError(f"the model's tokenizer cannot be read: {error}") from None
