"""What every claim is made of."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from benchmarks.claims.jobs import Job, Tables
from benchmarks.claims.methods import Spec
from benchmarks.claims.presets import Preset

__all__ = ["Claim"]


class Claim(NamedTuple):
    """A claim of the papers as a program: networks, jobs that measure them, tables, pictures."""

    title: str
    specs: Callable[[Preset], list[Spec]]
    """The networks that it needs."""
    jobs: Callable[[Preset], list[Job]]
    derive: Callable[[Tables, Preset], Tables]
    """From the tables that were measured to those that follow from them."""
    draw: Callable[[Tables, Path], None]
    """Pictures of all tables into a folder."""
