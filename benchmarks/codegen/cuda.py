"""What the CUDA kernels of csrc/ compile to, read from the installed extension. Needs no GPU.

    python -m benchmarks.codegen.cuda [--only SUBSTRING] [--store]

Prints registers, spills, shared memory and the important instructions of every kernel, for every
architecture that the extension has code for. Ends with status 1 if a kernel differs from its entry
in INTENTS. ``--store`` keeps a row for each kernel and architecture in results/codegen_cuda.json.
Needs cuobjdump, which comes with nvcc and with the package triton.
"""

from __future__ import annotations

import importlib
import importlib.util
import re
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple

from benchmarks.codegen import summary
from benchmarks.codegen.cuobjdump import (
    instructions,
    is_matrix_instruction,
    read_usage,
    waits,
    waits_first,
)
from benchmarks.common.commands import new_parser
from benchmarks.common.folders import ROOT
from benchmarks.common.machine import store
from benchmarks.common.tables import table

CSRC = ROOT / "csrc" / "cuda"
HOW_TO_BUILD = (
    "To check them, install the CUDA toolkit so that nvcc is on PATH (or named in CUDACXX) and run "
    "pip install -e '.[test]' again."
)
PROCESSES = 2

_REGISTERS = 1 << 16  # of a multiprocessor
_MOST_REGISTERS = 255  # of a thread
_EMPTY = 4  # instructions of an empty kernel, at most, and two more if it waits

_COPY = re.compile(r"LDGSTS\.E(?:\.\w+)*\.128(?:\.|$)")
_WIDE_LOAD = re.compile(r"LDG\.E(?:\.\w+)*\.(?:128|256)(?:\.|$)")
_WIDE_STORE = re.compile(r"STG\.E(?:\.\w+)*\.(?:128|256)(?:\.|$)")
# A load of what must not change while the kernel runs. Waiting does not make it see new values.
_UNCHANGING_LOAD = re.compile(r"LDG(?:\.\w+)*\.CONSTANT(?:\.|$)")
_FLUSHING = re.compile(r"F(?:ADD|MUL|FMA|SETP)(?:\.\w+)*\.FTZ(?:\.|$)")

_USAGE = re.compile(r"^ Function (\S+):\n(.*)$", re.MULTILINE)
_THREADS = re.compile(
    r"EIATTR_MAX_THREADS\s+Format:\s+\w+\s+Value:\s+0x([0-9a-f]+) 0x([0-9a-f]+) 0x([0-9a-f]+)"
)
_OPTIONS = re.compile(r"Tool Command Line Arguments:(.*)")
_UNWANTED = re.compile(r"(?<!\S)-(?:O ?[0-2]|g|maxrregcount)(?!\S)")
_DECLARED = re.compile(
    r"__global__\s+void\s+(?:__launch_bounds__\((?:[^()]|\([^()]*\))*\)\s*)?(\w+)\s*\("
)
_TYPES = {"f": "float32", "h": "uint8"}


@dataclass(frozen=True)
class Figures:
    """Resources and instructions of one kernel on one architecture."""

    registers: int
    spills: int
    """Bytes of stack and local memory per thread."""
    shared: int
    """Bytes of static shared memory per block."""
    threads: int | None
    """The most threads of a block, by the kernel's launch bounds."""
    instructions: int
    """Without padding."""
    matrix_instructions: dict[str, int]
    """Instruction with its modifiers → its number in the code."""
    copies: int
    """Asynchronous copies of 16 bytes."""
    wide_loads: int
    wide_stores: int
    flushing: int
    """Float32 instructions that flush subnormal numbers to zero."""
    unchanging_loads: int
    """Loads of global memory as if nothing wrote it while the kernel is resident."""
    waits: bool
    """Whether it waits for earlier launches."""
    waits_first: bool
    """Whether it does so before all that matters to other launches."""


class Row(NamedTuple):
    """One kernel on one architecture, and what is wrong with it."""

    architecture: str
    kernel: str
    figures: Figures
    problems: list[str]


@dataclass(frozen=True)
class Intent:
    """What a kernel should compile to."""

    threads: int
    """Threads of the largest block that it is launched with."""
    blocks: int = 1
    """Blocks that the registers of a multiprocessor must hold at once."""
    products: str | None = None
    """What the names of its matrix instructions contain: ".TF32", or "16816" for products of
    float16. Without it a kernel must not use matrix units."""
    copies: bool = False
    """Whether it copies asynchronously, 16 bytes at a time."""
    wide: bool = False
    """Whether it loads and stores 16 bytes at a time."""


_BY_ROW = {
    "4, true": Intent(1024, wide=True),
    "4, false": Intent(512, wide=True),
    "1, true": Intent(768),
    "1, false": Intent(512),
}
# By name, or by name and template arguments.
INTENTS = {
    "find_center": Intent(256, blocks=2),
    "split_rows": Intent(256, blocks=2),
    "distances": Intent(256, products="16816", copies=True),
    "warpgroup_distances": Intent(256, products="64x64x16", copies=True),
    **{
        f"warpgroup_distances<float32, 128, 192, {how}>": Intent(
            384, products="64x64x16", copies=True
        )
        for how in ("false, false", "false, true", "true, false")
    },
    "finish_distances": Intent(128, blocks=4),
    **{
        f"finish_distances<{type_}, {geforce}, false>": Intent(128, blocks=4, wide=True)
        for type_ in ("float32", "Rounded", "BFloat16", "Float16", "uint8")
        for geforce in ("true", "false")
    },
    "differences": Intent(256, blocks=2, copies=True),
    **{
        f"find_limits<{products}, {warps}>": Intent(32 * warps, blocks=2)
        for products in ("true", "false")
        for warps in (4, 8)
    },
    "refine": Intent(512, blocks=2),
    "weigh": Intent(256, blocks=6),
    "order_queries": Intent(256, blocks=2),
    "weighted_sum": Intent(128, blocks=2, products=".TF32", copies=True),
    **{
        f"weighted_sum<{type_}, {rows}, true>": Intent(128, blocks=2, products="16816", copies=True)
        for type_ in ("float32", "Rounded", "BFloat16", "Float16", "uint8")
        for rows in (32, 64)
    },
    "merge": Intent(256, blocks=2),
    "subtract_mean": Intent(256, blocks=2),
    **{
        f"list_references<{rows}, {uneven}, {halves}, false>": Intent(8 * rows, blocks=2)
        for rows in (32, 64)
        for uneven in ("true, true", "true, false", "false, false")
        for halves in ("true", "false")
    },
    **{
        f"list_references<{rows}, {uneven}, true, true>": Intent(512, blocks=2)
        for rows in (64, 128)
        for uneven in ("true, true", "true, false", "false, false")
    },
    "warpgroup_sum": Intent(256, products="64x64x16", copies=True),
    "pull": Intent(256, blocks=2),
    "find_coefficients": Intent(256, blocks=2),
    "finish_moments": Intent(32, blocks=2),
    "merge_gradient": Intent(256, blocks=2),
    "expand_level": Intent(128, blocks=2),
    "find_step_levels": Intent(128, blocks=2),
    "reference_gradient": Intent(128, blocks=2, products=".TF32", copies=True),
    **{f"ode_step_kernel<{arguments}>": intent for arguments, intent in _BY_ROW.items()},
    **{f"normalised_field_kernel<{arguments}>": intent for arguments, intent in _BY_ROW.items()},
}


# ---- the extension and its tools ---------------------------------------------------------------


def extension() -> Path | None:
    """The file of the installed extension."""
    found = importlib.util.find_spec("pfgm._native")
    return None if found is None or found.origin is None else Path(found.origin)


def architectures() -> list[str]:
    """The architectures that the extension has machine code for, as in "90a"."""
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
        found = _DECLARED.findall(code)
        if len(found) != code.count("__global__"):
            raise ValueError(f"{path}: not every kernel's name can be read.")
        names.update(found)
    return names


# ---- reading -----------------------------------------------------------------------------------


def short_name(symbol: str) -> str:
    """The readable form of a mangled name, such as ``distances<uint8, 64, true>``.

    Knows only the rules that the kernels need. c++filt is not installed everywhere.
    """
    name, rest = _last_name(re.sub("^_ZN?", "", symbol))
    if not rest.startswith("I"):
        return name
    rest, arguments = rest[1:], []
    while not rest.startswith("E"):
        argument, rest = _argument(rest)
        arguments.append(argument)
    return f"{name}<{', '.join(arguments)}>"


def _last_name(text: str) -> tuple[str, str]:
    """The last of nested names, each written behind its length, and the rest of the text."""
    name = ""
    while found := re.match(r"(?:S[0-9A-Z]*_)?(\d+)", text):
        end = found.end() + int(found[1])
        name, text = text[found.end() : end], text[end:]
    if not name:
        raise ValueError(f"no mangled name: {text!r}")
    return name, text


def _argument(text: str) -> tuple[str, str]:
    if literal := re.match(r"L([a-z])(\d+)E", text):
        value = {"0": "false", "1": "true"}[literal[2]] if literal[1] == "b" else literal[2]
        return value, text[literal.end() :]
    if text.startswith("N"):
        name, rest = _last_name(text[1:])
        return name, rest.removeprefix("E")
    if text[:1] in _TYPES:
        return _TYPES[text[0]], text[1:]
    raise ValueError(f"unknown template argument: {text!r}")


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
    """Every kernel of this architecture in a dump, which for sm_90 also contains sm_90a."""
    rows = []
    for part in text.split("\nFatbin elf code:\n"):
        if f"arch = sm_{architecture}\n" in part[:200]:
            rows += _rows_of_part(part, architecture)
    return rows


def _rows_of_part(part: str, architecture: str) -> list[Row]:
    usages = dict(_USAGE.findall(part))
    codes = _after(part, "\tFunction : ")
    about = _after(part, "\n.nv.info.")
    rows = []
    for symbol, usage in usages.items():
        threads = _bound(about.get(symbol, ""))
        figures = _figures(usage, codes.get(symbol, ""), threads, architecture)
        kernel = short_name(symbol)
        rows.append(Row(architecture, kernel, figures, problems(kernel, architecture, figures)))
    return rows


def _after(part: str, heading: str) -> dict[str, str]:
    """Symbol in a heading → the text below it."""
    pieces = (piece.partition("\n") for piece in part.split(heading)[1:])
    return {symbol: rest for symbol, _, rest in pieces}


def _bound(information: str) -> int | None:
    found = _THREADS.search(information)
    if found is None:
        return None
    x, y, z = (int(n, 16) for n in found.groups())
    return x * y * z


def _figures(usage: str, code: str, threads: int | None, architecture: str) -> Figures:
    registers, spills, shared = read_usage(usage, capability(architecture))
    counts = Counter(instructions(code))

    def count(kind: re.Pattern[str]) -> int:
        return sum(n for instruction, n in counts.items() if kind.match(instruction))

    return Figures(
        registers=registers,
        spills=spills,
        shared=shared,
        threads=threads,
        instructions=counts.total() - counts["NOP"],
        matrix_instructions={name: n for name, n in counts.items() if is_matrix_instruction(name)},
        copies=count(_COPY),
        wide_loads=count(_WIDE_LOAD),
        wide_stores=count(_WIDE_STORE),
        flushing=count(_FLUSHING),
        unchanging_loads=count(_UNCHANGING_LOAD),
        waits=waits(code),
        waits_first=waits_first(code),
    )


def capability(architecture: str) -> int:
    """The number of an architecture: 90 of "90a"."""
    return int(architecture.rstrip("af"))


def compiler_version(file: Path) -> str | None:
    """The version of the CUDA toolkit that made the machine code, as written in it."""
    found = re.findall(rb"Cuda compilation tools, release [\d.]+, V([\d.]+)", file.read_bytes())
    return ", ".join(sorted({version.decode() for version in found})) or None


# ---- checking ----------------------------------------------------------------------------------


def intent_of(kernel: str) -> Intent | None:
    """What a kernel should compile to."""
    return INTENTS.get(kernel) or INTENTS.get(stem(kernel))


def stem(kernel: str) -> str:
    """The name without template arguments."""
    return kernel.split("<")[0]


def register_limit(intent: Intent) -> int:
    """The most registers per thread with which the intended blocks fit, a multiple of 8."""
    return min(_REGISTERS // (intent.threads * intent.blocks) // 8 * 8, _MOST_REGISTERS)


def is_replaced(kernel: str, architecture: str) -> bool:
    """Whether another kernel takes its place.

    Warpgroups have tiles of 128 × 128 on sm_90a. GeForce cards have kernels of their own, and run
    the code for sm_80 or sm_120. Other cards run the code for sm_80 too.
    """
    if stem(kernel).startswith("warpgroup"):
        return architecture != "90a"
    if stem(kernel) != "distances":
        return False
    type_, queries, _, geforce, *_ = _arguments(kernel)
    newest = int(architecture.rstrip("af"))
    if newest >= 120:
        return geforce == "false"
    if newest < 90:
        return False
    of_warpgroups = type_ in ("float32", "Rounded") and queries == "128"
    return geforce == "true" or (architecture == "90a" and of_warpgroups)


def _arguments(kernel: str) -> list[str]:
    """The template arguments of a name."""
    return kernel.partition("<")[2].rstrip(">").split(", ")


def problems(kernel: str, architecture: str, figures: Figures) -> list[str]:
    """What is wrong with a kernel, in sentences."""
    where, intent = f"{kernel} on sm_{architecture}", intent_of(kernel)
    if intent is None:
        return [f"{where} is not listed in INTENTS of codegen/cuda.py; it is not checked."]
    found = [f"{where} {what}." for what in _waits(capability(architecture), figures)]
    if is_replaced(kernel, architecture):
        if figures.matrix_instructions:
            found.append(f"{where} is not meant to multiply: it is never launched.")
        return found
    found += [f"{where} {what}." for what in _resources(intent, figures)]
    return found + [f"{where} {what}." for what in _instructions(intent, figures)]


def _waits(capability: int, figures: Figures) -> Iterable[str]:
    if capability < 90:
        if figures.waits:
            yield "waits for earlier launches, which its devices cannot"
        return
    if not figures.waits_first:
        yield (
            "does not wait for earlier launches before it accesses global memory, jumps or ends: "
            "its first statement must be wait_for_earlier_launches()"
        )
    if figures.unchanging_loads:
        yield (
            f"loads global memory as unchanging {figures.unchanging_loads} times, but the launch "
            "before may still write it: leave __restrict__ away from what it reads"
        )


def _resources(intent: Intent, figures: Figures) -> Iterable[str]:
    if figures.spills:
        yield f"spills {figures.spills} bytes per thread"
    if figures.threads is None:
        yield f"has no launch bounds; it is launched with blocks of {intent.threads} threads"
    elif figures.threads != intent.threads:
        yield (
            f"is compiled for blocks of up to {figures.threads} threads, "
            f"and launched with up to {intent.threads}"
        )
    if figures.registers > register_limit(intent):
        yield (
            f"uses {figures.registers} registers per thread; "
            f"{intent.blocks} × {intent.threads} threads allow {register_limit(intent)}"
        )


def _instructions(intent: Intent, figures: Figures) -> Iterable[str]:
    matrix = figures.matrix_instructions
    seen = ", ".join(matrix) or "no matrix instructions"
    if figures.instructions <= _EMPTY + 2 * figures.waits:
        yield "is empty"
    if intent.products and not (matrix and all(intent.products in name for name in matrix)):
        yield f"is meant to have matrix instructions with {intent.products}; it has {seen}"
    if matrix and not intent.products:
        yield f"is not meant to multiply in matrix units; it has {seen}"
    if intent.copies and not figures.copies:
        yield "has no asynchronous copies of 16 bytes"
    if intent.wide and not figures.wide_loads:
        yield "has no 16-byte loads from global memory"
    if intent.wide and not figures.wide_stores:
        yield "has no 16-byte stores to global memory"
    if figures.flushing:
        yield (
            f"flushes subnormal numbers to zero in {figures.flushing} instructions: "
            "compile it without --use_fast_math and --ftz=true"
        )


def missing(rows: list[Row], expected: Iterable[str]) -> list[str]:
    """Which kernels of csrc/cuda/ the extension lacks on an architecture, in sentences."""
    there = {(row.architecture, stem(row.kernel)) for row in rows}
    return [
        f"{name} is not in the extension for sm_{architecture}."
        for architecture in expected
        for name in sorted(declared())
        if (architecture, name) not in there
    ]


def unwanted_options(text: str) -> list[str]:
    """Options of the assembler in a dump that make slow code."""
    return sorted({word for line in _OPTIONS.findall(text) for word in _UNWANTED.findall(line)})


class Check(NamedTuple):
    """All kernels of an extension, and what is wrong with them."""

    rows: list[Row]
    problems: list[str]


def check(file: Path, expected: list[str]) -> Check:
    """Reads and checks an extension for the expected architectures."""
    with ThreadPoolExecutor(PROCESSES) as pool:
        parts = list(pool.map(lambda architecture: _check(file, architecture), expected))
    rows = [row for part in parts for row in part.rows]
    found = [problem for part in parts for problem in part.problems]
    return Check(rows, missing(rows, expected) + found)


def _check(file: Path, architecture: str) -> Check:
    text = dump(file, architecture)
    rows = read(text, architecture)
    found = [problem for row in rows for problem in row.problems]
    found += [f"sm_{architecture} is assembled with {o}." for o in unwanted_options(text)]
    return Check(rows, found)


# ---- the command -------------------------------------------------------------------------------


def report(rows: list[Row]) -> str:
    """One line per kernel and architecture."""
    header = ["kernel", "architecture", "registers", "limit", "spills", "shared"]
    header += ["matrix instructions", "16-byte copies", "loads", "stores"]
    return table(header, [_cells(row) for row in rows])


def _cells(row: Row) -> list[str]:
    figures, intent = row.figures, intent_of(row.kernel)
    matrix = ", ".join(f"{count} {name}" for name, count in figures.matrix_instructions.items())
    limit = register_limit(intent) if intent else ""
    counts = [figures.registers, limit, figures.spills, figures.shared, matrix, figures.copies]
    counts += [figures.wide_loads, figures.wide_stores]
    return [row.kernel, f"sm_{row.architecture}", *map(str, counts)]


def stored(rows: list[Row]) -> list[summary.Summary]:
    """What is stored: one row for all instances of a kernel's template on an architecture."""
    variants = [
        summary.Variant(stem(row.kernel), f"sm_{row.architecture}", asdict(row.figures))
        for row in rows
    ]
    counts = {
        "copies": "16-byte copies",
        "wide_loads": "16-byte loads",
        "wide_stores": "16-byte stores",
    }
    return summary.summarise(variants, counts)


def main() -> int:
    parser = new_parser(__doc__)
    parser.add_argument("--only", default="", metavar="SUBSTRING", help="print such kernels only")
    parser.add_argument("--store", action="store_true", help="write results/codegen_cuda.json")
    options = parser.parse_args()
    file, reason = extension(), why_unchecked()
    if file is None or reason is not None:
        parser.error(reason or "")
    rows, found = check(file, architectures())
    print(report([row for row in rows if options.only in row.kernel]))
    if options.store:
        store("codegen_cuda", {"nvcc": compiler_version(file), "rows": stored(rows)})
    print("\n".join(found), file=sys.stderr)
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
