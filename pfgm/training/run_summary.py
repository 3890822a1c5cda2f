"""The lines that a run prints at its start: data, network, settings and files."""

from __future__ import annotations

import os

import torch
from torch import nn

from ..backends import preferred, requested
from ..common.images import is_image
from ..data.opened import Data
from ..flows.flow import Flow
from ..flows.plusplus import PoissonFlowPP
from ..references import ReferenceSet
from .checks import value_range
from .run_budget import FittingNetwork
from .run_config import RunConfig
from .run_models import MANY_IMAGES
from .trainer import Trainer

_SHOWN_NAMES = 5  # of labels


def summary(
    config: RunConfig,
    data: Data,
    rows: ReferenceSet,
    trainer: Trainer,
    chosen: bool,
    sized: FittingNetwork | None = None,
) -> str:
    """What a run trains, on what, how, and what it writes.

    ``chosen`` tells whether the flow has been chosen by the data; ``sized`` is the network that
    has been chosen by minutes.
    """
    return "\n".join(
        f"{name:10} {text}"
        for name, text in (
            ("data", _data(config, data, rows)),
            ("flow", _flow(trainer.flow, rows, chosen)),
            *([("budget", sized.reason)] if sized else []),
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
