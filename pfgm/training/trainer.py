"""Training: a loop that can be stopped, resumed and reproduced."""

from __future__ import annotations

import dataclasses
import math
import signal
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, closing, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel

from ..common.files import folder_path, remove_leftovers
from ..common.messages import progress_bar
from ..flows.flow import Flow
from ..flows.plusplus import PoissonFlowPP
from ..networks.published.safe_pickle import BROKEN
from ..references import References, ReferenceSet
from .batches import Batch, Batches, seed_of
from .checkpoint import flow_of, load_run, save_run
from .config import TrainConfig
from .locks import FolderInUse, claimed, locked
from .logs import Log
from .processes import Processes, ProcessLost, lost
from .signals import Terminated, noticed

__all__ = ["Diverged", "FolderInUse", "ProcessLost", "Terminated", "TrainConfig", "Trainer"]


class Diverged(RuntimeError):
    """The loss is not finite."""


# What a resumed run may have otherwise than the run it continues.
_MAY_DIFFER = ("steps", "checkpoint_every", "evaluate_every", "log_every", "compile")


class Trainer:
    """Trains a network on a Poisson flow's loss.

    All randomness is a function of the seed and the step, so a resumed run continues exactly as if
    it had not stopped (on the CPU to the bit). SIGINT, SIGTERM and SIGHUP end the run after the
    step at hand, with a checkpoint written; one that is ignored, as under nohup, stays ignored.
    Progress that cannot be shown any more is no reason to end. While it trains, a lock keeps other
    runs out of the folder.

    Where torch.distributed is initialised (as by :func:`pfgm.training.processes.joined` under
    torchrun), its processes train together: each takes its part of every batch, with noise of its
    own, gradients are averaged, and the first writes checkpoints and logs. A ReferenceSet that is
    shared between them (:meth:`pfgm.ReferenceSet.shard`) gives each its own rows, and all the field
    of all.

    Args:
        flow: gives the loss, :class:`pfgm.PoissonFlow` or :class:`pfgm.PoissonFlowPP`.
        network: what is trained; its parameters stay where they are.
        data: (n, *S) floating point or uint8 (u/127.5 − 1), on any device; or a
            :class:`pfgm.ReferenceSet`.
        config: how to train.
        folder: of checkpoints, ``log.csv`` and TensorBoard logs (where that is installed); None
            writes nothing.
        progress: show a progress bar.
        evaluate: called by the first process with the step and the averaged network each
            ``evaluate_every`` steps and at the end; the figures it returns go to
            ``evaluations.csv`` and TensorBoard. It must leave torch's global generator alone.
        labels: (n,) integers from 0, which the network is given as its argument of that name; a
            point's target is then made of the references of its label.
        loss: in place of the flow's, with its arguments, such as
            :meth:`pfgm.distillation.Consistency.loss`.
        distilled: whether that loss makes a few-step model, which checkpoints then say.

    Raises:
        ValueError: data do not fit the flow or are fewer than a batch; labels do not fit the data,
            or are given with data that are shared between processes.

    >>> import pfgm, torch
    >>> data = torch.randn(256, 2)
    >>> flow = pfgm.PoissonFlow.from_data(data)
    >>> config = TrainConfig(steps=20, batch_size=32, warmup=5)
    >>> net = pfgm.networks.MLP((2,), **flow.scaling)
    >>> trainer = Trainer(flow, net, data, config, progress=False)
    >>> flow.sample(trainer.train(), 4).shape
    torch.Size([4, 2])
    """

    def __init__(
        self,
        flow: Flow,
        network: nn.Module,
        data: References,
        config: TrainConfig | None = None,
        *,
        folder: str | Path | None = None,
        progress: bool = True,
        labels: Tensor | None = None,
        evaluate: Callable[[int, nn.Module], Mapping[str, float]] | None = None,
        loss: Callable[..., Tensor] | None = None,
        distilled: bool | None = None,
    ) -> None:
        self.flow, self.network, self.data, self.labels = flow, network, data, labels
        self.config = config = config or TrainConfig()
        self.folder = None if folder is None else folder_path(folder)
        self.progress = progress
        self.evaluate = evaluate
        self.loss, self.distilled = loss, distilled
        self.step = 0
        self._saved: int | None = None  # step of the run's last checkpoint
        self._known: bytes | None = None  # latest.json as this run has read or written it
        self._check_data()
        self._processes = processes = Processes()
        if config.batch_size % (processes.size * config.accumulate):
            raise ValueError(
                f"batch_size is {config.batch_size}; allowed are multiples of the number of "
                f"processes, {processes.size}, times accumulate, {config.accumulate}."
            )
        parameter = next(network.parameters())
        self._device = parameter.device
        self._batches = Batches(
            data,
            labels,
            size=config.batch_size // processes.size,
            references=config.references,
            seed=config.seed,
            device=self._device,
            dtype=parameter.dtype,
            place=(processes.rank, processes.size),
        )
        self._shared = processes.share(network)
        self._called = torch.compile(self._shared) if config.compile else self._shared
        self._optimizer = torch.optim.Adam(
            network.parameters(), lr=config.learning_rate, betas=(0.9, config.beta2)
        )
        self._averaged = AveragedModel(network, multi_avg_fn=_average(config.ema), use_buffers=True)
        # The first step since the last report whose loss was not finite; 0 is none.
        self._bad = torch.zeros((), dtype=torch.long, device=self._device)

    def _check_data(self) -> None:
        data, labels, size = self.data, self.labels, self.config.batch_size
        single_sample = self.config.references == 0 and self.loss is None
        if single_sample and not isinstance(self.flow, PoissonFlowPP):
            raise ValueError(
                "references is 0, which is the single-sample target of PoissonFlowPP alone; a "
                "PoissonFlow learns the field of references."
            )
        if data.ndim == 0 or data.shape[1:] != self.flow.shape:
            raise ValueError(
                f"data has shape {tuple(data.shape)}; allowed is (n, *S) with S = "
                f"{self.flow.shape}."
            )
        if len(data) < size:
            raise ValueError(f"data has {len(data)} rows; at least batch_size, {size}, are needed.")
        if labels is not None and isinstance(data, ReferenceSet) and data.sharded:
            raise ValueError(
                f"labels are given, but data is {data!r}: the references of one label lie in "
                "several processes; allowed are data that each process has."
            )
        if labels is not None and (
            labels.shape != data.shape[:1] or labels.is_floating_point() or int(labels.min()) < 0
        ):
            raise ValueError(
                f"labels has shape {tuple(labels.shape)} and dtype {labels.dtype}; allowed are "
                f"integers of at least 0, of shape ({len(data)},)."
            )

    @property
    def averaged(self) -> nn.Module:
        """The network with the moving average of its weights: the one to sample with."""
        module: nn.Module = self._averaged.module
        return module

    def train(self) -> nn.Module:
        """Runs up to the configured number of steps.

        Returns:
            The network with averaged weights.

        Raises:
            Diverged: the loss is not finite; no checkpoint is written after the last good one.
            ValueError: data hold values that are not finite (on a GPU the loss shows that), or the
                folder holds a run that has not been resumed.
            FolderInUse: another run is at work in the folder.
            OSError: a checkpoint or a log cannot be written.
            KeyboardInterrupt, Terminated: a signal ended the run, after its checkpoint.
            ProcessLost: another process of the run has ended or does not answer.
        """
        with lost(self._processes), claimed(self.folder, self._processes):
            if self.folder is not None and self._processes.leads:
                self._check_folder(self.folder)
                remove_leftovers(self.folder)
            return self._train()

    def _check_folder(self, folder: Path) -> None:
        """Only the checkpoint that this run has read or written may be in the folder."""
        if _latest(folder) in (None, self._known):
            return
        if self._known is None:
            raise ValueError(
                f"folder is {folder}, which holds a run already; resume() continues it, another "
                "folder keeps it."
            )
        raise ValueError(
            f"folder is {folder}, whose newest checkpoint is not the one that this run has read or "
            "written last; resume() takes up the newest, another folder keeps it."
        )

    def _train(self) -> nn.Module:
        self.network.train()
        config, processes = self.config, self._processes
        folder = self.folder if processes.leads else None
        with (
            noticed() as received,
            closing(Log(folder, self.step)) as log,
            self._bar() as bar,
        ):
            total, since = torch.zeros((), device=self._device), self.step
            started = time.perf_counter()
            stopped, last = False, self.step >= config.steps
            while not last:
                total += self._train_step()
                self.step += 1
                bar.update()
                due = self.step % config.checkpoint_every == 0
                # Decided once a step: a signal from here on ends the next one, checkpoint and all.
                stopped = processes.any(bool(received))
                last = self.step >= config.steps or stopped
                if due or last or self.step % config.log_every == 0:
                    loss = self._checked(processes.mean(float(total) / (self.step - since)))
                    bar.set_postfix(loss=f"{loss:.4g}")
                    figures = {"loss": loss, "lr": config.learning_rate_at(self.step - 1)}
                    with self._saved_where_it_fails():
                        log.write(self.step, figures | {"seconds": time.perf_counter() - started})
                    total, since = torch.zeros_like(total), self.step
                if due or last:
                    self.save()
                if self._evaluates(last and not stopped) and self.evaluate is not None:
                    with self._saved_where_it_fails():
                        log.write(self.step, self.evaluate(self.step, self.averaged), "evaluations")
        if received[:1] == [signal.SIGINT]:
            raise KeyboardInterrupt
        if received or stopped:
            raise Terminated(*received[:1])
        return self.averaged

    @contextmanager
    def _saved_where_it_fails(self) -> Iterator[None]:
        """A report that fails, such as print() in evaluate without stdout, costs no steps."""
        try:
            yield
        except Exception:
            self.save()
            raise

    def _evaluates(self, last: bool) -> bool:
        every = self.config.evaluate_every
        return self._processes.leads and every > 0 and (last or self.step % every == 0)

    def save(self) -> None:
        """Writes a checkpoint of the present step into the folder, if there is one.

        Raises:
            FolderInUse: another run is at work in the folder.
            OSError: the checkpoint cannot be written.
        """
        if self.folder is None or not self._processes.leads:
            return
        state = {
            "step": self.step,
            "config": dataclasses.asdict(self.config),
            "rows": len(self.data),
            "network": self.network.state_dict(),
            "optimizer": self._optimizer.state_dict(),
        }
        with locked(self.folder):
            try:
                save_run(
                    self.folder,
                    self.flow,
                    self.averaged,
                    state,
                    self.step,
                    self.distilled,
                    after=self._saved or self.step,
                )
                self._saved = self.step
            finally:
                self._known = _latest(self.folder)

    def resume(self, step: int | None = None) -> int:
        """Takes up a checkpoint in the folder, the newest unless a step is given; returns its step.

        Those of later steps are removed when the next one is written.

        Raises:
            FileNotFoundError: there is none.
            ValueError: it is damaged (an older one that is whole is named), or from a run with
                another flow, network, settings or number of rows.

        Warns:
            UserWarning: it is from before there were checksums.
        """
        if self.folder is None:
            raise ValueError("folder is None; resuming needs the folder of a run.")
        known = _latest(self.folder)
        weights, description, state = load_run(self.folder, step)
        try:
            saved, settings, rows = flow_of(description), dict(state["config"]), state["rows"]
        except BROKEN as error:
            raise ValueError(
                f"{self.folder} holds a checkpoint that is damaged or of another program ({error})."
            ) from error
        _check_flow(self.flow, saved, self.folder)
        if rows != len(self.data):
            raise ValueError(
                f"data has {len(self.data)} rows; the run in {self.folder} has {rows}."
            )
        for name, value in dataclasses.asdict(self.config).items():
            if name not in _MAY_DIFFER and settings.get(name) != value:
                raise ValueError(
                    f"{name} is {value!r}; the run in {self.folder} has {settings.get(name)!r}."
                )
        try:
            self.network.load_state_dict(state["network"])
            self.averaged.load_state_dict(weights)
            self._optimizer.load_state_dict(state["optimizer"])
        except BROKEN as error:
            reason = " ".join(str(error).split())
            raise ValueError(f"{self.folder} holds a run of another network: {reason}") from error
        self.step = self._saved = state["step"]
        self._known = known
        self._averaged.n_averaged.fill_(self.step)
        return self.step

    def _train_step(self) -> Tensor:
        config, step, rank = self.config, self.step, self._processes.rank
        batch = self._batches.at(step)
        seed = self._seed(step)
        generator = torch.Generator(self._device).manual_seed(seed)
        for group in self._optimizer.param_groups:
            group["lr"] = config.learning_rate_at(step)
        devices = [] if self._device.type == "cpu" else [self._device]
        with torch.random.fork_rng(devices, device_type=_rng_type(self._device)):
            # Dropout has no generator argument.
            torch.manual_seed(seed_of(config.seed, step, 1, *([rank] if rank else [])))
            loss = self._backward(batch, generator)
        nn.utils.clip_grad_norm_(self.network.parameters(), config.clip)
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        self._averaged.update_parameters(self.network)
        first_bad = (self._bad == 0) & ~loss.isfinite()
        self._bad = torch.where(first_bad, step + 1, self._bad)
        return loss

    def _seed(self, step: int) -> int:
        """Of the perturbation of this process in a step."""
        rank = self._processes.rank
        return seed_of(self.config.seed, step, 0, *([rank] if rank else []))

    def _backward(self, batch: Batch, generator: torch.Generator) -> Tensor:
        """Adds up the gradients of a batch, part by part, and returns its loss."""
        parts, total = self.config.accumulate, torch.zeros((), device=self._device)
        size = len(batch.x) // parts
        for k in range(parts):
            rows = slice(k * size, (k + 1) * size)
            # Gradients are averaged over the processes with those of the last part.
            waits = nullcontext() if k + 1 == parts else self._without_exchange()
            with waits, self._autocast():
                labels = None if batch.labels is None else batch.labels[rows]
                loss = (self.loss or self.flow.loss)(
                    self._called,
                    batch.x[rows],
                    batch.references,
                    generator,
                    condition=self._condition(labels, generator),
                    reference_labels=batch.reference_labels,
                )
                (loss / parts).backward()
            total += loss.detach() / parts
        return total

    def _condition(self, labels: Tensor | None, generator: torch.Generator) -> dict[str, Tensor]:
        if labels is None:
            return {}
        drawn = torch.rand(len(labels), generator=generator, device=self._device)
        return {"labels": torch.where(drawn < self.config.label_dropout, -1, labels)}

    def _without_exchange(self) -> AbstractContextManager[None]:
        shared = self._shared
        return shared.no_sync() if isinstance(shared, DistributedDataParallel) else nullcontext()

    def _autocast(self) -> torch.autocast:
        enabled = self.config.precision == "bfloat16"
        return torch.autocast(self._device.type, dtype=torch.bfloat16, enabled=enabled)

    def _checked(self, loss: float) -> float:
        if math.isfinite(loss):
            return loss
        # Where only the sum of losses has overflowed, no step is to blame but the last.
        step = int(self._processes.least(int(self._bad) or self.step))
        raise Diverged(
            f"the loss is not finite at step {step} (the noise of that step has the seed "
            f"{self._seed(step - 1)} in process {self._processes.rank}): lower the learning rate; "
            "the last checkpoint is unharmed."
        )

    def _bar(self) -> Any:
        return progress_bar(
            total=self.config.steps,
            initial=self.step,
            desc="training",
            unit="step",
            disable=not (self.progress and self._processes.leads),
        )


def _latest(folder: Path) -> bytes | None:
    """Which checkpoint the folder says is the newest."""
    path = folder / "latest.json"
    return path.read_bytes() if path.exists() else None


def _check_flow(flow: Flow, saved: Flow, folder: Path) -> None:
    if type(flow) is not type(saved):
        raise ValueError(
            f"flow is a {type(flow).__name__}; the run in {folder} has a {type(saved).__name__}."
        )
    for name, value in flow.config.items():
        # Up to rounding: what follows from the data is summed up in an order of its own.
        same = saved.config[name] == value or (
            isinstance(value, float) and math.isclose(value, saved.config[name], rel_tol=1e-9)
        )
        if not same:
            raise ValueError(
                f"flow has {name} = {value!r}; the run in {folder} has another flow, with "
                f"{name} = {saved.config[name]!r}."
            )


def _average(decay: float) -> Callable[[Sequence[Tensor], Sequence[Tensor], Tensor | int], None]:
    """Moving average with warm-up: the decay at step t is min(decay, (1 + t)/(10 + t))."""

    @torch.no_grad()
    def average(averaged: Sequence[Tensor], current: Sequence[Tensor], count: Tensor | int) -> None:
        t = int(count)
        weight = 1 - min(decay, (1 + t) / (10 + t))
        for mean, value in zip(averaged, current, strict=True):
            if mean.is_floating_point():
                mean.lerp_(value.to(mean.dtype), weight)
            else:
                mean.copy_(value)

    return average


def _rng_type(device: torch.device) -> str:
    return "cuda" if device.type == "cpu" else device.type
