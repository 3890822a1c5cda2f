"""Samples: in files, folders and memory, opened by one function; bytes to [-1, 1]."""

from typing import TYPE_CHECKING, Any

from .arrays import save_array, to_unit
from .named import Digits, digits
from .opened import Data
from .opening import Layout, Range, open

if TYPE_CHECKING:
    from .tables import EncodedRows, Table
else:

    def __getattr__(name: str) -> Any:
        """Tables are imported when they are asked for, for a quick import of pfgm."""
        if name in ("EncodedRows", "Table"):
            from . import tables

            return getattr(tables, name)
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

    def __dir__() -> list[str]:
        return sorted({*globals(), *__all__})


__all__ = [
    "Data",
    "Digits",
    "EncodedRows",
    "Layout",
    "Range",
    "Table",
    "digits",
    "open",
    "save_array",
    "to_unit",
]
