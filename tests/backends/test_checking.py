"""pfgm check: every planted fault is a row that failed, and the table says so."""

import os
from types import SimpleNamespace

import pytest
import torch

from pfgm import backends
from pfgm.backends import checking, trials, verdicts
from pfgm.backends.checking import Report, Row
from pfgm.backends.trials import EXACT, TRIALS, Place
from pfgm.backends.worker import Answer

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)
SMALL = [name for name, trial in TRIALS.items() if trial.quick and not trial.gpus]
# Faults of two backends, in the process that computes.
FAULTS = """
import os, signal, time, torch
from pfgm.backends import checking, native, products, trials, worker
real_answer = checking.answer
def with_faults(real):
    def faulty(problem, *rest):
        mean, *others = real(problem, *rest)
        return faults.get(fault, lambda mean: mean)(mean), *others
    return faulty
def crash(mean):
    os.kill(os.getpid(), signal.SIGSEGV)
def lack(mean):
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 GiB.")
def slow(mean):
    time.sleep(1)
    return mean
faults = {
    "wrong": lambda mean: mean + 1e-3,
    "one row": lambda mean: torch.cat([mean[:-1], mean[-1:] * 1.01]),
    "NaN": lambda mean: torch.full_like(mean, torch.nan),
    "memory": lack,
    "crash": crash,
    "hang": lambda mean: time.sleep(600),
    "slow": slow,
}
for module in (products, native):
    module.posterior_mean = with_faults(module.posterior_mean)
def answer(task):
    global fault
    kind, name, backend, *_ = task
    fault = plan.get((backend, name))
    return real_answer(task)
"""


def test_each_planted_fault_is_found(monkeypatch):
    few, tiles, ragged, *_ = SMALL
    names = [few, tiles, ragged, "ties and limits", "field", "in small chunks", "x − mean"]
    torch_faults = dict(
        zip(names, ("wrong", "one row", "NaN", "memory", "crash", "hang"), strict=False)
    )
    plan = {("torch", name): fault for name, fault in torch_faults.items()}
    plan["native", "digits"] = "slow"
    code = f"plan = {plan!r}; exec({FAULTS!r}, globals()); worker.serve(answer)"
    monkeypatch.setattr(checking, "_code", lambda device: code)
    monkeypatch.setattr(checking, "TRIALS", {name: TRIALS[name] for name in names})
    ask = checking.Worker.ask

    def impatient(worker, task, limit):  # with the task that hangs alone, however busy all else is
        return ask(worker, task, 1.0 if task[1:3] == ["in small chunks", "torch"] else limit)

    monkeypatch.setattr(checking.Worker, "ask", impatient)
    monkeypatch.setattr(checking, "SIZES", {"digits": verdicts.SIZES["digits"]})
    report = checking.check("cpu", quick=True)
    failures = {row.problem: row.failure for row in report.failures}
    assert list(failures) == names
    assert {row.backend for row in report.failures} == {"torch"}
    assert failures[few].startswith("mean is off by 1.0e-03; allowed is 2.0e-05")
    assert failures[tiles].startswith("mean is off by")
    assert "is off by nan" in failures[ragged]
    assert failures["ties and limits"].startswith("OutOfMemoryError: CUDA out of memory. Tried to")
    assert failures["field"] == "the process was ended by SIGSEGV"
    assert failures["in small chunks"] == "took more than 1 s, and was stopped"
    assert failures["x − mean"] == "not run, after 2 lost processes"
    text = str(report)
    assert f"FAILED: torch, field: {failures['field']}" in text
    verdict = report.verdict
    assert verdict.failures == {"torch": f"{few}: {failures[few]}"}
    if os.environ.get("PFGM_NATIVE") != "0":  # the slow one has passed, and is not preferred
        assert report.passed == ("reference", "native")
        assert verdict.order("digits") == ("reference", "native")
        (timing,) = [row for row in report.rows if row.backend == "native" and row.seconds]
        assert timing.seconds >= 1


def test_the_table():
    rows = [
        Row("torch", "field", 1.5e-7, 2e-5),
        Row("native", "field", 1e-3, 2e-5, failure="field in x is off by 1.0e-03"),
        Row("torch", "ties and limits", 0.0, 2e-5),
        Row("torch", "digits", seconds=1.25e-4, speed=0.9),
        Row("native", "digits", failure="took more than 60 s, and was stopped"),
        Row("torch", "CIFAR-10", seconds=0.5, speed=2.0),
    ]
    report = Report("cuda:0: A", {"torch": None, "native": None, "triton": "no"}, rows, False, "k.")
    lines = [line.split() for line in str(report).splitlines()]
    assert lines[2:5] == [
        ["largest", "error", "torch", "native"],
        ["field", "1.5e-07", "FAILED"],
        ["ties", "and", "limits", "0.0e+00", "-"],
    ]
    assert lines[6][-2:] == ["torch", "native"]
    assert lines[7][-4:] == ["0.125", "ms,", "0.90×", "FAILED"]
    assert lines[8][-4:] == ["500", "ms,", "2.00×", "-"]
    assert str(report).endswith(
        "triton cannot run: no\n"
        "FAILED: native, field: field in x is off by 1.0e-03\n"
        "FAILED: native, digits: took more than 60 s, and was stopped\n"
        "passed: torch\nk."
    )


@pytest.fixture
def asked(monkeypatch):
    """The tasks that a worker is asked, which it answers by ``reply(task)``."""
    tasks = []

    class Stand:
        def __init__(self, code):
            self.code = code

        def __enter__(self):
            return self

        def __exit__(self, *error):
            pass

        def ask(self, task, limit):
            tasks.append((*task, limit))
            return self.reply(task)

        @staticmethod
        def reply(task):
            return Answer({"mean": 0.0} if task[0] == "trial" else [1.0, 1.0])

    monkeypatch.setattr(checking, "Worker", Stand)
    return SimpleNamespace(tasks=tasks, worker=Stand)


def test_what_is_proven_comes_first_and_a_failed_backend_is_not_timed(asked, monkeypatch):
    def reply(task):
        return (
            Answer({"mean": 1.0} if task[2] == "native" else {"mean": 0.0})
            if (task[0] == "trial")
            else Answer([1.0, 1.0])
        )

    monkeypatch.setattr(asked.worker, "reply", staticmethod(reply))
    said = []
    report = checking.check("cpu", report=said.append)
    assert "torch, 128 × 1437 × 64: 1000 ms, 1.00×" in said
    failed = "FAILED: native, few points, 5 × 70 × 37: mean is off by 1.0e+00; allowed is 2.0e-05"
    assert (failed in said) == ("native" in report.verdict.failures)
    assert asked.tasks[0][2] == "torch"
    timed = [(task[2], task[1]) for task in asked.tasks if task[0] == "timing"]
    assert timed == [*(("torch", size) for size in verdicts.SIZES), ("reference", "digits")]
    whole = {task[1] for task in asked.tasks if task[:1] == ("trial",) and task[2] == "torch"}
    assert whole == {name for name, trial in TRIALS.items() if trial.applies("torch", CPU)}
    assert "native" in report.verdict.failures or os.environ.get("PFGM_NATIVE") == "0"


def test_after_its_time_nothing_more_is_run(asked):
    report = checking.check("cpu", quick=True, seconds=0)
    assert asked.tasks == []
    assert report.passed == ()
    assert all(row.failure == "not run: the check has taken 0 s" for row in report.rows)
    count = len([row for row in report.rows if row.backend == "torch"])
    assert f"FAILED: torch, {count} problems: not run: the check has taken 0 s" in str(report)
    assert "FAILED" not in str(report).partition("triton cannot run")[0]


@pytest.mark.parametrize("busy", [True, False])
def test_a_gpu_that_computes_nothing_has_no_verdict(asked, gpu, monkeypatch, busy):
    """It may be busy. One that computes wrong numbers has a verdict by which nothing passed."""
    wrong = (
        Answer(failure="AcceleratorError: all devices are busy") if busy else Answer({"mean": 1.0})
    )
    monkeypatch.setattr(asked.worker, "reply", staticmethod(lambda task: wrong))
    monkeypatch.setattr(checking, "usable_device", lambda name: CUDA)
    monkeypatch.setattr(checking.torch, "empty", lambda n, device: SimpleNamespace(device=device))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    report = checking.check("cuda")
    assert report.passed == ()
    assert "FAILED: torch, " in str(report)
    assert report.kept.startswith("There is no verdict" if busy else "The verdict is kept in")
    assert (verdicts.find(CUDA) is None) == busy


def test_an_error_ends_the_process_on_a_gpu_alone():
    assert checking._code(CPU).endswith("True)")
    assert checking._code(CUDA).endswith("False)")


@pytest.mark.parametrize("name", [name for name in SMALL if "row" not in name])
def test_the_truth_of_a_trial_does_not_depend_on_the_backend(name):
    """Matrix products in float64 agree with differences to its rounding."""
    place = EXACT._replace(backend=backends.backend.BACKENDS["torch"])
    exact, other = TRIALS[name].compute(EXACT), TRIALS[name].compute(place)
    assert exact.keys() == other.keys()
    for result, wanted in exact.items():
        assert trials._error(result, other[result].double(), wanted.double()) <= 1e-6


def test_an_error_is_that_of_the_worst_row():
    exact = torch.tensor([[3.0, 4.0], [30.0, 40.0], [0.3, 0.4]], dtype=torch.float64)
    result = exact.clone()
    result[2, 0] += 1e-3
    typical = float(exact.norm()) / 3**0.5
    assert trials._error("mean", result, exact) == pytest.approx(1e-3)
    assert trials._error("gradient of x", result, exact) == pytest.approx(1e-3 / typical)
    infinite = torch.tensor([torch.inf, 5.0], dtype=torch.float64)
    assert trials._error("log-sum-exp", infinite, infinite) == 0
    assert not trials._error("log-sum-exp", -infinite, infinite) <= 1
    assert not trials._error("mean", exact[:, :1], exact) <= 1


def test_a_trial_is_for_devices_that_have_what_it_needs(monkeypatch):
    graph, second = TRIALS["a CUDA graph"], TRIALS["the second GPU"]
    assert not graph.applies("torch", CPU)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert graph.applies("torch", CUDA)
    assert not second.applies("torch", CUDA)
    assert not TRIALS["in each tile"].applies("torch", CUDA)
    assert TRIALS["in each tile"].applies("triton", CUDA)
    wide = [trial for trial in TRIALS.values() if trial.references == torch.float64]
    assert wide
    assert not any(trial.applies("triton", CUDA) for trial in wide)


def test_streams_graphs_and_a_second_gpu_with_stand_ins(monkeypatch):
    """They are told what to do as on a GPU, in the memory of the CPU."""
    log = []

    class Stream:
        def __init__(self, device=None):
            log.append("stream")

        def wait_stream(self, other):
            log.append("waits")

        def synchronize(self):
            log.append("synchronized")

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
        _sleep=lambda cycles: log.append("sleeps"),
        CUDAGraph=Graph,
        graph=lambda graph: Stream(),
    )
    everything = trials._everything

    def watched(place, data):
        results = everything(place, data)
        again = lambda: (results.values(), everything(place, data).values())  # noqa: E731
        Graph.captured = staticmethod(again)
        return results

    monkeypatch.setattr(trials, "_everything", watched)
    monkeypatch.setattr(trials.torch, "cuda", cuda)
    monkeypatch.setattr(Place, "on_gpu", property(lambda place: place is not EXACT))
    place = Place(backends.backend.BACKENDS["torch"], CPU, torch.float32)
    for compute in (trials._on_another_stream, trials._in_a_graph):
        exact, other = compute(EXACT), compute(place)
        for result, wanted in exact.items():
            assert trials._error(result, other[result].double(), wanted.double()) <= 1e-6
    assert log[:7] == ["stream", "stream", "waits", "enters", "sleeps", "leaves", "synchronized"]
    assert log.count("replay") == 3
