"""What the Triton kernels compile to. Needs no GPU.

    python -m benchmarks.codegen.triton [--only SUBSTRING] [--capability 90]

Compiles every variant that the kernel modules list for sm_80, sm_90, sm_100 and sm_120, prints
registers, spills, shared memory and the matrix instructions of its PTX, and ends with status 1 if a
kernel spills, needs more shared memory than a block can have, or lacks instructions that it should
have.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib
import multiprocessing
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.codegen.rows import Figures, Row, finish, read_usage
from benchmarks.common.commands import new_parser
from pfgm.backends.triton import interpreted

if TYPE_CHECKING:  # in the tree, which is what mypy sees, pfgm.kernels is called kernels
    from kernels.variant import Variant

MODULES = tuple(
    f"pfgm.kernels.{name}"
    for name in (
        "centering", "distances", "normalised_field", "ode_step", "posterior_mean",
        "posterior_mean_backward", "refinement", "weights",
    )
)  # fmt: skip
SHARED_MEMORY = {80: 99 << 10, 90: 227 << 10, 100: 227 << 10, 120: 99 << 10}
"""Architecture → bytes of shared memory that a block can have. sm_86 and sm_89 have those of sm_80
compiled for them, but less memory, which counts."""
PROCESSES = 2

# In PTX: of a thread into registers or, asynchronously, into shared memory, and bulk copies.
_WIDE_LOAD = r"ld\.global[\w.:]*\.v(?:[48]\.b32|[24]\.b64)|cp\.async\.(?:cg|bulk)"
_INSTRUCTION = re.compile(rf"\b(mma\.sync|wgmma\.mma_async|tcgen05\.mma|{_WIDE_LOAD})\b")


def compile_variant(variant: Variant, capability: int) -> Figures:
    """Compiles for sm_CAPABILITY.

    Raises:
        RuntimeError: TRITON_INTERPRET is set, under which Triton compiles nothing.
    """
    if interpreted():
        raise RuntimeError("TRITON_INTERPRET is set; unset it, the interpreter compiles nothing.")
    # Imported here, so that the rest of this module works without Triton.
    from triton import compile as triton_compile
    from triton import knobs
    from triton.backends.compiler import GPUTarget

    target = GPUTarget("cuda", capability, 32)
    compiled = triton_compile(source_of(variant), target=target, options=variant.options)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "kernel.cubin"
        file.write_bytes(compiled.asm["cubin"])
        command = [knobs.nvidia.cuobjdump.path, "--dump-resource-usage", str(file)]
        usage = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return read_figures(usage, compiled.asm["ptx"], compiled.metadata.shared, capability)


def read_figures(usage: str, ptx: str, dynamic_shared: int, capability: int) -> Figures:
    """The figures of one kernel, from its resources as cuobjdump prints them and its PTX."""
    registers, spills, shared = read_usage(usage, str(capability))
    counts = Counter(_INSTRUCTION.findall(ptx))
    return Figures(registers, spills, shared + dynamic_shared, counts)


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


def problems(variant: Variant, capability: int, figures: Figures) -> list[str]:
    """What is wrong with a compiled variant, in sentences."""
    where, wrong = f"{variant.name} on sm_{capability}", []
    limit, matrix = SHARED_MEMORY[capability], figures.matrix_instructions
    # On Hopper the older matrix instructions have half of the rate.
    full_rate = "wgmma.mma_async" in matrix if capability == 90 else bool(matrix)
    if figures.spills:
        wrong.append(f"{where} spills {figures.spills} bytes per thread.")
    if figures.shared > limit:
        wrong.append(f"{where} wants {figures.shared} bytes of shared memory; a block has {limit}.")
    if variant.products and not full_rate:
        seen = ", ".join(matrix) or "no matrix instructions"
        wrong.append(f"{where} is meant to multiply in tensor cores at full rate; it has {seen}.")
    if variant.wide_loads and not figures.count(_WIDE_LOAD):
        wrong.append(f"{where} has no 16-byte loads from global memory.")
    return wrong


@functools.cache
def variants(module: str) -> list[Variant]:
    """Those that a module lists, and the smallest of each kernel."""
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


def row_of(variant: Variant, capability: int) -> Row:
    """Compiles and checks a variant."""
    try:
        figures = compile_variant(variant, capability)
    except Exception as error:  # a kernel that does not compile is a problem to report
        why = f"{variant.name} on sm_{capability} does not compile: {type(error).__name__}: {error}"
        return Row(variant.name, str(capability), None, [why])
    wrong = problems(variant, capability, figures)
    return Row(variant.name, str(capability), figures, wrong)


def _row_at(module: str, place: int, capability: int) -> Row:
    """The row of a variant by its place in the module's list: kernels cannot be pickled."""
    return row_of(variants(module)[place], capability)


def rows_of(capabilities: Iterable[int], only: str = "") -> list[Row]:
    """Compiles every variant whose name contains ``only``, in several processes."""
    jobs = [
        (module, place, capability)
        for module in MODULES
        for place, variant in enumerate(variants(module))
        if only in variant.name
        for capability in capabilities
    ]
    # Not by fork, because torch's threads do not survive it.
    with ProcessPoolExecutor(PROCESSES, multiprocessing.get_context("spawn")) as pool:
        return list(pool.map(_row_at, *zip(*jobs, strict=True)))


def main() -> int:
    parser = new_parser(__doc__)
    parser.add_argument("--only", default="", metavar="SUBSTRING", help="of the variant's name")
    parser.add_argument("--capability", type=int, choices=SHARED_MEMORY, help="default: all")
    options = parser.parse_args()
    if interpreted():
        parser.error("TRITON_INTERPRET is set; unset it, the interpreter compiles nothing.")
    chosen = SHARED_MEMORY if options.capability is None else (options.capability,)
    rows = rows_of(chosen, options.only)
    return finish(rows, [problem for row in rows for problem in row.problems])


if __name__ == "__main__":
    sys.exit(main())
