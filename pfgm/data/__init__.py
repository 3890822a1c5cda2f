"""Samples: handwritten digits, arrays in files, folders of images, and bytes to [-1, 1]."""

from .arrays import load_array, save_array, to_unit
from .handwritten import Digits, digits

__all__ = ["Digits", "digits", "load_array", "save_array", "to_unit"]
