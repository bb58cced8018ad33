"""The self-test passes what can learn, and names the part that cannot, however it is broken."""

from pathlib import Path

import pytest
from small_fit import folder_of, tiny

from latentkit.applications.fit import selftest as module
from latentkit.applications.fit.choice import choose
from latentkit.applications.fit.selftest import PICTURES, selftest, told_apart
from latentkit.applications.pictures import open_data
from latentkit.data.source import open_source
from latentkit.model.conditioners.label import LabelConditioner
from latentkit.model.conditioners.text import TextConditioner

__all__ = ["tiny"]


def prepared(folder: Path, condition: str = "auto"):
    found = choose(
        open_source(folder), str(folder), Path("runs/x"), "x", size=None, condition=condition, seed=0, device="cpu"
    )
    return found.autoencoder, found.diffusion, open_data(found.diffusion.data, 0, 4)[0]


def outcome(verdicts):
    return {verdict.part: verdict.passed for verdict in verdicts}


GOOD = {"data": True, "first stage": True, "second stage": True}


@pytest.mark.parametrize("kind", ["captions", "classes", "plain"])
def test_what_can_learn_passes(tiny, kind):
    verdicts = selftest(*prepared(folder_of(tiny / "pics", 12, kind=kind)))
    assert outcome(verdicts) == GOOD | ({} if kind == "plain" else {"condition": True})


@pytest.fixture
def brief(monkeypatch):
    """Failing takes every step there is: fewer of them."""
    monkeypatch.setattr(module, "MOST_STEPS", 30)


def slow(recipe):
    return recipe.model_copy(update={"optimiser": recipe.optimiser.model_copy(update={"lr": 1e-9})})


def test_a_first_stage_that_does_not_move_fails(tiny, brief):
    first, second, train = prepared(folder_of(tiny / "pics", 12))
    verdicts = selftest(slow(first), second, train)
    assert outcome(verdicts)["first stage"] is False
    assert "does not learn" in verdicts[1].words


def test_a_second_stage_that_does_not_move_fails(tiny, brief):
    first, second, train = prepared(folder_of(tiny / "pics", 12, kind="classes"))
    found = outcome(selftest(first, slow(second), train))
    assert (found["second stage"], found["condition"]) == (False, False)


@pytest.mark.parametrize(
    ("kind", "conditioner", "nothing"), [("captions", TextConditioner, ""), ("classes", LabelConditioner, None)]
)
def test_a_condition_that_does_not_reach_the_network_fails(tiny, monkeypatch, kind, conditioner, nothing):
    """Without its words the second stage still learns: only the condition's own test tells."""
    prepare = prepared(folder_of(tiny / "pics", 12, kind=kind))
    forward = conditioner.forward
    monkeypatch.setattr(conditioner, "forward", lambda self, values: forward(self, [nothing] * len(values)))
    assert outcome(selftest(*prepare)) == GOOD | {"condition": False}


def test_captions_that_are_all_alike_fail(tiny):
    folder = folder_of(tiny / "pics", 12, kind="captions")
    for path in folder.glob("*.txt"):
        path.write_text("a pot")
    verdicts = selftest(*prepared(folder, "text"))
    assert outcome(verdicts)["condition"] is False
    assert "all pictures have the same captions" in verdicts[-1].words


def test_pictures_that_are_all_alike_fail_and_nothing_is_trained(tiny):
    folder = folder_of(tiny / "pics", 1)
    for number in range(6):
        (folder / f"copy{number}.png").write_bytes((folder / "000.png").read_bytes())
    assert outcome(selftest(*prepared(folder))) == {"data": False}


def test_the_condition_is_tested_on_pictures_that_are_told_apart(tiny):
    _, second, train = prepared(folder_of(tiny / "classes", 12, kind="classes"))
    assert sorted(train.source.items[row].label for row in told_apart(train, second)) == ["even", "odd"]
    _, second, train = prepared(folder_of(tiny / "captions", 20, kind="captions"))
    assert len({train.source.items[row].caption for row in told_apart(train, second)}) == PICTURES
