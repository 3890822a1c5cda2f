"""Trials of pfgm check by the CUDA kernels, and faults that they notice."""

import re
from types import SimpleNamespace

import pytest

from benchmarks.common.executor import plain_name
from pfgm.backends import native, native_calls
from pfgm.backends.trials import EXACT, Place, allowed

OWN = "a point of its own for each of 130 × {}"
FAST = [
    "13 × 70 × 37, float32",
    "13 × 70 × 37, uint8",
    OWN.format(20),
    OWN.format(40),
    "ties and limits",
    "shells of float32, 520, D = inf",
    "shells of float32, 40, D = 1",
    "beyond float16, float32",
    "kept distances, 20 × 70 × 100",
    pytest.param("kept distances, 2100 × 40 × 8", marks=pytest.mark.slow),
    "field",
    "steps, 37",
    "normalised field, 37",
    "in small chunks",
]
# Faults of kernels: the trial that notices it; kernel, instruction, what it becomes, and whether
# this is done to the last such instruction alone.
IN_KERNELS = {
    "a level's stride is 1": (
        "field", "expand_level", r"mul\.lo\.s64 (%rd\d+), %rd\d+, (%rd\d+);",
        r"mov.b64 \1, \2;", False,
    ),
    "a level without its factor": (
        "field", "expand_level", r"mul\.f64 (%fd\d+), (%fd\d+), %fd\d+;",
        r"mov.f64 \1, \2;", False,
    ),
    "the last warp is dropped from the minima of differences": (
        OWN.format(20), "differences", r"(ld\.shared\.f64 .*\+)(\d+)\];",
        lambda match: f"{match[1]}{int(match[2]) - 64}];", True,
    ),
    "the first eight queries of differences alone": (
        "13 × 70 × 37, float32", "differences", r"(mov\.u32 %r\d+,) %ctaid\.y;", r"\1 0;", False,
    ),
    "gradients of references from the first 2048 queries alone": (
        "kept distances, 2100 × 40 × 8", "reference_gradient",
        r"add\.s32 (%r\d+), (%r\d+), 2048;", r"add.s32 \1, \2, 4096;", False,
    ),
    "sums of what float16 does not hold": (
        "beyond float16, float32", "weighted_sum", r"0f477FE000;", "0f7F7FFFFF;", False,
    ),
    "products of what float16 does not hold": (
        "beyond float16, float32", "distances", r"setp\.eq\.s32 (%p\d+), (%r\d+), -1;",
        r"setp.eq.s32 \1, \2, \2;", False,
    ),
}  # fmt: skip


@pytest.fixture(autouse=True)
def _on_a_gpu(session_executor, monkeypatch):
    """The memory of the CPU is that of a GPU, but for the exact results."""
    if session_executor is not None:
        gpu = property(lambda place: None if place is EXACT else place.device)
        monkeypatch.setattr(Place, "gpu", gpu)


@pytest.fixture
def wrong(trial_errors):
    """wrong(name) → the results of a trial that are off by more than is allowed."""

    def wrong(name):
        errors = trial_errors(name, "native")
        return {each: error for each, error in errors.items() if not error <= allowed(each)}

    return wrong


@pytest.mark.parametrize("name", FAST)
def test_a_trial_passes(name, wrong):
    assert wrong(name) == {}


def changed(kernel, pattern, by, last):
    """The text of a kernel with a fault."""
    found = list(re.finditer(pattern, kernel))
    assert found
    begin = found[-1].start() if last else 0
    return kernel[:begin] + re.sub(pattern, by, kernel[begin:])


@pytest.mark.parametrize(
    "fault",
    [
        pytest.param(fault, marks=pytest.mark.slow if "2048" in fault else ())
        for fault in IN_KERNELS
    ],
)
def test_a_fault_of_a_kernel_is_noticed(executor, wrong, fault):
    """By its results: a GPU says nothing else."""
    trial, name, pattern, *rest = IN_KERNELS[fault]
    for module, text in enumerate(executor.modules()):
        start, *kernels = re.split(r"(?=\.visible \.entry|\.entry)", text)
        faulty = [
            changed(kernel, pattern, *rest)
            if plain_name(re.search(r"\.entry (\w+)", kernel)[1]) == name
            and re.search(pattern, kernel)
            else kernel
            for kernel in kernels
        ]
        if faulty != kernels:
            with executor.replaced(module, "".join([start, *faulty])):
                assert wrong(trial)
            return
    raise AssertionError("no kernel has this instruction")


@pytest.mark.parametrize("trial", ["kept distances, 13 × 70 × 37", "kept distances, 20 × 70 × 100"])
@pytest.mark.usefixtures("executor")
def test_kept_distances_one_row_off_are_noticed(monkeypatch, wrong, trial):
    monkeypatch.setattr(native, "used_room", lambda memory: memory.roll(8 * 96))  # 70 and padding
    assert wrong(trial)


@pytest.mark.parametrize(
    ("step", "method", "places"),
    [("Heun", 0, (0, 1, 2)), ("multistep", 0, (0, 1, 2)), ("multistep", 2, (0, 2, 1))],
)
@pytest.mark.usefixtures("executor")
def test_a_wrong_method_or_level_is_noticed(monkeypatch, wrong, step, method, places):
    """A method in the place of another, or two levels that are exchanged."""
    real, number = native_calls._native.direct_step, {"Heun": 1, "multistep": 2}[step]

    def faulty(given, *rest):
        if given != number:
            return real(given, *rest)
        levels = (rest[7:10][place] for place in places)
        return real(method, *rest[:7], *levels, *rest[10:])

    monkeypatch.setattr(native_calls, "_native", SimpleNamespace(direct_step=faulty))
    assert {each.removesuffix(", mean") for each in wrong("steps, 37")} == {f"step by {step}"}
