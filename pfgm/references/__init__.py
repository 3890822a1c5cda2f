"""Reference sets: the samples that the field averages over, in memory, in files or in processes."""

from .measures import Measures
from .reference_set import References, ReferenceSet, as_references

__all__ = ["Measures", "ReferenceSet", "References", "as_references"]
