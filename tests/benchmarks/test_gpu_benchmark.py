"""benchmarks/gpu, without a GPU."""

import ast
import contextlib
import json
import math
import os
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import pfgm
from benchmarks.common import build, posterior_paths
from benchmarks.common.turns import take_turns
from benchmarks.gpu import __main__ as gpu
from benchmarks.gpu import checks as gpu_checks
from benchmarks.gpu import clock as gpu_clock
from benchmarks.gpu import measure as gpu_measure
from benchmarks.gpu import report as gpu_report
from benchmarks.gpu import smoke
from benchmarks.gpu import subjects as gpu_subjects
from pfgm.backends import trials
from pfgm.backends.checking import Report, Row

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is there: the command would measure")
def test_without_a_gpu_nothing_is_measured(tmp_path, capsys):
    assert gpu.main(["--out", str(tmp_path / "out")]) == 0
    assert "no GPU" in capsys.readouterr().out
    assert not (tmp_path / "out").exists()


def test_the_package_is_assembled_outside_the_checkout(tmp_path):
    package = build.assemble(tmp_path / "package")
    program = "import pfgm, pfgm.kernels.variant; print(pfgm.__file__, pfgm.kernels.__file__)"
    log = tmp_path / "log"
    status = build.run_logged(
        [sys.executable, "-c", program],
        log,
        build.environment_with(package, dry=False),
        60,
    )
    assert status == 0, log.read_text()
    assert all(Path(file).is_relative_to(package) for file in log.read_text().split()[-2:])


def test_a_command_that_takes_too_long_is_stopped(tmp_path):
    log = tmp_path / "log"
    program = "import time; print('begun', flush=True); time.sleep(60)"
    assert build.run_logged([sys.executable, "-c", program], log, dict(os.environ), 1) == 124
    assert log.read_text().split("\n")[:2] == ["begun", "stopped after 1 s"]
    assert build.last_line(log) == "stopped after 1 s"


class Ticking:
    """A clock that calls advance."""

    def __init__(self):
        self.now = 0.0

    def __call__(self):
        return self.now

    def takes(self, seconds):
        def call():
            self.now += seconds

        return call

    def seconds(self, call):
        before = self.now
        call()
        return self.now - before


def test_paths_take_turns_and_use_every_copy():
    clock, order = Ticking(), []

    def call(name, seconds):
        return lambda: (order.append(name), clock.takes(seconds)())

    paths = {"a": [call("a0", 1), call("a1", 2)], "b": [call("b0", 8)]}
    times = take_turns(paths, clock.seconds, 4)
    assert order == ["a0", "b0", "b0", "a1", "a0", "b0", "b0", "a1"]
    assert times == {"a": [1, 2, 1, 2], "b": [8, 8, 8, 8]}


def test_quantiles():
    quantiles = gpu_clock.quantiles([float(v) for v in range(100, -1, -1)])
    assert quantiles == {"median": 50, "tenth": 10, "ninetieth": 90}
    assert gpu_clock.quantiles([3.0]) == {"median": 3, "tenth": 3, "ninetieth": 3}


def device(clock):
    return gpu_clock.Device("cpu", clock.seconds, 0)


def subject(clock, name, estimate, **paths):
    ways = {path: lambda call=call: gpu_subjects.Way([call, call]) for path, call in paths.items()}
    return gpu_subjects.Subject(name, lambda _: ways, estimate, rounds=2)


def test_subjects_beyond_the_budget_are_left_out_and_named():
    clock = Ticking()
    chosen = [
        subject(clock, "first", 50, triton=clock.takes(10)),  # 2 calls, and 2 turns
        subject(clock, "long", 70, triton=clock.takes(1)),
        subject(clock, "short", 20, triton=clock.takes(1)),
    ]
    kept = []
    rows, left_out = gpu_measure.run_subjects(
        chosen,
        device(clock),
        gpu_clock.Budget(100, clock),
        keep=lambda rows, left_out: kept.append((len(rows), len(left_out))),
    )
    assert kept == [(1, 0), (1, 1), (2, 1)]
    assert [row.subject for row in rows] == ["first", "short"]
    assert left_out == ["long"]
    assert "Left out, the time was up: long." in gpu_report.report(rows, left_out, device(clock))


def test_a_path_that_fails_is_reported_and_the_others_count():
    def broken():
        raise ValueError("no such luck")

    clock = Ticking()
    chosen = [subject(clock, "some", 1, triton=broken, torch=clock.takes(3))]
    rows, _ = gpu_measure.run_subjects(chosen, device(clock), gpu_clock.Budget(100, clock))
    by_path = {row.path: row for row in rows}
    assert by_path["torch"].seconds["median"] == 3
    assert by_path["triton"].seconds == {}
    text = gpu_report.report(rows, [], device(clock))
    assert "| some | failed |" in text
    assert "some: triton: ValueError: no such luck" in text


def test_a_subject_that_cannot_be_built_is_reported():
    def broken(_):
        raise OSError("no images")

    clock = Ticking()
    rows, _ = gpu_measure.run_subjects(
        [gpu_subjects.Subject("lost", broken, 1)], device(clock), gpu_clock.Budget(9, clock)
    )
    assert gpu_report.failures_of(rows) == ["lost: all: OSError: no images"]


class Broken(gpu_clock.Device):
    """A device that a kernel has broken for all later kernels."""

    def wait(self):
        raise RuntimeError("an illegal memory access")


def test_a_lost_device_ends_the_run_and_names_the_suspect():
    clock = Ticking()
    chosen = [
        subject(clock, "some", 1, cuda=clock.takes(1), torch=clock.takes(1)),
        subject(clock, "other", 1, cuda=clock.takes(1)),
    ]
    broken = Broken("cpu", clock.seconds, 0)
    rows = [gpu_measure.Row("some", "torch", {}, {}, 0, {}, "")]
    for path in ("cuda, uint8", "triton", "torch"):
        rows.append(gpu_measure.Row("some", path, {}, {}, 0, {}, "an illegal memory access"))
    assert gpu_measure.suspect(rows, ("triton", "cuda")) == "cuda"
    assert gpu_measure.suspect(rows[:1], ("triton", "cuda")) == "cuda"
    assert gpu_measure.suspect(rows[2:], ("triton", "cuda")) == "triton"
    measured, left_out = gpu_measure.run_subjects(chosen, broken, gpu_clock.Budget(9, clock))
    assert (measured, left_out) == ([], ["some", "other"])
    assert "Left out, the device was lost: some" in gpu_report.report(rows, left_out, broken)
    # A device that a path breaks is a failure of that path.
    failures = {}
    ways = subject(clock, "some", 1, cuda=clock.takes(1)).paths(broken)
    assert gpu_measure.prepare(ways, broken, failures) == {}
    assert failures == {"cuda": ["RuntimeError: an illegal memory access"]}


FORWARD = "forward, CIFAR-10 shape, 128 × 4096"


def row(path, median, graph=None, subject=FORWARD, moved=0, **errors):
    in_graph = {} if graph is None else {"median": graph}
    return gpu_measure.Row(subject, path, {"median": median}, in_graph, 1e-5, errors, "", moved)


def cells(line):
    return [cell.strip() for cell in line.strip().strip("|").split("|")]


TORCH = [
    row("torch", 8e-5, 7e-5),
    row("compiled, tf32", 6e-5, 5e-5),
    row("contender", 3e-5, 2e-5),
    row("published formula", 2e-3),
    row("copy", 1e-5, 0.9e-5),
]


def test_the_table_compares_the_faster_path_with_the_best_of_torch():
    triton, cuda = row("triton", 4e-5, 1e-5, mean=1e-6, field=3e-6), row("cuda", 2e-5, 2e-5, mean=0)
    assert cells(gpu_report.summary([triton, cuda, *TORCH]).splitlines()[-1]) == [
        FORWARD, "40 µs", "20 µs", "3 ×", "1.5 ×", "0.5 ×", "10 µs", "20 µs", "5 ×", "2 ×", "0.9 ×",
        "100 ×",
        "3e-06", "0e+00",
    ]  # fmt: skip


def test_the_table_without_cuda_and_with_failed_cuda():
    triton = row("triton", 2e-5, 1e-5)
    line = cells(gpu_report.summary([triton, *TORCH]).splitlines()[-1])
    assert line[1:4] == ["20 µs", "", "3 ×"]
    failed = gpu_measure.Row(FORWARD, "cuda", {}, {}, 0, {}, "Unavailable: no such luck")
    line = cells(gpu_report.summary([triton, failed, *TORCH]).splitlines()[-1])
    assert line[1:4] == ["20 µs", "failed", "3 ×"]
    assert gpu_report.failed([triton, failed])
    assert not gpu_report.failed([triton, *TORCH])
    assert gpu_report.failed([failed._replace(path="cuda, uint8")])
    assert not gpu_report.failed([failed._replace(path="compiled, tf32")])


def test_the_forward_pass_is_compared_with_the_memory_floor():
    """A copy that reads and writes 3 GB in a ms: 60 MB of references in 20 µs."""
    copy = row("copy", 1e-3, subject=gpu_subjects.PLAIN_COPY, moved=3_000_000_000)
    rows = [
        copy,
        row("triton", 6e-5, 4e-5, moved=60_000_000),
        row("cuda, uint8", 1e-5, moved=15_000_000),
        row("copy", 1e-5, moved=60_000_000),
        row("triton", 1, subject="forward, digits", moved=1),
    ]
    text = gpu_report.floors(rows)
    assert "at 3 TB/s" in text
    assert "the target on sm_90 is 1.5 ×" in text
    assert [cells(line)[1:] for line in text.splitlines()[-2:]] == [
        ["triton", "20 µs", "3 ×", "2 ×"],
        ["cuda, uint8", "5 µs", "2 ×", ""],
    ]
    assert gpu_report.floors(rows[1:]) == ""
    assert gpu_subjects.PLAIN_COPY not in gpu_report.summary(rows)


@pytest.mark.parametrize("dry", [False, True])
def test_the_extension_is_built_with_cuda(monkeypatch, tmp_path, dry):
    names = ["PFGM_NATIVE", "PFGM_CUDA"]
    program = f"import os; print([os.environ.get(name) for name in {names}])"
    monkeypatch.setattr(build, "setup_command", lambda to: [sys.executable, "-c", program])
    log = tmp_path / "build.log"
    assert build.assemble_with_cuda(tmp_path, log, 60, dry) == (tmp_path / "lib", 0)
    assert ast.literal_eval(log.read_text()) == ["1", "0" if dry else "1"]


def test_a_check_says_what_can_be_measured(monkeypatch, tmp_path):
    """What failed can be measured, what ended its processes cannot."""
    lost = "not run, after 2 lost processes"
    wrong = "mean is off by 1.0e-03; allowed is 2.0e-05"
    rows = [Row("torch", "field", 1e-7), Row("triton", "field", 1e-3, failure=wrong)]
    rows += [Row("native", "field", failure=lost)]
    backends = {"torch": None, "triton": None, "native": None, "other": "it needs another device"}
    report = Report("a device", backends, rows, True)
    monkeypatch.setattr(gpu_checks.backends, "check", lambda *a, **o: report)
    assert gpu_checks.check("cuda", 60, tmp_path / "check_all.json") == 1

    def run(command, log, environment, limit):
        assert environment["XDG_CACHE_HOME"] == str(tmp_path)
        assert command[1:] == ["-m", "benchmarks.gpu.checks", "cuda", "60", str(file)]
        log.write_text("begun\nstopped after 90 s")
        if content is not None:
            file.write_text(content)
        return 1

    file = tmp_path / "check_all.json"
    monkeypatch.setattr(gpu_checks, "run_logged", run)
    content = file.read_text()
    outcome, able = gpu_checks.run_check("all", "cuda", tmp_path, {}, 60)
    assert outcome == ("pfgm check, all", 1, "passed: torch")
    assert able == ["torch", "triton"]
    content = None
    outcome, able = gpu_checks.run_check("all", "cuda", tmp_path, {}, 60)
    assert (outcome, able) == (("pfgm check, all", 1, "stopped after 90 s"), [])


CLEAN = "========= COMPUTE-SANITIZER\ndone: a\ndone: b\n"
ILLEGAL = """========= COMPUTE-SANITIZER
done: a
========= Invalid __global__ read of size 4 bytes
=========     at pfgm::weigh(int)+0x10
========= ERROR SUMMARY: 2 errors
"""


@pytest.mark.parametrize(
    ("tool", "status", "text", "wanted"),
    [
        (
            "memcheck",
            0,
            f"{CLEAN}========= ERROR SUMMARY: 0 errors\n",
            (0, "0 errors; 2 parts ran"),
        ),
        (
            "memcheck",
            gpu_checks.ERROR_STATUS,
            ILLEGAL,
            (86, "2 errors; 1 parts ran; Invalid __global__ read of size 4 bytes"),
        ),
        ("memcheck", 1, f"{CLEAN}========= ERROR SUMMARY: 0 errors", (1, "0 errors; 2 parts ran")),
        ("memcheck", 0, CLEAN, (1, "no summary, status 0; 2 parts ran")),
        ("memcheck", 124, CLEAN, (124, "stopped after 90 s; 2 parts ran")),
        (
            "racecheck",
            0,
            f"{CLEAN}========= RACECHECK SUMMARY: 0 hazards displayed (0 errors, 0 warnings)",
            (0, "0 hazards displayed (0 errors, 0 warnings); 2 parts ran"),
        ),
        (
            "racecheck",
            86,
            f"{CLEAN}========= RACECHECK SUMMARY: 1 hazard displayed (0 errors, 1 warning)",
            (0, "1 hazard displayed (0 errors, 1 warning); 2 parts ran"),
        ),
        (
            "racecheck",
            0,
            f"{CLEAN}========= RACECHECK SUMMARY: 2 hazards displayed (1 error, 1 warning)",
            (1, "2 hazards displayed (1 error, 1 warning); 2 parts ran"),
        ),
    ],
)
def test_a_sanitizer_is_clean_where_its_summary_says_so(tool, status, text, wanted):
    assert gpu_checks.sanitizer_outcome(tool, status, text)[1:] == wanted


def test_sanitizers_check_only_our_kernels(monkeypatch, tmp_path):
    monkeypatch.setattr(gpu_checks, "tool_path", lambda name: None)
    (check,) = gpu_checks.run_sanitizers(tmp_path, {})
    assert check == ("compute-sanitizer", 0, "not run: it is not found")

    def run(command, log, environment, limit):
        assert command[0] == "/bin/sanitizer"
        assert "kernel_substring=pfgm" in command
        assert command[-3:] == gpu_checks.SMOKE
        assert environment["PYTORCH_NO_CUDA_MEMORY_CACHING"] == "1"
        assert limit == gpu_checks.TOOL_SECONDS
        log.write_text(ILLEGAL)
        return gpu_checks.ERROR_STATUS

    monkeypatch.setattr(gpu_checks, "tool_path", lambda name: "/bin/sanitizer")
    monkeypatch.setattr(gpu_checks, "run_logged", run)
    memcheck, racecheck = gpu_checks.run_sanitizers(tmp_path, {})
    assert memcheck[:2] == ("compute-sanitizer memcheck", gpu_checks.ERROR_STATUS)
    assert racecheck.text.startswith("no summary")
    assert (tmp_path / "memcheck.log").read_text() == ILLEGAL


def test_tests_run_side_by_side_and_the_worst_counts(monkeypatch, tmp_path):
    folder = tmp_path / "tests" / "gpu"
    for kind in ("cuda", "triton"):
        (folder / kind).mkdir(parents=True)
    monkeypatch.setattr(gpu_checks, "ROOT", tmp_path)
    assert gpu_checks.run_tests("cuda", tmp_path, {}, 9) == ("tests/gpu, cuda", 0, "no files")
    for name in ("cuda/test_a", "test_b", "triton/test_c"):
        (folder / f"{name}.py").touch()

    def run(command, log, environment, limit):
        log.write_text("some\n1 passed\n")
        return -9 if "test_b" in command[-1] else 0

    monkeypatch.setattr(gpu_checks, "run_logged", run)
    check = gpu_checks.run_tests("cuda", tmp_path, {}, 9)
    assert check == ("tests/gpu, cuda", 9, "test_a: 1 passed; test_b: 1 passed")


def test_the_smoke_test_names_each_problem_that_ended(monkeypatch, capsys):
    few = {name: trials.TRIALS[name] for name in ("few points, 5 × 70 × 37", "field", "steps, 37")}
    monkeypatch.setattr(smoke, "TRIALS", few)
    smoke.run("reference", "cpu")
    assert capsys.readouterr().out.splitlines() == [f"done: {name}" for name in few]


def test_the_smoke_test_has_problems_of_all_sizes_and_types(monkeypatch):
    """The ways to launch, such as graphs, are no problems for compute-sanitizer."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    left_out = set(trials.TRIALS) - set(smoke.problems("torch", "cuda"))
    assert left_out == {
        "in each tile", "another stream", "a CUDA graph", "the second GPU",
        "CIFAR-10, 128 × 4096 × 3072", "Fashion-MNIST, 256 × 60000 × 784",
    }  # fmt: skip


class Stage:
    """Replaces the slow parts of the command. Each ends with the given status."""

    def __init__(self, monkeypatch, out, nvcc=True, crashed=(), **statuses):
        self.out, self._statuses, self.measured = out, statuses, []
        self._crashed, self.checked = crashed, threading.Event()
        out.mkdir()
        parts = {
            "has_nvcc": lambda: nvcc,
            "assemble": lambda folder: folder / "lib",
            "assemble_with_cuda": self._build,
            "run_check": self._check,
            "run_tests": lambda kind, *rest: self._outcome(f"tests/{kind}"),
            "run_sanitizers": lambda *rest: [self._outcome("memcheck")],
            "run_measurements": self._measure,
        }
        for name, part in parts.items():
            monkeypatch.setattr(gpu, name, part)

    def _outcome(self, name):
        return build.Outcome(name, self._statuses.get(name.removeprefix("tests/"), 0), "said")

    def _check(self, name, device, out, environment, limit):
        native = environment["PFGM_NATIVE"] == "1"
        able = ["torch", "triton", *["native"] * native]
        able = [each for each in able if each not in self._crashed]
        return gpu_checks.Checked(self._outcome(f"check {name}"), able)

    def _build(self, folder, log, limit, dry):
        assert self.checked.wait(60), "it builds while the first check and times run"
        log.write_text("nvcc: error: no such luck\n")
        return folder / "lib", self._statuses.get("build", 0)

    def _measure(self, options, environment, ours, seconds, until=None):
        self.measured.append((list(ours), environment["PFGM_NATIVE"], until is not None))
        self.checked.set()
        (self.out / "measure.log").write_text("last\n")
        content = {"suspect": None, "ours": ours, "rows": []}
        broken = self._statuses.get("broken")
        if broken in ours:
            content["suspect"] = broken
        (self.out / "results.json").write_text(json.dumps(content))
        (self.out / "table.md").write_text("the table\n")
        return gpu.LOST if broken in ours else 0

    def run(self):
        status = gpu.orchestrate(gpu.parse(["--out", str(self.out)]))
        return status, json.loads((self.out / "checks.json").read_text())


FIRST, WHOLE = (["triton"], "0", True), (["triton", "cuda"], "1", False)


def test_triton_is_measured_while_nvcc_builds_and_all_after_their_checks(
    monkeypatch, tmp_path, capsys
):
    stage = Stage(monkeypatch, tmp_path / "out")
    status, checks = stage.run()
    assert status == 0
    assert stage.measured == [FIRST, WHOLE, WHOLE]
    assert list(checks) == [
        "check first", "first times of torch, triton", "build with CUDA", "check all",
        "first times of torch, triton, cuda", "memcheck", "tests/triton", "tests/cuda", "times",
    ]  # fmt: skip
    assert capsys.readouterr().out.rstrip().endswith("the table")


def test_a_failed_build_is_reported_and_the_rest_is_measured(monkeypatch, tmp_path, capsys):
    stage = Stage(monkeypatch, tmp_path / "out", build=2)
    status, checks = stage.run()
    assert status == 2
    assert stage.measured == [FIRST, (["triton"], "0", False)]
    assert list(checks) == [
        "check first", "first times of torch, triton", "build with CUDA", "tests/triton", "times"
    ]  # fmt: skip
    table = (stage.out / "table.md").read_text()
    assert "build with CUDA (status 2): FAILED" in table
    assert "no such luck" in table
    assert "no such luck" in capsys.readouterr().out


def test_without_nvcc_triton_alone_is_measured(monkeypatch, tmp_path):
    stage = Stage(monkeypatch, tmp_path / "out", nvcc=False)
    status, checks = stage.run()
    assert status == 0
    assert [ours for ours, *_ in stage.measured] == [["triton"], ["triton"]]
    assert "no nvcc is found" in checks["build with CUDA"][1]


@pytest.mark.parametrize(
    ("crashed", "ours"),
    [(["native"], ["triton"]), (["triton"], ["cuda"]), (["native", "triton"], [])],
)
def test_kernels_that_ended_their_checks_are_not_measured(monkeypatch, tmp_path, crashed, ours):
    stage = Stage(monkeypatch, tmp_path / "out", crashed=crashed, **{"check all": 1})
    status, checks = stage.run()
    assert status == 1
    assert stage.measured[-1] == (ours, "1", False)
    assert checks["memcheck"] == [0, "said"]


@pytest.mark.parametrize("part", ["memcheck", "cuda", "triton"])
def test_a_failed_check_sets_the_status(part, monkeypatch, tmp_path):
    stage = Stage(monkeypatch, tmp_path / "out", **{part: 1})
    assert stage.run()[0] == 1
    assert stage.measured == [FIRST, WHOLE, WHOLE]


def test_measuring_is_repeated_without_the_kernels_that_broke_the_device(monkeypatch, tmp_path):
    stage = Stage(monkeypatch, tmp_path / "out", broken="cuda")
    status, checks = stage.run()
    assert status == gpu.LOST
    assert checks["times with cuda"][0] == gpu.LOST
    assert [ours for ours, *_ in stage.measured[-2:]] == [["triton", "cuda"], ["triton"]]
    assert json.loads((stage.out / "lost_cuda.json").read_text())["ours"] == ["triton", "cuda"]
    assert json.loads((stage.out / "results.json").read_text())["ours"] == ["triton"]


def test_later_times_replace_earlier_ones_and_the_others_stay(monkeypatch, tmp_path):
    def subjects_of(*names):
        return [subject(Ticking(), name, 1, triton=lambda: None) for name in names]

    def measured(*names, until=None):
        monkeypatch.setattr(gpu, "all_subjects", lambda *rest: subjects_of(*names))
        arguments = ["--out", str(tmp_path), "--dry", "--measure"]
        gpu.measure(gpu.parse(arguments + ([] if until is None else ["--until", str(until)])))
        return json.loads((tmp_path / "results.json").read_text())

    measured("a", "b")
    content = measured("b", "c")
    assert [row["subject"] for row in content["rows"]] == ["b", "c", "a"]
    content = measured("d", until=tmp_path / "results.json")  # which is there
    assert content["left out"] == ["d"]
    assert [row["subject"] for row in content["rows"]] == ["b", "c", "a"]


def test_a_subject_that_never_ends_ends_the_process():
    process = os.fork()
    if process == 0:
        with gpu_measure.ended_after(0.1):
            time.sleep(60)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) == gpu.LOST


def test_both_of_the_librarys_paths_are_in_every_subject(monkeypatch):
    """Another backend replaces those of the Triton and the CUDA kernels."""
    monkeypatch.setattr(gpu_subjects, "BACKENDS", dict.fromkeys(("triton", "cuda"), "reference"))
    chosen = gpu_subjects.all_subjects(dry=True, fashion=False, ours=("triton", "cuda"))
    assert len({subject.name for subject in chosen}) == len(chosen)
    copy, *others = chosen
    assert copy.name == gpu_subjects.PLAIN_COPY
    for subject in others:
        ways = subject.paths(gpu_clock.dry())
        assert next(iter(ways)) == "triton"
        way = ways["cuda"]()
        gpu_clock.call_all(way.calls)
        assert max(way.errors().values()) < 1e-5
        assert way.capturable == ("backward" not in subject.name)
        assert (way.moved > 0) == (way.capturable and subject.name.startswith("forward"))
    types = [path for path in others[0].paths(gpu_clock.dry()) if path.startswith("cuda")]
    assert types == ["cuda", "cuda, uint8", "cuda, bfloat16"]


class StandIn(gpu_clock.Device):
    """The CPU in place of a GPU."""

    @property
    def real(self):
        return True

    def compiled(self, function):
        return function


class Now:
    """An event, and a stream, of which nothing is left to wait for."""

    def __init__(self, **options):
        self._at = 0.0

    def record(self):
        self._at = time.perf_counter()

    def elapsed_time(self, later):
        return 1e3 * (later._at - self._at)

    def synchronize(self):
        pass

    wait_stream = replay = lambda self, *_: None


def test_events_and_graphs_with_stand_ins(monkeypatch):
    """All that runs on a GPU alone: the clock, the flushed cache, graphs, the room in memory."""
    asleep = []
    nothing = contextlib.nullcontext
    for name, value in {
        "Event": Now,
        "Stream": Now,
        "CUDAGraph": Now,
        "current_stream": Now,
        "stream": nothing,
        "graph": nothing,
        "synchronize": lambda: None,
        "empty_cache": lambda: None,
        "mem_get_info": lambda: (1 << 34, 1 << 34),
        "get_device_properties": lambda index: SimpleNamespace(L2_cache_size=1 << 12),
        "get_device_name": lambda: "a GPU",
        "_sleep": asleep.append,
    }.items():
        monkeypatch.setattr(torch.cuda, name, value)
    real = torch.empty
    with monkeypatch.context() as patch:
        patch.setattr(torch, "empty", lambda *size, dtype, device: real(*size, dtype=dtype))
        name, clock, cache = gpu_clock.gpu()
    assert (name, cache) == ("cuda", 1 << 12)
    device = StandIn("cpu", clock, cache)
    monkeypatch.setattr(gpu_subjects, "BACKENDS", dict.fromkeys(("triton", "cuda"), "reference"))
    chosen = gpu_subjects.all_subjects(dry=True, fashion=False, ours=("triton", "cuda"))
    kinds = ("a copy", "forward, CIFAR", "forward and backward", "heun")
    chosen = [subject for subject in chosen if subject.name.startswith(kinds)]
    rows, left_out = gpu_measure.run_subjects(chosen, device, gpu_clock.Budget(600), rounds=2)
    assert left_out == []
    assert gpu_report.failures_of(rows) == []
    assert all(row.seconds["median"] > 0 for row in rows)
    assert min(asleep) >= 1e6
    for row in rows:
        captured = "backward" not in row.subject and row.path != "published formula"
        assert bool(row.graph) == captured, row
    assert gpu_report.circumstances(device)["device"] == "a GPU"
    assert gpu_report.summary(rows) in gpu_report.report(rows, left_out, device)


def test_steps_in_torch_agree_with_the_library():
    """The published substitution and the log grid differ, but hardly at this level and step
    length."""
    for solver in ("euler", "heun", "multistep"):
        step = gpu_subjects.Step(solver, 20.0, 20.0 * 0.999, 20.0 / 0.999)
        at = gpu_subjects.Points(*(t.double() for t in gpu_subjects.points(4, 64, 20.0)))
        plain = gpu_subjects.published_step(step, at)
        ours = gpu_subjects.our_step(
            step, "reference", gpu_subjects.Points(*(t.clone() for t in at))
        )
        for a, b in zip(*(v if isinstance(v, tuple) else (v,) for v in (plain, ours)), strict=True):
            assert (a - b).norm() <= 2e-4 * (b - at.x).norm() + 1e-5 * b.norm(), solver


def test_field_in_torch_agrees_with_the_library():
    generator = torch.Generator().manual_seed(0)
    x, references = torch.randn(2, 8, 5, generator=generator, dtype=torch.float64)
    case = gpu_subjects.Case(x, torch.rand(8, generator=generator).double() + 0.5, references)
    field = gpu_subjects.field_formula(case)
    right = pfgm.field_fn(case.x, case.z, case.references, backend="reference")
    for a, b in zip(field, right, strict=True):
        torch.testing.assert_close(a, b)


def test_errors_are_those_of_the_result():
    generator = torch.Generator().manual_seed(0)
    x, references = torch.randn(2, 8, 5, generator=generator)
    case = gpu_subjects.Case(x, torch.ones(8), references)
    mean, logsumexp = posterior_paths.exact_result(case)
    exact = gpu_subjects.forward_errors(case, lambda: (mean, logsumexp))
    assert max(exact.values()) == 0
    off = gpu_subjects.forward_errors(
        case, lambda: (mean, logsumexp + 0.5 * logsumexp.abs().clamp(min=1))
    )
    assert math.isclose(off["logsumexp"], 0.5)
    shift = torch.zeros_like(mean)
    shift[3, 2] = 0.1 * references.double().norm(dim=1).max()
    assert math.isclose(
        gpu_subjects.forward_errors(case, lambda: (mean + shift, logsumexp))["mean"],
        0.1,
        rel_tol=1e-6,
    )
