"""Of single changes of PTX instructions the executor or a wrong result notices each."""

from __future__ import annotations

import random
import re
from collections.abc import Callable

import pytest
import torch

CHANGES = 40


def swapped(text: str, i: int, j: int) -> str:
    parts = text.split(", ")
    parts[i], parts[j] = parts[j], parts[i]
    return ", ".join(parts)


def in_list(number: int, i: int, j: int) -> Callable[[str], str]:
    """Swaps two operands of a list in braces."""

    def change(line: str) -> str:
        match = list(re.finditer(r"\{([^{}]*)\}", line))[number]
        return line[: match.start(1)] + swapped(match[1], i, j) + line[match.end(1) :]

    return change


def number(pattern: str, change: Callable[[int], int]) -> Callable[[str], str]:
    """Changes the number that the pattern's group is."""

    def changed(line: str) -> str:
        match = re.search(pattern, line)
        assert match is not None
        return line[: match.start(1)] + str(change(int(match[1]))) + line[match.end(1) :]

    return changed


def removed(line: str) -> str:
    return "// " + line


CLASSES = {
    "a barrier is missing": (r"\bbar\.sync|barrier\.sync", removed),
    "a barrier of a warp is missing": (r"bar\.warp\.sync", removed),
    "a copy is not waited for": (
        r"cp\.async\.wait_group", number(r"(\d+);", lambda n: n + 1)
    ),
    "mma: a": (r"mma\.sync", in_list(1, 1, 2)),
    "mma: b": (r"mma\.sync", in_list(2, 0, 1)),
    "mma: d": (r"mma\.sync.*f32\.f", in_list(0, 1, 2)),
    "shuffle": (
        r"shfl\.sync\.bfly\.b32 +\S+, %r\d+, (1|2|4|8|16),",
        number(r"bfly\.b32 +\S+, %r\d+, (\d+),", lambda n: n * 2 % 31),
    ),
    "st.shared": (r"st\.shared\.\S+ +\[%r\d+\+\d+\]", number(r"\+(\d+)\]", lambda n: n + 16)),
    "ld.shared": (r"ld\.shared\.\S+ .*\[%r\d+\+\d+\]", number(r"\+(\d+)\]", lambda n: n + 16)),
    "less": (r"setp\.lt\.s32", lambda line: line.replace("setp.lt.s32", "setp.le.s32")),
    "not less": (r"setp\.ge\.s32", lambda line: line.replace("setp.ge.s32", "setp.gt.s32")),
    "fma": (
        r"fma\.rn\.f32 +%\w+, %\w+, %\w+, %\w+;",
        lambda line: re.sub(r"(%\w+), (%\w+);", r"\2, \1;", line),
    ),
    "parameter": (
        r"ld\.param\.\w*64 +%rd\d+, \[.*\+\d+\]",
        number(r"\+(\d+)\]", lambda n: n + 8 if n < 16 else n - 8),
    ),
    "a fence is missing": (r"fence\.proxy\.async", removed),
    "a product is not waited for": (
        r"wgmma\.wait_group", number(r"(\d+);", lambda n: n + 1)
    ),
    "wgmma: a": (r"wgmma\.mma_async", in_list(-1, 1, 2)),
    "wgmma: fence": (r"wgmma\.fence", removed),
    "descriptor": (
        r"or\.b64 +%rd\d+, %rd\d+, \d{10,}", number(r", (\d{10,})", lambda n: n ^ (3 << 32))
    ),
    "no wait for earlier launches": (r"griddepcontrol\.wait", removed),
}  # fmt: skip
# Differences, tiles of warps, tiles and sums of warpgroups: sizes, multiprocessors, type.
PROBLEMS = [
    (9, 65, 97, 4, torch.uint8),
    (40, 130, 97, 4, torch.float32),
    (100, 130, 100, 1, torch.float32),
    (256, 60, 256, 1, torch.float32),
]


@pytest.fixture
def backend():
    return "native"


class Problems:
    """Runs the problems, and says whether the tests would notice that something is wrong."""

    def __init__(self, op, executor):
        self.op, self.executor = op, executor
        self.given = [op.problem(B, M, N, dtype=dtype) for B, M, N, _, dtype in PROBLEMS]
        self.expected = [
            (op.expected(*given, 1.0), op.expected_gradients(*given, 1.0)) for given in self.given
        ]
        self.entries = []
        for n in range(len(PROBLEMS)):
            executor.launches()
            self.run(n, 0)
            self.entries.append({launch.entry for launch in executor.launches()})

    def run(self, n, order):
        """Results, which are right."""
        given, (expected, gradients) = self.given[n], self.expected[n]
        self.executor.device(90, PROBLEMS[n][3])
        self.executor.order(order)
        results = self.op.compute(*given, 1.0)
        self.op.assert_accurate(results, expected, given[1])
        found = self.op.gradients(*given, 1.0, (True, n != 0, True))
        for gradient, wanted in zip(found, gradients, strict=True):
            if gradient is not None:
                self.op.assert_gradient(gradient, wanted, 1e-5)
        assert self.executor.errors() == []
        return *results, *(gradient for gradient in found if gradient is not None)

    def notice(self, entry):
        """Whether something is wrong in the problems that launch a kernel."""
        for n, entries in enumerate(self.entries):
            if entry not in entries:
                continue
            try:
                first, *others = (self.run(n, order) for order in (0, 1, 7))
                for other in others:
                    assert all(torch.equal(a, b) for a, b in zip(first, other, strict=True))
            except (AssertionError, RuntimeError, ValueError):
                return True
        return False


@pytest.mark.slow
def test_single_changes(op, executor):
    problems = Problems(op, executor)
    library = executor.library
    entries = sorted(set.union(*problems.entries))
    places = {name: [] for name in CLASSES}
    texts = {}
    for module in range(library.ptx_modules()):
        text = library.ptx_text(module).decode()
        lines = texts[module] = text.split("\n")
        for entry in entries:
            for line in map(int, library.ptx_reached(module, entry.encode()).split()):
                for name, (pattern, _) in CLASSES.items():
                    if re.search(pattern, lines[line]):
                        places[name].append((module, entry, line))
    generator = random.Random(0)
    kinds = [name for name in CLASSES if places[name]]
    missed = []
    for turn in range(CHANGES):
        name = kinds[turn % len(kinds)]
        module, entry, line = generator.choice(places[name])
        lines = list(texts[module])
        lines[line] = CLASSES[name][1](lines[line])
        library.ptx_reload(module, "\n".join(lines).encode())
        try:
            if lines[line] != texts[module][line] and not problems.notice(entry):
                missed.append(f"{name}, {entry}, line {line}: {texts[module][line].strip()}")
        finally:
            library.ptx_reload(module, "\n".join(texts[module]).encode())
            executor.errors()
    assert missed == []
