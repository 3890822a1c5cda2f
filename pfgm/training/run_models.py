"""The flow and the network of a training run."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import torch
from torch import nn

from ..common.images import is_image
from ..flows.flow import Flow
from ..flows.plusplus import PoissonFlowPP
from ..flows.poisson import PoissonFlow
from ..networks.unet import takes_shape
from ..references import ReferenceSet
from .run_config import Method, RunConfig

SIZES = ("width", "multipliers", "blocks", "patch")
# The names of these settings among the arguments of each network.
_PUBLISHED_NAMES = {"width": "nf", "multipliers": "ch_mult", "blocks": "num_res_blocks"}
SIZE_NAMES: dict[str, dict[str, str]] = {
    "unet": {name: name for name in SIZES},
    "mlp": {"width": "width"},
    "ddpmpp": _PUBLISHED_NAMES,
    "ncsnpp": _PUBLISHED_NAMES,
}
MANY_IMAGES = 20_000
"""From this number on, PFGM++ is the default for images. Measured were 4000 and 60 000."""
_IMAGE_NETWORKS = ("ddpmpp", "ncsnpp")


def with_method(config: RunConfig, rows: ReferenceSet, earlier: Flow | None) -> RunConfig:
    """The configuration with a flow in place of auto: that of the weights it starts from, if any.

    Else PFGM++ for rows of numbers, whose far samples PFGM draws too often, and for many images. It
    is PFGM for fewer images and for signals (docs/which-flow.md).
    """
    if config.method != "auto":
        return config
    if earlier is None:
        many = is_image(rows.shape[1:]) and len(rows) >= MANY_IMAGES
        return dataclasses.replace(config, method="pfgm++" if rows.ndim == 2 or many else "pfgm")
    method = method_of(earlier)
    D = earlier.D if method == "pfgm++" else config.D
    return dataclasses.replace(config, method=method, D=D)


def method_of(flow: Flow) -> Method:
    """The method that makes a flow of its kind."""
    if not isinstance(flow, PoissonFlowPP):
        return "pfgm"
    return "edm" if math.isinf(flow.D) else "pfgm++"


def build_flow(config: RunConfig, rows: ReferenceSet) -> Flow:
    """The flow that the configuration asks for, with scales from the data."""
    if config.method == "pfgm":
        return PoissonFlow.from_data(rows, **config.flow)
    D = math.inf if config.method == "edm" else config.D
    return PoissonFlowPP.from_data(rows, D=D, **config.flow)


def build_network(config: RunConfig, flow: Flow, rows: ReferenceSet, classes: int) -> nn.Module:
    """The network that the configuration asks for, initialised from its seed."""
    name = config.network
    if name == "auto":
        name = "unet" if takes_shape(flow.shape) else "mlp"
    settings = _size_settings(config, name)
    if config.labels:
        if name in _IMAGE_NETWORKS:
            raise ValueError(f"network must be unet or mlp with labels, got {name!r}.")
        settings["classes"] = classes
    if isinstance(flow, PoissonFlow) and flow.spread is None and name not in _IMAGE_NETWORKS:
        settings["data_std"] = max(rows.rms, 1e-6)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.training.seed)
        return flow.network(name, **settings)


def _size_settings(config: RunConfig, name: str) -> dict[str, Any]:
    """The keyword arguments for the size of the network."""
    settings: dict[str, Any] = {}
    for option in SIZES:
        if (value := getattr(config, option)) is None:
            continue
        if option not in SIZE_NAMES[name]:
            raise ValueError(f"{option} is {value}, but the network is {name!r}, which has none.")
        settings[SIZE_NAMES[name][option]] = value
    return settings
