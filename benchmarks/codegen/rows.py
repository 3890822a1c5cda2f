"""Figures of compiled kernels, and what both commands print of them."""

from __future__ import annotations

import re
import sys
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from benchmarks.common.tables import table

# HMMA and the like before Hopper, HGMMA on it, UTCHMMA after it, and their names in PTX, but not
# HFMA2.MMA.
_MATRIX = re.compile(r"(?:UTC)?[A-Z]*MMA(?:\.|$)|mma\.sync|wgmma\.mma|tcgen05\.mma")
# From Hopper on, the system takes this many bytes of shared memory in every block, and ptxas counts
# them as the kernel's.
_RESERVED = 1024


@dataclass(frozen=True)
class Figures:
    """Resources and instructions of one kernel on one architecture."""

    registers: int
    """Of a thread."""
    spills: int
    """Bytes of stack and local memory per thread."""
    shared: int
    """Bytes of shared memory per block, as far as they are known when it is compiled."""
    counts: Counter[str]
    """Instruction with its modifiers → its number in the code."""
    threads: int | None = None
    """The most threads of a block, by the launch bounds of a CUDA kernel."""

    def count(self, kinds: str) -> int:
        """How many instructions begin with a pattern."""
        return sum(n for name, n in self.counts.items() if re.match(kinds, name))

    @property
    def matrix_instructions(self) -> dict[str, int]:
        """Those that multiply matrices."""
        return {name: n for name, n in self.counts.items() if _MATRIX.match(name)}


class Row(NamedTuple):
    """One kernel on one architecture, and what is wrong with it."""

    kernel: str
    architecture: str
    """As in "90a"."""
    figures: Figures | None
    """None if it does not compile."""
    problems: list[str]


def capability(architecture: str) -> int:
    """The number of an architecture: 90 of "90a"."""
    return int(architecture.rstrip("af"))


def read_usage(dump: str, architecture: str) -> tuple[int, int, int]:
    """Registers, spills and static shared memory, as cuobjdump prints them for one kernel."""
    usage = {key: int(value) for key, value in re.findall(r"\b([A-Z]+):(\d+)", dump)}
    reserved = _RESERVED if capability(architecture) >= 90 else 0
    return usage["REG"], usage["STACK"] + usage["LOCAL"], max(usage["SHARED"] - reserved, 0)


def report(rows: Iterable[Row]) -> str:
    """One line per kernel and architecture."""
    lines = []
    for kernel, architecture, figures, _ in rows:
        cells = [""] * 4
        if figures is not None:
            matrix = (f"{n} {name}" for name, n in figures.matrix_instructions.items())
            cells = [str(n) for n in (figures.registers, figures.spills, figures.shared)]
            cells.append(", ".join(matrix))
        lines.append([kernel, f"sm_{architecture}", *cells])
    header = ["kernel", "architecture", "registers", "spills", "shared", "matrix instructions"]
    return table(header, lines)


def finish(rows: Sequence[Row], problems: Sequence[str], only: str = "") -> int:
    """Prints the rows whose name contains ``only`` and all problems. The status of a command."""
    print(report(row for row in rows if only in row.kernel))
    print("\n".join(problems), file=sys.stderr)
    return 1 if problems else 0
