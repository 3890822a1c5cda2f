"""Tests of the kernels for GPUs, on a GPU with every backend that can run there.

Without a GPU the PTX of the kernels runs in the executor of the build that ``PFGM_PTX`` names: that
of Triton, compiled for the capability ``PFGM_PTX_TRITON``, or else that of the CUDA kernels. The
kernels of Triton also run in its interpreter (``TRITON_INTERPRET=1``, set before it is imported).
tests/kernels/test_triton.py and tests/kernels/test_cuda.py start processes with one of these.
"""

import dataclasses
import math
import os
from types import SimpleNamespace

import pytest
import torch

from benchmarks.common import executor as ptx
from pfgm.backends import native, triton
from pfgm.backends.backend import BACKENDS as MODULES
from pfgm.backends.trials import EXACT, TRIALS, Place
from pfgm.common.tensors import dequantise
from pfgm.core.problems import PosteriorMean, State, Upstream
from pfgm.ops import eager
from tests.backends.accuracy import assert_accurate, assert_gradient


def backends() -> list[str]:
    """The backends that run in this process."""
    if ptx.FOLDER is not None:
        return ["triton" if os.environ.get("PFGM_PTX_TRITON") else "native"]
    if triton.interpreted():
        return ["triton"]
    device = torch.device("cuda")
    modules = {"triton": triton, "native": native} if torch.cuda.is_available() else {}
    return [name for name, module in modules.items() if not module.supports(device, torch.float32)]


BACKENDS = backends()
collect_ignore_glob = [
    pattern
    for pattern, needed in (("triton/*", {"triton"}), ("cuda/*", {"native"}), ("test_*", None))
    if not (BACKENDS if needed is None else needed.intersection(BACKENDS))
]


@pytest.fixture(scope="session", autouse=True)
def device(session_executor):
    """A GPU, or the CPU in its place."""
    if session_executor is None:
        yield torch.device("cpu" if triton.interpreted() else "cuda")
        return
    if BACKENDS == ["triton"]:
        from benchmarks.common.triton_executor import in_place_of_a_gpu

        replaced = in_place_of_a_gpu(session_executor)
    else:
        replaced = ptx.in_place_of_a_gpu(ptx.FOLDER)
    with replaced:
        yield torch.device("cpu")


@pytest.fixture(scope="session")
def session_executor():
    return None if ptx.FOLDER is None else ptx.Executor(ptx.FOLDER)


@pytest.fixture(autouse=True)
def nothing_is_wrong(session_executor):
    """The executor has found no access out of bounds, no race and nothing else that is wrong."""
    yield
    if session_executor is not None:
        assert session_executor.errors() == []


@pytest.fixture(scope="session", autouse=True)
def quick_interpreter():
    """Triton's interpreter, in less than half its time.

    It patches Triton's language for a launch, and again for each function that a kernel calls: here
    once for all. It computes the types and the shapes of each value anew, and compares them: here
    once for each type and shape. And it computes whether integers overflow, of which it makes no
    use.
    """
    if not triton.interpreted():
        yield
        return
    from triton.runtime import interpreter

    with pytest.MonkeyPatch.context() as patch:
        types_once(patch, interpreter)
        builder = interpreter.interpreter_builder
        options = dataclasses.replace(builder.options, sanitize_overflow=False)
        patch.setattr(builder, "options", options)
        patched = patch_once(patch, interpreter)
        yield
        patched.restore()


def patch_once(patch, interpreter):
    from triton import language

    names = {"tl": language, "core": language.core}
    patched = interpreter._patch_lang(SimpleNamespace(__globals__=names))
    nothing = SimpleNamespace(restore=lambda: None)
    patch.setattr(interpreter, "_patch_lang", lambda function: nothing)
    return patched


def types_once(patch, interpreter):
    from triton.language import core

    semantic = type(interpreter.interpreter_semantic)
    dtype_of, describe = interpreter._get_np_dtype, core.block_type.__init__
    fit = semantic.broadcast_impl_value
    dtypes, blocks, shapes, constants = {}, {}, {}, {}

    def numpy_dtype(dtype):
        if dtype.name not in dtypes:
            dtypes[dtype.name] = dtype_of(dtype)
        return dtypes[dtype.name]

    def block(self, element, shape):
        sizes = tuple(getattr(size, "value", size) for size in shape)
        key = element.name, sizes
        if key not in blocks:
            describe(self, element, shape)
            self.shape = shapes.setdefault(sizes, self.shape)
            blocks[key] = vars(self)
        self.__dict__ = blocks[key]

    def start(tensor, handle, dtype):
        sizes = dtype.shape if dtype.is_block() else ()
        if sizes not in constants:
            shape = core.tuple([core.constexpr(size) for size in sizes])
            constants[sizes] = shape, core.constexpr(math.prod(sizes))
        tensor.handle, tensor.type, tensor.dtype = handle, dtype, dtype.scalar
        tensor.shape, tensor.numel = constants[sizes]

    def broadcast(self, a, b):
        blocks = a.type.is_block() and b.type.is_block()
        return (a, b) if blocks and a.type.shape is b.type.shape else fit(self, a, b)

    patch.setattr(interpreter, "_get_np_dtype", numpy_dtype)
    patch.setattr(core.block_type, "__init__", block)
    patch.setattr(core.tensor, "__init__", start)
    patch.setattr(semantic, "broadcast_impl_value", broadcast)


@pytest.fixture(params=BACKENDS)
def backend(request):
    return request.param


@pytest.fixture(params=["direct", "operators"] if "native" in BACKENDS else ["operators"])
def way(request, monkeypatch):
    """The native backend's two ways: one call of the extension, and torch's operators."""
    if request.param == "operators":
        monkeypatch.setattr(eager, "enabled", False)
    return request.param


@pytest.fixture
def limits():
    """limits(…): smaller blocks and chunks of the CUDA kernels."""
    limit = native.extension().limit_cuda
    yield limit
    limit()


@pytest.fixture
def executor(session_executor):
    """The executor, whose device and order of threads a test may change."""
    if session_executor is None:
        pytest.skip("a GPU cannot be changed")
    yield session_executor
    session_executor.order(0)
    session_executor.device(int(os.environ.get("PFGM_PTX_TRITON", "90")))


@pytest.fixture
def poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fills uninitialised tensors with NaN, so that a test notices results that are not written."""
    owners = [(torch, name) for name in ("empty", "empty_like", "empty_strided")]
    for owner, name in [*owners, (torch.Tensor, "new_empty")]:
        original = getattr(owner, name)

        def filled(*args, original=original, **kwargs):
            tensor = original(*args, **kwargs)
            if tensor.is_floating_point():
                return tensor.fill_(float("nan"))
            return tensor.fill_(255 if tensor.dtype == torch.uint8 else 77)

        monkeypatch.setattr(owner, name, filled)


@pytest.fixture
def small(request: pytest.FixtureRequest, backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Chunks of 128 references, blocks of 17 queries, and few partial sums."""
    if backend == "native":
        limits = request.getfixturevalue("limits")
        limits(pairs=600, parts=1, queries=17, references=128)
        return
    from pfgm.kernels import distances

    monkeypatch.setattr(distances, "MAX_PAIRS", 600)
    monkeypatch.setattr(distances, "MAX_QUERIES", 17)


class Operation:
    """The posterior mean and its gradients in one backend, compared with the oracle."""

    def __init__(self, backend, device, oracle, oracle_gradients):
        self.module = {"native": native, "triton": triton}[backend]
        self.device, self.oracle, self.oracle_gradients = device, oracle, oracle_gradients

    def problem(self, B, M, N, *, dtype=torch.float32, seed=0, device=None):
        """Points between their own reference and another: some rows have one weight, some many."""
        generator = torch.Generator().manual_seed(seed)
        references = torch.rand(M, N, generator=generator) * 2 - 1
        if dtype == torch.uint8:
            references = ((references + 1) * 127.5).round()
        references = references.to(dtype)
        y = dequantise(references, torch.float32)
        index, other = (torch.randint(0, M, (B,), generator=generator) for _ in range(2))
        fraction = 0.5 * torch.rand(B, 1, generator=generator)
        x = y[index] + fraction * (y[other] - y[index])
        x += 0.2 * torch.randn(B, N, generator=generator)
        sigma = 10 ** (3 * torch.rand(B, generator=generator, dtype=torch.float64) - 2)
        return tuple(t.to(device or self.device) for t in (x, references, sigma))

    @staticmethod
    def radius_of(sigma, D):
        return sigma if math.isinf(D) else sigma * math.sqrt(D)

    def near_ties(self, B, M, N, offset):
        """Points between two references that are much nearer to each other than to the origin."""
        generator = torch.Generator().manual_seed(1)
        references = torch.randn(M, N, generator=generator).mul_(2**-6).add_(offset)
        pair = references[torch.randint(0, M, (2, B), generator=generator)]
        x = pair.mean(0) + 1e-3 * torch.randn(B, N, generator=generator)
        return x.to(self.device), references.to(self.device)

    def compute(self, x, references, radius, D):
        """Mean and log-sum-exp."""
        return self.module.posterior_mean(PosteriorMean(x, references, radius, D))[:2]

    def expected(self, x, references, radius, D):
        return self.oracle(x.cpu(), references.cpu(), radius.cpu(), D)

    def check(self, x, references, radius, D, tolerance=1e-5):
        result = self.compute(x, references, radius, D)
        expected = self.expected(x, references, radius, D)
        assert_accurate(result, expected, references, tolerance)

    def mean_error(self, x, references, radius, D):
        """The largest error of a mean."""
        mean, _ = self.compute(x, references, radius, D)
        expected, _ = self.expected(x, references, radius, D)
        return (mean.double().cpu() - expected).norm(dim=1).max()

    @staticmethod
    def upstream(x, radius):
        generator = torch.Generator().manual_seed(5)
        G = torch.randn(x.shape, generator=generator).to(x.device)
        size = radius.cpu().square().clamp(max=1)
        return G, (size * torch.randn(len(x), generator=generator)).to(x.device)

    def gradients(self, x, references, radius, D, needs=(True, True, True), keeps=False):
        """With ``keeps`` from the distances that the forward pass keeps, in the native backend."""
        problem = PosteriorMean(x, references, radius, D)
        kept = (native.room_for_distances(problem),) if keeps else ()
        mean, _, nearest, total = self.module.posterior_mean(problem, *kept)
        upstream = Upstream(*self.upstream(x, radius))
        state = State(mean, nearest, total)
        return self.module.posterior_mean_backward(problem, state, upstream, needs, *kept)

    def everything(self, x, references, radius, D):
        results = self.module.posterior_mean(PosteriorMean(x, references, radius, D))
        return (*results, *self.gradients(x, references, radius, D))

    def expected_gradients(self, x, references, radius, D):
        G, g = self.upstream(x, radius)
        tensors = (t.cpu() for t in (x, references, radius))
        return self.oracle_gradients(*tensors, D, G.cpu(), g.cpu())

    def check_gradients(self, x, references, radius, D, tolerance=1e-5):
        expected = self.expected_gradients(x, references, radius, D)
        actual = self.gradients(x, references, radius, D)
        for gradient, wanted in zip(actual, expected, strict=True):
            assert_gradient(gradient, wanted, tolerance)


@pytest.fixture
def trial_errors(device):
    """trial_errors(name, backend) → the error of each result of a trial of pfgm check."""

    def errors(name, backend):
        place = Place(MODULES[backend], device, torch.float32)
        return TRIALS[name].errors(place, TRIALS[name].results(EXACT))

    return errors


@pytest.fixture
def op(backend, device, oracle, oracle_gradients) -> Operation:
    return Operation(backend, device, oracle, oracle_gradients)
