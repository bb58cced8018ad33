"""What every test shares: checked shapes and types on floors 0 to 2, one thread, a fixed seed, honest parity skips."""

import importlib.util

import jaxtyping
import pytest

CHECKED = ["latentkit.diffusion", "latentkit.nets", "latentkit.model"]
jaxtyping.install_import_hook(CHECKED, "beartype.beartype")

import torch  # noqa: E402

torch.set_num_threads(1)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip parity tests, with the reason, where the peer is not installed."""
    if importlib.util.find_spec("diffusers") is None:
        skip = pytest.mark.skip(reason="diffusers is not installed: pip install 'latentkit[bench]'")
        for item in items:
            if item.get_closest_marker("parity"):
                item.add_marker(skip)


@pytest.fixture(autouse=True)
def _seed() -> None:
    """Every test starts from the same global seed, whatever ran before it."""
    torch.manual_seed(0)
