"""What the Triton kernels compile to, read from the machine code. Needs no GPU.

    python -m benchmarks.codegen.triton [--only SUBSTRING] [--capability 90] [--store]

Compiles every variant that the kernel modules list for sm_80, sm_90, sm_100 and sm_120, prints
registers, spills, shared memory, matrix instructions and 16-byte loads, and ends with status 1 if a
kernel spills, needs more shared memory than a block can have, or lacks instructions that it should
have.
``--store`` keeps a row for each kernel and architecture in results/codegen_triton.json.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib
import json
import multiprocessing
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from benchmarks.codegen import summary
from benchmarks.codegen.cuobjdump import instructions, is_matrix_instruction, read_usage
from benchmarks.codegen.disassembly import disassemble, machine_code
from benchmarks.common.commands import new_parser
from benchmarks.common.machine import store
from benchmarks.common.tables import table
from pfgm.backends.triton import interpreted

if TYPE_CHECKING:  # in the tree, which is what mypy sees, pfgm.kernels is called kernels
    from kernels.variant import Variant

MODULES = tuple(
    f"pfgm.kernels.{name}"
    for name in (
        "centering",
        "distances",
        "normalised_field",
        "ode_step",
        "posterior_mean",
        "posterior_mean_backward",
        "refinement",
        "weights",
    )
)
_ARCHITECTURES = {80: "80", 90: "90a", 100: "100a", 120: "120"}  # names for nvdisasm
_SHARED_MEMORY = {80: 163, 90: 227, 100: 227, 120: 99}  # KiB of a block, at most
CAPABILITIES = tuple(_ARCHITECTURES)
PROCESSES = 2

_KIB = 1024
# Loads of a thread into registers or, asynchronously, into shared memory, and bulk copies.
_WIDE_LOAD = re.compile(r"LDG(?:STS)?\.E(?:\.\w+)*\.(?:128|256)(?:\.|$)|UBLKCP|UTMALDG")


@dataclass(frozen=True)
class Figures:
    """Resources and instructions of one compiled kernel."""

    registers: int
    spills: int
    """Bytes of local memory per thread."""
    shared: int
    """Bytes of shared memory per block, static and dynamic."""
    matrix_instructions: dict[str, int]
    """Instruction without its modifiers → its number in the code."""
    wide_loads: int


class Row(NamedTuple):
    """One variant on one architecture, and what is wrong with it."""

    module: str
    kernel: str
    capability: int
    figures: Figures | None
    problems: list[str]


@dataclass(frozen=True)
class Compiled:
    """One variant for one architecture."""

    usage: str
    """Its resources, as cuobjdump prints them."""
    code: bytes
    """Its instructions."""
    shared: int
    """Bytes of dynamic shared memory per block."""


def shared_memory_limit(capability: int) -> int:
    """Bytes of shared memory that one block can have."""
    return _SHARED_MEMORY[capability] * _KIB


def compile_variant(variant: Variant, capability: int) -> Compiled:
    """Compiles for sm_CAPABILITY.

    Raises:
        RuntimeError: TRITON_INTERPRET is set, under which Triton compiles nothing.
    """
    if interpreted():
        raise RuntimeError("TRITON_INTERPRET is set; unset it, the interpreter compiles nothing.")
    # Imported here, so that the rest of this module works without Triton.
    from triton import compile as triton_compile
    from triton.backends.compiler import GPUTarget

    compiled = triton_compile(
        source_of(variant),
        target=GPUTarget("cuda", capability, 32),
        options=variant.options,
    )
    cubin = compiled.asm["cubin"]
    usage = _cuobjdump(cubin, "--dump-resource-usage")
    return Compiled(usage, machine_code(cubin), compiled.metadata.shared)


def source_of(variant: Variant) -> Any:
    """What Triton compiles for a variant.

    Raises:
        ValueError: an argument of the kernel has no type and no value, or the other way round.
    """
    from triton.compiler import ASTSource

    arguments: list[str] = variant.kernel.arg_names
    stated = {**variant.types, **dict.fromkeys(variant.constants, "constexpr")}
    if odd := set(arguments) ^ set(stated):
        raise ValueError(
            f"{variant.name} gives types or values for other arguments than its kernel has: "
            f"{', '.join(sorted(odd))}; allowed is exactly the kernel's arguments."
        )
    divisible = {
        (place,): [["tt.divisibility", 16]]
        for place, name in enumerate(arguments)
        if name in variant.divisible
    }
    signature = {name: stated[name] for name in arguments}
    return ASTSource(variant.kernel, signature, dict(variant.constants), divisible)


def _cuobjdump(cubin: bytes, *options: str) -> str:
    from triton import knobs

    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "kernel.cubin"
        file.write_bytes(cubin)
        command = [knobs.nvidia.cuobjdump.path, *options, str(file)]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def read_figures(dump: str, dynamic_shared: int, capability: int) -> Figures:
    """The figures in a dump of one kernel."""
    usage = read_usage(dump, capability)
    matrix: dict[str, int] = {}
    wide_loads = 0
    for instruction in instructions(dump):
        if is_matrix_instruction(instruction):
            base = instruction.split(".")[0]
            matrix[base] = matrix.get(base, 0) + 1
        wide_loads += _WIDE_LOAD.match(instruction) is not None
    return Figures(
        registers=usage.registers,
        spills=usage.spills,
        shared=usage.shared + dynamic_shared,
        matrix_instructions=matrix,
        wide_loads=wide_loads,
    )


def problems(variant: Variant, capability: int, figures: Figures) -> list[str]:
    """What is wrong with a compiled variant, in sentences."""
    where, found = f"{variant.name} on sm_{capability}", []
    limit = shared_memory_limit(capability)
    if figures.spills:
        found.append(f"{where} spills {figures.spills} bytes per thread.")
    if figures.shared > limit:
        found.append(f"{where} wants {figures.shared} bytes of shared memory; a block has {limit}.")
    if variant.products and not _full_rate(figures.matrix_instructions, capability):
        seen = ", ".join(figures.matrix_instructions) or "no matrix instructions"
        found.append(f"{where} is meant to multiply in tensor cores at full rate; it has {seen}.")
    if variant.wide_loads and not figures.wide_loads:
        found.append(f"{where} has no 16-byte loads from global memory.")
    return found


def _full_rate(matrix_instructions: dict[str, int], capability: int) -> bool:
    """Whether matrix instructions have the full rate. On Hopper the older ones have half of it."""
    return "HGMMA" in matrix_instructions if capability == 90 else bool(matrix_instructions)


@functools.cache
def _variants(module: str) -> list[Variant]:
    listed: list[Variant] = importlib.import_module(module).variants()
    kernels = {variant.kernel: variant for variant in reversed(listed)}
    return [*listed, *map(smallest, kernels.values())]


def smallest(variant: Variant) -> Variant:
    """The variant for one query, reference and feature.

    Triton turns each size of 1 into a constant. Kernels must compile with these constants.
    """
    padded = ("width", "pairs_stride", "stretch")  # sizes that are always multiples of 16
    unspecialised = {p.name for p in variant.kernel.params if p.do_not_specialize}
    ones = {
        name: 1
        for name, kind in variant.types.items()
        if kind == "i32" and name not in padded and name not in unspecialised
    }
    return dataclasses.replace(
        variant,
        name=f"{variant.name.split(',')[0]}, sizes of 1",
        types={name: kind for name, kind in variant.types.items() if name not in ones},
        constants={**variant.constants, **ones},
        divisible=variant.divisible - set(ones),
        wide_loads=False,
    )


class Job(NamedTuple):
    """A variant, by its place in the module's list because kernels cannot be pickled."""

    module: str
    place: int
    capability: int

    @property
    def variant(self) -> Variant:
        return _variants(self.module)[self.place]


def _compile(job: Job) -> Compiled | str:
    """What a variant compiles to, or why it does not compile."""
    try:
        return compile_variant(job.variant, job.capability)
    except Exception as error:  # a kernel that does not compile is a problem to report
        return f"{type(error).__name__}: {error}"


def _row(job: Job, compiled: Compiled | str, code: str) -> Row:
    module, _, capability = job
    variant = job.variant
    if isinstance(compiled, str):
        found = [f"{variant.name} on sm_{capability} does not compile: {compiled}"]
        return Row(module, variant.name, capability, None, found)
    figures = read_figures(compiled.usage + code, compiled.shared, capability)
    found = problems(variant, capability, figures)
    return Row(module, variant.name, capability, figures, found)


def _disassembled(jobs: Sequence[Job], compiled: Sequence[Compiled | str]) -> list[str]:
    """The instructions of each job, or "" where it does not compile."""
    found = [""] * len(jobs)
    for capability in {job.capability for job in jobs}:
        codes = {
            place: one.code
            for place, (job, one) in enumerate(zip(jobs, compiled, strict=True))
            if job.capability == capability and isinstance(one, Compiled)
        }
        texts = disassemble(list(codes.values()), _ARCHITECTURES[capability])
        for place, text in zip(codes, texts, strict=True):
            found[place] = text
    return found


def rows_of(
    modules: Iterable[str],
    capabilities: Iterable[int],
    only: str = "",
    processes: int = PROCESSES,
) -> list[Row]:
    """Compiles every variant whose name contains ``only``, here or in several processes."""
    jobs = [
        Job(module, place, capability)
        for module in modules
        for place, variant in enumerate(_variants(module))
        if only in variant.name
        for capability in capabilities
    ]
    if processes == 1:
        compiled = list(map(_compile, jobs))
    else:
        # Not by fork, because torch's threads do not survive it.
        context = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(processes, context) as pool:
            compiled = list(pool.map(_compile, jobs))
    return list(map(_row, jobs, compiled, _disassembled(jobs, compiled)))


def report(rows: list[Row]) -> str:
    """One line per variant and architecture."""
    header = ["kernel", "architecture", "registers", "spills", "shared"]
    header += ["matrix instructions", "16-byte loads"]
    return table(header, [_cells(row) for row in rows])


def _cells(row: Row) -> list[str]:
    start = [row.kernel, f"sm_{row.capability}"]
    if row.figures is None:
        return [*start, *[""] * 5]
    figures = row.figures
    matrix = ", ".join(f"{count} {name}" for name, count in figures.matrix_instructions.items())
    counts = (figures.registers, figures.spills, figures.shared, matrix, figures.wide_loads)
    return [*start, *map(str, counts)]


def as_json(rows: list[Row]) -> list[dict[str, Any]]:
    """The rows for JSON."""
    return [
        {**row._asdict(), "figures": None if row.figures is None else asdict(row.figures)}
        for row in rows
    ]


def stored(rows: list[Row]) -> list[summary.Summary]:
    """What is stored: one row for all variants of a kernel that compile on an architecture."""
    variants = [
        summary.Variant(row.kernel.split(",")[0], f"sm_{row.capability}", asdict(row.figures))
        for row in rows
        if row.figures is not None
    ]
    return summary.summarise(variants, {"wide_loads": "16-byte loads"})


def main() -> int:
    parser = new_parser(__doc__)
    parser.add_argument("--only", default="", metavar="SUBSTRING", help="of the variant's name")
    parser.add_argument("--capability", type=int, choices=CAPABILITIES, help="default: all")
    parser.add_argument("--modules", nargs="+", default=MODULES, help="default: %(default)s")
    parser.add_argument("--processes", type=int, default=PROCESSES, help="default: %(default)s")
    parser.add_argument("--json", action="store_true", help="print rows as JSON, not a table")
    parser.add_argument("--store", action="store_true", help="write results/codegen_triton.json")
    options = parser.parse_args()
    if interpreted():
        parser.error("TRITON_INTERPRET is set; unset it, the interpreter compiles nothing.")
    capabilities = CAPABILITIES if options.capability is None else (options.capability,)
    rows = rows_of(options.modules, capabilities, options.only, options.processes)
    print(json.dumps(as_json(rows)) if options.json else report(rows))
    if options.store:
        import triton

        store("codegen_triton", {"triton": triton.__version__, "rows": stored(rows)})
    found = [problem for row in rows for problem in row.problems]
    print("\n".join(found), file=sys.stderr)
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
