"""Negative controls: one coefficient 1 % off, in each family of rules, fails the closed forms and the comparison."""

import functools
import inspect
from types import ModuleType
from typing import Any, NamedTuple

import pytest
import test_samplers_exact as exact
import test_samplers_parity as parity
from cases import cases
from convergence import LOG, orders
from schedulers import Case

from latentkit.diffusion.samplers import adams, dpm, driver, euler, heun, langevin, quadrature, singlestep, unipc
from latentkit.diffusion.samplers.driver import SamplerEntry, table


class Control(NamedTuple):
    """A sampler, the room that its rule is in, an expression there or in a function that it calls, and the change."""

    name: str
    room: ModuleType
    old: str
    new: str
    function: Any = None

    def entry(self, new: str) -> SamplerEntry:
        """The sampler with `new` in the place of the expression."""
        changed: dict[str, Any] = {}
        source = inspect.getsource(self.room)
        if self.function is None:
            source = replaced(source, self.old, new)
        else:
            function = inspect.unwrap(self.function)
            changed = dict(vars(inspect.getmodule(function)))
            exec(FUTURE + replaced(inspect.getsource(function), self.old, new), changed)
            changed = {function.__name__: changed[function.__name__]}
        scope: dict[str, Any] = {"__name__": self.room.__name__}
        exec(FUTURE + source, scope)
        scope.update(changed)
        entry: SamplerEntry = scope["SAMPLERS"][self.name]
        return entry


FUTURE = "from __future__ import annotations\n"


def replaced(source: str, old: str, new: str) -> str:
    """The source with its only `old` made `new`."""
    assert source.count(old) == 1, f"there is no single {old!r}"
    return source.replace(old, new)


FLOWS = [
    Control("euler", euler, "walk.after / walk.sigma)", "1.01 * walk.after / walk.sigma)"),
    Control("heun", heun, "half = (after - sigma) / 2", "half = (after - sigma) / 2.02"),
    Control("dpm2", heun, "slope = (down - sigma)", "slope = 1.01 * (down - sigma)"),
    Control("lms", adams, "width / (k + 1)", "width / (k + 1 + 0.02 * (k == 1))", quadrature.polynomial),
    Control("ipndm", adams, "* weight", "* 1.01 * weight", quadrature.fixed),
    Control("plms", adams, "* weight", "* 1.01 * weight", quadrature.fixed),
    Control("deis", adams, "k / width", "1.01 * k / width", quadrature.exponential_noise),
    Control("dpm++2m", dpm, "(2 * node)", "(2.02 * node)", quadrature.half),
    Control("dpm++3m", dpm, "1 - k / (rate", "1 - 1.01 * k / (rate", quadrature.exponential),
    Control("dpm_adaptive", singlestep, "* (after / second", "* (1.01 * after / second"),
    Control("unipc", unipc, "1 - k / (rate", "1 - 1.01 * k / (rate", quadrature.exponential),
]
NOISES = [
    Control("euler_ancestral", euler, "down / walk.sigma, up)", "down / walk.sigma, 1.01 * up)"),
    Control("ddim", euler, "after * share", "1.01 * after * share", driver.ancestral),
    Control("ddpm", euler, "else small)", "else 1.01 * small)"),
    Control("lcm", euler, "0.0, walk.after)", "0.0, 1.01 * walk.after)"),
    Control("edm", heun, "up = math.sqrt(", "up = 1.01 * math.sqrt("),
    Control("dpm2_ancestral", heun, "alpha=up) if up else out", "alpha=1.01 * up) if up else out"),
    Control("dpm++2m_sde", dpm, "alpha=after * math", "alpha=1.01 * after * math"),
    Control("dpm++2m_sde_heun", dpm, "1 - k / (rate", "1 - 1.01 * k / (rate", quadrature.exponential),
    Control("dpm++3m_sde", dpm, "alpha=after * math", "alpha=1.01 * after * math"),
    Control("dpm++2s_ancestral", singlestep, "between0, down / sigma, up)", "between0, 1.01 * down / sigma, up)"),
    Control("dpm++sde", singlestep, "alpha=up) if up else out", "alpha=1.01 * up) if up else out"),
    Control("langevin", langevin, "after * math.sqrt(step_size)", "1.01 * after * math.sqrt(step_size)"),
    Control("predictor_corrector", langevin, "(after / sigma) ** 2", "1.01 * (after / sigma) ** 2"),
]


WITHOUT_PEER = ("dpm_adaptive", "langevin")


def named(control: Control) -> str:
    return control.name


def test_every_sampler_has_a_control() -> None:
    assert {control.name for control in (*FLOWS, *NOISES)} == set(table())


@pytest.mark.parametrize("control", FLOWS, ids=named)
def test_a_coefficient_off_fails_the_order(control: Control) -> None:
    column, stated = ("even" if control.name in ("ipndm", "plms") else "log"), table()[control.name].order
    assert min(orders(control.entry(control.old), column)) > stated - 0.3
    assert min(orders(control.entry(control.new), column)) < stated - 0.3


def closed_forms(name: str) -> None:
    """The tests of variance that this sampler is under."""
    if name == "langevin":
        exact.test_langevin_meets_its_own_stationary_variance(exact.STD, 0.1)
    elif name == "predictor_corrector":
        exact.test_gaussian_data_are_met_at_the_stated_rate(name, LOG)
    else:
        exact.test_one_datum_gets_exactly_the_noise_of_each_level(name, {"eta": 1.0} if name == "ddim" else {})
        if name not in exact.UNRATED:
            exact.test_gaussian_data_are_met_at_the_stated_rate(name, LOG)


@pytest.mark.parametrize("control", NOISES, ids=named)
def test_a_coefficient_off_fails_the_variance(control: Control, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(exact.ENTRIES, control.name, control.entry(control.old))
    closed_forms(control.name)
    monkeypatch.setitem(exact.ENTRIES, control.name, control.entry(control.new))
    with pytest.raises(AssertionError):
        closed_forms(control.name)


@functools.cache
def first_case(name: str) -> Case:
    """A trajectory that uses what is changed."""
    found = [case for case in cases() if case.ours == name and case.steps > 1]
    return max(found, key=lambda case: case.options.get("eta", 0.0))


@pytest.mark.parity
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("control", [c for c in (*FLOWS, *NOISES) if c.name not in WITHOUT_PEER], ids=named)
def test_a_coefficient_off_fails_the_comparison(control: Control, monkeypatch: pytest.MonkeyPatch) -> None:
    def compare() -> None:
        if control.name == "edm":
            parity.test_churn_is_karras_ve()
        elif control.name == "predictor_corrector":
            parity.test_predictor_and_corrector_are_those_of_the_peer()
        else:
            case = first_case(control.name)
            assert case.run().difference() < case.tolerance

    entries = table()
    monkeypatch.setattr(driver, "table", lambda: entries)
    entries[control.name] = control.entry(control.old)
    compare()
    entries[control.name] = control.entry(control.new)
    with pytest.raises(AssertionError):
        compare()
