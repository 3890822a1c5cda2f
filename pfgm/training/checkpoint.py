"""Checkpoints: weights files, and the checkpoints of a run.

The folder of a run holds ``step-XXXXXXXX.safetensors`` (the averaged weights),
``step-XXXXXXXX.state.pt`` (what else resuming needs) and ``latest.json``, which names the newest
complete pair and is written last. Nothing in them is ever executed.

Each file is verified when it is read. A weights file holds its own checksum and that of the
training state that belongs to it. The three entries of ``latest.json`` confirm each other. Older
files, without checksums, load with a warning.
"""

from __future__ import annotations

import io
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..common.checksums import checksum_of
from ..common.devices import usable_device
from ..common.files import MALFORMED, StrPath, write_atomic
from ..common.numbers import whole
from ..data.tables import Table
from ..flows.flow import Flow
from .network_state import load_plain_state
from .weights_file import (
    flow_in,
    network_in,
    read_weights,
    warn_without_checksum,
    write_weights,
)

PRETRAINED_WEIGHTS = "model.safetensors"
"""The weights file in a folder of :func:`pfgm.save_pretrained`."""
STATE_FORMAT = 1
"""The version of the format of a training state. Older states, without a version, have this one."""

_KEPT_CHECKPOINTS = 2  # of a run
_WEIGHTS_NAME = re.compile(r"step-(\d{8,18})\.safetensors")
_STATE_NAME = re.compile(r"step-(\d{8,18})\.state\.pt")
_MAX_REASON = 300  # characters of another library's message, which may repeat content of a file


class _FlowAndNetwork(NamedTuple):
    flow: Flow
    network: nn.Module


class Loaded(_FlowAndNetwork):
    """The content of a weights file. It unpacks into the flow and the network."""

    label_names: tuple[str, ...] = ()
    """The names of the labels 0, 1, …; empty if they have none."""
    table: Table | None = None
    """The columns of the table whose rows the network has learned."""
    distilled: bool | None = None
    """Whether the network is a few-step model; None if the file does not say."""


class RunCheckpoint(NamedTuple):
    """A checkpoint of a run."""

    weights: dict[str, Tensor]
    """The averaged weights."""
    description: dict[str, Any]
    """The description in the weights file: flow, network, step."""
    state: dict[str, Any]
    """The training state."""


def save(
    path: StrPath,
    flow: Flow,
    network: nn.Module,
    *,
    step: int = 0,
    distilled: bool | None = None,
    table: Table | None = None,
    label_names: Sequence[str] = (),
) -> None:
    """Writes the network's weights and all that :func:`load` needs to use them.

    Args:
        path: the file to write.
        flow: the flow of the network.
        network: a network. One that is not from :mod:`pfgm.networks` must be given to :func:`load`.
            Its weights are saved, not its code. Wrappers of torch are left out (torch.compile,
            DistributedDataParallel, DataParallel, AveragedModel, FSDP), and so is a module of your
            own, such as a LightningModule, if all its weights are in one network of this package:
            the file holds that network. Of a network that FSDP shards, all processes must save, and
            the first one writes the file.
        step: training steps of the network.
        distilled: whether it is a few-step model (:mod:`pfgm.distillation`), which ``pfgm sample``
            needs for the solver consistency. None if unknown.
        table: the columns of the table whose rows the network has learned.
        label_names: the names of the labels 0, 1, …, by which ``pfgm sample --label`` takes them.

    Raises:
        OSError: the file cannot be written; an existing one is left as it was.
        TypeError: the flow is of a subclass, the network is not a module, or its state
            holds something other than tensors.
        ValueError: the step is no integer of at least 0, a tensor is on the device "meta", a
            weight is not finite, or label_names are more or fewer than the labels of the network.
    """
    facts = {"step": whole("step", step, 0)}
    write_weights(path, flow, network, facts, distilled, table, label_names)


def load(
    path: StrPath,
    network: nn.Module | None = None,
    *,
    device: torch.device | str = "cpu",
) -> Loaded:
    """The flow and the network (in evaluation mode) of a weights file, or of a run's newest one.

    The result unpacks into these two, and has ``label_names``, ``table`` and ``distilled`` besides.

    Args:
        path: a ``.safetensors`` file, or the folder of a run or of :func:`pfgm.save_pretrained`.
        network: takes the weights, in its own dtype, also inside the wrappers that :func:`save`
            leaves out; None builds the network that the file describes, in the dtype of the
            weights, or in float32 if they are narrower.
        device: device of the network.

    Raises:
        FileNotFoundError: there is no such file, or no checkpoint in the folder.
        TypeError: the network is not a module.
        ValueError: the device cannot be used here; the file is truncated, damaged, not from this
            library, or does not fit the network. Where an older checkpoint of the run is intact,
            the message names it.

    Warns:
        UserWarning: the file is old and has no checksum, so damage may go unnoticed.

    >>> import pfgm, tempfile
    >>> flow = pfgm.PoissonFlow((2,), data_norm=1.0)
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     save(f"{folder}/net.safetensors", flow, flow.network("mlp"))
    ...     flow, net = load(f"{folder}/net.safetensors")
    >>> flow.sample(net, 5).shape
    torch.Size([5, 2])
    """
    device = usable_device(str(device))
    if network is not None and not isinstance(network, nn.Module):
        raise TypeError(
            "network must be a torch.nn.Module, which takes the weights, got "
            f"{type(network).__name__}."
        )
    into = "" if network is None else f" into network, a {type(network).__name__}"
    path, tensors, description = _read_newest(path)
    warn_without_checksum(path, description)
    try:
        flow = flow_in(description)
        if network is None:
            network = network_in(description, tensors)
        load_plain_state(network, tensors)
        loaded = Loaded(flow, network.to(device).eval())
        loaded.label_names = tuple(map(str, description.get("label_names", ())))
        loaded.table = _table_in(description)
        loaded.distilled = description.get("distilled")
    except MALFORMED as error:
        raise ValueError(f"{path} cannot be loaded{into}: {_reason(error)}") from error
    return loaded


def _table_in(description: Mapping[str, Any]) -> Table | None:
    if "table" in description:
        return Table.from_dict(description["table"])
    names = description.get("column_names")  # of version 0.2, which learnt plain numbers
    return Table.numbers([str(name) for name in names]) if names else None


def _read_newest(path: StrPath) -> tuple[Path, dict[str, Tensor], dict[str, Any]]:
    """The path, tensors and description of a weights file, or of that of a folder."""
    path = Path(path)
    if path.is_dir() and not (path / "latest.json").exists():
        model = path / PRETRAINED_WEIGHTS
        path = model if model.is_file() else path
    if path.is_dir():
        with _suggest_older(path, _check_weights):
            path = path / _newest_names(path)["weights"]
    with _suggest_older(path, _check_weights):
        tensors, description = read_weights(path)
    return path, tensors, description


def save_run(
    folder: Path,
    flow: Flow,
    averaged: nn.Module,
    state: dict[str, Any],
    step: int,
    distilled: bool | None = None,
    *,
    label_names: Sequence[str] = (),
    table: Table | None = None,
    after: int | None = None,
) -> None:
    """Writes a checkpoint of a run: state, weights, then latest.json; removes the oldest.

    Args:
        after: step of the checkpoint that the run wrote last or was resumed from. Other checkpoints
            above it belong to an abandoned continuation and are removed. None is `step`.
    """
    folder.mkdir(parents=True, exist_ok=True)
    names = _names_at(step)
    content = io.BytesIO()
    torch.save(state, content)
    content.seek(0)
    checksum = checksum_of(content)
    write_atomic(folder / names["state"], lambda file: file.write(content.getbuffer()))
    content.close()  # frees three times the memory of the weights
    facts: dict[str, Any] = {"step": step, "state_checksum": checksum}
    weights = folder / names["weights"]
    write_weights(weights, flow, averaged, facts, distilled, table, label_names)
    latest = json.dumps({"step": step, **names})
    write_atomic(folder / "latest.json", lambda file: file.write(latest.encode()))
    _remove_old(folder, step, step if after is None else after)


def _remove_old(folder: Path, step: int, after: int) -> None:
    """Keeps the checkpoint of this step and the newest of those up to the step `after`.

    Files of other names, such as a copy step-best.safetensors, are not touched.
    """
    for pattern in (_WEIGHTS_NAME, _STATE_NAME):
        paths = _by_step(folder, pattern)
        own = [number for number in sorted(paths) if number <= after or number == step]
        for number in paths.keys() - {*own[-_KEPT_CHECKPOINTS:]}:
            paths[number].unlink()


def _by_step(folder: Path, pattern: re.Pattern[str]) -> dict[int, Path]:
    """The files of a folder whose names match the pattern, by the number in the name."""
    return {int(match[1]): p for p in folder.iterdir() if (match := pattern.fullmatch(p.name))}


def load_run(folder: Path, step: int | None = None) -> RunCheckpoint:
    """The checkpoint of a step of a run, for None the newest. Raises errors as :func:`load`."""
    with _suggest_older(folder, _check_checkpoint):
        names = _newest_names(folder) if step is None else _names_at(step)
    with _suggest_older(folder / names["weights"], _check_checkpoint):
        checkpoint = _read_checkpoint(folder, names)
    warn_without_checksum(folder / names["weights"], checkpoint.description)
    return checkpoint


def _read_checkpoint(folder: Path, names: Mapping[str, str]) -> RunCheckpoint:
    tensors, description = read_weights(folder / names["weights"])
    path, needed = folder / names["state"], description.get("state_checksum")
    if not path.is_file():
        raise FileNotFoundError(f"there is no training state at {path}.")
    if needed is not None:
        with path.open("rb") as file:
            checksum = checksum_of(file)
        if checksum != needed:
            raise ValueError(
                f"{path} must be the complete training state that belongs to its weights, with the "
                f"checksum {needed}, got {checksum}."
            )
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises many types of errors for damaged files
        raise ValueError(f"{path} is not a complete training state.") from error
    if not isinstance(state, dict) or state.get("step") != description.get("step"):
        raise ValueError(f"{path} is not the training state that belongs to its weights.")
    if (version := state.get("format", STATE_FORMAT)) != STATE_FORMAT:
        raise ValueError(
            f"{path} has format {version}; this version of pfgm reads format {STATE_FORMAT}."
        )
    return RunCheckpoint(tensors, description, state)


def _names_at(step: int) -> dict[str, str]:
    """The names of the two files of a checkpoint."""
    return {"weights": f"step-{step:08d}.safetensors", "state": f"step-{step:08d}.state.pt"}


def _newest_names(folder: Path) -> dict[str, str]:
    """The names of the files of the newest checkpoint, from latest.json."""
    path = folder / "latest.json"
    if not path.is_file():
        raise FileNotFoundError(f"there is no checkpoint in {folder}: it has no latest.json.")
    try:
        latest = json.loads(path.read_text())
        names = {key: latest[key] for key in ("weights", "state")}
        if any(Path(name).name != name for name in names.values()):
            raise ValueError("it names a file outside its folder")
        numbered = any(name.startswith("step-") for name in names.values())
        if (numbered or "step" in latest) and names != _names_at(latest["step"]):
            raise ValueError("its step and its files do not belong together")
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise ValueError(f"{path} does not name a checkpoint ({_reason(error)}).") from error
    return names


@contextmanager
def _suggest_older(path: Path, check: Callable[[Path], str]) -> Iterator[None]:
    """Adds to an error which older checkpoint of the run is intact.

    Args:
        path: the weights file, or the folder of a run whose newest checkpoint is not known.
        check: raises an error unless the checkpoint of a weights file is intact; returns the
            suggestion for the message.
    """
    try:
        yield
    except (ValueError, FileNotFoundError) as error:
        for older in _older_weights(path):
            try:
                suggestion = check(older)
            except (ValueError, OSError):
                continue
            kind = ValueError if isinstance(error, ValueError) else FileNotFoundError
            raise kind(f"{error} {suggestion}") from error
        raise


def _older_weights(path: Path) -> list[Path]:
    """The weights files of a run that are older than this one, newest first."""
    folder = path if path.is_dir() else path.parent
    last = _WEIGHTS_NAME.fullmatch(path.name)
    if not folder.is_dir() or (folder == path.parent and last is None):
        return []
    steps = _by_step(folder, _WEIGHTS_NAME)
    return [
        steps[step] for step in sorted(steps, reverse=True) if last is None or step < int(last[1])
    ]


def _check_weights(path: Path) -> str:
    read_weights(path)
    return f"The checkpoint {path} is intact: load that file instead."


def _check_checkpoint(path: Path) -> str:
    step = int(path.stem.removeprefix("step-"))
    _read_checkpoint(path.parent, _names_at(step))
    return (
        f"The checkpoint of step {step} is intact: continue from it with --resume-from "
        f"{step}, or resume(step={step})."
    )


def _reason(error: BaseException) -> str:
    """The message of an error on one line of limited length."""
    text = " ".join(str(error).split())
    return text if len(text) <= _MAX_REASON else f"{text[:_MAX_REASON]} …"
