"""Files made to harm are refused at once, with nothing run; files that trainers left behind are read."""

import collections
import io
import json
import os
import pickle
import shutil
import struct
import subprocess
import time
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import family
import pytest
import torch

from latentkit.checkpoints.diffusers_folder import INDEX, read_folder, write_folder
from latentkit.checkpoints.layouts import open_model
from latentkit.checkpoints.storage.archive import read_archive
from latentkit.checkpoints.storage.pickles import INERT, read_pickle
from latentkit.errors import InputError


def checkpoint(path: Path, program: bytes, entries: dict[str, bytes] | None = None, **options: Any) -> Path:
    """A zip as torch.save writes it, around any pickle."""
    with zipfile.ZipFile(path, "w", **options) as archive:
        archive.writestr("archive/data.pkl", program)
        for name, data in (entries if entries is not None else {"data/0": bytes(16), "version": b"3\n"}).items():
            archive.writestr(f"archive/{name}", data)
    return path


@pytest.fixture
def quiet(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """Whatever a gadget would call is caught; a second is the most that a refusal may take."""
    called: list[str] = []
    for module, name in ((os, "system"), (os, "popen"), (os, "execv"), (subprocess, "Popen")):
        monkeypatch.setattr(module, name, lambda *_, name=name, **__: called.append(name))
    start = time.process_time()
    yield called
    assert time.process_time() - start < 1
    assert called == []


CALLABLES = [
    "os system", "posix system", "nt system", "os popen", "os execv", "os remove", "os putenv", "subprocess Popen",
    "subprocess check_output", "subprocess run", "builtins eval", "builtins exec", "builtins compile",
    "builtins __import__", "builtins getattr", "builtins setattr", "builtins open", "builtins map", "builtins print",
    "builtins globals", "__builtin__ eval", "__builtin__ file", "importlib import_module", "runpy run_path",
    "runpy _run_code", "pty spawn", "socket socket", "socket create_connection", "shutil rmtree", "shutil move",
    "webbrowser open", "ctypes CDLL", "code InteractiveInterpreter", "timeit timeit", "cProfile run", "pdb run",
    "types FunctionType", "types CodeType", "marshal loads", "pickle loads", "_pickle loads", "dill loads",
    "torch load", "torch.hub load", "torch.jit load", "torch.serialization load", "torch _C",
    "torch.storage _load_from_bytes", "torch.utils._config_module load_config",
    "torch._utils _rebuild_wrapper_subclass", "torch._tensor _rebuild_from_type_v2", "torch.package PackageImporter",
    "torch.distributed.rpc rpc_sync", "numpy load", "numpy.testing._private.utils runstring",
    "numpy.f2py.crackfortran getlincoef", "numpy.ctypeslib load_library", "operator attrgetter",
    "operator methodcaller", "functools partial", "itertools starmap", "copyreg _reconstructor", "copyreg __newobj__",
    "collections namedtuple", "collections.abc Callable", "logging.config listen", "pip main", "pip._internal main",
    "ensurepip _run_pip", "setuptools sandbox", "asyncio run", "multiprocessing Process", "threading Thread",
    "atexit register", "signal signal", "sys exit", "sys setprofile", "gc get_objects", "inspect getattr_static",
    "zipfile ZipFile", "tarfile open", "tempfile mkstemp", "urllib.request urlopen", "http.client HTTPSConnection",
    "ftplib FTP", "smtplib SMTP", "sqlite3 connect", "requests get", "aiohttp client", "transformers AutoModel",
    "lib2to3 main", "latentkit.checkpoints.files load", "builtins.__class__ x", "pytorch_lightningx evil",
    "omegaconfx evil", "collections OrderedDict.fromkeys", "torch FloatStorage.from_file",
]  # fmt: skip


@pytest.mark.parametrize("form", ["GLOBAL", "STACK_GLOBAL"])
@pytest.mark.parametrize("name", CALLABLES)
def test_gadgets_are_refused_by_name(name: str, form: str, tmp_path: Path, quiet: list[str]) -> None:
    module, function = name.split(" ")
    if form == "GLOBAL":
        start = b"c" + f"{module}\n{function}\n".encode()
    else:
        start = b"".join(b"\x8c" + bytes([len(part)]) + part.encode() for part in (module, function)) + b"\x93"
    command = b"X\x0c\x00\x00\x00touch /tmp/x"
    path = checkpoint(tmp_path / "model.ckpt", b"\x80\x04" + start + command + b"\x85R.")
    with pytest.raises(InputError, match="nothing was run") as caught:
        read_archive(path)
    assert f"{module}.{function}" in str(caught.value)


SYSTEM = os.system


class Gadget:
    def __reduce__(self) -> Any:
        return SYSTEM, ("touch /tmp/x",)


@pytest.mark.parametrize("place", ["value", "key", "callback", "state"])
def test_gadgets_inside_real_checkpoints_are_refused(place: str, tmp_path: Path, quiet: list[str]) -> None:
    content: dict[str, Any] = {"state_dict": {"weight": torch.ones(2)}}
    places: dict[str, dict[str, Any]] = {
        "value": {"evil": Gadget()},
        "key": {"state_dict": {"weight": Gadget()}},
        "callback": {"callbacks": {"x": [Gadget()]}},
        "state": {"optimizer_states": [{"a": (1, Gadget())}]},
    }
    content |= places[place]
    torch.save(content, tmp_path / "model.ckpt")
    with pytest.raises(InputError, match=r"(posix|os|nt)\.system"):
        open_model(tmp_path / "model.ckpt")


STORAGE = b"((X\x07\x00\x00\x00storagectorch\nFloatStorage\nX\x01\x00\x00\x000X\x03\x00\x00\x00cpuK\x04tQ"
TENSOR = b"ctorch._utils\n_rebuild_tensor_v2\n"


def tensor(arguments: bytes, storage: bytes = STORAGE) -> bytes:
    """A dict of one tensor rebuilt of these arguments."""
    return b"\x80\x02}X\x01\x00\x00\x00w" + TENSOR + storage + arguments + b"tRs."


PROGRAMS = {
    "larger than its data": tensor(b"K\x00K\x05\x85K\x01\x85\x89N"),
    "beyond its data": tensor(b"K\x03K\x02\x85K\x01\x85\x89N"),
    "a bomb of stride 0": tensor(b"K\x00J\xff\xff\xff\x7f\x85K\x00\x85\x89N"),
    "a bomb of two axes": tensor(b"K\x00J\xff\xff\xff\x7fJ\xff\xff\xff\x7f\x86K\x00K\x00\x86\x89N"),
    "a negative stride": tensor(b"K\x00K\x02\x85J\xff\xff\xff\xff\x85\x89N"),
    "a negative size": tensor(b"K\x00J\xff\xff\xff\xff\x85K\x01\x85\x89N"),
    "a negative offset": tensor(b"J\xff\xff\xff\xffK\x02\x85K\x01\x85\x89N"),
    "more axes than strides": tensor(b"K\x00K\x02K\x02\x86K\x01\x85\x89N"),
    "a size that is a text": tensor(b"K\x00X\x01\x00\x00\x00a\x85K\x01\x85\x89N"),
    "no storage": tensor(b"K\x00K\x02\x85K\x01\x85\x89N", b"(N"),
    "another storage": tensor(b"K\x00K\x02\x85K\x01\x85\x89N", STORAGE.replace(b"\x000X", b"\x009X")),
    "a storage too long": tensor(b"K\x00K\x02\x85K\x01\x85\x89N", STORAGE.replace(b"K\x04", b"J\xff\xff\xff\x7f")),
    "a storage of a negative length": tensor(
        b"K\x00K\x02\x85K\x01\x85\x89N", STORAGE.replace(b"K\x04", b"J\xff\xff\xff\xff")
    ),
    "a persistent id that is a text": b"\x80\x02X\x01\x00\x00\x00aQ.",
    "a call of a text": b"\x80\x02X\x01\x00\x00\x00a)R.",
    "a call of a type": b"\x80\x02ctorch\nFloatStorage\n)R.",
    "a call of a number": b"\x80\x02K\x01)R.",
    "no end": b"\x80\x02}",
    "nothing": b"",
    "an empty stack": b"\x80\x02.",
    "no mark": b"\x80\x02K\x01t.",
    "an unknown memo": b"\x80\x02h\x07.",
    "an extension code": b"\x80\x02\x82\x01.",
    "a persistent id as a line": b"Pfoo\n.",
    "an unknown instruction": b"\xfe.",
    "a long text that is not there": b"\x80\x02X\xff\xff\xff\x7fabc.",
    "a longer one": b"\x80\x04\x8d" + b"\xff" * 8 + b".",
    "a list that sets items": b"\x80\x02]K\x01K\x02s.",
    "a dict that is appended to": b"\x80\x02}K\x01a.",
    "an item that cannot be a key": b"\x80\x02}]K\x01s.",
    "a number that is none": b"Iabc\n.",
    "text that is not UTF-8 as a name": b"c\xff\xff\n\xff\n.",
    "only a number": b"\x80\x02K\x01.",
    "itself within itself": b"\x80\x02]q\x00h\x00a.",
}


@pytest.mark.parametrize("name", PROGRAMS)
def test_broken_programs_are_refused(name: str, tmp_path: Path, quiet: list[str]) -> None:
    path = checkpoint(tmp_path / "model.ckpt", PROGRAMS[name])
    with pytest.raises(InputError, match=r"model\.ckpt"):
        read_archive(path)


def good() -> bytes:
    return tensor(b"K\x00K\x02\x85K\x01\x85\x89N")


def test_the_program_that_the_broken_ones_are_made_of_is_good(tmp_path: Path) -> None:
    archive = read_archive(checkpoint(tmp_path / "model.ckpt", good()))
    assert torch.equal(archive.tensors["w"], torch.zeros(2))


def test_zip_tricks_are_refused(tmp_path: Path, quiet: list[str]) -> None:
    bomb = checkpoint(tmp_path / "bomb", good(), {"data/0": bytes(1 << 24)}, compression=zipfile.ZIP_DEFLATED)
    two = checkpoint(tmp_path / "two", good(), {"data/0": bytes(16), "x/data.pkl": b"."})
    with zipfile.ZipFile(two, "a") as archive:
        archive.writestr("other/data.pkl", b"\x80\x02}.")
    twice = checkpoint(tmp_path / "twice", good())
    with zipfile.ZipFile(twice, "a") as archive, pytest.warns(UserWarning, match="Duplicate"):
        archive.writestr("archive/data/0", bytes(16))
    cut = tmp_path / "cut"
    cut.write_bytes(checkpoint(tmp_path / "whole", good()).read_bytes()[:-30])
    big = checkpoint(tmp_path / "swapped", good(), {"data/0": bytes(16), "byteorder": b"big"})
    none = tmp_path / "none"
    with zipfile.ZipFile(none, "w") as archive:
        archive.writestr("a", b"b")
    moved = bytearray(checkpoint(tmp_path / "moved", good()).read_bytes())
    place = moved.rindex(b"PK\x01\x02")
    moved[place + 42 : place + 46] = struct.pack("<I", 7)
    (tmp_path / "moved").write_bytes(moved)
    behind = bytearray(checkpoint(tmp_path / "behind", good()).read_bytes())
    place = behind.rindex(b"PK\x01\x02")
    behind[place + 20 : place + 28] = struct.pack("<II", 1 << 30, 1 << 30)
    (tmp_path / "behind").write_bytes(behind)
    for path in (bomb, two, twice, cut, big, none, tmp_path / "moved", tmp_path / "behind"):
        with pytest.raises(InputError, match=path.name):
            read_archive(path)


def header(content: Any, data: bytes = bytes(16), length: int | None = None) -> bytes:
    text = content if isinstance(content, bytes) else json.dumps(content).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


ENTRY = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}
SAFETENSORS = {
    "a header of 2^63 bytes": header({"w": ENTRY}, length=1 << 63),
    "a header of 90 MB": header({"w": ENTRY}, length=90_000_000),
    "no JSON": header(b"{nonsense"),
    "a list": header([1]),
    "deep JSON": header(b'{"a":' * 50_000 + b"1" + b"}" * 50_000),
    "behind the end": header({"w": ENTRY | {"data_offsets": [8, 1 << 40]}}),
    "a negative offset": header({"w": ENTRY | {"data_offsets": [-8, 0]}}),
    "a shape larger than its data": header({"w": ENTRY | {"shape": [1 << 40]}}),
    "a shape that overflows": header({"w": ENTRY | {"shape": [1 << 33, 1 << 33]}}),
    "a negative shape": header({"w": ENTRY | {"shape": [-2]}}),
    "overlapping": header({"w": ENTRY, "v": ENTRY}),
    "a hole": header({"w": ENTRY, "v": ENTRY | {"data_offsets": [12, 20]}}, bytes(20)),
    "an unknown type": header({"w": ENTRY | {"dtype": "EVIL"}}),
    "metadata that is no text": header({"__metadata__": {"a": 1}, "w": ENTRY}),
    "more data than it says": header({"w": ENTRY}, bytes(99)),
    "empty": b"",
    "text": b"hello world, this is no model at all",
    "a pickle of old": pickle.dumps({"a": 1}, 2) + bytes(20),
}


@pytest.mark.parametrize("name", SAFETENSORS)
def test_broken_safetensors_are_refused(name: str, tmp_path: Path, quiet: list[str]) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(SAFETENSORS[name])
    with pytest.raises(InputError, match=r"model\.safetensors"):
        read_archive(path)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("hostile") / "model"
    write_folder(path, family.model("SD 1"))
    return path


@pytest.mark.parametrize(
    ("file", "change", "message"),
    [
        (INDEX, {"unet": ["os", "system"]}, "'unet' is of"),
        (INDEX, {"unet": ["diffusers", "FluxTransformer2DModel"]}, "known are UNet2DConditionModel"),
        (INDEX, {"vae": ["my_module", "AutoencoderKL"]}, "'vae' is of"),
        (INDEX, {"text_encoder": ["../../evil", "CLIPTextModel"]}, "'text_encoder' is of"),
        (INDEX, {"evil": ["diffusers", "UNet2DConditionModel"]}, "known are none of that name"),
        (INDEX, {"unet": ["diffusers"]}, "'unet' is of"),
        (INDEX, {"unet": [None, None]}, "names no unet"),
        ("unet/config.json", {"act_fn": "os.system"}, "act_fn is 'os.system'"),
        ("unet/config.json", {"block_out_channels": [32, 1 << 40, 64]}, "block_out_channels"),
        ("unet/config.json", {"layers_per_block": 1_000_000}, "at most 2000 are built"),
        ("unet/config.json", {"transformer_layers_per_block": [900_000] * 3}, "at most 2000 are built"),
        ("unet/config.json", {"down_block_types": ["DownBlock2D"] * 999}, "16 at most"),
        ("unet/config.json", {"in_channels": "4"}, "in_channels is '4'"),
        ("unet/config.json", {"in_channels": -4}, "in_channels is '-4'"),
        ("unet/config.json", {"brand_new_thing": 3}, "brand_new_thing"),
        ("unet/config.json", {"time_embedding_type": "fourier"}, "time_embedding_type is 'fourier'"),
        ("vae/config.json", {"layers_per_block": 1_000_000}, "at most 2000 are built"),
        ("vae/config.json", {"scaling_factor": "nan"}, "scaling_factor"),
        ("vae/config.json", {"norm_num_groups": 7}, "norm_num_groups"),
        ("text_encoder/config.json", {"num_hidden_layers": 500_000}, "at most 2000 are built"),
        ("scheduler/scheduler_config.json", {"num_train_timesteps": 1 << 40}, "num_train_timesteps"),
        ("scheduler/scheduler_config.json", {"beta_schedule": "exec"}, "beta_schedule is 'exec'"),
    ],
)
def test_folders_with_foreign_classes_and_absurd_configs_are_refused(
    file: str, change: dict[str, Any], message: str, folder: Path, tmp_path: Path, quiet: list[str]
) -> None:
    root = tmp_path / "model"
    shutil.copytree(folder, root)
    content = json.loads((root / file).read_text()) | change
    (root / file).write_text(json.dumps(content))
    with pytest.raises(InputError, match=message):
        read_folder(root)


@pytest.mark.parametrize("name", ["../../../etc/passwd", "/etc/passwd", "a/b.safetensors", ".hidden", ".."])
def test_shards_do_not_lead_out_of_their_folder(name: str, folder: Path, tmp_path: Path, quiet: list[str]) -> None:
    root = tmp_path / "model"
    shutil.copytree(folder, root)
    (root / "unet" / "diffusion_pytorch_model.safetensors").unlink()
    index = root / "unet" / "diffusion_pytorch_model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"conv_in.weight": name}}))
    with pytest.raises(InputError, match="is no file of this folder"):
        read_folder(root)


def test_what_trainers_leave_behind_is_read_as_nothing(tmp_path: Path) -> None:
    """Lightning's callbacks, OmegaConf's configs, optimiser states; views, parameters and every type."""
    weights = {
        "half": torch.randn(3).half(), "brain": torch.randn(3).bfloat16(), "double": torch.randn(3).double(),
        "view": torch.randn(6, 6)[1:3, ::2], "parameter": torch.nn.Parameter(torch.ones(2)), "whole": torch.arange(5),
        "empty": torch.zeros(0), "number": torch.tensor(0.18), "flags": torch.tensor([True, False]),
    }  # fmt: skip
    torch.save(
        {"state_dict": collections.OrderedDict(weights), "global_step": 875000, "lr": 1e-4, "name": "x"},
        tmp_path / "model.ckpt",
    )
    archive = read_archive(tmp_path / "model.ckpt")
    assert archive.values == {"global_step": 875000, "lr": 1e-4, "name": "x"}
    assert archive.tensors.keys() == weights.keys()
    for name, tensor_ in weights.items():
        assert archive.tensors[name].dtype == tensor_.dtype
        assert torch.equal(archive.tensors[name], tensor_)
    callback = b"cpytorch_lightning.callbacks.model_checkpoint\nModelCheckpoint\n)\x81}X\x01\x00\x00\x00aK\x01sb"
    program = b"\x80\x02}(X\x09\x00\x00\x00callbacks" + callback + b"X\x01\x00\x00\x00wK\x02u."
    assert read_pickle(checkpoint(tmp_path / "other.ckpt", program)) == {"callbacks": INERT, "w": 2}


def test_every_protocol_of_pickle_is_read(tmp_path: Path) -> None:
    content = {
        "a": [1, 2.5, -3, 1 << 70, True, None],
        "b": ("x", ("y", "z"), ()),
        "c": {"d": {}},
        "e": {1, 2},
        "f": "ü" * 300,
    }
    for protocol in range(6):
        stream = io.BytesIO()
        pickle.dump({key: value for key, value in content.items() if key != "e" or protocol > 3}, stream, protocol)
        found = read_pickle(checkpoint(tmp_path / f"{protocol}.ckpt", stream.getvalue()))
        assert all(found[key] == content[key] for key in found)
        assert len(found) >= 4
