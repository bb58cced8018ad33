"""Budgets: what a time is, how it is shared, and what is too little."""

import re

import pytest

from latentkit.applications.fit.division import Costs, divide, duration, parse_budget, suggested
from latentkit.applications.fit.measure import Measured
from latentkit.errors import InputError


def costs(first, first_batch, second, second_batch, decode, pictures, held):
    """Everything besides steps as parts of what a picture of a step takes."""
    one, two = first / first_batch, second / second_batch
    return Costs(
        Measured(seconds=first, memory=1, save=0.5, decode=decode, encode=0.4 * one, look=one),
        Measured(seconds=second, memory=1, save=1.0, look=2.4 * two, draw=10 * two),
        first_batch, second_batch, pictures, held, spent=20.0,
    )  # fmt: skip


EMOJI = costs(0.2, 16, 0.5, 32, 0.002, 1784, 86)
PHOTOS = costs(0.05, 32, 0.1, 64, 0.05, 20000, 1000)
FEW = costs(0.3, 16, 0.6, 32, 0.01, 12, 1)


@pytest.mark.parametrize(
    ("text", "seconds"), [("150s", 150), ("30m", 1800), ("2h", 7200), ("1h30m", 5400), ("1.5h", 5400), ("1d2h", 93600)]
)
def test_times(text, seconds):
    assert parse_budget(text) == seconds


@pytest.mark.parametrize("text", ["abc", "", "30", "m", "30 m", "-5m", "1m2h", "0s", "0h0m", "9999999d", "1e3s"])
def test_what_is_no_time(text):
    with pytest.raises(InputError, match="not a time") as caught:
        parse_budget(text)
    assert caught.value.exit_code == 2


def test_durations_read_back_and_are_never_too_short():
    assert [duration(seconds) for seconds in (0.2, 5, 89.5, 90)] == ["1s", "5s", "90s", "2m"]
    for seconds in (120, 130, 3599, 3600, 5000, 7200, 100000):
        assert seconds <= parse_budget(duration(seconds)) <= seconds * 1.7 + 1


@pytest.mark.parametrize("costs", [EMOJI, PHOTOS, FEW])
@pytest.mark.parametrize("budget", [3600, 7200, 86400])
def test_a_budget_is_filled_and_shared_as_promised(costs, budget):
    found = divide(costs, budget)
    assert 0.97 * budget <= found.total <= budget
    first, second = found.first_steps * costs.first.seconds, found.second_steps * costs.second.seconds
    assert second / first == pytest.approx(0.6 / 0.35, rel=0.02)


def test_too_small_a_budget_is_the_same_on_every_machine():
    for text in ("3s", "90s", "119s"):
        with pytest.raises(
            InputError, match=f"a budget of {text} is too small for two stages; the least is 2m"
        ) as caught:
            parse_budget(text)
        assert caught.value.exit_code == 2
    assert parse_budget("2m") == 120
    slow = FEW._replace(first=FEW.first.model_copy(update={"seconds": 7.0}))
    assert divide(slow, 120).little
    assert divide(slow, 120).total <= 120
    assert not divide(FEW, 600).little


def test_no_time_for_steps_is_refused_with_a_budget_that_has_some():
    with pytest.raises(InputError, match=r"reading, encoding and measuring 21000 pictures takes \d+m") as caught:
        divide(PHOTOS, 600)
    enough = parse_budget(re.search(r"give (\S+) or more", str(caught.value))[1])
    assert divide(PHOTOS, enough).total <= enough


def test_the_plan_counts_every_part():
    found = divide(EMOJI, None, (1000, 2000))
    quiet = EMOJI._replace(second=EMOJI.second.model_copy(update={"draw": 0.0, "look": 0.0, "save": 0.0}))
    without = divide(quiet, None, (1000, 2000))
    draws = EMOJI.second.draw
    assert found.report - without.report == pytest.approx(found.samples * draws)
    looks = found.looks * (86 * EMOJI.second.look + 16 * draws)
    assert found.second - without.second == pytest.approx(looks + 1.0 + 2000 * 0.5 * 1.0 / 60)
    assert found.total == pytest.approx(20 + found.first + found.latents + found.second + found.report)
    assert found.first == pytest.approx(3 + 1870 * 0.002 + 1000 * 0.2 * (1 + 0.5 / 60) + 0.5 + 6 * 86 * 0.2 / 16)


def test_small_budgets_look_less_often():
    assert divide(EMOJI, 86400).looks > divide(EMOJI, 400).looks
    assert divide(EMOJI, 86400).samples > divide(EMOJI, 400).samples


def test_without_a_budget_the_number_of_pictures_decides():
    first, second = suggested(EMOJI)
    assert first * 16 / 1784 == pytest.approx(80, rel=0.02)
    assert second * 32 / 1784 == pytest.approx(400, rel=0.02)
    found = divide(EMOJI, None)
    assert (found.first_steps, found.second_steps) == (first, second)
    assert found.total > first * 0.2 + second * 0.5
    assert suggested(PHOTOS)[0] * 32 > first * 16  # more pictures, more steps


def test_steps_asked_for_win():
    found = divide(EMOJI, 10, (3, 4))
    assert (found.first_steps, found.second_steps) == (3, 4)
