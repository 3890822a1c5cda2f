"""Reads pickles as data: nothing that they name is imported or called.

The module ``pickle`` executes what a file asks for. This one interprets only the instructions that
hold values. The result consists of plain containers, of :class:`StoredTensor` for tensors, whose
values are read on request, and of :class:`StandIn` for objects of the classes listed below. Any
other class or function is refused by name.
"""

from __future__ import annotations

import functools
import io
import math
import mmap
import pickletools
import zipfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, cast

import torch
from torch import Tensor

from ...common.files import MALFORMED

_ZIP = b"PK\x03\x04"
_MAGIC = 0x1950A86A20F9469CFC6C  # first value of a file of torch.save that is no zip archive

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

# Objects of these classes become stand-ins.
_STAND_INS = {
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

_LITERALS = {  # instructions whose argument is the value
    *("BININT", "BININT1", "BININT2", "LONG1", "LONG4", "BINFLOAT"),
    *("SHORT_BINUNICODE", "BINUNICODE", "BINUNICODE8"),
    *("SHORT_BINBYTES", "BINBYTES", "BINBYTES8"),
}
_CONSTANTS: dict[str, Callable[[], Any]] = {
    "NONE": lambda: None,
    "NEWTRUE": lambda: True,
    "NEWFALSE": lambda: False,
    "EMPTY_LIST": list,
    "EMPTY_TUPLE": tuple,
    "EMPTY_DICT": dict,
    "EMPTY_SET": set,
}
_IGNORED = {"PROTO", "FRAME", "STOP"}
_MAX_DIMENSIONS = 64  # of a tensor
_EMBEDDED_STORAGE = "torch.storage._load_from_bytes"
# These copy their arguments, and a small file could repeat them without end. So all copies together
# may be at most _MAX_COPIES times as large as the file.
_COPYING = {"__builtin__.set", "_codecs.encode", "builtins.set", _EMBEDDED_STORAGE}
_MAX_COPIES = 4


class _Refused(ValueError):
    """The file contains more than data."""


class _Global(NamedTuple):
    """A class or a function, of which only the name is kept."""

    name: str


class _Storage(NamedTuple):
    key: str
    dtype: torch.dtype
    elements: int
    read: Callable[[str], Tensor]


class StandIn:
    """Stands for an object of another library: the name of its class, and its state."""

    def __init__(self, name: str, state: Any = None) -> None:
        self.name, self.state = name, state


class StoredTensor(NamedTuple):
    """A tensor in a file: its storage and its place in the storage."""

    storage: _Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]

    def tensor(self) -> Tensor:
        """Reads the values, to the CPU."""
        key, dtype, elements, read = self.storage
        try:
            values = read(key).view(dtype)
            if len(values) != elements:
                raise ValueError(f"{len(values)} elements, where {elements} are needed")
            return values.as_strided(self.shape, self.strides, self.offset)
        except MALFORMED as error:
            raise ValueError(f"its storage {key} is truncated ({error}).") from error


@contextmanager
def open_pickle(path: Path) -> Iterator[Any]:
    """The content of a file of ``torch.save``, in either format, or of ``pickle.dump``, as data.

    The values of its tensors can be read while the context is open.

    Raises:
        ValueError: the file is truncated, is not such a file, or contains more than data.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     path = Path(folder) / "values.pt"
    ...     torch.save({"step": 7, "weight": torch.ones(2)}, path)
    ...     with open_pickle(path) as content:
    ...         content["step"], content["weight"].tensor()
    (7, tensor([1., 1.]))
    """
    with path.open("rb") as file:
        try:
            content = _read_content(file)
        except _Refused as error:
            raise ValueError(
                f"{path} holds {error}, which is refused: reading it could execute code."
            ) from error
        except MALFORMED as error:
            raise ValueError(f"{path} is truncated or not a checkpoint ({error}).") from error
        yield content


def _read_content(file: BinaryIO) -> Any:
    zipped = file.read(len(_ZIP)) == _ZIP
    file.seek(0)
    if not zipped:
        # Memory-mapped, because file.read() allocates any length that a broken file states.
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
            return _Interpreter(len(mapped)).load_file(cast(BinaryIO, mapped))
    archive = zipfile.ZipFile(file)
    names = {name.rpartition("/")[2]: name for name in archive.namelist()}
    if "data.pkl" not in names or any(entry.compress_type for entry in archive.infolist()):
        raise ValueError("it has no data.pkl, or is compressed")
    if "byteorder" in names and archive.read(names["byteorder"]) != b"little":
        raise ValueError("its numbers are big-endian")
    folder = names["data.pkl"].removesuffix("data.pkl") + "data/"
    pickled = archive.read(names["data.pkl"])
    interpreter = _Interpreter(len(pickled), lambda key: archive.read(folder + key))
    return interpreter.load(io.BytesIO(pickled))


class _Interpreter:
    """Interprets pickles.

    Args:
        size: number of bytes of the pickles.
        read: returns the bytes of the storage of a key.
        embedded: whether the pickle is embedded in another one; it may then embed none itself.
    """

    def __init__(
        self, size: int, read: Callable[[str], bytes] | None = None, *, embedded: bool = False
    ) -> None:
        self._records: dict[str, bytes] = {}
        self._read_record = read or self._records.__getitem__
        self._read = functools.cache(self._storage_bytes)
        self._storages: dict[str, _Storage] = {}
        self._copy_budget, self._embedded = _MAX_COPIES * size, embedded

    def _storage_bytes(self, key: str) -> Tensor:
        content = bytearray(self._read_record(key))
        # torch.frombuffer refuses an empty buffer.
        empty = torch.empty(0, dtype=torch.uint8, device="cpu")
        return torch.frombuffer(content, dtype=torch.uint8) if content else empty

    def load_file(self, file: BinaryIO) -> Any:
        """The content of a pickle, or of a file of torch.save that is no zip archive.

        The latter consists of five pickles (a magic number, a version, facts about the system, the
        content, the keys of the storages), then for each key the number of elements in eight bytes,
        and the elements.
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
        """Reads the object of one pickle, up to its end in the file."""
        self._stack: list[Any] = []
        self._below_marks: list[list[Any]] = []  # for each mark, the part of the stack below it
        self._memo: dict[int, Any] = {}
        for opcode, argument, _ in pickletools.genops(file):
            if opcode.name in _LITERALS:
                self._stack.append(argument)
            elif opcode.name in _CONSTANTS:
                self._stack.append(_CONSTANTS[opcode.name]())
            elif opcode.name in _ACTIONS:
                _ACTIONS[opcode.name](self, argument)
            elif opcode.name not in _IGNORED:
                shown = opcode.name if argument is None else f"{opcode.name} {argument}"
                raise _Refused(f"the pickle instruction {shown}")
        return self._stack.pop()

    def mark(self, _: None) -> None:
        self._below_marks.append(self._stack)
        self._stack = []

    def pop_to_mark(self) -> list[Any]:
        values, self._stack = self._stack, self._below_marks.pop()
        return values

    def put(self, index: int | None) -> None:
        self._memo[len(self._memo) if index is None else index] = self._stack[-1]

    def get(self, index: int) -> None:
        self._stack.append(self._memo[index])

    def tuple_of(self, count: int) -> None:
        values = [self._stack.pop() for _ in range(count)]
        self._stack.append(tuple(reversed(values)))

    def tuple_since_mark(self, _: None) -> None:
        values = tuple(self.pop_to_mark())
        self._stack.append(values)

    def append(self, _: None) -> None:
        self._extend([self._stack.pop()])

    def appends(self, _: None) -> None:
        self._extend(self.pop_to_mark())

    def _extend(self, values: list[Any]) -> None:
        _expect(list, self._stack[-1]).extend(values)

    def set_item(self, _: None) -> None:
        value, key = self._stack.pop(), self._stack.pop()
        self._update([key], [value])

    def set_items(self, _: None) -> None:
        values = self.pop_to_mark()
        self._update(values[::2], values[1::2])

    def _update(self, keys: list[Any], values: list[Any]) -> None:
        _expect(dict, self._stack[-1]).update(zip(_check_keys(keys), values, strict=True))

    def add_items(self, _: None) -> None:
        values = self.pop_to_mark()
        _expect(set, self._stack[-1]).update(_check_keys(values))

    def name(self, shown: str) -> None:
        name = shown.replace(" ", ".")
        known = name in _CALLS or name in _STAND_INS or name in _DTYPES
        if not known or (self._embedded and name == _EMBEDDED_STORAGE):
            raise _Refused(name)
        self._stack.append(_Global(name))

    def name_on_stack(self, _: None) -> None:
        name, module = _expect(str, self._stack.pop()), _expect(str, self._stack.pop())
        self.name(f"{module} {name}")

    def call(self, _: None) -> None:
        arguments, (name,) = _expect(tuple, self._stack.pop()), _expect(_Global, self._stack.pop())
        if name in _COPYING:
            self._copy_budget -= sum(len(argument) for argument in arguments)
            if self._copy_budget < 0:
                raise ValueError("it copies its values too often")
        made = _CALLS[name](*arguments) if name in _CALLS else StandIn(name)
        self._stack.append(made)

    def build(self, _: None) -> None:
        state = self._stack.pop()
        if isinstance(self._stack[-1], StandIn):
            self._stack[-1].state = state
        else:
            _expect(dict, self._stack[-1])  # an OrderedDict, whose attributes are dropped

    def persistent(self, _: None) -> None:
        """What torch.save stores outside the pickle: storages, and the source of classes."""
        match self._stack.pop():
            case ("module", _Global() as name, *_):
                self._stack.append(name)
            case ("storage", _Global(name), str(key), _, int(elements), *_):
                storage = _Storage(key, _DTYPES[name], elements, self._read)
                self._storages[key] = storage
                self._stack.append(storage)
            case _:
                raise ValueError("it stores other things than tensors outside the pickle")


def _expect(kind: Any, value: Any) -> Any:
    if not isinstance(value, kind):
        raise TypeError(f"it holds a {type(value).__name__} where something else is needed")
    return value


def _check_keys(values: Sequence[Any]) -> Sequence[Any]:
    # The hash of deeply nested tuples overflows the stack, and large integers can be chosen to have
    # equal hashes.
    for value in values:
        if not isinstance(_expect((str, int), value), str) and not abs(value) < 2**60:
            raise ValueError("a key is a number beyond 2^60")
    return values


def _set(values: Any = ()) -> set[Any]:
    return set(_check_keys(values))


def _bytes(text: Any, *_: Any) -> bytes:
    content: bytes = _expect(str, text).encode("latin-1")
    return content


def _tensor(storage: Any, offset: Any, shape: Any, strides: Any, *_: Any) -> StoredTensor:
    numbers = [_expect(int, value) for value in (offset, *shape, *strides)]
    if len(shape) > _MAX_DIMENSIONS or max(numbers) >= 2**63:
        raise ValueError("a tensor has sizes that are too large")
    size = math.prod(shape)
    last = offset + sum((n - 1) * stride for n, stride in zip(shape, strides, strict=True))
    elements = _expect(_Storage, storage).elements
    if min(numbers) < 0 or size > elements or (size and last >= elements):
        raise ValueError("a tensor goes beyond its storage")
    return StoredTensor(storage, offset, tuple(shape), tuple(strides))


def _parameter(tensor: Any, *_: Any) -> StoredTensor:
    stored: StoredTensor = _expect(StoredTensor, tensor)
    return stored


def _storage(content: Any) -> _Storage:
    interpreter = _Interpreter(len(content), embedded=True)
    storage: _Storage = _expect(_Storage, interpreter.load_file(io.BytesIO(content)))
    return storage


def _object(description: Any) -> StandIn:
    """An object of EDM's persistence. EDM itself would execute the source text in it."""
    return StandIn(_expect(str, description["class_name"]), description["state"])


_CALLS: dict[str, Callable[..., Any]] = {
    "__builtin__.set": _set,  # protocol 2 stores sets and bytes with these two calls
    "_codecs.encode": _bytes,
    "builtins.set": _set,
    "collections.OrderedDict": lambda: {},
    "dnnlib.util.EasyDict": lambda: {},
    "torch._utils._rebuild_parameter": _parameter,
    "torch._utils._rebuild_parameter_with_state": _parameter,
    "torch._utils._rebuild_tensor_v2": _tensor,
    _EMBEDDED_STORAGE: _storage,
    "torch_utils.persistence._reconstruct_persistent_obj": _object,
}

_ACTIONS: dict[str, Callable[[_Interpreter, Any], None]] = {
    "MARK": _Interpreter.mark,
    "BINPUT": _Interpreter.put,
    "LONG_BINPUT": _Interpreter.put,
    "MEMOIZE": _Interpreter.put,
    "BINGET": _Interpreter.get,
    "LONG_BINGET": _Interpreter.get,
    "TUPLE": _Interpreter.tuple_since_mark,
    "TUPLE1": lambda interpreter, _: interpreter.tuple_of(1),
    "TUPLE2": lambda interpreter, _: interpreter.tuple_of(2),
    "TUPLE3": lambda interpreter, _: interpreter.tuple_of(3),
    "APPEND": _Interpreter.append,
    "APPENDS": _Interpreter.appends,
    "SETITEM": _Interpreter.set_item,
    "SETITEMS": _Interpreter.set_items,
    "ADDITEMS": _Interpreter.add_items,
    "GLOBAL": _Interpreter.name,
    "STACK_GLOBAL": _Interpreter.name_on_stack,
    "REDUCE": _Interpreter.call,
    "NEWOBJ": _Interpreter.call,
    "BUILD": _Interpreter.build,
    "BINPERSID": _Interpreter.persistent,
}
