"""Folders in the layout of Hugging Face's libraries: config.json, model.safetensors, README.md."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from ..common.files import StrPath, folder_path, output_folder, write_atomic, write_json
from ..common.versions import versions
from ..data.tables import Table
from ..flows.flow import Flow
from ..networks.registry import label_count
from .checkpoint import PRETRAINED_WEIGHTS, Loaded, load, save
from .network_state import is_sharded
from .weights_file import describe_network

_CONFIG = "config.json"
_PIPELINE = "model_index.json"  # of a pipeline of diffusers
_CARD = "README.md"
_PAPERS = {"PoissonFlow": "2209.11178", "PoissonFlowPP": "2302.04265"}  # hubs tag what cards link
_CARD_TEXT = """\
---
library_name: pfgm
{task}tags:
- pfgm
- poisson-flow
---

# {name}

A Poisson flow generative model of {samples}: {flow}, and a network {network}.

Download this folder, install pfgm, and sample:

```python
import pfgm, torch

flow, net = pfgm.from_pretrained({arguments})
samples = flow.sample(net, 16{condition})
```
"""


def save_pretrained(
    folder: StrPath,
    flow: Flow,
    network: nn.Module,
    *,
    distilled: bool | None = None,
    table: Table | None = None,
    label_names: Sequence[str] = (),
) -> None:
    """Writes a flow and its network as a folder that can be uploaded to a model hub.

    The folder holds ``model.safetensors``, which is the file of :func:`pfgm.save` and all that
    :func:`from_pretrained` reads, and ``config.json``, which describes it for readers and hubs.
    ``README.md`` is the model card that a hub shows, with the header that it reads; a card that is
    there already is kept. With ``model_index.json`` diffusers' ``DiffusionPipeline`` refuses the
    folder by naming :func:`from_pretrained`.

    Args:
        folder: a new folder, or one with other files. Those of an earlier call are replaced.
        flow, network, distilled, table, label_names: as for :func:`pfgm.save`. Of a network that
            FSDP shards, all processes must save, and the first one writes the folder.

    Raises:
        OSError, TypeError, ValueError: as for :func:`pfgm.save`.
        ValueError: the name is empty, or the folder holds a run or a model of another library,
            whose files would be replaced.
    """
    place = folder_path(folder)
    _check_place(place)
    config = {
        "library_name": "pfgm",
        "versions": versions(),
        "kind": type(flow).__name__,
        "flow": flow.config,
        "network": describe_network(network),
    }
    card = _card(place.resolve().name, flow, network, table, label_names)
    facts: dict[str, Any] = {"distilled": distilled, "table": table, "label_names": label_names}
    if is_sharded(network) and dist.get_rank() > 0:
        save(place / PRETRAINED_WEIGHTS, flow, network, **facts)  # gives its part to the first one
        return
    with output_folder(place):
        save(place / PRETRAINED_WEIGHTS, flow, network, **facts)
        write_json(place / _CONFIG, config)
        # diffusers says that it has no attribute of this name.
        if not (place / _CARD).exists():
            write_atomic(place / _CARD, lambda file: file.write(card.encode()))
        hint = f"{type(flow).__name__}; pfgm.from_pretrained reads this folder"
        write_json(place / _PIPELINE, {"_class_name": hint})


def _card(
    name: str, flow: Flow, network: nn.Module, table: Table | None, label_names: Sequence[str]
) -> str:
    """The model card: a header in YAML, what the model is, and how to sample it."""
    images, classes = len(flow.shape) == 3 and flow.shape[0] in (1, 3), label_count(network)
    task = "pipeline_tag: unconditional-image-generation\n" if images and not classes else ""
    samples = f"{'images' if images else 'samples'} of shape {flow.shape}"
    if table is not None:
        samples = f"rows of a table ({', '.join(column.name for column in table.columns)})"
    kind = type(flow).__name__
    labels = f"torch.arange(16) % {classes}" if classes else ""
    known = f"0 to {classes - 1}" + (
        f" ({', '.join(map(str, label_names))})" if label_names else ""
    )
    parameters = sum(parameter.numel() for parameter in network.parameters())
    return _CARD_TEXT.format(
        task=task,
        name=name,
        samples=samples + (f" with the labels {known}" if classes else ""),
        flow=f"{kind} ([paper](https://arxiv.org/abs/{_PAPERS[kind]})) with D = {flow.D:g}",
        network=f"{type(network).__name__} with {parameters:,} parameters",
        arguments=json.dumps(name) + ("" if describe_network(network) else ", network"),
        condition=f', condition={{"labels": {labels}}}' if classes else "",
    )


def _check_place(folder: Path) -> None:
    """Raises ValueError if the place cannot be read again, or holds files of others."""
    try:
        str(folder.resolve()).encode()
    except UnicodeEncodeError as error:
        shown = str(folder).encode(errors="replace").decode()
        raise ValueError(
            f"folder must have a path in UTF-8, which safetensors reads, got {shown}."
        ) from error
    for name in ("latest.json", _CONFIG, PRETRAINED_WEIGHTS, _PIPELINE):
        of_a_run = name == "latest.json"
        if (folder / name).exists() and (of_a_run or not is_pretrained(folder)):
            raise ValueError(
                f"folder must be new, or hold neither a run nor another model, got {folder} with "
                f"{name}."
            )


def is_pretrained(folder: Path) -> bool:
    """Whether a folder holds a model of :func:`save_pretrained`, by its config.json."""
    try:
        config = json.loads((folder / _CONFIG).read_text())
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(config, dict) and config.get("library_name") == "pfgm"


def from_pretrained(
    folder: StrPath, network: nn.Module | None = None, *, device: torch.device | str = "cpu"
) -> Loaded:
    """The flow and the network (in evaluation mode) in a folder of :func:`save_pretrained`.

    Args:
        folder: the folder. One on a hub is downloaded first, for example by
            ``huggingface_hub.snapshot_download``.
        network, device: as for :func:`pfgm.load`.

    Raises:
        FileNotFoundError: there is no such folder, or no weights in it.
        ValueError: the name is empty, the folder holds a pipeline of diffusers, or as for
            :func:`pfgm.load`.
        TypeError: as for :func:`pfgm.load`.

    >>> import pfgm, tempfile
    >>> flow = pfgm.PoissonFlow((2,), data_norm=1.0)
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     save_pretrained(folder, flow, flow.network("mlp"))
    ...     flow, net = from_pretrained(folder)
    >>> flow.sample(net, 5).shape
    torch.Size([5, 2])
    """
    path = folder_path(folder)
    if (path / _PIPELINE).is_file() and not (path / PRETRAINED_WEIGHTS).exists():
        raise ValueError(
            f"{path} holds a pipeline of diffusers; "
            "pfgm.integrations.diffusers.PoissonFlowPipeline.from_pretrained reads it."
        )
    if not path.is_dir():
        raise FileNotFoundError(
            f"there is no folder {path}; one on a hub is downloaded first, for example by "
            "huggingface_hub.snapshot_download."
        )
    return load(path / PRETRAINED_WEIGHTS, network, device=device)
