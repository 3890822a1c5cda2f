"""The networks of the field as denoisers for PFGM++ and diffusion."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from ..common.checks import check_choice
from ..common.tensors import parameter_dtype
from .config import as_json
from .edm_interface import EDMInterface, label_numbers
from .fields import FieldNetwork, root_mean_square
from .mlp import MLP
from .preconditioned import Preconditioned
from .published.pfgm_unets import DDPMpp, NCSNpp, Published
from .unet import UNet

_INNER_NETWORKS: dict[str, type[FieldNetwork] | type[Published]] = {
    "ddpmpp": DDPMpp,
    "mlp": MLP,
    "ncsnpp": NCSNpp,
    "unet": UNet,
}


class _PublishedBackbone(nn.Module):
    """F(x, c_noise) of a published network: its field_x, with c_noise in the place of z."""

    def __init__(self, network: Published) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: Tensor, noise: Tensor) -> Tensor:
        dtype = parameter_dtype(self, x)
        x, noise = x.to(dtype), noise.to(dtype)
        # The Fourier features take the logarithm of their argument.
        z = noise.exp() if self.network.config["embedding"] == "fourier" else noise
        field_x: Tensor = self.network(x, z)[0]
        return field_x


class _Backbone(nn.Module):
    """F(x, c_noise, labels) of a field network: the output of its backbone, without the gate."""

    def __init__(self, network: FieldNetwork) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: Tensor, noise: Tensor, labels: Tensor | None = None) -> Tensor:
        dtype = parameter_dtype(self, x)
        x, noise = x.to(dtype), noise.to(dtype)
        condition = {} if labels is None else {"labels": labels}
        # At small D the norm of x tells how much noise it holds, as sigma = exp(4 c_noise) does.
        sigma = (4 * noise).exp()
        return self.network.backbone(x, root_mean_square(x), sigma, **condition)[0]


class Denoiser(EDMInterface, Preconditioned):
    """A denoiser net(x, sigma, labels=None) for :class:`pfgm.PoissonFlowPP` with any D.

    It puts EDM's preconditioning (:class:`pfgm.networks.Preconditioned`) around a network of
    this package. The samplers of EDM take it as it is
    (:class:`pfgm.networks.edm_interface.EDMInterface`).

    Args:
        network: "unet", "mlp", "ddpmpp" or "ncsnpp"; the last two take no labels.
        config: keyword arguments of that network, such as shape, width and classes.
        sigma_data: standard deviation of the data's values, as in the flow.

    Raises:
        ValueError: there is no such network, or a setting is out of range.
        TypeError: the network has no such setting.

    >>> import torch
    >>> net = Denoiser("unet", {"shape": (1, 8, 8), "width": 16}, sigma_data=0.5)
    >>> net(torch.randn(5, 1, 8, 8), torch.rand(5)).shape
    torch.Size([5, 1, 8, 8])
    """

    def __init__(self, network: str, config: Mapping[str, Any], sigma_data: float = 0.5) -> None:
        check_choice("network", network, _INNER_NETWORKS)
        inner = _INNER_NETWORKS[network](**config)
        backbone = _PublishedBackbone(inner) if isinstance(inner, Published) else _Backbone(inner)
        super().__init__(backbone, sigma_data)
        self.shape = inner.shape
        self.classes = int(inner.config.get("classes", 0))
        self.config = {
            "network": network,
            "config": as_json(inner.config),
            "sigma_data": self.sigma_data,
        }

    def forward(  # type: ignore[override]
        self, x: Tensor, sigma: Tensor, labels: Tensor | None = None
    ) -> Tensor:
        """The posterior mean (B, *S) at x (B, *S) and sigma (B,), given labels (B,).

        As in EDM, sigma may also be a number or (B, 1, …, 1), and labels one-hot rows (B, classes).
        x may have another dtype than the network; the mean has that of x.
        """
        labels = label_numbers(labels, self.classes)
        condition = {} if labels is None else {"labels": labels}
        return super().forward(x, sigma, **condition)
