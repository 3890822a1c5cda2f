"""Training runs from one configuration, which is saved beside their checkpoints."""

from __future__ import annotations

import dataclasses
import functools
import shlex
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..common.checksums import checksum_of_weights
from ..common.devices import usable_device
from ..common.files import StrPath, folder_path
from ..common.images import is_image
from ..common.messages import print_notice
from ..data import Data
from ..data.opening import is_missing
from ..data.opening import open as open_data
from ..data.table_files import is_table_file
from ..distillation import Consistency
from ..flows.flow import Flow
from ..flows.poisson import PoissonFlow
from ..references import ReferenceSet
from .checks import other_setting
from .locks import is_unmoved, locked_for_all
from .model_files import Loaded, holds_model, load
from .processes import Processes, reports_process_lost
from .run_budget import fitting_network
from .run_config import CONFIG_FILE, RunConfig, teacher_checksum
from .run_evaluation import Evaluation
from .run_models import SIZES, build_flow, build_network, with_method
from .run_start import start_from
from .run_summary import summary
from .signals import Terminated
from .threads import training_threads
from .trainer import Trainer

__all__ = ["RunConfig", "start"]

_TEACHER_SETTINGS = (
    *("method", "D", "flow", "weighting", "network"),
    *("width", "multipliers", "blocks", "patch", "fit_levels"),
)
# Of a run that is resumed; the trainer checks those of the training.
_CHANGEABLE_SETTINGS = ("hold", "samples", "shared", "training")


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
    begun = Trainer._clock()
    device = usable_device(str(device))
    folder = folder_path(folder)
    processes = Processes()
    resume = resume or resume_from is not None
    if config.shared and processes.size == 1:
        raise ValueError("shared is True, but there is one process; start several with torchrun.")
    if config.shared and config.labels:
        raise ValueError(
            "shared and labels are both True, but the references of one label cannot be shared; "
            "choose one of them."
        )
    with reports_process_lost(processes), locked_for_all(folder, processes):
        if resume:
            config = _check_settings(config, folder)
        elif (folder / "latest.json").exists():
            raise ValueError(
                f"out is {folder}, which holds a run already; add --resume to continue it, or "
                "choose another folder."
            )
        elif holds_model(folder):
            raise ValueError(f"out must not be a folder of pfgm.save, got {folder}.")
        return _run(config, folder, device, resume, resume_from, processes, progress, report, begun)


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


def _run(
    config: RunConfig,
    folder: Path,
    device: torch.device,
    resume: bool,
    resume_from: int | None,
    processes: Processes,
    progress: bool,
    report: Callable[[str], None],
    begun: float,
) -> nn.Module:
    report = report if processes.leads else lambda line: None
    shown = progress and processes.leads
    source: StrPath | None = config.init or config.teacher
    if resume:  # the folder stands for its newest checkpoint
        source = folder if resume_from is None else folder / f"step-{resume_from:08d}.safetensors"
    earlier, is_table = None, is_table_file(config.data)
    if source is not None and (is_table or config.init or (config.teacher and not resume)):
        earlier = load(source)
    table = earlier.table if is_table and earlier is not None else None
    data = open_data(config.data, **config.reading, table=table, progress=shown)
    if config.labels and data.classes == 0:
        raise ValueError(
            f"labels must be False for {config.data}, which has none. Images take theirs from two "
            "or more subfolders, tables from --label-column."
        )
    train = ReferenceSet(data)
    rows = _place_rows(train, config, device)
    chosen = config.method == "auto" and source is None
    if config.teacher is None:
        config = with_method(config, rows, earlier.flow if earlier and config.init else None)
    flow, network, notes = _model(config, rows, data, earlier, resume)
    sized = None
    if config.training.minutes is not None and earlier is None and not resume:
        left = 60 * config.training.minutes - processes.of_leader(Trainer._clock() - begun)
        sized = fitting_network(config, flow, rows, data.classes, device, left)
    if sized is not None:
        config, network = sized.config, sized.network
    teacher_checksum = None if config.teacher is None else checksum_of_weights(network.state_dict())
    if resume and teacher_checksum is not None:
        _check_teacher(config, teacher_checksum, folder)
    network = network.to(device)
    if config.teacher is None and processes.leads and not resume:
        for steps in config.fit_levels:
            flow.fit_levels(train, steps, solver="multistep", progress=progress)
    training, references = config.training, config.training.reference_batch
    loss: Callable[..., Tensor] | None = None
    if config.teacher is not None:
        loss = Consistency(flow, network, steps=config.student_levels).loss
        training = dataclasses.replace(training, reference_batch=0)
    elif isinstance(flow, PoissonFlow) and config.weighting != "auto":
        loss = functools.partial(flow.loss, weighting=config.weighting)
    trainer = Trainer(
        flow,
        network,
        rows,
        training,
        folder=folder,
        progress=progress,
        labels=rows.labels if config.labels else None,
        label_names=data.names if config.labels else (),
        evaluate=Evaluation(config, flow, data, folder, device, shown) if processes.leads else None,
        loss=loss,
        distilled=config.teacher is not None,
    )
    if resume:
        notes.append(_resume(trainer, resume_from))
    if trainer.config.minutes is not None:
        trainer._time.start(since=begun)
    start_removed = _remove_failed_start(folder) if processes.leads else nullcontext()
    with (
        training_threads(trainer, resumed=resume),
        start_removed,
        _tells_how_to_continue(trainer, folder, report),
    ):
        trainer._settle()
        if not trainer.finished:
            notes.append(summary(config, data, rows, trainer, chosen, sized))
        if config.training.steps is config.training.minutes is None and device.type == "cpu":
            notes.append(_long_training(trainer))
        report("\n".join(notes))
        if processes.leads:
            # What was open is written in full, so that a resumed run does not choose again.
            settled = dataclasses.replace(trainer.config, reference_batch=references)
            # With absolute paths, as the run may be used from another folder.
            settled_config = dataclasses.replace(config.absolute, training=settled)
            settled_config.save(folder / CONFIG_FILE, teacher_checksum=teacher_checksum)
        averaged = trainer.train()
    report(f"checkpoint: {folder}\n{_next_commands(folder, data)}")
    return averaged


def _next_commands(folder: Path, data: Data) -> str:
    """The commands that draw samples and compare them with the data."""
    shape, run = data.samples.shape[1:], shlex.quote(str(folder))
    images = is_image(shape)
    out = "samples.png" if images else "samples.npy" if len(shape) > 1 else "samples.csv"
    return (
        f"next: pfgm sample {run} --n 100 --out {out}\n"
        f"      pfgm evaluate {run} --out {shlex.quote(str(folder / 'evaluation'))}"
    )


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


def _model(
    config: RunConfig,
    rows: ReferenceSet,
    data: Data,
    earlier: Loaded | None,
    resume: bool,
) -> tuple[Flow, nn.Module, list[str]]:
    """The flow and the network to train, and lines of text about them.

    ``earlier`` is the checkpoint of the run itself if it is resumed, else that of ``config.init``
    or the teacher; None where neither is needed.
    """
    if config.teacher is not None:
        ignored = [
            name
            for name in _TEACHER_SETTINGS
            if getattr(config, name) != getattr(RunConfig(), name)
        ]
        notes = [f"ignored, since the teacher decides: {', '.join(ignored)}"] if ignored else []
        teacher = load(config.teacher) if resume or earlier is None else earlier
        return *teacher, notes
    if config.init is not None:
        assert earlier is not None
        # The checkpoint of the run itself has the network that it started with.
        return (*earlier, []) if resume else start_from(earlier, config, rows, data.classes)
    flow = build_flow(config, rows)
    return flow, build_network(config, flow, rows, data.classes), []


def _check_teacher(config: RunConfig, checksum: str, folder: Path) -> None:
    """Raises ValueError unless the teacher has the weights that the run has learnt from."""
    needed = teacher_checksum(folder)
    if needed not in (None, checksum):
        raise ValueError(
            f"teacher must hold the weights that the run in {folder} learns from, with the "
            f"checksum {needed}, got {config.teacher}, with {checksum}; or start a new run."
        )


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
