"""Weights files: a network and its flow in one safetensors file.

The metadata hold the hyper-parameters of the flow and the config of the network, so the file can be
used alone. Nothing in it is ever executed.
"""

from __future__ import annotations

import threading
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import safetensors
import torch
from torch import Tensor, nn

from ..common.files import StrPath
from ..common.old_names import with_present_names
from ..common.tensor_files import read_tensors, write_tensors
from ..common.values import check_finite
from ..common.wrappers import plain_name, without_wrappers
from ..data.tables import Table
from ..flows.flow import Flow
from ..flows.plusplus import PoissonFlowPP
from ..flows.poisson import PoissonFlow
from ..networks import build
from ..networks.registry import label_count
from .network_state import (
    is_sharded,
    name_of,
    network_to_save,
    plain_names,
    plain_state,
)

_FORMAT = 1
_PROTOCOLS = (b"\x02", b"\x03", b"\x04", b"\x05")  # of pickle
_FLOWS: dict[str, type[Flow]] = {"PoissonFlow": PoissonFlow, "PoissonFlowPP": PoissonFlowPP}


def write_weights(
    path: StrPath,
    flow: Flow,
    network: nn.Module,
    facts: Mapping[str, Any],
    distilled: bool | None,
    table: Table | None,
    label_names: Sequence[str],
) -> None:
    """Writes a weights file; `facts` are added to its description, such as the step.

    Of a network that FSDP shards, all processes must write it, and the first one does.
    """
    network = network_to_save(network)
    if label_names and label_count(network) not in (0, len(label_names)):
        raise ValueError(
            f"label_names must be the names of the {label_count(network)} labels of the network, "
            f"got {len(label_names)}."
        )
    state = plain_state(network)
    if not state and is_sharded(network):
        return  # the first process writes
    _check_finite(network, state)
    description = {
        "format": _FORMAT,
        "kind": type(flow).__name__,
        "flow": flow.config,
        "network": describe_network(network),
        **facts,
    }
    if flow.fitted_levels:
        description["fitted_levels"] = flow._describe_fitted()
    if distilled is not None:
        description["distilled"] = distilled
    if table is not None:
        description["table"] = table.to_dict()
    if label_names:
        description["label_names"] = [*label_names]
    write_tensors(path, state, description)


def check_savable(flow: Flow, network: nn.Module) -> None:
    """Raises an error unless a weights file can hold the flow and the network."""
    if _FLOWS.get(type(flow).__name__) is not type(flow):
        raise TypeError(
            f"flow must be {' or '.join(_FLOWS)} itself, got {type(flow).__qualname__}, whose "
            "class a file cannot hold."
        )
    if not isinstance(network, nn.Module):
        raise TypeError(
            "network must be a torch.nn.Module, whose weights are saved, got "
            f"{type(network).__name__}, whose code a file cannot hold."
        )
    for name, value in network.state_dict().items():
        if not isinstance(value, Tensor):
            raise TypeError(
                f"the state_dict of network must hold tensors, got {type(value).__name__} for "
                f"{name!r}."
            )
        if value.is_meta:
            raise ValueError(
                f"network must be on a device that holds values, got tensor {name!r} on the device "
                '"meta".'
            )


def _check_finite(network: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Raises ValueError if a weight is not finite; a buffer, such as a mask, may be infinite."""
    buffers = {plain_name(name) for name, _ in without_wrappers(network).named_buffers()}
    for name, weight in state.items():
        values = weight.detach()
        values = values.float() if values.dtype.itemsize == 1 else values  # float8
        if name not in buffers:
            check_finite(f"{name} of network", values.flatten())


def read_weights(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors and the description of a weights file, verified if it has a checksum."""
    try:
        return read_tensors(path, _FORMAT)
    except ValueError as error:
        if isinstance(error.__cause__, safetensors.SafetensorError) and _is_pickled(path):
            raise ValueError(
                f"{path} is not a checkpoint of pfgm but a pickled file; `pfgm convert {path} "
                "--out NAME.safetensors` makes one from a published file of PFGM, PFGM++ or EDM."
            ) from error
        raise


def _is_pickled(path: Path) -> bool:
    """Whether a file begins as those of torch.save, in either format, and of pickle.dump do."""
    with path.open("rb") as file:
        beginning = file.read(4)
    # A safetensors file begins with the length of its header, in which the third byte is 0.
    pickled = beginning[:1] == b"\x80" and beginning[1:2] in _PROTOCOLS and beginning[2:3] != b"\0"
    return pickled or beginning == b"PK\x03\x04"


def warn_without_checksum(path: Path, description: Mapping[str, Any]) -> None:
    """Warns the caller's caller if a weights file has no checksum."""
    if "checksum" not in description:
        warnings.warn(
            f"{path} has no checksum, as an older version wrote it: damage would go unnoticed.",
            stacklevel=3,
        )


def flow_in(description: Mapping[str, Any]) -> Flow:
    """The flow of a description. Older files, from before PoissonFlowPP, name no kind."""
    kind = description.get("kind", "PoissonFlow")
    if kind not in _FLOWS:
        raise ValueError(f"it holds a flow {kind!r}; known are {', '.join(_FLOWS)}.")
    flow = _FLOWS[kind](**with_present_names(kind, description["flow"]))
    flow._restore_fitted(description.get("fitted_levels", {}))
    return flow


def network_in(description: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> nn.Module:
    """The network of a description, without the weights, which it can hold in full precision."""
    described = description["network"]
    if described is None:
        raise ValueError(
            "it holds the weights of a network that is not one of pfgm.networks; give the network "
            "to load them into."
        )
    # Built on "meta" and with a limit first, so that a config that does not fit the tensors is
    # refused before anything is allocated.
    with torch.device("meta"), _limit_parameters(len(tensors)):
        expected = build(described["name"], described["config"]).state_dict()
    shapes = {name: tensor.shape for name, tensor in plain_names(tensors).items()}
    if {name: tensor.shape for name, tensor in expected.items()} != shapes:
        raise ValueError("it holds other tensors than the network it describes.")
    with torch.device("cpu"):  # as the tensors, whatever the default device
        network = build(described["name"], described["config"])
    _widen(network, plain_names(tensors))
    return network


def _widen(network: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Widens the network's tensors to the dtype of the file's tensors where that is wider."""
    for name, own in network.state_dict(keep_vars=True).items():
        if own.is_floating_point():
            own.data = own.data.to(torch.promote_types(own.dtype, tensors[name].dtype))


def describe_network(network: nn.Module) -> dict[str, Any] | None:
    """The name and the config of a network of :mod:`pfgm.networks`; None for any other."""
    network = network_to_save(network)
    name = name_of(network)
    return None if name is None else {"name": name, "config": without_wrappers(network).config}


@contextmanager
def _limit_parameters(limit: int) -> Iterator[None]:
    """Raises ValueError where modules of this thread register more parameters than the limit."""
    registered, thread = 0, threading.get_ident()

    def count(_: nn.Module, __: str, parameter: nn.Parameter | None) -> None:
        nonlocal registered
        if parameter is None or threading.get_ident() != thread:
            return
        registered += 1
        if registered > limit:
            raise ValueError(
                f"the network that it describes has more parameters than its {limit} tensors."
            )

    hook = nn.modules.module.register_module_parameter_registration_hook(count)
    try:
        yield
    finally:
        hook.remove()
