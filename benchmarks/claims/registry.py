"""The claims by their names on the command line."""

from __future__ import annotations

from benchmarks.claims import dimensions, likelihood, quality, references, step_size, weak

CLAIMS = {
    "quality": quality.CLAIM,
    "step-size": step_size.CLAIM,
    "weak": weak.CLAIM,
    "dimensions": dimensions.CLAIM,
    "references": references.CLAIM,
    "likelihood": likelihood.CLAIM,
}
