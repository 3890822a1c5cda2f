"""Reference sets: the samples that the field averages over, in memory, in files or in processes."""

from .reference_set import Measures, References, ReferenceSet, measure

__all__ = ["Measures", "ReferenceSet", "References", "measure"]
