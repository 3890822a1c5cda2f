"""Machine code as ``cuobjdump --dump-sass`` prints it: instructions, control words, loops.

An instruction has 128 bits, printed as two words of 64. Bits 105 to 125 are its control word. From
the lowest bit it has:

- 4 bits: clocks until the warp's next instruction;
- 1 bit: a hint to yield;
- 3 bits: the scoreboard that is released when the result is written (7 is none);
- 3 bits: the scoreboard that is released when the operands are read (7 is none);
- 6 bits: a mask of the scoreboards to wait for;
- 4 bits: reuse of operands.

NVIDIA does not document this. The layout is that of Jia et al., "Dissecting the NVIDIA Volta GPU
Architecture via Microbenchmarking" (arXiv 1804.06826, section 2.1). Code up to sm_120 fits it.
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
    """The control word: instructions for the scheduler."""

    stall: int
    """The least number of clocks until the warp's next instruction."""
    write: int
    """Scoreboard that is released when the result is written; 7 is none."""
    read: int
    """Scoreboard that is released when the operands are read; 7 is none."""
    wait: tuple[int, ...]
    """Scoreboards that must be free before the instruction starts."""


class Instruction(NamedTuple):
    """One instruction of machine code."""

    address: int
    predicate: str
    """As in "@!P0", or empty."""
    name: str
    """With its modifiers: "HMMA.1688.F32.TF32"."""
    operands: str
    control: Control

    @property
    def base(self) -> str:
        """The name without modifiers."""
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
    """Symbol of a kernel → its instructions, without the padding at the end."""
    pieces = _FUNCTION.split(dump)[1:]
    return {name: instructions(code) for name, code in zip(pieces[::2], pieces[1::2], strict=True)}


def instructions(code: str) -> list[Instruction]:
    """The instructions of one kernel, without the padding at the end."""
    found = [
        Instruction(int(at, 16), guard.strip(), name, operands, control_of(int(high, 16)))
        for at, guard, name, operands, _, high in _LINE.findall(code.split("\nFatbin")[0])
    ]
    found = [_described(found, i) if one.base in _IN_MEMORY else one for i, one in enumerate(found)]
    while found and _is_padding(found[-1]):
        found.pop()
    return found


_IN_MEMORY = ("UTCHMMA", "UTCQMMA", "UTCIMMA", "UTCMMA")  # tcgen05
_DESCRIPTOR = re.compile(r"idesc\[(UR\d+)\]")


def _described(code: Sequence[Instruction], i: int) -> Instruction:
    """A matrix instruction with its shape in its name, if the descriptor is a constant.

    The fields are those of the PTX ISA, "Instruction descriptor" of tcgen05.mma.
    """
    register = _DESCRIPTOR.search(code[i].operands)
    if register is None:
        return code[i]
    written = (one for one in reversed(code[:i]) if one.operands.startswith(f"{register[1]}, "))
    last = next(written, None)
    constant = last and last.name == "UMOV" and re.search(r", (0x[0-9a-f]+)", last.operands)
    if not constant:
        return code[i]
    descriptor = int(constant[1], 16)
    rows, columns = (descriptor >> 24 & 31) * 16, (descriptor >> 17 & 63) * 8
    tf32 = descriptor >> 7 & 7 == 2
    name = f"{code[i].name}.{rows}x{columns}x{8 if tf32 else 16}{'.TF32' * tf32}"
    return code[i]._replace(name=name)


def _is_padding(instruction: Instruction) -> bool:
    """Whether it does nothing, or jumps to itself, as the code after a kernel's end does."""
    return instruction.base == "NOP" or jump_target(instruction) == instruction.address


class Loop(NamedTuple):
    """A natural loop, by indices of instructions."""

    header: int
    """The instruction that every trip begins with."""
    body: frozenset[int]
    """All its instructions, with those of inner loops."""

    def holds(self, other: Loop) -> bool:
        """Whether another loop is inside this one."""
        return self != other and other.body <= self.body


def loops(code: Sequence[Instruction]) -> list[Loop]:
    """Natural loops, found by their back edges, in the order of their headers.

    The compiler puts some pieces of code after the kernel's end, such as the repeated wait for a
    barrier. A jump back from there is not a loop over everything in between.
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
    """Indices of the instructions that may run.

    Without called functions, and without the separate code for warps that have diverged.
    """
    before = _predecessors(code)
    return [i for i in range(len(code)) if i == 0 or before[i]]


def basic_blocks(code: Sequence[Instruction], places: Sequence[int]) -> list[list[int]]:
    """Places split into basic blocks."""
    starts = {_place(code, jump_target(one)) for one in code}
    found: list[list[int]] = []
    for i in places:
        new = not found or found[-1][-1] != i - 1 or i in starts or code[i - 1].base == "BRA"
        if new:
            found.append([])
        found[-1].append(i)
    return found


def _predecessors(code: Sequence[Instruction]) -> list[list[int]]:
    """The instructions that each instruction may directly follow, if they are reachable."""
    found: list[list[int]] = [[] for _ in code]
    if not code:
        return found
    seen, left = {0}, [0]
    while left:
        i = left.pop()
        for after in successors(code, i):
            found[after].append(i)
            if after not in seen:
                seen.add(after)
                left.append(after)
    return found


def successors(
    code: Sequence[Instruction], i: int, instruction: Instruction | None = None
) -> list[int]:
    """The places that may directly follow an instruction.

    Args:
        instruction: what stands at place i, by default that of the code.
    """
    instruction = instruction or code[i]
    target = _place(code, jump_target(instruction))
    found = [] if target is None else [target]
    if i + 1 < len(code) and not _leaves(instruction):
        found.append(i + 1)
    return found


def _leaves(instruction: Instruction) -> bool:
    """Whether execution never continues with the next instruction in memory."""
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
    """Index of the instruction at an address."""
    if address is None or not code:
        return None
    i = (address - code[0].address) // 16
    return i if 0 <= i < len(code) and code[i].address == address else None


_NEAR = 64  # bytes to the target of a call that never returns


def jump_target(instruction: Instruction) -> int | None:
    """The address that an instruction may jump to.

    The compiler writes some jumps as calls that never return. Their target is close behind them.
    """
    if instruction.base not in ("BRA", "CALL") or instruction.name.startswith("BRA.DIV"):
        return None
    if instruction.never:
        return None
    found = _TARGET.search(instruction.operands)
    target = int(found[1], 16) if found else None
    if instruction.base == "CALL" and target is not None:
        return target if 0 < target - instruction.address <= _NEAR else None
    return target


def called(code: Sequence[Instruction], call: Instruction) -> int | None:
    """The place of a function that is called, in the same code."""
    found = _TARGET.search(call.operands)
    return _place(code, int(found[1], 16)) if found else None


def arms(code: Sequence[Instruction], loop: Loop, i: int) -> list[frozenset[int]]:
    """For both ways on from a branch in a loop: the places of a trip that only this way leads to.

    It is empty for a place that is no branch with two ways.
    """
    starts = successors(code, i)
    if code[i].base != "BRA" or len(starts) != 2:
        return []
    a, b = (_way(code, loop.body - {loop.header}, start) for start in starts)
    return [a - b, b - a]


def _way(code: Sequence[Instruction], places: frozenset[int], start: int) -> frozenset[int]:
    """The places that may be reached from a place."""
    found: set[int] = set()
    left = [start]
    while left:
        i = left.pop()
        if i in places and i not in found:
            found.add(i)
            left += successors(code, i)
    return frozenset(found)


def own(loop: Loop, others: Iterable[Loop]) -> list[int]:
    """Indices of a loop's instructions that are in no inner loop, in order."""
    inner = {i for other in others if loop.holds(other) for i in other.body}
    return sorted(loop.body - inner)


# ---- the mix of instructions ------------------------------------------------------------------

_UNITS = {
    "tensor": "HMMA IMMA DMMA QMMA OMMA HGMMA QGMMA IGMMA UTCHMMA UTCQMMA UTCMMA UTCIMMA",
    "fp32": "FFMA FADD FMUL FFMA2 FADD2 FMUL2 HFMA2 HADD2 HMUL2 FSWZADD",
    "imad": "IMAD IDP VIADDMNMX",
    "fp64": "DFMA DADD DMUL DSETP DMNMX",
    "mufu": "MUFU",
    "convert": "F2F F2I I2F FRND F2FP I2FP I2I F2IP POPC FLO BREV",
    "shared": "LDS STS LDSM STSM ATOMS SHFL REDUX CREDUX",
    "tensor_memory": "LDTM STTM",
    "global": "LDG STG LDGSTS LD ST UTMALDG UTMASTG UBLKCP ATOMG RED REDG LDL STL",
    "constant": "LDC ULDC LDCU S2R S2UR CS2UR",
    "barrier": "BAR DEPBAR LDGDEPBAR WARPSYNC WARPGROUP SYNCS UCGABAR_ARV UCGABAR_WAIT MEMBAR FENCE"
    " ERRBAR CCTL CGAERRBAR ACQBULK PREEXIT BSYNC BSSY UTCBAR ARRIVES ENDCOLLECTIVE",
    "branch": "BRA EXIT CALL RET BREAK NOP BRX YIELD NANOSLEEP JMP BMOV",
}
_UNIT_OF = {name: unit for unit, names in _UNITS.items() for name in names.split()}


def unit_of(instruction: Instruction) -> str:
    """The unit that an instruction keeps busy.

    "alu" does comparisons, selections, moves, and integer arithmetic except products. "uniform" is
    work done once a warp.
    """
    base = instruction.base
    if base in _UNIT_OF:
        return _UNIT_OF[base]
    return "uniform" if base.startswith("U") and not base.startswith("UTC") else "alu"


def mix(code: Iterable[Instruction]) -> dict[str, int]:
    """Unit, or name of a matrix instruction → number of instructions that can run."""
    counts: Counter[str] = Counter()
    for instruction in code:
        if not instruction.never:
            unit = unit_of(instruction)
            counts[instruction.name if unit == "tensor" else unit] += 1
    return dict(counts)


def access_bytes(instruction: Instruction) -> int:
    """Bytes that each lane reads or writes: 16 of "LDG.E.128", 4 if the name has no size."""
    sizes = {"256": 32, "128": 16, "64": 8, "U16": 2, "S16": 2, "U8": 1, "S8": 1, "16": 2}
    for part in instruction.name.split(".")[1:]:
        if part in sizes:
            return sizes[part]
    return 4
