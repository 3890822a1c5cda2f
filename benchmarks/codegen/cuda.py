"""What the CUDA kernels of csrc/ compile to, read from the installed extension. Needs no GPU.

    python -m benchmarks.codegen.cuda [--only SUBSTRING]

Prints registers, spills, shared memory and the important instructions of every kernel, for every
architecture that the extension has code for. Ends with status 1 if a kernel differs from its entry
in INTENTS. Needs cuobjdump, which comes with nvcc and with the package triton.
"""

from __future__ import annotations

import importlib
import importlib.util
import math
import re
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch

from benchmarks.codegen.rows import Figures, Row, finish, read_usage
from benchmarks.common.commands import new_parser
from benchmarks.common.folders import ROOT

CSRC = ROOT / "csrc" / "cuda"
HOW_TO_BUILD = (
    "To check them, install the CUDA toolkit so that nvcc is on PATH (or named in CUDACXX) and run "
    "pip install -e '.[test]' again."
)
PROCESSES = 2

_REGISTERS = 1 << 16  # of a multiprocessor
_MOST_REGISTERS = 255  # of a thread
_EMPTY = 4  # instructions of an empty kernel, at most

_INSTRUCTION = re.compile(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)")
_COPY, _WIDE = r"LDGSTS\.E(?:\.\w+)*\.128(?:\.|$)", r"\.E(?:\.\w+)*\.(?:128|256)(?:\.|$)"
_FLUSHING = r"F(?:ADD|MUL|FMA|SETP)(?:\.\w+)*\.FTZ(?:\.|$)"

_USAGE = re.compile(r"^ Function (\S+):\n(.*)$", re.MULTILINE)
_THREADS = re.compile(
    r"EIATTR_MAX_THREADS\s+Format:\s+\w+\s+Value:\s+0x([0-9a-f]+) 0x([0-9a-f]+) 0x([0-9a-f]+)"
)
_DECLARED = re.compile(
    r"__global__\s+void\s+(?:__launch_bounds__\((?:[^()]|\([^()]*\))*\)\s*)?(\w+)\s*\("
)
_NAMESPACES = re.compile(r"pfgm::|\(anonymous namespace\)::")
_KERNEL = re.compile(r"(?:void )?(\w+(?:<.*?>)?)\(.*\)")


@dataclass(frozen=True)
class Intent:
    """What a kernel should compile to."""

    blocks: int
    """Blocks that the registers of a multiprocessor must hold at once."""
    products: str | None = None
    """What the names of its matrix instructions contain: ".TF32", or "16816" for products of
    float16. Without it a kernel must not use matrix units."""
    copies: bool = False
    """Whether it copies asynchronously, 16 bytes at a time."""
    wide: bool = False
    """Whether it loads and stores 16 bytes at a time."""


# By patterns of whole names, the first that matches.
INTENTS = {
    r"distances<.*": Intent(1, "16816", copies=True),
    r"finish_distances<.*, false>": Intent(4, wide=True),
    r"finish_distances<.*": Intent(4),
    r"differences<.*": Intent(2, copies=True),
    r"weigh<.*": Intent(6),
    r"weighted_sum<[\w ]+, true>": Intent(2, "16816", copies=True),
    r"(weighted_sum|reference_gradient)<.*": Intent(2, ".TF32", copies=True),
    r"(ode_step|normalised_field)_kernel<4, .*": Intent(1, wide=True),
    r"(ode_step|normalised_field)_kernel<1, .*": Intent(1),
    r"(find_center|find_limits|refine|list_references|order_queries)(<.*)?": Intent(2),
    r"(pull|find_coefficients|split_rows|finish_moments)(<.*)?": Intent(2),
    r"merge(_difference|_gradient)?(<.*)?": Intent(2),
    r"expand_level|find_step_levels": Intent(2),
}


# ---- the extension and its tools ---------------------------------------------------------------


def extension() -> Path | None:
    """The file of the installed extension."""
    spec = importlib.util.find_spec("pfgm._native")
    return None if spec is None or spec.origin is None else Path(spec.origin)


def architectures() -> list[str]:
    """The architectures that the extension has machine code for, as in "80"."""
    if extension() is None:
        return []
    built: str | None = importlib.import_module("pfgm._native").build_info()["cuda_architectures"]
    return re.findall(r"\b(\d+[af]?)(?:-real)?(?=\s|$)", built or "")


def cuobjdump() -> str | None:
    """The path of cuobjdump."""
    try:
        from triton import knobs

        return str(knobs.nvidia.cuobjdump.path)
    except (ImportError, RuntimeError):  # no Triton, or one without the tool
        return shutil.which("cuobjdump")


def why_unchecked() -> str | None:
    """Why no kernel can be checked, or None."""
    nothing = "NOT CHECKED: spills, registers and instructions of the CUDA kernels"
    if not architectures():
        return f"{nothing}; pfgm._native was built without nvcc or is not installed. {HOW_TO_BUILD}"
    if cuobjdump() is None:
        return f"{nothing}; cuobjdump was not found. It comes with nvcc, and with triton."
    return None


def declared() -> set[str]:
    """The names of all kernels in csrc/cuda/.

    Raises:
        ValueError: the name of a kernel cannot be read.
    """
    names = set()
    for path in sorted(CSRC.glob("*")):
        if path.suffix not in (".cu", ".h"):
            continue
        code = re.sub(r"//.*", "", path.read_text())
        kernels = _DECLARED.findall(code)
        if len(kernels) != code.count("__global__"):
            raise ValueError(f"{path}: not every kernel's name can be read.")
        names.update(kernels)
    return names


# ---- reading -----------------------------------------------------------------------------------


def short_name(symbol: str) -> str:
    """The readable form of a mangled name, such as ``distances<WarpProducts<float, 64>, 1>``, with
    the number of an enumerator.

    Raises:
        ValueError: it is no name of a kernel.
    """
    kernel = _KERNEL.fullmatch(_NAMESPACES.sub("", torch._C._demangle(symbol)))
    if kernel is None:
        raise ValueError(f"no name of a kernel: {symbol!r}.")
    # Without the types of enumerators, and with ">>" as it is written today.
    return re.sub(r"\(\w+\)|(?<=>) (?=>)", "", kernel[1])


def dump(file: Path, architecture: str) -> str:
    """What cuobjdump prints about the code for one architecture.

    Raises:
        RuntimeError: cuobjdump is missing, or fails.
    """
    tool = cuobjdump()
    if tool is None:
        raise RuntimeError(why_unchecked())
    what = ("--dump-resource-usage", "--dump-sass", "--dump-elf")
    command = [tool, *what, "--gpu-architecture", f"sm_{architecture}", str(file)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}: {done.stderr.strip()}")
    return done.stdout


def read(text: str, architecture: str) -> list[Row]:
    """Every kernel of this architecture in a dump, which may contain others."""
    rows = []
    for part in text.split("\nFatbin elf code:\n"):
        if f"arch = sm_{architecture}\n" not in part[:200]:
            continue
        codes, about = _after(part, "\tFunction : "), _after(part, "\n.nv.info.")
        for symbol, usage in _USAGE.findall(part):
            figures = _figures(usage, codes.get(symbol, ""), about.get(symbol, ""), architecture)
            kernel = short_name(symbol)
            rows.append(Row(kernel, architecture, figures, problems(kernel, architecture, figures)))
    return rows


def _after(part: str, heading: str) -> dict[str, str]:
    """Symbol in a heading → the text below it."""
    pieces = (piece.partition("\n") for piece in part.split(heading)[1:])
    return {symbol: rest for symbol, _, rest in pieces}


def _figures(usage: str, code: str, about: str, architecture: str) -> Figures:
    bound = _THREADS.search(about)
    return Figures(
        *read_usage(usage, architecture),
        Counter(_INSTRUCTION.findall(code)),
        math.prod(int(n, 16) for n in bound.groups()) if bound else None,
    )


# ---- checking ----------------------------------------------------------------------------------


def intent_of(kernel: str) -> Intent | None:
    """What a kernel should compile to."""
    return next((intent for names, intent in INTENTS.items() if re.fullmatch(names, kernel)), None)


def stem(kernel: str) -> str:
    """The name without template arguments."""
    return kernel.split("<")[0]


def register_limit(threads: int, blocks: int) -> int:
    """The most registers per thread with which so many blocks fit, a multiple of 8."""
    return min(_REGISTERS // (threads * blocks) // 8 * 8, _MOST_REGISTERS)


def problems(kernel: str, architecture: str, figures: Figures) -> list[str]:
    """What is wrong with a kernel, in sentences."""
    where, intent = f"{kernel} on sm_{architecture}", intent_of(kernel)
    if intent is None:
        return [f"{where} is not listed in INTENTS of codegen/cuda.py; it is not checked."]
    matrix, count = figures.matrix_instructions, figures.count
    seen = ", ".join(matrix) or "no matrix instructions"
    limit = register_limit(figures.threads or 32, intent.blocks)
    products = matrix and all((intent.products or "") in name for name in matrix)
    checks: list[tuple[object, str]] = [
        (figures.spills, f"spills {figures.spills} bytes per thread"),
        (figures.threads is None, "has no launch bounds"),
        (
            figures.registers > limit,
            f"uses {figures.registers} registers per thread; "
            f"{intent.blocks} × {figures.threads} threads allow {limit}",
        ),
        (count("(?!NOP)") <= _EMPTY, "is empty"),
        (
            intent.products and not products,
            f"is meant to have matrix instructions with {intent.products}; it has {seen}",
        ),
        (
            matrix and not intent.products,
            f"is not meant to multiply in matrix units; it has {seen}",
        ),
        (intent.copies and not count(_COPY), "has no asynchronous copies of 16 bytes"),
        (intent.wide and not count("LDG" + _WIDE), "has no 16-byte loads from global memory"),
        (intent.wide and not count("STG" + _WIDE), "has no 16-byte stores to global memory"),
        (
            count(_FLUSHING),
            f"flushes subnormal numbers to zero in {count(_FLUSHING)} instructions: "
            "compile it without --use_fast_math and --ftz=true",
        ),
    ]
    return [f"{where} {what}." for wrong, what in checks if wrong]


def missing(rows: list[Row], expected: Iterable[str]) -> list[str]:
    """Which kernels of csrc/cuda/ the extension lacks on an architecture, in sentences."""
    there = {(row.architecture, stem(row.kernel)) for row in rows}
    return [
        f"{name} is not in the extension for sm_{architecture}."
        for architecture in expected
        for name in sorted(declared())
        if (architecture, name) not in there
    ]


def check(file: Path, expected: list[str]) -> tuple[list[Row], list[str]]:
    """All kernels of an extension for the expected architectures, and what is wrong with them."""
    with ThreadPoolExecutor(PROCESSES) as pool:
        texts = list(pool.map(lambda architecture: dump(file, architecture), expected))
    pairs = zip(texts, expected, strict=True)
    rows = [row for text, architecture in pairs for row in read(text, architecture)]
    return rows, missing(rows, expected) + [p for row in rows for p in row.problems]


def main() -> int:
    parser = new_parser(__doc__)
    parser.add_argument("--only", default="", metavar="SUBSTRING", help="print such kernels only")
    options = parser.parse_args()
    file, reason = extension(), why_unchecked()
    if file is None or reason is not None:
        parser.error(reason or "")
    return finish(*check(file, architectures()), options.only)


if __name__ == "__main__":
    sys.exit(main())
