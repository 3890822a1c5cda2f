"""The installed machine code of the CUDA kernels of csrc/ is as intended."""

import dataclasses
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.codegen import cuda as codegen_cuda
from benchmarks.codegen.rows import Figures, Row, report

REASON = codegen_cuda.why_unchecked()
shipped = pytest.mark.skipif(REASON is not None, reason=str(REASON))
ARCHITECTURES = codegen_cuda.architectures() or ["without CUDA"]
STEMS = sorted(codegen_cuda.declared())


@pytest.fixture(scope="session")
def check():
    return codegen_cuda.check(codegen_cuda.extension(), codegen_cuda.architectures())


@shipped
@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("stem", STEMS)
def test_every_kernel(check, stem, architecture):
    rows = [
        row
        for row in check[0]
        if (codegen_cuda.stem(row.kernel), row.architecture) == (stem, architecture)
    ]
    assert rows, f"{stem} is not in the extension for sm_{architecture}."
    problems = [problem for row in rows for problem in row.problems]
    assert not problems, "\n" + "\n".join(problems)


@shipped
def test_the_extension_as_a_whole(check):
    _, problems = check
    assert not problems, "\n" + "\n".join(problems)


@shipped
def test_architectures_have_the_same_kernels(check):
    kernels = {
        architecture: {row.kernel for row in check[0] if row.architecture == architecture}
        for architecture in ARCHITECTURES
    }
    assert all(kernels[architecture] == kernels[ARCHITECTURES[0]] for architecture in kernels)


def test_every_kernel_has_an_intent():
    for stem in STEMS:
        assert codegen_cuda.intent_of(stem) or codegen_cuda.intent_of(f"{stem}<4, true>"), stem


# ---- the extension ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("built", "expected"),
    [
        ("80-real 90-real 100-real 120", ["80", "90", "100", "120"]),
        ("80-virtual 90", ["90"]),
        ("the host", []),
        (None, []),
    ],
)
def test_architectures(monkeypatch, built, expected):
    class Built:
        @staticmethod
        def build_info():
            return {"cuda_architectures": built}

    monkeypatch.setattr(codegen_cuda, "extension", lambda: "_native.so")
    monkeypatch.setattr(codegen_cuda.importlib, "import_module", lambda name: Built)
    assert codegen_cuda.architectures() == expected


@pytest.mark.parametrize(
    ("capabilities", "expected"),
    [
        ("", "80"),
        ("No devices were found", "80"),
        ("7.5", "80"),
        ("8.0", "80"),
        ("9.0\n9.0", "80;90-real"),
        ("8.6\n12.0", "80;86-real;120-real"),
        ("8.7", "80;87-real"),  # Orin
        ("13.0\n8.0", "80"),
    ],
)
def test_the_build_is_for_the_gpus_of_the_machine(tmp_path, capabilities, expected):
    known = "\n".join(f"compute_{n}" for n in (75, 80, 86, 87, 90, 100, 120))
    script = tmp_path / "choose.cmake"
    script.write_text(
        f"include({codegen_cuda.CSRC.parent / 'architectures.cmake'})\n"
        f'pfgm_architectures(result "{capabilities}" "{known}")\nmessage("${{result}}")\n'
    )
    cmake = Path(sys.executable).parent / "cmake"
    done = subprocess.run([cmake, "-P", script], capture_output=True, text=True, check=True)
    assert done.stderr.strip() == expected


def test_unchecked_kernels_are_reported_with_the_remedy(monkeypatch):
    monkeypatch.setattr(codegen_cuda, "architectures", list)
    assert "NOT CHECKED" in codegen_cuda.why_unchecked()
    assert "nvcc" in codegen_cuda.why_unchecked()
    monkeypatch.setattr(codegen_cuda, "architectures", lambda: ["80"])
    monkeypatch.setattr(codegen_cuda, "cuobjdump", lambda: None)
    assert "cuobjdump was not found" in codegen_cuda.why_unchecked()
    with pytest.raises(RuntimeError, match="cuobjdump was not found"):
        codegen_cuda.dump("_native.so", "80")


def test_declared_kernels_are_found(monkeypatch, tmp_path):
    (tmp_path / "some_cuda.h").write_text(
        "// __global__ in a comment\n"
        "template <class R>\n__global__ void __launch_bounds__(threads(R, true), 2)\n"
        "    first(int n) {}\n__global__ void second(int n) {}\n"
    )
    monkeypatch.setattr(codegen_cuda, "CSRC", tmp_path)
    assert codegen_cuda.declared() == {"first", "second"}
    (tmp_path / "other_cuda.cu").write_text("__global__ auto third(int n) -> void {}\n")
    with pytest.raises(ValueError, match=r"other_cuda\.cu"):
        codegen_cuda.declared()


# ---- reading -----------------------------------------------------------------------------------

INSIDE = "_ZN4pfgm55_GLOBAL__N__b92e854f_22_posterior_mean_cuda_cu_e5a43346"


@pytest.mark.parametrize(
    ("symbol", "name"),
    [
        (f"{INSIDE}5mergeEPfPKfS3_iib", "merge"),
        (f"{INSIDE}9distancesIhLi64ELb1EEEvNS0_4RowsIfEENS2_IT_EEiNS0_5PairsE", None),
        (
            f"{INSIDE}9distancesINS0_8BFloat16ELi64ELi9ELb0EEEvi",
            "distances<BFloat16, 64, 9, false>",
        ),
        (f"{INSIDE}12weighted_sumIfEEvNS0_4RowsIT_EE", "weighted_sum<float>"),
        (
            f"{INSIDE}9distancesINS0_12WarpProductsINS0_7Float16ELi32ELi64EEELNS0_6TargetE2EEEvi",
            "distances<WarpProducts<Float16, 32, 64>, 2>",
        ),
        (
            f"{INSIDE}12weighted_sumIhLb1EEEvi",
            "weighted_sum<unsigned char, true>",
        ),
        ("_Z4loneILb0EEvi", "lone<false>"),
        ("_Z5plainPf", "plain"),
    ],
)
def test_names(symbol, name):
    assert codegen_cuda.short_name(symbol) == (name or "distances<unsigned char, 64, true>")


@pytest.mark.parametrize("symbol", ["merge", "_ZN4pfgm6factorE"])
def test_names_that_cannot_be_read(symbol):
    with pytest.raises(ValueError, match="no name of a kernel"):
        codegen_cuda.short_name(symbol)


def part(symbol, *, architecture="90", usage="", threads="0x80", code=()):
    """Text that cuobjdump prints for a file with one kernel."""
    lines = "\n".join(
        f"        /*{16 * i:04x}*/                   {line} ;          /* 0x0000000000007919 */\n"
        "                                                        /* 0x000e220000002100 */"
        for i, line in enumerate(code)
    )
    bound = (
        f"\tAttribute:\tEIATTR_MAX_THREADS\n\tFormat:\tEIFMT_SVAL\n\tValue:\t{threads} 0x1 0x1 \n"
        if threads
        else ""
    )
    return f"""
Fatbin elf code:
================
arch = sm_{architecture}
code version = [1,8]

   8   2a60    144  0  4                    CUDA_INFO       40    3       17 .nv.info.{symbol}

.nv.info.{symbol}
\t<0x13>
{bound}\t<0x14>
\tAttribute:\tEIATTR_CRS_STACK_SIZE

Resource usage:
 Common:
  GLOBAL:0
 Function {symbol}:
  REG:124 STACK:0 SHARED:1024 LOCAL:0 CONSTANT[0]:1000 TEXTURE:0 {usage}

\tcode for sm_{architecture}
\t\tFunction : {symbol}
\t.headerflags\t@"EF_CUDA_SM90"
{lines}
\t\t..........
"""


SUM = f"{INSIDE}12weighted_sumIfEEvNS0_4RowsIT_EE"
TILES = f"{INSIDE}9distancesINS0_12WarpProductsIhLi64ELi64EEELNS0_6TargetE0EEEvi"
STEP = "_ZN4pfgm49_GLOBAL__N__5e7a4c86_16_ode_step_cuda_cu_b1f21c9115ode_step_kernelILi4ELb1EEEvi"
NARROW = STEP.replace("ILi4ELb1EE", "ILi1ELb1EE")
MULTIPLY = "HMMA.1688.F32.TF32 R4, R8, R12, R4"
HALVES = "HMMA.16816.F32 R4, R8, R12, R4"
COPY = "@!P1 LDGSTS.E.BYPASS.128.ZFILL [R3], desc[UR16][R126.64], P0"
REST = ["MOV R1, c[0x0][0x28]", "FADD R2, R2, R3", "STG.E [R2], R3", "S2R R3, SR_TID.X"]
REST += ["EXIT", "BRA 0x20", "NOP", "NOP"]
WIDE = ["@P0 LDG.E.128 R4, desc[UR16][R126.64]", "STG.E.128 desc[UR16][R126.64], R4"]


def only(text, architecture="90"):
    (row,) = codegen_cuda.read(text, architecture)
    return row


def test_the_dump_is_read():
    code = [*WIDE, COPY, MULTIPLY, MULTIPLY, "LDGSTS.E [R3], [R2]", *REST]
    code += ["@!UP0 FADD.FTZ R1, R1, R2", "F2I.FTZ.U32.TRUNC.NTZ R3, R2", "@!PT LDS RZ, [RZ]"]
    text = part(TILES, code=code, threads="0x100", usage="SHARED:1536")
    row = only(text)
    assert (row.kernel, row.architecture) == (
        "distances<WarpProducts<unsigned char, 64, 64>, 0>", "90",
    )  # fmt: skip
    counts = row.figures.counts
    assert row.figures == Figures(124, 0, 512, counts, threads=256)
    assert counts.total() == len(code)
    assert row.figures.matrix_instructions == {"HMMA.1688.F32.TF32": 2}
    assert counts["LDG.E.128"] == counts["STG.E.128"] == counts["FADD.FTZ"] == 1
    assert (row.figures.count("LDGSTS"), counts["LDGSTS.E"]) == (2, 1)


def test_files_for_several_architectures_are_told_apart():
    text = part(SUM) + part(STEP) + part(TILES, architecture="80")
    assert [row.kernel for row in codegen_cuda.read(text, "90")] == [
        "weighted_sum<float>",
        "ode_step_kernel<4, true>",
    ]
    assert [row.kernel for row in codegen_cuda.read(text, "80")] == [
        "distances<WarpProducts<unsigned char, 64, 64>, 0>"
    ]
    assert codegen_cuda.read(text, "100") == []


# ---- judging -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("architecture", "text"),
    [
        ("90", part(SUM, code=[COPY, MULTIPLY, *REST])),
        ("90", part(TILES, code=[COPY, HALVES, *REST], threads="0x100")),
        ("90", part(STEP, code=[*WIDE, *REST], threads="0x400", usage="REG:64")),
        ("90", part(NARROW, code=REST, threads="0x300", usage="REG:80")),
        ("80", part(TILES, architecture="80", code=[COPY, HALVES, *REST], threads="0x100")),
    ],
)
def test_kernels_as_intended_pass(architecture, text):
    assert only(text, architecture).problems == []


@pytest.mark.parametrize(
    ("words", "symbol", "options"),
    [
        ("spills 16 bytes", SUM, {"usage": "STACK:16"}),
        ("spills 8 bytes", SUM, {"usage": "LOCAL:8"}),
        ("no asynchronous copies of 16", SUM, {"code": [MULTIPLY, *REST]}),
        ("no asynchronous copies of 16", SUM, {"code": [MULTIPLY, "LDGSTS.E [R3], [R2]", *REST]}),
        ("it has no matrix instructions", SUM, {"code": [COPY, *REST]}),
        ("it has HMMA.16816.F32", SUM, {"code": [COPY, "HMMA.16816.F32 R4, R8, R1, R4", *REST]}),
        ("not meant to multiply", NARROW, {"code": [MULTIPLY, *REST]}),
        ("instructions with 16816; it has HMMA.1688", TILES, {"code": [COPY, MULTIPLY, *REST]}),
        ("no 16-byte loads", STEP, {"code": [WIDE[1], *REST]}),
        ("no 16-byte stores", STEP, {"code": [WIDE[0], *REST]}),
        ("no 16-byte loads", STEP, {"code": ["LDG.E.64 R4, [R2]", WIDE[1], *REST]}),
        ("is empty", NARROW, {"code": REST[4:]}),
        ("no launch bounds", SUM, {"threads": None}),
        ("1 × 1024 threads allow 64", STEP, {"usage": "REG:65"}),
        ("without --use_fast_math", NARROW, {"code": ["FFMA.FTZ R1, R2, R3, R4", *REST]}),
    ],
)
def test_flaws_are_found(words, symbol, options):
    good = {
        SUM: {"code": [COPY, MULTIPLY, *REST]},
        TILES: {"code": [COPY, HALVES, *REST], "threads": "0x100"},
        STEP: {"code": [*WIDE, *REST], "threads": "0x400", "usage": "REG:60"},
        NARROW: {"code": REST, "threads": "0x300", "usage": "REG:60"},
    }
    row = only(part(symbol, **{**good[symbol], **options}))
    (problem,) = row.problems
    assert words in problem
    assert problem.startswith(f"{row.kernel} on sm_90")


def test_an_unlisted_kernel_is_a_problem():
    (problem,) = only(part(SUM.replace("12weighted_sum", "8new_name"), code=REST)).problems
    assert problem == (
        "new_name<float> on sm_90 is not listed in INTENTS of codegen/cuda.py; it is not checked."
    )


def test_missing_kernels_and_architectures_are_found(monkeypatch):
    monkeypatch.setattr(codegen_cuda, "declared", lambda: {"weighted_sum", "merge"})
    rows = codegen_cuda.read(part(SUM), "90")
    assert codegen_cuda.missing(rows, ["90", "80"]) == [
        "merge is not in the extension for sm_90.",
        "merge is not in the extension for sm_80.",
        "weighted_sum is not in the extension for sm_80.",
    ]


@pytest.mark.parametrize(
    ("threads", "blocks", "limit"),
    [(1024, 1, 64), (768, 1, 80), (512, 1, 128), (256, 2, 128), (128, 2, 255)],
)
def test_registers_have_a_limit(threads, blocks, limit):
    assert codegen_cuda.register_limit(threads, blocks) == limit


def test_the_report_has_a_line_for_each_kernel():
    row = only(part(SUM, code=[COPY, MULTIPLY, *REST]))
    unknown = row._replace(kernel="new_name", figures=dataclasses.replace(row.figures, shared=7))
    lost = Row("lost", "90", None, ["lost does not compile."])
    assert report([row, unknown, lost]).splitlines()[2:] == [
        "| weighted_sum<float> | sm_90 | 124 | 0 | 0 | 1 HMMA.1688.F32.TF32 |",
        "| new_name | sm_90 | 124 | 0 | 7 | 1 HMMA.1688.F32.TF32 |",
        "| lost | sm_90 |  |  |  |  |",
    ]
