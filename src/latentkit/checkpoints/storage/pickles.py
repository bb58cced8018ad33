"""Checkpoints that torch wrote as pickles, read by an interpreter of our own: nothing in them is imported or called.

Tensors, numbers, texts and containers are understood. Objects of a few libraries that trainers left in checkpoints
(Lightning's callbacks, OmegaConf's configs) stand as `INERT`; any other name is refused. Tensors are mapped from the
file, not read.
"""

import itertools
import math
import mmap
import struct
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import torch
from torch import Tensor

from latentkit.checkpoints.storage.mapping import mapped
from latentkit.errors import InputError

MOST_PROGRAM = 1 << 26
"""Bytes of the pickle proper (names and shapes; the largest known is 3 MB)."""
MOST_ENTRIES = 100_000
MOST_ELEMENTS = 1 << 40
"""The product of a shape's axes, those of length 0 left out: an empty tensor costs a file nothing, whatever it says."""
MOST_NAME = 500
"""Characters of a tensor's name."""
MOST_DIRECTORY = 1 << 24
"""Bytes of a zip's list of entries."""
TYPES = {
    "FloatStorage": torch.float32,
    "DoubleStorage": torch.float64,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
}
TOLERATED = (
    "pytorch_lightning.",
    "lightning.",
    "lightning_fabric.",
    "omegaconf.",
    "numpy.dtype",
    "numpy.core.multiarray.scalar",
    "numpy._core.multiarray.scalar",
    "typing.Any",
    "collections.defaultdict",
    "_codecs.encode",
    "torch.Size",
    "torch.device",
    "torch.float16",
    "torch.float32",
    "pathlib.PosixPath",
    *(
        f"{module}.{name}"
        for module in ("builtins", "__builtin__")
        for name in ("dict", "list", "int", "float", "long")
    ),
)
"""Names, and beginnings of names that end in a dot, of what is left aside."""


class _Inert:
    """What an object of a tolerated library is read as: nothing, that nothing can be done with."""

    def __repr__(self) -> str:
        return "INERT"


INERT = _Inert()


class _Name(NamedTuple):
    module: str
    name: str


class Storage(NamedTuple):
    """What a tensor's data are said to be: their type, their name in the file, and how many there are."""

    type: torch.dtype
    key: str
    length: int


class _Mark(NamedTuple):
    pass


def read_pickle(path: Path) -> Any:
    """The content of a zip that `torch.save` wrote, tensors mapped copy-on-write; InputError for anything else."""
    try:
        space = mapped(path)
        with open(path, "rb") as file:
            end = zipfile._EndRecData(file)  # type: ignore[attr-defined]  # where the list lies, not yet read
        if end and end[5] > MOST_DIRECTORY:
            raise InputError(f"{path}: its list of entries has {end[5]} bytes; at most {MOST_DIRECTORY} are read")
        with zipfile.ZipFile(path) as archive:
            entries = _entries(path, archive, space)
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror or error}") from None
    except InputError:
        raise
    except (zipfile.BadZipFile, struct.error, ValueError, NotImplementedError) as error:
        raise InputError(f"{path}: is damaged, or no checkpoint that torch.save wrote ({str(error)[:100]})") from None
    programs = [name for name in entries if name.endswith("/data.pkl") and name.count("/") == 1]
    if len(programs) != 1:
        raise InputError(f"{path}: holds {len(programs)} pickles; a checkpoint holds one")
    start, size = entries[programs[0]]
    if size > MOST_PROGRAM:
        raise InputError(f"{path}: its pickle has {size} bytes; at most {MOST_PROGRAM} are read")
    root = programs[0].removesuffix("data.pkl")
    order = entries.get(root + "byteorder")
    if order is not None and bytes(space[order[0] : sum(order)]) != b"little":
        raise InputError(f"{path}: was written on a machine of the other byte order")

    def storage(asked: Storage) -> Tensor:
        place = entries.get(f"{root}data/{asked.key}")
        need = asked.length * asked.type.itemsize
        if place is None or asked.length < 0 or place[1] < need:
            raise InputError(f"{path}: the data {asked.key!r} of a tensor is missing or too short")
        return (
            torch.frombuffer(space, dtype=asked.type, count=asked.length, offset=place[0])
            if need
            else torch.empty(0, dtype=asked.type)
        )

    with undamaged(path):
        return Machine(str(path), bytes(space[start : start + size]), storage).run()


@contextmanager
def undamaged(path: Path) -> Iterator[None]:
    """What goes wrong in a machine's run, as InputError about the file."""
    try:
        yield
    except InputError:
        raise
    except (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError, struct.error) as error:
        raise InputError(f"{path}: its pickle is damaged ({type(error).__name__})") from None


def _entries(path: Path, archive: zipfile.ZipFile, space: mmap.mmap) -> dict[str, tuple[int, int]]:
    """Where each entry's bytes lie: stored as they are, inside the file, no two in one place."""
    infos = archive.infolist()
    if len(infos) > MOST_ENTRIES:
        raise InputError(f"{path}: has {len(infos)} entries; at most {MOST_ENTRIES} are read")
    entries: dict[str, tuple[int, int]] = {}
    for info in infos:
        if info.compress_type != zipfile.ZIP_STORED or info.file_size != info.compress_size or info.flag_bits & 1:
            raise InputError(
                f"{path}: entry {info.filename[:80]!r} is compressed or encrypted; torch.save does neither"
            )
        header = space[info.header_offset : info.header_offset + 30]
        if header[:4] != b"PK\x03\x04":
            raise InputError(f"{path}: entry {info.filename[:80]!r} does not begin where it should")
        name, extra = struct.unpack("<HH", header[26:30])
        start = info.header_offset + 30 + name + extra
        if start + info.file_size > len(space) or info.filename in entries:
            raise InputError(f"{path}: entry {info.filename[:80]!r} is there twice or ends behind the file")
        entries[info.filename] = (start, info.file_size)
    places = sorted(entries.values())
    if any(start + size > after for (start, size), (after, _) in itertools.pairwise(places)):
        raise InputError(f"{path}: entries overlap")
    return entries


class Machine:
    """The pickle's opcodes (protocols 0 to 5) over plain values."""

    def __init__(self, what: str, program: bytes, storage: Callable[[Storage], Tensor], place: int = 0) -> None:
        """`place` is where in `program` it begins; afterwards it stands behind the end."""
        self.what, self.program, self.storage, self.place = what, program, storage, place
        self.stack: list[Any] = []
        self.memo: dict[int, Any] = {}

    def refuse(self, why: str) -> NoReturn:
        raise InputError(f"{self.what}: {why}; nothing was run")

    def take(self, count: int) -> bytes:
        if count < 0 or self.place + count > len(self.program):
            self.refuse("its pickle is cut short")
        self.place += count
        return self.program[self.place - count : self.place]

    def line(self, encoding: str = "utf-8") -> str:
        end = self.program.index(b"\n", self.place)
        text = self.program[self.place : end].decode(encoding)
        self.place = end + 1
        return text

    def unpack(self, form: str) -> int:
        return int(struct.unpack(form, self.take(struct.calcsize(form)))[0])

    def marked(self) -> list[Any]:
        """What lies above the last mark, taken off with it."""
        for index in range(len(self.stack) - 1, -1, -1):
            if isinstance(self.stack[index], _Mark):
                values = self.stack[index + 1 :]
                del self.stack[index:]
                return values
        self.refuse("its pickle has no mark where one must be")

    def run(self) -> Any:
        """Everything up to the stop, which leaves one value."""
        push, pop = self.stack.append, self.stack.pop
        constants = {0x4E: None, 0x88: True, 0x89: False}
        empties: dict[int, Callable[[], Any]] = {0x5D: list, 0x7D: dict, 0x29: tuple, 0x8F: set}
        while True:
            op = self.take(1)[0]
            if op == 0x80:  # PROTO
                self.take(1)
            elif op == 0x95:  # FRAME
                self.take(8)
            elif op == 0x2E:  # STOP
                return pop()
            elif op in constants:
                push(constants[op])
            elif op in empties:
                push(empties[op]())
            elif op == 0x28:  # MARK
                push(_Mark())
            elif op == 0x30:  # POP
                pop()
            elif op == 0x31:  # POP_MARK
                self.marked()
            elif op == 0x32:  # DUP
                push(self.stack[-1])
            elif not (self.number(op) or self.text(op) or self.memory(op) or self.container(op) or self.object(op)):
                self.refuse(f"its pickle has the instruction {op:#04x}, which no checkpoint needs")

    def number(self, op: int) -> bool:
        push = self.stack.append
        forms = {0x4A: "<i", 0x4B: "<B", 0x4D: "<H"}  # BININT, BININT1, BININT2
        if op in forms:
            push(self.unpack(forms[op]))
        elif op == 0x47:  # BINFLOAT
            push(struct.unpack(">d", self.take(8))[0])
        elif op == 0x8A:  # LONG1
            push(int.from_bytes(self.take(self.unpack("<B")), "little", signed=True))
        elif op in (0x49, 0x4C):  # INT, LONG
            text = self.line().removesuffix("L")
            push({"00": False, "01": True}.get(text) if text in ("00", "01") else int(text[:40]))
        elif op == 0x46:  # FLOAT
            push(float(self.line()))
        else:
            return False
        return True

    def text(self, op: int) -> bool:
        texts = {0x58: "<I", 0x8C: "<B", 0x8D: "<Q", 0x54: "<I", 0x55: "<B"}  # (SHORT_)BINUNICODE(8), (SHORT_)BINSTRING
        raw = {0x42: "<I", 0x43: "<B", 0x8E: "<Q"}  # BINBYTES, SHORT_BINBYTES, BINBYTES8
        if op in texts:
            self.stack.append(self.take(self.unpack(texts[op])).decode("utf-8", "surrogateescape"))
        elif op in raw:
            self.stack.append(self.take(self.unpack(raw[op])))
        elif op == 0x56:  # UNICODE
            self.stack.append(self.line("raw-unicode-escape"))
        else:
            return False
        return True

    def memory(self, op: int) -> bool:
        puts, gets = {0x71: "<B", 0x72: "<I"}, {0x68: "<B", 0x6A: "<I"}
        if op in puts:
            self.memo[self.unpack(puts[op])] = self.stack[-1]
        elif op == 0x94:  # MEMOIZE
            self.memo[len(self.memo)] = self.stack[-1]
        elif op == 0x70:  # PUT
            self.memo[int(self.line())] = self.stack[-1]
        elif op in gets:
            self.stack.append(self.memo[self.unpack(gets[op])])
        elif op == 0x67:  # GET
            self.stack.append(self.memo[int(self.line())])
        else:
            return False
        return True

    def container(self, op: int) -> bool:
        stack = self.stack
        if op == 0x74:  # TUPLE
            stack.append(tuple(self.marked()))
        elif op in (0x85, 0x86, 0x87):  # TUPLE1 to TUPLE3
            count = op - 0x84
            stack[-count:] = [tuple(stack[-count:])]
        elif op in (0x6C, 0x64):  # LIST, DICT
            values = self.marked()
            stack.append(values if op == 0x6C else self.ordered(zip(values[::2], values[1::2])))
        elif op in (0x65, 0x61, 0x90):  # APPENDS, APPEND, ADDITEMS
            values = [stack.pop()] if op == 0x61 else self.marked()
            if isinstance(stack[-1], list):
                stack[-1].extend(values)
            elif isinstance(stack[-1], set):
                stack[-1].update(self.ordered((value, None) for value in values))
            elif stack[-1] is not INERT:
                self.refuse("its pickle appends to what is no list")
        elif op in (0x75, 0x73):  # SETITEMS, SETITEM
            values = [stack.pop(-2), stack.pop()] if op == 0x73 else self.marked()
            if isinstance(stack[-1], dict):
                stack[-1].update(self.ordered(zip(values[::2], values[1::2])))
            elif stack[-1] is not INERT:
                self.refuse("its pickle sets items of what is no dict")
        else:
            return False
        return True

    def object(self, op: int) -> bool:
        """Names, calls and states: what only stands for something here."""
        stack = self.stack
        if op == 0x63:  # GLOBAL
            stack.append(self.named(self.line(), self.line()))
        elif op == 0x93:  # STACK_GLOBAL
            name, module = stack.pop(), stack.pop()
            stack.append(self.named(module, name))
        elif op in (0x52, 0x81):  # REDUCE, NEWOBJ
            arguments, called = stack.pop(), stack.pop()
            stack.append(self.called(called, arguments))
        elif op == 0x92:  # NEWOBJ_EX
            stack[-3:] = [self.called(stack[-3], stack[-2])]
        elif op in (0x69, 0x6F):  # INST, OBJ
            called = self.named(self.line(), self.line()) if op == 0x69 else None
            values = self.marked()
            stack.append(self.called(called or values.pop(0), tuple(values)))
        elif op == 0x62:  # BUILD
            stack.pop()
        elif op == 0x51:  # BINPERSID
            stack.append(self.stored(stack.pop()))
        else:
            return False
        return True

    def named(self, module: Any, name: Any) -> Any:
        if not isinstance(module, str) or not isinstance(name, str):
            self.refuse("its pickle names something by what is no text")
        whole = f"{module}.{name}"
        if (module == "torch" and name in TYPES) or whole in BUILDERS:
            return _Name(module, name)
        if any(whole == known or (known.endswith(".") and whole.startswith(known)) for known in TOLERATED):
            return INERT
        self.refuse(f"its pickle names {whole[:100]!r}, which is none of the few things that checkpoints hold")

    def called(self, called: Any, arguments: Any) -> Any:
        if called is INERT:
            return INERT
        if not isinstance(called, _Name) or not isinstance(arguments, tuple):
            self.refuse("its pickle calls what cannot be called")
        builder = BUILDERS.get(f"{called.module}.{called.name}")
        if builder is None:
            self.refuse(f"its pickle calls {called.name!r}")
        return builder(self, *arguments)

    def stored(self, identity: Any) -> Storage:
        kind, name, key, _, count, *view = identity
        if any(part is not None for part in view):
            self.refuse("its pickle has a storage that is a part of another")
        known = isinstance(name, _Name) and name.name in TYPES and isinstance(key, str | int)
        if kind != "storage" or not known or not isinstance(count, int):
            self.refuse("its pickle refers to something that is no tensor's data")
        return Storage(TYPES[name.name], str(key), count)

    def tensor(self, storage: Any, offset: Any, shape: Any, stride: Any, *_: Any) -> Tensor:
        """A view of its storage that lies inside it."""
        numbers = [offset, *shape, *stride]
        if not isinstance(storage, Storage) or any(type(n) is not int or n < 0 for n in numbers):
            self.refuse("a tensor in its pickle has no data or a negative size")
        if len(shape) != len(stride) or len(shape) > 8 or math.prod(n or 1 for n in shape) > MOST_ELEMENTS:
            self.refuse("a tensor in its pickle has no sensible shape")
        empty = 0 in shape
        last = offset + sum((n - 1) * step for n, step in zip(shape, stride))
        elements = 1
        for n in shape:
            elements *= n
        # A tensor may be a view of a larger storage, but has no element twice: no size that is not in the file.
        if not empty and (last >= storage.length or elements > storage.length):
            self.refuse("a tensor in its pickle is larger than its data")
        return self.storage(storage).as_strided(shape, stride, offset)

    def parameter(self, tensor: Any, *_: Any) -> Tensor:
        """A parameter is its tensor."""
        if not isinstance(tensor, Tensor):
            self.refuse("a parameter in its pickle is no tensor")
        return tensor

    def ordered(self, items: Any = ()) -> dict[Any, Any]:
        """A dict of pairs; its keys are no tuples of tuples, of which a hash can take forever."""
        found = {}
        for key, value in items:
            if isinstance(key, tuple) and any(isinstance(part, tuple) for part in key):
                self.refuse("its pickle has a tuple of tuples for a key")
            found[key] = value
        return found


BUILDERS: dict[str, Callable[..., Any]] = {
    "torch._utils._rebuild_tensor_v2": Machine.tensor,
    "torch._utils._rebuild_tensor": Machine.tensor,
    "torch._utils._rebuild_parameter": Machine.parameter,
    "collections.OrderedDict": Machine.ordered,
}


def flat(content: Any, what: str) -> Iterator[tuple[str, Any]]:
    """Tensors, numbers and texts of nested dicts by their names joined with dots; anything else is left out.

    InputError about `what` for more than can be meant: one dict may lie in many places.
    """
    waiting, count = [("", content, 0)], 0
    while waiting:
        name, value, depth = waiting.pop()
        if isinstance(value, dict) and depth < 4:
            below = [(key, part) for key, part in value.items() if isinstance(key, str)]
            count += len(value)
            if count > MOST_ENTRIES or any(len(key) > MOST_NAME for key, _ in below):
                raise InputError(f"{what}: holds more than {MOST_ENTRIES} values by name, or names beyond measure")
            waiting += [(f"{name}.{key}" if name else key, part, depth + 1) for key, part in reversed(below)]
        elif isinstance(value, Tensor | int | float | str):
            yield name, value
