"""References: the samples that the field averages over, whole or in parts."""

from .reference_set import Measures, References, ReferenceSet, measure

__all__ = ["Measures", "ReferenceSet", "References", "measure"]
