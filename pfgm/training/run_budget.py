"""The network of a run that has minutes in place of steps."""

from __future__ import annotations

import dataclasses
import math
import warnings
from typing import Any, NamedTuple

import torch
from torch import nn

from ..flows.flow import Flow
from ..networks.unet import takes_shape
from ..references import ReferenceSet
from .budget import REFERENCE_BATCH, choose
from .config import Precision, TrainConfig
from .processes import Processes
from .run_config import RunConfig
from .run_models import SIZES, build_network
from .trainer import Trainer

_MOST_VALUES = 1 << 15  # pixels in a batch that is timed: 32 images of 32 × 32, one of 256 × 256


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

    Settings that are given stay. None unless the network is the U-Net: no trainings of others have
    been measured, and published networks have sizes of their own.
    """
    if config.network not in ("auto", "unet") or not takes_shape(flow.shape):
        return None
    step, precision, why = _reference_step(config, flow, rows, classes, device)
    time = max(seconds, 0.0) / max(step, 1e-9)
    choice = choose(flow.shape, time, patch=config.patch)
    sizes: dict[str, Any] = {name: getattr(choice, name, None) for name in SIZES}
    sizes = {name: value for name, value in sizes.items() if getattr(config, name) is None}
    training = config.training
    batch = training.batch_for(len(rows), Processes().size, choice.batch_size)
    training = dataclasses.replace(training, batch_size=batch, precision=precision)
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
        + (f"; {why}" if why else "")
    )
    return FittingNetwork(config, network, reason)


def _reference_step(
    config: RunConfig, flow: Flow, rows: ReferenceSet, classes: int, device: torch.device
) -> tuple[float, Precision, str]:
    """Seconds of a step of the default network with batches of 32, its precision, and why.

    Of large images fewer are timed, as 32 would take long and much memory.
    """
    default_sizes: dict[str, Any] = dict.fromkeys(SIZES)
    default = dataclasses.replace(config, **default_sizes)
    network = build_network(default, flow, rows, classes).to(device)
    given = config.training
    size = max(min(REFERENCE_BATCH, _MOST_VALUES // math.prod(flow.shape[1:])), 1)
    batch = dataclasses.replace(given, batch_size=None).batch_for(len(rows), Processes().size, size)
    training = TrainConfig(
        steps=1,
        batch_size=batch,
        reference_batch=given.reference_batch,
        accumulate=given.accumulate,
        precision=given.precision,
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the training itself warns
        labels = rows.labels if config.labels else None
        trainer = Trainer(flow, network, rows, training, progress=False, labels=labels)
    seconds = trainer._settle_precision() or trainer._seconds_of_step()
    precision = trainer.config.precision
    return seconds * REFERENCE_BATCH / batch, precision, trainer._chosen_precision
