"""Files made to harm, as bytes: pickles that would run something, zips and safetensors that lie, sizes without end."""

import json
import os
import pickle
import struct
import warnings
import zipfile
from pathlib import Path
from typing import Any


def checkpoint(path: Path, program: bytes, entries: dict[str, bytes] | None = None, **options: Any) -> Path:
    """A zip as torch.save writes it, around any pickle."""
    with zipfile.ZipFile(path, "w", **options) as archive:
        archive.writestr("archive/data.pkl", program)
        for name, data in (entries if entries is not None else {"data/0": bytes(16), "version": b"3\n"}).items():
            archive.writestr(f"archive/{name}", data)
    return path


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


def calling(name: str, form: str) -> bytes:
    """A program that calls a function ("module name") with a shell's command."""
    module, function = name.split(" ")
    if form == "GLOBAL":
        start = b"c" + f"{module}\n{function}\n".encode()
    else:
        start = b"".join(b"\x8c" + bytes([len(part)]) + part.encode() for part in (module, function)) + b"\x93"
    return b"\x80\x04" + start + b"X\x0c\x00\x00\x00touch /tmp/x\x85R."


SYSTEM = os.system


class Gadget:
    """What a pickle of runs a program when it is read as pickles are."""

    def __reduce__(self) -> Any:
        return SYSTEM, ("touch /tmp/x",)


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


def listed(text: str) -> bytes:
    """A tuple that holds itself twice, 27 times over: 100 million parts, of which each is the same text."""
    return b"X" + struct.pack("<I", len(text)) + text.encode() + b"2\x86" * 27


BOMBS = {
    "a key whose hash takes forever": b"\x80\x02}" + listed("a") + b"K\x01s.",
    "a key of a dict of pairs": b"\x80\x02(" + listed("a") + b"K\x01d.",
    "a key of an ordered dict": b"\x80\x02ccollections\nOrderedDict\n(](" + listed("a") + b"K\x01\x86etR.",
    "an element of a set": b"\x80\x04\x8f(" + listed("a") + b"\x90.",
    "a name that takes forever to show": b"\x80\x04X\x01\x00\x00\x00a" + listed("a") + b"\x93.",
    "a storage of such a name": tensor(
        b"K\x00K\x02\x85K\x01\x85\x89N", STORAGE.replace(b"X\x01\x00\x00\x000", listed("0"))
    ),
    "one dict in very many places": b"\x80\x02"
    + b"}("
    + b"".join(b"X\x02\x00\x00\x00%02dK\x01" % n for n in range(60))
    + b"u"
    + b"".join(
        b"q%c0}(" % n + b"".join(b"X\x02\x00\x00\x00%02dh%c" % (k, n) for k in range(60)) + b"u" for n in range(3)
    )
    + b".",
    "a size that overflows": tensor(b"K\x00\x8a\x08\xff\xff\xff\xff\xff\xff\xff\x7fK\x00\x86K\x01K\x01\x86\x89N"),
    "a stride that overflows": tensor(b"K\x00K\x01\x85\x8a\x0a" + b"\xff" * 9 + b"\x7f\x85\x89N"),
}
"""Programs that are short, and ask for more time or memory than there is."""


def good() -> bytes:
    return tensor(b"K\x00K\x02\x85K\x01\x85\x89N")


def zips(folder: Path) -> list[Path]:
    """Zips that are no checkpoints, each called after its trick."""
    bomb = checkpoint(folder / "bomb", good(), {"data/0": bytes(1 << 24)}, compression=zipfile.ZIP_DEFLATED)
    two = checkpoint(folder / "two", good(), {"data/0": bytes(16), "x/data.pkl": b"."})
    with zipfile.ZipFile(two, "a") as archive:
        archive.writestr("other/data.pkl", b"\x80\x02}.")
    twice = checkpoint(folder / "twice", good())
    with zipfile.ZipFile(twice, "a") as archive, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        archive.writestr("archive/data/0", bytes(16))
    cut = folder / "cut"
    cut.write_bytes(checkpoint(folder / "whole", good()).read_bytes()[:-30])
    big = checkpoint(folder / "swapped", good(), {"data/0": bytes(16), "byteorder": b"big"})
    none = folder / "none"
    with zipfile.ZipFile(none, "w") as archive:
        archive.writestr("a", b"b")
    moved = bytearray(checkpoint(folder / "moved", good()).read_bytes())
    place = moved.rindex(b"PK\x01\x02")
    moved[place + 42 : place + 46] = struct.pack("<I", 7)
    (folder / "moved").write_bytes(moved)
    behind = bytearray(checkpoint(folder / "behind", good()).read_bytes())
    place = behind.rindex(b"PK\x01\x02")
    behind[place + 20 : place + 28] = struct.pack("<II", 1 << 30, 1 << 30)
    (folder / "behind").write_bytes(behind)
    return [bomb, two, twice, cut, big, none, folder / "moved", folder / "behind"]


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
