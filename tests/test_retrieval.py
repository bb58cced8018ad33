"""The retrieval benchmark counts what it says it counts."""

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest
import torch


@pytest.fixture(scope="module")
def retrieval() -> ModuleType:
    path = Path(__file__).parents[1] / "benchmarks" / "retrieval.py"
    spec = importlib.util.spec_from_file_location("retrieval", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def glyphs() -> torch.Tensor:
    pictures = torch.rand(7, 3, 64, 64, generator=torch.Generator().manual_seed(0)) * 2 - 1
    pictures[5] = pictures[2]  # pixel-identical
    return pictures


def test_every_glyph_finds_itself(retrieval: ModuleType, glyphs: torch.Tensor) -> None:
    everything = torch.arange(7)
    same = retrieval.identical(glyphs)
    assert same.tolist() == [0, 1, 2, 3, 4, 2, 6]
    assert retrieval.obeyed(glyphs, glyphs, same, everything) == {"first": 1.0, "within five": 1.0}


def test_another_glyph_is_no_hit(retrieval: ModuleType, glyphs: torch.Tensor) -> None:
    same = retrieval.identical(glyphs)
    figures = retrieval.obeyed(glyphs.roll(1, 0), glyphs, same, torch.arange(7))
    assert figures["first"] == 0.0
    swapped = glyphs[[0, 1, 5, 3, 4, 2, 6]]  # identical glyphs count as one
    assert retrieval.obeyed(swapped, glyphs, same, torch.arange(7))["first"] == 1.0


def test_near_is_measured_at_half_the_size(retrieval: ModuleType, glyphs: torch.Tensor) -> None:
    fine = torch.tensor([[0.9, -0.9], [-0.9, 0.9]]).repeat(32, 32)
    figures = retrieval.obeyed(glyphs + fine, glyphs, retrieval.identical(glyphs), torch.arange(7))
    assert figures["first"] == 1.0, "a checkerboard of single pixels does not count"


def test_reordering_changes_the_order_and_nothing_else(retrieval: ModuleType) -> None:
    for index, caption in enumerate(["red heart", "woman running facing right", "one two three"]):
        words = retrieval.reordered(caption, index)
        assert words != caption
        assert sorted(words.split()) == sorted(caption.split())
