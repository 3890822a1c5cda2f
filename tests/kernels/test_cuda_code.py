"""The installed machine code of the CUDA kernels: no kernel spills registers, and all are there."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from pfgm.backends import native

CSRC = Path(__file__).resolve().parents[2] / "csrc"
KERNEL = re.compile(r"__global__\s+void\s+__launch_bounds__\((?:[^()]|\([^()]*\))*\)\s*(\w+)\s*\(")
INSTRUCTION = re.compile(r"/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)([^;]*)")
# By patterns of names: what code must have. Copies and accesses are of 16 bytes.
INTENTS = {
    r"distances<|weighted_sum<[^()]*true>": [r"HMMA\S*16816", r"LDGSTS\S*\.128"],
    r"weighted_sum<|reference_gradient<": [r"HMMA\S*TF32", r"LDGSTS\S*\.128"],
    r"differences<": [r"LDGSTS\S*\.128"],
    r"(ode_step|normalised_field)_kernel<4|finish_distances<[^()]*false>": [
        r"LDG\S*\.(128|256)", r"STG\S*\.(128|256)",
    ],
}  # fmt: skip
PREFIXES = r"^void |pfgm::|\(anonymous namespace\)::"
FLUSHES = r"F(ADD|MUL|FMA|SETP)\S*\.FTZ"
DOUBLE = r"D(ADD|MUL|FMA|SETP)|\S*\.F64"


def architectures(built: str | None) -> list[str]:
    """The architectures with machine code, such as "80"."""
    return re.findall(r"\b(\d+[af]?)(?:-real)?(?=\s|$)", built or "")


def built() -> list[str]:
    info = {} if native._native is None else native._native.build_info()
    return architectures(info.get("cuda_architectures"))


def cuobjdump() -> str | None:
    try:
        from triton import knobs

        return str(knobs.nvidia.cuobjdump.path)
    except (ImportError, RuntimeError):  # no Triton, or one without the tool
        return shutil.which("cuobjdump")


def loops(code: list[tuple[str, str, str]]) -> list[list[str]]:
    """The instructions between the target of each branch backwards and the branch."""
    spans = []
    for at, name, operands in code:
        target = re.search("0x([0-9a-f]+)", operands) if name.startswith("BRA") else None
        if target and int(target[1], 16) < int(at, 16):
            spans.append((int(target[1], 16), int(at, 16)))
    return [[name for at, name, _ in code if first <= int(at, 16) <= last] for first, last in spans]


def flaws(name: str, usage: str, text: str) -> list[str]:
    """What is wrong with a kernel, whose resources and code cuobjdump has printed."""
    code = INSTRUCTION.findall(text)

    def has(pattern: str, names: list[str]) -> bool:
        return any(re.match(pattern, each) for each in names)

    spilled = sum(int(n) for n in re.findall(r"\b(?:STACK|LOCAL):(\d+)", usage))
    everything = [each for _, each, _ in code]
    wanted = next((p for names, p in INTENTS.items() if re.match(names, name)), [])
    wrong = [f"spills {spilled} bytes"] * (spilled > 0)
    wrong += [f"has no {p}" for p in wanted if not has(p, everything)]
    wrong += ["flushes subnormal numbers"] * has(FLUSHES, everything)
    wrong += ["multiplies matrices and computes in float64 in one loop"] * any(
        has("HMMA", loop) and has(DOUBLE, loop) for loop in loops(code)
    )
    return wrong


def all_flaws(text: str) -> list[tuple[str, list[str]]]:
    """Each kernel and its flaws, in what cuobjdump prints for one architecture."""
    usage = re.findall(r"^ Function (\S+):\n(.*)$", text, re.MULTILINE)
    codes = {s: c for s, _, c in (p.partition("\n") for p in text.split("\tFunction : ")[1:])}
    names = [re.sub(PREFIXES, "", torch._C._demangle(symbol)) for symbol, _ in usage]
    return [
        (name, flaws(name, figures, codes[symbol]))
        for name, (symbol, figures) in zip(names, usage, strict=True)
    ]


@pytest.mark.skipif(
    not built() or cuobjdump() is None,
    reason="the machine code of the CUDA kernels is NOT CHECKED: install nvcc, and pfgm again",
)
@pytest.mark.parametrize("architecture", built() or ["none"])
def test_no_kernel_spills(architecture):
    command = [cuobjdump(), "--dump-resource-usage", "--dump-sass"]
    command += ["--gpu-architecture", f"sm_{architecture}", native._native.__file__]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    found = all_flaws(done.stdout)
    sources = [path.read_text() for path in (CSRC / "cuda").glob("*.*")]
    kernels = [name for text in sources for name in KERNEL.findall(text)]
    assert len(kernels) == sum(text.count("__global__") for text in sources), "no launch bounds"
    assert {re.match(r"\w+", name)[0] for name, _ in found} == set(kernels)
    assert [(name, wrong) for name, wrong in found if wrong] == []


SUM = "_ZN4pfgm55_GLOBAL__N__b92e854f_22_posterior_mean_cuda_cu_e5a4334612weighted_sumIfLb0EEEvi"
GOOD = ["HMMA.1688.F32.TF32 R4, R8, R12, R4", "LDGSTS.E.BYPASS.128 [R3], [R2]", "FADD R1, R2, R3"]
GOOD += ["@P0 BRA 0x0", "DADD R2, R2, R4", "EXIT", "BRA 0x60"]


@pytest.mark.parametrize(
    ("usage", "code", "wrong"),
    [
        ("STACK:0 LOCAL:0", GOOD, []),
        ("STACK:16 LOCAL:8", GOOD, ["spills 24 bytes"]),
        ("STACK:0", ["NOP"] * 9, [r"has no HMMA\S*TF32", r"has no LDGSTS\S*\.128"]),
        ("STACK:0", [*GOOD, "@!P1 FFMA.FTZ R1, R2, R3, R4"], ["flushes subnormal numbers"]),
        (
            "STACK:0",
            [*GOOD, "@P0 BRA 0x0"],
            ["multiplies matrices and computes in float64 in one loop"],
        ),
    ],
)
def test_flaws_are_found(usage, code, wrong):
    lines = "\n".join(f"        /*{16 * i:04x}*/    {line} ;" for i, line in enumerate(code))
    text = f"\n Function {SUM}:\n  REG:124 {usage}\n\tcode for sm_80\n\t\tFunction : {SUM}\n{lines}"
    assert all_flaws(text) == [("weighted_sum<float, false>(int)", wrong)]


@pytest.mark.parametrize(
    ("text", "expected"),
    [("80-real 90-real 120", ["80", "90", "120"]), ("80-virtual 90a", ["90a"]), (None, [])],
)
def test_architectures(text, expected):
    assert architectures(text) == expected


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
        f"include({CSRC / 'architectures.cmake'})\n"
        f'pfgm_architectures(result "{capabilities}" "{known}")\nmessage("${{result}}")\n'
    )
    cmake = Path(sys.executable).parent / "cmake"
    done = subprocess.run([cmake, "-P", script], capture_output=True, text=True, check=True)
    assert done.stderr.strip() == expected
