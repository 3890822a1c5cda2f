"""Samples: handwritten digits, arrays, tables and images in files, and bytes to [-1, 1]."""

from .arrays import load_array, save_array, to_unit
from .handwritten import Digits, digits
from .tables import round_columns

__all__ = ["Digits", "digits", "load_array", "round_columns", "save_array", "to_unit"]
