"""Refuses to test a build of other sources. Holds the oracle of the operations."""

import builtins
import contextlib
import hashlib
import importlib.util
import math
import os
import re
import runpy
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

from pfgm_command import sleep_at_barriers

# Must be set before torch is imported: pytest-xdist's workers share the processors.
sleep_at_barriers()
if "PYTEST_XDIST_WORKER_COUNT" in os.environ:
    share = (os.cpu_count() or 1) // int(os.environ["PYTEST_XDIST_WORKER_COUNT"])
    os.environ.setdefault("OMP_NUM_THREADS", str(max(share, 1)))

# A script's background job ignores SIGINT, and so would each process that a test starts.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import pfgm
from pfgm.backends import native
from pfgm.common import messages
from pfgm.ops import eager, normalised_field, ode_step, posterior_mean

ROOT = Path(__file__).resolve().parents[1]
# For benchmarks/. Last, so that an installed pfgm is found before the bare source tree.
sys.path.append(str(ROOT))
# The slowest files. Workers start with them.
LONG = ("test_triton_code", "test_triton", "test_cuda", "test_native", "test_processes")
# Quick files of each layer, for the loop of a developer.
SMOKE = (
    "backends/test_passes.py",
    "common/test_files.py",
    "data/test_images.py",
    "flows/test_inpainting.py",
    "flows/test_plusplus.py",
    "functional/test_field.py",
    "networks/test_wrapped.py",
    "ops/test_eager.py",
    "pretrained/test_pretrained.py",
    "training/test_checkpoint.py",
)
NATIVE = os.environ.get("PFGM_NATIVE") != "0"
source_digest = runpy.run_path(str(ROOT / "csrc" / "source_digest.py"))["source_digest"]


def installation_problem() -> str | None:
    if importlib.util.find_spec("pfgm.kernels") is None:
        return f"pfgm ({pfgm.__file__}) is a bare source tree without pfgm.kernels"
    if not NATIVE:
        return None
    if importlib.util.find_spec("pfgm._native") is None:
        return f"pfgm ({pfgm.__file__}) has no native extension (PFGM_NATIVE=0 tests without it)"
    if importlib.import_module("pfgm._native").build_info()["source_digest"] != source_digest():
        return "pfgm._native was not built from the present csrc/ and CMakeLists.txt"
    return None


def pytest_configure(config: pytest.Config) -> None:
    if problem := installation_problem():
        raise pytest.UsageError(f"{problem}; run pip install -e '.[test]'.")


def is_smoke(path: Path) -> bool:
    return path.is_relative_to(ROOT / "tests") and str(path.relative_to(ROOT / "tests")) in SMOKE


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """With ``-m smoke`` other files are not imported, which would take most of the time."""
    other = collection_path.suffix == ".py" and not is_smoke(collection_path)
    return True if config.option.markexpr == "smoke" and other else None


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if is_smoke(item.path):
            item.add_marker(pytest.mark.smoke)
    items.sort(key=lambda item: item.path.stem not in LONG)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo):
    """With PFGM_NO_SKIPS a skipped test fails, where .ci/run has installed what it needs."""
    report = yield
    if report.skipped and not hasattr(report, "wasxfail") and os.environ.get("PFGM_NO_SKIPS"):
        report.outcome = "failed"
        report.longrepr = f"skipped, although PFGM_NO_SKIPS is set: {report.longrepr[2]}"
    return report


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    """Gives whole files to workers, in this order, because fixtures of a file compile for all its
    tests."""
    from xdist.scheduler import LoadFileScheduling

    config.option.loadscopereorder = False
    return LoadFileScheduling(config, log)


@pytest.fixture(params=["native", "torch", "reference"] if NATIVE else ["torch", "reference"])
def backend(request):
    return request.param


def instruction_sets():
    """Those that run here. Where bytes are multiplied fast, the older set with otherwise the same
    code is left to the slow tests."""
    usable = []
    for isa in ("avx512vnni", "avx512", "avxvnni", "avx2", "portable"):
        with pytest.MonkeyPatch.context() as patch, contextlib.suppress(ValueError):
            patch.setenv("PFGM_CPU_ISA", isa)
            usable.append(native.extension().cpu_isa())
    same = {"avx512": "avx512vnni", "avx2": "avxvnni"}
    for isa in usable:
        yield pytest.param(isa, marks=[pytest.mark.slow] if same.get(isa) in usable else [])


ISAS = list(instruction_sets()) if NATIVE else []


@pytest.hookimpl(trylast=True)
def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Instruction sets vary fastest, so that what they share is kept for a few tests only."""
    if "isa" in metafunc.fixturenames:
        others = ["reference"] if "every_backend" in metafunc.fixturenames else []
        metafunc.parametrize("isa", [*others, *ISAS], indirect=True)


@pytest.fixture
def isa(request, monkeypatch):
    """The instruction set of the native kernels, one after the other."""
    if request.param != "reference":
        monkeypatch.setenv("PFGM_CPU_ISA", request.param)
    return request.param


@pytest.fixture
def every_backend(isa):
    """The name of a backend, the native one once for each instruction set."""
    return "reference" if isa == "reference" else "native"


@pytest.fixture
def terminal(monkeypatch):
    """stderr is a terminal, in which progress is a bar."""
    monkeypatch.setattr(messages.Unfailing, "isatty", lambda _: True)


@pytest.fixture
def threads():
    """Sets the number of threads, and restores it afterwards."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def run_kernel_tests(tmp_path_factory):
    """run_kernel_tests(patterns, environment, *options) → process, log.

    Starts a process for the files of tests/gpu that match a pattern.
    """
    started = []

    def run(patterns, environment, *options):
        log = tmp_path_factory.mktemp("output") / "log"
        files = sorted(f for pattern in patterns for f in (ROOT / "tests/gpu").glob(pattern))
        with log.open("w") as output:
            process = subprocess.Popen(
                [sys.executable, "-m", "pytest", "-q", "--import-mode=importlib", *options, *files],
                env=os.environ | environment | {"OMP_NUM_THREADS": "1"},
                stdout=output,
                stderr=subprocess.STDOUT,
            )
        started.append(process)
        return process, log

    yield run
    for process in started:
        process.kill()
        process.wait()


@pytest.fixture(scope="session")
def refused():
    """refused(call, sentence): checks that a call raises an error with this sentence.

    The error is a ValueError, or one whose name comes first, as in "TypeError: x must be …". In the
    middle of a long sentence "…" stands for what is left out.
    """

    def check(call, sentence):
        kind, text = re.fullmatch(r"(?:(\w+Error): )?(.*)", sentence).groups()
        error = getattr(builtins, kind or "ValueError")
        with pytest.raises(error, match=f"^{re.escape(text).replace('…', '.*')}$"):
            call()

    return check


@pytest.fixture
def refusal(capsys):
    """refusal(*arguments) → the sentence with which the command ends, with exit code 2.

    Before it there may be bars, and as many notices as are expected.
    """

    from pfgm import cli  # here, because its import takes a while

    def run(*arguments, notices=0):
        capsys.readouterr()
        assert cli.main([str(each) for each in arguments]) == 2
        *others, sentence = capsys.readouterr().err.strip().splitlines()
        others = [line for line in others if line and "%|" not in line]
        assert [line[:6] for line in others] == ["pfgm: "] * notices
        assert sentence.startswith("pfgm: error: ")
        return sentence

    return run


@pytest.fixture(scope="session")
def strided():
    """strided(values, kind) → the same values in another memory layout."""

    def place(values, kind):
        if kind == "rows apart":
            return torch.stack([values, values], 1).flatten(1)[:, : values.shape[1]]
        if kind == "columns":
            return values.t().contiguous().t()
        if kind == "every other":
            return torch.stack([values, values], -1).flatten(1)[:, ::2]
        return torch.cat([values.new_zeros(3), values.flatten()])[3:].view(values.shape)

    return place


def nan_stays_in_its_row(x, field_x, field_z, backend):
    """Steps of three finite rows, of which one after the other gets NaN in its field."""
    field_x[1, 4] = math.nan
    for z in (2.0, 7.0):
        result = pfgm.euler_step(x, pfgm.Field(field_x, field_z), z, 1.0, backend=backend)
        assert torch.isfinite(result[[0, 2]]).all()
        assert result[1].isnan().any()
    field_z[0] = math.nan
    result = pfgm.euler_step(x, pfgm.Field(field_x, field_z), 7.0, 1.0, backend=backend)
    assert result[0].isnan().all()


def only_outputs_are_written(x, field_x, field_z, form, backend):
    """A step into the middle of other memory, from a "field" or from a "mean"."""
    kept = [values.clone() for values in (x, field_x, field_z)]
    rows, columns = x.shape
    memory = torch.full((rows + 2, columns + 13), math.nan, device=x.device)
    out = memory[1:-1, 2 : columns + 2]
    if form == "field":
        pfgm.euler_step(x, pfgm.Field(field_x, field_z), 2.0, 1.0, out=out, backend=backend)
    else:
        pfgm.euler_step(x, field_x, 2.0, 1.0, out=out, backend=backend)
    assert torch.isfinite(out).all()
    assert int(memory.isnan().sum()) == memory.numel() - out.numel()
    for before, after in zip(kept, (x, field_x, field_z), strict=True):
        assert torch.equal(before, after)


@pytest.fixture(scope="session")
def step_checks():
    """What holds for the steps of the ODE on every backend and device."""
    return SimpleNamespace(
        nan_stays_in_its_row=nan_stays_in_its_row, only_outputs_are_written=only_outputs_are_written
    )


def _wide(values):
    """Samples as (count, N) in long double, in which the plain formulas are accurate enough."""
    if values.dtype == torch.uint8:
        return values.flatten(1).numpy().astype(np.longdouble) / 127.5 - 1
    return _flat64(values).astype(np.longdouble)


def _rows(values):
    """Samples as (count, N) in float64, for sums over references: they are rounded beside their
    largest term only, and in long double numpy has no fast products."""
    return _wide(values).astype(np.float64) if values.dtype == torch.uint8 else _flat64(values)


def _flat64(values):
    return values.detach().double().flatten(1).numpy()


def _sum(weights, rows):
    """Σ weights_j rows_j. Weights in long double may be out of the range of float64."""
    largest = np.abs(weights).max()
    if largest == 0:
        return np.zeros(rows.shape[1], np.longdouble)
    return (weights / largest).astype(np.float64) @ rows * largest


def _posterior(squared, N, r, D):
    """For one point, from its squared distances: probabilities, log-sum-exp."""
    if math.isinf(D):
        scores = -squared / (2 * r * r)
    else:
        scores = -(N + np.longdouble(D)) / 2 * np.log(squared + r * r)
    weights = np.exp(scores - scores.max())
    return weights / weights.sum(), scores.max() + np.log(weights.sum())


def _seen(p):
    """Where probabilities do not underflow even in long double; a slice if that is everywhere."""
    seen = p != 0
    return slice(None) if seen.all() else seen


def _tensor(values):
    return torch.from_numpy(np.asarray(values, dtype=np.float64))


def _remembering(evaluate, most=256):
    """The same function. It keeps its last results, because tests repeat calls for each backend and
    instruction set."""
    results = {}

    def content(value):
        if not isinstance(value, torch.Tensor):
            return value if np.isscalar(value) else np.asarray(value).tobytes()
        flat = value.detach().clone(memory_format=torch.contiguous_format)
        flat = flat.view(-1).view(torch.uint8)
        return value.dtype, value.shape, hashlib.sha256(flat.numpy()).digest()

    def remembered(*arguments):
        key = tuple(map(content, arguments))
        if key not in results:
            if len(results) == most:
                results.pop(next(iter(results)))
            results[key] = evaluate(*arguments)
        return results[key]

    return remembered


def _all_squared_distances(x, references):
    x, y = _wide(x), _wide(references)
    return np.stack([np.square(point - y).sum(1) for point in x])


# The same for all radii, D and upstreams.
_squared_distances = _remembering(_all_squared_distances, most=32)


@pytest.fixture(scope="session")
def stress():
    """Digits, enlarged and made distinct, and points at and between them: (x, references, name)."""
    from sklearn.datasets import load_digits

    digits = torch.from_numpy(load_digits().data[:160]).float() / 8 - 1
    generator = torch.Generator().manual_seed(0)

    def noise(*shape):
        return torch.randn(*shape, generator=generator)

    cases = []
    for N in (64, 784, 3072):
        references = digits.repeat(1, -(-N // 64))[:, :N]
        references = references + (0.05 * noise(160, N) if N > 64 else 0)
        first, second = references[:9], references[60:69]
        perturbed = first + noise(9, N) * torch.logspace(-2, 1, 9)[:, None]
        twins = torch.cat([references, references + 1e-5 * noise(160, N)])
        cases += [
            (first + 1e-3 * noise(9, N), references, f"{N} near"),
            (perturbed, references, f"{N} perturbed"),
            ((first + second) / 2, references, f"{N} tie"),
            ((first + second) / 2 + 1e-4 * noise(9, N), references, f"{N} near tie"),
            (first + 1e3 * noise(9, N), references, f"{N} far"),
            (first + 0.1 * noise(9, N), twins, f"{N} twins"),
        ]
    return cases


@pytest.fixture
def one_calls(monkeypatch):
    """True for each public function that was computed in one call of the native kernels, and False
    for each other."""
    answers, call = [], eager.one_call

    def watched(*arguments, **options):
        answer = call(*arguments, **options)
        answers.append(answer is not None)
        return answer

    monkeypatch.setattr(eager, "one_call", watched)
    return answers


@pytest.fixture
def operators(monkeypatch):
    """The operators that the public functions called, by name."""
    names = []
    for module in (posterior_mean, normalised_field, ode_step):
        for name in ("compute", "compute_into"):
            if not hasattr(module, name):
                continue
            call, operator = getattr(module, name), module.__name__.rpartition(".")[2]

            def watched(*arguments, call=call, operator=operator):
                names.append(operator)
                return call(*arguments)

            monkeypatch.setattr(module, name, watched)
    return names


@pytest.fixture
def kept(monkeypatch):
    """The bytes that the native forward and backward passes are given for distances to keep."""
    sizes = {"forward": [], "backward": []}
    forward, backward = native.posterior_mean, native.posterior_mean_backward

    def size(memory):
        return 0 if memory is None else len(memory)

    def spy_on_forward(problem, kept=None):
        sizes["forward"].append(size(kept))
        return forward(problem, kept)

    def spy_on_backward(problem, state, upstream, needs, kept=None):
        sizes["backward"].append(size(kept))
        return backward(problem, state, upstream, needs, kept)

    monkeypatch.setattr(native, "posterior_mean", spy_on_forward)
    monkeypatch.setattr(native, "posterior_mean_backward", spy_on_backward)
    return sizes


@pytest.fixture
def by_operators(monkeypatch):
    """A function that calls another one with the way past torch's dispatcher closed."""

    def run(function):
        with monkeypatch.context() as patch:
            patch.setattr(eager, "enabled", False)
            return function()

    return run


@pytest.fixture
def handled():
    """handled(number, handler): sets a signal handler until the end of the test."""
    before = {}

    def handle(number, handler):
        before.setdefault(number, signal.signal(number, handler))

    yield handle
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture
def seeing_mode():
    """A mode that notes in ``seen`` what torch's dispatcher called."""

    class Seeing(TorchDispatchMode):
        def __init__(self):
            super().__init__()
            self.seen = []

        def __torch_dispatch__(self, function, types, arguments=(), named=None):
            self.seen.append(str(function))
            return function(*arguments, **(named or {}))

    return Seeing()


@pytest.fixture(scope="session")
def oracle():
    """oracle(x, references, radius, D) → flat mean (B, N) and lse (B,), by the plain formulas.

    ``radius`` is r, or sigma at D = ∞. It is a number or (B,).
    """

    def evaluate(x, references, radius, D):
        x, references = x.reshape(len(x), -1), references.reshape(len(references), -1)
        y = _rows(references)
        radius = np.broadcast_to(np.asarray(radius, dtype=np.longdouble), len(x))
        means, logsumexps = [], []
        for squared, r in zip(_squared_distances(x, references), radius, strict=True):
            p, lse = _posterior(squared, y.shape[1], r, D)
            seen = _seen(p)
            means.append(_sum(p[seen], y[seen]))
            logsumexps.append(lse)
        return _tensor(means), _tensor(logsumexps)

    return _remembering(evaluate)


@pytest.fixture(scope="session")
def oracle_gradients():
    """Flat gradients of Σ G·mean + Σ g lse in x, references and radius (spec, section 10).

    With ``needs_references=False`` the second is missing: it takes longest.
    """

    def evaluate(x, references, radius, D, G, g, needs_references):
        x, references = x.reshape(len(x), -1), references.reshape(len(references), -1)
        distances = _squared_distances(x, references)
        x, y, G = (_rows(v.reshape(len(v), -1)) for v in (x, references, G))
        radius = np.broadcast_to(np.asarray(radius, dtype=np.longdouble), len(x))
        grad_x, grad_y, grad_r = np.zeros_like(x), np.zeros_like(y), np.zeros(len(x))
        for b, r in enumerate(radius):
            p, _ = _posterior(distances[b], x.shape[1], r, D)
            seen = _seen(p)
            p, squared, apart = p[seen], distances[b, seen], x[b] - y[seen]
            t = (-apart @ G[b]).astype(np.longdouble)  # of y − x: what all have in common cancels
            t += np.longdouble(g[b]) - p @ t
            if math.isinf(D):
                c = -p * t / r**2
                grad_r[b] = (p * t * squared).sum() / r**3
            else:
                c = -(x.shape[1] + np.longdouble(D)) * p * t / (squared + r**2)
                grad_r[b] = r * c.sum()
            grad_x[b] = _sum(c, apart)
            if needs_references:
                p, c = p.astype(np.float64), c.astype(np.float64)
                grad_y[seen] += np.outer(p, G[b]) - c[:, None] * apart
        return _tensor(grad_x), _tensor(grad_y) if needs_references else None, _tensor(grad_r)

    remembered = _remembering(evaluate)
    return lambda *arguments, needs_references=True: remembered(*arguments, needs_references)
