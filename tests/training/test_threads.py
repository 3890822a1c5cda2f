"""The number of threads that commands train with, and how OpenMP's threads wait."""

import itertools
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

import pfgm
from pfgm.training import TrainConfig, Trainer, runs
from pfgm.training.checkpoint import load_run
from pfgm.training.runs import RunConfig
from pfgm.training.threads import fastest_count, training_threads
from pfgm_command import sleep_at_barriers

SMALL = TrainConfig(steps=4, batch_size=16, reference_batch=32, warmup=2, learning_rate=1e-3)


@pytest.mark.parametrize(
    ("set_by_user", "chosen"),
    [
        ({}, {"GOMP_SPINCOUNT": "1000", "KMP_BLOCKTIME": "0"}),
        ({"OMP_WAIT_POLICY": "active"}, {}),
        ({"GOMP_SPINCOUNT": "7"}, {}),
        ({"KMP_BLOCKTIME": "200"}, {}),
    ],
)
def test_the_wait_is_chosen_unless_the_user_has_set_one(set_by_user, chosen):
    environment = dict(set_by_user)
    sleep_at_barriers(environment)
    assert environment == set_by_user | chosen


def test_the_wait_is_chosen_before_torch_is_imported():
    code = (
        "import builtins, os, sys\n"
        "import pfgm_command\n"
        "load = builtins.__import__\n"
        "def noting(name, *rest, **named):\n"
        "    if name == 'torch':\n"
        "        print(os.environ.get('GOMP_SPINCOUNT'))\n"
        "        os._exit(0)\n"
        "    return load(name, *rest, **named)\n"
        "builtins.__import__ = noting\n"
        "sys.argv = ['pfgm', 'info']\n"
        "pfgm_command.main()"
    )
    shown = subprocess.run(
        [sys.executable, "-u", "-c", code], capture_output=True, text=True, env={}, check=True
    )
    assert shown.stdout == "1000\n"


@pytest.mark.parametrize(
    ("seconds", "count"),
    [
        ({1: 0.1, 2: 0.08, 4: 0.05, 6: 0.04}, 6),
        ({1: 0.1, 2: 0.08, 4: 0.05, 6: 0.07}, 4),
        ({1: 0.1, 2: 0.098, 4: 0.2, 6: 0.3}, 1),  # one is as fast
        ({1: 0.1, 2: 0.05, 4: 0.049, 6: 0.05}, 2),
        ({1: 0.1, 2: 3.0, 4: 3.0, 6: 3.0}, 1),  # a busy machine
        ({1: 0.6, 2: 0.7, 4: 0.7, 6: 0.7}, 6),  # a large network is not timed further
    ],
)
def test_the_fastest_count_is_the_smallest_of_those_as_fast(threads, seconds, count):
    threads(6)
    now = itertools.accumulate(itertools.repeat(0.0))
    passed = [0.0]

    def step():
        passed[0] += seconds[torch.get_num_threads()]

    assert fastest_count(step, clock=lambda: next(now) + passed[0]) == count
    assert torch.get_num_threads() == 6


def new_trainer(folder=None):
    data = torch.randn(64, 3, generator=torch.Generator().manual_seed(0))
    flow = pfgm.PoissonFlow.from_data(data)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = flow.network("mlp", width=16)
    return Trainer(flow, network, data, SMALL, folder=folder, progress=False)


def test_a_rehearsal_changes_nothing_of_the_run():
    whole, rehearsed = new_trainer(), new_trainer()
    before, rehearse = torch.get_rng_state(), rehearsed._rehearsal()
    assert float(rehearse()) == float(rehearse())
    assert torch.equal(torch.get_rng_state(), before)
    assert all(p.grad is None for p in rehearsed.network.parameters())
    for a, b in zip(whole.train().parameters(), rehearsed.train().parameters(), strict=True):
        assert torch.equal(a, b)


@pytest.fixture
def two_is_fastest(monkeypatch, threads):
    """Where nothing else decides, two of three threads are fastest."""
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr("pfgm.training.threads.fastest_count", lambda step: 2)
    threads(3)
    return monkeypatch


def test_a_resumed_run_takes_the_number_of_its_checkpoint(two_is_fastest, tmp_path):
    with training_threads(new_trainer(tmp_path)) as count:
        assert count == torch.get_num_threads() == 2
        new_trainer(tmp_path).train()
    assert torch.get_num_threads() == 3
    assert load_run(tmp_path).state["threads"] == 2

    two_is_fastest.setattr("pfgm.training.threads.fastest_count", lambda step: 1)
    trainer = new_trainer(tmp_path)
    trainer.resume()
    with training_threads(trainer, resumed=True) as count:
        assert count == 2
    torch.set_num_threads(1)  # a smaller machine
    with training_threads(trainer, resumed=True) as count:
        assert count == 1


@pytest.mark.parametrize(("variable", "alone_on_cpu"), [("3", True), (None, False)])
def test_the_number_of_threads_stays_if_something_else_decides(
    two_is_fastest, variable, alone_on_cpu
):
    if variable is not None:
        two_is_fastest.setenv("OMP_NUM_THREADS", variable)
    trainer = SimpleNamespace(_computes_alone_on_cpu=alone_on_cpu, _settle_precision=lambda: None)
    with training_threads(trainer) as count:
        assert count == 3


def test_the_commands_train_with_the_fastest_number(two_is_fastest, tmp_path):
    lines = []

    def started(trainer):
        raise SystemExit(torch.get_num_threads())

    two_is_fastest.setattr(Trainer, "train", started)
    config = RunConfig(network="mlp", width=16, samples=20, training=SMALL)
    with pytest.raises(SystemExit, match="2"):
        runs.start(config, tmp_path / "run", progress=False, report=lines.append)
    assert all("threads: 2" in line for line in lines)
    assert torch.get_num_threads() == 3
