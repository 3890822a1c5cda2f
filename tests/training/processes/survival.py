"""Kills a training process again and again: python survival.py FOLDER KILLS."""

import os
import random
import resource
import signal
import sys
import time
from pathlib import Path

import pytest
import torch

import pfgm
from pfgm.training import TrainConfig, Trainer
from pfgm.training.checkpoint import load_run

DATA = torch.randn(64, 2, generator=torch.Generator().manual_seed(0))


def trainer(folder, steps):
    torch.manual_seed(0)
    # The schedule of the longest run, because it would follow from the steps.
    schedule = TrainConfig(steps=1_000_000).schedule._replace(warmup=2, checkpoint_every=2)
    config = TrainConfig(
        steps=steps, batch_size=16, reference_batch=32, log_every=10**6, **schedule._asdict()
    )
    flow = pfgm.PoissonFlow.from_data(DATA)
    network = flow.network("mlp", width=32, depth=1)
    return Trainer(flow, network, DATA, config, folder=folder, progress=False)


def train_until_killed(folder, seconds):
    """Kills a training process at some moment after it has written another checkpoint."""
    latest = folder / "latest.json"
    before = latest.read_bytes() if latest.exists() else b""
    child = os.fork()
    if child == 0:
        running = trainer(folder, 1_000_000)
        if before:
            running.resume()
        running.train()
        os._exit(1)
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline and not (latest.exists() and latest.read_bytes() != before):
        time.sleep(0.001)
    time.sleep(seconds)
    os.kill(child, signal.SIGKILL)
    assert os.waitpid(child, 0)[1] == signal.SIGKILL


def weights(network):
    return torch.cat([p.detach().flatten() for p in network.parameters()])


def killed(folder, kills):
    """Kills runs, checks that each checkpoint can be loaded, and returns the last step."""
    draw, step = random.Random(0), 0
    for _ in range(kills):
        train_until_killed(folder, draw.uniform(0, 0.1))
        _, _, state = load_run(folder)
        assert state["step"] > step
        step = state["step"]
        flow, network = pfgm.load(folder)
        assert flow.sample(network, 1, steps=2).isfinite().all()
    return step


def full_disk(folder):
    """A checkpoint that cannot be written leaves the previous one, and no partial file."""
    step = load_run(folder)[2]["step"]
    before = sorted(path.name for path in folder.iterdir())
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    room = (folder / "log.csv").stat().st_size + 1024  # for the log, not for a checkpoint
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, resource.RLIM_INFINITY))
    running = trainer(folder, step + 10)
    running.resume()
    with pytest.raises(OSError, match=rf"{folder}/step-\d+\.state\.pt cannot be written"):
        running.train()
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    assert load_run(folder)[2]["step"] == step
    after = {path.name for path in folder.iterdir() if "events" not in path.name}
    assert after <= set(before), after - set(before)


if __name__ == "__main__":
    torch.set_num_threads(1)
    run, kills = Path(sys.argv[1]), int(sys.argv[2])
    reached = killed(run, kills)
    full_disk(run)
    resumed = trainer(run, reached + 2)
    resumed.resume()
    resumed.train()
    assert not list(run.glob(".pfgm-*"))
    whole = trainer(None, reached + 2)
    whole.train()
    assert torch.equal(weights(resumed.network), weights(whole.network))
    assert torch.equal(weights(resumed.averaged), weights(whole.averaged))
    print(f"killed {kills} times, and at step {reached + 2} to the bit")
