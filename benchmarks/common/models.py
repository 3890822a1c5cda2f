"""Flows and networks as ``pfgm train`` makes them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor, nn

import pfgm
from pfgm.flows.flow import Flow
from pfgm.training import TrainConfig
from pfgm.training.run_config import Method, RunConfig
from pfgm.training.run_models import build_flow, build_network

DIGITS = RunConfig.load(Path(__file__).parents[2] / "recipes" / "digits.json")
"""How the networks of digits in the studies are trained, and, with labels, that of the package."""


def model(
    method: Method,
    train: Tensor,
    *,
    seed: int = 0,
    classes: int = 0,
    **settings: Any,
) -> tuple[Flow, nn.Module]:
    """The flow of training data and a network, initialised from a seed; PFGM++ has D = 128."""
    training, labels = TrainConfig(seed=seed), classes > 0
    config = RunConfig(method=method, labels=labels, training=training, **settings)
    rows = pfgm.ReferenceSet(train)
    flow = build_flow(config, rows)
    return flow, build_network(config, flow, rows, classes)
