"""The flow and the network of a run that starts from the weights of an earlier run."""

from __future__ import annotations

import dataclasses
from typing import Any

from torch import nn

from ..flows.flow import Flow
from ..flows.plusplus import PoissonFlowPP
from ..flows.poisson import PoissonFlow
from ..networks.registry import NETWORKS, label_count
from ..references import ReferenceSet
from .model_files import Loaded
from .run_config import RunConfig
from .run_models import SIZE_NAMES, SIZES, build_flow, method_of

# Hyper-parameters of a flow that its network has been built for.
_NETWORK_SETTINGS: dict[type[Flow], str] = {PoissonFlow: "gamma", PoissonFlowPP: "sigma_data"}


def start_from(
    checkpoint: Loaded, config: RunConfig, rows: ReferenceSet, classes: int
) -> tuple[Flow, nn.Module, list[str]]:
    """The flow of the configuration and data, and the network of the checkpoint ``config.init``.

    The network keeps its size and its scaling, and the flow keeps the hyper-parameters that belong
    to the network.

    The third result are lines of text that tell how the flow differs from the earlier one.
    """
    earlier, network = checkpoint
    kept = _NETWORK_SETTINGS[type(earlier)]
    hyper_parameters = {kept: earlier.config[kept], **config.flow}
    asked, present = _kind(config.method, config.D), _kind(method_of(earlier), earlier.D)
    if asked == present:
        config = dataclasses.replace(config, flow=hyper_parameters)
    flow = build_flow(config, rows)
    for name, wanted, has in (
        ("the flow", asked, present),
        ("samples of shape", flow.shape, earlier.shape),
        (kept, flow.config.get(kept), earlier.config[kept]),
        *_sizes(config, network, classes),
    ):
        if wanted != has:
            raise ValueError(
                f"init is {config.init}, which has {name} {has}; the settings and the data ask for "
                f"{wanted}."
            )
    return flow, network, [f"starting from the weights in {config.init}", *_changes(flow, earlier)]


def _kind(method: str, D: float) -> str:
    return f"pfgm++ with D = {D:g}" if method == "pfgm++" else method


def _sizes(config: RunConfig, network: nn.Module, classes: int) -> list[tuple[str, Any, Any]]:
    """Name, what is asked for and what the network has, for each setting that is given."""
    name = next(name for name, kind in NETWORKS.items() if type(network) is kind)
    settings: dict[str, Any] = dict(network.config)  # type: ignore[arg-type]
    if name == "denoiser":
        name, settings = settings["network"], settings["config"]
    choices: list[tuple[str, Any, Any]] = [
        ("labels", classes if config.labels else 0, label_count(network))
    ]
    if config.network != "auto":
        choices.append(("network", config.network, name))
    for option in SIZES:
        if (asked := getattr(config, option)) is not None:
            has = settings.get(SIZE_NAMES.get(name, {}).get(option, ""))
            choices.append((option, asked, tuple(has) if isinstance(has, list) else has))
    return choices


def _changes(flow: Flow, earlier: Flow) -> list[str]:
    changed = []
    for name, value in flow.config.items():
        before = earlier.config.get(name)
        if value != before and isinstance(value, (int, float)) and isinstance(before, (int, float)):
            changed.append(f"{name} {before:.6g} → {value:.6g}")
    return [f"hyper-parameters of the flow that differ: {', '.join(changed)}"] if changed else []
