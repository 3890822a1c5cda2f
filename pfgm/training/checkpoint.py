"""Checkpoints: weights with all that sampling needs, the training state beside them.

A weights file is safetensors; its metadata hold the flow's hyper-parameters and the network's
configuration, so that it can be used alone. A run's folder holds ``step-XXXXXXXX.safetensors`` (the
averaged weights), ``step-XXXXXXXX.state.pt`` (what resuming needs beside them) and ``latest.json``,
which names the newest complete pair and is written last. Nothing in them is ever executed.

Each file is verified when it is read. The metadata of the weights hold the CRC-32 of their whole
file, taken with zeros in its own place, and that of the training state that belongs to them; the
three entries of ``latest.json`` say the same thing. CRC-32 notices every change of one or two bits
or within 32 neighbouring ones, and of 2³² others all but one; it is there for accidents, not
for forgers, and costs a sixteenth of a second for 250 MB. Files from before there were checksums
load with a warning.
"""

from __future__ import annotations

import io
import json
import re
import threading
import warnings
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from ..common.files import StrPath, write_atomic
from ..flows.flow import Flow
from ..flows.plusplus import PoissonFlowPP
from ..flows.poisson import PoissonFlow
from ..networks import NETWORKS, build
from ..networks.published.safe_pickle import BROKEN

__all__ = ["load", "load_run", "save", "save_run"]

_FORMAT = 1
_FLOWS: dict[str, type[Flow]] = {"PoissonFlow": PoissonFlow, "PoissonFlowPP": PoissonFlowPP}
_KEPT = 2  # newest checkpoints of a run that stay
_STEP = re.compile(r"step-(\d{8,18})\.safetensors")
_BLANK = "00000000"  # in the place of a checksum while it is taken
_CHUNK_BYTES = 1 << 20
_SHOWN = 300  # characters of another library's reason, which may repeat what is in a file


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
    _save(path, flow, network, {"step": step}, distilled)


def _save(
    path: StrPath,
    flow: Flow,
    network: nn.Module,
    facts: Mapping[str, Any],
    distilled: bool | None,
) -> None:
    description = {
        "format": _FORMAT,
        "kind": type(flow).__name__,
        "flow": flow.config,
        "network": _describe(network),
        # Said twice, so that a file whose checksum cannot be found is not taken for an old one.
        "checksum": "crc32",
        **facts,
    }
    if distilled is not None:
        description["distilled"] = distilled
    tensors = {
        name: tensor.detach().to("cpu", copy=True).contiguous()
        for name, tensor in network.state_dict().items()
    }
    metadata = {"pfgm": json.dumps(description), "checksum": _BLANK}
    content = memoryview(safetensors.torch.save(tensors, metadata=metadata))
    place = _place_of(_BLANK, _header(content))
    assert place is not None
    checksum = f"{zlib.crc32(content):08x}".encode()
    parts = content[:place], checksum, content[place + len(checksum) :]
    write_atomic(path, lambda file: file.writelines(parts))


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
        ValueError: the file is truncated, damaged, not from this library, or does not fit the
            network. Where an older checkpoint of the run is whole, the message names it.

    Warns:
        UserWarning: the file is from before there were checksums, so that damage may go unnoticed.

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
        with _offering(path, _weights_of):
            path = path / _latest(path)["weights"]
    with _offering(path, _weights_of):
        tensors, description = _read(path)
    _warn_of_old(path, description)
    try:
        flow = flow_of(description)
        if network is None:
            network = _rebuild(description["network"], tensors)
        network.load_state_dict(tensors)
    except BROKEN as error:
        raise ValueError(f"{path} cannot be loaded: {_reason(error)}") from error
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
    if path.is_dir():
        with _offering(path, _weights_of):
            path = path / _latest(path)["weights"]
    with _offering(path, _weights_of):
        _, description = _read(path)
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
    # file allocates nothing, and no longer than it takes to make as many parameters as there are.
    with torch.device("meta"), _at_most(len(tensors)):
        expected = build(described["name"], described["config"]).state_dict()
    if {k: v.shape for k, v in expected.items()} != {k: v.shape for k, v in tensors.items()}:
        raise ValueError("it holds other tensors than the network it describes.")
    return build(described["name"], described["config"])


@contextmanager
def _at_most(count: int) -> Iterator[None]:
    """Lets this thread make no more parameters of modules than so many."""
    made, thread = 0, threading.get_ident()

    def counted(_: nn.Module, __: str, parameter: nn.Parameter | None) -> None:
        nonlocal made
        if parameter is None or threading.get_ident() != thread:
            return
        made += 1
        if made > count:
            raise ValueError(
                f"the network that it describes has more parameters than its {count} tensors."
            )

    hook = nn.modules.module.register_module_parameter_registration_hook(counted)
    try:
        yield
    finally:
        hook.remove()


def _read(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors and the description of a weights file, verified where it has a checksum."""
    if not path.is_file():
        raise FileNotFoundError(f"there is no checkpoint at {path}.")
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            recorded = metadata.get("checksum")
            if recorded is not None:
                _verify(path, recorded)
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except safetensors.SafetensorError as error:
        raise ValueError(f"{path} is not a complete safetensors file ({error}).") from error
    try:
        description = json.loads(metadata.get("pfgm", ""))
        version = description["format"]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise ValueError(f"{path} was not written by pfgm: it describes no flow.") from error
    if version != _FORMAT:
        raise ValueError(f"{path} has format {version}; this version reads format {_FORMAT}.")
    if recorded is None and "checksum" in description:
        raise ValueError(f"{path} is damaged: it has lost its checksum.")
    return tensors, description


# ---- checksums --------------------------------------------------------------------------------


def _header(content: bytes | memoryview) -> bytes:
    """The header of a safetensors file with the eight bytes of its length before it."""
    return bytes(content[: 8 + int.from_bytes(content[:8], "little")])


def _place_of(checksum: str, header: bytes) -> int | None:
    """Where in its file a checksum stands; quotes within names and values come with a backslash."""
    key = b'"checksum":"'
    place = header.find(key + checksum.encode() + b'"')
    return None if place < 0 else place + len(key)


def _verify(path: Path, recorded: str) -> None:
    """Raises ValueError unless this is the checksum of a weights file, which stands in it."""
    with path.open("rb") as file:
        size = 8 + int.from_bytes(file.read(8), "little")
        file.seek(0)
        header = file.read(size)
        place = _place_of(recorded, header)
        found = None
        if place is not None and len(recorded) == len(_BLANK):
            end = place + len(_BLANK)
            blanked = header[:place] + _BLANK.encode() + header[end:]
            found = _checksum(file, zlib.crc32(blanked))
    if found != recorded:
        raise ValueError(
            f"{path} is damaged, or was changed by another program: its checksum is "
            f"{found or 'not in its place'}; needed is {recorded}."
        )


def _checksum(file: BinaryIO, value: int = 0) -> str:
    """The CRC-32 of the rest of a file, where that of what comes before is value."""
    buffer = memoryview(bytearray(_CHUNK_BYTES))
    while count := file.readinto(buffer):  # type: ignore[attr-defined]
        value = zlib.crc32(buffer[:count], value)
    return f"{value:08x}"


def _warn_of_old(path: Path, description: Mapping[str, Any]) -> None:
    if "checksum" not in description:
        warnings.warn(
            f"{path} has no checksum, as it is from before there were any: damage to it would go "
            "unnoticed.",
            stacklevel=3,
        )


# ---- runs -------------------------------------------------------------------------------------


def save_run(
    folder: Path,
    flow: Flow,
    averaged: nn.Module,
    state: dict[str, Any],
    step: int,
    distilled: bool | None = None,
    *,
    after: int | None = None,
) -> None:
    """Writes a checkpoint of a run: state, weights, then latest.json; removes the oldest.

    ``after`` is the step of the run's checkpoint before this one, where that is known: those
    between them are of a way that the run has left.
    """
    folder.mkdir(parents=True, exist_ok=True)
    names = _names(step)
    content = io.BytesIO()
    torch.save(state, content)
    checksum = f"{zlib.crc32(content.getbuffer()):08x}"
    write_atomic(folder / names["state"], lambda file: file.write(content.getbuffer()))
    content.close()  # it is three times as large as the weights
    facts = {"step": step, "state_checksum": checksum}
    _save(folder / names["weights"], flow, averaged, facts, distilled)
    latest = json.dumps({"step": step, **names})
    write_atomic(folder / "latest.json", lambda file: file.write(latest.encode()))
    last = step if after is None else after
    for pattern in ("step-*.safetensors", "step-*.state.pt"):
        # Those of a later step are of a run that this one has been resumed before the end of.
        paths = sorted(folder.glob(pattern))
        own = [path for path in paths if _step_of(path) <= last or _step_of(path) == step]
        for path in {*paths} - {*own[-_KEPT:]}:
            path.unlink()


def _names(step: int) -> dict[str, str]:
    """What the two files of a checkpoint are called."""
    return {"weights": f"step-{step:08d}.safetensors", "state": f"step-{step:08d}.state.pt"}


def _step_of(path: Path) -> int:
    digits = path.name.removeprefix("step-").partition(".")[0]
    return int(digits) if digits.isdigit() else 0


def load_run(
    folder: Path, step: int | None = None
) -> tuple[dict[str, Tensor], dict[str, Any], dict[str, Any]]:
    """Averaged weights, their description and the training state of a checkpoint of a run.

    Args:
        folder: of the run.
        step: of the checkpoint; that of the newest unless given.

    Raises:
        FileNotFoundError, ValueError: as :func:`load`.
    """
    with _offering(folder, _pair_of):
        names = _latest(folder) if step is None else _names(step)
    with _offering(folder / names["weights"], _pair_of):
        pair = _read_pair(folder, names)
    _warn_of_old(folder / names["weights"], pair[1])
    return pair


def _read_pair(
    folder: Path, names: Mapping[str, str]
) -> tuple[dict[str, Tensor], dict[str, Any], dict[str, Any]]:
    tensors, description = _read(folder / names["weights"])
    path, needed = folder / names["state"], description.get("state_checksum")
    if not path.is_file():
        raise FileNotFoundError(f"there is no training state at {path}.")
    if needed is not None:
        with path.open("rb") as file:
            found = _checksum(file)
        if found != needed:
            raise ValueError(
                f"{path} is not a complete training state, or is not the training state that "
                f"belongs to its weights: its checksum is {found}; needed is {needed}."
            )
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises a dozen kinds for a file that it cannot read
        raise ValueError(f"{path} is not a complete training state.") from error
    if not isinstance(state, dict) or state.get("step") != description.get("step"):
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
        numbered = any(name.startswith("step-") for name in names.values())
        if (numbered or "step" in latest) and names != _names(latest["step"]):
            raise ValueError("its step and its files do not belong together")
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise ValueError(f"{path} does not name a checkpoint ({_reason(error)}).") from error
    return names


# ---- what to do about a damaged one -----------------------------------------------------------


@contextmanager
def _offering(path: Path, whole: Callable[[Path], str]) -> Iterator[None]:
    """Adds to an error what a run offers in place of a damaged checkpoint.

    Args:
        path: the weights file; or the folder of a run, whose newest checkpoint is not known.
        whole: reads the checkpoint of a weights file, and says what to do with it.
    """
    try:
        yield
    except (ValueError, FileNotFoundError) as error:
        for older in _older(path):
            try:
                offer = whole(older)
            except (ValueError, OSError):
                continue
            kind = ValueError if isinstance(error, ValueError) else FileNotFoundError
            raise kind(f"{error} {offer}") from error
        raise


def _older(path: Path) -> list[Path]:
    """The weights files of a run from before this one, the newest first."""
    folder = path if path.is_dir() else path.parent
    last = _STEP.fullmatch(path.name)
    if not folder.is_dir() or (folder == path.parent and last is None):
        return []
    steps = {int(found[1]): p for p in folder.iterdir() if (found := _STEP.fullmatch(p.name))}
    return [
        steps[step] for step in sorted(steps, reverse=True) if last is None or step < int(last[1])
    ]


def _weights_of(path: Path) -> str:
    _read(path)
    return f"The checkpoint {path} is whole: give that file in its place."


def _pair_of(path: Path) -> str:
    step = _step_of(path)
    _read_pair(path.parent, _names(step))
    return (
        f"The checkpoint of step {step} is whole: continue from it with --resume-from "
        f"{step}, or resume(step={step})."
    )


def _reason(error: BaseException) -> str:
    """What an error says, on one line that is not too long."""
    text = " ".join(str(error).split())
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]} …"
