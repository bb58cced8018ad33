"""A whole fit of a tiny folder: what it leaves, that it goes on wherever it was stopped, and what it refuses."""

import json
import shutil
from pathlib import Path

import pytest
import yaml
from small_fit import folder_of, square, tiny

from latentkit.applications.fit import Fitted, fit, folder, measure
from latentkit.applications.generate import draw
from latentkit.applications.stages import train_autoencoder
from latentkit.checkpoints.files import load
from latentkit.data.pictures import to_png
from latentkit.errors import InputError

__all__ = ["tiny"]


@pytest.fixture
def untested(monkeypatch):
    """Dry runs that only plan."""
    monkeypatch.setattr(folder, "selftest", lambda *_: [])


def contents(path: Path) -> dict[str, bytes]:
    return {str(p.relative_to(path)): p.read_bytes() for p in sorted(path.rglob("*")) if p.is_file()}


def test_captioned_pictures_become_a_model_and_a_report(tiny, capsys):
    pictures = folder_of(tiny / "pics", 24, kind="captions")
    (pictures / "<b>broken.png").write_bytes(b"\x89PNG\r\n\x1a\nno")
    before = contents(pictures)
    done = fit("pics", steps=(6, 6))
    assert done == Fitted(
        Path("runs/pics/plan.yaml"), Path("runs/pics/pics.safetensors"), Path("runs/pics/report.html")
    )
    assert contents(pictures) == before

    model = load(done.model)
    (picture,) = draw(model.network, model.provenance["defaults"], ["square number 3"], [0])
    assert picture.shape == (3, 16, 16)
    assert set(model.network.conditioners) == {"text"}

    text = done.report.read_text()
    for expected in ("KID, drawn", "latentkit-random-conv-v1", "PSNR", "memorisation", "sigma 0.5", "24 pictures used"):
        assert expected in text, expected
    assert "What to make of it" in text
    assert "first stage gives pictures back at" in text or "gives its training pictures back at" in text
    assert "&lt;b&gt;broken.png" in text
    assert "<b>broken" not in text
    assert text.count("data:image/png;base64,") >= 8 + 1

    plan = yaml.safe_load(done.plan.read_text())
    assert plan["pictures"] == {"training": 23, "held_out": 1, "rejected": 1}
    assert plan["diffusion"]["schedule"]["steps"] == 6
    err = capsys.readouterr().err
    assert err.index("plan (runs/pics/plan.yaml)") < err.index("first stage: 6 steps")
    for row in ("condition     text", "first stage   6 steps", "in all"):
        assert row in err


@pytest.mark.parametrize(("kind", "channels", "count"), [("classes", 4, 12), ("plain", 1, 5), ("plain", 5, 2)])
def test_other_folders_too(tiny, kind, channels, count):
    """RGBA pictures in class folders; a handful of gray ones, too few to hold any back; two of five channels."""
    folder_of(tiny / "pics", count, kind=kind, channels=channels)
    done = fit("pics", "things", steps=(3, 3), seed=5)
    assert done.model == Path("runs/things/things.safetensors")
    model = load(done.model)
    assert list(model.network.conditioners) == (["label"] if kind == "classes" else [])
    assert model.network.architecture.picture_channels == channels
    assert "training pictures among themselves" in done.report.read_text()


def test_a_second_call_does_nothing_again(tiny, monkeypatch):
    folder_of(tiny / "pics", 12)
    done = fit("pics", steps=(3, 3))
    before = contents(Path("runs"))
    for name in ("measure_autoencoder", "measure_diffusion", "train", "write_report"):
        monkeypatch.setattr(folder, name, None)
    assert fit(tiny / "pics", steps=(3, 3)) == done
    assert contents(Path("runs")) == before
    done.model.write_bytes(done.model.read_bytes()[:-1])  # no longer what was trained
    monkeypatch.setattr(folder, "write_report", lambda *_: "again")
    fit("pics", steps=(3, 3))
    assert done.report.read_text() == "again"
    assert done.model.read_bytes() == before["pics/pics.safetensors"]


def test_stopped_anywhere_it_goes_on_by_the_same_plan_to_the_same_bytes(tiny, monkeypatch):
    folder_of(tiny / "pics", 12, kind="captions")
    done = fit("pics", steps=(6, 6))
    expected, plan = done.model.read_bytes(), done.plan.read_bytes()
    shutil.rmtree("runs")
    shutil.rmtree(tiny.parent / "cache")

    class Killed(Exception):
        pass

    def dies(*_, **__):
        raise Killed

    def stopped(where, name):
        with monkeypatch.context() as patch:
            patch.setattr(where, name, dies)
            with pytest.raises(Killed):
                fit("pics", steps=(6, 6))

    stopped(folder, "measure_diffusion")
    assert not Path("runs").exists()
    Path("runs/pics").mkdir(parents=True)
    done.plan.write_bytes(plan)
    monkeypatch.setattr(folder, "measure_autoencoder", None)  # never again
    stopped(folder, "train")
    stopped(train_autoencoder, "_look")
    stopped(train_autoencoder, "save_autoencoder")
    assert not Path("runs/pics/diffusion").exists()
    stopped(folder, "write_report")
    assert not done.report.exists()
    assert fit("pics", steps=(6, 6)) == done
    assert done.model.read_bytes() == expected
    assert done.plan.read_bytes() == plan


def test_an_edited_plan_is_what_is_trained_and_only_before_it_began(tiny, untested):
    folder_of(tiny / "pics", 12)
    plan = fit("pics", steps=(3, 3), dry_run=True).plan
    plan.write_text(plan.read_text().replace("steps: 3\n", "steps: 2\n"))
    fit("pics", steps=(3, 3))
    lines = [json.loads(line) for line in Path("runs/pics/diffusion/metrics.jsonl").read_text().splitlines()]
    assert lines[-1]["step"] == 2
    plan.write_text(plan.read_text().replace("steps: 2\n", "steps: 4\n"))
    with pytest.raises(InputError, match=r"schedule\.steps: 2 -> 4"):
        fit("pics", steps=(3, 3))


def test_a_dry_run_plans_tests_and_trains_nothing(tiny, capsys):
    folder_of(tiny / "pics", 12, kind="classes")
    done = fit("pics", budget="5m", dry_run=True)
    assert done == Fitted(Path("runs/pics/plan.yaml"))
    assert [p.name for p in Path("runs/pics").iterdir()] == ["plan.yaml"]
    err = capsys.readouterr().err
    assert err.count("can learn   ") == 4
    plan = yaml.safe_load(done.plan.read_text())
    assert 0.8 * 300 < sum(plan["expected"][part] for part in ("first", "latents", "second", "report")) <= 300
    assert plan["autoencoder"]["schedule"]["steps"] > 100
    written = done.plan.read_bytes()
    fit("pics", budget="5m", dry_run=True)
    assert done.plan.read_bytes() == written


def test_a_dry_run_that_cannot_learn_fails(tiny, capsys):
    pictures = folder_of(tiny / "pics", 1)
    (pictures / "copy.png").write_bytes((pictures / "000.png").read_bytes())
    with pytest.raises(InputError, match="self-test failed for: data"):
        fit("pics", steps=(3, 3), dry_run=True)
    assert "CANNOT LEARN  data" in capsys.readouterr().err


def test_another_budget_or_other_pictures_are_refused_with_the_difference(tiny, untested):
    pictures = folder_of(tiny / "pics", 12)
    fit("pics", budget="5m", dry_run=True)
    before = contents(Path("runs"))
    with pytest.raises(InputError, match="budget: 5m -> 10m"):
        fit("pics", budget="10m", dry_run=True)
    with pytest.raises(InputError, match="seed: 0 -> 1"):
        fit("pics", budget="5m", seed=1, dry_run=True)
    folder_of(pictures, 13)
    with pytest.raises(InputError, match="the pictures or their captions have changed"):
        fit("pics", budget="5m", dry_run=True)
    assert contents(Path("runs")) == before


@pytest.mark.parametrize(
    ("options", "message", "code"),
    [
        ({"budget": "abc"}, "budget 'abc' is not a time", 2),
        ({"budget": "3s"}, "too small.*the least is 2m", 2),
        ({"size": 17}, "size 17 does not fit; nearest: 16 and 24", 2),
        ({"condition": "text"}, "no picture has a caption", 1),
        ({"condition": "words"}, "condition 'words' is unknown", 2),
        ({"seed": -1}, "seed -1", 2),
        ({"steps": (0, 4)}, "at least one", 2),
        ({"name": "../x"}, "cannot be a file's name; 'x' can", 2),
        ({"run": "pics/run"}, "would lie among the pictures", 1),
        ({"run": "taken"}, "holds no plan.yaml", 1),
        ({"run": "file"}, "holds no plan.yaml", 1),
        ({"folder": "pixs"}, "does not exist.*pics", 2),
        ({"folder": "empty"}, "holds no pictures", 1),
        ({"folder": "specks"}, r"no usable picture; 1 files(.|\n)*too small \(1x1\)", 1),
        ({"folder": "."}, "would lie among the pictures", 1),
    ],
)
def test_wrong_input_is_named_and_nothing_is_written(tiny, untested, options, message, code):
    folder_of(tiny / "pics", 12)
    for name in ("taken", "empty", "specks"):
        (tiny / name).mkdir()
    (tiny / "taken" / "letter.txt").write_text("mine")
    (tiny / "file").write_text("mine")
    folder_of(tiny / "specks", 1, side=2)
    from PIL import Image

    Image.new("RGB", (1, 1)).save(tiny / "specks" / "000.png")
    before = contents(tiny)
    given = {"folder": "pics", **options}
    with pytest.raises(InputError, match=message) as caught:
        fit(given.pop("folder"), **given, dry_run=True)
    assert caught.value.exit_code == code
    assert contents(tiny) == before
    assert not Path("runs").exists()


def test_pictures_of_several_shapes_keep_them(tiny, capsys):
    for number, side in enumerate([(16, 32), (32, 16), (16, 32), (16, 16)] * 2):  # none held back: all validate
        (tiny / "pics").mkdir(exist_ok=True)
        (tiny / "pics" / f"{number}.png").write_bytes(to_png(square(number, 32)[:, : side[0], : side[1]]))
    done = fit("pics", steps=(4, 4))
    assert "shape         3 shapes" in capsys.readouterr().err
    plan = yaml.safe_load(done.plan.read_text())
    assert plan["diffusion"]["data"]["transform"]["buckets"] is True
    model = load(done.model)
    assert model.network.architecture.size == (8, 24)
    (picture,) = draw(model.network, model.provenance["defaults"], [None], [0])
    assert picture.shape == (3, 8, 24)
    fit("pics", name="again", steps=(4, 4), dry_run=True)  # its self-test is on one shape


def test_specks_among_pictures_are_counted_and_named(tiny):
    from PIL import Image

    folder_of(tiny / "pics", 12)
    Image.new("RGB", (1, 1)).save(tiny / "pics" / "speck.png")
    done = fit("pics", steps=(2, 2))
    assert yaml.safe_load(done.plan.read_text())["pictures"] == {"training": 11, "held_out": 1, "rejected": 1}
    assert "speck.png</td><td>is too small (1x1)" in done.report.read_text()


def test_a_damaged_plan_is_refused(tiny, untested):
    folder_of(tiny / "pics", 12)
    plan = fit("pics", steps=(2, 2), dry_run=True).plan
    whole = plan.read_text()
    for broken, message in (
        (whole.replace("asked:", "asked: ["), "not YAML"),
        (whole.replace("budget:", "buget:"), "buget"),
        ("", "plan.yaml"),
    ):
        plan.write_text(broken)
        with pytest.raises(InputError, match=message):
            fit("pics", steps=(2, 2))
        assert plan.read_text() == broken


def test_several_processes_are_refused(tiny, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(InputError, match="one process"):
        fit("pics")


def test_little_memory_reaches_the_recipes(tiny, monkeypatch):
    folder_of(tiny / "pics", 12)
    monkeypatch.setattr(measure, "portion", lambda batch, weights, allowed: 2)
    plan = yaml.safe_load(fit("pics", steps=(2, 2)).plan.read_text())
    assert plan["autoencoder"]["schedule"]["micro_batch"] == plan["diffusion"]["schedule"]["micro_batch"] == 2
