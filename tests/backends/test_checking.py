"""pfgm check: every planted fault is a row that failed, and only a pass is stored."""

import json
import math
import os
from types import SimpleNamespace

import platformdirs
import pytest
import torch

from pfgm import backends
from pfgm.backends import checking, passes, timing, trials
from pfgm.backends.trials import EXACT, TRIALS, Place
from pfgm.backends.worker import Lost

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)
SMALL = [name for name, trial in TRIALS.items() if not trial.large and not trial.run]
native_only = pytest.mark.skipif(os.environ.get("PFGM_NATIVE") == "0", reason="PFGM_NATIVE=0")
# Faults of two backends, in the process that computes.
FAULTS = """
import os, signal, torch
from pfgm.backends import checking, native, products
def with_faults(real, fault_of):
    def faulty(problem, *rest):
        mean, *others = real(problem, *rest)
        return faults[fault_of(problem)](mean), *others
    return faulty
def lack(mean):
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 GiB.")
faults = {
    "": lambda mean: mean,
    "wrong": lambda mean: mean + 1e-3,
    "one row": lambda mean: torch.cat([mean[:-1], mean[-1:] * 1.01]),
    "NaN": lambda mean: torch.full_like(mean, torch.nan),
    "memory": lack,
    "crash": lambda mean: os.kill(os.getpid(), signal.SIGSEGV),
}
by_features = {31: "wrong", 37: "one row", 100: "NaN", 40: "memory", 97: "memory"}
products.posterior_mean = with_faults(
    products.posterior_mean, lambda problem: by_features[problem.x.shape[1]])
native.posterior_mean = with_faults(native.posterior_mean, lambda problem: "crash")
"""


@native_only
def test_each_planted_fault_is_found(monkeypatch):
    few, ragged, tiles = (
        f"{s}, float32" for s in ("3 × 2100 × 31", "13 × 70 × 37", "20 × 70 × 100")
    )
    names = [few, ragged, tiles, "ties and limits", "field", "steps, 37"]
    chosen = {name: TRIALS[name] for name in names}
    values_of = checking.values_of
    faulty = f"exec({FAULTS!r}, globals()); checking.SIZES = {{}}; "
    monkeypatch.setattr(checking, "TRIALS", chosen)
    monkeypatch.setattr(
        checking, "values_of", lambda code, seconds: values_of(faulty + code, seconds)
    )
    report = checking.check("cpu")
    failures = {row.problem: row.failure for row in report.failures if row.backend == "torch"}
    assert list(failures) == names[:5]
    assert failures[few].startswith("mean is off by 1.0e-03; allowed is 2.0e-05")
    assert "is off by" in failures[ragged]
    assert "is off by nan" in failures[tiles]
    memory = "OutOfMemoryError: CUDA out of memory. Tried to allocate 20 GiB."
    assert failures["ties and limits"] == failures["field"] == memory  # two equal: the end
    lost = [row for row in report.rows if row.backend == "native"]
    assert [(row.problem, row.failure) for row in lost] == [
        (few, "the process was ended by SIGSEGV")
    ]
    assert f"FAILED: torch, field: {memory}" in str(report)
    assert report.passed == ("reference",)
    json.dumps(report.as_dict(), allow_nan=False)


def messages(kind, result="right", speed=2.0):
    """A turn on a GPU: one trial with a result, and one timing."""
    yield {"title": "cuda", "kind": kind, "unable": None}
    yield "field"
    if result == "lost":
        raise Lost("took more than 180 s, and was stopped")
    error = None if result == "error" else {"right": 1e-7, "wrong": 1e-3, "NaN": None}[result]
    failure = None if result == "right" else f"{result}: as planted"
    yield checking.Row(
        "native", "field", error, None if result == "error" else 2e-5, None, None, failure
    )
    yield checking.Row("native", checking._DECIDES, seconds=1.0, speed=speed)


@pytest.mark.parametrize("had", [False, True])
@pytest.mark.parametrize(
    ("turn", "then"),
    [
        ({}, True),
        ({"speed": 1.0}, True),
        ({"speed": 0.9}, None),
        ({"result": "error"}, None),
        ({"result": "lost"}, None),
        ({"result": "wrong"}, False),
        ({"result": "NaN"}, False),
    ],
)
@native_only
def test_only_passes_are_stored(gpus, monkeypatch, had, turn, then):
    """None: what there was before. It is a pass of that kind of GPU, and of native, alone."""

    def values(code, seconds):
        assert "'cuda:1'" in code
        if "'native'" in code:
            return messages(gpus.kinds[1], **turn)
        return messages(gpus.kinds[1], "right" if "'triton'" in code else "error")

    monkeypatch.setattr(checking, "values_of", values)
    monkeypatch.setattr(checking, "TRIALS", {})
    if had:
        passes.store("A100")
    report = checking.check("cuda:1")
    assert passes.has("A100") == (had if then is None else then)
    assert not passes.has("H100")
    (sentence,) = report.stored  # nothing would read a pass of another backend
    assert "native on A100" in sentence


@native_only
def test_where_a_pass_cannot_be_stored_this_is_said(gpus, monkeypatch, tmp_path):
    (tmp_path / "file").write_text("no folder")
    monkeypatch.setattr(platformdirs, "user_cache_dir", lambda _: tmp_path / "file" / "x")
    rows = [checking.Row("native", checking._DECIDES, seconds=1.0, speed=2.0)]
    said = checking._decide(gpus.kinds[0], rows)
    assert "cannot be changed" in said
    assert "PFGM_BACKEND" in said


def test_tf32_is_timed_in_a_process_of_its_own(monkeypatch):
    """It would change what torch computes. Its speed is beside the time of torch in another one."""
    monkeypatch.setattr(timing, "SIZES", {"small": (3, 5, 7)})
    monkeypatch.setattr(timing, "_TIMING", 0.01)
    monkeypatch.setattr(torch, "compile", lambda function: function)
    monkeypatch.setattr(torch.backends, "cuda", SimpleNamespace(matmul=SimpleNamespace()))
    products = timing.BACKENDS["torch"]
    seen = []
    real = products.posterior_mean
    monkeypatch.setattr(products, "posterior_mean", lambda problem: seen.append(1) or real(problem))
    assert len(timing.seconds_of("small", "plain torch", CPU)) == 2
    assert seen
    seen.clear()
    assert len(timing.seconds_of("small", "compiled TF32", CPU)) == 1
    assert not seen
    beside = checking.Row("native", "small", seconds=2.0, speed=1.0)
    alone = checking.Row("compiled TF32", "small", seconds=2.0)
    assert checking._beside(alone, 6.0).speed == 3.0
    assert checking._beside(beside, 6.0) == beside
    assert checking._beside(alone, None) == alone


@native_only
def test_this_process_makes_no_context(gpus, monkeypatch):
    """Nor does it look at a GPU in any other way than to count them."""

    def refuse(*_, **__):
        raise AssertionError("a GPU was touched")

    for name in ("get_device_name", "get_device_capability", "current_device", "_lazy_init"):
        monkeypatch.setattr(torch.cuda, name, refuse)
    for name in ("zeros", "empty"):
        monkeypatch.setattr(torch, name, refuse)
    gpus.problems[:] = [None, None]  # which the extension would fail on
    monkeypatch.setattr(checking, "TRIALS", {})
    monkeypatch.setattr(checking, "values_of", lambda code, seconds: messages("A100", "error"))
    assert checking.check("auto").device == "cuda"
    with pytest.raises(ValueError, match="cuda:2"):
        checking.check("cuda:2")


@native_only
@pytest.mark.parametrize("number", [0, 1])
def test_the_device_is_the_current_one_in_all_trials(gpus, monkeypatch, number):
    class Device:
        def __init__(self, device):
            self.device = device

        def __enter__(self):
            self.before, gpus.current = gpus.current, self.device.index

        def __exit__(self, *error):
            gpus.current = self.before

    seen, sent = [], []

    def compute(place):
        seen.append((place.device.index, gpus.current))
        raise RuntimeError(f"error {len(seen)}")

    monkeypatch.setattr(torch.cuda, "device", Device)
    monkeypatch.setattr(
        torch, "empty", lambda n, device: SimpleNamespace(device=torch.device(device))
    )
    monkeypatch.setattr(checking, "sender", lambda: sent.append)
    stand_in = SimpleNamespace(applies=lambda *_: True, errors=lambda place, _: compute(place))
    monkeypatch.setattr(checking, "TRIALS", dict.fromkeys("abc", stand_in))
    monkeypatch.setattr(torch, "load", lambda *_, **__: dict.fromkeys("abc"))
    monkeypatch.setattr(checking, "seconds_of", lambda *_: (1.0, 2.0))
    checking.serve("native", f"cuda:{number}", "exact.pt")
    assert seen == [(number, number)] * 3
    assert sent[0]["kind"] == gpus.kinds[number]
    assert [isinstance(each, checking.Row) and each.seconds == 1.0 for each in sent].count(
        True
    ) == 3
    assert gpus.current == 0


# The sizes of another type have the same references, rounded.
@pytest.mark.parametrize(
    "name", [name for name in SMALL if "×" not in name or name.endswith("float32")]
)
def test_the_truth_of_a_trial_does_not_depend_on_the_backend(name):
    """Matrix products in float64 agree with differences to its rounding."""
    place = EXACT._replace(backend=backends.backend.BACKENDS["torch"])
    exact, other = TRIALS[name].results(EXACT), TRIALS[name].results(place)
    assert exact.keys() == other.keys()
    for result, wanted in exact.items():
        assert trials.error_of(result, other[result].double(), wanted.double()) <= 1e-6


def test_an_error_is_that_of_the_worst_row():
    exact = torch.tensor([[3.0, 4.0], [30.0, 40.0], [0.3, 0.4]], dtype=torch.float64)
    result = exact.clone()
    result[2, 0] += 1e-3
    typical = float(exact.norm()) / 3**0.5
    assert trials.error_of("mean", result, exact) == pytest.approx(1e-3)
    assert trials.error_of("gradient of x", result, exact) == pytest.approx(1e-3 / typical)
    infinite = torch.tensor([torch.inf, 5.0], dtype=torch.float64)
    assert trials.error_of("log-sum-exp", infinite, infinite) == 0
    assert not trials.error_of("log-sum-exp", -infinite, infinite) <= 1
    assert math.isnan(trials.error_of("mean", exact[:, :1], exact))


@native_only
def test_a_trial_is_for_devices_and_types_that_it_needs(gpus):
    assert gpus.kinds
    graph = TRIALS["a CUDA graph, steps"]
    assert not graph.applies("torch", CPU)
    assert graph.applies("torch", CUDA)
    assert not graph.applies("reference", CUDA)
    wide = [trial for trial in TRIALS.values() if trial.references == torch.float64]
    assert wide
    assert not any(trial.applies("native", CUDA) for trial in wide)


def test_a_graph_with_stand_ins(monkeypatch):
    """It is told what to do as on a GPU, in the memory of the CPU, and on the trial's device."""
    log = []

    class Stream:
        def __init__(self, device=None):
            log.append(f"stream on {device}")

        def wait_stream(self, other):
            log.append("waits")

        def __enter__(self):
            log.append("enters")

        def __exit__(self, *error):
            log.append("leaves")

    class Graph:
        def replay(self):
            log.append("replay")
            for result, again in zip(*self.captured(), strict=True):
                result.copy_(again)

    cuda = SimpleNamespace(
        Stream=Stream,
        current_stream=Stream,
        stream=lambda stream: stream,
        synchronize=lambda device: log.append("synchronized"),
        CUDAGraph=Graph,
        graph=lambda graph, stream: stream,
    )

    def watched(place, data):
        results = trials._mean(place, data)
        again = lambda: (results.values(), trials._mean(place, data).values())  # noqa: E731
        Graph.captured = staticmethod(again)
        return results

    monkeypatch.setattr(trials.torch, "cuda", cuda)
    gpu = property(lambda place: None if place is EXACT else place.device)
    monkeypatch.setattr(Place, "gpu", gpu)
    trial = TRIALS["a CUDA graph, mean"]._replace(compute=watched)
    place = Place(backends.backend.BACKENDS["torch"], CPU, torch.float32)
    errors = trial.errors(place, trial.results(EXACT))
    assert max(errors.values()) <= 1e-6
    streams = ["stream on cpu", "stream on cpu", "waits"]
    assert log == [
        *streams,
        *["enters", "leaves", "synchronized", "enters", "leaves"],
        *["replay"] * 2,
    ]
