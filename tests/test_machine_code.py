"""What benchmarks/machine_code reads from machine code, and what it makes of it."""

from __future__ import annotations

import doctest

import pytest
from machine_code import banks, devices, pipeline, sass

# ---- machine code ------------------------------------------------------------------------------


def control(stall=1, write=7, read=7, wait=()):
    """The second word of an instruction with that control word."""
    mask = sum(1 << k for k in wait)
    return (mask << 11 | read << 8 | write << 5 | stall) << 41


def dump(*lines, name="kernel"):
    """What cuobjdump prints; a line is its text, or text and control word."""
    shown = [f"\t\tFunction : {name}\n\t.headerflags\t@EF_CUDA_SM90\n"]
    for i, line in enumerate(lines):
        text, high = line if isinstance(line, tuple) else (line, control())
        shown.append(f"        /*{16 * i:04x}*/   {text} ;   /* 0x0000000000007919 */\n")
        shown.append(f"                           /* 0x{high:016x} */\n")
    return "".join(shown)


def code_of(*lines):
    return sass.functions(dump(*lines))["kernel"]


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
    """A thread's number is read, which scoreboard 0 tells, and shifted in a kernel for sm_90: it
    waits for that, and the next instruction for the shift, 4 clocks."""
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
    assert sass.innermost(found) == [inner]
    own = sass.own(code, outer, found)
    assert [one.base for one in own] == ["LDG", "BRA", "STG", "BRA", "DADD", "BRA"]


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
    """By hand: 8 rows of 16 bytes 128 bytes apart lie in the same banks, 8 wavefronts a matrix;
    with the exclusive or they lie in all of them. Of 16 bytes a lane a quarter goes at once."""
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
    """A load of shared memory, waited for: its unit's clock, its latency, the stall, the jump."""
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
    ],
)
def test_many_warps_take_what_their_unit_takes(line, card, unit, clocks):
    """16 warps of 32 such instructions: a unit's time, within a tenth."""
    found = pipeline.run(code_of(*[line] * 32), card, warps=4, blocks=8)
    assert found.bound == unit
    assert found.clocks == pytest.approx(8 * 4 * 32 * clocks, rel=0.1)
    assert found.busy[unit] == pytest.approx(found.clocks, rel=0.1)


def test_conflicts_cost():
    code = code_of(*["LDS R1, [R2]"] * 8)
    free = pipeline.run(code, A100, 8)
    bad = pipeline.run(code, A100, 8, conflicts=dict.fromkeys(range(8), 8.0))
    assert bad.clocks == pytest.approx(8 * 64, rel=0.1)
    assert bad.busy["shared"] == pytest.approx(8 * free.busy["shared"])


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
