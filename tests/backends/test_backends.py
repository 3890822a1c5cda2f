"""The choice of the backend: which ones can run, why others cannot, and their order. All backends
agree."""

import importlib.util
import math
import os
import warnings
from contextlib import nullcontext
from types import SimpleNamespace
from typing import NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import pfgm
from benchmarks.common.problems import radius_of
from pfgm import posterior_mean
from pfgm.backends import (
    Availability,
    available,
    choose,
    native,
    native_calls,
    products,
    reference,
    requested,
    triton,
)
from pfgm.backends.cuda_driver import CudaRuntime, cuda_lines, has_code_for
from pfgm.common.tensors import dequantise
from pfgm.ops import eager
from tests.backends.accuracy import assert_gradient

CPU = torch.device("cpu")
CUDA = torch.device("cuda")
META = torch.device("meta")
native_only = pytest.mark.skipif(os.environ.get("PFGM_NATIVE") == "0", reason="PFGM_NATIVE=0")


@pytest.fixture(autouse=True)
def _environment(monkeypatch):
    monkeypatch.delenv("PFGM_BACKEND", raising=False)


@pytest.fixture
def used(monkeypatch):
    """The names of the backends that computed, in order."""
    names = []
    for name, module in (("native", native), ("torch", products), ("reference", reference)):

        def spy(*args, name=name, original=module.posterior_mean):
            names.append(name)
            return original(*args)

        monkeypatch.setattr(module, "posterior_mean", spy)

    def direct(*args, original=native_calls.posterior_mean, **options):
        result = original(*args, **options)
        if result is not None:
            names.append("native")
        return result

    monkeypatch.setattr(eager, "posterior_mean", direct)
    return names


def built_for(monkeypatch, architectures):
    """Pretends that the extension was built for these architectures."""
    extension = native._native
    info = {**extension.build_info(), "cuda_architectures": architectures}
    stand_in = SimpleNamespace(
        build_info=lambda: info,
        cpu_isa=extension.cpu_isa,
        cuda_problem=lambda index: "",
        cuda_versions=lambda: (13000, 13000),
    )
    monkeypatch.setattr(native, "_native", stand_in)


@pytest.fixture
def with_cuda(monkeypatch):
    built_for(monkeypatch, "90-real")


def one_gpu(monkeypatch, capability):
    """Torch has one GPU, of which nothing is known yet."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(native, "_able", set())
    native._warn_of_compilation.cache_clear()
    native._warn_of_unused_gpu.cache_clear()


def compute(**arguments):
    return posterior_mean(torch.zeros(1, 2), torch.ones(3, 2), r=1.0, **arguments)


@native_only
def test_available_describes_every_backend_on_the_cpu():
    answers = available()
    assert set(answers) == {"native", "triton", "torch", "reference"}
    assert all(isinstance(answer, Availability) for answer in answers.values())
    assert answers["native"].usable
    assert f", {torch.get_num_threads()} thread" in answers["native"].detail
    assert answers["reference"] == Availability(True, reference.describe())


@pytest.mark.parametrize(
    ("device", "dtype", "references", "name", "reason"),
    [
        ("cuda", torch.float64, None, "native", "in float32 on a GPU, not torch.float64"),
        ("meta", torch.float32, None, "native", "not on meta"),
        ("cpu", torch.bfloat16, None, "native", "not torch.bfloat16"),
        ("cpu", torch.bfloat16, None, "reference", "not torch.bfloat16"),
        ("cpu", torch.float32, None, "triton", "not on cpu"),
        ("cuda", torch.float64, None, "triton", "not torch.float64"),
        ("cuda", torch.float32, torch.float64, "triton", "references in torch.float32, "),
    ],
)
@native_only
@pytest.mark.usefixtures("with_cuda")
def test_a_backend_that_cannot_run_says_why(device, dtype, references, name, reason):
    answer = available(device, dtype, references)[name]
    assert not answer.usable
    assert reason in answer.detail


def test_torch_and_reference_run_on_every_device():
    for device in ("cpu", "cuda", "mps", "meta"):
        answers = available(device)
        assert answers["torch"].usable
        assert answers["reference"].usable


@native_only
@pytest.mark.usefixtures("with_cuda")
def test_the_extension_on_a_gpu(monkeypatch):
    assert available("cuda")["native"].usable
    assert "CUDA kernels for 90-real" in available("cuda")["native"].detail
    for references in (torch.float32, torch.bfloat16, torch.float16, torch.uint8):
        assert choose("native", CUDA, torch.float32, references) is native
    reason = native.supports(CUDA, torch.float32, torch.float64)
    assert "it reads references in torch.float32" in reason
    assert "not torch.float64" in reason
    monkeypatch.setattr(torch.version, "hip", "6.0")
    assert "NVIDIA" in available("cuda")["native"].detail


@native_only
@pytest.mark.usefixtures("with_cuda")
@pytest.mark.parametrize(
    ("capability", "problem", "reason"),
    [
        ((7, 5), "", "need compute capability 8.0"),
        ((8, 0), "", None),
        ((12, 0), "", None),
        ((9, 0), "driver version is insufficient", "cannot run on cuda:0: driver version is"),
    ],
)
def test_available_says_why_a_gpu_cannot_run_the_extension(
    monkeypatch, capability, problem, reason
):
    one_gpu(monkeypatch, capability)
    native._native.cuda_problem = lambda index: problem
    with pytest.warns(RuntimeWarning, match=reason) if problem else nullcontext():
        answer = native.supports(CUDA, torch.float32)
    assert answer is None if reason is None else reason in answer
    assert native.supports(CUDA, torch.float32) == answer  # with no second warning


@pytest.mark.parametrize(
    ("capability", "architectures", "has"),
    [
        ((8, 0), "80 90-real", True),
        ((8, 9), "80 90-real", True),
        ((9, 0), "80 90-real", True),
        ((10, 0), "80 90-real 100-real 120", True),
        ((10, 3), "80 90-real 100-real 120", True),
        ((12, 1), "80 90-real 100-real 120", True),
        ((10, 0), "80 90-real", False),
        ((9, 0), "80-virtual", False),
        ((8, 0), "86", False),
        ((10, 3), "100a-real", False),
        ((10, 0), "100a-real", True),
        ((11, 0), "80 90-real 100-real 120", False),
    ],
)
def test_the_gpus_for_which_a_build_has_code(capability, architectures, has):
    assert has_code_for(capability, architectures) == has


@native_only
@pytest.mark.usefixtures("with_cuda")
def test_a_gpu_for_which_the_driver_compiles_is_said_once(monkeypatch):
    one_gpu(monkeypatch, (12, 0))
    for expected in (1, 0):
        monkeypatch.setattr(native, "_able", set())
        with warnings.catch_warnings(record=True) as warned:
            warnings.simplefilter("always")
            assert native.supports(torch.device("cuda", 0), torch.float32) is None
        assert len(warned) == expected
        assert all("sm_120" in str(warning.message) for warning in warned)


@native_only
@pytest.mark.parametrize("capability", [(9, 0), (12, 0)])
@pytest.mark.usefixtures("with_cuda")
def test_a_driver_that_is_too_old_compiles_nothing(monkeypatch, capability):
    """No warning says that it does, and the reason has the remedy. Code of the GPU's own needs no
    compiler."""
    one_gpu(monkeypatch, capability)
    native._native.cuda_versions = lambda: (13000, 12080)
    native._native.cuda_problem = lambda index: "unsupported toolchain"
    with pytest.warns(RuntimeWarning, match="unsupported toolchain") as warned:
        reason = native.supports(torch.device("cuda", 0), torch.float32)
    assert len(warned) == 1
    too_old = "the driver, for CUDA 12.8, cannot compile them: update it to one for CUDA 13.0 or"
    assert (too_old in reason) == (capability == (12, 0))


@native_only
@pytest.mark.usefixtures("with_cuda", "proven")
def test_a_gpu_that_was_busy_is_used_again(monkeypatch):
    one_gpu(monkeypatch, (9, 0))
    problems = ["out of memory", "out of memory", "all devices are busy", "", "out of memory"]
    native._native.cuda_problem = lambda index: problems.pop(0)
    gpu = torch.device("cuda", 0)
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        assert "out of memory" in native.supports(gpu, torch.float32)
        assert not native_calls._runs_on(gpu, torch.float32, None)
        assert choose(None, gpu, torch.float32) is products
        monkeypatch.setattr(native_calls, "_supported", set())
        assert native_calls._runs_on(gpu, torch.float32, None)
        assert native_calls._runs_on(gpu, torch.float32, None)
        assert choose(None, gpu, torch.float32) is native
    assert problems == ["out of memory"]
    texts = [str(warning.message) for warning in warned]
    assert [text.rpartition(": ")[2] for text in texts] == ["out of memory", "all devices are busy"]
    assert all("native backend is not used while its GPU kernels cannot run" in t for t in texts)


@native_only
@pytest.mark.usefixtures("proven")
def test_an_extension_without_cuda(monkeypatch):
    built_for(monkeypatch, None)
    assert "built without CUDA" in available("cuda")["native"].detail
    assert "CUDA" not in available("cpu")["native"].detail
    assert choose(None, CUDA, torch.float32) is products


@native_only
@pytest.mark.usefixtures("with_cuda", "proven", "gpus")
def test_order():
    assert choose(None, CPU, torch.float32) is native
    assert choose(None, CPU, torch.float64) is native
    assert choose(None, CUDA, torch.float32, torch.uint8) is native
    assert choose(None, META, torch.float32) is products
    assert choose("reference", CUDA, torch.float64) is reference
    with pytest.raises(TypeError, match=r"x must be torch\.float32 or.*got torch\.float16\."):
        choose(None, CPU, torch.float16)


@pytest.mark.parametrize("device", [CPU, CUDA])
@pytest.mark.parametrize("architectures", ["90-real", None])
@native_only
@pytest.mark.usefixtures("proven", "gpus")
def test_without_triton(monkeypatch, device, architectures):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    built_for(monkeypatch, architectures)
    assert available(device)["triton"] == Availability(False, "the package triton is not installed")
    assert choose(None, CUDA, torch.float32) is (native if architectures else products)


def test_an_old_triton_is_refused_in_a_sentence(monkeypatch):
    monkeypatch.setattr(triton.importlib.util, "find_spec", lambda name: True)
    for version, usable in (("3.2.0", False), ("3.5.1+git1234", False), ("3.10.0", True)):
        monkeypatch.setattr(
            triton.importlib.metadata, "version", lambda name, version=version: version
        )
        triton._version.cache_clear()
        reason = triton.supports(torch.device("cuda"), torch.float32)
        assert (reason is None) == usable
        if not usable:
            short = ".".join(version.split(".")[:2])
            assert reason.startswith(
                f"Triton {short} is installed, but its kernels need 3.6 or later"
            )
    monkeypatch.undo()
    triton._version.cache_clear()


def test_without_the_extension(monkeypatch):
    monkeypatch.setattr(native, "_native", None)
    monkeypatch.setattr(native, "_why_missing", "pfgm was installed with PFGM_NATIVE=0")
    monkeypatch.setattr(native_calls, "available", False)
    assert choose(None, CPU, torch.float32) is products
    assert not available()["native"].usable
    assert "PFGM_NATIVE=0" in available()["native"].detail
    with pytest.raises(RuntimeError, match="PFGM_NATIVE=0"):
        native.extension()
    with pytest.raises(RuntimeError, match=r"backend='native' cannot run here: .*PFGM_NATIVE=0"):
        compute(backend="native")


@native_only
def test_only_a_broken_extension_is_an_error(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert native._load()[0] is None
    monkeypatch.undo()

    def broken(name):
        raise ImportError("undefined symbol")

    monkeypatch.setattr(native.importlib, "import_module", broken)
    with pytest.raises(ImportError, match="undefined symbol"):
        native._load()


@native_only
def test_argument_before_context_before_environment(monkeypatch, used):
    def assert_used(name, **arguments):
        compute(**arguments)
        assert used.pop() == name
        assert not used

    assert_used("native")
    monkeypatch.setenv("PFGM_BACKEND", "reference")
    assert_used("reference")
    with pfgm.use_backend("native"):
        assert_used("native")
        assert_used("reference", backend="reference")
        with pfgm.use_backend("reference"):
            assert_used("reference")
        assert_used("native")
    assert_used("reference")
    monkeypatch.setenv("PFGM_BACKEND", "")
    assert_used("native")


def test_use_backend_ends_with_its_context():
    assert requested() is None
    with pfgm.use_backend("reference"):
        assert requested() == "reference"
    assert requested() is None
    with (
        pytest.raises(ValueError, match=r"references must.*got none\."),
        pfgm.use_backend("reference"),
    ):
        posterior_mean(torch.zeros(1, 2), torch.zeros(0, 2), r=1.0)
    assert requested() is None


def test_unknown_names_are_refused(monkeypatch):
    for name in ("numpy", 3, []):
        message = r"use_backend's name must be one of native, .*, got "
        with pytest.raises(ValueError, match=message), pfgm.use_backend(name):
            pass
    with pytest.raises(ValueError, match=r"backend must be one of native,.*got 'numpy'\."):
        compute(backend="numpy")
    monkeypatch.setenv("PFGM_BACKEND", "numpy")
    with pytest.raises(ValueError, match=r"PFGM_BACKEND must be one of.*got 'numpy'\."):
        compute()


@native_only
def test_a_forced_backend_that_cannot_run_raises_with_the_reason(monkeypatch):
    with pytest.raises(RuntimeError) as caught:
        choose("native", META, torch.float32)
    assert str(caught.value) == (
        "backend='native' cannot run here: its kernels run on the CPU and on NVIDIA GPUs, not on "
        "meta."
    )
    monkeypatch.setenv("PFGM_BACKEND", "native")
    with pytest.raises(RuntimeError, match=r"^PFGM_BACKEND='native' cannot run here: .*on meta"):
        choose(None, META, torch.float32)


DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.uint8]
# Powers of two: about 1e-40 (subnormal in float32), 1, 1e18 and 1e30.
SCALES = [2.0**-133, 1.0, 2.0**60, 2.0**100]
LAYOUTS = ["plain", "transposed", "sliced", "expanded"]


class Drawn(NamedTuple):
    x: Tensor
    references: Tensor
    sigma: Tensor
    D: float
    generator: torch.Generator


def laid_out(values: Tensor, layout: str) -> Tensor:
    """The values, or the first row for all, in memory of that layout."""
    if layout == "transposed":
        return values.t().contiguous().t()
    if layout == "sliced":
        whole = values.new_ones(2 * values.shape[0], 3 * values.shape[1])
        return whole[::2, ::3].copy_(values)
    return values[:1].expand(values.shape) if layout == "expanded" else values


@st.composite
def drawn(draw, scales, points, levels):
    """References on a grid, so that ties are exact; some or all of them equal."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 99)))
    N = draw(st.integers(1, 40) | st.sampled_from([520, 600]))
    B = draw(st.integers(1, 12) if N <= 40 else st.sampled_from([3, 48]))
    M = draw(st.integers(1, 80))
    dtype, reference_dtype = draw(st.sampled_from(DTYPES[:2])), draw(st.sampled_from(DTYPES))
    scale = draw(st.sampled_from(scales))
    distinct = draw(st.sampled_from([1, M // 4 + 1, M]))
    grid = torch.randint(0, 129, (distinct, N), generator=generator)
    if reference_dtype == torch.uint8:
        references = grid.to(torch.uint8)
    else:
        references = ((grid.double() / 64 - 1) * scale).to(reference_dtype)
    references = references[torch.randint(0, distinct, (M,), generator=generator)]
    references = laid_out(references, draw(st.sampled_from(LAYOUTS)))

    y = dequantise(references, torch.float64)
    size = 1.0 if reference_dtype == torch.uint8 else scale
    first, second = y[torch.randint(0, M, (2, B), generator=generator)]
    noise = 0.2 * size * torch.randn(B, N, generator=generator, dtype=torch.float64)
    # Bytes are not on a grid of binary numbers: rounding decides which reference of a tie is
    # nearest.
    if reference_dtype == torch.uint8:
        points = [name for name in points if name != "tie"]
    named = {"near": first + noise, "on": first, "tie": (first + second) / 2}
    chosen = draw(st.lists(st.sampled_from(points), min_size=B, max_size=B))
    x = torch.stack([named[name][b] for b, name in enumerate(chosen)]).to(dtype)
    x = laid_out(x, draw(st.sampled_from(LAYOUTS)))
    level = draw(st.lists(st.sampled_from(levels), min_size=B, max_size=B))
    D = draw(st.sampled_from([0.5, 1.0, 64.0, 1e6, math.inf]))
    return Drawn(x, references, size * torch.tensor(level, dtype=torch.float64), D, generator)


def names(x, references):
    answers = available(CPU, x.dtype, references.dtype)
    usable = [name for name, answer in answers.items() if answer.usable]
    # Matrix units treat subnormal float32 numbers as zero.
    subnormal = (x.abs() < torch.finfo(torch.float32).smallest_normal).all()
    return [name for name in usable if not (name == "triton" and subnormal)]


def result_of(problem, name):
    """Mean and log-sum-exp, or the text of the ValueError."""
    x, references, sigma, D, _ = problem
    try:
        return posterior_mean(x, references, sigma=sigma, D=D, return_logsumexp=True, backend=name)
    except ValueError as error:
        return str(error)


def limit(point, y, D):
    """The nearest references' average; log-sum-exp at sigma = 0, D = ∞, and at s = 0."""
    squared = (point - y).square().sum(1)
    nearest = squared == squared.min()
    on = squared.min() == 0
    lse = math.inf if not math.isinf(D) else math.log(nearest.sum()) if on else -math.inf
    return y[nearest].mean(0), lse


def expectation(problem, oracle):
    """Mean and log-sum-exp, with the limits where the formula has none."""
    x, references, _, D, _ = problem
    # Contiguous, or torch may sum equal rows in another order.
    radius, y = (
        radius_of(problem.sigma, problem.D),
        dequantise(references, torch.float64).contiguous(),
    )
    mean, lse = torch.empty(x.shape, dtype=torch.float64), torch.empty(len(x), dtype=torch.float64)
    for b, point in enumerate(x.double()):
        on = bool((point == y).all(1).any())
        if radius[b] == 0 and (on or math.isinf(D)):
            mean[b], lse[b] = limit(point, y, D)
        else:
            row = slice(b, b + 1)
            mean[row], lse[row] = oracle(x[row], references, radius[row], D)
    return mean, lse


@settings(deadline=None, derandomize=True, max_examples=80)
@given(problem=drawn(SCALES, ["near", "on", "tie"], [0.0, 0.01, 0.1, 1.0, 1000.0]))
def test_backends_agree_with_the_oracle(oracle, problem):
    x, references = problem.x, problem.references
    results = {name: result_of(problem, name) for name in names(x, references)}
    if not (x.isfinite().all() and references.isfinite().all()):
        messages = set(results.values())
        assert len(messages) == 1
        assert "NaN or infinity" in messages.pop()
        return
    tolerance = 2e-5 if x.dtype == torch.float32 else 1e-9
    wanted_mean, wanted_lse = expectation(problem, oracle)
    largest = dequantise(references, torch.float64).norm(dim=1).max()
    # Each product of a weight and a subnormal number is rounded to the smallest of them.
    grain = torch.finfo(x.dtype).smallest_normal * torch.finfo(x.dtype).eps
    allowed = tolerance * largest + grain * len(references) * x.shape[1] ** 0.5
    for name, (mean, lse) in results.items():
        assert ((mean.double() - wanted_mean).norm(dim=1) <= allowed).all(), name
        error = torch.where(lse == wanted_lse, 0.0, (lse - wanted_lse).abs())
        assert (error <= tolerance * wanted_lse.abs().clamp(min=1)).all(), name


@settings(deadline=None, derandomize=True, max_examples=60)
@given(problem=drawn([1.0], ["near"], [0.2, 0.5, 1.0, 30.0]))
def test_gradients_of_backends_agree_with_the_oracle(oracle_gradients, problem):
    x, references, sigma, D, generator = problem
    G = torch.randn(x.shape, generator=generator, dtype=torch.float64).to(x.dtype)
    # With sigma² the score weighs as much as the gradient of the mean.
    g = sigma.square().clamp(max=1) * torch.randn(len(x), generator=generator, dtype=torch.float64)
    grad_x, grad_y, grad_radius = oracle_gradients(
        x, references, radius_of(problem.sigma, problem.D), D, G, g
    )
    wanted = [grad_x, grad_radius * radius_of(problem.sigma, problem.D) / sigma]
    inputs = [x.detach().requires_grad_(), sigma.detach().requires_grad_()]
    if references.is_floating_point():
        references = references.detach().requires_grad_()
        inputs.append(references)
        wanted.append(grad_y)
    # The rounding of the float32 mean in the backward pass is visible if many references are equal.
    tolerance = 1e-4 if x.dtype == torch.float32 else 1e-9
    for name in names(x, references):
        mean, lse = posterior_mean(
            inputs[0], references, sigma=inputs[1], D=D, return_logsumexp=True, backend=name
        )
        gradients = torch.autograd.grad((mean, lse), inputs, (G, g))
        for index, (actual, expected) in enumerate(zip(gradients, wanted, strict=True)):
            # In the gradient of a reference, parts of many points may cancel. They are of the size
            # of G / M.
            part = G.double().norm().item() / len(references) if index == 2 else 0.0
            assert_gradient(
                actual, expected, max(tolerance, 2 * torch.finfo(actual.dtype).eps), part
            )


NEEDED = "runtime 13.0, needs NVIDIA driver 580 or later; "
NEW_ENOUGH = (
    f"{NEEDED}the driver, for CUDA 13.0, is new enough\nGPUs       H100 (sm_90), L4 (sm_89)"
)
OLDER = (
    "runtime 13.2, needs NVIDIA driver 580 or later; the driver, for CUDA 13.1, is new enough\n"
    "GPUs       none is detected"
)
ANY_14 = (
    "runtime 14.1, needs an NVIDIA driver for CUDA 14 or later; the driver, for CUDA 13.0, is too "
    "old"
)


@pytest.mark.parametrize(
    ("runtime", "names", "error", "lines"),
    [
        ((0, 0, None), [], "built without CUDA", "built without CUDA"),
        ((13000, 0, "580"), [], "misleading", f"{NEEDED}there is no NVIDIA driver"),
        ((13000, 12080, "580"), [], "-", f"{NEEDED}the driver, for CUDA 12.8, is too old"),
        ((13000, 13000, "580"), ["H100 (sm_90)", "L4 (sm_89)"], "", NEW_ENOUGH),
        # Within a major version an older driver suffices.
        ((13020, 13010, "580"), [], "none is detected", OLDER),
        ((14010, 13000, ""), [], "misleading", ANY_14),
    ],
)
def test_info_says_which_driver_cuda_needs(runtime, names, error, lines):
    shown = cuda_lines(CudaRuntime(*runtime), names, error)
    assert shown == f"CUDA       {lines}".splitlines()


@native_only
def test_the_extension_says_which_driver_its_runtime_needs():
    version, _ = native.extension().cuda_versions()
    info = native.extension().build_info()
    assert (version == 0) == (info["cuda_architectures"] is None) == (info["cuda_driver"] is None)
    assert (version == 0) == (info["nvcc"] is None)
    if version // 1000 == 13:
        assert info["cuda_driver"] == "580"
    assert any(line.startswith("CUDA       ") for line in native.build_lines())
