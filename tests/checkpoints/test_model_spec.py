"""Stability's ModelSpec in the files that we write: what each field says, and that equal models are equal bytes."""

import hashlib
from datetime import UTC, datetime
from pathlib import Path

import family
import pytest
from test_lora_files import Q, changes, made

from latentkit.checkpoints.adapters.lora_files import write_lora
from latentkit.checkpoints.layouts import open_model, write_model
from latentkit.checkpoints.ldm_file import write_single
from latentkit.checkpoints.storage.archive import read_archive
from latentkit.checkpoints.storage.tensors import model_spec

MUST = {"sai_model_spec", "architecture", "implementation", "title", "date", "hash_sha256"}


def spec(path: Path) -> dict[str, str]:
    """The fields of a file, of which the hash is proven: of all bytes behind the header."""
    told = {key: value for key, value in read_archive(path).metadata.items() if key.startswith("modelspec.")}
    found = {key.removeprefix("modelspec."): value for key, value in told.items()}
    content = path.read_bytes()
    behind = content[8 + int.from_bytes(content[:8], "little") :]
    assert found["hash_sha256"] == f"0x{hashlib.sha256(behind).hexdigest()}"
    return found


@pytest.mark.parametrize("name", ["SD 2", "refiner"])
def test_single_files_say_what_they_are(name: str, tmp_path: Path) -> None:
    write_single(tmp_path / "file.safetensors", family.model(name), "A title", licence="MIT", date="2023-07-16")
    found = spec(tmp_path / "file.safetensors")
    assert found.keys() == MUST | {"resolution", "prediction_type", "license"}
    assert (found["sai_model_spec"], found["title"], found["license"]) == ("1.0.1", "A title", "MIT")
    assert (found["date"], found["resolution"]) == ("2023-07-16", "32x32")
    assert found["prediction_type"] == {"SD 2": "v", "refiner": "epsilon"}[name]


@pytest.mark.parametrize("layout", ["kohya", "diffusers", "ldm"])
def test_loras_say_what_they_are(layout: str, tmp_path: Path) -> None:
    model = made()
    write_lora(tmp_path / "style.safetensors", model, changes(model, Q), layout)  # type: ignore[arg-type]
    found = spec(tmp_path / "style.safetensors")
    assert found.keys() == MUST
    assert (found["title"], found["architecture"]) == ("style", "latent-diffusion/lora")


def test_the_date_is_the_models_own_and_converting_again_gives_the_same_bytes(tmp_path: Path) -> None:
    first, again = tmp_path / "one.safetensors", tmp_path / "two.safetensors"
    write_single(first, family.model("SD 1"), "one", date="2023-07-16T18:13:38Z")
    opened = open_model(first)
    write_model(again, opened._replace(provenance={"name": "one", "date": "2023-07-16T18:13:38Z"}), "ldm")
    assert first.read_bytes() == again.read_bytes()


def test_a_model_without_a_date_gets_the_day(monkeypatch: pytest.MonkeyPatch) -> None:
    before = datetime.now(UTC).date().isoformat()
    for said in (None, "", "yesterday", 7, "\x1b[2J"):
        assert before <= model_spec("x", "x", said)["modelspec.date"] <= datetime.now(UTC).date().isoformat()
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "1690000000")
    assert model_spec("x", "x")["modelspec.date"] == "2023-07-22"
    assert model_spec("x", "x", "2020-01-01")["modelspec.date"] == "2020-01-01"
