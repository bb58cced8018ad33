"""Files beside the weights: configs of towers, tokenizers of all ages, textual inversions."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from latentkit.checkpoints.adapters.inversions import Inversion, inversion, read_inversion
from latentkit.checkpoints.names.tower_configs import image_config, image_json, text_config, text_json
from latentkit.checkpoints.storage.vocabulary import ALL, Vocabulary, read_bert, read_clip, write_clip
from latentkit.errors import InputError
from latentkit.model.conditioners.clip import REFINER_TEXT, SD1_TEXT, SD2_TEXT, SDXL_TEXT
from latentkit.model.conditioners.tokenizer import END, PIECES, START, byte_pairs, word_pieces
from latentkit.nets.clip import VIT_H_IMAGE, VIT_L_IMAGE, ClipImageConfig, ClipTextConfig

TOWERS = {"SD 1": SD1_TEXT.towers, "SD 2": SD2_TEXT.towers, "XL": SDXL_TEXT.towers, "refiner": REFINER_TEXT.towers}
TEXT = text_json(SD1_TEXT.towers[0])
LETTERS = {letter: number for number, letter in enumerate([*"abct", *(f"{x}</w>" for x in "abct"), "ca", "cat</w>"])}
SMALL = {**LETTERS, START: 10, END: 11, "!": 12}
MERGES = [("c", "a"), ("ca", "t</w>")]


@pytest.mark.parametrize("family", TOWERS)
def test_configs_of_text_towers_come_back(family: str) -> None:
    for tower in TOWERS[family]:
        written = json.loads(json.dumps(text_json(tower)))
        assert text_config("it", written, pad=tower.pad, penultimate=not tower.final_norm) == tower


@pytest.mark.parity
@pytest.mark.parametrize("family", TOWERS)
def test_transformers_reads_the_configs(family: str) -> None:
    transformers: Any = pytest.importorskip("transformers")
    for tower in TOWERS[family]:
        with torch.device("meta"):
            model = transformers.CLIPTextModelWithProjection(transformers.CLIPTextConfig(**text_json(tower)))
        config = model.config
        assert (config.hidden_size, config.num_hidden_layers) == (tower.width, tower.layers)
        assert (config.intermediate_size, config.hidden_act) == (4 * tower.width, tower.activation)
        assert (config.bos_token_id, config.eos_token_id) == (49406, 49407)
        assert model.text_projection.out_features == (tower.projection or tower.width)


@pytest.mark.parity
def test_configs_that_transformers_itself_wrote_are_read() -> None:
    transformers: Any = pytest.importorskip("transformers")
    plain = transformers.CLIPTextConfig(hidden_size=32, num_attention_heads=4, intermediate_size=37).to_dict()
    found = text_config("it", plain, pad=0, penultimate=False)
    assert found == ClipTextConfig(width=32, layers=12, heads=4, hidden=37, pad=0)
    pooled = text_config("it", {**plain, "architectures": ["CLIPTextModelWithProjection"]}, pad=0, penultimate=True)
    assert (pooled.projection, pooled.skip, pooled.final_norm) == (512, 1, False)
    picture = transformers.CLIPVisionConfig(patch_size=14, projection_dim=64).to_dict()
    assert image_config("it", picture) == ClipImageConfig(width=768, layers=12, heads=12, projection=64)


@pytest.mark.parametrize("tower", [VIT_L_IMAGE, VIT_H_IMAGE, ClipImageConfig(size=28, hidden=50)])
def test_configs_of_image_towers_come_back(tower: ClipImageConfig) -> None:
    assert image_config("it", json.loads(json.dumps(image_json(tower)))) == tower


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden_act": "relu"}, "it: hidden_act is 'relu'; Input should be 'quick_gelu' or 'gelu'"),
        ({"layer_norm_eps": 1e-6}, "layer_norm_eps is '1e-06'; only 1e-05 is run"),
        ({"num_attention_heads": 5}, "it: CLIP text tower has width 768, which is no multiple of its 5 heads"),
        ({"num_hidden_layers": "12"}, "num_hidden_layers is '12'; Input should be a valid integer"),
        ({"hidden_size": None}, "hidden_size is 'None'"),
    ],
)
def test_fields_that_cannot_be_run_are_named(change: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        text_config("it", {**TEXT, **change}, pad=None, penultimate=False)


def test_missing_fields_and_other_channels_are_named() -> None:
    rest = {name: value for name, value in TEXT.items() if name not in ("hidden_size", "num_hidden_layers")}
    with pytest.raises(InputError, match=r"fields \['hidden_size', 'num_hidden_layers'\] are missing"):
        text_config("it", rest, pad=None, penultimate=False)
    with pytest.raises(InputError, match="num_channels is '4'; only 3"):
        image_config("it", {**image_json(VIT_L_IMAGE), "num_channels": 4})


def test_a_context_that_no_pipeline_takes_is_refused() -> None:
    with pytest.raises(InputError, match="has skip 1 and final_norm True"):
        text_json(replace(SD1_TEXT.towers[0], skip=1))


def forget(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).unlink()


@pytest.fixture(scope="module")
def shipped(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    write_clip(folder, Vocabulary(None, 0), 77)
    return folder


@pytest.mark.parametrize(
    "kept", [[ALL, "tokenizer_config.json"], ["vocab.json", "merges.txt", "special_tokens_map.json"]]
)
def test_the_shipped_tokenizer_is_known_again_from_files_new_and_old(
    tmp_path: Path, shipped: Path, kept: list[str]
) -> None:
    assert len(list(shipped.iterdir())) == 5
    for name in kept:
        (tmp_path / name).symlink_to(shipped / name)
    assert read_clip(tmp_path) == Vocabulary(None, 0)


@pytest.mark.parity
@pytest.mark.parametrize("gone", [[], [ALL], ["vocab.json", "merges.txt", "special_tokens_map.json"]])
def test_transformers_reads_the_tokenizer_files(tmp_path: Path, gone: list[str]) -> None:
    transformers: Any = pytest.importorskip("transformers")
    write_clip(tmp_path, Vocabulary(byte_pairs(SMALL, MERGES).to_str(), 12), 7)
    forget(tmp_path, *gone)
    theirs = transformers.CLIPTokenizer.from_pretrained(tmp_path)
    assert theirs(["a cat b", "cat " * 9], padding="max_length", truncation=True)["input_ids"] == [
        [10, 4, 9, 5, 11, 12, 12],
        [10, 9, 9, 9, 9, 9, 11],
    ]


def test_cutting_and_padding_that_a_file_asks_for_are_left_out(tmp_path: Path) -> None:
    tokenizer = byte_pairs(SMALL, MERGES)
    tokenizer.enable_truncation(2)
    tokenizer.enable_padding(length=9)
    (tmp_path / ALL).write_text(tokenizer.to_str(), encoding="utf-8")
    read = json.loads(read_clip(tmp_path).tokenizer or "")
    assert read["truncation"] is None
    assert read["padding"] is None


@pytest.mark.parametrize("gone", [[], [ALL]])
def test_a_tokenizer_of_its_own_comes_back(tmp_path: Path, gone: list[str]) -> None:
    write_clip(tmp_path, Vocabulary(byte_pairs(SMALL, MERGES).to_str(), 12), 7)
    forget(tmp_path, *gone)
    text, pad = read_clip(tmp_path)
    assert pad == 12
    assert text is not None
    from tokenizers import Tokenizer

    assert Tokenizer.from_str(text).encode("a cat b", add_special_tokens=False).ids == [4, 9, 5]


def test_one_token_more_makes_it_a_tokenizer_of_its_own(shipped: Path, tmp_path: Path) -> None:
    whole = json.loads((shipped / ALL).read_text(encoding="utf-8"))
    whole["added_tokens"].append({**whole["added_tokens"][0], "id": 49408, "content": "<cat-toy>"})
    (tmp_path / ALL).write_text(json.dumps(whole), encoding="utf-8")
    text, pad = read_clip(tmp_path)
    assert text is not None
    assert pad is None


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("vocab.json", None, "vocab.json: cannot be read: No such file"),
        ("vocab.json", "[1]", "holds no named values"),
        ("vocab.json", "{", "is not JSON"),
        ("vocab.json", "[" * 100_000, "is not JSON"),
        ("vocab.json", '{"a": "b"}', "hold no byte pairs"),
        ("merges.txt", "a b c", "hold no byte pairs"),
        ("merges.txt", "x y", "do not belong together"),
        ("merges.txt", b"\xff\xfe", "is no text"),
        (ALL, "{}", "tokenizer cannot be read"),
    ],
)
def test_tokenizer_files_that_cannot_be_used_are_named(
    tmp_path: Path, name: str, content: str | bytes | None, message: str
) -> None:
    write_clip(tmp_path, Vocabulary(byte_pairs(SMALL, MERGES).to_str(), None), 7)
    forget(tmp_path, ALL)
    if content is None:
        forget(tmp_path, name)
    else:
        (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(InputError, match=message):
        read_clip(tmp_path)


def test_files_too_large_for_a_tokenizer_are_not_read(tmp_path: Path) -> None:
    with open(tmp_path / ALL, "wb") as file:
        file.truncate(1 << 27)
    with pytest.raises(InputError, match="larger than 64 MB"):
        read_clip(tmp_path)


def test_berts_vocabulary_is_read_from_a_file_or_a_folder(tmp_path: Path) -> None:
    tokens = [*PIECES, "red", "##s"]
    (tmp_path / "vocab.txt").write_text("\n".join(tokens) + "\n", encoding="utf-8")
    expected = word_pieces({token: number for number, token in enumerate(tokens)}).to_str()
    assert read_bert(tmp_path) == read_bert(tmp_path / "vocab.txt") == expected
    (tmp_path / ALL).write_text(expected, encoding="utf-8")
    forget(tmp_path, "vocab.txt")
    assert read_bert(tmp_path) == expected
    forget(tmp_path, ALL)
    with pytest.raises(InputError, match=r"holds neither tokenizer\.json nor vocab\.txt"):
        read_bert(tmp_path)


ONE, TWO = torch.randn(3, 8), torch.randn(3, 12)
SAVE: dict[str, Callable[[Any, Path], None]] = {
    ".pt": torch.save,
    ".bin": torch.save,
    ".safetensors": lambda content, path: save_file(content, path),
}


@pytest.mark.parametrize(
    ("kind", "content", "name", "vectors"),
    [
        (".pt", {"string_to_token": {"*": 265}, "string_to_param": {"*": ONE}, "name": "toy", "step": 9}, "toy", [ONE]),
        (".pt", {"string_to_param": {"*": torch.nn.Parameter(ONE)}, "name": None}, "file", [ONE]),
        (".bin", {"<toy>": ONE[0]}, "<toy>", [ONE[:1]]),
        (".safetensors", {"<toy>": ONE}, "<toy>", [ONE]),
        (".safetensors", {"emb_params": ONE}, "emb_params", [ONE]),
        (".safetensors", {"clip_g": TWO, "clip_l": ONE}, "file", [ONE, TWO]),
        (".safetensors", {"clip_g": TWO, "clip_l": ONE, "extra": TWO + 1}, "file", [ONE, TWO]),
    ],
)
def test_every_layout_of_textual_inversions(
    tmp_path: Path, kind: str, content: dict[str, Any], name: str, vectors: list[torch.Tensor]
) -> None:
    path = tmp_path / f"file{kind}"
    SAVE[kind](content, path)
    found = read_inversion(path)
    assert found.name == ("file" if name == "emb_params" else name)
    assert len(found.vectors) == len(vectors)
    assert all(torch.equal(one, two) for one, two in zip(found.vectors, vectors))
    assert read_inversion(path, "other").name == "other"


class Gadget:
    """A pickle that would call a function."""

    def __reduce__(self) -> tuple[Any, ...]:
        return (print, ("executed",))


def test_pickles_that_would_run_code_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.save({"*": Gadget()}, tmp_path / "file.pt")
    with pytest.raises(InputError, match="nothing was run"):
        read_inversion(tmp_path / "file.pt")
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("name", ["file.pt", "file.safetensors", "file.bin"])
@pytest.mark.parametrize("content", [b"", b"rubbish", b"PK\x03\x04 rubbish", b"\x80\x02."])
def test_damaged_files_are_named(tmp_path: Path, name: str, content: bytes) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=f"{name}: is "):
        read_inversion(tmp_path / name)


def test_missing_and_enormous_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="cannot be read: No such file"):
        read_inversion(tmp_path / "none.pt")
    with open(tmp_path / "large.pt", "wb") as file:
        file.truncate(1 << 27)
    with pytest.raises(InputError, match="larger than 64 MB"):
        read_inversion(tmp_path / "large.pt")


@pytest.mark.parametrize(
    "content",
    [
        ONE, [], {}, {"a": ONE, "b": ONE}, {"a": 3}, {"a": torch.ones(2, 2, 2)}, {"a": torch.ones(2, dtype=torch.long)},
        {"clip_l": ONE, "clip_g": TWO[:2]}, {"string_to_param": {"*": "x"}}, {"string_to_param": {}},
    ],
)  # fmt: skip
def test_what_is_no_textual_inversion_is_refused(content: Any) -> None:
    with pytest.raises(InputError, match="it: is no textual inversion"):
        inversion("it", content)


def test_an_inversion_is_a_name_and_vectors() -> None:
    assert Inversion("a", (ONE,)).name == "a"
