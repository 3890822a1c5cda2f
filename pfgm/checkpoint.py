"""Checkpoints: weights with all that sampling needs, the training state beside them.

A weights file is safetensors; its metadata hold the flow's hyper-parameters and the network's
configuration, so that it can be used alone. A run's folder holds ``step-XXXXXXXX.safetensors`` (the
averaged weights), ``step-XXXXXXXX.state.pt`` (what resuming needs beside them) and ``latest.json``,
which names the newest complete pair and is written last. Nothing in them is ever executed.
"""

from __future__ import annotations

import io
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from .base import Flow
from .files import StrPath, write_atomic
from .flow import PoissonFlow
from .flowpp import PoissonFlowPP
from .networks import NETWORKS, build

__all__ = ["load", "load_run", "save", "save_run"]

_FORMAT = 1
_FLOWS: dict[str, type[Flow]] = {"PoissonFlow": PoissonFlow, "PoissonFlowPP": PoissonFlowPP}
_KEPT = 2  # newest checkpoints of a run that stay


class Loaded(NamedTuple):
    """What a weights file holds."""

    flow: Flow
    network: nn.Module


def save(
    path: StrPath,
    flow: Flow,
    network: nn.Module,
    *,
    step: int = 0,
    distilled: bool | None = None,
) -> None:
    """Writes the network's weights and all that :func:`load` needs to use them.

    A network that is not one of :mod:`pfgm.networks` is saved too, but must be given to
    :func:`load`. ``distilled`` notes whether it is a few-step model (:mod:`pfgm.distillation`), for
    which alone ``pfgm sample`` takes the solver consistency; None leaves that open.

    Raises:
        OSError: the file cannot be written; an existing one is left as it was.
    """
    description = {
        "format": _FORMAT,
        "step": step,
        "kind": type(flow).__name__,
        "flow": flow.config,
        "network": _describe(network),
    }
    if distilled is not None:
        description["distilled"] = distilled
    tensors = {
        name: tensor.detach().to("cpu", copy=True).contiguous()
        for name, tensor in network.state_dict().items()
    }
    content = safetensors.torch.save(tensors, metadata={"pfgm": json.dumps(description)})
    write_atomic(path, lambda file: file.write(content))


def load(
    path: StrPath,
    network: nn.Module | None = None,
    *,
    device: torch.device | str = "cpu",
) -> Loaded:
    """The flow and the network (in evaluation mode) of a weights file, or of a run's newest one.

    Args:
        path: a ``.safetensors`` file, or the folder of a run.
        network: takes the weights; None builds the network that the file describes.
        device: where the network goes.

    Raises:
        FileNotFoundError: there is no such file, or no checkpoint in the folder.
        ValueError: the file is truncated, not from this library, or does not fit the network.

    >>> import pfgm, tempfile
    >>> flow = pfgm.PoissonFlow((2,), data_norm=1.0)
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     save(f"{folder}/net.safetensors", flow, pfgm.networks.MLP((2,)))
    ...     flow, net = load(f"{folder}/net.safetensors")
    >>> flow.sample(net, 5).shape
    torch.Size([5, 2])
    """
    path = Path(path)
    if path.is_dir():
        path = path / _latest(path)["weights"]
    tensors, description = _read(path)
    try:
        flow = flow_of(description)
        if network is None:
            network = _rebuild(description["network"], tensors)
        network.load_state_dict(tensors)
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"{path} cannot be loaded: {reason}") from error
    return Loaded(flow, network.to(device).eval())


def check_solver(path: StrPath, solver: str) -> str | None:
    """A notice where it is not known whether a solver is one for the network of a checkpoint.

    Raises:
        FileNotFoundError, ValueError: as :func:`load`, or the solver is consistency and the network
            no few-step model.
    """
    if solver != "consistency":
        return None
    path = Path(path)
    _, description = _read(path / _latest(path)["weights"] if path.is_dir() else path)
    distilled = description.get("distilled")
    if distilled is False:
        raise ValueError(
            f"solver is 'consistency', but the network in {path} is no few-step model (pfgm train "
            "--teacher makes one); allowed are the other solvers."
        )
    if distilled is None:
        return (
            f"{path} does not say whether its network is a few-step model; of any other the solver "
            "consistency gives averages of data."
        )
    return None


def flow_of(description: Mapping[str, Any]) -> Flow:
    """The flow that a file describes; one without a kind is from before there were two.

    Raises:
        ValueError, TypeError: there is no such flow.
    """
    kind = description.get("kind", "PoissonFlow")
    if kind not in _FLOWS:
        raise ValueError(f"it holds a flow {kind!r}; known are {', '.join(_FLOWS)}.")
    return _FLOWS[kind](**description["flow"])


def _describe(network: nn.Module) -> dict[str, Any] | None:
    for name, kind in NETWORKS.items():
        if type(network) is kind:
            return {"name": name, "config": network.config}
    return None


def _rebuild(described: Any, tensors: Mapping[str, Tensor]) -> nn.Module:
    if described is None:
        raise ValueError(
            "it holds the weights of a network that is not one of pfgm.networks; give the network "
            "to load them into."
        )
    # First without memory, so that a configuration that does not belong to the tensors in the
    # file allocates nothing.
    with torch.device("meta"):
        expected = build(described["name"], described["config"]).state_dict()
    if {k: v.shape for k, v in expected.items()} != {k: v.shape for k, v in tensors.items()}:
        raise ValueError("it holds other tensors than the network it describes.")
    return build(described["name"], described["config"])


def _read(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    if not path.is_file():
        raise FileNotFoundError(f"there is no checkpoint at {path}.")
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except safetensors.SafetensorError as error:
        raise ValueError(f"{path} is not a complete safetensors file ({error}).") from error
    try:
        description = json.loads(metadata.get("pfgm", ""))
        version = description["format"]
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise ValueError(f"{path} was not written by pfgm: it describes no flow.") from error
    if version != _FORMAT:
        raise ValueError(f"{path} has format {version}; this version reads format {_FORMAT}.")
    return tensors, description


def save_run(
    folder: Path,
    flow: Flow,
    averaged: nn.Module,
    state: dict[str, Any],
    step: int,
    distilled: bool | None = None,
) -> None:
    """Writes a checkpoint of a run: weights, state, then latest.json; removes the oldest."""
    folder.mkdir(parents=True, exist_ok=True)
    weights_name, state_name = f"step-{step:08d}.safetensors", f"step-{step:08d}.state.pt"
    save(folder / weights_name, flow, averaged, step=step, distilled=distilled)
    content = io.BytesIO()
    torch.save(state, content)
    write_atomic(folder / state_name, lambda file: file.write(content.getbuffer()))
    latest = {"step": step, "weights": weights_name, "state": state_name}
    write_atomic(folder / "latest.json", lambda file: file.write(json.dumps(latest).encode()))
    for pattern in ("step-*.safetensors", "step-*.state.pt"):
        # Those of a later step are of a run that this one has been resumed before the end of.
        earlier = [path for path in sorted(folder.glob(pattern)) if _step_of(path) <= step]
        for path in {*folder.glob(pattern)} - {*earlier[-_KEPT:]}:
            path.unlink()


def _step_of(path: Path) -> int:
    digits = path.name.removeprefix("step-").partition(".")[0]
    return int(digits) if digits.isdigit() else 0


def load_run(folder: Path) -> tuple[dict[str, Tensor], dict[str, Any], dict[str, Any]]:
    """Averaged weights, their description and the training state of a run's newest checkpoint.

    Raises:
        FileNotFoundError, ValueError: as :func:`load`.
    """
    latest = _latest(folder)
    tensors, description = _read(folder / latest["weights"])
    path = folder / latest["state"]
    if not path.is_file():
        raise FileNotFoundError(f"there is no training state at {path}.")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises a dozen kinds for a file that it cannot read
        raise ValueError(f"{path} is not a complete training state.") from error
    if not isinstance(state, dict) or state.get("step") != description["step"]:
        raise ValueError(f"{path} is not the training state that belongs to its weights.")
    return tensors, description, state


def _latest(folder: Path) -> dict[str, str]:
    path = folder / "latest.json"
    if not path.is_file():
        raise FileNotFoundError(f"there is no checkpoint in {folder}: it has no latest.json.")
    try:
        latest = json.loads(path.read_text())
        names = {key: latest[key] for key in ("weights", "state")}
        if any(Path(name).name != name for name in names.values()):
            raise ValueError("it names a file outside its folder")
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} does not name a checkpoint ({error}).") from error
    return names
