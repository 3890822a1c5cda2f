"""The flows as models of k-diffusion, for its samplers.

A sampler of k-diffusion evaluates ``model(x, sigma, **extra_args)``, the posterior mean, and solves

    dx/dσ = (x − mean)/σ

from the prior to σ = 0. That is the equation for every number D of augmented dimensions (PFGM++,
arXiv 2302.04265, section 3.3), and at D = 1 σ is PFGM's z. So all samplers of an ODE can be used.
Samplers that add noise add normal noise, which is correct only at D = ∞.

No other package is needed.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..common.devices import known_device
from ..common.tensors import per_row
from ..flows import Flow, Network

__all__ = ["KDiffusionModel", "as_k_diffusion"]


class KDiffusionModel(nn.Module):
    """What :func:`as_k_diffusion` returns, with the flow's last and first level."""

    def __init__(self, net: Network, flow: Flow) -> None:
        super().__init__()
        self.net, self.flow = net, flow
        self.sigma_min, self.sigma_max = flow.last_level, flow.first_level

    def forward(self, x: Tensor, sigma: Tensor, **extra_args: Any) -> Tensor:
        """The posterior mean (B, *S) at x (B, *S) and sigma (B,); net takes the other arguments."""
        return self.flow.denoise(self.net, x, per_row(sigma, x, "sigma"), extra_args)

    def get_sigmas(
        self, n: int, *, schedule: str | None = None, device: torch.device | str | None = None
    ) -> Tensor:
        """The levels (n + 1,) of n steps, in float32: n from sigma_max to sigma_min, then 0.

        Args:
            n: number of steps.
            schedule: spacing of the levels, "log" or "rho"; None takes that of the flow.
            device: device of the levels.

        Raises:
            ValueError: n is below 1, or there is no such schedule or device.
        """
        grid = self.flow.grid(n, schedule)
        if grid[-1] > 0:  # PFGM's own grids end at z_min
            above = self.flow.grid(n - 1, schedule) if n > 1 else grid[:1]
            grid = [*above, 0.0]
        return torch.tensor(grid, device=None if device is None else known_device(device))


def as_k_diffusion(net: Network, flow: Flow) -> KDiffusionModel:
    """Makes a model for the samplers of k-diffusion from a network of either flow.

    Start from ``flow.prior(n)``: normal noise times sigma_max is the prior only at D = ∞. Call
    ``net.eval()`` first if the network has dropout, because the samplers do not.

    Returns:
        A module ``model(x, sigma, **extra_args) -> mean`` with x and mean (B, *S) and sigma (B,);
        extra_args are the network's conditions. ``model.get_sigmas(n)`` returns the levels.

    Raises:
        ValueError: when called, sigma is not (B,), or the network's result has a wrong shape.

    >>> import pfgm
    >>> flow = pfgm.PoissonFlow((2,), data_norm=1.0)
    >>> model = as_k_diffusion(flow.empirical(torch.ones(1, 2)), flow)
    >>> model(flow.prior(3), torch.full((3,), 2.0)).round(decimals=2)
    tensor([[1., 1.],
            [1., 1.],
            [1., 1.]])
    >>> [round(sigma, 3) for sigma in model.get_sigmas(2).tolist()]
    [3.733, 0.001, 0.0]
    """
    return KDiffusionModel(net, flow)
