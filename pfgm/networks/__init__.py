"""Networks of the field, (x, z) -> (field_x, field_z), and denoisers, (x, sigma) -> mean."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from typing import Any

import torch

from ..common.checks import allocating
from .denoiser import Denoiser
from .embedding import FieldNetwork, NoiseEmbedding, field_from_mean
from .mlp import MLP
from .published.edm import EDMDenoiser, SongUNet
from .published.load import load_published
from .published.pfgm_unets import DDPMpp, NCSNpp, Published
from .unet import UNet
from .wrapped import from_module

NETWORKS: dict[str, type[FieldNetwork] | type[Denoiser] | type[EDMDenoiser] | type[Published]] = {
    "ddpmpp": DDPMpp,
    "denoiser": Denoiser,
    "edm": EDMDenoiser,
    "mlp": MLP,
    "ncsnpp": NCSNpp,
    "unet": UNet,
}

__all__ = [
    "MLP",
    "NETWORKS",
    "DDPMpp",
    "Denoiser",
    "EDMDenoiser",
    "FieldNetwork",
    "NCSNpp",
    "NoiseEmbedding",
    "Published",
    "SongUNet",
    "UNet",
    "build",
    "field_from_mean",
    "from_module",
    "load_published",
]


def build(
    name: str, config: Mapping[str, Any]
) -> FieldNetwork | Denoiser | EDMDenoiser | Published:
    """The network called `name`, built from keyword arguments such as another's `config`.

    Raises:
        ValueError: there is none of that name, or a setting is out of range.
        TypeError: a setting that it has not.
        MemoryError: its parameters are more than the memory of the machine can hold.

    >>> net = build("mlp", {"shape": [2], "width": 16, "depth": 1})
    >>> build("mlp", net.config).config == net.config
    True
    """
    if name not in NETWORKS:
        allowed = ", ".join(sorted(NETWORKS))
        raise ValueError(f"name is {name!r}; only one of {allowed} is allowed.")
    kind = NETWORKS[name]
    settings = ", ".join(f"{key} {value}" for key, value in config.items())
    what = f"the parameters of the network {name!r} with {settings}"
    with allocating(what):
        if torch.empty(0).device.type != "meta":
            # First without memory, as a system may promise more than it has.
            with torch.device("meta"):
                parameters = kind(**config).parameters()
            if sum(each.nbytes for each in parameters) > _memory():
                raise MemoryError
        return kind(**config)


def _memory() -> float:
    """Bytes of memory in the machine, infinity where it does not say."""
    try:
        return float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    except (AttributeError, OSError, ValueError):  # not on every system
        return math.inf
