"""Reads what cuobjdump prints about a compiled kernel: resources and instructions."""

from __future__ import annotations

import re
from typing import NamedTuple

_INSTRUCTION = re.compile(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)")
# HMMA and the like before Hopper, HGMMA on it, UTCHMMA after it. HFMA2.MMA is none of them.
_MATRIX = re.compile(r"(?:UTC)?[A-Z]*MMA(?:\.|$)")
# From Hopper on, the system takes this many bytes of shared memory in every block, and ptxas counts
# them as the kernel's.
_RESERVED = 1024


class Usage(NamedTuple):
    """The resources of one kernel."""

    registers: int
    """Of a thread."""
    spills: int
    """Bytes of stack and local memory per thread."""
    shared: int
    """Bytes of static shared memory per block."""


def read_usage(dump: str, capability: int) -> Usage:
    """The resources in a dump of one kernel."""
    usage = {key: int(value) for key, value in re.findall(r"\b([A-Z]+):(\d+)", dump)}
    reserved = _RESERVED if capability >= 90 else 0
    return Usage(
        registers=usage["REG"],
        spills=usage["STACK"] + usage["LOCAL"],
        shared=max(usage["SHARED"] - reserved, 0),
    )


def instructions(dump: str) -> list[str]:
    """The instructions in a dump, with their modifiers, without predicates and operands."""
    found: list[str] = _INSTRUCTION.findall(dump)
    return found


def is_matrix_instruction(instruction: str) -> bool:
    """Whether an instruction multiplies matrices."""
    return _MATRIX.match(instruction) is not None
