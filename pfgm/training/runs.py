"""Training runs from one configuration: how they start, go on, and what they report."""

from __future__ import annotations

import dataclasses
import functools
import os
import shlex
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..backends import preferred, requested
from ..common.devices import usable_device
from ..common.files import StrPath, folder_path
from ..common.images import is_image
from ..common.messages import print_notice
from ..data import Data
from ..data.opening import is_missing, is_table_file
from ..data.opening import open as open_data
from ..distillation import Consistency
from ..flows.flow import Flow
from ..flows.plusplus import PoissonFlowPP
from ..flows.poisson import PoissonFlow
from ..references import ReferenceSet
from .checks import other_setting, value_range
from .evaluations import Evaluation
from .locks import is_unmoved, locked_for_all
from .model_files import Loaded, holds_model, load
from .processes import Processes, reports_process_lost
from .run_config import CONFIG_FILE, RunConfig, teacher_checksum
from .run_models import MANY_IMAGES, SIZES, Model, built_model, model_from, new_model, student_of
from .signals import Terminated
from .threads import training_threads
from .trainer import Trainer

__all__ = ["RunConfig", "start"]

# Of a run that is resumed; the trainer checks those of the training.
_CHANGEABLE_SETTINGS = ("hold", "samples", "shared", "training")
_SHOWN_NAMES = 5  # of labels


def start(
    config: RunConfig,
    folder: StrPath,
    *,
    device: torch.device | str = "cpu",
    resume: bool = False,
    resume_from: int | None = None,
    progress: bool = True,
    report: Callable[[str], None] = print_notice,
) -> nn.Module:
    """Trains as configured and writes the results into a folder.

    Args:
        config: what to train. A resumed run may change only what
            :meth:`pfgm.training.Trainer.resume` allows.
        folder: the folder, which is created if it is missing, and locked for this run. If the
            start fails, an empty new folder is removed.
        device: the device to train on.
        resume: continue the run in the folder.
        resume_from: continue the run from the checkpoint of this step, not from the newest one.
        progress: show progress bars.
        report: called with each line of text about the progress.

    Returns:
        The network with averaged weights, in evaluation mode.

    Raises:
        ValueError: the folder holds a run and resume is False; the run to resume has other
            settings; or the data or settings are not usable.
        FolderInUse: another run uses the folder. Nothing in it has been changed.
        OSError: the folder cannot be written, or the data cannot be read.
        Diverged, ProcessLost, KeyboardInterrupt, Terminated: as for
            :meth:`pfgm.training.Trainer.train`.
    """
    begun, processes = Trainer._clock(), Processes()
    usable, folder = usable_device(str(device)), folder_path(folder)
    resume = resume or resume_from is not None
    _check_shared(config, processes)
    with reports_process_lost(processes), locked_for_all(folder, processes):
        if resume:
            config = _check_settings(config, folder)
        else:
            _check_new(folder)
        progress = progress and processes.leads
        report = report if processes.leads else lambda line: None
        place = (folder, usable, processes)
        return _Run(config, *place, resume, resume_from, progress, report, begun).train()


def _check_shared(config: RunConfig, processes: Processes) -> None:
    if config.shared and processes.size == 1:
        raise ValueError("shared is True, but there is one process; start several with torchrun.")
    if config.shared and config.labels:
        raise ValueError(
            "shared and labels are both True, but the references of one label cannot be shared; "
            "choose one of them."
        )


def _check_new(folder: Path) -> None:
    """Raises ValueError if the folder is that of a run or of a model."""
    if (folder / "latest.json").exists():
        raise ValueError(
            f"out is {folder}, which holds a run already; add --resume to continue it, or choose "
            "another folder."
        )
    if holds_model(folder):
        raise ValueError(f"out must not be a folder of pfgm.save, got {folder}.")


def _check_settings(config: RunConfig, folder: Path) -> RunConfig:
    """The configuration, with the run's flow in place of auto."""
    saved = RunConfig.load(folder)
    if config.method == "auto":
        config = dataclasses.replace(config, method=saved.method)
    sizes: dict[str, Any] = {
        name: getattr(saved, name) for name in SIZES if getattr(config, name) is None
    }
    config = dataclasses.replace(config, **sizes)  # which may have been chosen by minutes
    current_paths, saved_paths = config.absolute, saved.absolute
    changeable = {*_CHANGEABLE_SETTINGS}
    if is_missing(saved_paths.data):  # the data have moved
        changeable.add("data")
    if config.teacher is not None and teacher_checksum(folder) is not None:
        changeable.add("teacher")  # its weights tell whether it is the same
    for field in dataclasses.fields(RunConfig):
        same = getattr(current_paths, field.name) == getattr(saved_paths, field.name)
        if field.name not in changeable and not same:
            value, before = getattr(config, field.name), getattr(saved, field.name)
            raise ValueError(other_setting(field.name, value, before, folder))
    return config


@dataclass(frozen=True)
class _Run:
    """A run in its folder, which is locked."""

    config: RunConfig
    folder: Path
    device: torch.device
    processes: Processes
    resume: bool
    resume_from: int | None
    progress: bool
    report: Callable[[str], None]
    begun: float  # by the trainer's clock

    def train(self) -> nn.Module:
        earlier = self._earlier()
        data = self._open(earlier)
        own = ReferenceSet(data)
        rows = _place_rows(own, self.config, self.device)
        model = self._model(earlier, rows, data.classes)
        if self.processes.leads and not self.resume:
            for steps in self.config.fit_levels:
                model.flow.fit_levels(own, steps, solver="multistep", progress=self.progress)
        trainer, notes = self._trainer(model, rows, data), [*model.notes]
        if self.resume:
            notes.append(_resume(trainer, self.resume_from))
        if trainer.config.minutes is not None:
            trainer._time.start(since=self.begun)
        with (
            training_threads(trainer, resumed=self.resume),
            _remove_failed_start(self.folder) if self.processes.leads else nullcontext(),
            _tells_how_to_continue(trainer, self.folder, self.report),
        ):
            trainer._settle()
            self.report("\n".join([*notes, *self._summary(model, rows, data, trainer)]))
            if self.processes.leads:
                self._save_config(model, trainer)
            averaged = trainer.train()
        self.report(f"checkpoint: {self.folder}\n{_next_commands(self.folder, data)}")
        return averaged

    def _earlier(self) -> Loaded | None:
        """What the run continues, or else starts from, if its data or network need it."""
        config = self.config
        source: StrPath | None = config.init or config.teacher
        if self.resume:
            if config.init is None and not is_table_file(config.data):
                return None
            step = self.resume_from  # the folder stands for its newest checkpoint
            source = self.folder if step is None else self.folder / f"step-{step:08d}.safetensors"
        return None if source is None else load(source)

    def _open(self, earlier: Loaded | None) -> Data:
        config = self.config
        table = earlier.table if earlier is not None and is_table_file(config.data) else None
        data = open_data(config.data, **config.reading, table=table, progress=self.progress)
        if config.labels and data.classes == 0:
            raise ValueError(
                f"labels must be False for {config.data}, which has none. Images take theirs from "
                "two or more subfolders, tables from --label-column."
            )
        return data

    def _model(self, earlier: Loaded | None, rows: ReferenceSet, classes: int) -> Model:
        config = self.config
        if config.teacher is not None:
            teacher = load(config.teacher) if earlier is None or self.resume else earlier
            return student_of(teacher, config, self.folder if self.resume else None)
        if config.init is not None:
            assert earlier is not None
            # The checkpoint of the run itself has the network that it started with.
            if self.resume:
                return Model(config, *earlier)
            return model_from(earlier, config, rows, classes)
        if self.resume:
            return built_model(config, rows, classes)
        seconds = None
        if config.training.minutes is not None:
            used = self.processes.of_leader(Trainer._clock() - self.begun)
            seconds = 60 * config.training.minutes - used
        return new_model(config, rows, classes, self.device, seconds)

    def _trainer(self, model: Model, rows: ReferenceSet, data: Data) -> Trainer:
        config, flow, network = model.config, model.flow, model.network.to(self.device)
        training, loss = config.training, _loss(config, flow, network)
        if config.teacher is not None:
            training = dataclasses.replace(training, reference_batch=0)
        evaluate = None
        if self.processes.leads:
            evaluate = Evaluation(config, flow, data, self.folder, self.device, self.progress)
        return Trainer(
            flow,
            network,
            rows,
            training,
            folder=self.folder,
            progress=self.progress,
            labels=rows.labels if config.labels else None,
            label_names=data.names if config.labels else (),
            evaluate=evaluate,
            loss=loss,
            distilled=config.teacher is not None,
        )

    def _summary(
        self, model: Model, rows: ReferenceSet, data: Data, trainer: Trainer
    ) -> Iterator[str]:
        config = self.config
        if not trainer.finished:
            chosen = config.method == "auto" and config.init is config.teacher is None
            yield _overview(model, data, rows, trainer, chosen)
        if config.training.steps is config.training.minutes is None and self.device.type == "cpu":
            yield _long_training(trainer)

    def _save_config(self, model: Model, trainer: Trainer) -> None:
        """Writes what was open in full, so that a resumed run does not choose again.

        Paths are absolute, as the run may be used from another folder.
        """
        references = self.config.training.reference_batch  # a student's trainer has 0
        training = dataclasses.replace(trainer.config, reference_batch=references)
        config = dataclasses.replace(model.config.absolute, training=training)
        config.save(self.folder / CONFIG_FILE, teacher_checksum=model.teacher_checksum)


def _loss(config: RunConfig, flow: Flow, network: nn.Module) -> Callable[..., Tensor] | None:
    """The loss that replaces the flow's own, if one does."""
    if config.teacher is not None:
        return Consistency(flow, network, steps=config.student_levels).loss
    if isinstance(flow, PoissonFlow) and config.weighting != "auto":
        return functools.partial(flow.loss, weighting=config.weighting)
    return None


@contextmanager
def _remove_failed_start(folder: Path) -> Iterator[None]:
    """If the block fails before the first row of the log, removes the new files of the run."""
    before = {*folder.iterdir()}
    try:
        yield
    except BaseException:
        started = any((folder / name).exists() for name in ("latest.json", "log.csv"))
        if is_unmoved(folder) and not started:
            for path in {folder / CONFIG_FILE, *folder.glob("events.out.*")} - before:
                path.unlink(missing_ok=True)
        raise


@contextmanager
def _tells_how_to_continue(
    trainer: Trainer, folder: Path, report: Callable[[str], None]
) -> Iterator[None]:
    """If a signal ends the block after a checkpoint, reports the command that continues the run."""
    try:
        yield
    except (KeyboardInterrupt, Terminated):
        if trainer.saved_step is not None:
            command = f"pfgm train --out {shlex.quote(str(folder))} --resume"
            report(f"stopped; {command} continues from the checkpoint of step {trainer.saved_step}")
        raise


def _resume(trainer: Trainer, resume_from: int | None) -> str:
    """Loads the checkpoint to continue from; returns a line of text."""
    step, steps = trainer.resume(resume_from), trainer.config.steps
    if steps is None:
        left = trainer._time.left / 60
        if trainer.finished:
            return (
                f"resuming at step {step}: nothing is left of {trainer.config.minutes:g} minutes; "
                "give more with --minutes"
            )
        return (
            f"resuming at step {step}, with {left:.1f} of {trainer.config.minutes:g} minutes left"
        )
    if resume_from is not None and step >= steps:
        raise ValueError(
            f"steps must be above {step}, the step of the checkpoint to continue from, got {steps}."
        )
    if step > steps:
        raise ValueError(f"steps must be at least {step}, the step of the run, got {steps}.")
    if step == steps and trainer.lacks_evaluation:
        return f"resuming at step {step} of {steps}, whose evaluation is left"
    if step == steps:
        return f"resuming at step {step}: nothing is left of {steps} steps; give more with --steps"
    return f"resuming at step {step}"


def _place_rows(rows: ReferenceSet, config: RunConfig, device: torch.device) -> ReferenceSet:
    """The rows with mirror images, sharded and held as the configuration says."""
    if config.flips:
        if rows.ndim != 4:
            raise ValueError(
                f"flips is for images (C, H, W), got rows of shape {tuple(rows.shape[1:])} from "
                f"{config.data}; leave it out."
            )
        rows = rows.flipped()
    if config.shared:
        rows = rows.shard()
    if config.hold == "source":
        return rows
    return rows.to(device if config.hold == "device" else None)


def _overview(model: Model, data: Data, rows: ReferenceSet, trainer: Trainer, chosen: bool) -> str:
    """What a run trains, on what, how, and what it writes; whether the data chose the flow."""
    return "\n".join(
        f"{name:10} {text}"
        for name, text in (
            ("data", _data(model.config, data, rows)),
            ("flow", _flow(trainer.flow, rows, chosen)),
            *([("budget", model.budget)] if model.budget else []),
            ("network", _network(trainer.network)),
            ("training", _training(trainer)),
            ("backend", _backend(trainer)),
            ("writes", _files(trainer)),
        )
    )


def _data(config: RunConfig, data: Data, rows: ReferenceSet) -> str:
    low, high = value_range(rows)
    stored = "bytes" if str(rows.dtype) == "torch.uint8" else str(rows.dtype).removeprefix("torch.")
    labels = "no labels"
    if data.classes:
        labels = f"labels 0 to {data.classes - 1}"
        if data.names:
            shown = ", ".join(data.names[:_SHOWN_NAMES])
            labels += f" ({shown}{', …' if len(data.names) > _SHOWN_NAMES else ''})"
        if not config.labels:
            labels += ", which --labels would use"
    mirrored = ", half of them mirror images" if config.flips else ""
    inside = "" if data.table is None or data.table.plain else " after standardising the columns"
    return (
        f"{config.data}: {len(rows)} rows of shape {tuple(rows.shape[1:])}{mirrored}, {stored}, "
        f"values {low:.4g} to {high:.4g}{inside}, {labels}"
    )


def _flow(flow: Flow, rows: ReferenceSet, chosen: bool) -> str:
    name = f"PFGM++ with D = {flow.D:g}" if isinstance(flow, PoissonFlowPP) else "PFGM"
    many = is_image(flow.shape) and len(rows) >= MANY_IMAGES
    kind = "images and signals" if not many else f"{MANY_IMAGES} images and more"
    kind = "rows of numbers" if len(flow.shape) == 1 else kind
    return f"{name}, the default for {kind} (--method)" if chosen else name


def _network(network: nn.Module) -> str:
    parameters = [*network.parameters()]
    count = sum(parameter.numel() for parameter in parameters)
    device = parameters[0].device
    threads = f", threads: {torch.get_num_threads()}" if device.type == "cpu" else ""
    return f"{type(network).__name__} with {count:,} parameters on {device}{threads}"


def _training(trainer: Trainer) -> str:
    config = trainer.config
    references = min(config.reference_batch, len(trainer.data))
    schedule = config.schedule
    length, reason = f"{config.steps} steps", trainer._chosen_precision
    if config.steps is None:
        length = f"{config.minutes:g} minutes"
        length += f", about {n} steps," if (n := trainer._expected_steps) else ""
    return (
        f"{length} of {config.batch_size} samples"
        + (f" against {references} references" if references else "")
        + f", learning rate {schedule.learning_rate:.4g} (warm-up {schedule.warmup} steps, decay "
        f"{schedule.decay}), weights averaged with decay {schedule.ema:.6g}, in {config.precision}"
        + (f" ({reason})" if reason else "")
    )


def _backend(trainer: Trainer) -> str:
    """The backend that computes the loss, and why it."""
    device = next(trainer.network.parameters()).device
    name = requested() or os.environ.get("PFGM_BACKEND")
    if name:
        return f"{name} on {device}, as requested"
    name, reason = preferred(device)
    return f"{name} on {device}, {reason}"


def _files(trainer: Trainer) -> str:
    config = trainer.config
    files = f"{trainer.folder}: config.json, a checkpoint every {config.schedule.checkpoint_every} "
    files += f"steps and at the end, log.csv every {config.log_every}"
    if config.evaluate_every:
        files += f", an evaluation every {config.evaluate_every}"
    elif config.evaluates:
        files += ", an evaluation after a quarter of the time and one at the end"
    return files


def _long_training(trainer: Trainer) -> str:
    """How long a run will take whose length nobody chose."""
    seconds = trainer._seconds_of_step()
    steps = trainer.config.steps
    assert steps is not None
    hours = seconds * steps / 3600
    return (
        f"{steps} steps of {seconds:.2g} s take about {hours:.2g} hours; "
        "--minutes 20 trains a network that fits into this time"
    )


def _next_commands(folder: Path, data: Data) -> str:
    """The commands that draw samples and compare them with the data."""
    shape, run = data.samples.shape[1:], shlex.quote(str(folder))
    images = is_image(shape)
    out = "samples.png" if images else "samples.npy" if len(shape) > 1 else "samples.csv"
    return (
        f"next: pfgm sample {run} --n 100 --out {out}\n"
        f"      pfgm evaluate {run} --out {shlex.quote(str(folder / 'evaluation'))}"
    )
