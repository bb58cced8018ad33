"""`latentkit train` and `latentkit fit` as a person types them."""

import signal
import sys
from pathlib import Path

import pytest
import yaml

from latentkit import cli
from latentkit.applications.fit import choice, folder, measure
from latentkit.applications.fit.choice import Scale
from latentkit.checkpoints.files import load
from latentkit.data.pictures import to_png
from latentkit.diffusion.noise import keyed_uniform

TINY = Scale(16, 4, 16, (1, 1), 4, 32, 1, 0, 32, 1, 4)


@pytest.fixture
def call(monkeypatch, tmp_path, capsys):
    """Types `latentkit ...` in a folder that holds twelve pictures; gives exit code, stdout and stderr."""
    for device in choice.SCALES:
        monkeypatch.setitem(choice.SCALES, device, TINY)
    monkeypatch.setattr(folder, "selftest", lambda *_: [])
    monkeypatch.setattr(measure, "TIMED", 0.0)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    pictures = tmp_path / "work" / "pics"
    pictures.mkdir(parents=True)
    for number in range(12):
        (pictures / f"{number}.png").write_bytes(to_png(keyed_uniform((3, 16, 16), number) * 2 - 1))
    monkeypatch.chdir(pictures.parent)
    before = signal.getsignal(signal.SIGTERM)

    def type_(*words):
        monkeypatch.setattr(sys, "argv", ["latentkit", *words])
        code = 0
        try:
            cli.main()
        except SystemExit as end:
            code = int(end.code or 0)
        finally:
            signal.signal(signal.SIGTERM, before)
            cli.LOG.setLevel("NOTSET")
        return (code, *capsys.readouterr())

    return type_


def test_fit_prints_paths_alone_on_stdout(call):
    code, out, err = call("fit", "pics", "--budget", "5m", "--dry-run", "--seed", "4", "--name", "things")
    assert (code, out) == (0, "runs/things/plan.yaml\n")
    assert "12 pictures (plain)" in err
    assert "budget 5m" in err
    plan = Path("runs/things/plan.yaml")
    values = yaml.safe_load(plan.read_text())
    assert values["asked"]["seed"] == values["diffusion"]["seed"] == 4
    for stage in ("autoencoder", "diffusion"):
        values[stage]["schedule"]["steps"] = 2
    plan.write_text(yaml.safe_dump(values))
    code, out, err = call("fit", "pics", "--budget", "5m", "--seed", "4", "--name", "things")
    assert (code, out.split()) == (0, ["runs/things/things.safetensors", "runs/things/report.html"])
    assert load("runs/things/things.safetensors").network.architecture.size == (16, 16)


def test_fit_takes_size_condition_and_run(call):
    code, out, _ = call("fit", "pics", "--size", "24", "--condition", "none", "--into", "here", "--dry-run")
    assert (code, out) == (0, "here/plan.yaml\n")
    values = yaml.safe_load(Path("here/plan.yaml").read_text())
    assert values["diffusion"]["data"]["transform"]["size"] == 24
    assert values["asked"]["condition"] == "none"


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        (("fit", "nothing"), 2, "data folder nothing does not exist"),
        (("fit", "pics", "--budget", "abc"), 2, "budget 'abc' is not a time"),
        (("fit", "pics", "--budget", "3s"), 2, "a budget of 3s is too small for two stages; the least is 2m"),
        (("fit", "pics", "--size", "17"), 2, "nearest: 16 and 24"),
        (("fit", "pics", "--condition", "caption"), 2, "condition 'caption' is unknown"),
        (("train", "nothing.yaml"), 2, "recipe 'nothing.yaml' does not exist"),
        (("train", "recipe.yaml", "schedule.stps=3"), 2, "schedule.stps: unknown key; did you mean 'steps'"),
        (("train", "recipe.yaml", "steps"), 2, "override 'steps' is not of the form"),
        (("train", "recipe.yaml", "data.path=nowhere"), 2, "data folder nowhere does not exist"),
        (("train", "recipe.yaml", "data.path=recipe.yaml"), 2, "recipe.yaml is a file"),
        (("train", "."), 2, "'.' is a folder; name one of its recipes: recipe.yaml, stageless.yaml"),
        (("train", "pics"), 2, "'pics' is a folder; it holds no recipe"),
        (("train", "recipe.yaml", "stage=difusion"), 2, "stage: 'difusion' is unknown; did you mean 'diffusion'?"),
        (("train", "recipe.yaml", "schedule.steps=many"), 2, "schedule.steps: must be a whole number (got 'many')"),
        (("train", "recipe.yaml", "optimiser.lr=fast"), 2, "optimiser.lr: must be a number (got 'fast')"),
        (("train", "recipe.yaml", "schedule.batch=0"), 2, "schedule.batch: must be greater than 0 (got 0)"),
        (("train", "recipe.yaml", "schedule=7"), 2, "schedule: must be a section of keys (got 7)"),
        (("train", "stageless.yaml"), 2, "stage: is missing; write it as one of autoencoder, diffusion (got 'stag')"),
    ],
)
def test_wrong_words_are_one_line_and_an_exit_code(call, words, code, said):
    write_recipe()
    got, out, err = call(*words)
    assert (got, out) == (code, "")
    assert said in err
    assert "Traceback" not in err
    assert not Path("runs").exists()


def write_recipe():
    recipe = {
        "stage": "autoencoder",
        "name": "small",
        "data": {"path": "pics", "transform": {"size": 16}},
        "network": {"latent_channels": 4, "channels": 16, "multipliers": [1], "stem": 4, "attention": False},
        "schedule": {"steps": 100, "batch": 4},
    }
    Path("recipe.yaml").write_text(yaml.safe_dump(recipe))
    Path("stageless.yaml").write_text("stag: autoencoder\n")


RUNNING = "loss.codebook={running_mean: 0.9, codes: 1.0}"


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["loss.codebook.revive=true"], "loss.codebook: the network has no codebook (network.codes); leave it out"),
        (["network.levels=[8, 8, 8, 8]", "loss.codebook={}"], "loss.codebook: the network has no codebook"),
        (["network.codes=8", "frozen_encoder=true", "start=x", "loss.codebook.codes=1"], "keeps the codebook; leave"),
        (["network.codes=8", RUNNING], "loss.codebook.codes: running_mean moves the codes in its place; leave out one"),
        (["network.variance=false", "loss.kl=1e-4"], "loss.kl: the network has no posterior; leave it out"),
        (["frozen_encoder=true", "start=x", "loss.kl=1e-6"], "loss.kl: frozen_encoder keeps the posterior; leave it"),
        (["loss={l1: 0, pyramid: 0, structure: 0, kl: 0.1}"], "loss: nothing compares pictures; give one of l1, l2, "),
        (["loss={l1: 0, pyramid: 0, structure: 0, adversarial: {start: 1, weight: 0}}"], "nothing compares pictures"),
    ],
)
def test_settings_that_change_nothing_are_refused(call, words, said):
    write_recipe()
    code, out, err = call("train", "recipe.yaml", *words)
    assert (code, out) == (2, "")
    assert said in err
    assert len(err.splitlines()) == 2
    assert not Path("runs").exists()


def test_a_recipe_with_its_defaults_written_out_is_taken(call):
    """As a run keeps it."""
    write_recipe()
    changes = "schedule.steps=1", "network.variance=false", "schedule.sample_every=null"
    assert call("train", "recipe.yaml", *changes)[0] == 0
    assert "codebook" in Path("runs/small/recipe.yaml").read_text()
    assert call("train", "runs/small/recipe.yaml", "--into", "again")[0] == 0
    code, _, err = call("train", "runs/small/recipe.yaml", "loss.kl=1e-3", "--into", "third")
    assert (code, "loss.kl: the network has no posterior" in err) == (2, True)


@pytest.mark.parametrize(
    "words",
    [["loss.kl=0", "network.variance=false"], ["network.codes=8", "loss.codebook={running_mean: 0.9, codes: 0}"]],
)
def test_what_is_off_may_be_said(call, words):
    write_recipe()
    assert call("train", "recipe.yaml", "schedule.steps=1", "schedule.sample_every=null", *words)[0] == 0


def test_a_critic_that_comes_too_late_is_a_warning(call):
    write_recipe()
    critic = "network: {channels: 4, layers: 1}"
    said = "loss.adversarial.start: the critic counts from step {}, after the last of this run\n"
    for start, told in ((2, True), (1, False)):
        words = f"loss.adversarial={{start: {start}, warmup: 0, {critic}}}", "schedule.steps=2", f"name=late{start}"
        code, _, err = call("-q", "train", "recipe.yaml", *words)
        assert (code, err) == (0, said.format(start) if told else "")


def test_quiet_training_says_nothing_but_its_path(call):
    write_recipe()
    assert call("-q", "train", "recipe.yaml", "schedule.steps=2") == (0, "runs/small/model.safetensors\n", "")


def test_train_runs_a_recipe_with_overrides(call):
    write_recipe()
    code, out, err = call("train", "recipe.yaml", "schedule.steps=2", "seed=7")
    assert (code, out) == (0, "runs/small/model.safetensors\n")
    assert Path(out.strip()).is_file()
    assert "step 2/2" in err
    assert yaml.safe_load(Path("runs/small/recipe.yaml").read_text())["seed"] == 7
    code, out, err = call("train", "recipe.yaml", "schedule.steps=3", "seed=7")
    assert code == 1
    assert "schedule.steps: 2 -> 3" in err
    code, out, _ = call("train", "recipe.yaml", "schedule.steps=3", "--into", "elsewhere")
    assert (code, out) == (0, "elsewhere/model.safetensors\n")
