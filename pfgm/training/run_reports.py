"""What a run reports: lines at its start and end, and evaluations with their pictures."""

from __future__ import annotations

import os
import shlex
from pathlib import Path

import torch
from torch import Tensor, nn

from .. import metrics
from ..backends import preferred, requested
from ..common.images import is_image
from ..data import Data, to_unit
from ..flows.batched_sampling import draw_prior, sample_in_batches
from ..flows.flow import Flow
from ..flows.plusplus import PoissonFlowPP
from ..plotting.figures import require_matplotlib
from ..references import ReferenceSet
from .checks import value_range
from .run_config import MIN_SAMPLES, RunConfig
from .run_models import MANY_IMAGES
from .trainer import Trainer

_SHOWN_NAMES = 5  # of labels
_MAX_COMPARED_ROWS = 10_000  # of the data
_SAMPLE_BATCH = 1000
_NEIGHBOURS = 3  # k of precision and recall
_PICTURE_SAMPLES = 100


def summary(
    config: RunConfig,
    data: Data,
    rows: ReferenceSet,
    trainer: Trainer,
    chosen: bool,
    budget: str = "",
) -> str:
    """What a run trains, on what, how, and what it writes.

    ``chosen`` tells whether the flow has been chosen by the data; ``budget`` is why minutes have
    chosen the network.
    """
    return "\n".join(
        f"{name:10} {text}"
        for name, text in (
            ("data", _data(config, data, rows)),
            ("flow", _flow(trainer.flow, rows, chosen)),
            *([("budget", budget)] if budget else []),
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


def long_training(trainer: Trainer) -> str:
    """How long a run will take whose length nobody chose."""
    seconds = trainer._seconds_of_step()
    steps = trainer.config.steps
    assert steps is not None
    hours = seconds * steps / 3600
    return (
        f"{steps} steps of {seconds:.2g} s take about {hours:.2g} hours; "
        "--minutes 20 trains a network that fits into this time"
    )


def next_commands(folder: Path, data: Data) -> str:
    """The commands that draw samples and compare them with the data."""
    shape, run = data.samples.shape[1:], shlex.quote(str(folder))
    images = is_image(shape)
    out = "samples.png" if images else "samples.npy" if len(shape) > 1 else "samples.csv"
    return (
        f"next: pfgm sample {run} --n 100 --out {out}\n"
        f"      pfgm evaluate {run} --out {shlex.quote(str(folder / 'evaluation'))}"
    )


class Evaluation:
    """Draws samples, compares them with held-out data and draws a picture of some."""

    def __init__(
        self,
        config: RunConfig,
        flow: Flow,
        data: Data,
        folder: Path,
        device: torch.device,
        progress: bool = False,
    ) -> None:
        self._flow, self._folder, self._device = flow, folder, device
        self._count, self._seed = config.samples, config.training.seed
        self._classes, self._names = (data.classes if config.labels else 0), data.names
        self._few_step = config.teacher is not None
        against = ReferenceSet(data.held_out or data)
        rows = torch.arange(len(against), device="cpu")
        if len(rows) < MIN_SAMPLES:
            raise ValueError(
                f"{config.data} must have at least {MIN_SAMPLES} rows to compare samples with, got "
                f"{len(rows)}."
            )
        if len(rows) > _MAX_COMPARED_ROWS:
            generator = torch.Generator().manual_seed(0)
            rows = against.draw(_MAX_COMPARED_ROWS, generator=generator)
        self._rows, self._against, self._table = rows, against, data.table
        self._neighbours: Tensor | None = None  # of the data, found by the first evaluation
        self._progress = progress
        if self._draws_pictures and config.training.evaluates:
            require_matplotlib()

    @property
    def _draws_pictures(self) -> bool:
        return is_image(self._flow.shape)

    def __call__(self, step: int, network: nn.Module) -> dict[str, float]:
        samples = self._samples(network)
        if self._draws_pictures:
            from ..plotting import image_grid
            from ..plotting.images import label_columns

            shown = samples[: max(_PICTURE_SAMPLES, self._classes)]
            columns = label_columns(range(self._classes), self._names, len(shown))
            shown = shown[: len(shown) // (each := columns.get("columns", 1)) * each]  # whole rows
            image_grid(shown, self._folder / f"samples-{step:08d}.png", **columns)
            samples = samples.clamp(-1, 1)
        if self._table is not None:
            samples = self._table.nearest(samples)
        against = to_unit(self._against[self._rows].cpu())
        if self._neighbours is None:
            self._neighbours = metrics.neighbour_distances(
                against, _NEIGHBOURS, progress=self._progress
            )
        precision, recall = metrics.precision_recall(
            samples, against, _NEIGHBOURS, neighbours=self._neighbours
        )
        return {
            "frechet_distance": metrics.frechet_distance(samples, against),
            "precision": precision,
            "recall": recall,
        }

    def _samples(self, network: nn.Module) -> Tensor:
        numbers = torch.arange(self._count, device="cpu")
        return sample_in_batches(
            self._flow,
            network,
            draw_prior(self._flow, self._count, self._seed),
            batch_size=_SAMPLE_BATCH,
            device=self._device,
            labels=numbers % self._classes if self._classes else None,
            solver="consistency" if self._few_step else None,
        )[0]
