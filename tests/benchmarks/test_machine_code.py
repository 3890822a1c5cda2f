"""benchmarks/machine_code: reading machine code, and the predictions."""

from __future__ import annotations

import doctest
import importlib.util
import itertools
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks.codegen import cuda as codegen_cuda
from benchmarks.common import cuda_shim
from benchmarks.common.subjects import Case
from benchmarks.gpu import measure as gpu_measure
from benchmarks.gpu import report as gpu_report
from benchmarks.machine_code import __main__ as command_line
from benchmarks.machine_code import (
    banks,
    branches,
    data,
    devices,
    host,
    kernels,
    launches,
    model,
    page,
    pipeline,
    results,
    sass,
    sections,
    work,
)

ROOT = Path(__file__).resolve().parents[2]

# ---- machine code ------------------------------------------------------------------------------


def control(stall=1, write=7, read=7, wait=()):
    """The second word of an instruction with that control word."""
    mask = sum(1 << k for k in wait)
    return (mask << 11 | read << 8 | write << 5 | stall) << 41


def dump(*lines, name="kernel"):
    """Text as cuobjdump prints it. A line is its text, or text and control word."""
    shown = [f"\t\tFunction : {name}\n\t.headerflags\t@EF_CUDA_SM90\n"]
    for i, line in enumerate(lines):
        text, high = line if isinstance(line, tuple) else (line, control())
        shown.append(f"        /*{16 * i:04x}*/   {text} ;   /* 0x0000000000007919 */\n")
        shown.append(f"                           /* 0x{high:016x} */\n")
    return "".join(shown)


def code_of(*lines):
    return sass.functions(dump(*lines))["kernel"]


def kernel_of(*lines, threads=128, registers=32, shared=0):
    code = code_of(*lines)
    return kernels.Compiled(
        "some", code, sass.loops(code), threads, registers, shared, conflicts=None
    )


def test_doctests():
    for module in (sass, banks):
        assert doctest.testmod(module).failed == 0


def test_instructions_and_control_words():
    (load, add) = code_of(
        ("@!P0 LDG.E.128.CONSTANT R4, desc[UR4][R2.64+0x10]", control(2, 3, 1)),
        ("FADD R0, R4, R5", control(5, wait=(1, 3))),
    )
    assert load[:4] == (0, "@!P0", "LDG.E.128.CONSTANT", "R4, desc[UR4][R2.64+0x10]")
    assert load.control == (2, 3, 1, ())
    assert add.control == (5, 7, 7, (1, 3))
    assert sass.access_bytes(load) == 16
    assert sass.access_bytes(add) == 4


def test_words_of_the_assembler():
    """Two instructions of a kernel for sm_90. The first reads a thread's index and releases
    scoreboard 0. The second shifts the index: it waits for scoreboard 0, and the next instruction
    starts 4 clocks later."""
    assert sass.control_of(0x000E220000002100) == (1, 0, 7, ())
    assert sass.control_of(0x001FC80000011616) == (4, 7, 7, (0,))


NESTED = (
    "MOV R1, R2",  # 0x00
    "LDG.E R3, [R4]",  # 0x10: the outer loop
    "FFMA R1, R1, R2, R3",  # 0x20: the inner loop
    "FFMA R1, R1, R2, R3",  # 0x30
    "@P0 BRA 0x20",  # 0x40
    "@!P1 BRA 0xa0",  # 0x50: left by code behind the end
    "STG.E [R4], R1",  # 0x60
    "@P2 BRA 0x10",  # 0x70
    "EXIT",  # 0x80
    "MUFU.EX2 R1, R1",  # 0x90: never reached
    "DADD R4, R4, R6",  # 0xa0
    "BRA 0x60",  # 0xb0
    "BRA 0xc0",  # a trap
    "NOP",
)


def test_loops():
    code = code_of(*NESTED)
    assert code[-1].operands == "0x60"
    found = sass.loops(code)
    assert [loop.header for loop in found] == [1, 2]
    outer, inner = found
    assert outer.body == {1, 2, 3, 4, 5, 6, 7, 10, 11}
    assert inner.body == {2, 3, 4}
    assert outer.holds(inner)
    assert not inner.holds(inner)
    own = sass.own(outer, found)
    assert [code[i].base for i in own] == ["LDG", "BRA", "STG", "BRA", "DADD", "BRA"]


def test_divergent_pieces_do_not_make_loops():
    code = code_of(
        "MOV R1, R2",
        "BRA.DIV UR4, 0x50",  # another way for warps that are not together
        "SHFL.BFLY PT, R1, R1, 0x1, 0x1f",
        "@P0 BRA 0x10",
        "EXIT",
        "WARPSYNC.COLLECTIVE R1, 0x60",
        "BRA 0x20",
    )
    (loop,) = sass.loops(code)
    assert loop.body == {1, 2, 3}


def test_arms_of_a_branch():
    """What only one way leads to; ways end where they come back to the header."""
    code = code_of(
        "MOV R1, R2",
        "@P0 BRA 0x50",  # 0x10: the loop
        "FADD R1, R1, R2",
        "FADD R1, R1, R2",
        "BRA 0x60",
        "FMUL R1, R1, R2",  # 0x50
        "@P1 BRA 0x80",  # 0x60: leaves out one instruction
        "FFMA R1, R1, R2, R3",
        "@P2 BRA 0x10",  # 0x80
        "EXIT",
    )
    (loop,) = sass.loops(code)
    assert sass.arms(code, loop, 1) == [{5}, {2, 3, 4}]
    assert sass.arms(code, loop, 6) == [set(), {7}]
    assert sass.arms(code, loop, 8) == [set(), set()]
    assert sass.arms(code, loop, 2) == []


# ---- branches that parameters decide -------------------------------------------------------------

FIRST = branches.FIRST_PARAMETER[90]
LAW = (
    "ULDC.U8 UR4, c[0x0][0x210]",
    "ISETP.NE.AND P0, PT, RZ, UR4, PT",  # D is infinite
    "LDG.E R3, [R4]",  # 0x20: the loop
    "@!P0 BRA 0x60",
    "MUFU.EX2 R5, R3",
    "BRA 0x70",
    "FFMA R5, R3, R3, R3",  # 0x60
    "STG.E [R6], R5",  # 0x70
    "@P2 BRA 0x20",
    "EXIT",
)


def bases_of_the_loop(*lines):
    code = branches.decided(code_of(*lines), FIRST)
    kernel = kernel_of("EXIT")._replace(code=code, loops=sass.loops(code))
    (loop,) = kernel.loops
    return [one.base for one in kernel.body(loop) if one.base not in ("ISETP", "BRA")]


def test_code_for_other_parameters_is_left_out():
    assert bases_of_the_loop(*LAW) == ["LDG", "FFMA", "STG"]


@pytest.mark.parametrize(
    ("place", "line", "follows"),
    [
        (0, "ULDC.U8 UR4, c[0x0][0x211]", False),  # another byte
        (0, "LDCU.U8 UR4, c[0x0][0x210]", True),
        (1, "UISETP.NE.AND P0, UPT, UR4, URZ, UPT", True),
        (1, "ISETP.NE.OR P0, PT, RZ, UR4, P5", False),  # or something unknown
        (1, "ISETP.NE.AND P0, PT, RZ, UR4, P5", True),  # false, and something unknown
        (1, "ISETP.NE.AND P0, PT, R1, UR4, PT", False),
        (2, "FSETP.GT.AND P0, PT, R1, R2, PT", False),  # in the loop: the predicate is another's
        (2, "IADD3 R3, P0, R1, R2, RZ", False),
        (2, "R2P PR, R0, 0x7f", False),
    ],
)
def test_only_what_is_certain_is_left_out(place, line, follows):
    lines = list(LAW)
    lines[place] = line
    found = bases_of_the_loop(*lines)
    assert ("MUFU" not in found) == follows


def test_values_follow_moves_and_joins():
    start = ("ULDC.U8 UR4, c[0x0][0x210]", "MOV R0, UR4", "PRMT R0, R0, 0x8880, RZ")
    tests = (
        "@P5 BRA 0x50",
        "{}",
        "ISETP.EQ.AND P0, PT, R0, RZ, PT",
        "@P0 BRA 0x80",
        "FADD R1, R1, R1",
    )
    for between, follows in (("MOV R2, R5", True), ("MOV R0, R5", False)):
        lines = [*start, *(line.format(between) for line in tests), "EXIT"]
        code = branches.decided(code_of(*lines), FIRST)
        found = [code[i].base for i in sass.reached(code)]
        assert ("FADD" not in found) == follows


def test_calls_change_what_their_function_writes():
    def leaves_out(written):
        code = code_of(
            "ULDC.U8 UR4, c[0x0][0x210]",
            "ISETP.NE.AND P0, PT, RZ, UR4, PT",
            "CALL.REL.NOINC 0x90",
            "@!P0 BRA 0x50",
            "FADD R1, R1, R1",
            "EXIT",  # 0x50
            "NOP",
            "NOP",
            "NOP",
            written,  # 0x90
            "RET.REL.NODEC R2 0x0",
        )
        code = branches.decided(code, FIRST)
        return 4 not in sass.reached(code)

    assert leaves_out("DFMA R4, R4, R6, R8")
    assert not leaves_out("FSETP.GT.AND P0, PT, R1, R2, PT")


@pytest.mark.parametrize(
    ("lines", "follows"),
    [
        (("DSETP.LT.AND P0, PT, RZ, c[0x0][0x260], PT",), True),
        (("ULDC.64 UR10, c[0x0][0x260]", "DSETP.NEU.AND P0, PT, RZ, UR10, PT"), True),
        (("LDC.64 R18, c[0x0][0x260]", "DSETP.GT.AND P0, PT, R18, RZ, PT"), True),
        (("LDC.64 R18, c[0x0][0x260]", "MOV R19, R5", "DSETP.GT.AND P0, PT, R18, RZ, PT"), False),
        (("LDC R18, c[0x0][0x260]", "DSETP.GT.AND P0, PT, R18, RZ, PT"), False),  # half of it
        (("LDC.64 R18, c[0x0][0x268]", "DSETP.GT.AND P0, PT, R18, RZ, PT"), False),  # another one
        (("DSETP.GE.AND P0, PT, RZ, c[0x0][0x260], PT",), False),  # it holds, so the code runs
        (("DSETP.LT.AND P0, PT, R2, c[0x0][0x260], PT",), False),
    ],
)
def test_code_for_rounded_values_is_left_out(lines, follows):
    """Only where WeightLaw.rounding, which is zero, decides."""
    code = code_of(*lines, f"@!P0 BRA 0x{16 * (len(lines) + 2):x}", "FADD R1, R1, R1", "EXIT")
    found = branches.decided(code, FIRST, (branches.ROUNDING,))
    assert ("FADD" not in [found[i].base for i in sass.reached(found)]) == follows
    without = branches.decided(code, FIRST)
    assert "FADD" in [without[i].base for i in sass.reached(without)]


def test_instructions_of_a_false_predicate_use_no_unit():
    code = code_of(*LAW[:2], "@P0 DADD R2, R4, R6", "@!P0 FADD R1, R1, R1", "EXIT")
    decided = branches.decided(code, FIRST)
    assert [one.never for one in decided] == [False] * 2 + [True, False, False]
    assert [one.address for one in decided] == [one.address for one in code]


def test_the_mix():
    code = code_of(
        "HMMA.1688.F32.TF32 R4, R8, R12, R4",
        "HMMA.1688.F32.TF32 R4, R8, R12, R4",
        "IMAD.MOV.U32 R1, RZ, RZ, R2",
        "LOP3.LUT R1, R2, R3, RZ, 0xfc, !PT",
        "UIADD3 UR4, UR4, 0x1, URZ",
        "F2F.F64.F32 R2, R3",
        "DFMA R2, R4, R6, R8",
        "@!PT LDS RZ, [RZ]",
        "LDS.128 R4, [R3]",
        "LDGSTS.E.BYPASS.128 [R3], desc[UR4][R2.64]",
        "BAR.SYNC.DEFER_BLOCKING 0x0",
    )
    assert sass.mix(code) == {
        "HMMA.1688.F32.TF32": 2,
        "imad": 1,
        "alu": 1,
        "uniform": 1,
        "convert": 1,
        "fp64": 1,
        "shared": 1,
        "global": 1,
        "barrier": 1,
    }


# ---- bank conflicts, against what is counted by hand ---------------------------------------------


@pytest.mark.parametrize(
    ("addresses", "size", "wavefronts"),
    [
        ([0] * 32, 4, 1),  # one word for all
        ([4 * lane for lane in range(32)], 4, 1),
        ([8 * lane for lane in range(32)], 4, 2),  # every other bank, twice
        ([4 * (33 * (lane % 4) + lane // 4) for lane in range(32)], 4, 4),  # bank 3: 3, 35, 67, 99
        ([16 * lane for lane in range(32)], 16, 4),  # ideal: 512 bytes
        ([128 * lane for lane in range(32)], 16, 32),  # all lanes in the same four banks
        ([144 * lane for lane in range(32)], 16, 4),  # rows of 128 bytes and 16 more
        ([8 * lane for lane in range(32)], 8, 2),
        (list(range(32)), 1, 1),
    ],
)
def test_wavefronts(addresses, size, wavefronts):
    assert banks.wavefronts(addresses, size) == wavefronts


def test_matrices():
    assert banks.matrix_wavefronts([128 * row for row in range(32)]) == 32
    assert banks.matrix_wavefronts([144 * row for row in range(32)]) == 4
    swizzled = [128 * row + 16 * (row % 8) for row in range(32)]
    assert banks.matrix_wavefronts(swizzled) == 4


PTX = """
	mov.u32 	%r1, %tid.x;
	and.b32 	%r2, %r1, 31;
	shl.b32 	%r3, %r2, 7;
	mov.b32 	%r9, global_smem;
	add.s32 	%r4, %r9, %r3;
	and.b32 	%r5, %r1, 7;
	shl.b32 	%r6, %r5, 4;
	xor.b32 	%r7, %r3, %r6;
	ld.global.b32 	%r8, [%rd1];
	st.shared.b32 	[%r4], %r8;
$L__BB0_1:
	ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%r10, %r11, %r12, %r13}, [%r4+16];
	ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%r10, %r11, %r12, %r13}, [%r7];
	ld.shared.v4.b32 	{%r14, %r15, %r16, %r17}, [ %r7 + 4096 ];
	st.shared.v4.b32 	[%r4], {%r14, %r15, %r16, %r17};
	st.shared.b32 	[%r8], %r14;
	mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%f1}, {%r10}, {%r14}, {%f1};
	@%p1 bra 	$L__BB0_1;
	ret;
"""


def test_ptx_is_evaluated():
    """By hand: 8 rows of 16 bytes, 128 bytes apart, lie in the same banks: 8 wavefronts per matrix.
    With the exclusive or they lie in all banks. With 16 bytes per lane, a quarter of a warp is
    served at a time."""
    found = banks.conflicts(PTX, warps=2)
    assert found.ratio == {"ldmatrix": (32 + 4) / 8, "load": 1.0, "store": 32 / 4}
    assert found.ideal == 4 + 4 + 4 + 4 + 1
    assert found.wavefronts == 32 + 4 + 4 + 32 + 1
    assert found.unseen == 1  # its address was loaded
    bases = ["LDSM", "FADD", "STS"]
    assert banks.by_place(bases, found) == {0: 4.5, 2: 8.0}


# ---- one multiprocessor ------------------------------------------------------------------------

H100, A100, GEFORCE = devices.H100, devices.A100, devices.RTX4090


def test_stalls_and_scoreboards_of_one_warp():
    """A load from shared memory and a use: the clock of its unit, its latency, the stall, the
    jump."""
    code = code_of(
        ("LDS R1, [R2]", control(stall=2, write=0)),
        ("FADD R3, R1, R1", control(stall=4, wait=(0,))),
    )
    found = pipeline.run(code, H100, warps=1)
    assert found.clocks == pytest.approx(1 + 29 + 4 + pipeline.JUMP)
    assert found.bound == "latency"
    assert found.waits["FADD"] == pytest.approx(1 + 29 - 2)


@pytest.mark.parametrize(
    ("line", "card", "unit", "clocks"),
    [
        ("FFMA R1, R1, R2, R3", H100, "fp32", 32 / 128),
        ("FFMA R1, R1, R2, R3", A100, "fp32", 32 / 64),
        ("DFMA R2, R2, R4, R6", H100, "fp64", 32 / 64),
        ("DFMA R2, R2, R4, R6", GEFORCE, "fp64", 32 / 2),
        ("F2F.F64.F32 R2, R3", GEFORCE, "convert64", 32 / 2),
        ("MUFU.EX2 R1, R1", A100, "mufu", 32 / 16),
        ("HMMA.1688.F32.TF32 R4, R8, R12, R4", A100, "tensor", 16 * 8 * 8 / 495),
        ("HMMA.16816.F32 R4, R8, R12, R4", H100, "tensor", 16 * 8 * 16 / 1270),
        ("LDS.128 R4, [R2]", A100, "shared", 4),
        ("SHFL.BFLY PT, R1, R1, 0x1, 0x1f", A100, "shared", 1),
        ("REDUX.MIN UR4, R1", A100, "shared", 2),
    ],
)
def test_many_warps_take_what_their_unit_takes(line, card, unit, clocks):
    """16 warps with 32 such instructions each take the time of the unit, within a tenth."""
    found = pipeline.run(code_of(*[line] * 32), card, warps=4, blocks=8)
    assert found.bound == unit
    assert found.clocks == pytest.approx(8 * 4 * 32 * clocks, rel=0.1)
    assert found.busy[unit] == pytest.approx(found.clocks, rel=0.1)


def test_conflicts_cost():
    code = code_of(*["LDS R1, [R2]"] * 8)
    free = pipeline.run(code, A100, 8)
    bad = pipeline.run(code, A100, 8, factors=dict.fromkeys(range(8), 8.0))
    assert bad.clocks == pytest.approx(8 * 64, rel=0.1)
    assert bad.busy["shared"] == pytest.approx(8 * free.busy["shared"])


def test_copies_and_operands_of_products_take_shared_memory():
    """A copy writes what it brings, and a product reads operands: of four warps together all of
    them, once."""
    copy, load = code_of("LDGSTS.E.BYPASS.128 [R3], [R2.64]", "LDS.128 R4, [R2]")
    assert pipeline.need_of(copy, H100).in_shared == 32 * 16 / 128
    assert pipeline.need_of(copy, H100, factor=0.5).in_shared == 32 * 16 / 128 / 2
    assert pipeline.need_of(load, H100).in_shared == 0
    (product,) = code_of("HGMMA.64x64x16.F32 R24, R76, gdesc[UR8], R24")
    assert 4 * pipeline.need_of(product, H100).in_shared == 64 * 16 * 2 / 128
    found = pipeline.run((load, load, copy, product), H100, warps=4, blocks=4)
    assert found.busy["shared"] == pytest.approx(16 * (4 + 4 + 4 + 4))
    assert found.clocks >= found.busy["shared"]


def test_barriers_wait_for_all_warps():
    code = code_of(("LDS R1, [R2]", control(write=0)), ("BAR.SYNC 0x0", control(wait=(0,))))
    alone = pipeline.run(code, A100, 1).clocks
    together = pipeline.run(code, A100, 8).clocks
    assert alone == pytest.approx(1 + 29 + pipeline.BARRIER, abs=pipeline.JUMP + 2)
    assert alone < together <= alone + 8


def test_copies_run_by_themselves():
    copies = ["LDGSTS.E.BYPASS.128 [R3], [R2.64]", "LDGDEPBAR"]
    waiting = [*copies, "DEPBAR.LE SB0, 0x0"]
    ahead = [*copies, "DEPBAR.LE SB0, 0x2"]
    slow = pipeline.run(code_of(*waiting), A100, 1).clocks
    assert slow > A100.rate("l2_latency")
    assert pipeline.run(code_of(*ahead), A100, 1).clocks < slow / 2
    never = [*copies, "DEPBAR.LE SB0, 0xf"]  # more groups than there are
    assert pipeline.run(code_of(*never), A100, 1).clocks < slow / 10


def test_what_runs_once_is_not_repeated():
    code = code_of(("LDG.E R1, [R2.64]", control(write=0)), ("FADD R3, R1, R1", control(wait=(0,))))
    once = pipeline.run(code, A100, 1, once=True)
    assert once.clocks == pytest.approx(A100.rate("l2_latency") + 128 / 29.6 + 1, abs=2)
    assert pipeline.run([], A100, 4).clocks == 0


def test_fences_hold_a_warp_up():
    fence = pipeline.run(code_of("MEMBAR.ALL.GPU", "ERRBAR"), H100, 1).clocks
    assert fence == pytest.approx(263 + 2 + pipeline.JUMP)
    assert pipeline.run(code_of("MEMBAR.ALL.CTA", "ERRBAR"), H100, 1).clocks < 20


def test_products_of_warp_groups():
    """Four warps, one group: each unit has a quarter of the rows."""
    line = "HGMMA.64x64x8.F32.TF32 R24, R76, gdesc[UR8], R24"
    code = code_of(*[line] * 7, f"{line}, gsb0", "WARPGROUP.DEPBAR.LE gsb0, 0x0")
    clocks = 8 * 64 * 64 * 8 / 985
    found = pipeline.run(code, H100, 4)
    assert clocks < found.clocks < clocks + 60
    two = pipeline.run(code, H100, 4, blocks=2)
    assert two.clocks == pytest.approx(2 * clocks, rel=0.1)
    narrow = "HGMMA.64x16x8.F32.TF32 R24, gdesc[UR4], gdesc[UR8], R24"
    need = pipeline.need_of(code_of(narrow)[0], H100)
    assert need.occupancy == pytest.approx((64 * 8 * 4 + 16 * 8 * 4) / 128)  # by its operands
    with pytest.raises(ValueError, match=r"A100 SXM has no HGMMA"):
        pipeline.need_of(code_of(line)[0], A100)


def product_in_memory(rows, columns, tf32=False, first="gdesc[UR4]"):
    """The lines of a product in tensor memory, with its descriptor."""
    descriptor = rows // 16 << 24 | columns // 8 << 17 | (2 << 7 if tf32 else 0) | 1 << 4
    line = f"UTCHMMA {first}, gdesc[UR6], tmem[UR18], tmem[UR20], idesc[UR21], UPT"
    return f"UMOV UR21, {descriptor:#x}", line


def test_shapes_of_products_in_tensor_memory():
    (_, half), (_, tf32) = (code_of(*product_in_memory(128, 96, kind)) for kind in (False, True))
    assert pipeline.matrix_shape(half) == (128, 96, 16)
    assert pipeline.matrix_shape(tf32) == (128, 96, 8)
    # A descriptor that is computed, or that another instruction has replaced.
    constant, line = product_in_memory(128, 96)
    for lines in ([line], [constant, "USEL UR21, UR2, UR3, UP0", line]):
        with pytest.raises(ValueError, match="UTCHMMA has no shape"):
            pipeline.matrix_shape(code_of(*lines)[-1])


@pytest.mark.parametrize(
    ("rows", "columns", "first", "clocks"),
    [
        (128, 64, "gdesc[UR4]", 48),  # by its operands
        (128, 128, "gdesc[UR4]", 64),
        (128, 256, "gdesc[UR4]", 128),
        (128, 64, "tmem[UR4]", 32),
        (64, 128, "gdesc[UR4]", 64),
    ],
)
def test_clocks_of_products_in_tensor_memory(rows, columns, first, clocks):
    """Measured were 48.6, 64.6 and 128.6 clocks of the first three, and 64.6 of the last."""
    *_, one = code_of(*product_in_memory(rows, columns, first=first))
    need = pipeline.need_of(one, devices.B200)
    assert need.occupancy == clocks
    read = (columns + (0 if first.startswith("tmem") else rows)) * 32
    assert need.in_shared == read / 128


def test_one_warp_begins_products_in_tensor_memory():
    """The others jump over them. All wait for the signal."""
    begin = ["@P0 BRA 0x50", *product_in_memory(128, 128), "UTCBAR [UR4], URZ"]
    wait = "SYNCS.PHASECHK.TRANS64.TRYWAIT P1, [R3+URZ], R20"
    code = code_of("BAR.SYNC 0x0", *begin, wait, "FADD R1, R1, R1")
    found = pipeline.run(code, devices.B200, 8)
    assert found.busy["tensor"] == 64
    assert found.busy["fp32"] == 8 / 4
    assert found.busy["uniform"] == 1 / 4
    assert 64 + 33 < found.clocks < 64 + 33 + 80
    two = pipeline.run(code, devices.B200, 8, blocks=2).clocks
    assert 2 * 64 < two < 1.6 * found.clocks


def test_warps_wait_until_a_signal_is_sent():
    """Also if the warp that sends it comes much later than they."""
    slow = ["MEMBAR.ALL.GPU"] * 3
    begin = ["@P0 BRA 0x80", *slow, *product_in_memory(128, 128), "UTCBAR [UR4], URZ"]
    wait = "SYNCS.PHASECHK.TRANS64.TRYWAIT P1, [R3+URZ], R20"
    found = pipeline.run(code_of("BAR.SYNC 0x0", *begin, wait), devices.B200, 8)
    late = 3 * devices.B200.rate("l2_latency")
    assert late + 64 < found.clocks < late + 64 + 100
    assert found.waits[wait.split(".")[0]] > 0.8 * late


@pytest.mark.parametrize(
    ("name", "registers"),
    [
        ("LDTM.16dp256bit.x4 R4, tmem[UR4]", 16),
        ("STTM.16dp256bit.x8 tmem[UR4], R4", 32),
        ("LDTM.x32 R4, tmem[UR4]", 32),
        ("LDTM.16dp32bit_t0_t15.x16 R4, tmem[UR20]", 16),
    ],
)
def test_loads_of_tensor_memory(name, registers):
    need = pipeline.need_of(code_of(name)[0], devices.B200)
    assert (need.unit, need.occupancy) == ("tensor_memory", registers)


# ---- devices -----------------------------------------------------------------------------------


def test_every_number_has_a_source():
    for card in devices.DEVICES:
        figures = [value for value in card if isinstance(value, devices.Figure)]
        assert len(figures) == len(card) - 2
        assert all(figure.source in devices.SOURCES for figure in figures)
        assert all(figure.value >= 0 for figure in figures)
    assert devices.device("A100 SXM") is A100
    with pytest.raises(ValueError, match="allowed is one of A100"):
        devices.device("V100")


def test_rates_of_the_data_sheets():
    """TFLOP/s: 19.5 and 67 in float32, 82.6 on a GeForce; no instruction is above the sheet."""
    peaks = {A100: 19.5, GEFORCE: 82.6, devices.RTX5090: 104.8}
    for card, tflops in peaks.items():
        found = 2e-12 * card.rate("fp32") * card.sms * card.rate("clock")
        assert found == pytest.approx(tflops, rel=0.02)
    dense = {A100: 312, H100: 989, devices.B200: 2250, GEFORCE: 165.2, devices.RTX5090: 209.5}
    for card, tflops in dense.items():
        rate = max(card.rate("mma_f16"), card.rate("wgmma_f16"))
        assert 2e-12 * rate * card.sms * card.rate("clock") <= 1.01 * tflops


@pytest.mark.parametrize(
    ("card", "threads", "registers", "shared", "blocks"),
    [
        (A100, 128, 128, 0, 4),  # 65536 registers
        (A100, 128, 32, 40 << 10, 4),  # 164 KiB of shared memory, 1 a block for the system
        (A100, 1024, 32, 0, 2),  # 64 warps
        (GEFORCE, 512, 32, 0, 3),  # 48 warps
        (H100, 32, 16, 0, 32),
        (GEFORCE, 128, 255, 99 << 10, 1),
        (A100, 1024, 255, 0, 1),
    ],
)
def test_blocks_of_a_multiprocessor(card, threads, registers, shared, blocks):
    assert devices.resident(card, threads, registers, shared) == blocks


# ---- the work of the kernels on real data --------------------------------------------------------


def small_case(B=5, N=8):
    generator = torch.Generator().manual_seed(0)
    y = torch.rand(70, N, generator=generator) * 2 - 1
    x = y[:B] + 0.3 * torch.randn(B, N, generator=generator)
    return Case(x, torch.tensor([0.01, 0.1, 0.3, 1.0, 30.0]).repeat(4)[:B], y)


SMALL = data.Shape("small", 5, 70, 8)


def test_weights_agree_with_a_loop():
    """One chunk: every query separately, in plain Python."""
    case = small_case()
    (chunk,) = data.chunks_of(case, SMALL, data.squared_distances(case))
    for b in range(5):
        x, r = case.x[b].tolist(), float(case.z[b])
        d = [
            sum((p - q) ** 2 for p, q in zip(x, row, strict=True))
            for row in case.references.tolist()
        ]
        base = min(d)
        weights = [((base + r * r) / (value + r * r)) ** 4.5 for value in d]
        smallest = math.exp(-16) / 70
        assert chunk.live[b].tolist() == [w >= smallest for w in weights]


@pytest.mark.parametrize(
    ("B", "N", "type", "far", "some"),
    [
        (16, 32, "float32", 0.0, False),
        (16, 32, "float32", 1e5, True),  # pairs of clusters far from their centre
        (5, 8, "float32", 1e5, False),  # differences lose no digits there
        (5, 8, "uint8", 1e5, True),  # but bytes are rounded themselves
    ],
)
def test_what_is_refined_agrees_with_a_loop(B, N, type, far, some):
    case, exponent = small_case(B, N), (N + 1) / 2
    case.references[::3] += far
    case.x[0] += far
    if far == 0:
        case.z.clamp_(min=3)  # wide kernels, which small errors do not change
    shape = data.Shape("small", B, 70, N, type)
    assert shape.few == (N < 32)
    (chunk,) = data.chunks_of(case, shape, data.squared_distances(case))
    rows = case.references.double()
    center = rows[[i * 70 // 16 for i in range(16)]].mean(0)
    if shape.few:
        center = torch.zeros(N, dtype=torch.float64)
    lengths = [float((row - center).square().sum()) for row in rows]
    tiles = (range(64), range(64, 70))
    for b in range(B):
        x, r = case.x[b].double(), float(case.z[b])
        d = [float((x - row).square().sum()) for row in rows]
        base, norm = min(d), float((x - center).square().sum())
        bound = 2.0 ** (-20 if shape.few else -17) * (3 * norm + 2 * base)
        near = base + bound + math.expm1(20 / exponent) * (base + r * r)
        within = (base + r * r) / exponent
        lowest = [min(d[j] for j in tile) for tile in tiles]
        farthest = max(
            max(lengths[j] for j in tile)
            for tile, least in zip(tiles, lowest, strict=True)
            if least <= near
        )
        close = sum(least <= base + within for least in lowest)
        error = 2.0**-22 * (2 * math.sqrt(norm * farthest) + farthest)
        if shape.few:
            error = 2.0**-26 * base + (2.0**-22 * (norm + base) if type == "uint8" else 0)
        allowed = 1.5e-4 * math.sqrt(max(close / math.e, 1))
        score = exponent * abs(math.log(base + r * r))
        allowed = min(allowed, 1.5e-4 / 16 * max(1, score))
        refines = error > allowed * within
        found = chunk.refined.pairs[b].tolist()
        assert found == [refines and value <= near for value in d]
        visited = chunk.refined.visited[b].tolist()
        assert visited == [refines and least <= near for least in lowest]
    assert chunk.refined.pairs.any() == some


def test_chunks_continue_from_the_nearest_so_far(monkeypatch):
    monkeypatch.setattr(data, "TRITON_PAIRS", 1)  # chunks of 128
    shape = data.Shape("longer", 4, 300, 8)
    assert (shape.chunk, shape.chunks) == (128, 3)
    generator = torch.Generator().manual_seed(1)
    y = torch.rand(300, 8, generator=generator)
    x = y[:4] + 0.2  # near the first references: later chunks have nothing near
    case = Case(x, torch.full((4,), 1e-3), torch.cat([y[:128], y[128:] + 5]))
    first, second, third = data.chunks_of(case, shape, data.squared_distances(case))
    assert first.live.any()
    assert not second.live.any()
    assert not third.live.any()
    assert third.live.shape == (4, 300 - 256)


def test_tiles_lists_and_their_order():
    live = torch.zeros(4, 64, dtype=torch.bool)
    live[0], live[2] = True, True  # two queries with all, two with one reference
    live[1, 3] = live[3, 5] = True
    assert data.listed(live, 2, ordered=False) == (1.0, 1.0)
    mean, most = data.listed(live, 2, ordered=True)
    assert (mean, most) == ((2 / 64 + 1) / 2, 1.0)
    assert data.live_tiles(live, 2, ordered=True) == ((0.5 + 1) / 2, 1.0)
    assert data.live_tiles(live, 4, ordered=True) == (1.0, 1.0)


def test_work_of_refine():
    refined = torch.zeros(2, 640, dtype=torch.bool)
    refined[0, [0, 1, 2, 400]] = True
    visited = torch.zeros(2, 10, dtype=torch.bool)
    visited[0, [0, 6]] = True
    found = data.work_of(data.Refined(refined, visited))
    assert found == {
        "pairs": 4.0,
        "tiles": 2.0,
        "pairs, most": 3.0,  # a program of Triton's has two tiles
        "tiles, most": 1.0,
        "stores": 3.0,  # the first and second references of lanes, of one tile and of another
        "turns": 2.0,  # of two warps of CUDA's
        "turns, most": 2.0,
    }
    assert data.segment_of(10) == 2
    assert data.segment_of(2000) == 8


def test_stores_of_warps_that_list_pairs():
    """By a loop: a warp stores the even places of a tile at once, and the odd ones."""
    refined = torch.rand(3, 200, generator=torch.Generator().manual_seed(0)) < 0.02
    expected = [len({(j // 64, j % 2) for j in range(200) if row[j]}) for row in refined.tolist()]
    assert data.listing_stores(refined).tolist() == expected
    assert sum(expected) < refined.sum()


def test_turns_of_warps_that_list_pairs():
    """Warps take every fourth or eighth tile, and list up to four of them in a turn."""

    def turns(tiles, step=1):
        visited = torch.zeros(1, tiles, dtype=torch.bool)
        visited[0, ::step] = True
        return data.listing_turns(visited).tolist()

    assert turns(32) == [4 * 2]
    assert turns(32, step=4) == [2]  # one warp has all
    assert turns(70) == [6 * 3 + 2 * 2]
    assert turns(300) == [8 * 8 + 8 * 2]  # of 256 tiles, and of the others


def test_words_of_weights_and_their_turns():
    """Warps take every eighth word, and up to four of them in a turn. Tiles are taken whole."""
    live = torch.zeros(2, 3000, dtype=torch.bool)
    live[0, [70, 100, 2999]] = True  # of tiles 1 and 46
    live[1] = True
    found = data.work_of_weights(live, [1024, 3072])
    assert found == {
        "words": 2 + 2 + 94,
        # The first row has one word of two warps in two pieces. The other has 4 words of each
        # warp in a piece, or 3.
        "turns in pieces of 1024": 2 + 2 + 3 * 8,
        "turns in pieces of 1024, most": 8,
        "turns in pieces of 3072": 4 + 8 * 3,  # warps have 11 or 12 words
        "turns in pieces of 3072, most": 8 * 3,
    }
    assert data.work_of_weights(live[:, :40], []) == {"words": 2}


def test_shapes_are_split_as_in_the_kernels():
    assert data.BIG.blocks() == [1024] * 4
    assert data.BIG._replace(B=2800).blocks() == [960, 960, 880]
    assert data.BIG._replace(B=65, N=65536).blocks() == [33, 32]
    assert data.BIG._replace(B=65, N=200_000).blocks() == [22, 22, 21]  # 32 fit, however large N is
    assert (data.BIG.chunk, data.BIG.chunks) == (4096, 13)
    assert (data.F.block, data.F.chunk, data.F.chunks) == (256, 16384, 4)
    assert (data.C.chunks, data.G.chunks) == (1, 1)


def test_chunks_of_a_card_have_whole_rounds_of_tiles():
    """An A100 has 108 multiprocessors. Its chunks are 972 tiles of 128 × 128 at F with more
    references, 432 at big. An H100 has 132, and 660 tiles of 192 references. An RTX 4090 has 128,
    and a chunk has what its L2 cache holds."""
    longer = data.F._replace(M=500_000)
    chunks = [work.on_card(longer, card).chunk for card in (A100, H100, devices.B200, GEFORCE)]
    assert chunks == [486 * 128, 330 * 192, 512 * 128, 128 * 128]
    assert work.on_card(longer._replace(backward=True), GEFORCE).chunk > 128 * 128
    assert work.on_card(data.BIG, A100).chunk == 54 * 128
    for shape in (data.C, data.G, data.F, longer._replace(N=16)):  # one chunk; few features
        assert work.on_card(shape, A100).chunk == min(shape.M, 65536)


def test_shares_of_lists():
    """Lists of 2, 0 and 10 panels, and 6 for what each takes once, in three shares of 8: the first
    list, none of the panels but 2 of the last one, and the other 8."""
    number, found = data.shares_of(torch.tensor([60.0, 0.0, 320.0]), data.Sums(64, 4, 3), 1)
    assert number == 3
    assert (found["panels, most"], found["segments"], found["segments, most"]) == (8, 3, 1)
    assert (found["parts"], found["parts, most"], found["segments left out"]) == (1, 2, 0)
    _, found = data.shares_of(torch.tensor([60.0, 0.0, 320.0]), data.Sums(64, 4, 4), 1)
    assert found["segments left out"] == 2  # shares of 6 that end before the panels of a list


def test_many_features_are_not_predicted_for_triton():
    """Its blocks have fewer queries then."""
    with pytest.raises(ValueError, match="N is 131073; allowed is at most 131072"):
        next(launches.triton(data.BIG._replace(N=131_073), {}, H100))


def test_shapes_have_all_chunks_and_parts():
    assert data.F.chunk_sizes() == [16384] * 3 + [10848]  # of the Triton kernels
    assert data.C.chunk_sizes() == [4096]
    assert data.F._replace(references=20_000).chunk_sizes() == [20_000] * 3
    # 4 and 96 tiles of 32 queries × 128 features, 4 blocks on each of 132 multiprocessors, 45 and
    # 128 panels.
    assert data.G.part_panels(132) == 4
    assert data.C.part_panels(132) == 16
    assert data.C.part_panels(1000) == 4  # 32 parts fit
    assert data.C.part_panels(300) == 11
    # Up to 24 panels where 19 would leave six blocks on each multiprocessor: 6 equal parts of 22.
    assert data.C.part_panels(108) == 22
    assert data.C.part_panels(60) == 24
    assert data.BIG.part_panels(132) == 64  # of 4 parts of 1024 × 3072 values that fit
    # 28 and 96 tiles of 64 queries in blocks of 256 and 1024.
    assert data.F.sums_of_warps(H100) == (64, 20, 0)  # 26 equal parts of 512 panels
    assert data.BIG.sums_of_warps(H100) == (64, 64, 0)
    # Warpgroups: of 512 panels 132/4 + 2 parts of 16, or of 128 panels 4 parts of 43.
    assert data.F.sums(H100) == (64, 16, 132)
    assert data.BIG.sums(H100) == (128, 43, 132)
    assert data.BIG.sums(A100).rows == data.BIG.sums(GEFORCE).rows == 32
    assert data.BIG._replace(type="Rounded").sums(A100).rows == 64
    assert data.BIG._replace(type="Rounded").sums(GEFORCE).rows == 32
    assert data.BIG._replace(type="uint8").sums(H100).rows == 32
    assert data.BIG._replace(backward=True).sums(H100).rows == 32
    assert data.C.sums(H100) == (32, 16, 0)  # it has 128 queries
    assert data.F._replace(M=2400, N=128).sums(H100).rows == 32  # too little work: 4 × 75 panels
    assert not data.C.few
    assert data.C._replace(B=15).few
    assert data.C._replace(N=31).few


def test_lists_of_the_weighted_sum():
    live = torch.zeros(40, 130, dtype=torch.bool)
    live[::2, :128] = True  # 20 queries with 128 references, 20 with one
    live[1::2, 129] = True
    order = data.order_of(live)
    assert order.tolist() == [*range(1, 40, 2), *range(0, 40, 2)]
    listed = data.listed_references(live, order)
    assert listed.tolist() == [129, 128]
    figures = {"listed": 257 / 2, "panels": 9 / 2, "panels, most": 2.0}
    assert data.parts_of(listed, 2) == (2, figures | {"parts": 5 / 2, "parts, most": 3.0})
    assert data.transfers(live, order).tolist() == [17, 16]
    assert data.order_of(live[:32]) is None
    assert data.listed_references(live[:3], None).tolist() == [129]


def test_groups_with_longer_lists_have_more_blocks():
    """By hand for groups of 32, 32 and 2 queries, with at most 1, 17 and 20 panels of 20."""
    live = torch.zeros(66, 640, dtype=torch.bool)
    live[:32, 0] = True
    live[32:64, :17] = True  # 544 weights in one panel of references
    live[64:] = True
    # 21 blocks beside one for each group; 21 · 1/38 is 0.6 and 21 · 18/38 is 9.9.
    assert data.list_shares(live, data.order_of(live), 32, 24).tolist() == [1, 10, 13]
    assert data.list_shares(live[:32], None, 32, 24).tolist() == [24]
    many = torch.zeros(257, 64, dtype=torch.bool)
    assert data.list_shares(many, None, 32, 27).tolist() == 9 * [3]
    lists = data.Lists(data.Shape("uneven", 66, 640, 8), [H100])
    lists.add(live)
    (found,) = lists.result().values()
    assert data.list_blocks(66, 640, 32, 132) == 3 * 20
    # 57 · 18/38 is 27, so the last group has 31 blocks for its 20 panels.
    assert found["gathered on 132, most"] == 1


def test_no_block_has_more_panels_than_it_has_room_for():
    """However the weights are spread over the queries."""
    generator = torch.Generator().manual_seed(0)
    for rows, groups, m in ((32, 8, 65536), (64, 5, 30_000), (64, 9, 4096), (32, 2, 2081)):
        blocks = data.list_blocks(rows * groups, m, rows, 1)
        for _ in range(2):
            chances = torch.rand(rows * groups, 1, generator=generator) ** 20
            live = torch.rand(rows * groups, m, generator=generator) < chances
            order = data.order_of(live)
            shares = data.list_shares(live, order, rows, blocks)
            panels = (data.listed_references(live, order, rows) / 32).ceil()
            assert shares.sum() == blocks
            assert (panels / shares).max() <= data.GATHERED_PANELS


def test_the_order_is_that_of_the_first_chunk():
    few, many = torch.zeros(2, 33, 64, dtype=torch.bool)
    few[0] = True  # comes last
    many[1:] = True
    lists = data.Lists(data.Shape("two chunks", 33, 128, 8), [H100])
    lists.add(few)
    lists.add(many)
    (found,) = lists.result().values()
    # The first chunk has 0 and 64, the second 64 for those with few and 0 for the last.
    assert found["listed"] == 32


def test_all_figures_of_a_shape_are_counted():
    found = data.count(SMALL, lambda shape: small_case())
    assert found["refine"]["pairs"] == pytest.approx(found["refined a query"]["mean"] * 5)
    assert found["queries looked at"] == 5
    assert 0 < found["sums"]["live"] <= found["sums"]["listed of 32, unsorted"] <= 1
    assert found["lists"]["groups of 32, parts of 4"]["panels, most"] <= 4


def test_gradients_have_more_weights_and_the_final_nearest(monkeypatch):
    monkeypatch.setattr(data, "TRITON_PAIRS", 1)  # chunks of 128
    shape = data.Shape("longer", 4, 300, 8)
    generator = torch.Generator().manual_seed(1)
    y = torch.rand(300, 8, generator=generator)
    case = Case(y[:4] + 1e-4, torch.tensor([1e-3, 0.03, 0.06, 0.1]), y)
    d = data.squared_distances(case)
    live = torch.cat([chunk.live for chunk in data.gradient_chunks(case, shape, d)], 1)
    s = d + case.z.double()[:, None].square()
    p = torch.softmax(-4.5 * s.log(), 1)
    assert torch.equal(live, p >= math.exp(-24) / 300)
    forward = torch.cat([chunk.live for chunk in data.chunks_of(case, shape, d)], 1)
    assert live.sum() > forward.sum()
    found = data.count_gradient(shape, lambda shape: case)
    assert set(found) == {"refine", "lists", "queries"}
    assert data.listed_queries(live).tolist()[0] == [int(live[:, :32].any(1).sum())]
    assert data.listed_queries(live).shape == (10, 1)


def test_stored_counts_are_kept_without_fashion_mnist(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sections.subjects, "FASHION_FOLDER", tmp_path)
    monkeypatch.setattr(data, "count", lambda shape, cards: {"new": shape.name})
    monkeypatch.setattr(data, "count_gradient", lambda shape, cards: {"least": len(cards)})
    found = sections.count_data({data.F.name: {"old": True}})
    assert found[data.F.name] == {"old": True}
    new, others = {"new": data.C.name}, "4096, added"  # an H100 and a B200 have other errors
    chunks = {
        "cuda": {"4096": new, others: new},
        "gradient": {"4096": {"least": 3}, others: {"least": 2}},
        "medium": {"4096": new},
    }
    assert found[data.C.name] == new | chunks
    assert "not counted" in capsys.readouterr().out


# ---- the work of the CUDA kernels, against their machine code -----------------------------------

REASON = codegen_cuda.why_unchecked()
if REASON is None and not {"90a", "100f"} <= set(codegen_cuda.architectures()):
    REASON = "the extension has no code for sm_90a or sm_100f"
ON_DATA = {
    "refine": {
        "pairs": 100.0,
        "tiles": 90.0,
        "stores": 95.0,
        "turns": 60.0,
        "turns, most": 5.0,
    },
    "weigh": {
        "words": 3000.0,
        **{f"turns in pieces of {1024 * n}": 800.0 for n in range(1, 9)},
        **{f"turns in pieces of {1024 * n}, most": 9.0 for n in range(1, 9)},
    },
    "lists": {
        f"groups of {rows}, parts of {panels}": {
            "listed": 70.0,
            "panels": 3.0,
            "panels, most": 5.0,
            "parts": 2.0,
            "parts, most": 3.0,
            "transfers": 20.0,
            **{f"gathered on {sms}, most": 2.0 for sms in (132, 148)},
        }
        for panels in range(4, 65)
        for rows in (32, 64)
    }
    | {
        f"groups of 128, {sms} shares of at least 43": {
            "listed": 70.0,
            "panels": 3.0,
            "panels, most": 5.0,
            "parts": 2.0,
            "parts, most": 3.0,
            "segments": 150.0,
            "segments, most": 2.0,
            "segments left out": 0.0,
            "transfers": 20.0,
            f"gathered on {sms}, most": 2.0,
        }
        for sms in (132, 148)
    },
    "queries": {"listed": 70.0, "panels": 3.0, "panels, most": 3.0},
}


@pytest.mark.skipif(REASON is not None, reason=str(REASON))
@pytest.mark.parametrize(
    "card",
    [
        pytest.param(one, marks=() if one is devices.H100 else pytest.mark.slow, id=one.name)
        for one in devices.DEVICES
    ],
)
def test_limits_without_some_errors_take_fewer_instructions(card):
    """branches.ROUNDING and branches.ADDED are where the compiler has WeightLaw.rounding and added.
    In precision "medium" there is the one error. In "high" there is the other one where one float
    adds up several panels, on an H100 and a B200."""
    kernel = kernels.cuda_kernels(card)["find_limits<true, 8>"]
    first = branches.FIRST_PARAMETER[card.architecture]

    def reached(*zeros: int) -> int:
        return len(sass.reached(branches.decided(kernel.code, first, zeros)))

    # For an H100 the compiler computes most of both ways.
    assert reached(branches.ROUNDING) < reached() - (15 if card is H100 else 50)
    assert reached(branches.ADDED) < reached() - 15
    medium = kernels.cuda_kernel(card, kernel.name, 0, rounded=True)
    assert len(sass.reached(medium.code)) == reached(branches.ADDED)
    high = kernels.cuda_kernel(card, kernel.name, 0)
    none = [branches.ROUNDING]
    if card not in (devices.H100, devices.B200):
        none.append(branches.ADDED)
    assert len(sass.reached(high.code)) == reached(*none)


@pytest.mark.skipif(REASON is not None, reason=str(REASON))
@pytest.mark.parametrize("name", ["false, false>", "true, false>", "false, true>"])
@pytest.mark.parametrize(
    ("tile", "products", "groups"),
    [
        ("float32, 128, 128", 6, 2),
        ("float32, 128, 192", 6, 2),
        ("Rounded, 128, 128", 2, 2),
        ("Rounded, 256, 128", 2, 4),
    ],
)
def test_products_of_warpgroups_overlap(tile, name, products, groups):
    """A panel waits once for the products of each group of 64 queries. A compiler that finds their
    registers used too early lets them run one after the other, and waits for each."""
    kernel = kernels.cuda_kernel(H100, f"warpgroup_distances<{tile}, {name}", 0)
    body = kernel.body(kernels.loop_with_most(kernel, "tensor"))
    names = [one.name for one in body]
    assert sum(name.startswith("HGMMA.64x64x16") for name in names) == products * groups
    assert sum(name.startswith("WARPGROUP.DEPBAR") for name in names) == groups
    assert not any(name.startswith(("LDL", "STL")) for name in names)


@pytest.mark.skipif(REASON is not None, reason=str(REASON))
@pytest.mark.parametrize(
    ("type", "card"),
    [
        *((type, H100) for type in ("float32", "Rounded", "BFloat16", "Float16", "uint8")),
        *(
            pytest.param(type, devices.B200, marks=pytest.mark.slow)
            for type in ("float32", "Rounded")
        ),
    ],
    ids=lambda value: getattr(value, "name", value),
)
def test_machine_code_has_what_is_counted(type, card):
    """Barriers and matrix instructions are those of the code. Its copies are at least those that
    are counted; some are made by some threads only."""
    seen = set()
    for B in (8, 24, 128, 4096):
        shape = data.C._replace(B=B, type=type)
        found = work.counts(shape, ON_DATA, card), work.gradient_counts(shape, ON_DATA, card)
        for one in itertools.chain(*found):
            seen.add(codegen_cuda.stem(one.kernel))
            kernel = kernels.cuda_kernel(card, one.kernel, one.shared)
            assert kernel.threads == one.threads
            once = one.once
            for name in {"alive", "first"}.intersection(one.loops):  # branches, not loops
                once = once.plus(one.loops[name].trip)
            if one.name != "reference_gradient":  # its lists are in a loop
                # One more after sums in float32, of features that float16 does not hold.
                again = one.name == "weighted_sum" and "alive" in one.loops and once.exchanges > 0
                coded = kernels.count_of(kernel.straight(), "BAR")
                assert coded == once.barriers + again, one.kernel
            if one.name in ("weigh", "pull", "find_coefficients"):
                # Each thread finds the weights of four pairs, each from one exponential.
                pairs = "turns" if one.name == "weigh" else "pairs"
                for part in launches._cuda_phases(one, kernel, shape):
                    if part.name == pairs:
                        each = [step for step in part.code if step.name == "MUFU.EX2"]
                        assert len(each) == data.WEIGHED_TOGETHER == data.PIECE // 256
            for name, loop in one.loops.items():
                if not loop.trip.barriers or loop.most == 1 or name in ("words", "lists"):
                    continue
                what = "fp32" if one.name == "differences" else "tensor"
                of_panels = kernels.loop_with_most(kernel, what)
                if name == "segments":  # one more barrier, as above
                    (around,) = kernels.loops_around(kernel, of_panels)
                    assert kernels.count_of(kernel.body(around), "BAR") == loop.trip.barriers + 1
                    continue
                body = kernel.body(of_panels)
                products = loop.trip.halves + loop.trip.tf32 + loop.trip.of_warpgroups
                products += kernel.warps * loop.trip.in_tensor_memory  # one warp begins these
                assert kernel.warps * kernels.count_of(body, "tensor") == products, one.kernel
                assert kernels.count_of(body, "BAR") == loop.trip.barriers, one.kernel
                coded = launches.copied_bytes(body, kernel.threads)
                most = {"differences": 3, "reference_gradient": 2}.get(one.name, 1.4)
                assert loop.trip.copied <= coded <= most * loop.trip.copied, one.kernel
    declared = codegen_cuda.declared() - {
        "normalised_field_kernel",
        "ode_step_kernel",
        "expand_level",
        "find_step_levels",
    }
    large = type in ("float32", "Rounded")
    if not (large and card == H100):
        declared -= {"warpgroup_distances", "warpgroup_sum"}
    if not (large and card == devices.B200):
        declared -= {"tensor_memory_distances", "tensor_memory_sum"}
    assert seen == declared


def test_no_cuda_kernel_is_bound_by_float64_or_barriers():
    """In the stored predictions of all shapes with references in float32, on all cards."""
    stored = results.load()
    rows = stored["predicted"] + stored["backward"]
    bounds = {row[-1] for row in rows if row[2].startswith("cuda")}
    assert "latency" in bounds
    assert not bounds & {"fp64", "convert", "convert64", "barrier"}


@pytest.mark.slow
@pytest.mark.skipif(codegen_cuda.why_unchecked() is not None, reason="no machine code")
@pytest.mark.parametrize("card", devices.DEVICES, ids=lambda card: card.name)
def test_loops_over_pairs_have_no_float64(card):
    """On GeForce cards float64, and conversions from and to it, run at 1/64 of float32's rate."""
    both = ("false", "true")
    looped = {
        **{f"weigh<{halves}, {law}>": ("fp32", "STG", "LDG") for halves in both for law in both},
        **{f"pull<{law}>": ("fp32",) for law in both},
        **{f"find_coefficients<{law}, {of_y}>": ("fp32",) for law in both for of_y in both},
        **{f"split_rows<{centered}>": ("F2FP", "FMNMX") for centered in both},
    }
    for name, loops in looped.items():
        kernel = kernels.cuda_kernel(card, name, 0)
        for what in loops:
            body = kernel.body(kernels.loop_with_most(kernel, what))
            assert float64_in(body, card) == [], (name, what)


def float64_in(code, card):
    """The instructions for float64, and conversions from and to it."""
    return [one.name for one in code if pipeline.need_of(one, card).unit in ("fp64", "convert64")]


@pytest.mark.slow
@pytest.mark.skipif(codegen_cuda.why_unchecked() is not None, reason="no machine code")
@pytest.mark.parametrize(
    ("kernel", "pairs"),  # of a thread
    [
        ("finish_distances<float32, {}, false>", 8),
        ("distances<float32, 64, 64, {}, false, false>", 16),
        ("distances<float32, 128, 128, {}, false, false>", 64),
        ("distances<Rounded, 64, 64, {}, false, false>", 16),
    ],
)
def test_distances_on_geforce_cards_have_no_float64_for_each_pair(kernel, pairs):
    """On other cards each pair takes at least four such instructions."""
    both = [kernels.cuda_kernel(GEFORCE, kernel.format(each), 0) for each in ("true", "false")]
    of_geforce, of_others = (len(float64_in(each.code, GEFORCE)) for each in both)
    assert of_geforce + 4 * pairs <= of_others


def test_copies_read_the_bytes_that_are_counted():
    """Two copies a trip, of which one block of 128 threads makes the second with one warp."""
    copy = "LDGSTS.E.BYPASS.128 [R3], [R2.64]"
    kernel = kernel_of(copy, "HMMA.1688.F32.TF32 R4, R8, R12, R4", copy, "@P0 BRA 0x0", "EXIT")
    trip = work.Amount(tf32=4, copied=160 * 16, barriers=0)
    one = work.Work(
        "weighted_sum", "some", 3, 128, 0, work.Amount(), {"panels": work.Loop(30, 10, trip)}, 0
    )
    body = model.phase("panels", kernel, kernel.body(kernel.loops[0]), 30, 10)
    (found,) = launches.with_copied([body], one, kernel)
    assert dict(found.factors) == {0: 160 / 256, 2: 160 / 256}
    full, less = (
        pipeline.run(part.code, A100, 4, 8, factors=dict(part.factors)) for part in (body, found)
    )
    assert less.busy["global"] == pytest.approx(full.busy["global"] * 160 / 256)


def test_stores_write_the_bytes_that_are_counted():
    """All lanes store a weight, and one lane of each warp stores 32 bits."""
    lines = ("STG.E [R2.64], R3", "@!P1 STG.E [R4.64], R5", "FADD R1, R1, R1")
    part = model.phase("pairs", kernel_of("EXIT"), code_of(*lines), 30, 10)
    found = launches._with_stored(part, 128 * 4 + 4 * 4, 128)
    moved = sum(
        factor * sass.access_bytes(part.code[i]) * 128 for i, factor in dict(found.factors).items()
    )
    assert set(dict(found.factors)) == {0, 1}
    assert moved == pytest.approx(128 * 4 + 4 * 4)
    assert launches._with_stored(part, None, 128) == part


def test_bytes_that_blocks_store():
    """By hand for 64 queries, 2048 references and 128 features, 70 of which are listed. Of 4096
    words of weights 3000 are not left out."""
    shape = data.Shape("some", 64, 2048, 128)
    found = {one.name: one for one in work.counts(shape, ON_DATA, H100)}
    weigh, listing, merge = found["weigh"], found["list_references"], found["merge"]
    turns, rounds, zeros = (weigh.loops[name] for name in ("turns", "rounds", "zeros"))
    assert turns.stored * 800 == pytest.approx(3000 * (32 * 4 + 4))
    assert rounds.trips == 128  # one for each piece
    assert rounds.stored * 128 == 1096 * 4
    assert zeros.stored * 128 == 1096 * 32 * 4
    assert weigh.stored * weigh.blocks == 128 * 2 * 4 + 64 * 2 * 8  # two pieces of each query
    assert listing.loops["words"].stored == 0  # they go to shared memory
    assert merge.stored * merge.blocks == 64 * (128 * 4 + 3 * 8)
    turns = found["find_limits"].loops["turns"]
    assert turns.stored * 60 == pytest.approx(100 * 4 + 90 * 8 + 60 * 4)


PIECES_AND_PARTS = (
    "MOV R1, R2",
    "LDG.E R3, [R4]",  # 0x10: pieces
    "FADD R1, R1, R3",
    "@P0 BRA 0x10",
    "LDG.E.128 R4, [R8]",  # 0x40: parts
    "FADD R0, R0, R4",
    "FADD R1, R1, R5",
    "@P1 BRA 0x40",
    "STG.E.128 [R8], R0",
    "EXIT",
)


def test_the_loop_over_parts_is_not_that_over_pieces():
    kernel = kernel_of(*PIECES_AND_PARTS)
    loops = {"parts": work.Loop(30, 3), "pieces": work.Loop(20, 2)}
    one = work.Work("merge", "some", 10, 128, 0, work.Amount(), loops, 0)
    phases = {part.name: part for part in launches._cuda_phases(one, kernel, data.C)}
    assert [i.name for i in phases["parts"].code if i.base == "LDG"] == ["LDG.E.128"]
    assert [i.name for i in phases["pieces"].code if i.base == "LDG"] == ["LDG.E"]
    assert (phases["parts"].trips, phases["pieces"].trips) == (30, 20)


def test_the_way_past_the_loads_is_left_out():
    kernel = kernel_of(
        "MOV R1, R2",
        "@P0 BRA 0x60",  # 0x10: the loop; a query at a limit
        "@P1 BRA 0x40",
        "LDG.E R3, [R4]",
        "FFMA R1, R1, R3, R3",  # 0x40
        "BRA 0x70",
        "DADD R6, R6, RZ",  # 0x60
        "@P2 BRA 0x10",  # 0x70
        "EXIT",
    )
    loops = {"pairs": work.Loop(30, 3)}
    one = work.Work("pull", "some", 10, 128, 0, work.Amount(), loops, 0)
    *_, pairs = launches._cuda_phases(one, kernel, data.C)
    assert [part.base for part in pairs.code] == ["BRA", "BRA", "LDG", "FFMA", "BRA", "BRA"]


def test_stores_that_no_lane_makes_are_left_out():
    """A turn has two stores to the list and one of minima. Half of those to the list are made."""
    kernel = kernel_of(
        "MOV R1, R2",
        "ATOMG.E.ADD R1, [R2], R3",  # 0x10: a turn
        "@P0 BRA 0x40",
        "STG.E [R2.64], R3",
        "@P1 BRA 0x60",  # 0x40
        "STG.E [R4.64], R5",
        "@P2 BRA 0x80",  # 0x60
        "STG.E.64 [R6.64], R8",
        "@P3 BRA 0x10",  # 0x80
        "EXIT",
    )
    (turn,) = kernel.loops
    for stores, kept in ((0, 0), (40, 0), (100, 1), (160, 2), (200, 2)):
        loops = {"turns": work.Loop(100, 9), "stores": work.Loop(stores, 0)}
        one = work.Work("find_limits", "some", 10, 128, 0, work.Amount(), loops, 0)
        body = kernel.body(turn, launches._stores_left_out(kernel, turn, one))
        assert [part.name for part in body].count("STG.E") == kept
        assert [part.name for part in body].count("STG.E.64") == 1


def test_code_for_far_references_is_left_out():
    kernel = kernel_of(
        "MOV R1, R2",
        "LDG.E R1, [R2]",  # 0x10: pairs
        "@P5 BRA 0x70",
        "LDG.E R3, [R4]",  # 0x30: features
        "FFMA R1, R1, R3, R3",
        "FFMA R1, R1, R3, R3",
        "@P0 BRA 0x30",
        "@P1 BRA 0xb0",  # 0x70: not far
        "FMUL R1, R1, R1",
        "FFMA R1, R1, R3, R3",  # 0x90: features again
        "@P2 BRA 0x90",
        "SHFL.BFLY PT, R1, R1, 0x1, 0x1f",  # 0xb0
        "STG.E.64 [R6.64], R8",
        "@P3 BRA 0x10",
        "EXIT",
    )
    around, inner, _ = kernel.loops
    body = kernel.body(around, launches._far_from(kernel, around, inner))
    assert [part.base for part in body] == ["LDG", "BRA", "BRA", "SHFL", "STG", "BRA"]
    loops = {"pairs": work.Loop(160, 16, stored=16), "rows": work.Loop(160, 16)}
    one = work.Work("refine", "some", 10, 128, 0, work.Amount(), loops, 0)
    pairs = next(p for p in launches._refine_phases(one, kernel, 64) if p.name == "pairs")
    assert dict(pairs.factors)[4] == pytest.approx(2 / 32)  # 16 bytes, of eight by each lane


# ---- the model ----------------------------------------------------------------------------------


def test_rounds_of_blocks():
    """A phase bound by its unit takes the time of all its blocks on a multiprocessor."""
    kernel = kernel_of(*["FFMA R1, R1, R2, R3"] * 64)
    clocks = 64 * 4 * 32 / 64  # of a trip of a block of 4 warps, on 64 lanes
    for blocks, of_one in ((108, 1), (109, 2), (108 * 16, 16), (108 * 20, 20)):
        phase = model.phase("loop", kernel, kernel.code, 10.0 * blocks, 10.0)
        launch = model.Launch("some", kernel, blocks, (phase,), 0.0)
        expected = of_one * 10 * clocks / A100.rate("clock")
        assert model.rounds_seconds(launch, A100) == pytest.approx(expected, rel=0.1)


def test_what_binds_a_launch():
    kernel = kernel_of(*["FFMA R1, R1, R2, R3"] * 64)

    def predicted(trips, most, moved=0.0, times=1):
        phase = model.phase("loop", kernel, kernel.code, trips, most)
        return model.predict(model.Launch("some", kernel, 108, (phase,), moved, times), A100)

    gap = A100.rate("launch")
    assert predicted(108, 1).bound == "launch"
    assert predicted(1e5 * 108, 1e5).bound == "fp32"
    one = predicted(1e5 * 108, 5e5)
    assert one.bound == "longest block"
    assert predicted(1e5 * 108, 5e5, times=3).seconds == pytest.approx(3 * one.seconds)
    memory = predicted(108, 1, moved=1e9)
    assert memory.bound == "memory"
    assert memory.seconds == pytest.approx(1e9 / A100.rate("memory") + gap)
    joined = model.merge_by_name([memory, one, memory._replace(name="other")])
    assert [(part.name, part.launches, part.bound) for part in joined] == [
        ("some", 2, "longest block" if one.seconds > memory.seconds else "memory"),
        ("other", 1, "memory"),
    ]


def test_a_gap_is_shorter_where_the_next_launch_starts_early():
    kernel = kernel_of(*["FFMA R1, R1, R2, R3"] * 64)
    phase = model.phase("loop", kernel, kernel.code, 1e5 * 132, 1e5)

    def seconds(early):
        launch = model.Launch("some", kernel, 132, (phase,), 0.0, 3, early)
        return model.predict(launch, devices.H100).seconds

    saved = devices.H100.rate("launch") - devices.H100.rate("early_launch")
    assert 0 < saved < devices.H100.rate("launch")
    for early in (1, 2, 3):
        assert seconds(0) - seconds(early) == pytest.approx(early * saved)


def test_which_launches_let_the_next_one_start():
    lets = kernel_of("ACQBULK", "@!P0 PREEXIT", "EXIT", threads=256)
    assert launches.lets_next_start(lets, 512)
    assert not launches.lets_next_start(lets, 513)
    assert not launches.lets_next_start(kernel_of("ACQBULK", "EXIT", threads=256), 1)
    source = (ROOT / "csrc" / "cuda" / "intrinsics.h").read_text()
    assert f"kSmall = 1 << {launches.MOST_EARLY.bit_length() - 1};" in source


def test_nothing_starts_early_after_the_last_launch(monkeypatch):
    """What follows is not one of the kernels."""
    works = [
        work.Work(name, name, 4, 128, 0, work.Amount(), {}, 0.0, times=3)
        for name in ("weigh", "merge")
    ]
    kernel = kernel_of("ACQBULK", "PREEXIT", "EXIT")
    monkeypatch.setattr(kernels, "cuda_kernel", lambda *given, **precision: kernel)
    monkeypatch.setattr(launches, "_cuda_phases", lambda *given: ())
    made = launches._of_work(iter(works), data.C, devices.H100)
    assert [(one.name, one.early) for one in made] == [("weigh", 3), ("merge", 2)]


def test_trips_of_single_warps():
    """Blocks of 4 warps share 7 trips: one round of all warps, and one of 3."""
    kernel = kernel_of(*["FFMA R1, R1, R2, R3"] * 64)
    loop = work.Loop(trips=35, most=7)
    whole, last = launches._by_warps("some", kernel, kernel.code, loop, blocks=10)
    assert (whole.warps, whole.trips, whole.most) == (None, 5, 1)
    assert (last.warps, last.trips, last.most) == (3, 5, 1)
    launch = model.Launch("some", kernel, 10, (whole, last), 0.0)
    clocks = [model.run_of(part, launch, A100, 1).clocks for part in launch.phases]
    assert clocks[0] == pytest.approx(clocks[1])  # each warp has a scheduler of its own
    two = last._replace(warps=8), last._replace(warps=5)
    assert model.run_of(two[0], launch, A100, 1).clocks > 1.9 * clocks[1]
    assert launches._by_warps("some", kernel, kernel.code, work.Loop(0, 0), blocks=10) == [
        whole._replace(trips=0, most=0)
    ]


def test_code_between_barriers():
    code = code_of("MOV R1, R2", "BAR.SYNC 0x0", "MOV R2, R3", "BAR.SYNC 0x0", "EXIT")
    parts = launches._between_barriers(code)
    assert [[one.base for one in part] for part in parts] == [["MOV", "BAR"]] * 2 + [["EXIT"]]


def test_loads_of_whole_trips_and_of_the_last():
    """The last trip of a row checks where the row ends."""
    kernel = kernel_of(
        "MOV R1, R2",
        "@P0 BRA 0x40",  # 0x10: the loop
        "LDG.E R4, [R2]",
        "BRA 0x50",
        "@P2 LDG.E R4, [R2]",  # 0x40
        "FFMA R1, R1, R2, R3",  # 0x50
        "@P1 BRA 0x10",
        "EXIT",
    )
    (loop,) = kernel.loops
    whole, last = launches._trips_of_refine(kernel, loop)
    assert [one.predicate for one in whole if one.base == "LDG"] == [""]
    assert [one.predicate for one in last if one.base == "LDG"] == ["@P2"]
    assert [one.base for one in whole if one.base == "FFMA"] == ["FFMA"]


def test_code_for_unaligned_rows_is_left_out():
    kernel = kernel_of(
        "MOV R1, R2",
        "@P0 BRA 0x50",  # 0x10: the loop
        "LDG.E R4, [R2]",
        "STS [R3], R4",
        "BRA 0x60",
        "LDGSTS.E.BYPASS.128 [R3], [R2.64]",  # 0x50
        "FFMA R1, R1, R2, R3",
        "@P1 BRA 0x10",
        "EXIT",
    )
    (loop,) = kernel.loops
    assert [one.base for one in kernel.body(loop)] == ["BRA", "LDGSTS", "FFMA", "BRA"]
    assert [one.base for one in kernel.straight()] == ["MOV", "EXIT"]
    assert kernels.loop_with_most(kernel, "fp32") == loop
    with pytest.raises(ValueError, match="no loop with tensor"):
        kernels.loop_with_most(kernel, "tensor")


def test_products_of_plain_torch():
    """A large product runs at the full rate, a small one more slowly: its tiles are too few."""
    size = 8192
    found = model.product(A100, size, size, size, "fp32")
    rate = 2 * 64 * 108 * A100.rate("clock") * model.SGEMM
    assert found == pytest.approx(2 * size**3 / rate, rel=0.05)
    assert model.product(A100, 128, 128, 4096, "fp32") > 2 * 128 * 128 * 4096 / rate
    tf32 = model.product(H100, size, size, size, "tf32")
    assert tf32 < model.product(H100, size, size, size, "fp32") / 4
    parts = model.torch_path(A100, 128, 4096, 3072, "fp32", compiled=True)
    eager = model.torch_path(A100, 128, 4096, 3072, "fp32", compiled=False)
    assert parts["products"] == eager["products"]
    assert sum(parts.values()) < sum(eager.values())
    back = model.torch_backward(A100, 128, 4096, 3072, "fp32", compiled=False)
    assert back["products"] == eager["products"]  # as many and as large
    compiled = model.torch_backward(A100, 128, 4096, 3072, "fp32", compiled=True)
    assert compiled["rest"] < back["rest"] < eager["pairs"]


# ---- a kernel that is compiled now ---------------------------------------------------------------

COMPILED = """
from benchmarks.machine_code import devices, kernels, model, published
import json
published.PRODUCT_CONFIGS = published.PRODUCT_CONFIGS[1:2]
(launch,) = published.product_launches(1024, 1024, 1024, "fp16")(devices.A100)
main = kernels.loop_with_most(launch.kernel, "tensor")
found = model.predict(launch, devices.A100)
conflicts = launch.kernel.conflicts
print(json.dumps({
    "matrix": kernels.count_of(launch.kernel.body(main), "tensor"),
    "copies": kernels.count_of(launch.kernel.body(main), "LDGSTS"),
    "wavefronts": [conflicts.ideal, conflicts.wavefronts, conflicts.unseen],
    "seconds": found.seconds,
}))
"""


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
def test_a_product_compiled_now():
    """128 × 128 × 32 by four warps: 64 products of 16 × 8 × 16 a warp, 16 KiB copied in pieces of
    16 bytes, 8 a thread, operands free of conflicts; not faster than the data sheet."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-c", COMPILED], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert (found["matrix"], found["copies"]) == (64, 8)
    ideal, wavefronts, unseen = found["wavefronts"]
    assert ideal == wavefronts
    assert unseen == 0
    assert 2 * 1024**3 / 312e12 < found["seconds"] < 10 * 2 * 1024**3 / 312e12


# ---- the host -----------------------------------------------------------------------------------


def test_native_calls_are_not_measured_without_the_build_for_the_host(monkeypatch, capsys):
    monkeypatch.setattr(cuda_shim, "PATH", None)
    x = torch.zeros(2, 3)
    assert host.native_calls(x, torch.ones(2), x) == {}
    assert "PFGM_CUDA_SHIM is not set" in capsys.readouterr().out


def test_the_least_of_the_rounds_counts():
    calls = []
    assert host.seconds(lambda: calls.append(0)) >= 0
    assert len(calls) == host.ROUNDS * host.CALLS + 1


# ---- the page -----------------------------------------------------------------------------------


def test_the_page_shows_the_stored_results():
    text = page.SECTION.page.read_text()
    assert page.SECTION.replaced(text, page.report(results.load())) == text


def test_the_interpreter_is_refused(monkeypatch, capsys):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert command_line.main([]) == 2
    assert "unset it" in capsys.readouterr().out


def test_stored_sections_are_read_back(tmp_path, monkeypatch):
    monkeypatch.setattr(results, "PATH", tmp_path / "machine_code.json")
    assert results.load() == {}
    results.store("host", {"triton": 1e-4})
    results.store("predicted", [["C", "A100 SXM", "cuda", "merge", 1e-6, 1, "launch"]])
    found = results.load()
    assert found["host"] == {"triton": 1e-4}
    assert page.predicted(found) == {("C", "A100 SXM", "cuda"): 1e-6}
    assert len(results.PATH.read_text().splitlines()) < 15
    with pytest.raises(ValueError, match="allowed is one of data"):
        results.store("elsewhere", {})


def test_gradients_are_added_to_the_forward_pass():
    def rows(seconds):
        paths = [path for path in page.PATHS if path not in page.FORWARD_ALONE]
        return [["C", "A100 SXM", path, "some", seconds, 1, ""] for path in paths]

    text = page.gradient_table({"predicted": rows(1e-6), "backward": rows(2e-6)})
    cells = [cell.strip() for cell in text.splitlines()[-1].split("|")[1:-1]]
    assert cells == ["C", "A100 SXM", "2 µs", *["3 µs"] * 5]


def test_precision_medium_beside_torch():
    """The page has a table of it once it is predicted."""
    name = data.C.name
    rows = [[name, "A100 SXM", path, "some", 1e-4, 1, ""] for path in ("cuda", "compiled, TF32")]
    without = {"predicted": rows, "data": {name: {}}}
    assert "medium" not in page.total_table(without)
    medium = [name, "A100 SXM", "cuda, medium", "some", 5e-5, 1, ""]
    counted = {"medium": {"4096": {"refined a query": {"mean": 21.1}}}}
    with_medium = {"predicted": [*rows, medium], "data": {name: counted}}
    cells = [cell.strip() for cell in page.medium_table(with_medium).splitlines()[-1].split("|")]
    assert cells[1:-1] == [name, "A100 SXM", "50 µs", "100 µs", "2.00", "21.1"]
    assert "cuda, medium" in page.total_table(with_medium)


def test_times_as_fast_as_torch():
    def rows(**seconds):
        return [
            ["C: photographs", "A100 SXM", path, "some", t, 1, ""] for path, t in seconds.items()
        ]

    ours = {"cuda": 2e-6, "cuda, medium": 1e-6}
    theirs = {"torch, float32": 6e-6, "compiled, TF32": 3e-6}
    found = {"predicted": rows(**ours, **theirs), "backward": rows(cuda=1e-6, **theirs)}
    lines = page.ratio_table(found).splitlines()[-3:]
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines]
    assert [row[2:] for row in cells] == [["3.00", "4.00"], ["1.50", "2.00"], ["3.00", ""]]


def test_bytes_and_few_queries():
    def row(path, kernel, seconds):
        return ["C, bytes", "A100 SXM", path, kernel, seconds, 1, ""]

    rows = [
        row("cuda", "distances", 2e-6),
        row("torch, float32", "products", 5e-6),
        row("torch, float32", "conversion", 1e-6),
    ]
    line = page.variant_table({"variants": rows}).splitlines()[-1]
    cells = [cell.strip() for cell in line.split("|")[1:-1]]
    assert cells == ["C, bytes", "A100 SXM", "2 µs", "6 µs", "3.00 (2.50)"]


@pytest.mark.slow
@pytest.mark.skipif(REASON is not None, reason=str(REASON))
def test_the_variants_are_predicted_from_counts_of_their_own(monkeypatch):
    few, cards = tuple(one._replace(M=256) for one in data.VARIANTS), (A100, H100)
    monkeypatch.setattr(data, "VARIANTS", few)
    monkeypatch.setattr(sections, "DEVICES", cards)
    rows = list(sections.variants())
    assert {(row[0], row[1]) for row in rows} == {
        (shape.name, card.name) for shape in few for card in cards
    }
    assert all(row[4] > 0 for row in rows)
    converted = {row[0] for row in rows if row[3] == "conversion"}
    assert converted == {"C, references in bytes"}
    kernels_of = {(row[0], row[3]) for row in rows if row[2] == "cuda"}
    assert ("C, 1 query", "differences") in kernels_of
    assert ("C, 16 queries", "distances") in kernels_of


def test_predicted_and_measured_times_side_by_side():
    def row(path, graph):
        subject = "forward, CIFAR-10 shape, 128 × 4096"
        return gpu_measure.Row(subject, path, {"median": 1.0}, graph, 0.0, {}, "")

    rows = [row("triton", {"median": 2e-3}), row("torch, tf32", {}), row("copy", {})]
    text = gpu_report.beside_predicted(rows, "NVIDIA H100 80GB HBM3")
    lines = text.splitlines()
    totals = page.predicted(results.load())
    ours = row("cuda", {"median": totals["C: photographs", "H100 SXM", "cuda"]})
    assert "| 1.00 |" in gpu_report.beside_predicted([ours], "NVIDIA H100 80GB HBM3")
    assert "H100 SXM" in lines[0]
    assert len(lines) == 2 + 2 + 2
    assert "2 ms" in lines[-2]
    assert gpu_report.beside_predicted(rows, "NVIDIA T4") == ""
