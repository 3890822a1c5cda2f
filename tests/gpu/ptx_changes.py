"""Single changes of PTX instructions: tests of kernels must notice them."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import groupby
from typing import NamedTuple

from benchmarks.common.executor import Executed, Executor, plain_name, source_name

Rewrite = Callable[[str], str]


def _number(pattern: str, change: Callable[[int], int]) -> Rewrite:
    """Changes the number that the pattern's group is."""

    def rewrite(line: str) -> str:
        match = re.search(pattern, line)
        assert match is not None
        return line[: match.start(1)] + str(change(int(match[1]))) + line[match.end(1) :]

    return rewrite


def _swap(group: int, i: int, j: int) -> Rewrite:
    """Swaps two registers of a group in braces."""

    def rewrite(line: str) -> str:
        match = list(re.finditer(r"\{([^{}]*)\}", line))[group]
        registers = match[1].split(", ")
        registers[i], registers[j] = registers[j], registers[i]
        return line[: match.start(1)] + ", ".join(registers) + line[match.end(1) :]

    return rewrite


def _replace(pattern: str, by: str) -> Rewrite:
    return lambda line: re.sub(pattern, by, line, count=1)


_remove = _replace(".+", "")
_OFFSET = r"\+(\d+)\]"
# What is changed → a pattern of the instruction, what becomes of it.
KINDS: dict[str, tuple[str, Rewrite]] = {
    "no barrier": (r"\b(bar|barrier)\.sync", _remove),
    "no barrier of a warp": (r"\bbar\.warp\.sync", _remove),
    "one copy more may be under way": (
        r"\bcp\.async\.wait_group", _number(r"(\d+);", lambda n: n + 1),
    ),
    "a copy of 0 bytes": (r"\bcp\.async\.c[ag].*, %r\d+;", _replace(r"%r\d+;", "0;")),
    "mma: operands a1, a2": (r"\bmma\.sync", _swap(1, 1, 2)),
    "mma: operands b0, b1": (r"\bmma\.sync", _swap(2, 0, 1)),
    "mma: results d1, d2": (r"\bmma\.sync.*f32\.f", _swap(0, 1, 2)),
    "a shuffle that stays in its lane": (
        r"\bshfl\.sync\.bfly", _replace(r"(bfly\.b32 \S+ \S+) \S+,", r"\1 0,"),
    ),
    "a store 16 bytes on": (rf"\bst\.shared.*{_OFFSET}", _number(_OFFSET, lambda n: n + 16)),
    "a load 16 bytes on": (rf"\bld\.shared.*{_OFFSET}", _number(_OFFSET, lambda n: n + 16)),
    "≤ for <": (r"\bsetp\.lt\.[su]\d", _replace("lt", "le")),
    "> for ≥": (r"\bsetp\.ge\.[su]\d", _replace("ge", "gt")),
    "fma: factor and addend": (
        r"\bfma\.rn\.f32 %\w+, %\w+, %\w+, %\w+;", _replace(r"(%\w+), (%\w+);", r"\2, \1;"),
    ),
    "another field of a parameter": (
        rf"\bld\.param\.\w64 .*{_OFFSET}",
        _number(_OFFSET, lambda n: n + 8 if n < 16 else n - 8),
    ),
}  # fmt: skip


def _in_one_form(line: str) -> str:
    """An instruction with the spaces of nvcc, whose PTX has fewer than Triton's."""
    return re.sub(r"(?<=[\[{+]) | (?=[\]}+])", "", " ".join(line.split()))


class Change(NamedTuple):
    kind: str
    capability: int  # that the PTX is for
    where: Executed
    place: int  # of the line in the kernel
    before: str
    after: str

    def __str__(self) -> str:
        """The same whatever the numbers of registers are, and the lines of other kernels."""
        instruction = re.sub(r"%(\w+?)\d+\b", r"%\1", re.sub(r"_Z\w+(_param)", r"\1", self.before))
        return f"{self.kind}, {plain_name(self.where.entry)}, sm_{self.capability}: {instruction}"


class Changes:
    """Changes of instructions that kernels have executed.

    Attributes:
        places: kind → kernel → its changes.
    """

    def __init__(self, executor: Executor, executed: set[Executed]):
        self._executor = executor
        self._lines = [text.split("\n") for text in executor.modules()]
        self.places: dict[str, dict[str, list[Change]]] = {kind: {} for kind in KINDS}
        for (module, entry), group in groupby(sorted(executed), lambda each: each[:2]):
            self._find(module, entry, [each.line for each in group])

    def _find(self, module: int, entry: str, executed: list[int]) -> None:
        lines = self._lines[module]
        target = next(filter(None, (re.match(r"\.target sm_(\d+)", line) for line in lines)))[1]
        start = next(i for i, line in enumerate(lines) if f".entry {entry}(" in line)
        kernel = f"{source_name(entry)} sm_{target}"
        for line in executed:
            before = _in_one_form(lines[line])
            for kind, (pattern, rewrite) in KINDS.items():
                if re.search(pattern, before) and (after := rewrite(before)) != before:
                    where = Executed(module, entry, line)
                    change = Change(kind, int(target), where, line - start, before, after)
                    self.places[kind].setdefault(kernel, []).append(change)

    def draw(self, count: int) -> list[Change]:
        """Takes the kinds in turn, and of each a kernel and a place by a fixed seed. Where a kernel
        or a problem is changed, what is drawn of others stays."""

        def rank(*words: object) -> bytes:
            return hashlib.sha256(repr(words).encode()).digest()

        kinds = [kind for kind, kernels in self.places.items() if kernels]
        drawn = []
        for turn in range(count):
            kind = kinds[turn % len(kinds)]
            kernels = self.places[kind]
            kernel = min(kernels, key=lambda name: rank(turn, kind, name))
            drawn.append(min(kernels[kernel], key=lambda each: rank(turn, each.place)))
        return drawn

    @contextmanager
    def made(self, change: Change) -> Iterator[None]:
        """The executor runs the changed kernel."""
        module, _, line = change.where
        lines = self._lines[module].copy()
        lines[line] = change.after
        with self._executor.replaced(module, "\n".join(lines)):
            yield
