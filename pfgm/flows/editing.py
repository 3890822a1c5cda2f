"""Inversion and editing: data are encoded as latents, the latents changed and decoded.

The flow is an ODE, so data have latents: points at the first level that lead back to the data.
Latents can be interpolated and rescaled.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, overload

import torch
from torch import Tensor

from ..common.numbers import positive, whole
from ..common.tensors import over_samples
from ..solvers import SolverFunction, as_solver
from .conditions import Condition, Network, as_condition, map_tensors
from .interpolation import check_pair, interpolate
from .sampling import Sampling


class Editing(Sampling):
    """Latents of data: encoding, decoding, interpolation and temperature."""

    @overload
    def encode(
        self, net: Network, x: Tensor, *, return_nfe: Literal[False] = ..., **options: Any
    ) -> Tensor: ...

    @overload
    def encode(
        self, net: Network, x: Tensor, *, return_nfe: Literal[True], **options: Any
    ) -> tuple[Tensor, int]: ...

    def encode(
        self,
        net: Network,
        x: Tensor,
        *,
        solver: str | SolverFunction = "rk45",
        steps: int | None = None,
        schedule: str | Sequence[float] | None = None,
        rtol: float = 1e-5,
        atol: float | None = None,
        return_nfe: bool = False,
        **options: Any,
    ) -> Tensor | tuple[Tensor, int]:
        """The latents (B, *S) of data: the data carried up to the first level.

        :meth:`decode` carries latents back. With the default solver and tolerances the round trip
        has a relative error below 1e-3 where the network is smooth along the path, and a larger one
        far from all data that it knows (the guide "Invert and edit"). Unlike the norms of a prior,
        those of latents are never clipped.

        Args:
            net: the network, as in :meth:`sample`.
            x: (B, *S) data, taken as points at the last level; uint8 means u/127.5 − 1. Data
                without noise have latents of smaller norm than the prior's. Noise of the last
                level, ``x + flow.noise(level)``, makes them typical points of that level.
            solver: as in :meth:`sample`. The other solvers need many steps for the accuracy of
                rk45.
            steps, schedule: as in :meth:`sample`, without its last step if that goes to 0.
            rtol: relative tolerance of rk45, on the root mean square over the batch.
            atol: absolute tolerance of rk45. None is 1e-5, or 2e-5 times the spread of a flow that
                has one.
            return_nfe: whether to return the number of network evaluations too.
            **options: of :meth:`sample`: condition, guidance, unconditional, callback, progress.

        Raises:
            ValueError: x has another shape, an argument is out of range, or the network's results
                have wrong shapes or are not finite.
            TypeError: x is neither uint8 nor floating point.

        >>> import pfgm, torch
        >>> flow = pfgm.PoissonFlow((2,), data_norm=1.0)
        >>> data = torch.eye(2)
        >>> net = flow.empirical(data)
        >>> latents = flow.encode(net, data)
        >>> flow.decode(net, latents).abs().round(decimals=3)
        tensor([[1., 0.],
                [0., 1.]])
        """
        grid = self._grid_above_zero(steps, schedule)[::-1]
        x, nfe = self._carry(net, x, grid, solver, rtol, atol, **options)
        return (x, nfe) if return_nfe else x

    @overload
    def decode(
        self, net: Network, latent: Tensor, *, return_nfe: Literal[False] = ..., **options: Any
    ) -> Tensor: ...

    @overload
    def decode(
        self, net: Network, latent: Tensor, *, return_nfe: Literal[True], **options: Any
    ) -> tuple[Tensor, int]: ...

    def decode(
        self,
        net: Network,
        latent: Tensor,
        *,
        solver: str | SolverFunction = "rk45",
        steps: int | None = None,
        schedule: str | Sequence[float] | None = None,
        rtol: float = 1e-5,
        atol: float | None = None,
        return_nfe: bool = False,
        **options: Any,
    ) -> Tensor | tuple[Tensor, int]:
        """The data (B, *S) of latents: the latents carried down to the last level.

        This is the inverse of :meth:`encode`. ``sample(net, len(latent), x_init=latent, ...)`` does
        the same for a :class:`PoissonFlow` with the published rules. For other flows ``sample``
        takes one more step, from the last level to the posterior mean at 0, which is
        ``denoise(net, decoded, flow.last_level)``. Its samples have less noise, but that step maps
        many points to one and cannot be inverted.

        Latents are (B, *S), floating point. Other arguments and errors are those of :meth:`encode`.

        >>> import pfgm, torch
        >>> flow = pfgm.PoissonFlowPP((2,), D=16)
        >>> net = flow.empirical(torch.ones(1, 2))
        >>> flow.decode(net, flow.prior(3)).round(decimals=1)
        tensor([[1., 1.],
                [1., 1.],
                [1., 1.]])
        """
        self._check_x(latent, "latent")
        grid = self._grid_above_zero(steps, schedule)
        x, nfe = self._carry(net, latent, grid, solver, rtol, atol, **options)
        return (x, nfe) if return_nfe else x

    def interpolate(
        self,
        net: Network,
        x_a: Tensor,
        x_b: Tensor,
        *,
        count: int = 8,
        weights: Sequence[float] | Tensor | None = None,
        condition: Condition | None = None,
        unconditional: Condition | None = None,
        **options: Any,
    ) -> Tensor:
        """Data (W, B, *S) between data x_a and data x_b, interpolated through their latents.

        The data are encoded by :meth:`encode`, their latents interpolated by
        :func:`pfgm.interpolate`, and the results decoded by :meth:`decode`.

        Args:
            net: the network.
            x_a, x_b: (B, *S) data, the start and the end.
            count: W, the number of points, evenly spaced. The first and the last are x_a and x_b,
                encoded and decoded.
            weights: (W,) weights of x_b instead of count, as :func:`pfgm.interpolate` takes them.
            condition, unconditional: as in :meth:`sample`, with values for B rows.
            **options: of both :meth:`encode` and :meth:`decode`, such as solver and rtol.

        Raises:
            ValueError: shapes do not fit, count is below 2, or as :meth:`encode`.
            TypeError: a dtype is not allowed, or the dtypes differ.

        >>> import pfgm, torch
        >>> flow = pfgm.PoissonFlow((2,), data_norm=1.0)
        >>> data = torch.eye(2)
        >>> way = flow.interpolate(flow.empirical(data), data[:1], data[1:], count=5)
        >>> way.shape, way[-1].abs().round(decimals=3)
        (torch.Size([5, 1, 2]), tensor([[0., 1.]]))
        """
        if weights is None:
            whole("count", count, 2)
            weights = torch.linspace(0, 1, count, dtype=torch.float64, device="cpu")
        a, b = self._to_floating(x_a, "x_a"), self._to_floating(x_b, "x_b")
        check_pair(a, b, "x_a", "x_b")
        own: dict[str, Any] = {"condition": condition, "unconditional": unconditional}
        start, end = (self.encode(net, x, return_nfe=False, **own, **options) for x in (a, b))
        center = self._center(start)
        points = interpolate(start - center, end - center, weights) + center
        own = {
            name: map_tensors(
                as_condition(name, value, net, a),
                lambda rows: rows.repeat(len(points), *[1] * (rows.ndim - 1)),
            )
            for name, value in own.items()
        }
        data = self.decode(net, points.flatten(0, 1), return_nfe=False, **own, **options)
        return data.view_as(points)

    def rescale(self, latent: Tensor, temperature: float) -> Tensor:
        """Latents with their norms multiplied by a temperature and their directions kept.

        This is PFGM's temperature (arXiv 2209.11178, section 4.3). Below 1 a latent moves toward
        the middle of the prior, above 1 away from it. A :class:`PoissonFlow` with the published
        rules clips its prior to upper_norm and is not trained beyond. Its norms grow to upper_norm
        at most, and larger norms stay as they are.

        Args:
            latent: (B, *S), floating point, from :meth:`prior` or :meth:`encode`.
            temperature: the factor, above 0; 1 changes nothing.

        Raises:
            ValueError: latent has another shape, or temperature is out of range.
            TypeError: latent is not floating point.

        >>> import pfgm, torch
        >>> flow = pfgm.PoissonFlow((2,), data_norm=1.0, upper_norm=10.0)
        >>> flow.rescale(torch.tensor([[3.0, 4.0], [0.3, 0.4]]), 4.0)
        tensor([[6.0000, 8.0000],
                [1.2000, 1.6000]])
        """
        temperature = positive("temperature", temperature)
        self._check_x(latent, "latent")
        center = self._center(latent)
        offset = latent - center
        norm = offset.reshape(len(latent), self.N).norm(dim=1)
        longest = norm.clamp(min=self._largest_norm)
        return center + offset * over_samples((longest / norm).clamp(max=temperature), latent)

    def _grid_above_zero(
        self, steps: int | None, schedule: str | Sequence[float] | None
    ) -> list[float]:
        """The grid of :meth:`sample` without its step to 0, which cannot be inverted."""
        grid = self.grid(steps, schedule)
        if grid[-1] == 0:
            grid = grid[:-1]
        if len(grid) < 2:
            raise ValueError(
                f"steps or schedule must leave two or more levels above 0, got {grid}."
            )
        return grid

    def _carry(
        self,
        net: Network,
        x: Tensor,
        grid: Sequence[float],
        solver: str | SolverFunction,
        rtol: float,
        atol: float | None,
        **options: Any,
    ) -> tuple[Tensor, int]:
        """:meth:`solve` for data of any allowed dtype and any number of rows."""
        x = self._to_floating(x).detach()
        chosen = as_solver(solver)
        if len(x) == 0 and not chosen.few_step:
            return x, 0
        if chosen.adaptive:
            options |= {"rtol": rtol, "atol": 2e-5 * self._unit if atol is None else atol}
        return self.solve(net, x, grid, solver=solver, **options)
