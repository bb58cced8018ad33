"""What every test shares: checked shapes and types on floors 0 to 2, one thread, a fixed seed, honest parity skips."""

import importlib.util
from collections.abc import Iterator

import jaxtyping
import pytest

CHECKED = ["latentkit.diffusion", "latentkit.nets", "latentkit.model"]
INT_PASSES_FOR_FLOAT = "beartype.beartype(conf=beartype.BeartypeConf(is_pep484_tower=True))"
jaxtyping.install_import_hook(CHECKED, INT_PASSES_FOR_FLOAT)

import torch  # noqa: E402
from hypothesis import settings  # noqa: E402

torch.set_num_threads(1)
settings.register_profile("latentkit", deadline=None, derandomize=True)
settings.load_profile("latentkit")


NO_PEER = "diffusers is not installed: pip install 'latentkit[bench]'"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip parity tests where the peer is not installed."""
    if importlib.util.find_spec("diffusers") is None:
        for item in items:
            if item.get_closest_marker("parity"):
                item.add_marker(pytest.mark.skip(reason=NO_PEER))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Say so, however quiet the run is."""
    skipped = [report for report in terminalreporter.stats.get("skipped", []) if NO_PEER in str(report.longrepr)]
    if skipped:
        terminalreporter.write_line(f"{len(skipped)} parity tests were skipped: {NO_PEER}")


@pytest.fixture(autouse=True)
def _seed() -> None:
    """Every test starts from the same global seed, whatever ran before it."""
    torch.manual_seed(0)


@pytest.fixture
def unchecked() -> Iterator[None]:
    """The run without type checks that a user has: for what the code itself must refuse."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)
