"""Samples: in files, folders and memory, opened by one function; bytes to [-1, 1]."""

from .arrays import save_array, to_unit
from .named import Digits, digits
from .opened import Data
from .opening import Layout, Range, open
from .tables import EncodedRows, Table

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
