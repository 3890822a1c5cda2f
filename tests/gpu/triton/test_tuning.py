"""The choice among a kernel's configurations."""

import pytest
import torch
from pfgm.kernels import distances, posterior_mean, problem, tuning
from pfgm.kernels.tuning import Choice, Config
from triton.runtime.errors import OutOfResources

CONFIGS = [Config({"TILE": size}) for size in (16, 32, 64)]
TIMES = {16: 3.0, 32: 1.0, 64: 2.0}


class Recorder:
    """A choice whose timings are given, and the tiles that ran."""

    def __init__(self, too_large=()):
        self.ran, self.measured, self.too_large = [], [], too_large
        self.choice = Choice(lambda shape: CONFIGS[: shape[0]], self.measure)

    def run(self, config):
        if config["TILE"] in self.too_large:
            raise OutOfResources(300, 200, "shared memory")
        self.ran.append(config["TILE"])

    def measure(self, run):
        run()
        self.measured.append(self.ran.pop())
        return TIMES[self.measured[-1]]

    def launch(self, *shape, device="cpu"):
        self.choice.launch(shape, torch.device(device), self.run)


@pytest.fixture
def timed(monkeypatch):
    monkeypatch.setattr(tuning, "interpreted", lambda: False)


@pytest.mark.usefixtures("timed")
def test_the_fastest_is_measured_once_a_shape_class():
    recorder = Recorder()
    recorder.launch(3)
    recorder.launch(3)
    assert recorder.measured == [16, 32, 64]
    assert recorder.ran == [32, 32]
    recorder.launch(2)
    assert recorder.measured == [16, 32, 64, 16, 32]


@pytest.mark.usefixtures("timed")
def test_one_configuration_is_not_measured():
    recorder = Recorder()
    recorder.launch(1)
    assert recorder.measured == []
    assert recorder.ran == [16]


@pytest.mark.usefixtures("timed")
def test_configurations_that_do_not_fit_the_device_are_skipped():
    recorder = Recorder(too_large=(32,))
    recorder.launch(3)
    assert recorder.ran == [64]


@pytest.mark.usefixtures("timed")
def test_a_forced_configuration_is_not_measured():
    recorder = Recorder()
    with tuning.forced(1):
        recorder.launch(3)
        recorder.launch(1)  # of which there is one alone
    assert (recorder.measured, recorder.ran) == ([], [32, 16])
    recorder.launch(3)
    assert recorder.measured == [16, 32, 64]


@pytest.mark.usefixtures("timed")
def test_deterministic_algorithms_take_the_first():
    recorder = Recorder()
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    try:
        recorder.launch(3)
    finally:
        torch.use_deterministic_algorithms(before)
    assert (recorder.ran, recorder.measured) == ([16], [])


@pytest.mark.usefixtures("timed")
def test_measured_choices_are_not_used_where_timing_is_off(monkeypatch):
    recorder = Recorder()
    recorder.launch(3)
    monkeypatch.setenv("PFGM_TUNE", "0")
    recorder.launch(3)
    assert recorder.ran == [32, 16]


@pytest.mark.usefixtures("timed")
def test_each_kind_of_device_has_its_own_choice(monkeypatch):
    kinds = {0: ("one", 9), 1: ("one", 9), 2: ("other", 8)}
    monkeypatch.setattr(tuning, "kind_of", lambda device: kinds[device.index])
    recorder = Recorder()
    for index in (0, 1, 2):
        recorder.launch(3, device=f"cuda:{index}")
    assert recorder.measured == [16, 32, 64] * 2
    assert recorder.ran == [32, 32, 32]


@pytest.mark.usefixtures("timed")
def test_nothing_is_measured_while_a_graph_is_captured(monkeypatch):
    """The choice is not kept then, and one that was made before holds."""
    recorder = Recorder()
    monkeypatch.setattr(tuning, "capturing", lambda: True)
    recorder.launch(3)
    assert (recorder.ran, recorder.measured) == ([16], [])
    monkeypatch.setattr(tuning, "capturing", lambda: False)
    recorder.launch(3)
    monkeypatch.setattr(tuning, "capturing", lambda: True)
    recorder.launch(3)
    assert recorder.ran == [16, 32, 32]
    assert recorder.measured == [16, 32, 64]


@pytest.mark.usefixtures("timed")
@pytest.mark.parametrize(("processes", "ran"), [(2, [16]), (1, [32])])
def test_processes_that_train_together_choose_alike(monkeypatch, processes, ran):
    monkeypatch.setattr(torch.distributed, "is_available", lambda: True)
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: processes)
    recorder = Recorder()
    recorder.launch(3)
    assert recorder.ran == ran


def test_the_time_of_a_run_is_that_between_marks(monkeypatch):
    """Each round takes longer by 8 ms than the one before; the median of five is the third."""
    clock, runs, waited = [0.0], [], []

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            self.at = clock[0]

        def synchronize(self):
            waited.append(self.at)

        def elapsed_time(self, end):
            return end.at - self.at

    def run():
        runs.append(None)
        clock[0] += (len(runs) + 6) // tuning.RUNS  # 0 for the first, which compiles

    monkeypatch.setattr(torch.cuda, "Event", Event)
    assert tuning.median_seconds(run) == pytest.approx(3e-3)
    assert waited == [clock[0]]  # and for nothing else on the device
    assert len(runs) == 1 + tuning.ROUNDS * tuning.RUNS


def test_few_shape_classes():
    """Similar sizes share a class, so that a smaller last batch is not tuned separately."""
    x = torch.zeros(100, 50)
    classes = {problem.Problem(x, x, x[:, 0], 1.0, "high").shape(rows) for rows in range(65, 129)}
    assert len(classes) == 1


@pytest.mark.parametrize("configs", [distances.distance_configs, posterior_mean.sum_configs])
def test_every_shape_class_has_configurations(configs):
    for rows in (1, 2, 16, 32, 64, 128, 4096):
        for features in (1, 32, 4096):
            for project in (False, True):
                shape = problem.Shape(rows, features, torch.float32, "high", project)
                assert 1 <= len(configs(shape)) <= 3
