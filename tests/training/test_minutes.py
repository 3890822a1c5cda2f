"""Runs of some minutes, by a clock that the steps move."""

import csv
import itertools
import json
import math
import signal

import numpy as np
import pytest
import torch

import pfgm
from pfgm.training import Terminated, TrainConfig, Trainer, budget
from pfgm.training.run_config import RunConfig
from pfgm.training.runs import start

_SECONDS = 1e-7  # of a parameter in the step of a sample, at speed 1


def row(steps, width, quality, *, batch=64, cost=1.0):
    sizes = {"width": width, "multipliers": (1, 2, 2), "patch": 2, "batch": batch}
    return budget.Row("data", (1, 28, 28), **sizes, cost=cost, steps=steps, quality=quality)


class Clock:
    """A clock that stands still except in a step of training, by its network and its batch."""

    def __init__(self):
        self.now, self.speed, self.steps = 1000.0, 1.0, 0
        self.faster_in_bfloat16 = 1.0

    def __call__(self):
        return self.now

    def gradients(self, trainer, network, precision=None):
        parameters = sum(p.numel() for p in trainer.network.parameters())
        used = precision or trainer.config.precision
        speed = self.speed * (self.faster_in_bfloat16 if used == "bfloat16" else 1.0)
        self.now += _SECONDS * parameters * trainer.config.batch_size / speed
        self.steps += 1
        for p in trainer.network.parameters():
            p.grad = torch.zeros_like(p)
        return torch.zeros(())


@pytest.fixture
def clock(monkeypatch):
    """The clock; small networks are the best ones, so that steps are quick."""
    clock = Clock()
    rows = [row(2**k, 8 * (1 + k), 1.0 / k, batch=8) for k in range(1, 6)]
    monkeypatch.setattr(budget, "read_rows", lambda: rows)
    monkeypatch.setattr(Trainer, "_clock", staticmethod(clock))
    monkeypatch.setattr(Trainer, "_gradients", lambda *given: clock.gradients(*given))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    return clock


@pytest.fixture
def images(tmp_path):
    generator = np.random.default_rng(0)
    path = tmp_path / "images.npy"
    np.save(path, generator.integers(0, 256, (40, 28, 28), dtype=np.uint8))
    return str(path)


def train(images, out, minutes=2, *, report=lambda line: None, resume=False, **settings):
    training = {"minutes": minutes, "evaluate_every": 0} | settings.pop("training", {})
    config = RunConfig(data=images, training=TrainConfig(**training), **settings)
    start(config, out, progress=False, report=report, resume=resume)
    return RunConfig.load(out)


def log_of(out, name="log.csv"):
    with (out / name).open() as file:
        return [{k: float(v) for k, v in row.items()} for row in csv.DictReader(file)]


def checkpoint_step(out):
    return json.loads((out / "latest.json").read_text())["step"]


# ---- what fits ----------------------------------------------------------------------------------


def test_a_faster_machine_trains_a_larger_network_for_the_same_minutes(clock, images, tmp_path):
    widths = []
    for speed in (0.25, 1.0, 4.0):
        clock.speed, began = speed, clock.now
        out = tmp_path / f"{speed}"
        config = train(images, out, 1)
        assert 0.9 * 60 <= clock.now - began <= 60
        widths.append(config.width)
    assert widths == sorted(widths)
    assert widths[0] < widths[-1]


def test_the_choices_and_their_reason_are_said_and_stored(clock, images, tmp_path):
    lines = []
    config = train(images, tmp_path / "run", report=lines.append)
    (reason,) = (line for line in "\n".join(lines).splitlines() if line.startswith("budget"))
    assert f"width {config.width}, multipliers" in reason
    assert f"batch {config.training.batch_size}" in reason
    assert "2 minutes" in reason
    assert config.training.minutes == 2
    assert None not in (config.multipliers, config.patch, config.training.warmup)


def test_a_choice_that_is_given_stays(clock, images, tmp_path):
    config = train(images, tmp_path / "run", 0.2, width=16, patch=4, training={"batch_size": 5})
    assert (config.width, config.patch, config.training.batch_size) == (16, 4, 5)


def test_points_and_tables_train_for_minutes_too(clock, tmp_path):
    np.save(tmp_path / "points.npy", np.random.default_rng(0).standard_normal((50, 2)))
    began = clock.now
    config = train(str(tmp_path / "points.npy"), tmp_path / "run")
    assert 110 <= clock.now - began <= 120
    assert config.training.batch_size == 50
    assert config.training.precision == "float32"


# ---- the time -----------------------------------------------------------------------------------


def test_the_learning_rate_falls_to_zero_also_on_a_machine_that_slows_down(
    clock, images, tmp_path, monkeypatch
):
    began, gradients = clock.now, clock.gradients

    def slower(*given):
        clock.speed = 1.0 if clock.now - began < 60 else 0.2
        return gradients(*given)

    train(images, tmp_path / "even", training={"log_every": 1})
    monkeypatch.setattr(clock, "gradients", slower)
    began = clock.now
    train(images, tmp_path / "slower", training={"log_every": 1})
    assert clock.now - began <= 120
    even, slow = (log_of(tmp_path / name) for name in ("even", "slower"))
    first = even[0]["seconds"]
    ratio = (60 - first + 60 / 5) / (120 - first)  # the second half has a fifth of its steps
    assert len(slow) / len(even) == pytest.approx(ratio, rel=0.1)
    peak = max(row["lr"] for row in slow)
    assert slow[-1]["lr"] < 0.1 * peak  # of the last step, a twelfth of its half
    rate = RunConfig.load(tmp_path / "slower").training.learning_rate
    for before, row in itertools.pairwise(slow[len(slow) // 2 :]):  # the cosine of the time
        expected = rate * 0.5 * (1 + math.cos(math.pi * before["seconds"] / 120))
        assert row["lr"] == pytest.approx(expected, rel=1e-3, abs=1e-3 * rate)


def evaluating(clock, seconds):
    """A trainer's evaluations of these seconds, and the times at which they began."""
    times = []

    def evaluate(step, network):
        times.append(clock.now)
        clock.now += seconds
        return {"figure": 0.5}

    return evaluate, times


def trainer(clock, folder, *, evaluate=None, **settings):
    data = torch.rand(50, 1, 8, 8, generator=torch.Generator().manual_seed(0)) * 2 - 1
    flow = pfgm.PoissonFlow.from_data(data)
    network = flow.network("unet", width=16, multipliers=(1,))
    config = TrainConfig(batch_size=25, **settings)
    return Trainer(flow, network, data, config, folder=folder, progress=False, evaluate=evaluate)


@pytest.mark.parametrize("seconds", [0.5, 1.4])
def test_evaluations_are_within_the_minutes(clock, tmp_path, seconds):
    evaluate, times = evaluating(clock, seconds)
    began = clock.now
    trainer(clock, tmp_path, evaluate=evaluate, minutes=0.1).train()
    assert clock.now - began <= 6 * 1.05
    first, last = (time - began for time in times)
    assert 1.0 < first < 2.0  # a quarter of what is left beside the evaluation
    assert 6 * 0.95 < last + seconds <= 6 * 1.05


def test_an_evaluation_that_does_not_fit_is_left_out_and_said(clock, tmp_path):
    evaluate, times = evaluating(clock, 5.0)
    with pytest.warns(UserWarning, match=r"the last evaluation is left out, as 0\.1 minutes"):
        trainer(clock, tmp_path, evaluate=evaluate, minutes=0.1).train()
    assert len(times) == 1
    assert clock.now - (times[0] + 5.0) < 0.3  # then a step, which shows that no other one fits


def test_evaluations_every_few_steps_stop_where_they_do_not_fit(clock, tmp_path):
    evaluate, times = evaluating(clock, 1.0)
    began = clock.now
    trainer(clock, tmp_path, evaluate=evaluate, minutes=0.1, evaluate_every=1).train()
    assert clock.now - began <= 6 * 1.05
    assert 3 <= len(times) <= 6


# ---- a run that is resumed ----------------------------------------------------------------------


def stopped_after(clock, share, images, out):
    """A run of 2 minutes that a signal ends after this share of them."""
    began, gradients = clock.now, clock.gradients

    def ended(*given):
        if clock.now - began > share * 120:
            signal.raise_signal(signal.SIGINT)
        return gradients(*given)

    clock.gradients = ended
    with pytest.raises(KeyboardInterrupt):
        train(images, out, training={"log_every": 1})
    clock.gradients = gradients
    return clock.now - began


def test_a_resumed_run_has_what_is_left_on_a_faster_machine(clock, images, tmp_path):
    out = tmp_path / "run"
    used = stopped_after(clock, 0.5, images, out)
    before, stored = log_of(out), RunConfig.load(out)
    lines, clock.now, clock.speed = [], clock.now + 5000, 3.0  # the pause does not count
    began = clock.now
    again = train(images, out, training={"log_every": 1}, report=lines.append, resume=True)
    assert again == stored  # chosen once
    assert f"{(120 - used) / 60:.1f} of 2 minutes left" in "\n".join(lines)
    assert 0.9 * (120 - used) <= clock.now - began <= 120 - used
    after = log_of(out)[len(before) :]
    assert math.isclose(after[0]["lr"], before[-1]["lr"], rel_tol=0.1)
    assert after[-1]["lr"] < 0.01 * before[0]["lr"]
    assert 110 <= after[-1]["seconds"] <= 120


def test_nothing_is_left_after_the_minutes_unless_more_are_given(clock, images, tmp_path):
    out, lines, began = tmp_path / "run", [], clock.now
    train(images, out)
    step = checkpoint_step(out)
    train(images, out, report=lines.append, resume=True)
    assert "nothing is left of 2 minutes; give more with --minutes" in "\n".join(lines)
    assert checkpoint_step(out) == step
    train(images, out, minutes=3, resume=True)
    assert 170 <= clock.now - began <= 180
    assert checkpoint_step(out) > step


def test_an_evaluation_that_a_signal_ends_is_made_again(clock, tmp_path):
    """Its time is not taken for that of a whole one."""

    def ended(step, network):
        clock.now += 0.1
        signal.raise_signal(signal.SIGTERM)

    with pytest.raises(Terminated):
        trainer(clock, tmp_path, evaluate=ended, minutes=0.1).train()
    evaluate, times = evaluating(clock, 1.0)
    second, began = trainer(clock, tmp_path, evaluate=evaluate, minutes=0.1), clock.now
    step = second.resume()
    second.train()
    assert times[0] == began
    assert log_of(tmp_path, "evaluations.csv")[0]["step"] == step
    assert len(times) == 2


def test_of_large_images_few_are_timed(clock, tmp_path):
    """The default network on one image of 256 × 256 takes as long as on 64 of 32 × 32."""
    images = np.random.default_rng(0).integers(0, 256, (40, 256, 256), dtype=np.uint8)
    np.save(tmp_path / "large.npy", images)
    batches, gradients = [], clock.gradients

    def counted(trainer, *given):
        batches.append(trainer.config.batch_size)
        return gradients(trainer, *given)

    clock.gradients = counted
    train(str(tmp_path / "large.npy"), tmp_path / "run")
    assert batches[0] == 1


# ---- precision ----------------------------------------------------------------------------------


@pytest.mark.parametrize(("faster", "chosen"), [(1.3, "bfloat16"), (1.1, "float32")])
def test_the_precision_follows_the_processor_once(clock, images, tmp_path, faster, chosen):
    out, lines = tmp_path / "run", []
    clock.faster_in_bfloat16 = faster
    config = train(images, out, 1, width=16, report=lines.append)
    assert config.training.precision == chosen
    assert f"bfloat16 {faster} times as fast as float32" in "\n".join(lines)
    clock.faster_in_bfloat16 = 1 / faster
    assert train(images, out, 2, width=16, resume=True).training.precision == chosen


def test_a_trainer_of_ones_own_records_and_keeps_the_precision(clock, tmp_path):
    clock.faster_in_bfloat16 = 2.0
    first = trainer(clock, tmp_path, steps=3)
    first.train()
    assert first.config.precision == "bfloat16"
    clock.faster_in_bfloat16 = 0.5
    second = trainer(clock, tmp_path, steps=6)
    second.resume()
    second.train()
    assert second.config.precision == "bfloat16"


def test_targets_losses_and_averages_are_in_float32(monkeypatch):
    data = torch.rand(20, 1, 8, 8) * 2 - 1
    flow, seen = pfgm.PoissonFlow.from_data(data), []

    def loss(net, x, *given, **options):
        value = flow.loss(net, x, *given, **options)
        seen.append((value.dtype, net(x, torch.ones(len(x)))[0].dtype))
        return value

    network = flow.network("unet", width=16, multipliers=(1,))
    config = TrainConfig(steps=2, batch_size=10, precision="bfloat16")
    averaged = Trainer(flow, network, data, config, progress=False, loss=loss).train()
    assert {each for each, _ in seen} == {torch.float32}
    assert {p.dtype for p in averaged.parameters()} == {torch.float32}


def test_a_run_of_a_length_that_nobody_chose_says_how_long_it_takes(clock, images, tmp_path):
    lines, steps = [], itertools.count()
    gradients = clock.gradients

    def end_soon(*given):
        if next(steps) > 20:
            signal.raise_signal(signal.SIGINT)
        return gradients(*given)

    clock.gradients = end_soon
    config = RunConfig(data=images, width=16)
    with pytest.raises(KeyboardInterrupt):
        start(config, tmp_path / "run", progress=False, report=lines.append)
    (said,) = (line for line in "\n".join(lines).splitlines() if "hours" in line)
    assert said.startswith("100000 steps of ")
    assert "--minutes" in said


# ---- the fit ------------------------------------------------------------------------------------


def test_the_fit_finds_a_power_of_the_time():
    """Where the best width is 2·time^(1/2), it is found between and beyond the rows."""
    rows = []
    for time in (64, 256, 1024, 4096):
        best = 2 * time**0.5
        for factor in (0.5, 1.0, 2.0):
            rows.append(row(time, int(best * factor), 1.0 if factor == 1 else 4.0))
    for time, width in ((64, 16), (256, 32), (1024, 64), (2300, 96), (4096, 128)):
        assert budget.choose((1, 28, 28), time, rows=rows).width == width


@pytest.mark.parametrize("shape", [(1, 7, 7), (3, 33, 20), (2, 50), (1, 8, 8, 8), (1, 4, 4)])
@pytest.mark.parametrize("time", [0.0, 1e3, 1e12])
def test_each_choice_is_a_network(shape, time):
    choice = budget.choose(shape, time)
    flow = pfgm.PoissonFlow(shape, M=1000)
    width = min(choice.width, 16)
    network = flow.network("unet", width=width, multipliers=choice.multipliers, patch=choice.patch)
    x, _ = network(torch.zeros(2, *shape), torch.ones(2))
    assert x.shape == (2, *shape)


def test_rows_of_the_fit_are_stored(tmp_path):
    rows = [row(10, 32, 1.5), row(20, 64, 1.25, cost=2.5)]
    budget.write_rows(rows, tmp_path / "rows.json")
    assert budget.read_rows(tmp_path / "rows.json") == rows
    assert len(budget.read_rows()) >= 4
