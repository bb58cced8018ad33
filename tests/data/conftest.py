import numpy as np
import pytest

from latentkit.data.pictures import to_png


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch):
    """Indexes go to a folder of the test's own."""
    folder = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder))
    return folder


@pytest.fixture
def save():
    """save(path, seed, (h, w, c)): a PNG of random samples, and its array."""
    import torch

    def write(path, seed, shape=(8, 8, 3)):
        array = np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(to_png(torch.from_numpy(array).permute(2, 0, 1).float() / 127.5 - 1))
        return array

    return write
