"""The flows as models of k-diffusion, whose samplers then draw from them.

A sampler of k-diffusion asks ``model(x, sigma, **extra_args)`` for the posterior mean and follows

    dx/dσ = (x − mean)/σ

from the prior down to 0. That is the equation of every number D of augmented dimensions (PFGM++,
arXiv 2302.04265, section 3.3), with PFGM's z for σ at D = 1, so every sampler of an ODE serves.
Those that add noise on the way add normal noise, which is right at D = ∞ alone.

Nothing else need be installed.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..flows import Flow, Network

__all__ = ["KDiffusionModel", "as_k_diffusion"]


class KDiffusionModel(nn.Module):
    """What :func:`as_k_diffusion` returns: the posterior mean that a network of a flow implies.

    ``sigma_min`` and ``sigma_max`` are the flow's last and first level.
    """

    def __init__(self, net: Network, flow: Flow) -> None:
        super().__init__()
        self.net, self.flow = net, flow
        self.sigma_min, self.sigma_max = flow.last_level, flow.first_level

    def forward(self, x: Tensor, sigma: Tensor, **extra_args: Any) -> Tensor:
        """The posterior mean (B, *S) at x (B, *S) and sigma (B,); other arguments go to the net."""
        if sigma.shape != x.shape[:1]:
            raise ValueError(
                f"sigma has shape {tuple(sigma.shape)}; allowed is ({len(x)},), one value a row of "
                "x."
            )
        return self.flow.denoise(self.net, x, sigma, extra_args)

    def get_sigmas(
        self, n: int, *, schedule: str | None = None, device: torch.device | str | None = None
    ) -> Tensor:
        """The levels of n evaluations from sigma_max to sigma_min, and 0: (n + 1,), float32.

        Args:
            n: how many.
            schedule: their spacing, "log" or "rho"; None is that of the flow.
            device: where they go.

        Raises:
            ValueError: n is below 1, or there is no such schedule.
        """
        grid = self.flow.grid(n, schedule)
        if grid[-1] > 0:  # PFGM's own grids end at z_min
            above = self.flow.grid(n - 1, schedule) if n > 1 else grid[:1]
            grid = [*above, 0.0]
        return torch.tensor(grid, device=device)


def as_k_diffusion(net: Network, flow: Flow) -> KDiffusionModel:
    """A model that the samplers of k-diffusion take, of a network of either flow.

    Start from ``flow.prior(n)``: the prior is normal noise times sigma_max at D = ∞ alone. A
    network with dropout must be in evaluation mode, which no sampler of k-diffusion sees to.

    Args:
        net: a network of the flow; where it is a module, it becomes a part of the model.
        flow: :class:`pfgm.PoissonFlow` or :class:`pfgm.PoissonFlowPP`.

    Returns:
        A module ``model(x, sigma, **extra_args) -> mean`` with x and mean (B, *S) and sigma (B,);
        extra_args are the network's conditions. ``model.get_sigmas(n)`` gives the levels.

    Raises:
        ValueError: when called, sigma is not (B,), or the network's result has another shape.

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
