"""Checks of the trainer's data, and of a checkpoint that training continues from."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from ..flows.flow import Flow
from ..flows.plusplus import PoissonFlowPP
from ..references import References, ReferenceSet
from .config import TrainConfig

__all__ = ["check_data", "check_labels", "check_same_flow", "check_same_settings"]

# Settings that may differ between a resumed run and the run that it continues.
_MAY_DIFFER = ("steps", "checkpoint_every", "evaluate_every", "log_every", "compile")


def check_data(flow: Flow, data: References, config: TrainConfig, *, other_loss: bool) -> None:
    """Raises ValueError unless the flow, or another loss, can train on the data."""
    single_sample = config.references == 0 and not other_loss
    if single_sample and not isinstance(flow, PoissonFlowPP):
        raise ValueError(
            "references is 0, which is the single-sample target of PoissonFlowPP alone; a "
            "PoissonFlow learns the field of references."
        )
    if data.ndim == 0 or data.shape[1:] != flow.shape:
        raise ValueError(
            f"data has shape {tuple(data.shape)}; allowed is (n, *S) with S = {flow.shape}."
        )
    if len(data) < config.batch_size:
        raise ValueError(
            f"data has {len(data)} rows; at least batch_size, {config.batch_size}, are needed."
        )


def check_labels(labels: Tensor | None, data: References) -> None:
    """Raises ValueError unless labels are None or fit the data."""
    if labels is None:
        return
    if isinstance(data, ReferenceSet) and data.sharded:
        raise ValueError(
            f"labels are given, but data is {data!r}, whose rows are shared among processes; "
            "allowed with labels are data that each process has in full."
        )
    if labels.shape != data.shape[:1] or labels.is_floating_point() or int(labels.min()) < 0:
        raise ValueError(
            f"labels has shape {tuple(labels.shape)} and dtype {labels.dtype}; allowed are "
            f"integers of at least 0, of shape ({len(data)},)."
        )


def check_same_flow(flow: Flow, saved: Flow, folder: Path) -> None:
    """Raises ValueError unless the run in the folder has the same flow."""
    if type(flow) is not type(saved):
        raise ValueError(
            f"flow is a {type(flow).__name__}; the run in {folder} has a {type(saved).__name__}."
        )
    for name, value in flow.config.items():
        # Values that follow from the data depend on the order of summation, up to rounding.
        same = saved.config[name] == value or (
            isinstance(value, float) and math.isclose(value, saved.config[name], rel_tol=1e-9)
        )
        if not same:
            raise ValueError(
                f"flow has {name} = {value!r}; the run in {folder} has another flow, with "
                f"{name} = {saved.config[name]!r}."
            )


def check_same_settings(config: TrainConfig, saved: Mapping[str, Any], folder: Path) -> None:
    """Raises ValueError unless the run in the folder has the same settings, except _MAY_DIFFER."""
    for name, value in dataclasses.asdict(config).items():
        if name not in _MAY_DIFFER and saved.get(name) != value:
            raise ValueError(f"{name} is {value!r}; the run in {folder} has {saved.get(name)!r}.")
