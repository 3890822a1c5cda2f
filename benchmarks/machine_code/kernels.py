"""Compiled kernels: machine code, loops, registers and shared memory.

Triton kernels are compiled here; CUDA kernels are read from the installed extension.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from benchmarks.codegen import cuda as codegen_cuda
from benchmarks.codegen import triton as codegen_triton
from benchmarks.codegen.cuobjdump import read_usage
from benchmarks.machine_code import banks, branches, results, sass
from benchmarks.machine_code.devices import Device
from benchmarks.machine_code.sass import Instruction, Loop

_LOADS = ("LDG", "LD")


class Compiled(NamedTuple):
    """One kernel on one architecture."""

    name: str
    code: Sequence[Instruction]
    loops: Sequence[Loop]
    threads: int
    registers: int
    shared: int
    """Bytes of shared memory of a block."""
    conflicts: banks.Conflicts | None
    """Those of the loop that multiplies; of CUDA kernels those of the whole kernel, if counted."""

    @property
    def warps(self) -> int:
        return -(-self.threads // 32)

    def body(self, loop: Loop, without: frozenset[int] = frozenset()) -> list[Instruction]:
        """The instructions of a trip, without those of inner loops.

        Args:
            without: places that do not run.
        """
        return self._executed([i for i in sass.own(loop, self.loops) if i not in without])

    def arms(self, loop: Loop) -> list[list[frozenset[int]]]:
        """For each branch in a trip, not in inner loops: the places that only one way leads to."""
        found = (sass.arms(self.code, loop, i) for i in sass.own(loop, self.loops))
        return [both for both in found if both]

    def has(self, places: frozenset[int], *bases: str) -> bool:
        """Whether one of these places has such an instruction."""
        return any(self.code[i].base in bases for i in places)

    def straight(self, without: str | None = None) -> list[Instruction]:
        """The instructions that run once a block.

        Args:
            without: a unit; stretches of code that use it are left out.
        """
        looped = {i for loop in self.loops for i in loop.body}
        reached = [i for i in sass.reached(self.code) if i not in looped]
        if without is None:
            return self._executed(reached)
        stretches = sass.basic_blocks(self.code, reached)
        kept = [
            i
            for stretch in stretches
            if all(sass.unit_of(self.code[j]) != without for j in stretch)
            for i in stretch
        ]
        return self._executed(kept)

    def _executed(self, places: Sequence[int]) -> list[Instruction]:
        """The instructions at these places that run with aligned rows.

        In code that copies rows asynchronously, plain loads of single values that go to shared
        memory are for rows that are not aligned. So are stores of single values, if there are also
        stores of four.
        """
        stretches = sass.basic_blocks(self.code, places)
        copied = any(self.code[i].base == "LDGSTS" for i in places)
        stored = any(_stores_four(self.code[i]) for i in places)
        kept = []
        for stretch in stretches:
            found = [self.code[i] for i in stretch]
            if (copied and _copies_values(found)) or (stored and _stores_values(found)):
                continue
            kept += found
        return kept

    def factors(self, code: Sequence[Instruction]) -> dict[int, float]:
        """Place in a piece of code whose conflicts are known → its wavefronts over the ideal."""
        multiplies = any(sass.unit_of(one) == "tensor" for one in code)
        if self.conflicts is None or not (multiplies or self.conflicts.whole):
            return {}
        return banks.by_place([one.base for one in code], self.conflicts)


def _copies_values(stretch: Sequence[Instruction]) -> bool:
    """Whether the code takes values one by one to shared memory and does nothing else."""
    bases = {one.base for one in stretch}
    wide = any(one.base in _LOADS and ".64" in one.name for one in stretch)
    other = bases.intersection(("LDGSTS", "BAR")) or any(
        sass.unit_of(one) == "fp64" for one in stretch
    )
    return bool(bases.intersection(_LOADS)) and "STS" in bases and not (wide or other)


def _stores_four(one: Instruction) -> bool:
    return one.base == "STG" and ".128" in one.name


def _stores_values(stretch: Sequence[Instruction]) -> bool:
    """Whether the code stores single values to global memory, and none of four."""
    stores = [one for one in stretch if one.base == "STG"]
    return bool(stores) and not any(map(_stores_four, stores))


# ---- finding loops ----------------------------------------------------------------------------


def count_of(code: Sequence[Instruction], *names: str) -> int:
    """The number of instructions whose base or unit is one of these names."""
    return sum(one.base in names or sass.unit_of(one) in names for one in code)


def loop_with_most(kernel: Compiled, *names: str) -> Loop:
    """The loop with most such instructions in a trip, not counting inner loops.

    Of several with as many it is the longest.

    Raises:
        ValueError: no loop has one.
    """

    def size(loop: Loop) -> tuple[int, int]:
        body = kernel.body(loop)
        return count_of(body, *names), len(body)

    best = max(kernel.loops, key=size, default=None)
    if best is None or count_of(kernel.body(best), *names) == 0:
        raise ValueError(f"{kernel.name} has no loop with {' or '.join(names)}.")
    return best


def loops_around(kernel: Compiled, inner: Loop) -> list[Loop]:
    """The loops around a loop, from the innermost outwards."""
    around = [loop for loop in kernel.loops if loop.holds(inner)]
    return sorted(around, key=lambda loop: len(loop.body))


# ---- Triton -----------------------------------------------------------------------------------


def triton_kernel(source: Any, name: str, card: Device, options: Mapping[str, int]) -> Compiled:
    """A kernel compiled for the card. ``options`` are Triton's, num_warps among them."""
    from triton import compile as triton_compile
    from triton.backends.compiler import GPUTarget

    target = GPUTarget("cuda", architecture_for_triton(card), 32)
    compiled = triton_compile(source, target=target, options=dict(options))
    dump = codegen_triton.dump_cubin(compiled.asm["cubin"])
    (code,) = sass.functions(dump).values()
    usage = read_usage(dump, target.arch)
    warps = options["num_warps"]
    return Compiled(
        name=name,
        code=code,
        loops=sass.loops(code),
        threads=32 * warps,
        registers=usage.registers,
        shared=usage.shared + compiled.metadata.shared,
        conflicts=banks.conflicts(compiled.asm["ptx"], warps),
    )


def architecture_for_triton(card: Device) -> int:
    """The card's own architecture, for which Triton compiles."""
    return 89 if card.name == "RTX 4090" else card.architecture


@functools.cache
def _variants() -> dict[str, Any]:
    return {
        variant.name: variant
        for module in codegen_triton.MODULES
        for variant in importlib.import_module(module).variants()
    }


@functools.cache
def triton_variant(card: Device, *words: str) -> Compiled:
    """The variant whose name has all these words.

    Raises:
        ValueError: no variant, or more than one, has them.
    """
    found = [v for name, v in _variants().items() if all(_holds(name, word) for word in words)]
    if len(found) != 1:
        raise ValueError(f"words are {words}, which {len(found)} variants have; allowed is one.")
    (variant,) = found
    source = codegen_triton.source_of(variant)
    return triton_kernel(source, variant.name, card, variant.options)


def _holds(name: str, word: str) -> bool:
    return word in name.split(", ")


# ---- CUDA -------------------------------------------------------------------------------------

_ARCHITECTURE = {80: "80", 90: "90a", 100: "100f", 120: "120"}


@functools.cache
def cuda_kernels(card: Device) -> dict[str, Compiled]:
    """The CUDA kernels by name, as in "distances<float32, 64, false>", without dynamic memory.

    Raises:
        RuntimeError: the extension was built without CUDA, or cuobjdump is missing.
    """
    file, reason = codegen_cuda.extension(), codegen_cuda.why_unchecked()
    if file is None or reason is not None:
        raise RuntimeError(reason)
    text = codegen_cuda.dump(file, _ARCHITECTURE[card.architecture])
    rows = codegen_cuda.read(text, _ARCHITECTURE[card.architecture])
    codes = {codegen_cuda.short_name(s): code for s, code in sass.functions(text).items()}
    accesses = results.load().get("accesses", {})
    found = {}
    for row in rows:
        code = codes[row.kernel]
        figures = row.figures
        counts = accesses.get(row.kernel)
        found[row.kernel] = Compiled(
            name=row.kernel,
            code=code,
            loops=sass.loops(code),
            threads=figures.threads or 128,
            registers=figures.registers,
            shared=figures.shared,
            conflicts=None if counts is None else banks.of_counts(counts),
        )
    return found


# Kernels whose first parameter is a WeightLaw. Its first byte says whether D is infinite.
_WITH_LAW = ("find_limits", "merge", "finish_moments")


@functools.cache
def _decided(card: Device, name: str, rounded: bool) -> Compiled:
    """A CUDA kernel with the branches that finite D and the precision decide."""
    found, base = cuda_kernels(card)[name], name.split("<")[0]
    if base not in _WITH_LAW:
        return found
    first = branches.FIRST_PARAMETER[card.architecture]
    none = {branches.ADDED if rounded else branches.ROUNDING}
    if card.architecture not in (90, 100):  # no tiles of warpgroups or of tensor memory
        none.add(branches.ADDED)
    code = branches.decided(found.code, first, none)
    return found._replace(code=code, loops=sass.loops(code))


def cuda_kernel(
    card: Device, name: str, shared: int, threads: int | None = None, rounded: bool = False
) -> Compiled:
    """A CUDA kernel with the dynamic shared memory and the threads of its launch.

    It has the branches that run where D is finite and only the gradient of the queries is found.

    Args:
        rounded: whether distances are those of values rounded to float16.
    """
    found = _decided(card, name, rounded)
    return found._replace(shared=found.shared + shared, threads=threads or found.threads)
