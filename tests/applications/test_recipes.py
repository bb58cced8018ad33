"""Every committed recipe runs, through the same code as a whole training; here 50 steps of it on a few pictures."""

import json
from pathlib import Path

import pytest

from latentkit.applications.generate import draw
from latentkit.applications.stages.train import train
from latentkit.checkpoints.files import load, load_autoencoder
from latentkit.errors import InputError
from latentkit.training.recipe import read_recipe

RECIPES = Path(__file__).parents[2] / "recipes"
EMOJI = Path(__file__).parents[2] / "data" / "emoji" / "emoji-000001.tar"
SHORT = [
    f"data.path={EMOJI}", "data.split=holdout", "schedule.steps=50", "schedule.batch=4", "schedule.save_every=50",
    "schedule.sample_every=50", "schedule.log_every=10", "optimiser.warmup=5",
]  # fmt: skip
SECOND_STAGES = sorted(path.stem for path in RECIPES.glob("*.yaml") if not path.stem.endswith("-autoencoder"))


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that runs of first stages lie in."""
    return tmp_path_factory.mktemp("runs")


def trained(name: str, runs: Path) -> Path:
    """A first stage's recipe after 50 steps."""
    path = runs / name / "model.safetensors"
    return path if path.exists() else train(read_recipe(str(RECIPES / f"{name}.yaml"), SHORT), runs / name)


@pytest.fixture(scope="module")
def first_stage(runs: Path) -> Path:
    """The autoencoder recipe after 50 steps."""
    return trained("emoji-autoencoder", runs)


def losses(folder: Path) -> list[float]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [line["loss"] for line in lines if "loss" in line]


def test_autoencoder(first_stage: Path) -> None:
    found = losses(first_stage.parent)
    assert found[-1] < 0.8 * found[0]
    assert load_autoencoder(first_stage).latent_channels == 24
    assert list((first_stage.parent / "samples").glob("*.png"))


@pytest.mark.slow
@pytest.mark.parametrize("name", SECOND_STAGES)
def test_second_stage(name: str, runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    file = str(RECIPES / f"{name}.yaml")
    first = Path(read_recipe(file, []).first_stage)
    overrides = SHORT if str(first) == "identity" else [*SHORT, f"first_stage={trained(first.name, runs)}"]
    path = train(read_recipe(file, overrides), tmp_path / name)
    found = losses(tmp_path / name)
    assert found[-1] < 0.9 * found[0]
    model = load(path)
    words = {"emoji-class": "Flags", "emoji-unconditional": None}.get(name, "red heart")
    (picture,) = draw(model.network, model.provenance["defaults"], [words], [0])
    assert picture.shape == (3, *model.network.architecture.size)
    assert model.provenance["steps"] == 50


def test_a_first_stage_of_other_channels_is_refused(first_stage: Path, tmp_path: Path) -> None:
    recipe = read_recipe(
        str(RECIPES / "emoji.yaml"), [*SHORT, f"first_stage={first_stage}", "data.transform.channels=1"]
    )
    with pytest.raises(InputError, match=r"takes pictures of 3 channels.*asks for 1"):
        train(recipe, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_first_stage_that_is_missing_is_named(tmp_path: Path) -> None:
    recipe = read_recipe(str(RECIPES / "emoji.yaml"), [*SHORT, "first_stage=runs/nothing"])
    with pytest.raises(InputError, match="runs/nothing"):
        train(recipe, tmp_path / "run")


def test_text_needs_captions(tmp_path: Path) -> None:
    from PIL import Image

    folder = tmp_path / "plain"
    folder.mkdir()
    for i in range(3):
        Image.new("RGB", (32, 32), (i * 40, 90, 200 - i)).save(folder / f"{i}.png")
    overrides = [f"data.path={folder}", "data.split=null", "data.holdout=null", "schedule.batch=2"]
    recipe = read_recipe(str(RECIPES / "emoji-pixels.yaml"), overrides)
    with pytest.raises(InputError, match=r"no picture of .* has a caption"):
        train(recipe, tmp_path / "run")


def test_a_size_that_the_network_cannot_take_is_refused(tmp_path: Path) -> None:
    recipe = read_recipe(str(RECIPES / "emoji-autoencoder.yaml"), [*SHORT, "data.transform.size=60"])
    with pytest.raises(InputError, match=r"size 60 is not a multiple of 8.*64"):
        train(recipe, tmp_path / "run")


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("network.chanels=3", "did you mean 'channels'"),
        ("optimiser.lr=-1", "greater than 0"),
        ("optimiser.name=mion", "'adamw' or 'muon'"),
        ("schedule.steps", "not of the form key.key=value"),
        ("stage=autoencoder2", "stage"),
        ("name.deep=3", "is a value, not a section"),
        ("name=a/b", "name"),
        ("data.transform.flips=x", "letters h"),
    ],
)
def test_wrong_recipes_are_named(override: str, message: str) -> None:
    with pytest.raises(InputError, match=message) as caught:
        read_recipe(str(RECIPES / "emoji-autoencoder.yaml"), [override])
    assert caught.value.exit_code == 2


def test_a_missing_recipe_names_the_nearest() -> None:
    with pytest.raises(InputError, match=r"emoji-autoencoder\.yaml"):
        read_recipe(str(RECIPES / "emoji-autoencodr.yaml"), [])


def test_numbers_are_read_as_people_write_them() -> None:
    recipe = read_recipe(str(RECIPES / "emoji-autoencoder.yaml"), ["optimiser.lr=1e-3", "loss.kl=2E-4"])
    assert recipe.optimiser.lr == 1e-3
    assert recipe.loss.kl == 2e-4
    with pytest.raises(InputError, match="greater than 0"):
        read_recipe(str(RECIPES / "emoji-autoencoder.yaml"), ["optimiser.lr=.nan"])
