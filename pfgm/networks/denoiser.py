"""The networks of this package as denoisers of PFGM++ and diffusion."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..flows.plusplus import Preconditioned
from .embedding import FieldNetwork, plain
from .mlp import MLP
from .published.pfgm_unets import DDPMpp, NCSNpp, Published
from .unet import UNet

_INNER: dict[str, type[FieldNetwork] | type[Published]] = {
    "ddpmpp": DDPMpp,
    "mlp": MLP,
    "ncsnpp": NCSNpp,
    "unet": UNet,
}


class _PublishedBackbone(nn.Module):
    """F(x, c_noise) of a published network: its field_x, with c_noise embedded as EDM does."""

    def __init__(self, network: Published) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: Tensor, noise: Tensor) -> Tensor:
        # Fourier features take the logarithm themselves.
        z = noise.exp() if self.network.config["embedding"] == "fourier" else noise
        field_x: Tensor = self.network(x, z)[0]
        return field_x


class _Backbone(nn.Module):
    """F(x, c_noise, labels) of a field network: its output, without the gate of D = 1."""

    def __init__(self, network: FieldNetwork) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: Tensor, noise: Tensor, labels: Tensor | None = None) -> Tensor:
        # How long x is says how much noise there is where D is small, beside sigma itself.
        rms = torch.linalg.vector_norm(x.flatten(1), dim=1) / math.sqrt(x[0].numel())
        condition = {} if labels is None else {"labels": labels}
        return self.network.backbone(x, rms, (4 * noise).exp(), **condition)[0]


class Denoiser(Preconditioned):
    """A denoiser net(x, sigma, labels=None) of :class:`pfgm.PoissonFlowPP`, any D.

    A network of this package behind EDM's preconditioning
    (:class:`pfgm.flows.plusplus.Preconditioned`).

    Args:
        network: "unet", "mlp", "ddpmpp" or "ncsnpp"; the last two take no labels.
        config: keyword arguments of that network, such as shape, width and classes.
        sigma_data: standard deviation of the data's values, that of the flow.

    Raises:
        ValueError: another network, or a setting of it that is out of range.
        TypeError: a setting that it has not.

    >>> net = Denoiser("unet", {"shape": (1, 8, 8), "width": 16}, sigma_data=0.5)
    >>> net(torch.randn(5, 1, 8, 8), torch.rand(5)).shape
    torch.Size([5, 1, 8, 8])
    """

    def __init__(self, network: str, config: Mapping[str, Any], sigma_data: float = 0.5) -> None:
        if network not in _INNER:
            raise ValueError(f"network is {network!r}; allowed are {', '.join(_INNER)}.")
        inner = _INNER[network](**config)
        backbone = _PublishedBackbone(inner) if isinstance(inner, Published) else _Backbone(inner)
        super().__init__(backbone, sigma_data)
        self.shape = inner.shape
        self.config = {
            "network": network,
            "config": plain(inner.config),
            "sigma_data": self.sigma_data,
        }

    def forward(  # type: ignore[override]
        self, x: Tensor, sigma: Tensor, labels: Tensor | None = None
    ) -> Tensor:
        """The posterior mean (B, *S) at x (B, *S) and sigma (B,), of labels (B,)."""
        condition = {} if labels is None else {"labels": labels}
        return super().forward(x, sigma, **condition)
