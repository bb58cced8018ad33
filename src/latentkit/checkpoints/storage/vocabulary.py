"""A model's own tokenizer files: what a diffusers folder's `tokenizer/` holds, and BERT's `vocab.txt`."""

import json
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

from latentkit.checkpoints.storage.archive import refuse_other
from latentkit.errors import InputError
from latentkit.model.conditioners.tokenizer import END, START, byte_pairs, clip_tokenizer, from_json, word_pieces

MOST_BYTES = 1 << 26
ALL = "tokenizer.json"
BERT = (ALL, "vocab.txt")


class Vocabulary(NamedTuple):
    """A tokenizer's JSON text (None: the one that the package ships) and the id of its padding (None: the end)."""

    tokenizer: str | None
    pad: int | None


def read_clip(folder: Path) -> Vocabulary:
    """The CLIP tokenizer in a folder, new files or old ones; InputError names what is missing or wrong."""
    if (folder / ALL).is_file():
        tokenizer = _frameless(from_json(_text(folder / ALL)))
    else:
        vocabulary = _json(folder / "vocab.json")
        lines = _text(folder / "merges.txt").splitlines()
        merges = [tuple(line.split()) for line in lines if line and not line.startswith("#version")]
        fits = all(isinstance(n, int) and not isinstance(n, bool) for n in vocabulary.values())
        if not fits or any(len(pair) != 2 for pair in merges):
            raise InputError(f"{folder}: vocab.json and merges.txt hold no byte pairs")
        try:
            tokenizer = byte_pairs(vocabulary, [(first, second) for first, second in merges])
        except Exception as error:
            raise InputError(f"{folder}: vocab.json and merges.txt do not belong together: {error}") from None
    pad = tokenizer.token_to_id(_pad(folder))
    text, end = tokenizer.to_str(), tokenizer.token_to_id(END)
    return Vocabulary(None if is_shipped(text) else text, None if pad == end else pad)


def _frameless(tokenizer: Any) -> Any:
    """Without the cutting and padding that its file asks for: conditioners frame windows themselves."""
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def _pairs(text: str) -> tuple[Any, ...]:
    """Vocabulary, merges and further tokens of a tokenizer's JSON text.

    A padding that is a word of the vocabulary (SD 2's "!") adds nothing.
    """
    whole = json.loads(text)
    model = whole.get("model", {})
    merges = [" ".join(pair) if isinstance(pair, list) else pair for pair in model.get("merges", [])]
    vocabulary = model.get("vocab") or {}
    added = {token["content"] for token in whole.get("added_tokens", [])}
    return vocabulary, merges, added - set(vocabulary)


def is_shipped(text: str) -> bool:
    """Whether a tokenizer's JSON text is CLIP's own, which the package ships."""
    return _pairs(text) == _shipped()


@cache
def _shipped() -> tuple[Any, ...]:
    return _pairs(clip_tokenizer().to_str())


def _pad(folder: Path) -> str:
    """The padding token that the folder names; the end token otherwise."""
    for name in ("special_tokens_map.json", "tokenizer_config.json"):
        if (folder / name).is_file():
            token = _json(folder / name).get("pad_token")
            token = token.get("content") if isinstance(token, dict) else token
            if isinstance(token, str):
                return token
    return END


def write_clip(folder: Path, vocabulary: Vocabulary, length: int) -> None:
    """Every file that any version of transformers looks for, with start and end put around a text."""
    from tokenizers import processors

    tokenizer = from_json(vocabulary.tokenizer or clip_tokenizer().to_str())
    start, end = tokenizer.token_to_id(START), tokenizer.token_to_id(END)
    pad = END if vocabulary.pad is None else tokenizer.id_to_token(vocabulary.pad)
    tokenizer.post_processor = processors.RobertaProcessing(
        (END, end), (START, start), trim_offsets=False, add_prefix_space=False
    )
    named = {"bos_token": START, "eos_token": END, "unk_token": END, "pad_token": pad}
    vocab, merges, _ = _pairs(tokenizer.to_str())
    config = {"tokenizer_class": "CLIPTokenizer", "model_max_length": length, "do_lower_case": True, **named}
    files = {
        ALL: tokenizer.to_str(),
        "vocab.json": json.dumps(vocab, ensure_ascii=False),
        "merges.txt": "\n".join(["#version: 0.2", *merges, ""]),
        "special_tokens_map.json": json.dumps(named, indent=2),
        "tokenizer_config.json": json.dumps(config, indent=2),
    }
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (folder / name).write_text(text, encoding="utf-8")


def has_bert(folder: Path) -> bool:
    """Whether a folder has a file that `read_bert` takes."""
    return any((folder / name).is_file() for name in BERT)


def read_bert(path: Path) -> str:
    """JSON text of BERT's tokenizer from its vocabulary: `vocab.txt`, a `tokenizer.json`, or a folder with either."""
    if path.is_dir():
        if not has_bert(path):
            raise InputError(f"folder {path} holds neither {ALL} nor vocab.txt", exit_code=2)
        path = next(path / name for name in BERT if (path / name).is_file())
    text = _text(path)
    if path.suffix == ".json":
        return str(from_json(text).to_str())
    return str(word_pieces({line: number for number, line in enumerate(text.removesuffix("\n").split("\n"))}).to_str())


def write_bert(folder: Path, text: str, length: int) -> None:
    """BERT's vocabulary of a tokenizer's JSON text, in every file that transformers looks for."""
    vocab = from_json(text).get_vocab()
    named = {"cls_token": "[CLS]", "mask_token": "[MASK]", "pad_token": "[PAD]", "sep_token": "[SEP]"}
    config = {"tokenizer_class": "BertTokenizer", "model_max_length": length, "do_lower_case": True, **named}
    files = {
        ALL: text,
        "vocab.txt": "\n".join(sorted(vocab, key=lambda word: vocab[word])) + "\n",
        "tokenizer_config.json": json.dumps(config | {"unk_token": "[UNK]"}, indent=2),
    }
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (folder / name).write_text(content, encoding="utf-8")


def _text(path: Path) -> str:
    try:
        refuse_other(path)
        if path.stat().st_size > MOST_BYTES:
            raise InputError(f"{path}: is larger than {MOST_BYTES >> 20} MB: no tokenizer is")
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror or error}") from None
    except UnicodeDecodeError:
        raise InputError(f"{path}: is no text") from None


def _json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(_text(path))
    except (json.JSONDecodeError, RecursionError) as error:
        raise InputError(f"{path}: is not JSON: {error}") from None
    if not isinstance(value, dict):
        raise InputError(f"{path}: holds no named values")
    return value
