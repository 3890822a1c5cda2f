"""Inpainting: data completed where they are not known."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, overload

import torch
from torch import Tensor

from ..common.numbers import is_number, whole
from ..solvers import Callback
from .conditions import Network
from .sampling import Projection, Sampling

_MOST_ROUNDS = 1_000_000  # of resampling


class Inpainting(Sampling):
    """Sampling of the unknown part of data, given the known part."""

    @overload
    def inpaint(
        self,
        net: Network,
        known: Tensor,
        mask: Tensor,
        *,
        return_nfe: Literal[False] = ...,
        **_: Any,
    ) -> Tensor: ...

    @overload
    def inpaint(
        self, net: Network, known: Tensor, mask: Tensor, *, return_nfe: Literal[True], **_: Any
    ) -> tuple[Tensor, int]: ...

    def inpaint(
        self,
        net: Network,
        known: Tensor,
        mask: Tensor,
        *,
        steps: int | None = None,
        schedule: str | Sequence[float] | None = None,
        resample: int = 2,
        resample_from: float | None = None,
        generator: torch.Generator | None = None,
        callback: Callback | None = None,
        return_nfe: bool = False,
        **options: Any,
    ) -> Tensor | tuple[Tensor, int]:
        """Data (B, *S) completed where they are not known.

        Before each evaluation of the network the known part is replaced by

            x_known(σ) = known + σ n,   n ~ p_1, the perturbation kernel at level 1

        This is the path of the known part in the field of a single charge at ``known``. The flow
        moves the rest. n is drawn once per run for the whole sample: a draw of the prior divided by
        its level. So both parts share the length of the noise, as they do under the kernel at a
        finite D (:meth:`noise`).

        Where the data differ only in the unknown part, this samples exactly from the distribution
        of that part given the other, at every D: the known part adds σ²‖n_known‖² to all squared
        distances, as in a flow with D + N_known dimensions. In general it is an approximation, as
        replacement is in diffusion (arXiv 2011.13456, appendix I.2).

        Each round of ``resample`` adds new noise of the level resample_from to the completed data
        and carries them down again. So the unknown part is drawn again, given the known part.
        RePaint (arXiv 2201.09865) does this at every level. Here a round is a whole run from
        resample_from, because noise of a finite D cannot be added step by step.

        Args:
            net: the network.
            known: (B, *S) data; uint8 means u/127.5 − 1. Values where mask is False are not read.
            mask: bool, True where the data are known; any shape that broadcasts to (B, *S).
            steps, schedule: as in :meth:`sample`.
            resample: the number of further rounds. Each starts at resample_from and takes the
                levels of the grid below it. More rounds leave fewer seams (docs/howto/editing.md).
            resample_from: the level at which rounds start, about the standard deviation of the
                data. A much higher level redraws everything, a much lower one nothing. None is 0.6,
                or 1.2 times the spread of a flow that has one, within the levels of the grid.
            generator: of the noise, on the device of known.
            callback: as in :meth:`sample`, with the known part in place. Each round counts its
                steps from 0. If the callback stops a round, the next round follows.
            return_nfe: whether to return the number of network evaluations too.
            **options: of :meth:`sample`, such as solver, condition, guidance and progress.

        Returns:
            (B, *S), exactly as given where mask is True.

        Raises:
            ValueError: shapes do not fit, resample is below 0, or as :meth:`sample`.
            TypeError: mask is not bool, or known neither uint8 nor floating point.

        >>> import pfgm, torch
        >>> flow = pfgm.PoissonFlow((2,), data_norm=1.0)
        >>> net = flow.empirical(torch.eye(2))
        >>> known, mask = torch.tensor([[1.0, 9.0]]), torch.tensor([True, False])
        >>> flow.inpaint(net, known, mask).abs().round(decimals=1)
        tensor([[1., 0.]])
        """
        known = self._to_floating(known, "known").detach()
        _check_mask(mask, known)
        grid = self.grid(steps, schedule)
        start = min(1.2 * self._unit, grid[0]) if resample_from is None else resample_from
        if resample_from is None and start <= grid[-1]:
            start = grid[-2]
        # Unknown values may be anything, NaN included.
        x, total = torch.where(mask, known, self._center(known)), 0
        for levels in (grid, *_resampling_grids(grid, resample, start)):
            # Of level 1, clipped as the prior is.
            points = self.prior(len(x), generator=generator, device=x.device)
            noise = (points - self._center(points)).to(x.dtype) / self.first_level
            hold = _hold_known(known, noise, mask)
            x, nfe = self.sample(
                net,
                len(x),
                x_init=x + levels[0] * noise,
                schedule=levels,
                project=hold,
                callback=_show_projected(callback, hold),
                generator=generator,
                return_nfe=True,
                **options,
            )
            x, total = torch.where(mask, known, x), total + nfe
        return (x, total) if return_nfe else x


def _resampling_grids(grid: Sequence[float], resample: int, start: float) -> list[list[float]]:
    """The levels of each round of resampling."""
    whole("resample", resample, 0, _MOST_ROUNDS)
    if resample == 0:
        return []
    if not is_number(start) or not grid[-1] < start <= grid[0]:
        raise ValueError(
            f"resample_from must be a level above {grid[-1]} and at most {grid[0]}, got {start!r}."
        )
    below = [level for level in grid if level < start]
    return [[float(start), *below]] * resample


def _hold_known(known: Tensor, noise: Tensor, mask: Tensor) -> Projection:
    """The projection that puts the known part on its path."""
    return lambda x, level: torch.where(mask, known + level * noise, x)


def _show_projected(callback: Callback | None, project: Projection) -> Callback | None:
    """The callback, shown the points at which the network was evaluated."""
    if callback is None:
        return None
    return lambda info: callback({**info, "x": project(info["x"], info["z"])})


def _check_mask(mask: Tensor, known: Tensor) -> None:
    if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
        kind = mask.dtype if isinstance(mask, Tensor) else type(mask).__name__
        raise TypeError(f"mask must be bool, True where known, got {kind}.")
    if mask.device != known.device:
        raise ValueError(
            f"mask and known must be on one device, got {mask.device} and {known.device}."
        )
    try:
        fits = torch.broadcast_shapes(mask.shape, known.shape) == known.shape
    except RuntimeError:
        fits = False
    if not fits:
        raise ValueError(
            f"mask must broadcast to the shape of known, {tuple(known.shape)}, got "
            f"{tuple(mask.shape)}."
        )
