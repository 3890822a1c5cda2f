"""References: the samples that the field averages over, as a tensor or as a set in parts."""

from .reference_set import Measures, References, ReferenceSet, measure

__all__ = ["Measures", "ReferenceSet", "References", "measure"]
