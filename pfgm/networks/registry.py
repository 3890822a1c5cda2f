"""The networks by name, and how to build them from a stored config."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from ..common.checks import check_choice
from ..common.memory import allocating, memory_bytes
from ..common.wrappers import network_within
from .denoiser import Denoiser
from .embedding import NoiseEmbedding
from .fields import FieldNetwork
from .mlp import MLP
from .published.edm_unets import EDMDenoiser, SongUNet
from .published.pfgm_unets import DDPMpp, NCSNpp, Published
from .unet import UNet

NETWORKS: dict[str, type[FieldNetwork] | type[Denoiser] | type[EDMDenoiser] | type[Published]] = {
    "ddpmpp": DDPMpp,
    "denoiser": Denoiser,
    "edm": EDMDenoiser,
    "mlp": MLP,
    "ncsnpp": NCSNpp,
    "unet": UNet,
}

PUBLISHED = ("ddpmpp", "ncsnpp")
"""The networks of PFGM, for square images."""
KINDS = ("auto", "unet", "mlp", *PUBLISHED)
"""The names that :meth:`pfgm.Flow.network` of every flow takes."""
_SHOWN_NAMES = 20  # the most labels that an error names


def build(
    name: str, config: Mapping[str, Any]
) -> FieldNetwork | Denoiser | EDMDenoiser | Published:
    """The network called `name`, built from keyword arguments such as another network's `config`.

    Raises:
        ValueError: no network has that name, or a setting is out of range.
        TypeError: the network has no such setting.
        MemoryError: the parameters do not fit into the memory of the machine.

    >>> net = build("mlp", {"shape": [2], "width": 16, "depth": 1})
    >>> build("mlp", net.config).config == net.config
    True
    """
    check_choice("name", name, NETWORKS)
    kind = NETWORKS[name]
    settings = ", ".join(f"{key} {value}" for key, value in config.items())
    with allocating(f"the parameters of the network {name!r} with {settings}"):
        if torch.empty(0).device.type != "meta":
            # Counted on "meta" first: a system may promise more memory than it has.
            with torch.device("meta"):
                parameters = kind(**config).parameters()
            if sum(each.nbytes for each in parameters) > memory_bytes():
                raise MemoryError
        return kind(**config)


def size_of(name: str, shape: tuple[int, ...]) -> dict[str, Any]:
    """The arguments of a network that tell the shape of a sample."""
    if name not in (*PUBLISHED, "edm"):
        return {"shape": shape}
    if len(shape) != 3 or shape[1] != shape[2]:
        raise ValueError(
            f"the network {name!r} takes square images (C, H, H), got samples of shape {shape}."
        )
    return {"channels": shape[0], "resolution": shape[1]}


def label_count(network: object) -> int:
    """The number of different labels that a network of this package takes; 0 for none."""
    parts = network.modules() if isinstance(network, nn.Module) else ()
    known = (part.classes for part in parts if isinstance(part, (NoiseEmbedding, SongUNet)))
    return max(known, default=0)


def label_names(network: object) -> tuple[str, ...]:
    """The names of the labels 0, 1, … of a network that has been loaded; empty if it has none."""
    named = network_within(network, lambda module: "_label_names" in vars(module))
    return () if named is None else vars(named)["_label_names"]


def name_labels(network: nn.Module, names: Sequence[object]) -> None:
    """Gives a network the names of its labels."""
    vars(network)["_label_names"] = tuple(map(str, names))


def label_number(label: str, names: Sequence[str], classes: int) -> int:
    """The number of a label, or that of its name if names are numbers, such as folders 3 to 8.

    Case, hyphens, underscores and spaces of a name may differ where only one name is meant.

    >>> label_number("7", ["cat", "big dog"], 8), label_number("Big-dog", ["cat", "big dog"], 8)
    (7, 1)
    """
    if label in names:
        return names.index(label)
    numbered = bool(names) and all(map(str.isdecimal, names))
    if label.isdecimal() and int(label) < classes and not numbered:
        return int(label)
    alike = [number for number, name in enumerate(names) if _plain(name) == _plain(label)]
    if len(alike) == 1:
        return alike[0]
    known = ", ".join(names[:_SHOWN_NAMES]) + (", …" if len(names) > _SHOWN_NAMES else "")
    choices = [f"0 to {classes - 1}"] * (not numbered) + [known] * bool(names)
    raise ValueError(
        f"label must be one of the network's labels, {' or '.join(choices)}, got {label}."
    )


def _plain(name: str) -> str:
    """A name without what need not be typed as it is."""
    return "".join(each for each in name.casefold() if each not in "-_ ")
