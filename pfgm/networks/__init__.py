"""Networks of the field, (x, z) -> (field_x, field_z), and denoisers, (x, sigma) -> mean."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .checkpoints import load_published
from .denoiser import Denoiser
from .edm import EDMDenoiser, SongUNet
from .embedding import FieldNetwork, NoiseEmbedding, field_from_mean
from .foreign import from_module
from .mlp import MLP
from .published import DDPMpp, NCSNpp, Published
from .unet import UNet

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

    >>> net = build("mlp", {"shape": [2], "width": 16, "depth": 1})
    >>> build("mlp", net.config).config == net.config
    True
    """
    if name not in NETWORKS:
        allowed = ", ".join(sorted(NETWORKS))
        raise ValueError(f"name is {name!r}; only one of {allowed} is allowed.")
    return NETWORKS[name](**config)
