"""`latentkit samplers` and `compare-samplers`: every sampler told of, and drawn."""

import json
from pathlib import Path

import pytest
from PIL import Image
from tiny import tiny_model
from typer.testing import CliRunner

from latentkit.applications.compare_samplers import LIMIT_SAMPLER, Drawn, compare, evaluations_until
from latentkit.applications.request import ask
from latentkit.checkpoints.files import Model, save_model
from latentkit.cli import application
from latentkit.diffusion.samplers.driver import table
from latentkit.diffusion.spacing import SPACINGS
from latentkit.errors import InputError


def told(*words: str) -> str:
    done = CliRunner().invoke(application(), words, catch_exceptions=False)
    assert done.exit_code == 0
    return done.stdout


def test_the_table_has_a_line_for_each() -> None:
    lines = told("samplers").splitlines()
    assert [line.split()[0] for line in lines[1:]] == list(table())
    rows = json.loads(told("samplers", "--json"))
    assert [(row["name"], row["order"], row["random"]) for row in rows] == [
        (name, entry.order or None, entry.stochastic) for name, entry in table().items()
    ]
    rows = json.loads(told("samplers", "--spacings", "--json"))
    assert {row["name"] for row in rows} == set(SPACINGS)
    assert "ddim_uniform" in next(row for row in rows if row["name"] == "leading")["elsewhere"]


def test_a_sheet_is_drawn_with_distances(tmp_path: Path) -> None:
    save_model(tmp_path / "tiny.safetensors", tiny_model(), {})
    model = ("-m", str(tmp_path / "tiny.safetensors"))
    words = ("--sampler", "euler", "--sampler", "DPM++ 2M Karras", "--sampler", "euler_ancestral", "--steps", "2")
    *lines, path = told(
        "compare-samplers", "red", *model, *words, "--steps", "3", "-o", str(tmp_path), "--json"
    ).splitlines()
    rows = [json.loads(line) for line in lines]
    assert [(row["sampler"], row["spacing"], row["steps"]) for row in rows] == [
        (name, spacing, steps)
        for name, spacing in (("euler", None), ("dpm++2m", "karras"), ("euler_ancestral", None))
        for steps in (2, 3)
    ]
    assert all((row["distance"] is None) == (row["sampler"] == "euler_ancestral") for row in rows)
    assert Image.open(path).width > Image.open(path).height * 0.3


def test_distances_fall_to_zero_at_the_limit_and_evaluations_are_counted() -> None:
    model = Model(tiny_model(), {})
    requests = [ask(prompt="red", seed=seed, guidance_scale=1.0) for seed in (1, 2)]
    drawn = [
        event for event in compare(model, requests, [(LIMIT_SAMPLER, None)], [2, 8, 200]) if isinstance(event, Drawn)
    ]
    assert [each.evaluations for each in drawn] == [2, 14, 398]
    few, more, limit = (float(each.distance.mean()) for each in drawn if each.distance is not None)
    assert limit == 0 < more < few
    assert evaluations_until(drawn, (few + more) / 2) == 14
    assert evaluations_until(drawn, 2 * few) == 2
    assert evaluations_until(drawn[:1], few / 2) is None


def test_an_unknown_sampler_is_refused_before_anything_is_drawn() -> None:
    with pytest.raises(InputError, match=r"eulr.*euler"):
        next(compare(Model(tiny_model(), {}), [ask(seed=0)], [("eulr", None)], [2]))
