"""Options of Stable Diffusion's family on the command line: into the request, into the record, and drawn again."""

import json
import shlex
from collections.abc import Callable
from pathlib import Path

import family
import pytest
import torch
from safetensors.torch import save_file

from latentkit.applications.metadata import read
from latentkit.checkpoints.files import save_model
from latentkit.checkpoints.storage.digest import Digest
from latentkit.data.pictures import to_png

Run = Callable[..., int]


def test_a_base_with_its_refiner_an_inversion_and_sizes(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("XL", "refiner"):
        save_model(f"{name}.safetensors", family.model(name), {}, torch.float32)
    for name in ("a", "b"):
        save_file({"clip_l": torch.ones(2, 32), "clip_g": torch.ones(2, 48)}, f"{name}.safetensors")
    options = shlex.split(
        "-m XL.safetensors --steps 5 --seed 1 --sampler euler --negative dog --original-size 64x48 --crop 1,2 "
        "--target-size 40 --aesthetic 7 --negative-aesthetic 1.5 --refiner refiner.safetensors --refiner-switch 0.6 "
        "--clip-skip 2 --embedding a.safetensors --embedding 'b.safetensors:<b>' --json"
    )
    assert run("generate", "a cat <b>", *options) == 0
    shown = capsys.readouterr()
    assert "no prompt says" not in shown.err
    path = json.loads(shown.out)["path"]
    request = read(Path(path).read_bytes(), "x").request
    got = request.model_dump(mode="json", exclude_none=True)
    assert [name for _, name in got["embedding"]] == ["a", "<b>"]
    assert got["refiner"] == Digest(Path("refiner.safetensors"))()
    wanted = {
        "original_size": [64, 48], "crop": [1, 2], "target_size": [40, 40], "aesthetic_score": 7.0,
        "negative_aesthetic_score": 1.5, "refiner_switch": 0.6, "clip_skip": 2,
    }  # fmt: skip
    assert {name: got[name] for name in wanted} == wanted
    replayed = ["replay", path, "-m", "XL.safetensors"]
    assert run(*replayed, "--embedding", "a.safetensors") == 2
    assert "needs the refiner whose file has" in capsys.readouterr().err
    assert run(*replayed, "--refiner", "XL.safetensors") == 2
    assert "XL.safetensors is not the refiner of" in capsys.readouterr().err
    assert run(*replayed, "--refiner", "refiner.safetensors") == 2
    assert "needs the textual inversion whose file has" in capsys.readouterr().err
    assert run(*replayed, "--refiner", "refiner.safetensors", "--embedding", "a.safetensors") == 0


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--crop 1", "crop '1' is not LEFT,TOP in pixels"),
        ("--original-size big", "size 'big' is not WIDTHxHEIGHT"),
        ("--refiner none.safetensors", "no model 'none.safetensors'"),
        ("--embedding none.pt:x", "none.pt: cannot be read"),
        ("--variation none.png", "none.png: cannot be read"),
        ("--variation seen.png", "this model takes no variation"),
        ("--clip-skip 2", "this model takes no clip skip"),
    ],
)
def test_wrong_input(words: str, message: str, run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    Path("seen.png").write_bytes(to_png(torch.zeros(3, 16, 16)))
    assert run("generate", "x", *shlex.split(words)) == 2
    assert message in capsys.readouterr().err
