"""Folders in the layout of Hugging Face's libraries: config.json and model.safetensors."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

from ..common.files import StrPath, output_folder, write_json
from ..common.versions import versions
from ..flows.flow import Flow
from .checkpoint import Loaded, load, save
from .weights_file import describe_network

_WEIGHTS = "model.safetensors"
_PIPELINE = "model_index.json"  # of a pipeline of diffusers


def save_pretrained(folder: StrPath, flow: Flow, network: nn.Module) -> None:
    """Writes a flow and its network as a folder that can be uploaded to a model hub.

    The folder holds ``model.safetensors``, which is the file of :func:`pfgm.save` and all that
    :func:`from_pretrained` reads, and ``config.json``, which describes it for readers and hubs.
    With ``model_index.json`` diffusers' ``DiffusionPipeline.from_pretrained`` refuses the folder by
    naming :func:`from_pretrained`.

    Args:
        folder: a new folder, or one whose files of these names are replaced.
        flow, network: as for :func:`pfgm.save`.

    Raises:
        OSError, TypeError, ValueError: as for :func:`pfgm.save`.
    """
    config = {
        "library_name": "pfgm",
        "versions": versions(),
        "kind": type(flow).__name__,
        "flow": flow.config,
        "network": describe_network(network),
    }
    with output_folder(Path(folder)):
        save(Path(folder) / _WEIGHTS, flow, network)
        write_json(Path(folder) / "config.json", config)
        # diffusers says that it has no attribute of this name.
        hint = f"{type(flow).__name__}; pfgm.from_pretrained reads this folder"
        write_json(Path(folder) / _PIPELINE, {"_class_name": hint})


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
        ValueError: it holds a pipeline of diffusers, or as for :func:`pfgm.load`.
        TypeError: as for :func:`pfgm.load`.

    >>> import pfgm, tempfile
    >>> flow = pfgm.PoissonFlow((2,), data_norm=1.0)
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     save_pretrained(folder, flow, pfgm.networks.MLP((2,), **flow.scaling))
    ...     flow, net = from_pretrained(folder)
    >>> flow.sample(net, 5).shape
    torch.Size([5, 2])
    """
    path = Path(folder)
    if (path / _PIPELINE).is_file() and not (path / _WEIGHTS).exists():
        raise ValueError(
            f"{path} holds a pipeline of diffusers; "
            "pfgm.integrations.diffusers.PoissonFlowPipeline.from_pretrained reads it."
        )
    if not path.is_dir():
        raise FileNotFoundError(
            f"there is no folder {path}; one on a hub is downloaded first, for example by "
            "huggingface_hub.snapshot_download."
        )
    return load(path / _WEIGHTS, network, device=device)
