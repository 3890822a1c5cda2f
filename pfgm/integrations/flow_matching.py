"""Poisson flows in trainers for flow matching, such as torchcfm, flow_matching or your own.

Flow matching (arXiv 2210.02747, 2302.00482) carries noise at t = 0 to data at t = 1 along a
velocity. A flow with D augmented dimensions, dx/dσ = (x − mean(x, σ))/σ, is flow matching with

    σ = (1 − t)/t,   x_t = t x,   u_t(x_t) = (mean(x_t/t, σ) − x_t)/(1 − t)

Its conditional paths are the straight lines x_t = t x1 + (1 − t) n from noise n to data x1, with
velocity x1 − n. The noise is a draw from the perturbation kernel at σ = 1. So this is independent
conditional flow matching with Student's t noise in place of normal noise; D = ∞ is normal noise.

No other package is needed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..common import draws
from ..common.checks import check_dtype, shape_or_type, untouched
from ..common.tensors import common_device, dequantise, over_samples
from ..common.values import checks_values
from ..flows.plusplus import PoissonFlowPP
from ..functional.field import checked_dimensions, mean_from
from ..functional.levels import per_query
from ..references import References

__all__ = ["PoissonFlowMatcher", "as_denoiser"]

# Smallest t that x_t is divided by. So x_t/t does not overflow, and at smaller t the mean is the
# average of all references anyway.
_MIN_T = 1e-9
# Smallest 1 − t to divide by. At t = 1 the velocity is infinite except at the references.
_MIN_REMAINING = 1e-3


class PoissonFlowMatcher:
    """A matcher with the interface of torchcfm's ``ConditionalFlowMatcher``.

    With D = ∞ and no references its results are those of torchcfm's matcher with sigma = 0.

    At a small D the noise has heavy tails, and so have x_t and the target. For D ≤ 2 the noise has
    no variance, so the unweighted squared error of flow matching has no mean. If D is about the
    number of values in a sample, or more, training behaves as for diffusion.

    Args:
        D: number of augmented dimensions, any positive number or infinity.
        references: None makes x1 − x0 the target. Data (M, *S) that contain the rows of x1 make the
            target the velocity of the whole flow: the average of x1 − x0 at x_t, which varies less
            (the stable target, arXiv 2302.00670).
        reference_labels: labels (M,) of the references, for targets of one class: labels must then
            be given in each call. None takes those of a :class:`pfgm.ReferenceSet`.

    Raises:
        TypeError: D is not a number.
        ValueError: D is not above 0, or reference_labels is given without references.

    >>> import torch
    >>> data = torch.randn(100, 2)
    >>> matcher = PoissonFlowMatcher(D=16, references=data)
    >>> t, xt, ut = matcher.sample_location_and_conditional_flow(None, data[:8])
    >>> t.shape, xt.shape, ut.shape
    (torch.Size([8]), torch.Size([8, 2]), torch.Size([8, 2]))
    """

    def __init__(
        self,
        D: float = math.inf,
        references: References | None = None,
        *,
        reference_labels: Tensor | None = None,
    ) -> None:
        self.D = checked_dimensions(D)
        if reference_labels is not None and references is None:
            raise ValueError("references must be given with reference_labels, got None.")
        self.references = references
        self.reference_labels = reference_labels

    def noise(
        self,
        shape: Sequence[int],
        *,
        generator: torch.Generator | None = None,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> Tensor:
        """Noise (n, *S), where sampling starts: draws from the perturbation kernel at level 1.

        Raises:
            ValueError: shape is empty or holds something that is not a size.

        >>> PoissonFlowMatcher(D=128).noise((4, 3, 8, 8)).shape
        torch.Size([4, 3, 8, 8])
        """
        shape = tuple(shape)
        if not shape or not isinstance(shape[0], int) or shape[0] < 0:
            raise ValueError(f"shape must be (n, *S) with n of at least 0, got {shape}.")
        level = torch.ones(shape[0], dtype=dtype, device=common_device(device, generator))
        return PoissonFlowPP(shape[1:], D=self.D).noise(level, generator)

    def sample_location_and_conditional_flow(
        self,
        x0: Tensor | None,
        x1: Tensor,
        t: Tensor | float | None = None,
        *,
        labels: Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Times, points between noise and data, and the velocity to learn at these points.

            x_t = t x1 + (1 − t) x0
            u_t = x1 − x0                               without references
            u_t = x1 − x0 + (mean − x1)/(1 − t)         with references: velocity at x_t

        Args:
            x0: noise (B, *S) from :meth:`noise`, or from ``torch.randn`` if D = ∞; None draws it.
            x1: data (B, *S), float32 or float64; uint8 means u/127.5 − 1; half precision is
                computed and returned in float32.
            t: times (B,) or a number, in [0, 1]; None draws them uniformly.
            labels: labels (B,) of x1. The velocity at a point is that of the references with its
                label, or of all references where the label is below 0. None means all references,
                and is refused if there are reference_labels. Without references labels have no
                effect.
            generator: draws x0 and t, on the device of x1.

        Returns:
            t (B,), x_t (B, *S) and u_t (B, *S).

        Raises:
            ValueError: shapes or devices do not match, labels are missing, or t is outside [0, 1].
            TypeError: a dtype is not allowed.

        >>> import torch
        >>> x0, x1 = torch.tensor([[-1.0]]), torch.tensor([[3.0]])
        >>> PoissonFlowMatcher().sample_location_and_conditional_flow(x0, x1, 0.25)
        (tensor([0.2500]), tensor([[0.]]), tensor([[4.]]))
        """
        check_dtype("x1", x1)
        x1 = dequantise(x1, torch.promote_types(x1.dtype, torch.float32))
        if x0 is None:
            x0 = self.noise(x1.shape, generator=generator, dtype=x1.dtype, device=x1.device)
        elif x0.shape != x1.shape:
            raise ValueError(
                f"x0 must have the shape of x1, {tuple(x1.shape)}, got {tuple(x0.shape)}."
            )
        if t is None:
            t = draws.uniform(x1.shape[:1], generator, dtype=x1.dtype, device=x1.device)
        t = _check_times(t, x1)
        weight = over_samples(t, x1)
        xt = weight * x1 + (1 - weight) * x0
        ut = x1 - x0
        if self.references is not None:
            with torch.no_grad():
                ahead = self._mean_from(x1, t, xt, self.references, labels)
                ut = ut + ahead / (1 - weight).clamp(min=_MIN_REMAINING)
        return t, xt, ut

    def velocity(self, t: Tensor | float, x: Tensor, labels: Tensor | None = None) -> Tensor:
        """The exact velocity (B, *S) of the flow of the references at points x.

            u_t(x) = (mean(x/t, σ = (1 − t)/t) − x)/(1 − t)

        It carries points from :meth:`noise` at t = 0 to the references at t = 1. It is
        differentiable once in x. The order of the arguments is that of torchdiffeq, torchdyn and
        torchcfm; their names are also those of flow_matching.

        At t = 0, where σ is infinite, the mean is the average of the references. Solvers evaluate
        the velocity at t = 1, where it has no limit except at the references. So the divisor 1 − t
        is at least 0.001, which leaves less than 0.1 % of the noise at the end. Times below 0 or
        above 1, which adaptive solvers try, are clamped.

        Args:
            t: time, a number or (B,).
            x: points (B, *S), floating point.
            labels: labels (B,), as in :meth:`sample_location_and_conditional_flow`.

        Raises:
            ValueError: there are no references, shapes or devices do not match, or labels are
                missing.
            TypeError: a dtype is not allowed.

        >>> import torch
        >>> from torchdiffeq import odeint
        >>> matcher = PoissonFlowMatcher(D=16, references=torch.eye(2))
        >>> noise = matcher.noise((3, 2), generator=torch.Generator().manual_seed(0))
        >>> x = odeint(matcher.velocity, noise, torch.linspace(0, 1, 21), method="euler")[-1]
        >>> x.sort().values.round(decimals=3)
        tensor([[0., 1.],
                [0., 1.],
                [0., 1.]])
        """
        if self.references is None:
            raise ValueError("references is None; the velocity needs references.")
        if not x.is_floating_point():
            raise TypeError(f"x must be floating point, got {x.dtype}.")
        x = x.to(torch.promote_types(x.dtype, torch.float32))
        t = per_query("t", t, x).to(x.dtype).clamp(0, 1)
        ahead = self._mean_from(x, t, x, self.references, labels)
        return ahead / (1 - over_samples(t, x)).clamp(min=_MIN_REMAINING)

    def _mean_from(
        self,
        origin: Tensor,
        t: Tensor,
        x: Tensor,
        references: References,
        labels: Tensor | None,
    ) -> Tensor:
        """The posterior mean at points x and times t, less an origin (B, *S)."""
        t = t.clamp(min=_MIN_T)
        points = x / over_samples(t, x)
        return mean_from(
            origin,
            points - origin,
            points,
            references,
            sigma=(1 - t) / t,
            D=self.D,
            labels=labels,
            reference_labels=self.reference_labels,
        )


class _Denoiser(nn.Module):
    """What :func:`as_denoiser` returns."""

    def __init__(self, velocity_net: Callable[..., Tensor]) -> None:
        super().__init__()
        self.velocity_net = velocity_net

    def forward(self, x: Tensor, sigma: Tensor, **condition: Any) -> Tensor:
        t = 1 / (1 + sigma.to(x.dtype))
        scaled = over_samples(t, x) * x
        velocity = untouched(self.velocity_net, "velocity_net", (), t=t, x=scaled, **condition)
        if not isinstance(velocity, Tensor) or velocity.shape != x.shape:
            raise ValueError(
                f"velocity_net must return a tensor of the shape of x, {tuple(x.shape)}, got "
                f"{shape_or_type(velocity)}."
            )
        # 1 − t = σ t; the product has no cancellation.
        return scaled + over_samples(sigma.to(x.dtype) * t, x) * velocity


def as_denoiser(velocity_net: Callable[..., Tensor]) -> nn.Module:
    """Makes a denoiser for :class:`pfgm.PoissonFlowPP` from a network of velocities.

        mean(x, σ) = x_t + (1 − t) v(t, x_t),   t = 1/(1 + σ),  x_t = t x

    Args:
        velocity_net: called ``net(t=t, x=x_t, **condition)`` with t (B,) and x_t (B, *S), as the
            networks of torchcfm and flow_matching can be. The conditions are those of sampling.

    Returns:
        A denoiser net(x, sigma, **condition) -> mean, with x (B, *S) and sigma (B,).

    Raises:
        ValueError: when called, the result of velocity_net does not have the shape of x.

    >>> import pfgm, torch
    >>> matcher = PoissonFlowMatcher(D=16, references=torch.ones(1, 2))
    >>> flow = pfgm.PoissonFlowPP((2,), D=16)
    >>> flow.sample(as_denoiser(matcher.velocity), 1, solver="multistep", steps=8).round(decimals=3)
    tensor([[1., 1.]])
    """
    return _Denoiser(velocity_net)


def _check_times(t: Tensor | float, x: Tensor) -> Tensor:
    """Times as (B,) in the dtype of x; raises ValueError outside [0, 1]."""
    times = per_query("t", t, x)
    allowed = (times >= 0) & (times <= 1)
    if checks_values(x.device) and not bool(allowed.all()):
        raise ValueError(
            f"t must be from 0 (noise) to 1 (data), got {float(times[~allowed][0]):.6g}."
        )
    return times.to(x.dtype)
