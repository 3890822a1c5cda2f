import copy
import csv
import dataclasses
import functools
import importlib.util
import math
import os
import shutil
import signal
import sys
import threading
from functools import partial

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import pfgm
from pfgm import training
from pfgm.training import Diverged, FolderInUse, Terminated, TrainConfig, Trainer
from pfgm.training.checkpoint import load_run

SMALL = TrainConfig(
    steps=24,
    batch_size=8,
    reference_batch=16,
    learning_rate=1e-3,
    warmup=4,
    decay="cosine",
    log_every=5,
)


def config(**changes):
    return dataclasses.replace(SMALL, **changes)


DATA = torch.randn(50, 2, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def data():
    return DATA.clone()


@pytest.fixture
def flow(data):
    return pfgm.PoissonFlow.from_data(data)


@pytest.fixture
def trainer(flow, data):
    """trainer(network, folder, **settings): a trainer on the data, by default of a new network."""

    def make(network=None, folder=None, *, evaluate=None, **settings):
        network = new_network() if network is None else network
        options = {"folder": folder, "progress": False, "evaluate": evaluate}
        return Trainer(flow, network, data, config(**settings), **options)

    return make


def new_network(seed=0):
    torch.manual_seed(seed)
    gamma = pfgm.PoissonFlow.from_data(DATA).gamma
    return Dropping(pfgm.networks.MLP((2,), width=16, depth=1, gamma=gamma))


class Dropping(nn.Module):
    """A network with dropout, which uses torch's global generator."""

    def __init__(self, inner):
        super().__init__()
        self.inner, self.dropout = inner, nn.Dropout(0.2)
        self.calls = 0
        self.before = lambda call: None

    def forward(self, x, z):
        self.calls += 1
        self.before(self.calls)
        return self.inner(self.dropout(x), z)


def weights(network):
    return [p.detach().clone() for p in network.parameters()]


def equal(a, b):
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def rows_of(path):
    with path.open() as file:
        return [*csv.DictReader(file)]


def test_learning_rate():
    constant = TrainConfig(steps=100, warmup=10, learning_rate=2.0, decay="none")
    assert [constant.learning_rate_at(t) for t in (0, 4, 9, 10, 99)] == [0.2, 1.0, 2.0, 2.0, 2.0]
    cosine = TrainConfig(steps=110, warmup=10, learning_rate=2.0, decay="cosine")
    assert cosine.learning_rate_at(60) == pytest.approx(1.0)
    assert cosine.learning_rate_at(110) == pytest.approx(0.0)
    assert TrainConfig(warmup=0).learning_rate_at(0) == 2e-4


@pytest.mark.parametrize("steps", [100_000, 100_001, 1_300_000])
def test_published_settings_are_the_defaults_of_long_runs(steps):
    """PFGM, appendix B.1, and the configuration of its repository for CIFAR-10."""
    c = TrainConfig(steps=steps)
    assert c.schedule == (2e-4, 0.999, 5000, "none", 0.9999, 5000)
    assert (c.resolved().batch_size, c.reference_batch, c.clip) == (128, 4096, 1.0)


def test_the_learning_rate_of_short_runs_is_the_one_of_the_page():
    rates = [TrainConfig(steps=steps).schedule.learning_rate for steps in (1000, 10_000, 100_000)]
    assert [f"{rate:.1e}" for rate in rates] == ["6.0e-03", "1.1e-03", "2.0e-04"]


@pytest.mark.parametrize("steps", [1, 3, 25, 300, 1000, 30_000, 99_999])
def test_the_defaults_of_a_short_run_leave_its_warm_up_and_its_first_weights(steps):
    c = TrainConfig(steps=steps)
    rates = [c.learning_rate_at(step) for step in range(0, steps, max(steps // 100, 1))]
    assert 1.99e-4 < max(rates) <= 6e-3
    assert rates.index(max(rates)) <= 0.07 * len(rates)
    assert rates[-1] <= 0.1 * max(rates) or steps < 10
    # The average weighs a step that lies n steps back by ema**n: the first weights are forgotten.
    assert c.schedule.ema**steps < 1e-4
    assert 0.99 <= c.schedule.beta2 <= 0.999
    assert c.resolved() == c.resolved().resolved()
    assert TrainConfig(steps=steps, ema=0.5, warmup=7).schedule[2:5:2] == (7, 0.5)


def test_settings_that_follow_from_the_steps_stay_in_a_longer_run(tmp_path, data, flow):
    def trainer(**settings):
        settings = TrainConfig(batch_size=8, reference_batch=16, **settings)
        return Trainer(flow, new_network(), data, settings, folder=tmp_path, progress=False)

    first = trainer(steps=20)
    first.train()
    longer = trainer(steps=40)
    longer.resume()
    assert longer.config == dataclasses.replace(first.config, steps=40)
    assert longer.config.schedule == TrainConfig(steps=20).schedule
    with pytest.raises(ValueError, match=r"ema is 0\.75; the run in .* has 0\.5"):
        trainer(steps=40, ema=0.75).resume()


def test_a_folder_that_is_removed_during_the_training_is_named(trainer, tmp_path):
    """The run ends with a checkpoint in a new folder of the same name."""
    net, folder = new_network(), tmp_path / "run"
    net.before = lambda call: shutil.rmtree(folder) if call == 12 else None
    with pytest.raises(FileNotFoundError, match=r"run, the folder of the run, was moved or"):
        trainer(net, folder, checkpoint_every=10).train()
    assert [path.name for path in folder.glob("*.safetensors")] == ["step-00000015.safetensors"]


def new_folder_with_a_file(moved, folder):
    folder.mkdir()
    (folder / "notes.txt").write_text("of another program")


@pytest.mark.parametrize("replace", [shutil.copytree, new_folder_with_a_file])
def test_a_folder_that_takes_the_place_of_the_run_is_not_touched(trainer, tmp_path, replace):
    net, folder, moved, there = new_network(), tmp_path / "run", tmp_path / "moved", {}

    def content():
        return {path.name: path.read_bytes() for path in folder.iterdir()}

    def move(call):
        if call == 12:
            folder.rename(moved)
            replace(moved, folder)
            there.update(content())

    net.before = move
    with pytest.raises(FileNotFoundError, match=r"run, the folder of the run, was moved or"):
        trainer(net, folder, checkpoint_every=10).train()
    assert content() == there
    assert load_run(moved)[2]["step"] == 10


def test_datasets_and_loaders_are_data(data):
    """As the same tensor with the same labels, whatever the order of the loader."""
    labels = torch.arange(50) % 2
    dataset = TensorDataset(data, labels)
    weights = []
    for given, its in ((data, labels), (dataset, None), (DataLoader(dataset, shuffle=True), None)):
        flow = pfgm.PoissonFlow.from_data(given)
        torch.manual_seed(0)
        net = flow.network("mlp", width=16, depth=1, classes=2)
        trainer = Trainer(flow, net, given, SMALL, labels=its, progress=False)
        assert torch.equal(trainer.labels, labels)
        weights.append(torch.cat([p.flatten() for p in trainer.train().parameters()]))
    assert torch.equal(weights[0], weights[1])
    assert torch.equal(weights[0], weights[2])


def test_an_epoch_sees_every_row_once_and_references_contain_the_batch(data, flow):
    trainer = Trainer(flow, new_network(), data, SMALL)
    seen = []
    for step in range(6):  # 50 // 8
        x, references, *_ = trainer._batches.at(step)
        assert references.shape == (16, 2)
        assert len(references.unique(dim=0)) == 16
        assert all((references == row).all(1).any() for row in x)
        seen.append(x)
    assert len(torch.cat(seen).unique(dim=0)) == 48
    first, second = trainer._batches.at(0)[0], trainer._batches.at(6)[0]
    assert not torch.equal(first, second)  # another epoch, another order
    whole = Trainer(flow, new_network(), data, config(reference_batch=4096))
    assert torch.equal(whole._batches.at(3)[1], data)


def test_averaged_weights_follow_the_warm_up(trainer):
    network = new_network()
    trainer, expected = trainer(network, ema=0.5), None
    for step in range(20):
        trainer._train_step()
        trainer.step += 1
        current = weights(network)
        if expected is None:
            expected = current
        else:
            decay = min(0.5, (1 + step) / (10 + step))
            expected = [decay * a + (1 - decay) * b for a, b in zip(expected, current, strict=True)]
    for a, b in zip(weights(trainer.averaged), expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_tensors_that_are_averaged(trainer):
    class Masked(nn.Module):
        """A mask of attention, a complex weight, a frozen part in half precision, and a cache."""

        def __init__(self):
            super().__init__()
            self.phase = nn.Parameter(torch.ones(3, dtype=torch.complex64))
            self.frozen = nn.Parameter(torch.ones(3, dtype=torch.bfloat16), requires_grad=False)
            self.register_buffer("mask", torch.full((3, 3), -math.inf).triu(1))
            self.inner = nn.Linear(3, 3)

        def forward(self, x, z):
            assert x.dtype == z.dtype == torch.float32
            self.register_buffer("cache", z.sum(), persistent=False)
            out = self.inner(torch.cat([x, z[:, None]], 1)) @ self.mask.softmax(1)
            out = out * (self.phase * (1 + 1j)).real * self.frozen
            return out[:, :2], out[:, 2]

    network = Masked()
    averaged = trainer(network, ema=0.5).train()
    assert torch.equal(averaged.mask, network.mask)
    assert not hasattr(averaged, "cache")
    assert bool(averaged.phase.isfinite().all())
    assert not torch.equal(averaged.phase, network.phase)


def test_the_gradient_is_clipped_and_adam_takes_the_step(trainer):
    trainer = trainer(clip=1e-3, warmup=0, decay="none")
    trainer._train_step()
    moments = [s["exp_avg"] for s in trainer._optimizer.state.values()]
    norm = torch.cat([m.flatten() for m in moments]).norm()
    assert float(norm) == pytest.approx(0.1 * 1e-3, rel=1e-3)  # (1 − β₁) of a clipped gradient


def test_the_same_seed_gives_the_same_weights_whatever_the_global_generator(trainer):
    def train(seed, noise):
        network = new_network()
        torch.manual_seed(noise)
        trainer(network, seed=seed).train()
        return weights(network)

    first = train(3, noise=1)
    assert equal(first, train(3, noise=2))
    assert not equal(first, train(4, noise=1))


def test_training_leaves_the_global_generator_alone(trainer):
    trainer, before = trainer(), torch.random.get_rng_state()
    trainer.train()
    assert torch.equal(torch.random.get_rng_state(), before)


def test_progress_shows_the_loss(data, flow, capsys, terminal):
    Trainer(flow, new_network(), data, SMALL).train()
    shown = capsys.readouterr().err
    assert "training" in shown
    assert "loss=" in shown
    assert "step/s" in shown


def test_a_run_goes_on_in_another_thread_and_without_its_progress_bar(data, flow, monkeypatch):
    monkeypatch.setattr(sys, "stderr", None)
    trainer = Trainer(flow, new_network(), data, SMALL)
    thread = threading.Thread(target=trainer.train)
    thread.start()
    thread.join()
    assert trainer.step == SMALL.steps


def test_a_report_that_fails_loses_no_steps(tmp_path, trainer):
    """A log that cannot be written, and an evaluation that cannot print."""

    def refused(step, network):
        raise OSError("stdout cannot be written")

    def block(call):
        if call == 11:
            (tmp_path / "log" / "log.csv").unlink()
            (tmp_path / "log" / "log.csv").mkdir()

    network = new_network()
    network.before = block
    for name, settings, step in (
        ("log", {"log_every": 5}, 15),
        ("stdout", {"evaluate_every": 7}, 7),
    ):
        failing = trainer(network, tmp_path / name, evaluate=refused, **settings)
        with pytest.raises(OSError, match=name):
            failing.train()
        assert load_run(tmp_path / name)[2]["step"] == failing.step == step


def test_resuming_continues_to_the_same_weights(tmp_path, trainer):
    whole = new_network()
    whole_averaged = trainer(whole, tmp_path / "whole").train()
    assert not any(part.training for part in whole_averaged.modules())
    assert all(part.training for part in whole.modules())

    with pytest.raises(KeyboardInterrupt):
        trainer(stopping_at(11), tmp_path / "parts").train()

    second = new_network(seed=99)  # its weights are overwritten
    resumed = trainer(second, tmp_path / "parts")
    assert resumed.resume() == 11
    averaged = resumed.train()
    assert equal(weights(second), weights(whole))
    assert equal(weights(averaged), weights(whole_averaged))
    parts, expected = (load_run(tmp_path / run)[0] for run in ("parts", "whole"))
    assert all(torch.equal(parts[name], expected[name]) for name in expected)


def stopping_at(step, number=signal.SIGINT):
    """A network that raises a signal in this step."""
    network = new_network()
    network.before = lambda call: signal.raise_signal(number) if call == step else None
    return network


@pytest.mark.parametrize(
    ("number", "error"),
    [(signal.SIGINT, KeyboardInterrupt), (signal.SIGTERM, Terminated), (signal.SIGHUP, Terminated)],
)
def test_signals_leave_a_checkpoint(tmp_path, flow, trainer, handled, number, error):
    handled(signal.SIGHUP, signal.SIG_DFL)  # nohup ignores it
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    handlers = [signal.getsignal(each) for each in numbers]
    with pytest.raises(error) as caught:
        trainer(stopping_at(7, number), tmp_path).train()
    if error is Terminated:
        assert caught.value.code == 128 + number
    assert load_run(tmp_path)[2]["step"] == 7
    restored, trained = pfgm.load(tmp_path, new_network())
    assert restored == flow
    assert flow.sample(trained, 3).shape == (3, 2)
    assert [signal.getsignal(each) for each in numbers] == handlers


class Killed(BaseException):
    """Ends a run at once, as a kill does."""


@pytest.mark.parametrize("last", [8, 24])
@pytest.mark.parametrize("end", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP, Killed])
def test_an_evaluation_that_was_ended_is_made_first_when_the_run_is_resumed(
    tmp_path, trainer, handled, end, last
):
    """Signals end it at once, also between checkpoints; its network is that of a whole run."""
    handled(signal.SIGHUP, signal.SIG_DFL)
    evaluated = {}

    def train(folder, evaluate):
        settings = {"evaluate_every": 8, "checkpoint_every": 8 if end is Killed else None}
        run = trainer(folder=tmp_path / folder, evaluate=evaluate, **settings)
        resumed = run.resume() if (tmp_path / folder / "latest.json").exists() else 0
        return resumed, run.train()

    def ended(step, network):
        if step == last:
            if end is Killed:
                raise Killed
            signal.raise_signal(end)
            raise AssertionError("the evaluation goes on")
        return {"figure": 0.5}

    def whole(step, network):
        evaluated.setdefault(step, []).append(weights(network))
        return {"figure": 0.5}

    train("whole", whole)
    error = {signal.SIGINT: KeyboardInterrupt, Killed: Killed}.get(end, Terminated)
    with pytest.raises(error):
        train("parts", ended)
    assert not (tmp_path / "parts" / ".pfgm.lock").exists()
    assert train("parts", whole)[0] == last
    for step in range(last, 25, 8):
        assert equal(*evaluated[step])
    rows = rows_of(tmp_path / "parts" / "evaluations.csv")
    assert [row["step"] for row in rows] == ["8", "16", "24"]
    assert train("parts", ended)[0] == 24  # nothing is left


def test_signals_that_are_ignored_stay_ignored(tmp_path, trainer, handled):
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        handled(number, signal.SIG_IGN)
        trainer(stopping_at(7, number), tmp_path / str(number)).train()
        assert load_run(tmp_path / str(number))[2]["step"] == SMALL.steps
        assert signal.getsignal(number) is signal.SIG_IGN


def test_several_hangup_signals_count_as_one(tmp_path, trainer, handled):
    second = []
    handled(signal.SIGHUP, signal.SIG_DFL)
    handled(signal.SIGTERM, lambda number, frame: second.append(number))
    network = new_network()

    def hang_up(call):
        if call == 7:
            for number in (signal.SIGHUP, signal.SIGHUP, signal.SIGTERM, signal.SIGHUP):
                signal.raise_signal(number)
            assert not second
            signal.raise_signal(signal.SIGTERM)  # acts as it did before

    network.before = hang_up
    with pytest.raises(Terminated) as caught:
        trainer(network, tmp_path).train()
    assert caught.value.code == 129
    assert second == [signal.SIGTERM]
    assert load_run(tmp_path)[2]["step"] == 7


def test_two_runs_in_one_folder(tmp_path, trainer):
    run, refused = tmp_path / "run", []

    def second():
        for work in (trainer(folder=run).train, trainer(folder=run).save):
            try:
                work()
            except FolderInUse as error:
                refused.append(str(error))

    network = new_network()

    def intrude(call):
        if call == 3:
            thread = threading.Thread(target=second)
            thread.start()
            thread.join()

    network.before = intrude
    trainer(network, run).train()
    assert len(refused) == 2
    assert all(f"process {os.getpid()}" in message for message in refused)
    assert load_run(run)[2]["step"] == SMALL.steps
    assert not (run / ".pfgm.lock").exists()


def test_a_run_that_another_trainer_has_continued_is_refused(tmp_path, trainer):
    trainer(folder=tmp_path, steps=10).train()
    late, early = (trainer(folder=tmp_path, steps=steps) for steps in (20, 15))
    assert late.resume() == early.resume() == 10
    early.train()
    with pytest.raises(ValueError, match=r"newest checkpoint is not the one"):
        late.train()
    assert load_run(tmp_path)[2]["step"] == 15
    assert late.resume() == 15
    late.train()
    late.train()  # its own last checkpoint is there
    assert load_run(tmp_path)[2]["step"] == 20


def test_a_signal_between_two_steps_leaves_a_checkpoint_too(tmp_path, trainer):
    trainer = trainer(folder=tmp_path)
    check_loss = trainer._check_loss

    def interrupted(loss):
        if trainer.step == 10:
            signal.raise_signal(signal.SIGINT)
        return check_loss(loss)

    trainer._check_loss = interrupted
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    assert load_run(tmp_path)[2]["step"] == trainer.step == 11


def test_a_loss_that_is_not_finite_stops_the_run_and_spoils_no_checkpoint(tmp_path, trainer):
    network = new_network()

    def break_it(call):
        if call == 13:
            with torch.no_grad():
                next(network.parameters()).fill_(math.nan)

    network.before = break_it
    with pytest.raises(Diverged, match="not finite at step 13 "):
        trainer(network, tmp_path, checkpoint_every=6).train()
    saved, _, state = load_run(tmp_path)
    assert state["step"] == 12
    assert all(torch.isfinite(t).all() for t in saved.values())


@pytest.mark.parametrize("folder", [True, False])
def test_weights_that_are_not_finite_are_no_checkpoint(tmp_path, trainer, folder):
    class Spoiled(nn.Module):
        """Its gradient is NaN in the third step, where its loss is finite."""

        def __init__(self):
            super().__init__()
            self.inner, self.calls = new_network(), 0

        def forward(self, x, z):
            self.calls += 1
            x, z = self.inner(x, z)
            return x, z + (z * 0).square().sum().sqrt() if self.calls == 3 else z

    spoiled = trainer(Spoiled(), tmp_path if folder else None, steps=3, checkpoint_every=2)
    with pytest.raises(Diverged, match=r"weight inner\.\S+ is not finite after step 3: lower"):
        spoiled.train()
    if folder:
        assert load_run(tmp_path)[2]["step"] == 2


def test_more_steps_than_before_are_allowed_other_changes_are_not(tmp_path, data, flow):
    Trainer(flow, new_network(), data, SMALL, folder=tmp_path, progress=False).train()

    def resume(**changes):
        arguments = {"flow": flow, "network": new_network(), "data": data, "config": SMALL}
        return Trainer(**{**arguments, "folder": tmp_path, "progress": False, **changes}).resume()

    assert resume(config=config(steps=100)) == 24
    other = pfgm.PoissonFlow((2,), M=200)
    for changes, message in (
        ({"config": config(learning_rate=0.5)}, r"learning_rate is 0\.5; the run in .* has 0\.001"),
        ({"data": data[:49], "flow": other}, "data has 49 rows"),
        ({"network": MLP()}, "another network"),
        ({"flow": other}, "flow has M = 200; .* another flow, with M = .*\\. A flow follows from"),
        ({"flow": pfgm.PoissonFlowPP((2,), D=2)}, r"flow must be a.*got PoissonFlowPP\."),
        ({"folder": None}, "folder is None"),
    ):
        with pytest.raises(ValueError, match=message):
            resume(**changes)
    with pytest.raises(FileNotFoundError, match="no checkpoint"):
        resume(folder=tmp_path / "elsewhere")


def test_tensorboard_gets_the_figures(tmp_path, trainer):
    reader = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    trainer(folder=tmp_path, log="tensorboard").train()
    events = reader.EventAccumulator(str(tmp_path)).Reload()
    assert [event.step for event in events.Scalars("loss")] == [5, 10, 15, 20, 24]
    rates = [event.value for event in events.Scalars("lr")]
    assert rates[0] == pytest.approx(SMALL.learning_rate_at(4))


def test_wandb_gets_the_figures_and_goes_on_after_a_resumption(tmp_path, trainer, monkeypatch):
    pytest.importorskip("wandb")
    from wandb.proto.wandb_internal_pb2 import Record

    for name, value in {"MODE": "offline", "SILENT": "true", "ERROR_REPORTING": "false"}.items():
        monkeypatch.setenv(f"WANDB_{name}", value)

    trainer(folder=tmp_path, log="wandb").train()
    resumed = trainer(folder=tmp_path, log="wandb", steps=30)
    resumed.resume()
    resumed.train()
    rows, ids = [], set()
    for path in sorted(tmp_path.glob("wandb/offline-run-*/*.wandb")):
        for record in map(Record.FromString, wandb_records(path)):
            items = {"".join([i.key, *i.nested_key]): i.value_json for i in record.history.item}
            if items:
                rows.append((items["step"], float(items["loss"])))
            if record.HasField("run"):
                ids.add((record.run.run_id, record.run.project, record.run.display_name))
    losses = [float(row["loss"]) for row in rows_of(tmp_path / "log.csv")]
    assert [step for step, _ in rows] == ["5", "10", "15", "20", "24", "25", "30"]
    assert [loss for _, loss in rows] == pytest.approx(losses, rel=1e-5)
    ((_, *names),) = ids
    assert names == ["pfgm", tmp_path.name]


def test_wandb_without_a_login_is_one_sentence(tmp_path, trainer, monkeypatch):
    pytest.importorskip("wandb").teardown()  # which would remember the mode of another test
    for name in ("WANDB_MODE", "WANDB_API_KEY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    monkeypatch.setenv("WANDB_ERROR_REPORTING", "false")
    with pytest.raises(ValueError, match=r"log='wandb' cannot start: .*login.*WANDB_MODE=offline"):
        trainer(folder=tmp_path, log="wandb").train()


def wandb_records(path):
    """The records of a file of less than 32 KiB, each after its checksum, length and type."""
    content, place = path.read_bytes(), 7
    while place < len(content):
        end = place + 7 + int.from_bytes(content[place + 4 : place + 6], "little")
        yield content[place + 7 : end]
        place = end


@pytest.mark.parametrize("log", ["tensorboard", "wandb"])
def test_logs_are_written_on_request_alone(tmp_path, trainer, monkeypatch, log):
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == log else find(name)
    )
    monkeypatch.setitem(sys.modules, log, None)  # an import would fail
    trainer(folder=tmp_path).train()
    assert not [*tmp_path.glob("events*"), *tmp_path.glob("wandb*")]
    with pytest.raises(ImportError, match=rf"needs {log}; .* pip install '\.\[{log}\]'"):
        trainer(folder=tmp_path, log=log)
    monkeypatch.undo()
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name)
    with pytest.raises(ValueError, match="folder must be given"):
        trainer(log=log)


def test_the_log_has_a_row_a_report_and_survives_resuming(tmp_path, trainer):
    def rows():
        return [(row["step"], row["loss"]) for row in rows_of(tmp_path / "log.csv")]

    trainer(folder=tmp_path, checkpoint_every=10).train()
    whole = rows()
    assert [int(step) for step, _ in whole] == [5, 10, 15, 20, 24]
    text = (tmp_path / "log.csv").read_text().splitlines()
    (tmp_path / "log.csv").write_text(
        "\n".join([*text[:-1], text[-1].rpartition(",")[0] + ",70\n"])
    )
    with (tmp_path / "log.csv").open("a") as file:
        file.write("25,0.1,0.1,0.1\n26,0.")  # a run that was killed before its checkpoint
    resumed = trainer(folder=tmp_path, checkpoint_every=10, steps=34)
    resumed.resume()
    resumed.train()
    assert rows()[:5] == whole
    assert [int(step) for step, _ in rows()[5:]] == [25, 30, 34]
    seconds = [float(row["seconds"]) for row in rows_of(tmp_path / "log.csv")]
    assert seconds[:4] == sorted(seconds[:4])
    assert seconds[4] == 70 < seconds[5] < seconds[-1] < 100  # the clock goes on
    with pytest.raises(ValueError, match="holds a run already"):
        trainer(folder=tmp_path).train()
    assert len(rows()) == 8


def test_a_log_that_was_removed_begins_anew(tmp_path, trainer):
    network = new_network()
    network.before = lambda call: (tmp_path / "log.csv").unlink() if call == 12 else None
    trainer(network, tmp_path).train()
    assert [row["step"] for row in rows_of(tmp_path / "log.csv")] == ["15", "20", "24"]


def test_figures_that_follow_from_the_data_are_compared_up_to_rounding(tmp_path, data):
    def trainer(sigma_data):
        flow = pfgm.PoissonFlowPP((2,), D=16, sigma_data=sigma_data)
        torch.manual_seed(0)
        network = flow.network("mlp", width=8, depth=1)
        return Trainer(flow, network, data, SMALL, folder=tmp_path, progress=False)

    trainer(0.7).train()
    assert trainer(math.nextafter(0.7, 1)).resume() == SMALL.steps
    with pytest.raises(ValueError, match=r"sigma_data = 0\.70001"):
        trainer(0.70001).resume()


@pytest.mark.parametrize(
    ("where", "references", "classes"), [("memory", 4096, 0), ("file", 16, 0), ("memory", 16, 4)]
)
def test_a_reference_set_trains_as_its_tensor(tmp_path, data, flow, where, references, classes):
    np.save(tmp_path / "data.npy", data.numpy())
    rows = pfgm.ReferenceSet(data if where == "memory" else tmp_path / "data.npy")
    assert pfgm.PoissonFlow.from_data(rows).M == flow.M
    options = {"progress": False, "labels": torch.arange(50) % classes if classes else None}
    trained = []
    for source in (rows, data):
        torch.manual_seed(0)
        net = flow.network("mlp", width=16, depth=1, classes=classes)
        trained.append(
            Trainer(flow, net, source, config(reference_batch=references), **options).train()
        )
    for a, b in zip(*map(weights, trained), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


def test_steps_in_parts_and_in_half_precision_train_alike(data, flow, trainer):
    def distance_to(trained):
        generator = torch.Generator().manual_seed(3)
        return float(flow.loss(trained, data, data, generator).detach())

    def trained(**changes):
        settings = {"batch_size": 32, "reference_batch": 50, "learning_rate": 1e-2, **changes}
        return trainer(copy.deepcopy(network), **settings).train()

    network = flow.network("mlp", width=16, depth=1)
    before, plain = distance_to(network), trained()
    for other in (trained(accumulate=4), trained(precision="bfloat16")):
        assert all(p.dtype == torch.float32 for p in other.parameters())
        assert not equal(weights(plain), weights(other))
        assert distance_to(other) < 0.8 * before
        assert distance_to(other) == pytest.approx(distance_to(plain), rel=0.25)


def test_a_step_in_parts_has_the_gradient_of_the_whole(data, flow):
    """On a loss without noise: the network's mean square."""

    class Quiet(pfgm.PoissonFlow):
        def perturb(self, x, generator=None):
            return x, torch.ones(len(x))

    quiet = Quiet(flow.shape, M=flow.M)
    state = pfgm.networks.MLP((2,), width=16, depth=1).state_dict()
    gradients = []
    for accumulate in (1, 4):
        network = pfgm.networks.MLP((2,), width=16, depth=1)
        network.load_state_dict(state)
        trainer = Trainer(quiet, network, data, config(accumulate=accumulate), progress=False)
        batch = trainer._batches.at(0)
        trainer._backward(network, batch, torch.Generator())
        gradients.append([p.grad for p in network.parameters()])
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


def test_the_compiled_network_is_called(trainer, monkeypatch):
    compiled, compile_eagerly = [], functools.partial(torch.compile, backend="eager")

    def compile_(module):
        compiled.append(module)
        return compile_eagerly(module)

    monkeypatch.setattr(torch, "compile", compile_)
    network = new_network()
    expected = trainer().train()
    trained = trainer(network, compile=True).train()
    assert compiled == [network]
    assert equal(weights(trained), weights(expected))


@pytest.mark.parametrize(("saved", "older"), [("plain", False), ("compiled", True)])
def test_compiled_and_plain_networks_resume_each_other(
    tmp_path, trainer, monkeypatch, saved, older
):
    plain, compiled = new_network(), torch.compile(new_network())
    networks = (plain, compiled) if saved == "plain" else (compiled, plain)
    with monkeypatch.context() as patch:
        if older:  # files had the names of the compiled network
            for module in (training.trainer, training.weights_file):
                patch.setattr(module, "plain_state", nn.Module.state_dict)
        trainer(networks[0], tmp_path).save()
    resumed = trainer(networks[1], tmp_path)
    with torch.no_grad():
        for parameter in (*resumed.network.parameters(), *resumed.averaged.parameters()):
            parameter.zero_()
    resumed.resume()
    assert equal(weights(resumed.network), weights(networks[0]))
    assert equal(weights(resumed.averaged), weights(networks[0]))


MLP = partial(pfgm.networks.MLP, (2,), width=16, depth=1)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"data": torch.zeros(50, 3)}, "data must have shape (n, *S) with S = (2,), got (50, 3)."),
        (
            {"data": torch.zeros(5, 2)},
            "data must have at least batch_size rows, 8, got 5. Give a batch_size…command line).",
        ),
        ({"data": torch.zeros(0, 2)}, "data must have at least batch_size rows, 8, got 0."),
        ({"data": {"x": 1}}, "TypeError: data must be a tensor, a…or its DataLoader, got dict."),
        ({"data": torch.ones(50, 2).long()}, "TypeError: data must be uint8…use data.float()."),
        ({"network": nn.Linear(2, 2)}, "TypeError: network must take x…one that takes (input)."),
        ({"config": 100}, "TypeError: config must be a TrainConfig,…got int."),
        ({"config": {}}, "TypeError: config must be a TrainConfig,…got dict."),
        ({"labels": np.zeros(50, int)}, "TypeError: labels must be a…torch.as_tensor(labels)."),
        ({"labels": torch.zeros(3).long()}, "labels must be integers of at…of shape (3,)."),
        ({"labels": torch.zeros(50)}, "labels must be integers of at…of shape (50,)."),
        (
            {"labels": torch.full((50,), -3)},
            "labels must be at least 0, got -3; leave such rows out.",
        ),
        (
            {"network": MLP(classes=4), "labels": torch.arange(50) % 5},
            "labels must be from 0 to 3 for a network of 4 classes, got 4.",
        ),
        # Labels that are no integers are none, and the network would learn nothing of its own.
        (
            {"network": MLP(classes=4), "data": [(torch.zeros(2), "cat")] * 50},
            "labels must be given for a network of 4 classes,…learns without labels.",
        ),
        ({"network": lambda x, z: (x, z)}, "TypeError: network must be a…got function."),
        ({"network": nn.Identity()}, "network must have a parameter with requires_grad, got none."),
        ({"network": MLP().requires_grad_(False)}, "network must have a…got none."),
        (
            {"network": MLP().bfloat16()},
            "TypeError: network must be…in torch.bfloat16, in which small…for speed.",
        ),
        (
            {"network": MLP().half()},
            "TypeError: network must be…in torch.float16, in which small…for speed.",
        ),
    ],
)
def test_refusals(data, flow, refused, changes, sentence):
    arguments = {"network": new_network(), "data": data, "config": SMALL, **changes}
    refused(lambda: Trainer(flow, **arguments), sentence)


def test_data_are_finite_and_a_part_that_is_not_trained_may_have_any_dtype(data, flow):
    network = MLP()
    network.stem.bfloat16().requires_grad_(False)
    network.phase = torch.nn.Parameter(torch.ones(1, dtype=torch.complex64))
    Trainer(flow, network, data, SMALL, progress=False)
    data[17, 1] = math.nan
    with pytest.raises(ValueError, match="NaN or infinity"):
        Trainer(flow, new_network(), data, config(reference_batch=50), progress=False).train()


def test_labels_reach_the_network_and_some_are_dropped(data, flow):
    seen = []

    class Recording(pfgm.networks.MLP):
        def forward(self, x, z, labels=None):
            seen.append(labels)
            return super().forward(x, z, labels)

    network = flow.network(Recording, width=16, depth=1, classes=4)
    labels = torch.arange(50) % 4
    trainer = Trainer(flow, network, data, config(label_dropout=0.5), labels=labels)
    net = trainer.train()
    told = torch.cat(seen)
    assert set(told.tolist()) == {-1, 0, 1, 2, 3}
    assert 0.35 < (told == -1).float().mean() < 0.65
    samples = flow.sample(net, 5, condition={"labels": torch.arange(5) % 4}, guidance=1.5)
    assert samples.shape == (5, 2)
