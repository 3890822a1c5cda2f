"""Models in files and folders: :func:`pfgm.load` and :func:`pfgm.save`.

The folders have the layout of Hugging Face's libraries: config.json, model.safetensors, README.md.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import nn

from ..common.devices import usable_device
from ..common.files import MALFORMED, StrPath, folder_path, output_folder, write_atomic, write_json
from ..common.numbers import whole
from ..common.versions import versions
from ..data.tables import Table
from ..flows.flow import Flow
from ..networks.registry import label_names as stored_names
from ..networks.registry import name_labels
from ..pretrained import FOLDER, PRETRAINED
from .checkpoint import read_newest, reason
from .model_card import CARD, PICTURE, Origin, model_card
from .network_state import is_sharded, load_plain_state
from .weights_file import (
    check_savable,
    describe_network,
    flow_in,
    network_in,
    warn_without_checksum,
    write_weights,
)

_WEIGHTS = "model.safetensors"
_CONFIG = "config.json"
_PIPELINE = "model_index.json"  # of a pipeline of diffusers
_ON_A_HUB = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")  # the name of a model: user/model


class _FlowAndNetwork(NamedTuple):
    flow: Flow
    network: nn.Module


class Loaded(_FlowAndNetwork):
    """A model that was read. It unpacks into the flow and the network."""

    label_names: tuple[str, ...] = ()
    """The names of the labels 0, 1, …; empty if they have none."""
    table: Table | None = None
    """The columns of the table whose rows the network has learned."""
    distilled: bool | None = None
    """Whether the network is a few-step model; None if the file does not say."""
    card: str = ""
    """The model card of a folder, or the data and licence of a network of the package; or empty."""
    step: int = 0
    """The steps of its training."""
    data: str = ""
    """The data and licence of a network of the package; or empty."""
    run: Path | None = None
    """The folder of the run that it is a checkpoint of."""

    def save(self, path: StrPath) -> None:
        """As :func:`save`, with all that is known of the model."""
        save(
            path,
            *self,
            step=self.step,
            distilled=self.distilled,
            table=self.table,
            label_names=self.label_names,
            data=self.data,
            run=self.run,
        )


def save(
    path: StrPath,
    flow: Flow,
    network: nn.Module,
    *,
    step: int = 0,
    distilled: bool | None = None,
    table: Table | None = None,
    label_names: Sequence[str] = (),
    data: str = "",
    run: StrPath | None = None,
) -> None:
    """Write a flow and its network as a file, or as a folder that you can upload to a model hub.

    The file holds the network's weights and all that :func:`load` needs to use them. In a folder it
    is ``model.safetensors``; ``config.json`` describes it for readers and hubs, and ``README.md``
    is the model card that a hub shows, with the header that it reads. A card that is there already
    is kept. ``model_index.json`` makes diffusers' ``DiffusionPipeline`` refuse the folder with an
    error that names :func:`load`.

    Args:
        path: a file whose name ends in ``.safetensors``, or a folder, which is new, holds other
            files, or is one of an earlier call, whose files are replaced.
        flow: the flow of the network.
        network: a network. One that is not from :mod:`pfgm.networks` must be given to :func:`load`.
            Its weights are saved, not its code. Wrappers of torch are left out (torch.compile,
            DistributedDataParallel, DataParallel, AveragedModel, FSDP), and so is a module of your
            own, such as a LightningModule, if all its weights are in one network of this package:
            the file holds that network. Of a network that FSDP shards, all processes must save, and
            the first one writes.
        step: training steps of the network.
        distilled: whether it is a few-step model (:mod:`pfgm.distillation`), which ``pfgm sample``
            needs for the solver consistency. None if unknown.
        table: the columns of the table whose rows the network has learned.
        label_names: the names of the labels 0, 1, …, by which ``pfgm sample --label`` and the
            condition of :meth:`pfgm.Flow.sample` take them. By default those that :func:`load` has
            read with the network.
        data: what the network was trained on, for the card.
        run: the folder of its training run. The card then tells the name of the data, and figures
            and the picture of the newest evaluation up to this step.

    Raises:
        OSError: the path cannot be written; an existing file is left as it was.
        TypeError: the flow is of a subclass, the network is not a module, or its state
            holds something other than tensors.
        ValueError: the path is empty or not UTF-8, has another suffix (one that begins with a
            digit, as in ``model-1.5``, is part of a folder's name), or is a folder with a run or a
            model of another library; the step is no integer of at least 0, a tensor is on the
            device "meta", a weight is not finite, or label_names are more or fewer than the labels
            of the network.
    """
    place = folder_path(path)
    step = whole("step", step, 0)
    check_savable(flow, network)
    names = label_names or stored_names(network)
    origin = Origin(step, data) if run is None else Origin.of(Path(run), step)
    described = (flow, network, {"step": step}, distilled, table, names)
    try:
        str(place.resolve()).encode()
    except UnicodeEncodeError as error:
        shown = str(place).encode(errors="replace").decode()
        raise ValueError(f"path must be UTF-8, which safetensors reads, got {shown}.") from error
    if place.suffix == ".safetensors":
        write_weights(place, *described)
        return
    if place.suffix[1:2].isalpha() and not place.is_dir():
        raise ValueError(
            "path must end in .safetensors, or be a folder, whose name has no suffix unless it "
            f"exists, got {path}."
        )
    _check_folder(place)
    if is_sharded(network) and dist.get_rank() > 0:
        write_weights(place / _WEIGHTS, *described)  # gives its part to the first process
        return
    config = {
        "library_name": "pfgm",
        "versions": versions(),
        "kind": type(flow).__name__,
        "flow": flow.config,
        "network": describe_network(network),
    }
    card = model_card(place.resolve().name, flow, network, table, names, origin)
    with output_folder(place):
        write_weights(place / _WEIGHTS, *described)
        write_json(place / _CONFIG, config)
        if not (place / CARD).exists():
            write_atomic(place / CARD, lambda file: file.write(card.encode()))
        if (picture := origin.picture) is not None:
            write_atomic(place / PICTURE, lambda file: file.write(picture))
        # diffusers says that it has no attribute of this name.
        hint = f"{type(flow).__name__}; pfgm.load reads this folder"
        write_json(place / _PIPELINE, {"_class_name": hint})


save_pretrained = save
""":func:`save`, by the name that it has in Hugging Face's libraries."""


def load(
    model: StrPath, network: nn.Module | None = None, *, device: torch.device | str = "cpu"
) -> Loaded:
    """Read a flow and its network, which is in evaluation mode.

    The result unpacks into these two, and has ``label_names``, ``table``, ``distilled``, ``card``,
    ``step``, ``data`` and ``run`` besides; its method ``save`` writes it, as :func:`save` does. The
    network knows the names of its labels, so the condition of :meth:`pfgm.Flow.sample` takes them.

    Args:
        model: the folder of a run, for its newest checkpoint; a ``.safetensors`` file; a folder of
            :func:`save`, also one from a hub, downloaded for example by
            ``huggingface_hub.snapshot_download``; or the name of a network that comes with the
            package: "avatars", PFGM++ (D = 128) of 32 × 32 pixels in colour, "digits", PFGM of
            8 × 8, or "fashion-mnist", PFGM++ (D = 128) of 28 × 28. A path of such a name is
            written "./avatars". :data:`pfgm.pretrained.PRETRAINED` has data, licence and training
            of each network.
        network: takes the weights, in its own dtype, also inside the wrappers that :func:`save`
            leaves out; None builds the network that the file describes, in the dtype of the
            weights, or in float32 if they are narrower.
        device: device of the network.

    Raises:
        FileNotFoundError: there is no such path, or no checkpoint in the folder.
        TypeError: the network is not a module.
        ValueError: the model is both a name and a path; the device cannot be used here; the file is
            truncated, damaged, not from this library, or does not fit the network. Where an older
            checkpoint of the run is intact, the message names it.

    Warns:
        UserWarning: the file is old and has no checksum, so damage may go unnoticed.

    >>> import pfgm, tempfile
    >>> flow = pfgm.PoissonFlow((2,), data_norm=1.0)
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     save(f"{folder}/net.safetensors", flow, flow.network("mlp"))
    ...     flow, net = load(f"{folder}/net.safetensors")
    >>> flow.sample(net, 5).shape
    torch.Size([5, 2])

    The networks of the package have labels:

    >>> flow, net = load("digits")
    >>> flow.sample(net, 4, condition={"labels": torch.tensor([1, 9, 9, 8])}).shape
    torch.Size([4, 1, 8, 8])
    """
    device = usable_device(str(device))
    if network is not None and not isinstance(network, nn.Module):
        raise TypeError(
            "network must be a torch.nn.Module, which takes the weights, got "
            f"{type(network).__name__}."
        )
    into = "" if network is None else f" into network, a {type(network).__name__}"
    path, tensors, description = read_newest(_place_of(model))
    warn_without_checksum(path, description)
    try:
        flow = flow_in(description)
        if network is None:
            network = network_in(description, tensors)
        load_plain_state(network, tensors)
        loaded = Loaded(flow, network.to(device).eval())
        loaded.label_names = tuple(map(str, description.get("label_names", ())))
        loaded.step = int(description.get("step", 0))
        loaded.table = _table_in(description)
        loaded.distilled = description.get("distilled")
    except MALFORMED as error:
        raise ValueError(f"{path} cannot be loaded{into}: {reason(error)}") from error
    if isinstance(model, str) and model in PRETRAINED:
        known = PRETRAINED[model]
        loaded.label_names, loaded.card, loaded.data = known.classes, known.data, known.data
    elif (card := path.with_name(CARD)).is_file() and holds_model(path.parent):
        loaded.card = card.read_text("utf-8", errors="replace")
    elif (path.parent / "latest.json").is_file():
        loaded.run = path.parent
    name_labels(loaded.network, loaded.label_names)
    return loaded


from_pretrained = load
""":func:`load`, by the name that it has in Hugging Face's libraries."""


def _place_of(model: StrPath) -> Path:
    """The weights file of a model, or the folder of a run."""
    path = Path(model)
    if not os.fspath(model):
        raise ValueError("model must be a path or a name, got an empty text.")
    if model in PRETRAINED:  # a Path never is a name
        if os.path.lexists(path):
            raise ValueError(
                f"model must be a path or a network that comes with the package, got {model!r}, "
                f"which is both; write ./{model} for the path, or rename it."
            )
        return FOLDER / f"{model}.safetensors"
    if not path.exists() and path.suffix != ".safetensors":
        hub = "A folder on a hub is downloaded first: huggingface_hub.snapshot_download."
        if _ON_A_HUB.fullmatch(str(model)) and find_spec("huggingface_hub"):
            line = f'flow, net = pfgm.load(snapshot_download("{model}"))'
            hub = f"For one on a hub: from huggingface_hub import snapshot_download; {line}"
        raise FileNotFoundError(
            f"there is no file or folder {path}; give one that exists, or the name of a network "
            f"({', '.join(PRETRAINED)}). {hub}"
        )
    if (path / _WEIGHTS).is_file() and not (path / "latest.json").exists():
        return path / _WEIGHTS
    if (path / _PIPELINE).is_file():
        raise ValueError(
            f"{path} holds a pipeline of diffusers; "
            "pfgm.integrations.diffusers.PoissonFlowPipeline.from_pretrained reads it."
        )
    return path


def _table_in(description: Mapping[str, Any]) -> Table | None:
    if "table" in description:
        return Table.from_dict(description["table"])
    names = description.get("column_names")  # of version 0.2, which learnt plain numbers
    return Table.numbers([str(name) for name in names]) if names else None


def _check_folder(folder: Path) -> None:
    """Raises ValueError if a folder holds files of others, which would be replaced."""
    replaced = () if holds_model(folder) else (_CONFIG, _WEIGHTS, _PIPELINE)
    for name in ("latest.json", *replaced):
        if (folder / name).exists():
            raise ValueError(
                "path must be a new folder, or one that holds neither a run nor another model, got "
                f"{folder} with {name}."
            )


def holds_model(folder: Path) -> bool:
    """Whether a folder holds a model of :func:`save`, by its config.json."""
    try:
        config = json.loads((folder / _CONFIG).read_text())
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(config, dict) and config.get("library_name") == "pfgm"
