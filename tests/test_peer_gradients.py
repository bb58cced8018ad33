"""The benchmarks' peer is used compiled only where its gradients are those that it has eager."""

import importlib.util
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import nn

PEER = Path(__file__).parents[1] / "benchmarks" / "peer.py"
pytestmark = pytest.mark.parity


@pytest.fixture(scope="module")
def peer() -> ModuleType:
    spec = importlib.util.spec_from_file_location("peer", PEER)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_lost_gradients_of_one_part_are_named(peer: ModuleType) -> None:
    def found(variant: Any) -> dict[str, torch.Tensor]:
        torch.manual_seed(0)
        network = nn.ModuleDict({"encoder": nn.Linear(4, 4), "decoder": nn.Linear(4, 300), "unused": nn.Linear(1, 1)})
        z = network["encoder"](torch.ones(2, 4))
        z = z.detach() if lost and variant.compiled else z
        made: dict[str, torch.Tensor] = peer.gradients(network, lambda: network["decoder"](z).square().mean(), False)
        return made

    variant = peer.Variant(False, False, True)
    lost = False
    peer.trusted(variant, found)
    lost = True
    with pytest.raises(RuntimeError, match=r"gradients of encoder are wrong \(cosine 0.00\)"):
        peer.trusted(variant, found)
    peer.trusted(variant._replace(compiled=False), found)
