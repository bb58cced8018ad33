"""The paper's tables in miniature: equal time, killed and taken up again, and what is refused."""

import json
import shutil
import signal
import sys
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
import torch
import yaml
from small_fit import folder_of

from latentkit import cli
from latentkit.applications.fit.measure import Measured
from latentkit.applications.paper import arms, compression, first_stages
from latentkit.applications.paper.arms import Asked, costs, data_recipe, planned, spent
from latentkit.applications.paper.figure import curves
from latentkit.applications.paper.table import markdown
from latentkit.data.source import open_source
from latentkit.errors import InputError
from latentkit.evaluation.metrics.kid import kid
from latentkit.model.first_stage import FirstStage
from latentkit.training.diffusion import DiffusionObjective
from latentkit.training.first_stage.autoencoder import AutoencoderObjective
from latentkit.training.run.interrupt import Stopped

TIMES = ("seconds", "thread_seconds", "computed", "training_speed", "drawing_speed")
ASKED = Asked(command="paper", data="pictures", pictures="0", size=8, minutes=1.0, seed=0)


@pytest.fixture(scope="module", autouse=True)
def small(tmp_path_factory):
    """Two downsamplings, tiny networks, pixels as features, and steps that are said to take 0.1 s."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        patch.setattr(first_stages, "CHANNELS", 8)
        patch.setattr(first_stages, "MULTIPLIERS", {2: (1,), 4: (1, 1)})
        patch.setattr(first_stages, "CODES", {2: 8, 4: 16})
        patch.setattr(first_stages, "measure_autoencoder", lambda *_: Measured(seconds=1, thread_seconds=0.1, memory=0))
        patch.setattr(compression, "CHANNELS", 8)
        patch.setattr(compression, "FACTORS", (2, 4))
        patch.setattr(compression, "LEAST_TIMED", 1)
        patch.setattr(compression, "TIMED", 0.0)
        patch.setattr(compression, "STEPS", 2)
        patch.setattr(compression, "MOST", 8)
        patch.setattr(compression, "features", lambda drawn: torch.stack([picture.flatten() for picture in drawn]))
        yield


@pytest.fixture(scope="module")
def pictures(tmp_path_factory) -> str:
    return str(folder_of(tmp_path_factory.mktemp("pictures") / "in", 24, side=8))


def first(pictures: str, folder: Path, minutes: float = 0.04) -> Path:
    """All first stages, some five steps each."""
    return first_stages.first_stages(pictures, folder, minutes=minutes, size=8)


@pytest.fixture(scope="module")
def made(pictures, tmp_path_factory) -> Path:
    return first(pictures, tmp_path_factory.mktemp("paper") / "first-stages").parent


def untimed(folder: Path) -> list[dict[str, Any]]:
    """The rows of a command's results without what differs between a run and its repetition."""
    rows = json.loads((folder / "results.json").read_text())["rows"]
    for row in rows:
        for each in (row, *row.get("points", ())):
            for name in TIMES:
                each.pop(name, None)
    return rows


def test_every_arm_gets_the_steps_that_fit_into_its_time():
    source = data_recipe("pictures", _Source([]), 8)
    both = dict(list(first_stages.recipes(source, 0, ("kl",)).items()))
    costs = {"kl-f2": 0.5, "kl-f4": 2.0}
    measured = {name: Measured(seconds=9 * c, thread_seconds=c, memory=0, micro_batch=8) for name, c in costs.items()}
    plan = planned(ASKED, 0.8, both, measured)
    assert plan.seconds == 60 * 0.8 / 2
    assert [arm.recipe.schedule.steps for arm in plan.arms] == [48, 12], "by the time that was computed"
    torch.set_num_threads(2)
    try:
        plan = planned(ASKED, 0.8, both, measured, points=4)
    finally:
        torch.set_num_threads(1)
    assert plan.seconds == 60 * 0.8
    assert [arm.recipe.schedule.steps for arm in plan.arms] == [96, 24]
    assert [arm.recipe.averaging.snapshot_every for arm in plan.arms] == [24, 6]
    for arm in plan.arms:
        schedule = arm.recipe.schedule
        assert schedule.save_every % schedule.log_every == 0, "no part of the time is lost where it is taken up"


def test_time_counts_once_though_steps_were_done_twice(tmp_path):
    lines = [
        {"step": 4, "since": 0, "seconds": 1.0, "thread_seconds": 0.5},
        {"step": 4, "save_seconds": 7.0},
        {"step": 8, "since": 4, "seconds": 10.0, "thread_seconds": 5.0},  # killed, not saved
        {"step": 8, "since": 4, "seconds": 2.0, "thread_seconds": 1.0},
        {"step": 9, "since": 8, "seconds": 4.0, "thread_seconds": 2.0},
    ]
    (tmp_path / "timings.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert spent(tmp_path) == (7.0, 3.5)


def test_first_stages_leave_table_figures_and_sheet(made, pictures):
    found = json.loads((made / "results.json").read_text())
    assert [row["name"] for row in found["rows"]] == ["kl-f2", "kl-f4", "vq-f2", "vq-f4"]
    assert found["asked"]["pictures"] == open_source(pictures).fingerprint
    assert found["machine"]["torch"] == torch.__version__
    assert found["network"] == "latentkit-random-conv-v1"
    for row in found["rows"]:
        steps = row["recipe"]["schedule"]["steps"]
        assert steps == 5
        assert row["trained_on"] == 16 * steps
        assert row["training_speed"] == pytest.approx(row["trained_on"] / row["thread_seconds"])
        assert len(row["digest"]) == 64
        assert (row["codes"] is None) == row["name"].startswith("kl")
        side = 8 // row["downsampling"]
        assert row["numbers"] == row["channels"] * side * side
        assert 0 < row["psnr"] < 100
        lines = [json.loads(line) for line in (made / row["name"] / "timings.jsonl").read_text().splitlines()]
        portions = [(line["since"], line["step"]) for line in lines if "since" in line]
        assert portions == [(step, step + 1) for step in range(steps)], "every step's time is in the journal once"
        assert not list((made / row["name"] / "samples").iterdir())
    table = (made / "table.md").read_text()
    assert "KL f2 c2 |" in table
    assert "features of latentkit-random-conv-v1" in table
    assert (made / "reconstructions.png").stat().st_size > 0


class Killed(Exception):
    pass


def killed_at(monkeypatch, objective, call: int) -> None:
    """The objective's loss raises when it is called for the `call`-th time."""
    real, calls = objective.loss, []

    def loss(self, *given):
        calls.append(1)
        if len(calls) == call:
            raise Killed
        return real(self, *given)

    monkeypatch.setattr(objective, "loss", loss)


def test_first_stages_killed_in_the_last_arm_go_on_and_end_the_same(made, pictures, tmp_path, monkeypatch):
    folder = tmp_path / "first-stages"
    with monkeypatch.context() as patch:
        killed_at(patch, AutoencoderObjective, 3 * 5 + 5)  # the fourth arm's fifth step, four are saved
        with pytest.raises(Killed):
            first(pictures, folder)
    journal = (folder / "kl-f2" / "timings.jsonl").read_bytes()
    with monkeypatch.context() as patch:
        patch.setattr(first_stages, "measure_autoencoder", None)  # by the plan
        killed_at(patch, AutoencoderObjective, 2)  # one step is left
        first(pictures, folder)
    assert untimed(folder) == untimed(made)
    assert (folder / "kl-f2" / "timings.jsonl").read_bytes() == journal
    assert (folder / "reconstructions.png").read_bytes() == (made / "reconstructions.png").read_bytes()


def test_what_was_measured_is_kept_when_it_is_stopped(pictures, tmp_path, monkeypatch):
    folder, seen = tmp_path / "first-stages", []

    def interrupted(recipe, _):
        seen.append(recipe.name)
        if len(seen) == 3:
            raise KeyboardInterrupt
        return Measured(seconds=1, thread_seconds=0.1, memory=0)

    monkeypatch.setattr(first_stages, "measure_autoencoder", interrupted)
    with pytest.raises(Stopped):
        first(pictures, folder)
    assert [path.name for path in folder.iterdir()] == ["measured.yaml"]
    first(pictures, folder)
    assert seen == ["kl-f2", "kl-f4", "vq-f2", "vq-f2", "vq-f4"]
    assert not (folder / "measured.yaml").exists(), "the plan holds it"


def test_what_was_measured_for_other_settings_is_not_taken(tmp_path):
    seen = []

    def one(name):
        seen.append(name)
        return Measured(seconds=1, memory=0)

    for minutes in (1.0, 1.0, 2.0):
        costs(tmp_path, ASKED.model_copy(update={"minutes": minutes}), ["a", "b"], one)
    assert seen == ["a", "b", "a", "b"]


@pytest.mark.parametrize(("end", "code"), [(KeyboardInterrupt(), 130), (SystemExit(143), 143)])
def test_a_signal_between_two_runs_is_answered(made, pictures, tmp_path, monkeypatch, capsys, end, code):
    def stopped(*_):
        raise end

    shutil.copytree(made, tmp_path / "first-stages")
    (tmp_path / "first-stages" / "vq-f4" / "figures.json").unlink()
    monkeypatch.setattr(first_stages, "_figures", stopped)
    with pytest.raises(Stopped) as found:
        first(pictures, tmp_path / "first-stages")
    assert found.value.code == code
    assert capsys.readouterr().err.endswith("\nstopped; run the same command to go on\n")


def test_a_signal_while_pictures_are_compared_is_answered(compared, made, pictures, tmp_path, monkeypatch, capsys):
    def stopped(*_):
        raise SystemExit(143)

    shutil.copytree(compared, tmp_path / "compression")
    (tmp_path / "compression" / "f4" / "point-00000003.json").unlink()
    monkeypatch.setattr(compression, "_point", stopped)
    with pytest.raises(Stopped):
        compression.compression(pictures, tmp_path / "compression", minutes=0.03, trained=made, size=8)
    assert capsys.readouterr().err.endswith("\nstopped; run the same command to go on\n")


def test_a_signal_in_training_is_answered_once(pictures, tmp_path, monkeypatch, capsys):
    real = AutoencoderObjective.loss

    def loss(self, *given):
        signal.raise_signal(signal.SIGINT)
        return real(self, *given)

    monkeypatch.setattr(AutoencoderObjective, "loss", loss)
    with pytest.raises(Stopped):
        compression.compression(pictures, tmp_path / "compression", minutes=0.001, trained=tmp_path / "none", size=8)
    assert capsys.readouterr().err.count("run the same command to go on") == 1


def test_a_signal_in_a_measurement_is_answered(pictures, tmp_path, monkeypatch, capsys):
    real = DiffusionObjective.loss

    def loss(self, *given):
        signal.raise_signal(signal.SIGINT)
        return real(self, *given)

    monkeypatch.setattr(DiffusionObjective, "loss", loss)
    with pytest.raises(Stopped):
        compression.compression(pictures, tmp_path / "compression", minutes=0.001, trained=tmp_path / "none", size=8)
    assert "after step" not in (said := capsys.readouterr().err)
    assert said.endswith("\nstopped while steps were tried; run the same command to go on\n")


def test_other_settings_are_refused(made, pictures, tmp_path):
    before = (made / "plan.yaml").read_bytes()
    with pytest.raises(InputError, match=r"other settings.*\n  minutes: 0\.04 -> 0\.05\n.*Nothing was changed"):
        first(pictures, made, minutes=0.05)
    others = folder_of(tmp_path / "in", 12, side=8)
    shutil.rmtree(made.parent / "moved", ignore_errors=True)
    with pytest.raises(InputError, match=r"\n  data: .* -> .*\n  pictures: "):
        first(str(others), made)
    assert (made / "plan.yaml").read_bytes() == before
    with pytest.raises(InputError, match=r"there already and holds no plan\.yaml"):
        first(pictures, others)
    with pytest.raises(InputError, match="size 10 is no multiple of 4") as error:
        first_stages.first_stages(pictures, tmp_path / "new", minutes=1, size=10)
    assert error.value.exit_code == 2
    assert not (tmp_path / "new").exists()


def test_a_damaged_plan_is_refused(pictures, tmp_path):
    plan = tmp_path / "plan.yaml"
    plan.write_text("{a: [")
    with pytest.raises(InputError, match="is not YAML"):
        first(pictures, tmp_path)
    plan.write_text(yaml.safe_dump({"format": 2}))
    with pytest.raises(InputError, match=r"plan\.yaml"):
        first(pictures, tmp_path)


class _Source:
    def __init__(self, splits: list[str]) -> None:
        self.items = [type("Item", (), {"split": split}) for split in splits]


def test_splits_of_the_data_are_kept():
    assert data_recipe("x", _Source(["train", "holdout", "test"]), 8).holdout == "holdout"
    assert data_recipe("x", _Source(["train", "holdout"]), 8).split == "train"
    assert data_recipe("x", _Source(["train", "test"]), 8).holdout is None


@pytest.fixture(scope="module")
def compared(made, pictures, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("paper") / "compression"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(compression, "_measured", lambda *_: Measured(seconds=1, thread_seconds=0.1, memory=0))
        return compression.compression(pictures, folder, minutes=0.03, trained=made, size=8).parent


def test_compression_leaves_tables_curves_and_sheet(compared, made):
    found = json.loads((compared / "results.json").read_text())
    assert [row["name"] for row in found["rows"]] == ["f1", "f2", "f4"]
    assert [row["latents"] for row in found["rows"]] == [[3, 8, 8], [2, 4, 4], [3, 2, 2]]
    assert found["asked"]["first_stages"]["2"] == json.loads((made / "results.json").read_text())["rows"][0]["digest"]
    for row in found["rows"]:
        steps = row["recipe"]["schedule"]["steps"]
        assert steps == 4
        assert [point["step"] for point in row["points"]] == [1, 2, 3, 4]
        assert [point["drawn"] for point in row["points"]] == [8, 8, 8, 16]
        assert row["kid"] == row["points"][-1]["kid"]
        assert row["points"][0]["computed"] == pytest.approx(row["thread_seconds"] / 4)
        assert len({point["kid"]["mean"] for point in row["points"]}) == 4, "each by the weights of its time"
    assert "held-out" not in (compared / "table.md").read_text(), "there are too few of them"
    ElementTree.parse(compared / "kid.svg")
    assert (compared / "drawn.png").stat().st_size > 0


def test_compression_killed_goes_on_and_ends_the_same(compared, made, pictures, tmp_path, monkeypatch):
    folder = tmp_path / "compression"
    shutil.copytree(compared, folder)
    (folder / "f4" / "model.safetensors").unlink()
    shutil.rmtree(folder / "f4" / "checkpoints")
    for path in ("table.md", "results.json", "drawn.png", "reference.json", "f2/point-00000003.json"):
        (folder / path).unlink()
    with monkeypatch.context() as patch:
        killed_at(patch, DiffusionObjective, 4 + 1)  # the last arm's steps and no others
        compression.compression(pictures, folder, minutes=0.03, trained=made, size=8)
    assert untimed(folder) == untimed(compared)


def test_compression_trains_first_stages_where_there_are_none(pictures, tmp_path):
    """Measured really, too."""
    folder = tmp_path / "compression"
    for _ in range(2):  # the same call takes up the same first stages
        compression.compression(pictures, folder, minutes=0.001, trained=tmp_path / "none", size=8)
    plan = arms.read(folder)
    assert plan is not None
    assert plan.asked.first_stages == {}
    assert all(arm.measured.thread_seconds > 0 for arm in plan.arms)
    assert sorted(path.name for path in (folder / "first-stages").iterdir() if path.is_dir()) == ["kl-f2", "kl-f4"]


def test_first_stages_of_other_pictures_are_refused(made, tmp_path):
    others = folder_of(tmp_path / "in", 12, side=8)
    with pytest.raises(InputError, match=r"were trained on .* not on these"):
        compression.compression(str(others), tmp_path / "out", minutes=1, trained=made, size=8)
    with pytest.raises(InputError, match="size 12 is no multiple of 8"):
        compression.compression(str(others), tmp_path / "out", minutes=1, trained=made, size=12)


def test_held_out_pictures_are_a_reference_where_there_are_enough(compared, tmp_path):
    few, enough = torch.randn(7, 5), torch.randn(8, 5)
    assert compression._reference(few, enough) == {"pictures": 7, "kid": None}
    found = compression._reference(enough, enough)
    assert found == {"pictures": 8, "kid": kid(enough, enough).mean}
    rows = json.loads((compared / "results.json").read_text())["rows"]
    plan = arms.read(compared)
    compression._write(tmp_path, plan, rows, found)
    assert "8 held-out pictures have a KID x 1000 of" in (tmp_path / "table.md").read_text()


def test_drawing_takes_its_part_of_the_time():
    """Two arms of 0.15 s and 0.45 s a picture and step: 5 x 10 / 3 of them is 10 s for a picture at every point."""
    source = data_recipe("pictures", _Source([]), 8)
    found = {name: compression.recipes(source, 0, {})["f1"] for name in ("a", "b")}
    measured = {name: Measured(seconds=9, thread_seconds=16 * c, memory=0) for name, c in (("a", 0.15), ("b", 0.45))}
    plan = planned(ASKED.model_copy(update={"minutes": 4.0}), 0.5, found, measured)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(compression, "STEPS", 10)
        patch.setattr(compression, "MOST", 100)
        assert compression._count(plan, 0.5) == 12
        assert compression._count(plan, 0.01) == compression.FEWEST
        assert compression._count(plan, 40.0) == 100


def test_latents_that_are_measured_have_the_arm_s_shape(pictures, monkeypatch):
    seen = []
    real = DiffusionObjective.loss

    def loss(self, turn, batch, shared):
        seen.append(self.latents(batch).shape)
        return real(self, turn, batch, shared)

    monkeypatch.setattr(DiffusionObjective, "loss", loss)
    source = open_source(pictures)
    recipe = compression.recipes(data_recipe(pictures, source, 8), 0, {})["f1"]
    found = compression._measured(recipe, FirstStage(first_stages.networks("kl")[4], 3), source)
    assert set(seen) == {(16, 3, 2, 2)}
    assert found.thread_seconds > 0


def test_tables_and_curves():
    columns = {"a": lambda row: row["x"], "long": lambda row: "1"}
    assert markdown(columns, [{"x": "22"}]) == "|  a | long |\n| -: | ---: |\n| 22 |    1 |"
    drawn = curves("time <s>", "KID", {"f1": [(1, 10.0), (2, 1.0)], "f2": [(1, -1.0), (2, 5.0)], "f4": [(1, -1.0)]})
    root = ElementTree.fromstring(drawn)
    words = [element.text for element in root.iter("{http://www.w3.org/2000/svg}text")]
    assert {"time <s>", "KID", "f1", "f2"} <= set(words)
    assert "f4" not in words
    assert len(list(root.iter("{http://www.w3.org/2000/svg}circle"))) == 3
    ElementTree.fromstring(curves("x", "y", {}))


@pytest.mark.parametrize("command", ["first-stages", "compression"])
def test_commands(command, monkeypatch, tmp_path, capsys):
    given: dict[str, Any] = {}

    def stub(data, folder, **options):
        given.update(options, data=data, folder=folder)
        (tmp_path / "table.md").write_text("| a |\n")
        return tmp_path / "table.md"

    monkeypatch.setattr(first_stages, "first_stages", stub)
    monkeypatch.setattr(compression, "compression", stub)
    words = ["latentkit", "paper", command, "in", "-o", "there", "--minutes", "3", "--size", "32", "--seed", "5"]
    monkeypatch.setattr(sys, "argv", words)
    with pytest.raises(SystemExit) as end:
        cli.main()
    assert end.value.code == 0
    assert capsys.readouterr().out == "| a |\n"
    assert (given["data"], given["folder"], given["minutes"]) == ("in", Path("there"), 3.0)
    assert (given["size"], given["seed"]) == (32, 5)
    assert command == "first-stages" or given["trained"] == Path("runs/paper/first-stages")
