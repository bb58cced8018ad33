"""Files of tensors lie in memory only while they are used, and hold what the safetensors library reads there."""

import re
import sys
from dataclasses import replace
from pathlib import Path

import family
import pytest
import torch
from safetensors.torch import load_file, save_file

from latentkit.checkpoints.diffusers_folder import write_folder
from latentkit.checkpoints.files import load
from latentkit.checkpoints.ldm_file import write_single
from latentkit.checkpoints.names.rename import finite
from latentkit.checkpoints.storage.archive import read_archive
from latentkit.checkpoints.storage.mapping import let_go
from latentkit.model.latent_diffusion import LatentDiffusion

ROOM = 32 << 20


def in_memory() -> int:
    """Bytes of files that this process has in memory."""
    found = re.search(r"RssFile:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found
    return int(found[1]) << 10


@pytest.mark.parametrize("shift", [0, 1])
def test_tensors_are_those_of_the_library(shift: int, tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    types = (torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.uint8)
    tensors = {str(dtype): (torch.arange(6) + 1).reshape(2, 3).to(dtype) for dtype in types}
    tensors |= {"none": torch.zeros(0, 4), "number": torch.tensor(2.5)}
    save_file(tensors, path, {"says": "something" + " " * shift})
    found = read_archive(path)
    assert found.metadata["says"].strip() == "something"
    assert found.tensors.keys() == tensors.keys()
    for name, tensor in load_file(path).items():
        assert torch.equal(found.tensors[name], tensor)
        assert found.tensors[name].dtype == tensor.dtype


def test_tensors_behind_a_header_of_any_length(tmp_path: Path) -> None:
    path, moved = tmp_path / "a.safetensors", tmp_path / "b.safetensors"
    save_file({"a": torch.arange(5.0), "b": torch.arange(3.0)}, path)
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    moved.write_bytes((length + 1).to_bytes(8, "little") + data[8 : 8 + length] + b" " + data[8 + length :])
    assert torch.equal(read_archive(moved).tensors["a"], torch.arange(5.0))


@pytest.mark.skipif(sys.platform != "linux", reason="counts pages as Linux does")
@pytest.mark.parametrize("pickled", [False, True])
def test_what_is_let_go_of_leaves_memory_and_comes_again(pickled: bool, tmp_path: Path) -> None:
    path = tmp_path / "a.ckpt"
    values = torch.arange(ROOM // 4, dtype=torch.float32)
    if pickled:
        torch.save({"state_dict": {"a": values, "b": values + 1}}, path)
    else:
        save_file({"a": values, "b": values + 1}, path)
    mapped = read_archive(path).tensors
    before = in_memory()
    sums = [float(tensor.double().sum()) for tensor in mapped.values()]
    assert in_memory() - before > 1.9 * ROOM
    let_go([mapped["a"]])
    assert in_memory() - before < 1.1 * ROOM
    let_go([mapped["b"]])
    assert in_memory() - before < 0.1 * ROOM
    assert [float(tensor.double().sum()) for tensor in mapped.values()] == sums


def test_nothing_else_is_let_go_of() -> None:
    values = torch.arange(1 << 20)
    let_go([values, torch.empty(3, device="meta"), torch.empty(0)])
    assert torch.equal(values, torch.arange(1 << 20))


@pytest.mark.skipif(sys.platform != "linux", reason="counts pages as Linux does")
@pytest.mark.parametrize("layout", ["file", "folder"])
def test_what_rests_is_out_of_memory_when_it_has_been_read(layout: str, tmp_path: Path) -> None:
    wide = replace(family.ARCHITECTURES["SD 1"], network=replace(family.UNET, channels=256))
    model, path = LatentDiffusion(wide, {}).eval().requires_grad_(False), tmp_path / "model"
    write_folder(path, model) if layout == "folder" else write_single(path, model, "test")
    size = sum(parameter.nbytes for parameter in model.denoiser.parameters())
    before = in_memory()
    kept = load(path, "cpu")
    assert in_memory() - before > 0.8 * size
    del kept
    before = in_memory()
    rests = load(path, "cpu", low_memory=True)
    assert in_memory() - before < 0.3 * size
    del rests


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_values_that_are_not_finite_are_noticed(dtype: torch.dtype) -> None:
    """Whatever their place; the largest of a type, and none at all, are finite."""
    for count in (1, 7, 100_003):
        values = torch.full((count,), torch.finfo(dtype).max, dtype=dtype)
        assert finite(values)
        for value in (float("nan"), float("inf"), -float("inf")):
            for place in (0, count // 2, count - 1):
                assert not finite(values.index_fill(0, torch.tensor(place), value))
    assert finite(torch.empty(0, dtype=dtype))
