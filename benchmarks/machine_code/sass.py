"""Machine code as ``cuobjdump --dump-sass`` prints it: instructions, control words, loops.

An instruction has 128 bits, printed as two words of 64. Bits 105 to 125 are its control word, from
the lowest: 4 bits of clocks until the warp's next instruction, one hint to yield, 3 bits each of
the scoreboard that is released when the result is written and when the operands were read (7 is
none), a mask of the 6 scoreboards that are waited for, and 4 bits of operand reuse. NVIDIA does
not document this: the layout is that of Jia et al., "Dissecting the NVIDIA Volta GPU Architecture
via Microbenchmarking" (arXiv 1804.06826, section 2.1), and has been the same up to sm_120 in all
code that was looked at.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import NamedTuple

_FUNCTION = re.compile(r"^\s+Function : (\S+)$", re.MULTILINE)
_LINE = re.compile(
    r"^\s+/\*([0-9a-f]{4,})\*/\s+(@!?U?P\w+\s+)?([A-Z][\w.]*)\s*(.*?)\s*;"
    r"\s+/\* 0x([0-9a-f]{16}) \*/\s*\n\s+/\* 0x([0-9a-f]{16}) \*/",
    re.MULTILINE,
)
_TARGET = re.compile(r"0x([0-9a-f]+)(?:\s*\(|\s*$)")
_CONTROL = 105 - 64  # the lowest bit of the control word in the second word
NO_SCOREBOARD = 7


class Control(NamedTuple):
    """What the scheduler is told."""

    stall: int
    """Clocks until the next instruction of the warp may go, at least."""
    write: int
    """Scoreboard that the result releases; 7 is none."""
    read: int
    """Scoreboard that is released when the operands were read; 7 is none."""
    wait: tuple[int, ...]
    """Scoreboards that must be free before."""


class Instruction(NamedTuple):
    address: int
    predicate: str
    """As in "@!P0", or empty."""
    name: str
    """With its modifiers: "HMMA.1688.F32.TF32"."""
    operands: str
    control: Control

    @property
    def base(self) -> str:
        return self.name.split(".")[0]

    @property
    def never(self) -> bool:
        """Whether its predicate is never true."""
        return self.predicate in ("@!PT", "@!UPT")


def control_of(high: int) -> Control:
    """The control word of an instruction's second 64 bits.

    >>> control_of(0x000FE20000000F00)
    Control(stall=1, write=7, read=7, wait=())
    """
    word = high >> _CONTROL
    wait = word >> 11 & 63
    return Control(
        stall=word & 15,
        write=word >> 5 & 7,
        read=word >> 8 & 7,
        wait=tuple(k for k in range(6) if wait >> k & 1),
    )


def functions(dump: str) -> dict[str, list[Instruction]]:
    """Every kernel's symbol → its instructions, without those that only fill up its end."""
    pieces = _FUNCTION.split(dump)[1:]
    return {name: instructions(code) for name, code in zip(pieces[::2], pieces[1::2], strict=True)}


def instructions(code: str) -> list[Instruction]:
    found = [
        Instruction(int(at, 16), guard.strip(), name, operands, control_of(int(high, 16)))
        for at, guard, name, operands, _, high in _LINE.findall(code.split("\nFatbin")[0])
    ]
    while found and _fills(found[-1]):
        found.pop()
    return found


def _fills(instruction: Instruction) -> bool:
    """Whether it only stands behind the end: nothing, or a jump to itself as a trap."""
    return instruction.base == "NOP" or jump_target(instruction) == instruction.address


class Loop(NamedTuple):
    """A natural loop."""

    header: int
    """Index of the instruction that every trip begins with."""
    body: frozenset[int]
    """Indices of its instructions, those of loops in it among them."""

    def holds(self, other: Loop) -> bool:
        return self != other and other.body <= self.body


def loops(code: Sequence[Instruction]) -> list[Loop]:
    """Natural loops by their back edges, in the order of their headers.

    What a loop leaves by never counts to it: pieces of code that the compiler put behind the end,
    such as another try where a barrier is waited for, do not make loops of all between.
    """
    before = _predecessors(code)
    bodies: dict[int, frozenset[int]] = {}
    for i, instruction in enumerate(code):
        header = _place(code, jump_target(instruction))
        if header is not None and header < i and before[i]:
            body = _natural(before, header, i)
            if header == 0 or 0 not in body:
                bodies[header] = bodies.get(header, frozenset()) | body
    return [Loop(header, body) for header, body in sorted(bodies.items())]


def reached(code: Sequence[Instruction]) -> list[int]:
    """Indices of the instructions that may run, without what is called and what only warps take
    part in that have diverged: both lie out of the way in code of their own."""
    before = _predecessors(code)
    return [i for i in range(len(code)) if i == 0 or before[i]]


def basic_blocks(code: Sequence[Instruction], places: Sequence[int]) -> list[list[int]]:
    """The places, in stretches that are run as a whole."""
    starts = {_place(code, jump_target(one)) for one in code}
    found: list[list[int]] = []
    for i in places:
        new = not found or found[-1][-1] != i - 1 or i in starts or code[i - 1].base == "BRA"
        if new:
            found.append([])
        found[-1].append(i)
    return found


def _predecessors(code: Sequence[Instruction]) -> list[list[int]]:
    """Of each instruction those that it may follow, as far as they are ever reached."""
    found: list[list[int]] = [[] for _ in code]
    if not code:
        return found
    seen, left = {0}, [0]
    while left:
        i = left.pop()
        for after in _successors(code, i):
            found[after].append(i)
            if after not in seen:
                seen.add(after)
                left.append(after)
    return found


def _successors(code: Sequence[Instruction], i: int) -> list[int]:
    instruction = code[i]
    target = _place(code, jump_target(instruction))
    found = [] if target is None else [target]
    if i + 1 < len(code) and not _leaves(instruction):
        found.append(i + 1)
    return found


def _leaves(instruction: Instruction) -> bool:
    """Whether the next instruction in memory never follows it."""
    if instruction.predicate or instruction.base not in ("EXIT", "RET", "BRA", "BRX"):
        return False
    if instruction.name.startswith("BRA.DIV"):
        return False
    return not re.match(r"!?U?P\d", instruction.operands)


def _natural(before: list[list[int]], header: int, last: int) -> frozenset[int]:
    body, left = {header, last}, [last]
    while left:
        for i in before[left.pop()]:
            if i not in body:
                body.add(i)
                left.append(i)
    return frozenset(body)


def _place(code: Sequence[Instruction], address: int | None) -> int | None:
    """Index of the instruction at an address; instructions are evenly spaced."""
    if address is None or not code:
        return None
    i = (address - code[0].address) // 16
    return i if 0 <= i < len(code) and code[i].address == address else None


_NEAR = 64  # bytes


def jump_target(instruction: Instruction) -> int | None:
    """Where it may go on. A call of what stands right behind it is a jump that never returns: the
    compiler makes such."""
    if instruction.base not in ("BRA", "CALL") or instruction.name.startswith("BRA.DIV"):
        return None
    found = _TARGET.search(instruction.operands)
    target = int(found[1], 16) if found else None
    if instruction.base == "CALL" and target is not None:
        return target if 0 < target - instruction.address <= _NEAR else None
    return target


def innermost(found: Iterable[Loop]) -> list[Loop]:
    found = list(found)
    return [loop for loop in found if not any(loop.holds(other) for other in found)]


def own(code: Sequence[Instruction], loop: Loop, others: Iterable[Loop]) -> list[Instruction]:
    """The instructions of a loop that are in no loop within it, in the order of addresses."""
    inner = {i for other in others if loop.holds(other) for i in other.body}
    return [code[i] for i in sorted(loop.body - inner)]


# ---- the mix of instructions ------------------------------------------------------------------

_UNITS = {
    "tensor": "HMMA IMMA DMMA QMMA OMMA HGMMA QGMMA IGMMA UTCHMMA UTCQMMA UTCMMA UTCIMMA",
    "fp32": "FFMA FADD FMUL FFMA2 FADD2 FMUL2 HFMA2 HADD2 HMUL2 FSWZADD",
    "imad": "IMAD IDP VIADDMNMX",
    "fp64": "DFMA DADD DMUL DSETP DMNMX",
    "mufu": "MUFU",
    "convert": "F2F F2I I2F FRND F2FP I2FP I2I F2IP POPC FLO BREV",
    "shared": "LDS STS LDSM STSM ATOMS SHFL LDTM STTM",
    "global": "LDG STG LDGSTS LD ST UTMALDG UTMASTG UBLKCP ATOMG RED LDL STL",
    "constant": "LDC ULDC LDCU S2R S2UR CS2UR",
    "barrier": "BAR DEPBAR LDGDEPBAR WARPSYNC WARPGROUP SYNCS UCGABAR_ARV UCGABAR_WAIT MEMBAR FENCE"
    " ERRBAR CCTL CGAERRBAR BSYNC BSSY UTCBAR ARRIVES ENDCOLLECTIVE",
    "branch": "BRA EXIT CALL RET BREAK NOP BRX YIELD NANOSLEEP JMP BMOV",
}
_UNIT_OF = {name: unit for unit, names in _UNITS.items() for name in names.split()}


def unit_of(instruction: Instruction) -> str:
    """The unit that it keeps busy. "alu" is integer arithmetic but for products, comparisons,
    selections and moves; "uniform" what is done once a warp."""
    base = instruction.base
    if base in _UNIT_OF:
        return _UNIT_OF[base]
    return "uniform" if base.startswith("U") and not base.startswith("UTC") else "alu"


def mix(code: Iterable[Instruction]) -> dict[str, int]:
    """Unit, and for matrix instructions their name → how many there are. What never runs is left
    out."""
    counts: Counter[str] = Counter()
    for instruction in code:
        if not instruction.never:
            unit = unit_of(instruction)
            counts[instruction.name if unit == "tensor" else unit] += 1
    return dict(counts)


def access_bytes(instruction: Instruction) -> int:
    """Bytes that each lane reads or writes: 16 of "LDG.E.128", 4 where nothing is said."""
    sizes = {"256": 32, "128": 16, "64": 8, "U16": 2, "S16": 2, "U8": 1, "S8": 1, "16": 2}
    for part in instruction.name.split(".")[1:]:
        if part in sizes:
            return sizes[part]
    return 4
