"""Budgets: what a time is, how it is shared, and what is too little."""

import re

import pytest

from latentkit.applications.fit.division import LEAST_STEPS, Costs, divide, duration, parse_budget, suggested
from latentkit.errors import InputError

EMOJI = Costs(0.2, 16, 0.5, 32, 0.002, 1784, 86)
PHOTOS = Costs(0.05, 32, 0.1, 64, 0.05, 20000, 1000)
FEW = Costs(0.3, 16, 0.6, 32, 0.01, 12, 1)


@pytest.mark.parametrize(
    ("text", "seconds"), [("90s", 90), ("30m", 1800), ("2h", 7200), ("1h30m", 5400), ("1.5h", 5400), ("1d2h", 93600)]
)
def test_times(text, seconds):
    assert parse_budget(text) == seconds


@pytest.mark.parametrize("text", ["abc", "", "30", "m", "30 m", "-5m", "1m2h", "0s", "0h0m", "9999999d", "1e3s"])
def test_what_is_no_time(text):
    with pytest.raises(InputError, match="not a time") as caught:
        parse_budget(text)
    assert caught.value.exit_code == 2


def test_durations_read_back_and_are_never_too_short():
    for seconds in (0.2, 5, 89.5, 90, 100, 3599, 3600, 5000, 7200, 100000):
        assert seconds <= parse_budget(duration(seconds)) <= seconds * 1.7 + 1


@pytest.mark.parametrize("costs", [EMOJI, PHOTOS, FEW])
@pytest.mark.parametrize("budget", [3600, 7200, 86400])
def test_a_budget_is_filled_and_shared_as_promised(costs, budget):
    found = divide(costs, budget)
    assert 0.97 * budget <= found.total <= budget
    first, second = found.first_steps * costs.first_step, found.second_steps * costs.second_step
    assert second / first == pytest.approx(0.6 / 0.35, rel=0.01)


@pytest.mark.parametrize("costs", [EMOJI, PHOTOS, FEW])
def test_too_small_a_budget_names_the_least(costs):
    with pytest.raises(InputError, match="too small") as caught:
        divide(costs, 10)
    least = parse_budget(re.search(r"the least is (\S+)", str(caught.value))[1])
    found = divide(costs, least)
    assert min(found.first_steps, found.second_steps) >= LEAST_STEPS
    with pytest.raises(InputError, match="too small"):
        divide(costs, 0.9 * least - 61)


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
