"""Deterministic samplers converge to the exact flow at their stated order, and a coefficient 1 % off does not."""

import inspect
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from convergence import FITTED, measured, orders, page

from latentkit.diffusion.samplers.driver import SamplerEntry, table

ENTRIES = table()
EQUAL_STEPS = ("plms", "ipndm")
"""Adams-Bashforth with fixed coefficients: of its order where steps are equal in sigma, of the second elsewhere."""
ONE_STEP = ("euler", "ddim", "heun", "dpm2", "dpm_adaptive")
"""Rules without a memory: a start of their own takes nothing from their order."""


def about(stated: int) -> Any:
    """A fitted order that rounds to it, or is a little above: errors of higher order fade slowly."""
    return pytest.approx(stated + 0.15, abs=0.45)


@pytest.mark.parametrize("name", FITTED)
@pytest.mark.parametrize("column", ["log", "even"])
def test_converges_at_its_stated_order_when_its_past_is_known(name: str, column: str) -> None:
    stated = 2 if name in EQUAL_STEPS and column == "log" else ENTRIES[name].order
    assert list(measured(name, column)) == [about(stated)] * 2


@pytest.mark.parametrize("order", [1, 2, 3])
def test_a_lower_order_may_be_asked_for(order: int) -> None:
    """UniPC's corrector adds one: of the second where it predicts by Euler."""
    for name, stated in (("lms", order), ("deis", order), ("unipc", order + 1)):
        assert list(orders(ENTRIES[name], "log", order=order)) == [about(stated)] * 2
    assert list(orders(ENTRIES["ipndm"], "even", order=order)) == [about(order)] * 2


def test_the_adaptive_pair_of_lower_order() -> None:
    assert list(orders(ENTRIES["dpm_adaptive"], "log", order=2)) == [about(2)] * 2


def test_unipcs_other_variant_is_of_the_same_order() -> None:
    for order in (1, 2, 3):
        assert list(orders(ENTRIES["unipc"], "log", order=order, variant="bh1")) == [about(order + 1)] * 2


@pytest.mark.parametrize("name", FITTED)
def test_a_low_order_start_leaves_a_rule_with_a_memory_of_second_order(name: str) -> None:
    """UniPC's corrector lifts its first step to the second order, and the whole to the third."""
    stated = ENTRIES[name].order if name in ONE_STEP else 3 if name == "unipc" else 2
    assert list(measured(name, "begun")) == [about(stated)] * 2


@pytest.mark.parametrize("name", FITTED)
def test_a_last_step_to_zero_leaves_second_order_up_to_a_logarithm(name: str) -> None:
    (found,) = measured(name, "to zero")
    assert found > min(2, ENTRIES[name].order) - 0.35


def test_the_page_of_measured_orders_is_true() -> None:
    written = (Path(__file__).parents[2] / "docs" / "samplers-proof.md").read_text()
    assert page() in written


def changed(entry: SamplerEntry, old: str, new: str) -> SamplerEntry:
    """The sampler with one expression of its rule's source changed."""
    rule = entry.run
    kept = rule.keywords if isinstance(rule, partial) else {}
    function: Callable[..., Any] = inspect.unwrap(rule.func if isinstance(rule, partial) else rule)
    source = inspect.getsource(function)
    assert source.count(old) == 1, f"{function.__name__} has no single {old!r}"
    scope = dict(vars(inspect.getmodule(function)))
    exec("from __future__ import annotations\n" + source.replace(old, new), scope)
    return entry._replace(run=partial(scope[function.__name__], **kept))
