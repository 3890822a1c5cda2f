"""Reads what cuobjdump prints about a compiled kernel: resources and instructions."""

from __future__ import annotations

import re
from typing import NamedTuple

_INSTRUCTION = re.compile(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)")
# HMMA and the like before Hopper, HGMMA on it, UTCHMMA after it. HFMA2.MMA is none of them.
_MATRIX = re.compile(r"(?:UTC)?[A-Z]*MMA(?:\.|$)")
# A wait for earlier launches, without a predicate.
_WAIT = re.compile(r"/\*[0-9a-f]{4,}\*/\s+ACQBULK\b")
# What may access global memory. Other LD… and ST… are of shared, local or constant memory.
_GLOBAL = re.compile(
    r"LD(?![CLS])|ST(?![LS])|ATOM(?!S)|RED(?!UX)|CCTL|TEX|TLD|SU(?:LD|ST|RED)|U\w*TMA|UBLK"
)
_TURN = re.compile(r"PREEXIT|BRA|BRX|JM[PX]|CALL|RET|EXIT|KILL|BREAK|BPT")
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


def waits(dump: str) -> bool:
    """Whether a kernel waits for earlier launches anywhere."""
    return "ACQBULK" in instructions(dump)


def waits_first(dump: str) -> bool:
    """Whether a kernel waits for earlier launches before all that matters to others.

    That is to access global memory, to let the next launch start (PREEXIT), to jump and to end. As
    nothing jumps before, it waits on every path.
    """
    found = _WAIT.search(dump)
    if found is None:
        return False
    before = instructions(dump[: found.start()])
    return not any(_GLOBAL.match(one) or _TURN.match(one) for one in before)


def is_matrix_instruction(instruction: str) -> bool:
    """Whether an instruction multiplies matrices."""
    return _MATRIX.match(instruction) is not None
