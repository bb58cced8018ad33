"""What a picture file says of its making, and how little of it is believed."""

import json
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from latentkit.applications import metadata
from latentkit.applications.metadata import MAX_RECORD, Machine, Record, a1111, chunks, read
from latentkit.applications.request import Request
from latentkit.data.pictures import to_png
from latentkit.diffusion.samplers.driver import split_name
from latentkit.diffusion.schedule import NoiseSchedule
from latentkit.diffusion.spacing import space
from latentkit.errors import InputError

MACHINE = Machine(latentkit="0.1.0", torch="2.13.0", device="x86_64", threads=2, dtype="bfloat16")
REQUEST = Request(
    task="text-to-image",
    prompt="red heart",
    negative="blue",
    seed=7,
    width=64,
    height=48,
    sampler="dpm++2m",
    spacing="karras",
    steps=12,
    guidance_scale=2.5,
    guidance_low=0.0,
    guidance_high=1e9,
)
RECORD = Record(request=REQUEST, model="emoji", digest="ab" * 32, row=1, batch=4, machine=MACHINE)


def png(text: dict[str, str]) -> bytes:
    return to_png(torch.zeros(3, 8, 8), text)


def test_the_line_that_other_programs_read() -> None:
    assert a1111(RECORD) == (
        "red heart\nNegative prompt: blue\n"
        "Steps: 12, Sampler: DPM++ 2M, Schedule type: Karras, CFG scale: 2.5, Seed: 7, Size: 64x48, "
        "Model hash: ababababab, Model: emoji, Version: latentkit 0.1.0"
    )
    odd = RECORD.model_copy(update={"model": "red, green: blue", "digest": ""})
    assert 'Model: "red, green: blue", Version' in a1111(odd)
    assert "Model hash" not in a1111(odd)


def test_a_record_is_read_back_exactly() -> None:
    assert read(png(chunks(RECORD)), "a.png") == RECORD
    words = RECORD.model_copy(update={"request": REQUEST.model_copy(update={"prompt": "Grüße, 猫 😀\nzwei"})})
    assert read(png(chunks(words)), "a.png") == words


def changed(**fields: Any) -> str:
    document = json.loads(RECORD.model_dump_json(exclude_none=True))
    for name, value in fields.items():
        *outer, last = name.split("__")
        place = document
        for part in outer:
            place = place[part]
        place[last] = value
    return json.dumps(document)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "does not say how it was drawn"),
        ("{", "record is invalid"),
        ("[" * 50_000, "record is invalid"),
        ("x" * (MAX_RECORD + 1), "at most"),
        (changed(format=2), "format 2; this version reads format 1"),
        (changed(run="rm"), "'run' is unknown"),
        (changed(request__path="/etc/passwd"), "'request.path' is unknown"),
        (changed(request__init="/etc/passwd"), "a picture is given as"),
        (changed(request__steps="12"), "request.steps"),
        (changed(digest="../x"), "digest"),
        (changed(batch=33), "batch"),
        (changed(row=4), "row 4 of a batch of 4"),
        (changed(machine__dtype="code"), "machine.dtype"),
        (changed(machine__threads=10**9), "machine.threads"),
        (changed(model="x" * 301), "model"),
    ],
)
def test_hostile_records(text: str | None, message: str) -> None:
    with pytest.raises(InputError, match=message):
        read(png({} if text is None else {"latentkit": text}), "a.png")


def test_what_is_no_png() -> None:
    whole = png(chunks(RECORD))
    for data in (b"", b"GIF89a", whole[:20], whole[:60]):
        with pytest.raises(InputError):
            read(data, "a.png")


def test_a_chunk_that_unfolds_is_not_unfolded(tmp_path: Any) -> None:
    from PIL.PngImagePlugin import PngInfo

    info = PngInfo()
    info.add_text("latentkit", " " * 5_000_000, zip=True)
    Image.new("RGB", (8, 8)).save(tmp_path / "bomb.png", pnginfo=info)
    with pytest.raises(InputError):
        read((tmp_path / "bomb.png").read_bytes(), "bomb.png")


def test_the_names_that_other_programs_read_mean_our_samplers_and_spacings() -> None:
    for own, theirs in metadata.A1111_SAMPLERS.items():
        assert split_name(theirs) == (own, None)
    schedule = NoiseSchedule(kind="scaled_linear")
    for own, theirs in metadata.A1111_SPACINGS.items():
        if own not in ("uniform", "beta_sigma"):  # words that mean other things to ComfyUI, or to us
            assert np.array_equal(space(theirs, schedule, 10), space(own, schedule, 10))
