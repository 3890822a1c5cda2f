"""The Poisson flow in flow-matching trainers: torchcfm's loop, flow_matching's, or one's own.

Flow matching (arXiv 2210.02747, 2302.00482) carries noise at t = 0 to data at t = 1 along a
velocity. A flow of D augmented dimensions, dx/dσ = (x − mean(x, σ))/σ, becomes one with

    σ = (1 − t)/t,   x_t = t x,   u_t(x_t) = (mean(x_t/t, σ) − x_t)/(1 − t)

Its conditional paths are the straight lines x_t = t x1 + (1 − t) n from draws n of the perturbation
kernel at σ = 1 to data x1, with velocities x1 − n: what independent conditional flow matching does,
with Student's noise of D degrees of freedom in place of the normal, which D = ∞ is.

Nothing else need be installed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..common.checks import check_dtype, checks_values, is_number, untouched
from ..common.tensors import common_device, dequantise, over_samples
from ..flows.flow import by_label
from ..flows.plusplus import PoissonFlowPP
from ..functional import posterior_mean
from ..functional.levels import per_query
from ..references import References

__all__ = ["PoissonFlowMatcher", "as_denoiser"]

# x_t/t does not overflow there, and the mean is that of all references to the last digit.
_FIRST_T = 1e-9
# The least 1 − t that is divided by: off the references the velocity is infinite at t = 1.
_LEAST_LEFT = 1e-3


class PoissonFlowMatcher:
    """The Poisson flow as a matcher in the manner of torchcfm's ``ConditionalFlowMatcher``.

    With D = ∞ and no references it gives what that one does with sigma = 0.

    At a small D the noise, and with it x_t and the target, has heavy tails: none of D ≤ 2 has a
    variance, and a squared error, unweighted as it is in flow matching, no mean. D from about the
    number of values in a sample on trains as diffusion does.

    Args:
        D: the number of augmented dimensions, any positive number or infinity.
        references: None makes x1 − x0 the target. (M, *S) data with the rows of x1 among them, as
            :func:`pfgm.posterior_mean` takes them, make it the velocity of the whole flow, which is
            its average at x_t and varies less (the stable target, arXiv 2302.00670).
        reference_labels: (M,) labels of the references, for targets of one class; those of a
            :class:`pfgm.ReferenceSet` unless given.

    Raises:
        TypeError: D is no number.
        ValueError: D ≤ 0.

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
        if not is_number(D):
            raise TypeError(f"D is a {type(D).__name__}; allowed is a number.")
        if not D > 0:
            raise ValueError(f"D is {D}; allowed is any positive number or infinity.")
        self.D = float(D)
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
        """Points (n, *S) at t = 0, where sampling starts: the perturbation kernel at level 1.

        Raises:
            ValueError: shape is empty or holds what is no size.

        >>> PoissonFlowMatcher(D=128).noise((4, 3, 8, 8)).shape
        torch.Size([4, 3, 8, 8])
        """
        shape = tuple(shape)
        if not shape or not isinstance(shape[0], int) or shape[0] < 0:
            raise ValueError(f"shape is {shape}; allowed is (n, *S) with n of at least 0.")
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
        """Times, points on the way from noise to data, and the velocity that is to be learnt there.

            x_t = t x1 + (1 − t) x0
            u_t = x1 − x0                               without references
            u_t = x1 − x0 + (mean − x1)/(1 − t)         with them: :meth:`velocity` at x_t

        Args:
            x0: (B, *S) draws of :meth:`noise`, not of ``torch.randn`` unless D = ∞; None draws
                them.
            x1: (B, *S) data, float32 or float64; uint8 means u/127.5 − 1, half precision is
                computed and returned in float32.
            t: (B,) or a number, in [0, 1]; None draws them uniformly.
            labels: (B,) labels of x1: each point's velocity is that of the references of its label,
                of all where it is below 0. They change nothing without references.
            generator: of x0 and t, on the device of x1.

        Returns:
            t (B,), x_t (B, *S) and u_t (B, *S).

        Raises:
            ValueError: shapes or devices do not fit, t is outside [0, 1].
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
                f"x0 has shape {tuple(x0.shape)}; allowed is that of x1, {tuple(x1.shape)}."
            )
        if t is None:
            t = torch.rand(len(x1), generator=generator, dtype=x1.dtype, device=x1.device)
        t = _checked_times(t, x1)
        along = over_samples(t, x1)
        xt = along * x1 + (1 - along) * x0
        ut = x1 - x0
        if self.references is not None:
            with torch.no_grad():
                mean = self._mean(t, xt, self.references, labels)
                ut = ut + (mean - x1) / (1 - along).clamp(min=_LEAST_LEFT)
        return t, xt, ut

    def velocity(self, t: Tensor | float, x: Tensor, labels: Tensor | None = None) -> Tensor:
        """The exact velocity (B, *S) of the flow of the references at points x, towards data.

            u_t(x) = (mean(x/t, σ = (1 − t)/t) − x)/(1 − t)

        At t = 0, where σ is infinite, the mean is the average of the references. From t = 0.999 on
        1 − t is replaced by 0.001 where it divides, as off the references the velocity has no limit
        at t = 1, where solvers evaluate it; what that leaves of the noise at the end is below 0.1 %
        of it. Times beyond an end, which adaptive solvers try, are taken as the end. Differentiable
        once in x.

        Carried from :meth:`noise` at t = 0 to t = 1, points become references. The order of the
        arguments is that of torchdiffeq, torchdyn and torchcfm's networks, their names are those of
        flow_matching's too.

        Args:
            t: time, a number or (B,).
            x: (B, *S) points, floating point.
            labels: (B,), as in :meth:`sample_location_and_conditional_flow`.

        Raises:
            ValueError: there are no references, shapes or devices do not fit.
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
            raise ValueError("references is None; needed are those whose flow the velocity is of.")
        if not x.is_floating_point():
            raise TypeError(f"x has dtype {x.dtype}; allowed is floating point.")
        x = x.to(torch.promote_types(x.dtype, torch.float32))
        t = per_query("t", t, x).to(x.dtype).clamp(0, 1)
        mean = self._mean(t, x, self.references, labels)
        return (mean - x) / (1 - over_samples(t, x)).clamp(min=_LEAST_LEFT)

    def _mean(self, t: Tensor, x: Tensor, references: References, labels: Tensor | None) -> Tensor:
        """The posterior mean of data at points x of times t."""
        if labels is not None and labels.shape != x.shape[:1]:
            raise ValueError(f"labels has shape {tuple(labels.shape)}; allowed is ({len(x)},).")
        t = t.clamp(min=_FIRST_T)
        (mean,) = by_label(
            self._target,
            x / over_samples(t, x),
            (1 - t) / t,
            references,
            labels,
            self.reference_labels,
        )
        return mean

    def _target(self, x: Tensor, sigma: Tensor, references: References) -> tuple[Tensor]:
        return (posterior_mean(x, references, sigma=sigma, D=self.D),)


class _Denoiser(nn.Module):
    def __init__(self, velocity_net: Callable[..., Tensor]) -> None:
        super().__init__()
        self.velocity_net = velocity_net

    def forward(self, x: Tensor, sigma: Tensor, **condition: Any) -> Tensor:
        t = 1 / (1 + sigma.to(x.dtype))
        scaled = over_samples(t, x) * x
        velocity = untouched(self.velocity_net, "velocity_net", (), t=t, x=scaled, **condition)
        if velocity.shape != x.shape:
            raise ValueError(
                f"velocity_net returned shape {tuple(velocity.shape)}; needed is that of x, "
                f"{tuple(x.shape)}."
            )
        # 1 − t = σ t, without its rounding.
        return scaled + over_samples(sigma.to(x.dtype) * t, x) * velocity


def as_denoiser(velocity_net: Callable[..., Tensor]) -> nn.Module:
    """A network of velocities as one of :class:`pfgm.PoissonFlowPP`, whose samplers then run it.

        mean(x, σ) = x_t + (1 − t) v(t, x_t),   t = 1/(1 + σ),  x_t = t x

    Args:
        velocity_net: called ``net(t=t, x=x_t, **condition)`` with t (B,) and x_t (B, *S), as
            torchcfm's and flow_matching's networks both can be; conditions are those that sampling
            is given.

    Returns:
        A denoiser net(x, sigma, **condition) -> mean, x (B, *S) and sigma (B,).

    Raises:
        ValueError: when called, velocity_net returned another shape than that of x.

    >>> import pfgm, torch
    >>> matcher = PoissonFlowMatcher(D=16, references=torch.ones(1, 2))
    >>> flow = pfgm.PoissonFlowPP((2,), D=16)
    >>> flow.sample(as_denoiser(matcher.velocity), 1, solver="multistep", steps=8).round(decimals=3)
    tensor([[1., 1.]])
    """
    return _Denoiser(velocity_net)


def _checked_times(t: Tensor | float, x: Tensor) -> Tensor:
    """Times (B,) in the dtype of x."""
    times = per_query("t", t, x)
    allowed = (times >= 0) & (times <= 1)
    if checks_values(x.device) and not bool(allowed.all()):
        raise ValueError(
            f"t holds {float(times[~allowed][0]):.6g}; allowed is 0 (noise) to 1 (data)."
        )
    return times.to(x.dtype)
