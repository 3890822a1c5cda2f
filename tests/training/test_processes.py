"""Several processes: sharded references, joint training, and the loss of a process."""

import contextlib
import csv
import math
import os
import re
import shlex
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist

import pfgm
from pfgm.training.checkpoint import load_run
from pfgm.training.locks import FolderInUse, locked
from pfgm.training.processes import Processes, joined

SCRIPTS = Path(__file__).parent / "processes"

pytestmark = pytest.mark.skipif(
    not (dist.is_available() and dist.is_gloo_available()), reason="torch has no gloo here"
)


def torchrun(script, *arguments):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    return subprocess.run(
        [*command, SCRIPTS / script, *map(str, arguments)],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=120,
    )


def start(script, rank, port, *arguments):
    """One of two processes, started as by torchrun but without its supervision."""
    environment = {
        "OMP_NUM_THREADS": "1",
        "TORCHELASTIC_RUN_ID": "test",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "WORLD_SIZE": "2",
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
    }
    return subprocess.Popen(
        [sys.executable, SCRIPTS / script, *map(str, arguments)],
        env=os.environ | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


@contextlib.contextmanager
def started(script, *arguments):
    """Two processes, which do not outlive the block."""
    port = free_port()
    both = [start(script, rank, port, *arguments) for rank in range(2)]
    try:
        yield both
    finally:
        for process in both:
            process.kill()


def free_port():
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        return unused.getsockname()[1]


def save_points(path):
    np.save(path, np.random.default_rng(0).normal(size=(101, 2)).astype(np.float32))


@pytest.fixture
def points(tmp_path):
    save_points(tmp_path / "points.npy")
    return tmp_path / "points.npy"


def test_one_process_alone():
    processes = Processes()
    assert (processes.rank, processes.size, processes.leads) == (0, 1, True)
    with joined(torch.device("cpu")) as device:
        assert device == torch.device("cpu")
        assert not dist.is_initialized()
    with pytest.raises(RuntimeError, match="call init_process_group"):
        pfgm.ReferenceSet(torch.rand(10, 2)).shard()


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """What two processes printed that shared references and then trained twice, and the folder."""
    folder = tmp_path_factory.mktemp("together")
    images = np.random.default_rng(0).integers(0, 256, (61, 3, 4, 5), dtype=np.uint8)
    np.save(folder / "images.npy", images)
    save_points(folder / "points.npy")
    calls = [["shared_references.py", folder / "images.npy"], ["wrapped.py", folder]]
    for kind in ("whole", "shared"):
        calls.append(["training.py", folder / kind, folder / "points.npy", kind, 20])
    calls.append(["minutes.py", folder / "minutes"])
    with started("together.py", *(shlex.join(map(str, call)) for call in calls)) as both:
        outputs = [process.communicate(timeout=120)[0] for process in both]
    assert [process.returncode for process in both] == [0, 0], outputs
    return "".join(outputs), folder


def test_references_in_two_processes(finished):
    assert len(re.findall(r"rank \d is content", finished[0])) == 2


def test_wrapped_networks_of_two_processes_are_saved_and_loaded(finished):
    for wrapper in ("ddp", "fsdp1", "fsdp1-names", "fsdp2", "held-fsdp1", "held-fsdp2"):
        assert finished[0].count(f": {wrapper} is content") == 2


@pytest.mark.parametrize("kind", ["whole", "shared"])
def test_training_in_two_processes(finished, kind):
    output, folder = finished
    assert output.count(f"at step 20 with {kind} references") == 2
    with (folder / kind / "log.csv").open() as file:
        assert [int(row["step"]) for row in csv.DictReader(file)] == [5, 10, 15, 20]
    assert load_run(folder / kind)[2]["step"] == 20


def test_minutes_and_evaluations_in_two_processes(finished):
    for rank, count in ((0, 2), (1, 0)):
        assert f"rank {rank} trained for minutes with {count} evaluations" in finished[0]


@pytest.mark.slow
def test_a_process_that_dies_ends_the_others_and_the_run_goes_on(tmp_path, points):
    run = tmp_path / "run"
    with started("training.py", run, points, "whole", 40, 25) as both:
        assert both[1].wait(timeout=120) == 9
        died = time.monotonic()
        output, _ = both[0].communicate(timeout=60)
        assert time.monotonic() - died < 40  # the processes were given 30 s for an answer
    assert both[0].returncode != 0
    assert "ProcessLost: another process of the run has ended or does not answer" in output
    assert load_run(run)[2]["step"] == 20
    done = torchrun("training.py", run, points, "whole", 40)
    assert done.returncode == 0, done.stdout + done.stderr
    assert load_run(run)[2]["step"] == 40


@pytest.mark.slow
def test_a_signal_to_one_process_and_the_lock_of_all(tmp_path, points, handled):
    handled(signal.SIGHUP, signal.SIG_DFL)  # nohup ignores it
    run = tmp_path / "run"
    with started("training.py", run, points, "whole", 10**6) as both:
        deadline = time.monotonic() + 60
        while not (run / "latest.json").exists():
            assert time.monotonic() < deadline
            time.sleep(0.05)
        with pytest.raises(FolderInUse, match=f"process {both[0].pid} on"), locked(run):
            pass
        both[1].send_signal(signal.SIGHUP)
        outputs = [process.communicate(timeout=60)[0] for process in both]
    assert [process.returncode for process in both] == [143, 129], outputs
    step = load_run(run)[2]["step"]
    with locked(run):
        done = torchrun("training.py", run, points, "whole", step + 5)
    assert done.returncode != 0
    held = f"got {run}, which process {os.getpid()}"
    assert (
        f"FolderInUse: the output folder must not be in use by another run, {held}" in done.stderr
    )
    assert load_run(run)[2]["step"] == step


@pytest.mark.parametrize("timeout", [math.nan, -1, 0, math.inf])
def test_bad_timeouts(timeout):
    message = r"timeout must be from 0\.001 to 1e8 seconds, got"
    with pytest.raises(ValueError, match=message), joined(torch.device("cpu"), timeout):
        pass


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="needs fork, and SIGXFSZ for a full disk")
def test_a_run_survives_kills_and_a_full_disk(tmp_path):
    done = subprocess.run(
        [sys.executable, SCRIPTS / "survival.py", tmp_path, "20"],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "killed 20 times" in done.stdout
