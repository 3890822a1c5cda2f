"""The trainer: a loop that can be stopped, resumed and reproduced."""

from __future__ import annotations

import copy
import dataclasses
import math
import signal
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from ..common.files import folder_path, remove_leftovers
from ..common.hints import with_hints
from ..data.opening import Samples
from ..flows.conditions import check_network
from ..flows.flow import Flow
from ..networks.registry import label_count
from ..references import ReferenceSet, as_references
from .batches import Batch, Batches, seed_of
from .checkpoint import STATE_FORMAT, check_latest, load_run, read_latest, restore, run_of, save_run
from .checks import (
    Diverged,
    check_config,
    check_data,
    check_divisible,
    check_same_flow,
    check_trainable,
    check_weights,
    checked_labels,
    warn_of_range,
    warn_of_scales,
    with_settings_of_run,
)
from .config import Precision, TrainConfig
from .locks import locked, locked_for_all
from .logs import Log, check_log, is_evaluated
from .network_state import plain_state, update_average
from .processes import Processes, reports_process_lost
from .rehearsal import fastest_precision, seconds_of
from .signals import Signals, Terminated, record_signals
from .time_used import TimeUsed, training_bar
from .weights_file import check_savable


class Trainer:
    """Trains a network on a Poisson flow's loss.

    All randomness is a function of the seed and the step, so a resumed run continues as if it had
    not stopped (on the CPU to the bit). SIGINT, SIGTERM and SIGHUP end the run after the current
    step, or at once in an evaluation, and write a checkpoint. A resumed run starts with the
    evaluation that ``evaluations.csv`` lacks. During training a lock keeps other runs out of the
    folder.

    Where torch.distributed is initialised (as by :func:`pfgm.training.processes.joined` under
    torchrun), its processes train together. Each takes its part of every batch, with its own noise;
    gradients are averaged; the first process writes checkpoints and logs. With a sharded
    ReferenceSet (:meth:`pfgm.ReferenceSet.shard`) each process has its own rows, and the target is
    still the field of all of them.

    Args:
        flow: :class:`pfgm.PoissonFlow` or :class:`pfgm.PoissonFlowPP`; its loss is minimised.
        network: the network to train; its parameters stay on their device.
        data: samples (n, *S), all that :class:`pfgm.ReferenceSet` takes, or a set: a tensor,
            floating point or uint8 (u/127.5 − 1), on any device; what :func:`pfgm.data.open`
            returns; a torch Dataset or its DataLoader, which is loaded once.
        config: how to train. Settings that are None follow from the steps; :meth:`resume` takes
            them from the checkpoint.
        folder: folder for checkpoints and ``log.csv``; None writes nothing.
        progress: whether to show a progress bar.
        evaluate: called by the first process with the step and the averaged network when the
            configuration says so. The metrics that it returns go to ``evaluations.csv``. It must
            not use torch's global generator.
        labels: integers (n,) from 0. They go to the network as its argument ``labels``, and the
            target of a point is the field of the references with its label. By default those of
            the data, if they have some and the network takes labels.
        label_names: the names of the labels 0, 1, …, which checkpoints record. By default those of
            the data, if their labels are used.
        loss: replaces the loss of the flow and takes the same arguments, such as
            :meth:`pfgm.distillation.Consistency.loss`.
        distilled: whether this loss makes a few-step model; checkpoints record it.

    Raises:
        TypeError, ValueError: a checkpoint cannot hold the flow or the network (:func:`pfgm.save`);
            or the network has no trainable parameters in float32 or float64.
        TypeError: data, labels or config are of another type.
        ValueError: data do not fit the flow or are fewer than a batch; labels do not fit the data,
            are given with a sharded set, or are missing for a network with classes; or the log that
            is asked for needs a folder.
        ImportError: the log needs a package that is not installed.

    Warns:
        UserWarning: data are images whose values do not look like [−1, 1], or a table whose columns
            have very different spreads.

    >>> import pfgm, torch
    >>> data = torch.randn(256, 2)
    >>> flow = pfgm.PoissonFlow.from_data(data)
    >>> config = TrainConfig(steps=20, batch_size=32, warmup=5)
    >>> net = flow.network("mlp")
    >>> trainer = Trainer(flow, net, data, config, progress=False)
    >>> flow.sample(trainer.train(), 4).shape
    torch.Size([4, 2])
    """

    _clock = staticmethod(time.perf_counter)

    @with_hints
    def __init__(
        self,
        flow: Flow,
        network: nn.Module,
        data: Samples | ReferenceSet,
        config: TrainConfig | None = None,
        *,
        folder: str | Path | None = None,
        progress: bool = True,
        labels: Tensor | None = None,
        label_names: Sequence[str] = (),
        evaluate: Callable[[int, nn.Module], Mapping[str, float]] | None = None,
        loss: Callable[..., Tensor] | None = None,
        distilled: bool | None = None,
    ) -> None:
        data = as_references(data, progress=progress)
        self.flow, self.network, self.data = flow, network, data
        check_config(config)
        self._partial_config = config or TrainConfig()  # may leave settings open
        self._processes = processes = Processes()
        size = self._partial_config.batch_for(len(data), processes.size)
        config = dataclasses.replace(self._partial_config, batch_size=size).resolved()
        self.config = config
        self.folder = None if folder is None else folder_path(folder)
        self.progress = progress
        self.table = data.table if isinstance(data, ReferenceSet) else None
        self.evaluate, self.loss, self.distilled = evaluate, loss, distilled
        self.step = 0
        self.saved_step: int | None = None
        """The step of the last checkpoint, written or resumed from; None if there is none."""
        self._saved_threads: int | None = None  # of the run that was resumed
        self._known_latest: bytes | None = None  # latest.json as this run last read or wrote it
        check_log(config.log, self.folder)
        check_trainable(network)
        if loss is None:
            check_network(network, "network")
        if self.folder is not None:
            check_savable(flow, network)
        check_data(flow, data, config, size, other_loss=loss is not None)
        classes = label_count(network)
        self.labels, self.label_names = checked_labels(labels, label_names, data, classes)
        if not flow._warned_of_range:
            warn_of_range(data)
        warn_of_scales(data)
        check_divisible(size, processes.size, config.accumulate)
        # The first trained parameter, as frozen ones may be narrow or hold integers.
        parameter = next(p for p in network.parameters() if p.requires_grad)
        self._device = parameter.device
        self._batches = Batches(
            data,
            self.labels,
            size=size // processes.size,
            references=config.reference_batch,
            seed=config.seed,
            device=self._device,
            dtype=parameter.dtype.to_real(),
            rank_and_size=(processes.rank, processes.size),
        )
        self._parallel = processes.data_parallel(network)
        self._wrapped = torch.compile(self._parallel) if config.compile else self._parallel
        self._optimizer = torch.optim.Adam(
            network.parameters(),
            betas=(0.9, config.schedule.beta2),
            # One pass over the weights. The default makes dozens of calls for each, on the CPU a
            # seventh of a small network's step.
            fused=all(p.is_cpu and p.is_floating_point() for p in network.parameters()) or None,
        )
        self.averaged = copy.deepcopy(network).eval()
        """The network with the moving average of its weights, in evaluation mode: the one to sample
        with."""
        self._time = TimeUsed(config.minutes, processes, self._clock)
        self._chosen_precision = ""  # why, in words
        self._expected_steps: int | None = None  # in the minutes
        # The first step with a loss that is not finite; 0 means none.
        self._diverged_step = torch.zeros((), dtype=torch.long, device=self._device)

    @property
    def _computes_alone_on_cpu(self) -> bool:
        """Whether one process trains on the CPU, without compilation."""
        return self._device.type == "cpu" and self._processes.size == 1 and not self.config.compile

    def _rehearsal(self) -> Callable[..., float]:
        """A function that computes the gradients of the next step for a copy of the network.

        It takes a precision, by default that of the run. The run, its network and the random
        numbers stay as they are. It waits for a GPU.
        """
        network = copy.deepcopy(self.network).train()
        return lambda precision=None: float(self._gradients(network, precision))

    def _seconds_of_step(self) -> float:
        return seconds_of([self._rehearsal()], self._processes, self._clock)[0]

    def _settle_precision(self) -> float | None:
        """Chooses the precision, unless it is given or that of a resumed run.

        Returns:
            The seconds of a step, if steps had to be timed.
        """
        if self.config.precision != "auto":
            return None
        timing = self._rehearsal, self._processes, self._clock
        precision, seconds = fastest_precision(self.flow.shape, self._device, *timing)
        self.config = dataclasses.replace(self.config, precision=precision)
        if not seconds:
            return None
        ratio = seconds[0] / seconds[1]
        self._chosen_precision = f"bfloat16 {ratio:.1f} times as fast as float32"
        return seconds[precision == "bfloat16"]

    def _settle(self) -> None:
        """Chooses the precision, and the schedule of a run of some minutes, if they are open."""
        self._settle_precision()
        if self.config.minutes is None or self.step:
            return
        seconds = self._seconds_of_step()
        self._expected_steps = max(int(self._time.left / max(seconds, 1e-9)), 1)
        self.config = self.config.resolved(self._expected_steps)
        for group in self._optimizer.param_groups:
            group["betas"] = (0.9, self.config.schedule.beta2)

    @property
    def finished(self) -> bool:
        """Whether all steps are done, or the minutes are used up."""
        steps = self.config.steps
        return self._time.share >= 1 if steps is None else self.step >= steps

    def train(self) -> nn.Module:
        """Trains up to the configured number of steps, or until the minutes are used up.

        Returns:
            The network with averaged weights, in evaluation mode.

        Raises:
            Diverged: the loss or a weight is not finite; the last checkpoint is from before that.
            ValueError: data hold values that are not finite (on a GPU the loss becomes non-finite
                instead), or the folder holds a run that has not been resumed.
            FolderInUse: another run is using the folder.
            OSError: a checkpoint or a log cannot be written.
            KeyboardInterrupt, Terminated: a signal ended the run, after its checkpoint.
            ProcessLost: another process of the run has ended or does not answer.
        """
        with reports_process_lost(self._processes), locked_for_all(self.folder, self._processes):
            if self.folder is not None and self._processes.leads:
                check_latest(self.folder, self._known_latest)
                remove_leftovers(self.folder)
            self._time.start()
            try:
                self._settle()
                return self._train()
            finally:
                self._time.stop()

    def _train(self) -> nn.Module:
        self.network.train()
        config, processes, clock = self.config, self._processes, self._time
        checkpoint_every = config.schedule.checkpoint_every
        folder = self.folder if processes.leads else None
        hidden = not (self.progress and processes.leads)
        with (
            record_signals() as received,
            Log(folder, self.step, config.log, dataclasses.asdict(config)) as log,
            training_bar(clock, self.step, config.steps, disable=hidden) as bar,
        ):
            total, since = torch.zeros((), device=self._device), self.step
            clock.before = max(clock.before, log.seconds)  # in older checkpoints it is missing
            clock.begin()
            # Without a folder no step is resumed.
            stopped = self.folder is not None and self._evaluate(log, received, bar)
            last = stopped or self.finished
            while not last:
                total += self._train_step()
                self.step += 1
                clock.end_step()
                bar.update(1 if config.steps else clock.seconds - bar.n)
                due = self.step % checkpoint_every == 0
                # Read once a step. A signal after this line ends the run after the next step.
                stopped = processes.any(bool(received))
                last = self.finished or stopped
                if due or last or self.step % config.log_every == 0:
                    loss = self._check_loss(processes.mean(float(total) / (self.step - since)))
                    steps = {} if config.steps else {"step": self.step}
                    bar.set_postfix(steps | {"loss": f"{loss:.4g}"})
                    values = {"loss": loss, "lr": self._optimizer.param_groups[0]["lr"]}
                    with self._save_on_error():
                        log.write(self.step, values | {"seconds": clock.seconds})
                    total, since = torch.zeros_like(total), self.step
                if due or last:
                    self.save()
                if not stopped and self._evaluate(log, received, bar):
                    stopped = last = True
        if received[:1] == [signal.SIGINT]:
            raise KeyboardInterrupt
        if received or stopped:
            raise Terminated(*received[:1])
        return self.averaged

    @property
    def _evaluation_due(self) -> bool:
        every = self.config.evaluate_every
        if not self.config.evaluates or self.step == 0:
            return False
        due = every is not None and self.step % every == 0
        if self.config.minutes is None:
            return due or self.finished
        return self._time.evaluates(due=due, last=self.finished)

    @property
    def _lacks_row(self) -> bool:
        """Whether this process makes evaluations, and the run has none of this step."""
        evaluates = self.evaluate is not None and self._processes.leads
        return evaluates and not (self.folder and is_evaluated(self.folder, self.step))

    @property
    def lacks_evaluation(self) -> bool:
        """Whether this process has to make the evaluation of this step, which the run lacks."""
        return self._evaluation_due and self._lacks_row

    def _evaluate(self, log: Log, received: Signals, bar: Any) -> bool:
        """Makes the evaluation of this step if it is due and the run lacks it.

        Returns:
            Whether a signal has ended the run, after a checkpoint of this step. A resumed run then
            starts with the evaluation.
        """
        if not self._evaluation_due:
            timed_out = self.finished and self.config.minutes is not None
            if timed_out and self.config.evaluates and self._lacks_row:
                warnings.warn(
                    f"the last evaluation is left out, as {self.config.minutes:g} minutes leave no "
                    "time for it; pfgm evaluate measures the network.",
                    stacklevel=2,
                )
            return False
        if self.evaluate is not None and self._lacks_row:
            bar.set_description_str("evaluation")  # which may take a minute
            with self._save_on_error():
                metrics = received.call(partial(self.evaluate, self.step, self.averaged))
                if metrics is not None:
                    log.write(self.step, metrics, "evaluations")
                    self._time.end_evaluation()
            bar.set_description_str("training")
        stopped = self._processes.any(bool(received))
        if stopped and self.saved_step != self.step:
            self.save()
        return stopped

    @contextmanager
    def _save_on_error(self) -> Iterator[None]:
        """Writes a checkpoint if a report fails, such as print() in evaluate without stdout."""
        try:
            yield
        except Exception:
            self.save()
            raise

    def save(self) -> None:
        """Writes a checkpoint of the current step, if there is a folder.

        Raises:
            Diverged: a trained weight is not finite, whether or not there is a folder.
            FolderInUse: another run is using the folder.
            OSError: the checkpoint cannot be written.
        """
        check_weights(self.network, self.step)
        if self.folder is None or not self._processes.leads:
            return
        state = {
            "format": STATE_FORMAT,
            "step": self.step,
            "config": dataclasses.asdict(self.config),
            "rows": len(self.data),
            "network": plain_state(self.network),
            "optimizer": self._optimizer.state_dict(),
            "threads": torch.get_num_threads(),
            "time": self._time.state(),
        }
        with locked(self.folder):
            try:
                save_run(
                    self.folder,
                    self.flow,
                    self.averaged,
                    state,
                    self.distilled,
                    label_names=self.label_names,
                    table=self.table,
                    after=self.saved_step or self.step,
                )
                self.saved_step = self.step
            finally:
                self._known_latest = read_latest(self.folder)

    def resume(self, step: int | None = None) -> int:
        """Loads a checkpoint from the folder to continue from, and returns its step.

        Checkpoints of later steps are removed when the next one is written. Settings that the
        configuration leaves open are those of the run.

        Args:
            step: of the checkpoint; None takes the newest one.

        Raises:
            FileNotFoundError: there is no checkpoint.
            ValueError: the checkpoint is damaged (the message names an older one that is intact),
                or from a run with another flow, network, settings or number of rows.

        Warns:
            UserWarning: the checkpoint is old and has no checksums.
        """
        if self.folder is None:
            raise ValueError("folder is None; resuming needs the folder of a run.")
        latest = read_latest(self.folder)
        checkpoint = load_run(self.folder, step)
        state, (saved, rows, settings) = checkpoint.state, run_of(checkpoint, self.folder)
        if rows != len(self.data):  # first, as the flow may follow from the data
            raise ValueError(
                f"data has {len(self.data)} rows; the run in {self.folder} has {rows}."
            )
        check_same_flow(self.flow, saved, self.folder)
        self.flow._restore_fitted(saved._describe_fitted())
        config = with_settings_of_run(self._partial_config, settings, self.folder)
        restore(self.network, self.averaged, self._optimizer, checkpoint, self.folder)
        self.config = config
        self.step = self.saved_step = state["step"]
        self._time = TimeUsed(config.minutes, self._processes, self._clock)
        if "time" in state:
            self._time.load(state["time"], settings.get("minutes"))
        self._saved_threads = state.get("threads")
        self._known_latest = latest
        return self.step

    def _train_step(self) -> Tensor:
        config, step = self.config, self.step
        for group in self._optimizer.param_groups:
            group["lr"] = config.learning_rate_at(step, self._time.share)
        loss = self._gradients(self._wrapped)
        nn.utils.clip_grad_norm_(self.network.parameters(), config.clip)
        with self._device:  # Adam counts its steps in tensors on the default device
            self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        update_average(self.averaged, self.network, config.schedule.ema, step)
        first_bad = (self._diverged_step == 0) & ~loss.isfinite()
        self._diverged_step = torch.where(first_bad, step + 1, self._diverged_step)
        return loss

    def _gradients(self, network: Callable[..., Any], precision: Precision | None = None) -> Tensor:
        """Adds the gradients of the next step to those of the network, and returns its loss."""
        bfloat16 = (precision or self.config.precision) == "bfloat16"
        batch = self._batches.at(self.step)
        generator = torch.Generator(self._device).manual_seed(self._seed(self.step, 0))
        on_cpu = self._device.type == "cpu"
        # The generator of the CPU is forked in any case; "cuda" stands for no other device.
        devices, kind = ([], "cuda") if on_cpu else ([self._device], self._device.type)
        with torch.random.fork_rng(devices, device_type=kind):
            # Dropout takes no generator, so it uses the global one.
            torch.manual_seed(self._seed(self.step, 1))
            return self._backward(network, batch, generator, bfloat16)

    def _seed(self, step: int, purpose: int) -> int:
        """The seed of this process in a step: of the perturbation for 0, of dropout for 1."""
        rank = self._processes.rank
        return seed_of(self.config.seed, step, purpose, *([rank] if rank else []))

    def _backward(
        self,
        network: Callable[..., Any],
        batch: Batch,
        generator: torch.Generator,
        bfloat16: bool = False,
    ) -> Tensor:
        """Accumulates the gradients of a batch, part by part, and returns its loss."""
        parts, total = self.config.accumulate, torch.zeros((), device=self._device)
        size = len(batch.x) // parts
        shared = self._parallel if isinstance(self._parallel, DistributedDataParallel) else None
        for k in range(parts):
            rows = slice(k * size, (k + 1) * size)
            # The processes average their gradients once, after the last part.
            sync = nullcontext() if shared is None or k + 1 == parts else shared.no_sync()
            autocast = torch.autocast(self._device.type, dtype=torch.bfloat16, enabled=bfloat16)
            with sync, autocast:
                loss = (self.loss or self.flow.loss)(
                    network,
                    batch.x[rows],
                    batch.references,
                    generator,
                    condition=batch.condition(rows, self.config.label_dropout, generator),
                    reference_labels=batch.reference_labels,
                )
                (loss / parts).backward()
            total += loss.detach() / parts
        return total

    def _check_loss(self, loss: float) -> float:
        if math.isfinite(loss):
            return loss
        # If every loss is finite and only their sum overflows, the last step is named.
        step = int(self._processes.least(int(self._diverged_step) or self.step))
        raise Diverged(
            f"the loss is not finite at step {step} (the noise of that step has the seed "
            f"{self._seed(step - 1, 0)} in process {self._processes.rank}): lower the learning "
            "rate; the last checkpoint is unharmed."
        )
