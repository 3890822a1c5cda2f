"""Branches of CUDA kernels that the parameters of a launch decide.

At the benchmarks' shapes D is finite, and code for D = ∞ does not run. Code for values rounded to
float16 runs in precision "medium" alone. What follows from these parameters is found by following
them through the registers of the machine code, so it holds for any layout of the code.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Literal

from benchmarks.machine_code import sass
from benchmarks.machine_code.sass import Instruction

# What is known of a register: it holds zero. Of a predicate: its value.
Value = Literal[0] | bool
State = Mapping[str, Value]

FIRST_PARAMETER = {80: 0x160, 90: 0x210, 100: 0x380, 120: 0x380}
"""Architecture → where the parameters of a kernel begin in the bank of constants."""
ROUNDING = 80
"""Where WeightLaw (csrc/cuda/weight_law.h) has the error from rounding, in float64: 0 if there is
none."""
ADDED = 88
"""The same of the error from adding up panels in one float."""

_CONSTANT = re.compile(r"c\[0x0\]\[0x([0-9a-f]+)\]")
_REGISTER = re.compile(r"^(U?R)(\d+)(?:\.reuse|\.64)?$")
_PREDICATE = re.compile(r"^(!?)(U?P[\dT])$")
_LOADS = ("LDC", "ULDC", "LDCU")
_MOVES = ("MOV", "UMOV", "R2UR", "IMAD.MOV.U32", "IMAD.MOV", "IMAD.U32")
_ZEROS = ("RZ", "URZ", "0x0", "0")
_OF_EQUALS = {
    **dict.fromkeys(("EQ", "EQU", "GE", "GEU", "LE", "LEU"), True),
    **dict.fromkeys(("NE", "NEU", "GT", "GTU", "LT", "LTU"), False),
}  # comparison → its result for equal numbers
_JUMPS = ("BRA", "BRX", "EXIT", "RET", "WARPSYNC", "BSSY", "BSYNC")
# Of these, names with "64" or "WIDE" write two registers, others one.
_SINGLE = re.compile(
    "U?(MOV|IMAD|IADD3|LOP3|SHF|LEA|PRMT|SEL|LDC|POPC)|VIADD|LDG|LDS|LDCU|S2U?R|R2UR|FADD|FMUL|FFMA"
    "|FSEL|[FI]MNMX|MUFU|SHFL|VOTEU?|C?REDUX"
)


def decided(
    code: Sequence[Instruction], first: int, zeros: Collection[int] = ()
) -> list[Instruction]:
    """The code with branches that a finite D decides. Addresses and places stay.

    A branch that is always taken loses its predicate; what never runs gets one that is never true.

    Args:
        first: where parameters begin in the bank of constants. The first byte of these is zero if D
            is finite.
        zeros: where parameters are, counted from the first one, that are zero in float64.
    """
    follow = _Follow(code, first, zeros)
    states = follow.states()
    return [_settled(one, states.get(i)) for i, one in enumerate(code)]


def _settled(one: Instruction, state: State | None) -> Instruction:
    if state is None:
        return one
    conditions = _conditions(one)
    known = [_holds(condition, state) for condition in conditions]
    if any(value is False for value in known):
        return one._replace(predicate="@!PT")
    if one.base != "BRA" or not conditions or not all(known):
        return one
    operands = [part for part in _operands(one) if not _PREDICATE.match(part)]
    return one._replace(predicate="", operands=", ".join(operands))


def _conditions(one: Instruction) -> list[str]:
    """The predicates that must hold for an instruction to run, as in "!P0"."""
    found = [one.predicate[1:]] if one.predicate else []
    if one.base == "BRA":
        found += [part for part in _operands(one) if _PREDICATE.match(part)]
    return found


def _operands(one: Instruction) -> list[str]:
    return [part.strip() for part in one.operands.split(",")] if one.operands else []


def _holds(predicate: str, state: State) -> bool | None:
    """The value of a predicate, as in "!P0", if it is known."""
    found = _PREDICATE.match(predicate)
    if not found:
        return None
    value = True if found[2].endswith("T") else state.get(found[2])
    return None if not isinstance(value, bool) else value != bool(found[1])


class _Follow:
    """Follows what is known through the code."""

    def __init__(self, code: Sequence[Instruction], first: int, zeros: Collection[int]) -> None:
        self.code, self.first = code, first
        self.zeros = {first + at for at in zeros}

    def states(self) -> dict[int, State]:
        """Place → what is known before its instruction, for places that may be reached."""
        found: dict[int, State] = {0: {}}
        left = [0]
        while left:
            i = left.pop()
            one = _settled(self.code[i], found[i])
            state = self.after(one, found[i])
            for place in sass.successors(self.code, i, one):
                before = found.get(place)
                new = state if before is None else _both(before, state)
                if before is None or new != before:
                    found[place] = new
                    left.append(place)
        return found

    def after(self, one: Instruction, state: State) -> State:
        """What is known after an instruction."""
        if one.never or one.base in _JUMPS:
            return state
        if one.base == "CALL":
            return self.without(state, self.written_by_call(one))
        found = self.without(state, _written(one))
        if not one.predicate:
            found = {**found, **self.results(one, state)}
        return found

    def without(self, state: State, written: set[str]) -> State:
        return {name: value for name, value in state.items() if name not in written}

    def written_by_call(self, one: Instruction) -> set[str]:
        """All registers and predicates that a called function writes."""
        found: set[str] = set()
        target = sass.called(self.code, one)
        seen, left = set[int](), [] if target is None else [target]
        while left:
            i = left.pop()
            if i in seen:
                continue
            seen.add(i)
            found |= _written(self.code[i])
            left += sass.successors(self.code, i)
        return found

    def results(self, one: Instruction, state: State) -> dict[str, Value]:
        """What the results of an instruction are known to hold."""
        operands = _operands(one)
        if one.base in _LOADS:
            return self.loaded(one, operands)
        if one.name in _MOVES:
            values = [self.value(part, state) for part in operands[1:]]
            moved = values[-1]
            added = all(value == 0 for value in values[:-1])  # to a product of zeros
            return _named(operands[0], moved) if added and moved is not None else {}
        if one.base in ("PRMT", "UPRMT", "LOP3", "ULOP3"):
            return self.combined(one, operands, state)
        if one.base in ("ISETP", "UISETP"):
            return self.compared(one, operands, state)
        if one.base == "DSETP":
            return self.compared_in_float64(one, operands, state)
        return {}

    def loaded(self, one: Instruction, operands: list[str]) -> dict[str, Value]:
        at = _offset(operands[-1])
        if at == self.first and (".U8" in one.name or ".S8" in one.name):
            return _named(operands[0], 0)
        if at in self.zeros and ".64" in one.name:
            return {**_named(operands[0], 0), **_named(_next(operands[0]), 0)}
        return {}

    def value(self, operand: str, state: State) -> Value | None:
        """What is known of an operand that is no predicate."""
        at = _offset(operand)
        if operand in _ZEROS or at in self.zeros or (at is not None and at - 4 in self.zeros):
            return 0
        register = _REGISTER.match(operand)
        return state.get(register[1] + register[2]) if register else None

    def is_zero_in_float64(self, operand: str, state: State) -> bool:
        whole = operand in _ZEROS or _offset(operand) in self.zeros
        halves = (operand, _next(operand))
        return whole or all(half and self.value(half, state) == 0 for half in halves)

    def combined(self, one: Instruction, operands: list[str], state: State) -> dict[str, Value]:
        """Bytes of zeros are zero, and so is zero "and" anything."""
        sources = [part for part in operands[1:] if not _PREDICATE.match(part)]
        if "PRMT" in one.base:
            zero = self.value(sources[0], state) == 0 and self.value(sources[2], state) == 0
        else:
            conjunction = sources[2:4] == ["RZ", "0xc0"] or sources[2:4] == ["URZ", "0xc0"]
            zero = conjunction and 0 in [self.value(part, state) for part in sources[:2]]
        return _named(operands[0], 0) if zero else {}

    def compared(self, one: Instruction, operands: list[str], state: State) -> dict[str, Value]:
        """The results of a comparison for equality with zero."""
        parts = one.name.split(".")
        if parts[1] not in ("EQ", "NE") or not operands[1].endswith("T"):
            return {}
        values = [self.value(part, state) for part in operands[2:4]]
        if values[0] != 0 or values[1] != 0:
            return {}
        return self.joined(operands[0], parts[1] == "EQ", operands[4], parts, state)

    def compared_in_float64(
        self, one: Instruction, operands: list[str], state: State
    ) -> dict[str, Value]:
        """The results of a comparison of zero with zero."""
        parts = one.name.split(".")
        zero = all(self.is_zero_in_float64(part, state) for part in operands[2:4])
        if not zero or parts[1] not in _OF_EQUALS or not operands[1].endswith("T"):
            return {}
        return self.joined(operands[0], _OF_EQUALS[parts[1]], operands[4], parts, state)

    def joined(
        self, name: str, value: bool, with_: str, parts: list[str], state: State
    ) -> dict[str, Value]:
        """The comparison, and or or another predicate."""
        other = _holds(with_, state)
        decides: Callable[[bool], bool] = (lambda v: v) if "OR" in parts else (lambda v: not v)
        if decides(value) or (other is not None and decides(other)):
            return {name: decides(True)}
        return {} if other is None else {name: value}


def _offset(operand: str) -> int | None:
    found = _CONSTANT.fullmatch(operand)
    return int(found[1], 16) if found else None


def _next(operand: str) -> str:
    """The register after one, or nothing if the operand is none."""
    found = _REGISTER.match(operand)
    return f"{found[1]}{int(found[2]) + 1}" if found else ""


def _named(operand: str, value: Value) -> dict[str, Value]:
    register = _REGISTER.match(operand)
    return {register[1] + register[2]: value} if register else {}


def _both(a: State, b: State) -> State:
    """What is known on both ways to a place."""
    return {name: value for name, value in a.items() if name in b and b[name] == value}


def _written(one: Instruction) -> set[str]:
    """At least the registers and predicates that an instruction writes."""
    if one.base in _JUMPS:
        return set()
    operands = _operands(one)[:3]
    found = {part for part in operands if _PREDICATE.match(part) and part[0] != "!"}
    register = next(filter(None, map(_REGISTER.match, operands)), None)
    if register and not one.base.endswith("SETP"):
        number = int(register[2])
        found |= {f"{register[1]}{number + k}" for k in range(_width(one))}
    if one.base == "R2P":
        found |= {f"P{k}" for k in range(7)}
    return found


def _width(one: Instruction) -> int:
    """At least the number of registers that a result has."""
    if not _SINGLE.fullmatch(one.base) or ".128" in one.name:
        return 4
    return 2 if "64" in one.name or "WIDE" in one.name else 1
