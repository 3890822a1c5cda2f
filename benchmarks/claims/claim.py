"""The parts of a claim."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from benchmarks.claims.jobs import Job, Tables
from benchmarks.claims.presets import Preset


class Claim(NamedTuple):
    """One claim of the papers: what is measured, with which networks, and how it is shown."""

    title: str
    jobs: Callable[[Preset], list[Job]]
    """The measurements."""
    derive: Callable[[Tables, Preset], Tables]
    """Computes further tables from the measured tables."""
    draw: Callable[[Tables, Path], None]
    """Draws all tables into a folder."""
