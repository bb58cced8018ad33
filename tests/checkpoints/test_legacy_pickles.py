"""Checkpoints of before torch 1.6: what torch writes so is read to the bit, and what harms is refused at once."""

import collections
import os
import pickle
import struct
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from latentkit.checkpoints.storage.archive import read_archive
from latentkit.checkpoints.storage.legacy import MAGIC, PROTOCOL
from latentkit.errors import InputError

WEIGHTS = {
    "half": torch.randn(3).half(), "brain": torch.randn(3).bfloat16(), "double": torch.randn(3).double(),
    "view": torch.randn(6, 6)[1:3, ::2], "parameter": torch.nn.Parameter(torch.ones(2)), "whole": torch.arange(5),
    "empty": torch.zeros(0), "number": torch.tensor(0.18), "flags": torch.tensor([True, False, True]),
}  # fmt: skip


@pytest.fixture(autouse=True)
def quiet(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Nothing is run, and nothing takes a second."""
    called: list[Any] = []
    monkeypatch.setattr(os, "system", called.append)
    start = time.process_time()
    yield
    assert time.process_time() - start < 1
    assert called == []


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_what_torch_writes_so_is_read_to_the_bit(protocol: int, tmp_path: Path) -> None:
    """Three flags before it shift what follows to odd places."""
    path = tmp_path / "model.ckpt"
    weights = WEIGHTS | {"again": WEIGHTS["whole"]}
    content = {"state_dict": collections.OrderedDict(weights), "global_step": 875000, "name": "x"}
    torch.save(content, path, _use_new_zipfile_serialization=False, pickle_protocol=protocol)
    archive = read_archive(path)
    assert archive.values == {"global_step": 875000, "name": "x"}
    assert archive.tensors.keys() == weights.keys()
    for name, tensor in weights.items():
        assert archive.tensors[name].dtype == tensor.dtype
        assert torch.equal(archive.tensors[name], tensor), name


SYSTEM = {"protocol_version": 1001, "little_endian": True, "type_sizes": {"short": 2, "int": 4, "long": 4}}
STORAGE = b"((X\x07\x00\x00\x00storagectorch\nFloatStorage\nX\x01\x00\x00\x000X\x03\x00\x00\x00cpuK\x04NtQ"
GADGET = b"\x80\x02cposix\nsystem\nX\x02\x00\x00\x00ls\x85R."
SIZES = b"K\x00K\x02\x85K\x01\x85\x89N"


def content(storage: bytes = STORAGE, sizes: bytes = SIZES) -> bytes:
    """The pickle of a dict of one tensor."""
    return b"\x80\x02}X\x01\x00\x00\x00wctorch._utils\n_rebuild_tensor_v2\n" + storage + sizes + b"tRs."


def legacy(
    program: bytes | None = None,
    names: Any = ("0",),
    data: bytes = struct.pack("<q", 4) + bytes(16),
    magic: Any = MAGIC,
    version: Any = PROTOCOL,
    system: Any = SYSTEM,
) -> bytes:
    head = b"".join(pickle.dumps(value, 2) for value in (magic, version, system))
    return head + (content() if program is None else program) + pickle.dumps(list(names), 2) + data


HOSTILE = {
    "no magic": legacy(magic=7),
    "magic that is a gadget": GADGET,
    "a tensor for magic": content() + bytes(20),
    "another protocol": legacy(version=1002),
    "the other byte order": legacy(system=SYSTEM | {"little_endian": False}),
    "no system": legacy(system=[]),
    "a gadget for a system": pickle.dumps(MAGIC, 2) + pickle.dumps(PROTOCOL, 2) + GADGET,
    "a gadget in the content": legacy(b"\x80\x02}X\x01\x00\x00\x00w" + GADGET[2:-1] + b"s."),
    "a gadget behind the content": legacy(names=[])[: -24 - len(pickle.dumps([], 2))] + GADGET,
    "a module with its source": legacy(content(STORAGE.replace(b"\x07\x00\x00\x00storage", b"\x06\x00\x00\x00module"))),
    "a part of another storage": legacy(
        content(STORAGE.replace(b"K\x04NtQ", b"K\x04X\x01\x00\x00\x000K\x00K\x01\x87tQ"))
    ),
    "a storage as large as the memory": legacy(content(STORAGE.replace(b"K\x04", b"\x8a\x08" + b"\xff" * 7 + b"\x0f"))),
    "a storage of a negative length": legacy(content(STORAGE.replace(b"K\x04", b"J\xff\xff\xff\xff"))),
    "a tensor larger than its data": legacy(content(sizes=b"K\x00K\x05\x85K\x01\x85\x89N")),
    "a bomb of stride 0": legacy(content(sizes=b"K\x00J\xff\xff\xff\x7f\x85K\x00\x85\x89N")),
    "a list without its data": legacy(names=()),
    "a list with others": legacy(names=("0", "1")),
    "a name twice": legacy(names=("0", "0")),
    "names that are none": legacy(names=([1],)),
    "no list": legacy()[: -24 - len(pickle.dumps(["0"], 2))] + b"\x80\x02K\x01." + bytes(24),
    "data cut short": legacy(data=struct.pack("<q", 4) + bytes(15)),
    "data of another length": legacy(data=struct.pack("<q", 3) + bytes(16)),
    "data of a negative length": legacy(data=struct.pack("<q", -4) + bytes(16)),
    "no data": legacy(data=b""),
    "half a length": legacy(data=bytes(5)),
    "one storage of two types": legacy(
        content()[:-1] + b"X\x01\x00\x00\x00v" + content(STORAGE.replace(b"Float", b"Int"))[9:]
    ),
    "cut in the content": legacy()[:100],
    "cut in the magic": legacy()[:12],
    "only an end": b"\x80\x02." + bytes(20),
    "plain values": pickle.dumps({"a": 1}, 2) + bytes(20),
}


def test_the_file_that_the_hostile_ones_are_made_of_is_good(tmp_path: Path) -> None:
    path = tmp_path / "model.ckpt"
    path.write_bytes(legacy(data=struct.pack("<q4f", 4, 1, 2, 3, 4)))
    assert torch.equal(read_archive(path).tensors["w"], torch.tensor([1.0, 2.0]))


WHY = {
    "gadget": r"names 'posix\.system'",
    "no magic": "torch.save did not write",
    "plain values": "torch.save did not write",
    "another protocol": "another version of torch",
    "byte order": "another version of torch",
    "no system": "another version of torch",
    "a tensor for magic": "a tensor where none may be",
    "part of another": "a storage that is a part of another",
    "as large as the memory": "missing, too short or of two types",
    "two types": "missing, too short or of two types",
    "a list with": "its list of data",
    "a name twice": "its list of data",
    "no list": "its list of data",
    "data cut short": "too short or of another length",
    "data of a": "too short or of another length",
    "no data": "too short or of another length",
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_files_are_refused(name: str, tmp_path: Path) -> None:
    path = tmp_path / "model.ckpt"
    path.write_bytes(HOSTILE[name])
    why = next((why for part, why in WHY.items() if part in name), "")
    with pytest.raises(InputError, match=rf"model\.ckpt.*{why}"):
        read_archive(path)


def test_data_asked_for_by_many_is_copied_once(tmp_path: Path) -> None:
    """A thousand tensors of the same 8 MB, which lie unevenly."""
    path, one = tmp_path / "model.ckpt", torch.zeros(1 << 20, dtype=torch.float64)
    flags = torch.ones(1, dtype=torch.bool)
    torch.save({"0": flags} | {str(n): one for n in range(1, 1000)}, path, _use_new_zipfile_serialization=False)
    tensors = read_archive(path).tensors
    assert len({tensor.data_ptr() for name, tensor in tensors.items() if name != "0"}) == 1
