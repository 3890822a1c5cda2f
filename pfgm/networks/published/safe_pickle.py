"""Pickles read as data: nothing that they name is imported, and nothing in them can be called.

``pickle`` runs what a file asks for. Here the instructions that hold values are interpreted, and no
others: what comes out are plain containers, :class:`StoredTensor` for tensors, whose values are
read when they are wanted, and :class:`StandIn` for objects of the classes listed below. Any other
class or function is refused by name.
"""

from __future__ import annotations

import functools
import io
import math
import mmap
import pickletools
import struct
import zipfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, cast

import torch
from torch import Tensor

__all__ = ["BROKEN", "StandIn", "StoredTensor", "opened"]

_ZIP = b"PK\x03\x04"
_MAGIC = 0x1950A86A20F9469CFC6C  # with which torch.save begins where it writes no zip archive

_DTYPES = {
    "torch.BFloat16Storage": torch.bfloat16,
    "torch.BoolStorage": torch.bool,
    "torch.ByteStorage": torch.uint8,
    "torch.CharStorage": torch.int8,
    "torch.DoubleStorage": torch.float64,
    "torch.FloatStorage": torch.float32,
    "torch.HalfStorage": torch.float16,
    "torch.IntStorage": torch.int32,
    "torch.LongStorage": torch.int64,
    "torch.ShortStorage": torch.int16,
}

# Of these nothing is kept but the name and the state.
_INERT = {
    "numpy._core.multiarray._reconstruct",
    "numpy._core.multiarray.scalar",
    "numpy.core.multiarray._reconstruct",
    "numpy.core.multiarray.scalar",
    "numpy.dtype",
    "numpy.ndarray",
    "torch.Size",
    "torch.device",
    "torch.nn.modules.container.ModuleDict",
    "torch.nn.modules.container.ModuleList",
    "torch.nn.modules.container.Sequential",
}

_PUSHED = {  # the argument is the value
    *("BININT", "BININT1", "BININT2", "LONG1", "LONG4", "BINFLOAT"),
    *("SHORT_BINUNICODE", "BINUNICODE", "BINUNICODE8"),
    *("SHORT_BINBYTES", "BINBYTES", "BINBYTES8"),
}
_MADE: dict[str, Callable[[], Any]] = {
    "NONE": lambda: None,
    "NEWTRUE": lambda: True,
    "NEWFALSE": lambda: False,
    "EMPTY_LIST": list,
    "EMPTY_TUPLE": tuple,
    "EMPTY_DICT": dict,
    "EMPTY_SET": set,
}
_FRAMING = {"PROTO", "FRAME", "STOP"}
# What taking a broken file for a whole one ends in.
BROKEN = (
    *(ArithmeticError, AttributeError, EOFError, LookupError, OSError, RuntimeError, TypeError),
    *(ValueError, struct.error, zipfile.BadZipFile),
)
_DIMENSIONS = 64  # of a tensor, at most
_EMBEDDED = "torch.storage._load_from_bytes"
# What makes as much as it is given; a small file could ask for it again and again.
_COPIED = 4  # times what a file holds is what it may copy
_COPIES = {"__builtin__.set", "_codecs.encode", "builtins.set", _EMBEDDED}


class _Refused(ValueError):
    """A file asks for more than data."""


class _Global(NamedTuple):
    """The name of a class or a function, which is all that becomes of it."""

    name: str


class _Storage(NamedTuple):
    key: str
    dtype: torch.dtype
    elements: int
    read: Callable[[str], Tensor]


class StandIn:
    """What an object of another library has become: the name of its class, and its state."""

    def __init__(self, name: str, state: Any = None) -> None:
        self.name, self.state = name, state


class StoredTensor(NamedTuple):
    """Where a tensor lies in a file."""

    storage: _Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]

    def tensor(self) -> Tensor:
        """Its values, on the CPU.

        Raises:
            ValueError: the file does not hold them.
        """
        key, dtype, elements, read = self.storage
        try:
            flat = read(key).view(dtype)
            if len(flat) != elements:
                raise ValueError(f"{len(flat)} elements, where {elements} are needed")
            return flat.as_strided(self.shape, self.strides, self.offset)
        except BROKEN as error:
            raise ValueError(f"its storage {key} is truncated ({error}).") from error


@contextmanager
def opened(path: Path) -> Iterator[Any]:
    """What a file of ``torch.save``, in either format, or of ``pickle.dump`` holds, as data.

    Its tensors can be read while the context is open.

    Raises:
        ValueError: the file is truncated or not such a file, or asks for more than data.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     path = Path(folder) / "values.pt"
    ...     torch.save({"step": 7, "weight": torch.ones(2)}, path)
    ...     with opened(path) as content:
    ...         content["step"], content["weight"].tensor()
    (7, tensor([1., 1.]))
    """
    with path.open("rb") as file:
        try:
            content = _content(file)
        except _Refused as error:
            raise ValueError(
                f"{path} holds {error}, which is refused: reading that could execute code."
            ) from error
        except BROKEN as error:
            raise ValueError(f"{path} is truncated or not a checkpoint ({error}).") from error
        yield content


def _content(file: BinaryIO) -> Any:
    zipped = file.read(len(_ZIP)) == _ZIP
    file.seek(0)
    if not zipped:
        # Mapped, as reading from a file would first allocate whatever length a broken one gives.
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
            return _Machine(len(mapped)).content(cast(BinaryIO, mapped))
    archive = zipfile.ZipFile(file)
    names = {name.rpartition("/")[2]: name for name in archive.namelist()}
    if "data.pkl" not in names or any(entry.compress_type for entry in archive.infolist()):
        raise ValueError("it has no data.pkl, or is compressed")
    if "byteorder" in names and archive.read(names["byteorder"]) != b"little":
        raise ValueError("its numbers are big-endian")
    folder = names["data.pkl"].removesuffix("data.pkl") + "data/"
    pickled = archive.read(names["data.pkl"])
    machine = _Machine(len(pickled), lambda key: archive.read(folder + key))
    return machine.load(io.BytesIO(pickled))


class _Machine:
    """Interprets pickles of so many bytes; read gives the bytes of the storage of a key.

    One that is embedded in another embeds none itself.
    """

    def __init__(
        self, size: int, read: Callable[[str], bytes] | None = None, *, embedded: bool = False
    ) -> None:
        self._records: dict[str, bytes] = {}
        self._record = read or self._records.__getitem__
        self._read = functools.cache(self._bytes_of)
        self._storages: dict[str, _Storage] = {}
        self._left, self._embedded = _COPIED * size, embedded

    def _bytes_of(self, key: str) -> Tensor:
        content = bytearray(self._record(key))
        # torch.frombuffer refuses an empty one.
        empty = torch.empty(0, dtype=torch.uint8)
        return torch.frombuffer(content, dtype=torch.uint8) if content else empty

    def content(self, file: BinaryIO) -> Any:
        """Of a pickle, or of what torch.save writes without a zip archive.

        That is five pickles (a number, a version, facts of the system, the content, the keys of its
        storages), then for each key the number of elements in eight bytes, and the elements.
        """
        first = self.load(file)
        if first != _MAGIC:
            return first
        _, system, content, keys = (self.load(file) for _ in range(4))
        if not system["little_endian"]:
            raise ValueError("its numbers are big-endian")
        for key in keys:
            elements = int.from_bytes(file.read(8), "little")
            self._records[key] = file.read(elements * self._storages[key].dtype.itemsize)
        return content

    def load(self, file: BinaryIO) -> Any:
        """The object of one pickle, at whose end the file then stands."""
        self._stack: list[Any] = []
        self._below: list[list[Any]] = []  # what lies below each mark
        self._memo: dict[int, Any] = {}
        for opcode, argument, _ in pickletools.genops(file):
            if opcode.name in _PUSHED:
                self._stack.append(argument)
            elif opcode.name in _MADE:
                self._stack.append(_MADE[opcode.name]())
            elif opcode.name in _ACTIONS:
                _ACTIONS[opcode.name](self, argument)
            elif opcode.name not in _FRAMING:
                shown = opcode.name if argument is None else f"{opcode.name} {argument}"
                raise _Refused(f"the pickle instruction {shown}")
        return self._stack.pop()

    def mark(self, _: None) -> None:
        self._below.append(self._stack)
        self._stack = []

    def since_mark(self) -> list[Any]:
        values, self._stack = self._stack, self._below.pop()
        return values

    def put(self, place: int | None) -> None:
        self._memo[len(self._memo) if place is None else place] = self._stack[-1]

    def get(self, place: int) -> None:
        self._stack.append(self._memo[place])

    # ---- containers ----

    def tuple_of(self, count: int) -> None:
        values = [self._stack.pop() for _ in range(count)]
        self._stack.append(tuple(reversed(values)))

    def tuple_since_mark(self, _: None) -> None:
        values = tuple(self.since_mark())
        self._stack.append(values)

    def append(self, _: None) -> None:
        self._extend([self._stack.pop()])

    def appends(self, _: None) -> None:
        self._extend(self.since_mark())

    def _extend(self, values: list[Any]) -> None:
        _as(list, self._stack[-1]).extend(values)

    def set_item(self, _: None) -> None:
        value, key = self._stack.pop(), self._stack.pop()
        self._update([key], [value])

    def set_items(self, _: None) -> None:
        values = self.since_mark()
        self._update(values[::2], values[1::2])

    def _update(self, keys: list[Any], values: list[Any]) -> None:
        _as(dict, self._stack[-1]).update(zip(_keys(keys), values, strict=True))

    def add_items(self, _: None) -> None:
        values = self.since_mark()
        _as(set, self._stack[-1]).update(_keys(values))

    # ---- names, and what is made with them ----

    def name(self, shown: str) -> None:
        name = shown.replace(" ", ".")
        known = name in _CALLS or name in _INERT or name in _DTYPES
        if not known or (self._embedded and name == _EMBEDDED):
            raise _Refused(name)
        self._stack.append(_Global(name))

    def name_on_stack(self, _: None) -> None:
        name, module = _as(str, self._stack.pop()), _as(str, self._stack.pop())
        self.name(f"{module} {name}")

    def call(self, _: None) -> None:
        arguments, (name,) = _as(tuple, self._stack.pop()), _as(_Global, self._stack.pop())
        if name in _COPIES:
            self._left -= sum(len(argument) for argument in arguments)
            if self._left < 0:
                raise ValueError("it makes more of its values than it holds")
        made = _CALLS[name](*arguments) if name in _CALLS else StandIn(name)
        self._stack.append(made)

    def build(self, _: None) -> None:
        state = self._stack.pop()
        if isinstance(self._stack[-1], StandIn):
            self._stack[-1].state = state
        else:
            _as(dict, self._stack[-1])  # attributes of an OrderedDict, which are not needed

    def beside(self, _: None) -> None:
        """What torch.save keeps out of the pickle: storages, and classes with their source."""
        match self._stack.pop():
            case ("module", _Global() as name, *_):
                self._stack.append(name)
            case ("storage", _Global(name), str(key), _, int(elements), *_):
                storage = _Storage(key, _DTYPES[name], elements, self._read)
                self._storages[key] = storage
                self._stack.append(storage)
            case _:
                raise ValueError("it holds another thing than tensors beside the pickle")


def _as(kind: Any, value: Any) -> Any:
    if not isinstance(value, kind):
        raise TypeError(f"{type(value).__name__} is not what should stand there")
    return value


def _keys(values: Sequence[Any]) -> Sequence[Any]:
    # Of tuples within tuples without end the hash would overflow the stack of the interpreter, and
    # large numbers can be chosen to have the same.
    for value in values:
        if not isinstance(_as((str, int), value), str) and not abs(value) < 2**60:
            raise ValueError("a key is a number beyond 2^60")
    return values


# ---- what calls become ----


def _set(values: Any = ()) -> set[Any]:
    return set(_keys(values))


def _bytes(text: Any, *_: Any) -> bytes:
    found: bytes = _as(str, text).encode("latin-1")
    return found


def _tensor(storage: Any, offset: Any, shape: Any, strides: Any, *_: Any) -> StoredTensor:
    places = [_as(int, value) for value in (offset, *shape, *strides)]
    if len(shape) > _DIMENSIONS or max(places) >= 2**63:
        raise ValueError("a tensor has sizes that no tensor has")
    size = math.prod(shape)
    last = offset + sum((n - 1) * stride for n, stride in zip(shape, strides, strict=True))
    elements = _as(_Storage, storage).elements
    if min(places) < 0 or size > elements or (size and last >= elements):
        raise ValueError("a tensor goes beyond its storage")
    return StoredTensor(storage, offset, tuple(shape), tuple(strides))


def _parameter(tensor: Any, *_: Any) -> StoredTensor:
    found: StoredTensor = _as(StoredTensor, tensor)
    return found


def _storage(content: Any) -> _Storage:
    machine = _Machine(len(content), embedded=True)
    found: _Storage = _as(_Storage, machine.content(io.BytesIO(content)))
    return found


def _object(description: Any) -> StandIn:
    """Of EDM's persistence, which would execute the source text in the description."""
    return StandIn(_as(str, description["class_name"]), description["state"])


_CALLS: dict[str, Callable[..., Any]] = {
    "__builtin__.set": _set,  # what sets and bytes are in protocol 2
    "_codecs.encode": _bytes,
    "builtins.set": _set,
    "collections.OrderedDict": lambda: {},
    "dnnlib.util.EasyDict": lambda: {},
    "torch._utils._rebuild_parameter": _parameter,
    "torch._utils._rebuild_parameter_with_state": _parameter,
    "torch._utils._rebuild_tensor_v2": _tensor,
    _EMBEDDED: _storage,
    "torch_utils.persistence._reconstruct_persistent_obj": _object,
}

_ACTIONS: dict[str, Callable[[_Machine, Any], None]] = {
    "MARK": _Machine.mark,
    "BINPUT": _Machine.put,
    "LONG_BINPUT": _Machine.put,
    "MEMOIZE": _Machine.put,
    "BINGET": _Machine.get,
    "LONG_BINGET": _Machine.get,
    "TUPLE": _Machine.tuple_since_mark,
    "TUPLE1": lambda machine, _: machine.tuple_of(1),
    "TUPLE2": lambda machine, _: machine.tuple_of(2),
    "TUPLE3": lambda machine, _: machine.tuple_of(3),
    "APPEND": _Machine.append,
    "APPENDS": _Machine.appends,
    "SETITEM": _Machine.set_item,
    "SETITEMS": _Machine.set_items,
    "ADDITEMS": _Machine.add_items,
    "GLOBAL": _Machine.name,
    "STACK_GLOBAL": _Machine.name_on_stack,
    "REDUCE": _Machine.call,
    "NEWOBJ": _Machine.call,
    "BUILD": _Machine.build,
    "BINPERSID": _Machine.beside,
}
