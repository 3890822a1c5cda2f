"""The checkpoints of a run.

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
from ..common.files import MALFORMED, write_atomic
from ..common.old_names import with_present_names
from ..data.tables import Table
from ..flows.flow import Flow
from .network_state import load_plain_state
from .weights_file import flow_in, read_weights, warn_without_checksum, write_weights

STATE_FORMAT = 1
"""The version of the format of a training state. Older states, without a version, have this one."""

_KEPT_CHECKPOINTS = 2  # of a run
_WEIGHTS_NAME = re.compile(r"step-(\d{8,18})\.safetensors")
_STATE_NAME = re.compile(r"step-(\d{8,18})\.state\.pt")
_MAX_REASON = 300  # characters of another library's message, which may repeat content of a file


class RunCheckpoint(NamedTuple):
    """A checkpoint of a run."""

    weights: dict[str, Tensor]
    """The averaged weights."""
    description: dict[str, Any]
    """The description in the weights file: flow, network, step."""
    state: dict[str, Any]
    """The training state."""


def read_newest(path: Path) -> tuple[Path, dict[str, Tensor], dict[str, Any]]:
    """The path, tensors and description of a weights file, or of the newest one of a run."""
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
    distilled: bool | None = None,
    *,
    label_names: Sequence[str] = (),
    table: Table | None = None,
    after: int | None = None,
) -> None:
    """Writes a checkpoint of a run: state, weights, then latest.json; removes the oldest.

    Args:
        after: step of the checkpoint that the run wrote last or was resumed from. Other checkpoints
            above it belong to an abandoned continuation and are removed. None is this step.
    """
    step = state["step"]
    folder.mkdir(parents=True, exist_ok=True)
    names = _names_at(step)
    facts = {"step": step, "state_checksum": _write_state(folder / names["state"], state)}
    weights = folder / names["weights"]
    write_weights(weights, flow, averaged, facts, distilled, table, label_names)
    latest = json.dumps({"step": step, **names})
    write_atomic(folder / "latest.json", lambda file: file.write(latest.encode()))
    _remove_old(folder, step, step if after is None else after)


def _write_state(path: Path, state: dict[str, Any]) -> str:
    """The checksum of the training state, which is written to the path."""
    content = io.BytesIO()  # it has three times the size of the weights
    torch.save(state, content)
    content.seek(0)
    checksum = checksum_of(content)
    write_atomic(path, lambda file: file.write(content.getbuffer()))
    return checksum


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
    """The checkpoint of a step of a run, for None the newest. Errors are those of pfgm.load."""
    with _suggest_older(folder, _check_checkpoint):
        names = _newest_names(folder) if step is None else _names_at(step)
    with _suggest_older(folder / names["weights"], _check_checkpoint):
        checkpoint = _read_checkpoint(folder, names)
    warn_without_checksum(folder / names["weights"], checkpoint.description)
    return checkpoint


def run_of(checkpoint: RunCheckpoint, folder: Path) -> tuple[Flow, int, dict[str, Any]]:
    """The flow, the number of rows and the settings of the run in the folder."""
    state = checkpoint.state
    try:
        settings = with_present_names("TrainConfig", state["config"])
        return flow_in(checkpoint.description), state["rows"], settings
    except MALFORMED as error:
        raise ValueError(
            f"{folder} holds a checkpoint that is damaged or of another program ({error})."
        ) from error


def restore(
    network: nn.Module,
    averaged: nn.Module,
    optimizer: torch.optim.Optimizer,
    checkpoint: RunCheckpoint,
    folder: Path,
) -> None:
    """Loads a checkpoint of the run in the folder into its networks and its optimizer."""
    try:
        load_plain_state(network, checkpoint.state["network"])
        load_plain_state(averaged, checkpoint.weights)
        optimizer.load_state_dict(checkpoint.state["optimizer"])
    except MALFORMED as error:
        raise ValueError(f"{folder} holds a run of another network: {_line(error)}") from error


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
        if names != _names_at(latest["step"]):
            raise ValueError("its step and its files do not belong together")
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise ValueError(f"{path} does not name a checkpoint ({reason(error)}).") from error
    return names


def read_latest(folder: Path) -> bytes | None:
    """The content of latest.json, which names the newest checkpoint."""
    path = folder / "latest.json"
    return path.read_bytes() if path.exists() else None


def check_latest(folder: Path, known: bytes | None) -> None:
    """Raises ValueError if there is a newest checkpoint, and it is not the known one of a run."""
    if read_latest(folder) in (None, known):
        return
    if known is None:
        raise ValueError(
            f"folder is {folder}, which holds a run already; resume() continues it, another "
            "folder keeps it."
        )
    raise ValueError(
        f"folder is {folder}, whose newest checkpoint is not the one that this run last read "
        "or wrote; resume() loads the newest, another folder keeps it."
    )


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


def reason(error: BaseException) -> str:
    """The message of an error on one line of limited length."""
    text = _line(error)
    return text if len(text) <= _MAX_REASON else f"{text[:_MAX_REASON]} …"


def _line(error: BaseException) -> str:
    return " ".join(str(error).split())
