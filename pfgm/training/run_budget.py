"""The network of a run that has minutes in place of steps."""

from __future__ import annotations

import dataclasses
import warnings
from typing import Any, NamedTuple

import torch
from torch import nn

from ..flows.flow import Flow
from ..networks.unet import takes_shape
from ..references import ReferenceSet
from .budget import REFERENCE_BATCH, choose
from .config import TrainConfig
from .processes import Processes
from .rehearsal import seconds_of
from .run_config import RunConfig
from .run_models import SIZES, build_network
from .trainer import Trainer


class FittingNetwork(NamedTuple):
    """A configuration with the chosen sizes, its network, and the reason in words."""

    config: RunConfig
    network: nn.Module
    reason: str


def fitting_network(
    config: RunConfig,
    flow: Flow,
    rows: ReferenceSet,
    classes: int,
    device: torch.device,
    seconds: float,
) -> FittingNetwork | None:
    """The network and batch that :func:`pfgm.training.budget.choose` finds for some seconds.

    Settings that are given stay. None for a published network, whose sizes are its own, and for
    samples of which no trainings have been measured.
    """
    kind = config.network
    if kind == "auto":
        kind = "unet" if takes_shape(flow.shape) else "mlp"
    if kind not in ("unet", "mlp"):
        return None
    step = _reference_seconds(config, flow, rows, classes, device)
    time = max(seconds, 0.0) / max(step, 1e-9)
    shape = flow.shape if kind == "unet" else (flow.N,)
    if (choice := choose(shape, time, patch=config.patch)) is None:
        return None
    sizes: dict[str, Any] = {name: getattr(choice, name, None) for name in SIZES}
    sizes = {name: value for name, value in sizes.items() if getattr(config, name) is None}
    training = config.training
    if training.batch_size is None:
        batch = _allowed_batch(choice.batch_size, len(rows), training)
        training = dataclasses.replace(training, batch_size=batch)
    config = dataclasses.replace(config, training=training, **sizes)
    network = build_network(config, flow, rows, classes)
    fits = f"{time:.3g} steps of the default network ({step:.2g} s)"
    sized = ", ".join(
        f"{name} {' '.join(map(str, value)) if isinstance(value, tuple) else value}"
        for name in SIZES
        if (value := getattr(config, name)) is not None
    )
    reason = (
        f"{config.training.minutes:g} minutes, the time of {fits}: {sized}, batch "
        f"{training.batch_size}, by a fit to {choice.rows} measured trainings"
    )
    return FittingNetwork(config, network, reason)


def _reference_seconds(
    config: RunConfig, flow: Flow, rows: ReferenceSet, classes: int, device: torch.device
) -> float:
    """Seconds of a step of the default network with batches of 32, the unit of the fit."""
    default_sizes: dict[str, Any] = dict.fromkeys(SIZES)
    default = dataclasses.replace(config, **default_sizes)
    network = build_network(default, flow, rows, classes).to(device)
    processes = Processes()
    batch = _allowed_batch(REFERENCE_BATCH, len(rows), config.training)
    training = TrainConfig(
        steps=1,
        batch_size=batch,
        reference_batch=config.training.reference_batch,
        accumulate=config.training.accumulate,
        precision=config.training.precision,
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the training itself warns
        labels = rows.labels if config.labels else None
        trainer = Trainer(flow, network, rows, training, progress=False, labels=labels)
    trainer._settle_precision()
    (seconds,) = seconds_of([trainer._rehearsal()], processes, trainer._clock)
    return seconds * REFERENCE_BATCH / batch


def _allowed_batch(size: int, rows: int, training: TrainConfig) -> int:
    """The nearest batch that processes and parts divide, no larger than the data and references."""
    unit = Processes().size * training.accumulate
    most = min(rows, training.reference_batch or rows)
    return max(min(round(size / unit), most // unit), 1) * unit
