"""The Triton kernels compile without spills, and with tensor cores and 16-byte loads where
intended."""

from __future__ import annotations

import functools
import importlib.util
import itertools
import json
import os
import struct
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.codegen import cuobjdump, disassembly
from benchmarks.codegen import triton as codegen

ROOT = Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="the package triton is not installed"
)

FLAWED = """
import triton
import triton.language as tl

from pfgm.kernels.variant import Variant


@triton.jit
def normalise(x, out, SIZE: tl.constexpr):
    place = tl.arange(0, SIZE)
    rows = tl.load(x + place[:, None] * SIZE + place)
    tl.store(out + place[:, None] * SIZE + place, rows / tl.sum(rows * rows))


@triton.jit
def product(x, out, SIZE: tl.constexpr):
    place = tl.arange(0, SIZE)
    rows = tl.load(x + place[:, None] * SIZE + place)
    product = tl.dot(rows, rows, input_precision="ieee")
    tl.store(out + place[:, None] * SIZE + place, product)


def variant(name, kernel, size, aligned=True, result="out", **options):
    types = {"x": "*fp32", result: "*fp32"}
    divisible = frozenset(types) if aligned else frozenset()
    return Variant(name, kernel, types, {"SIZE": size}, divisible, **options)


def variants():
    return [
        variant("good", normalise, 32),
        variant("spilling", normalise, 128, num_warps=1),
        variant("narrow", normalise, 32, aligned=False),
        variant("narrow as intended", normalise, 32, aligned=False, wide_loads=False),
        variant("without products", product, 32, products=True),
        variant("misspelled", normalise, 32, result="outt"),
    ]
"""


def compiled(*options, folder=None):
    """Module, capability → rows, from a process without the interpreter."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    if folder is not None:
        before = environment.get("PYTHONPATH")
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, [str(folder), before]))
    # In one process, because other tests run beside it and each imports torch and Triton.
    command = [sys.executable, "-m", "benchmarks.codegen.triton", "--json", "--processes", "1"]
    command += options
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode in (0, 1), done.stderr
    assert done.stdout, done.stderr
    rows = {}
    for row in json.loads(done.stdout):
        rows.setdefault((row["module"], row["capability"]), []).append(row)
    assert (done.returncode == 1) == any(r["problems"] for part in rows.values() for r in part)
    return rows


@functools.cache
def rows_for(capability):
    return compiled("--capability", str(capability))


# Each takes a minute to compile if Triton has not kept it.
OTHERS = [
    pytest.param(capability, marks=pytest.mark.slow)
    for capability in codegen.CAPABILITIES
    if capability != 90
]


@pytest.mark.parametrize("capability", [90, *OTHERS])
@pytest.mark.parametrize("module", codegen.MODULES)
def test_every_variant(module, capability):
    rows = rows_for(capability)[module, capability]
    problems = [problem for row in rows for problem in row["problems"]]
    assert not problems, "\n" + "\n".join(problems)


def test_every_module_is_listed():
    with_variants = {
        f"pfgm.kernels.{path.stem}"
        for path in (ROOT / "kernels").glob("*.py")
        if "\ndef variants(" in path.read_text()
    }
    assert with_variants == set(codegen.MODULES)


@pytest.fixture(scope="module")
def flawed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("flawed")
    (folder / "flawed_kernels.py").write_text(FLAWED)
    rows = compiled("--modules", "flawed_kernels", "--capability", "90", folder=folder)
    return {row["kernel"]: row for row in rows["flawed_kernels", 90]}


def test_sizes_of_one_are_compiled_too():
    for module in codegen.MODULES:
        names = {row["kernel"] for row in rows_for(90)[module, 90]}
        kernels = {name.split(",")[0] for name in names}
        smallest = {name for name in names if "sizes of 1" in name}
        assert smallest == {f"{kernel}, sizes of 1" for kernel in kernels}


@pytest.mark.parametrize("kernel", ["good", "narrow as intended"])
def test_kernels_as_intended_pass(flawed, kernel):
    assert flawed[kernel]["problems"] == []
    assert flawed[kernel]["figures"]["spills"] == 0
    assert 0 < flawed[kernel]["figures"]["registers"] <= 255


@pytest.mark.parametrize(
    ("kernel", "words"),
    [
        ("spilling", "spills"),
        ("narrow", "no 16-byte loads"),
        ("without products", "no matrix instructions"),
        ("misspelled", "does not compile"),
    ],
)
def test_flaws_are_found(flawed, kernel, words):
    (problem,) = flawed[kernel]["problems"]
    assert words in problem
    assert problem.startswith(f"{kernel} on sm_90")


@pytest.mark.parametrize(
    ("capability", "limit"),
    [(80, 166912), (90, 232448), (100, 232448), (120, 101376)],
)
def test_shared_memory_has_a_limit(capability, limit):
    figures = codegen.Figures(64, 0, limit, {}, 1)
    variant = _variant()
    assert codegen.problems(variant, capability, figures) == []
    (problem,) = codegen.problems(variant, capability, codegen.Figures(64, 0, limit + 1, {}, 1))
    assert f"a block has {limit}" in problem


def test_older_matrix_instructions_are_a_problem_on_hopper():
    figures = codegen.Figures(64, 0, 0, {"HMMA": 8}, 1)
    variant = _variant(products=True)
    assert codegen.problems(variant, 80, figures) == []
    assert "it has HMMA" in codegen.problems(variant, 90, figures)[0]


def _variant(**options):
    from pfgm.kernels.variant import Variant

    return Variant("some kernel", None, {}, {}, **options)


DUMP = """
 Function prod:
  REG:130 STACK:16 SHARED:1088 LOCAL:8 CONSTANT[0]:576 TEXTURE:0 SURFACE:0 SAMPLER:0
        /*0250*/                   LDGSTS.E.BYPASS.128 [R3], desc[UR16][R126.64], P0 ;  /* 0x7 */
        /*0260*/              @!P1 LDG.E.128.CONSTANT R4, desc[UR16][R126.64] ;         /* 0x7 */
        /*0270*/              @P2  LDG.E.64 R4, desc[UR16][R126.64] ;                   /* 0x7 */
        /*0280*/              @UP0 UBLKCP.S.G [UR8], [UR4], UR6 ;                       /* 0x7 */
        /*0290*/                   STG.E.128 desc[UR16][R126.64], R4 ;                  /* 0x7 */
        /*02a0*/                   HGMMA.64x64x8.F32.TF32 R24, gdesc[UR8], R24 ;        /* 0x7 */
        /*02b0*/                   HGMMA.64x64x8.F32.TF32 R24, gdesc[UR8], R24 ;        /* 0x7 */
        /*02c0*/                   HFMA2.MMA R1, -RZ, RZ, 0, 0 ;                        /* 0x7 */
        /*02d0*/                   UTCHMMA gdesc[UR8], gdesc[UR10], tmem[UR12] ;        /* 0x7 */
"""


def test_the_dump_is_read():
    figures = codegen.read_figures(DUMP, 4096, 90)
    assert figures == codegen.Figures(130, 24, 4160, {"HGMMA": 2, "UTCHMMA": 1}, 3)


# ---- machine code -------------------------------------------------------------------------------

NOP = bytes.fromhex("18790000000000000000000000c00f00")
EXIT = bytes.fromhex("4d790000000000000000800300ea0f00")


def elf(*kernels):
    """An ELF file with these sections of machine code, after one of data."""
    names = [b".nv.info", *(b".text.kernel%d" % i for i in range(len(kernels))), b".shstrtab"]
    contents = [b"data", *kernels, b"\0".join([b"", *names, b""])]
    *places, table = itertools.accumulate(map(len, contents), initial=64)
    file = b"\x7fELF".ljust(40, b"\0") + struct.pack("<Q", table)
    file = file.ljust(58, b"\0") + struct.pack("<3H", 64, len(names), len(names) - 1)
    file += b"".join(contents)
    for name, place, content in zip(names, places, contents, strict=True):
        at = contents[-1].index(name)
        file += struct.pack("<2I4Q2I2Q", at, 1, 0, 0, place, len(content), 0, 0, 1, 0)
    return file


def test_machine_code_is_found_in_a_cubin():
    assert disassembly.machine_code(elf(EXIT + NOP)) == EXIT + NOP
    for kernels in ((), (EXIT, NOP)):
        with pytest.raises(ValueError, match=f"holds {len(kernels)} kernels"):
            disassembly.machine_code(elf(*kernels))


@pytest.mark.parametrize("architecture", ["80", "90a", "100a", "120"])
def test_kernels_are_disassembled_together(architecture):
    texts = disassembly.disassemble([NOP + EXIT, NOP, EXIT + NOP + NOP], architecture)
    assert [cuobjdump.instructions(text) for text in texts] == [
        ["NOP", "EXIT"],
        ["NOP"],
        ["EXIT", "NOP", "NOP"],
    ]
    assert disassembly.disassemble([], architecture) == []


def test_missing_instructions_are_noticed(monkeypatch):
    shown = subprocess.CompletedProcess([], 0, "        /*0000*/    NOP ;\n")
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: shown)
    with pytest.raises(RuntimeError, match="prints 1 instructions of 2"):
        disassembly.disassemble([NOP + NOP], "90a")


def test_the_interpreter_is_refused(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with pytest.raises(RuntimeError, match="unset it"):
        codegen.compile_variant(_variant(), 90)
