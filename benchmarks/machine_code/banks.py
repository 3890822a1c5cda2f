"""Bank conflicts of shared memory, from the addresses of a warp's lanes.

Shared memory has 32 banks of 4 bytes. The wavefronts of an access by a warp are the largest number
of different words in one bank. With 8 bytes per lane, half a warp is served at a time; with 16
bytes, a quarter. A matrix of ``ldmatrix`` or ``stmatrix`` is 8 rows of 16 bytes (CUDA C++
Programming Guide, shared memory).

Here the addresses come from Triton's PTX, evaluated for every lane with the registers of the first
trip: those in the loop that multiplies, or in the whole kernel if no loop multiplies. An address is
unknown if it depends on loaded values or on an instruction that is not evaluated here. Accesses of
the CUDA kernels are counted while these run on the host (accesses.py).
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

_BANKS, _WORD, _LANES = 32, 4, 32
_MASK = (1 << 64) - 1


def wavefronts(addresses: Sequence[int], size: int) -> int:
    """Wavefronts of one access by a warp, with ``size`` bytes at each lane's address.

    >>> wavefronts([4 * lane for lane in range(32)], 4)
    1
    >>> wavefronts([128 * lane for lane in range(32)], 4)
    32
    """
    together = min(_LANES, _BANKS * _WORD // size)
    parts = (addresses[i : i + together] for i in range(0, len(addresses), together))
    return sum(_in_one_turn(part, size) for part in parts)


def matrix_wavefronts(rows: Sequence[int]) -> int:
    """Wavefronts of ``ldmatrix``, given the addresses of rows of 16 bytes, 8 a matrix."""
    return sum(_in_one_turn(rows[i : i + 8], 16) for i in range(0, len(rows), 8))


def _in_one_turn(addresses: Sequence[int], size: int) -> int:
    words: dict[int, set[int]] = defaultdict(set)
    for address in set(addresses):
        for word in range(address // _WORD, (address + size - 1) // _WORD + 1):
            words[word % _BANKS].add(word)
    return max((len(found) for found in words.values()), default=0)


# ---- Triton's PTX ------------------------------------------------------------------------------

Kind = str  # "ldmatrix", "stmatrix", "load", "store", and those of accesses.py


class Access(NamedTuple):
    """One access of shared memory in PTX."""

    line: int
    kind: Kind
    ideal: int
    wavefronts: int | None
    """The most of any warp; None if the addresses are unknown."""


class Conflicts(NamedTuple):
    """Bank conflicts of one loop."""

    ideal: int
    """Wavefronts of a warp and trip without conflicts."""
    wavefronts: int
    unseen: int
    """Accesses with unknown addresses; they count as free of conflicts."""
    ratio: dict[Kind, float]
    """Wavefronts over ideal ones."""
    whole: bool = False
    """Whether they are those of the whole kernel."""


_ACCESS = re.compile(
    r"\b(ldmatrix|stmatrix|ld\.shared|st\.shared)(\S*)\s[^\[]*\[\s*(%\w+)\s*(?:\+\s*(-?\d+))?"
)
_DEFINED = re.compile(r"^(?:@!?%p\d+\s+)?([a-z][\w.:]*)\s+(%\w+)\s*,\s*(.*);")
_LABEL = re.compile(r"^(\$L\w+):")
_JUMP = re.compile(r"\bbra(?:\.uni)?\s+(\$L\w+)")
_PRODUCT = re.compile(r"\b(?:mma\.sync|wgmma\.mma|tcgen05\.mma)")


def conflicts(ptx: str, warps: int) -> Conflicts:
    """The conflicts of the loop that multiplies, in a block of so many warps."""
    lines = [line.split("//")[0].strip() for line in ptx.splitlines()]
    first, last = _loop(lines)
    found = [a for a in accesses(lines, warps) if first <= a.line <= last]
    seen = [(a.kind, a.ideal, a.wavefronts) for a in found if a.wavefronts is not None]
    ideals: dict[Kind, int] = defaultdict(int)
    actual: dict[Kind, int] = defaultdict(int)
    for kind, ideal, count in seen:
        ideals[kind] += ideal
        actual[kind] += count
    unseen = len(found) - len(seen)
    ratio = {kind: actual[kind] / ideals[kind] for kind in ideals}
    extra = sum(a.ideal for a in found if a.wavefronts is None)
    return Conflicts(sum(ideals.values()) + extra, sum(actual.values()) + extra, unseen, ratio)


def of_counts(counts: Mapping[Kind, Sequence[int]]) -> Conflicts:
    """The conflicts of a whole kernel, given the ideal and the actual wavefronts of each kind.

    Kinds of other memory are left out.
    """
    shared = {kind: counts[kind] for kind in ("load", "store", "copy") if kind in counts}
    ratio = {kind: actual / ideal for kind, (ideal, actual) in shared.items()}
    ideal, actual = (sum(count[i] for count in shared.values()) for i in range(2))
    return Conflicts(ideal, actual, 0, ratio, whole=True)


def _loop(lines: Sequence[str]) -> tuple[int, int]:
    """First and last line of the shortest loop with products, or of the whole text."""
    labels = {found[1]: n for n, line in enumerate(lines) if (found := _LABEL.match(line))}
    products = [n for n, line in enumerate(lines) if _PRODUCT.search(line)]
    spans = []
    for n, line in enumerate(lines):
        found = _JUMP.search(line)
        if found and labels.get(found[1], n) < n:
            span = (labels[found[1]], n)
            if any(span[0] < product < span[1] for product in products):
                spans.append(span)
    return min(spans, key=lambda span: span[1] - span[0], default=(0, len(lines)))


def accesses(lines: Sequence[str], warps: int) -> list[Access]:
    """All accesses of shared memory."""
    evaluator = _Evaluator.of(lines)
    found = []
    for n, line in enumerate(lines):
        match = _ACCESS.search(line)
        if match:
            name, rest, register, offset = match.groups()
            lanes = [evaluator.at(register, n, 32 * w, int(offset or 0)) for w in range(warps)]
            found.append(_access(n, name, rest, lanes))
    return found


def _access(line: int, name: str, rest: str, by_warp: list[list[int] | None]) -> Access:
    kind = {"ld.shared": "load", "st.shared": "store"}.get(name, name)
    if kind in ("ldmatrix", "stmatrix"):
        count = next((k for k in (4, 2, 1) if f".x{k}" in rest), 1)
        ideal, measure = count, _matrices(count)
    else:
        size = _size(rest)
        ideal, measure = max(1, _LANES * size // 128), _words(size)
    known = [measure(lanes) for lanes in by_warp if lanes is not None]
    return Access(line, kind, ideal, max(known) if len(known) == len(by_warp) else None)


def _matrices(count: int) -> Callable[[list[int]], int]:
    return lambda lanes: matrix_wavefronts(lanes[: 8 * count])


def _words(size: int) -> Callable[[list[int]], int]:
    return lambda lanes: wavefronts(lanes, size)


def _size(rest: str) -> int:
    vector = re.search(r"\.v(\d)", rest)
    bits = re.search(r"\.[a-z](\d+)$", rest)
    return (int(vector[1]) if vector else 1) * (int(bits[1]) if bits else 32) // 8


# ---- values of registers -----------------------------------------------------------------------


class _Definition(NamedTuple):
    line: int
    operation: str
    operands: list[str]


def _shifted_left(value: int, by: int) -> int:
    return value << by if by < 64 else 0


def _product(value: int, by: int) -> int:
    return value * by


_BINARY: dict[str, Callable[[int, int], int]] = {
    "and": lambda a, b: a & b,
    "or": lambda a, b: a | b,
    "xor": lambda a, b: a ^ b,
    "shl": _shifted_left,
    "shr": lambda a, b: a >> min(b, 63),
    "add": lambda a, b: a + b,
    "sub": lambda a, b: a - b,
    "mul": _product,
    "min": min,
    "max": max,
}
_COMPARISONS: dict[str, Callable[[int, int], bool]] = {
    "eq": lambda a, b: a == b,
    "ne": lambda a, b: a != b,
    "lt": lambda a, b: a < b,
    "le": lambda a, b: a <= b,
    "gt": lambda a, b: a > b,
    "ge": lambda a, b: a >= b,
}
_MOST_DEPTH = 80  # of definitions that depend on each other


@dataclass
class _Evaluator:
    definitions: dict[str, list[_Definition]]

    @staticmethod
    def of(lines: Sequence[str]) -> _Evaluator:
        found: dict[str, list[_Definition]] = defaultdict(list)
        for n, line in enumerate(lines):
            match = _DEFINED.match(line)
            if match and not match[1].startswith(("st.", "bra", "bar")):
                operands = [part.strip() for part in match[3].split(",")]
                found[match[2]].append(_Definition(n, match[1], operands))
        return _Evaluator(found)

    def at(self, register: str, line: int, first: int, offset: int) -> list[int] | None:
        """Addresses of the lanes of the warp that starts with thread ``first``, None if unknown."""
        found = [self.value(register, line, first + lane, 0) for lane in range(_LANES)]
        seen = [value + offset for value in found if value is not None]
        return seen if len(seen) == _LANES else None

    def value(self, name: str, line: int, thread: int, depth: int) -> int | None:
        """The value of a register or constant before a line, None if unknown."""
        if not name.startswith("%"):
            return _constant(name)
        if name.startswith("%tid"):
            return thread if name == "%tid.x" else 0
        if name.startswith("%ctaid"):
            return 0
        before = [d for d in self.definitions.get(name, []) if d.line < line]
        if not before or depth > _MOST_DEPTH:
            return None
        return self._result(before[-1], thread, depth + 1)

    def _result(self, definition: _Definition, thread: int, depth: int) -> int | None:
        line, operation, operands = definition
        base = operation.split(".")[0]
        values = [self.value(name, line, thread, depth) for name in operands]
        if base == "selp":
            return None if values[2] is None else values[0] if values[2] else values[1]
        known = [value for value in values if value is not None]
        if len(known) < len(values):
            return None
        return _apply(base, operation, known)


def _apply(base: str, operation: str, values: list[int]) -> int | None:
    if base in ("mov", "cvt", "cvta"):
        return values[0]
    if base in _BINARY:
        wide = "64" in operation or ".wide" in operation
        result = _BINARY[base](values[0], values[1])
        return result & (_MASK if wide else _MASK >> 32)
    if base == "mad":
        return values[0] * values[1] + values[2]
    if base == "bfe":
        return values[0] >> values[1] & ((1 << values[2]) - 1)
    if base == "not":
        return ~values[0] & _MASK >> 32
    if base == "setp":
        compare = _COMPARISONS.get(operation.split(".")[1])
        return None if compare is None else int(compare(values[0], values[1]))
    return None


def _constant(name: str) -> int | None:
    if name.startswith("global_smem"):
        return 0
    try:
        return int(name, 0)
    except ValueError:
        return None


# ---- places in the machine code ----------------------------------------------------------------

_KIND_OF = {"LDSM": "ldmatrix", "STSM": "stmatrix", "LDS": "load", "STS": "store"}


def by_place(bases: Sequence[str], found: Conflicts) -> dict[int, float]:
    """Place in a piece of machine code → its wavefronts over the ideal.

    Each place gets the mean of its kind, because the assembler may join and move accesses.
    """
    return {
        place: found.ratio[_KIND_OF[base]]
        for place, base in enumerate(bases)
        if _KIND_OF.get(base, "") in found.ratio
    }
