"""Samples: handwritten digits, arrays, tables and images in files, and bytes to [-1, 1]."""

from .arrays import load_array, save_array, to_unit
from .handwritten import Digits, digits
from .tables import EncodedRows, Table

__all__ = [
    "Digits",
    "EncodedRows",
    "Table",
    "digits",
    "load_array",
    "save_array",
    "to_unit",
]
