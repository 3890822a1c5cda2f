"""Figures of compiled kernels, one row for all variants of a kernel on an architecture."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

Summary = dict[str, Any]
MOST = {"registers": "registers", "spills": "spilled bytes", "shared": "shared bytes"}
"""Figures of which a summary keeps the largest, and their columns."""


class Variant(NamedTuple):
    """One compiled variant of a kernel."""

    kernel: str
    """The name that all variants share."""
    architecture: str
    figures: dict[str, Any]


def summarise(variants: Iterable[Variant], fewest: Mapping[str, str]) -> list[Summary]:
    """One row per kernel and architecture, by column.

    Args:
        fewest: figures of which the smallest is kept, and their columns.
    """
    groups: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for kernel, architecture, figures in variants:
        groups.setdefault((kernel, architecture), []).append(figures)
    return [
        {
            "kernel": kernel,
            "architecture": architecture,
            "variants": len(group),
            **{column: max(figures[name] for figures in group) for name, column in MOST.items()},
            "matrix instructions": _matrix_instructions(group),
            **{column: min(figures[name] for figures in group) for name, column in fewest.items()},
        }
        for (kernel, architecture), group in groups.items()
    ]


def _matrix_instructions(group: Iterable[dict[str, Any]]) -> str:
    names = {name for figures in group for name in figures["matrix_instructions"]}
    return ", ".join(sorted(names))
