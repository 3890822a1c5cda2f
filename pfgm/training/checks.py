"""Checks of the trainer's data, and of a checkpoint that training continues from."""

from __future__ import annotations

import dataclasses
import math
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..common.checks import check_dtype, check_tensor
from ..common.images import is_image, warn_image_range
from ..common.tensors import as_int64
from ..data import to_unit
from ..flows.flow import Flow
from ..flows.plusplus import PoissonFlowPP
from ..references import References, ReferenceSet
from .config import Schedule, TrainConfig
from .network_state import is_sharded

_COMPARED_ROWS = 1024  # for the range of the values and their spread
_FEWEST_PIXELS = 64  # in images; data with fewer columns are tables
_SCALES = 100.0  # ratio of spreads at which the smaller one is lost (PoissonFlow.from_data)

# Settings that may differ between a resumed run and the run that it continues.
_MAY_DIFFER = (
    "steps",
    "minutes",
    "checkpoint_every",
    "evaluate_every",
    "log_every",
    "log",
    "compile",
)


def check_config(config: object) -> None:
    """Raises TypeError unless config is a TrainConfig, or None for the defaults."""
    if config is not None and not isinstance(config, TrainConfig):
        raise TypeError(
            "config must be a TrainConfig, such as TrainConfig(steps=1000), got "
            f"{type(config).__name__}."
        )


def check_data(
    flow: Flow, data: References, config: TrainConfig, batch_size: int, *, other_loss: bool
) -> None:
    """Raises an error unless the flow, or another loss, can train on the data."""
    single_sample = config.reference_batch == 0 and not other_loss
    if single_sample and not isinstance(flow, PoissonFlowPP):
        raise ValueError(
            "reference_batch is 0, which is the single-sample target of PoissonFlowPP alone; a "
            "PoissonFlow learns the field of references."
        )
    if data.ndim == 0 or data.shape[1:] != flow.shape:
        raise ValueError(
            f"data must have shape (n, *S) with S = {flow.shape}, got {tuple(data.shape)}."
        )
    if isinstance(data, Tensor):
        check_dtype("data", data)
    if len(data) < batch_size:
        hint = f" Give a batch_size of 1 to {len(data)} (--batch-size on the command line)."
        raise ValueError(
            f"data must have at least batch_size rows, {batch_size}, got {len(data)}."
            + (hint if len(data) else "")
        )


def check_trainable(network: object) -> None:
    """Raises an error unless the network can be trained."""
    if not isinstance(network, nn.Module):
        raise TypeError(
            f"network must be a torch.nn.Module with parameters, got {type(network).__name__}."
        )
    if is_sharded(network):
        raise TypeError(
            "network must be whole in each process, got one that FSDP shards; train it in a loop "
            "of your own with flow.loss."
        )
    trained = [(name, p) for name, p in network.named_parameters() if p.requires_grad]
    if not trained:
        raise ValueError("network must have a parameter with requires_grad, got none.")
    for name, parameter in trained:
        if torch.finfo(parameter.dtype).bits < 32:  # of complex numbers, those of each part
            raise TypeError(
                f"network must be float32 or float64, got {name} in {parameter.dtype}, in which "
                "small steps are lost; use network.float(), with precision='bfloat16' for speed."
            )


class Diverged(RuntimeError):
    """The loss or a weight is not finite."""


def check_weights(network: nn.Module, step: int) -> None:
    """Raises Diverged if a trained weight is not finite.

    A gradient that is not finite spoils the weights after a step whose loss is finite.
    """
    trained = [(name, p) for name, p in network.named_parameters() if p.requires_grad]
    finite = torch.stack([parameter.detach().isfinite().all() for _, parameter in trained])
    if not bool(finite.all()):
        name, _ = trained[int(finite.int().argmin())]
        raise Diverged(
            f"the weight {name} is not finite after step {step}: lower the learning rate, or look "
            "for a gradient that is not finite; the last checkpoint is unharmed."
        )


def value_range(data: References) -> tuple[float, float]:
    """The least and the largest value in 1024 rows, evenly spaced; bytes as u/127.5 − 1."""
    values = _compared_rows(data)
    return float(values.min()), float(values.max())


def _compared_rows(data: References) -> Tensor:
    rows = data.rows if isinstance(data, ReferenceSet) else torch.arange(len(data), device="cpu")
    count = min(len(rows), _COMPARED_ROWS)
    rows = rows[torch.linspace(0, len(rows) - 1, count, device="cpu").long()]
    return to_unit(data[rows.to(data.device)])


def warn_of_scales(data: References) -> None:
    """Warns the caller of Trainer(…) of a table (n, columns) with columns of very different spread.

    Flattened images are not tables: they have 64 or more columns, some of which hardly vary.
    """
    if data.ndim != 2 or not 2 <= data.shape[1] < _FEWEST_PIXELS or data.dtype == torch.uint8:
        return
    spreads = _compared_rows(data).double().std(0, correction=0)
    largest, widest = spreads.max(0)
    smallest, narrowest = torch.where(spreads > 0, spreads, torch.inf).min(0)
    if not bool(largest >= _SCALES * smallest):
        return
    warnings.warn(
        f"data has columns of very different standard deviation, {float(largest):.3g} in column "
        f"{int(widest)} and {float(smallest):.3g} in column {int(narrowest)}: detail below a "
        "hundredth of the spread of all values is lost. Standardise the rows, a tensor "
        "(n, columns): (rows - mean) / std with mean = rows.mean(0), std = rows.std(0), and 1 in "
        "place of each std of 0; then take samples * std + mean.",
        stacklevel=4,  # beyond with_hints, too
    )


def warn_of_range(data: References) -> None:
    """Warns the caller of Trainer(…) of images (n, C, H, W) that do not look like [−1, 1]."""
    if is_image(data.shape[1:]) and data.dtype != torch.uint8:
        warn_image_range(*value_range(data), stacklevel=5)


def check_divisible(batch_size: int, processes: int, accumulate: int) -> None:
    """Raises ValueError unless processes and their parts divide the batch."""
    if batch_size % (processes * accumulate):
        raise ValueError(
            f"batch_size must be a multiple of the number of processes, {processes}, times "
            f"accumulate, {accumulate}, got {batch_size}."
        )


def checked_labels(
    labels: Tensor | None, names: Sequence[str], data: References, classes: int
) -> tuple[Tensor | None, tuple[str, ...]]:
    """The labels as int64, or None if there are none, and their names.

    For a network with classes they are those of the data unless they are given; classes is 0 if it
    is not known.
    """
    if labels is None and classes and isinstance(data, ReferenceSet) and not data.sharded:
        labels = data.labels
        if not names and len(data.names) == classes:
            names = data.names
    if labels is None and classes:
        raise ValueError(
            f"labels must be given for a network of {classes} classes, as data have none that are "
            "integers; a network without classes learns without labels."
        )
    if labels is None:
        return None, tuple(names)
    check_tensor("labels", labels)
    if isinstance(data, ReferenceSet) and data.sharded:
        raise ValueError(
            f"data must be whole in each process when labels are given, got {data!r}, whose rows "
            "are divided among processes."
        )
    one_a_row = labels.shape == data.shape[:1] and not labels.is_floating_point()
    if not one_a_row:
        raise ValueError(
            f"labels must be integers of at least 0, of shape ({len(data)},), got {labels.dtype} "
            f"of shape {tuple(labels.shape)}."
        )
    labels = as_int64("labels", labels)
    if (least := int(labels.min())) < 0:
        raise ValueError(f"labels must be at least 0, got {least}; leave such rows out.")
    if classes and int(labels.max()) >= classes:
        raise ValueError(
            f"labels must be from 0 to {classes - 1} for a network of {classes} classes, got "
            f"{int(labels.max())}."
        )
    return labels, tuple(names)


def check_same_flow(flow: Flow, saved: Flow, folder: Path) -> None:
    """Raises ValueError unless the run in the folder has the same flow."""
    if type(flow) is not type(saved):
        raise ValueError(
            f"flow must be a {type(saved).__name__}, as in the run in {folder}, got "
            f"{type(flow).__name__}."
        )
    for name, value in flow.config.items():
        # Values that follow from the data depend on the order of summation, up to rounding.
        same = saved.config[name] == value or (
            isinstance(value, float) and math.isclose(value, saved.config[name], rel_tol=1e-9)
        )
        if not same:
            raise ValueError(
                f"flow has {name} = {value!r}; the run in {folder} has another flow, with "
                f"{name} = {saved.config[name]!r}. A flow follows from its data and settings."
            )


def with_settings_of_run(
    config: TrainConfig, saved: Mapping[str, Any], folder: Path
) -> TrainConfig:
    """The configuration, with the settings that it leaves open taken from a run."""
    open_settings = [name for name in Schedule._fields if getattr(config, name) is None]
    open_settings += ["precision"] if config.precision == "auto" else []
    open_settings += ["batch_size"] if config.batch_size is None else []
    open_settings += ["steps", "minutes"] if config.steps is config.minutes is None else []
    settled: dict[str, Any] = {name: saved.get(name) for name in open_settings}
    config = dataclasses.replace(config, **settled)
    for name, value in dataclasses.asdict(config).items():
        if name not in _MAY_DIFFER and saved.get(name) != value:
            raise ValueError(other_setting(name, value, saved.get(name), folder))
    return config.resolved()


def other_setting(name: str, value: object, before: object, folder: Path) -> str:
    """The error for a setting that a resumed run cannot change."""
    return (
        f"{name} is {value!r}; the run in {folder} has {before!r}, which a resumed run keeps; "
        "leave it out, or start a new run from the weights of this one (pfgm train --init)."
    )
