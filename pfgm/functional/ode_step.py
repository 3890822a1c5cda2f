"""Steps of the flow's ODE: from a network's output to the next points in one pass.

The ODE is dx/dz = (x − mean)/z for every number of augmented dimensions, with z = sigma at D = ∞
(PFGM++, arXiv 2302.04265, section 3.3). A network that predicts PFGM's field (v_x, v_z) gives

    mean = x − z v_x/v_z

For z < z_exp the network's error is large compared with v_z. There v_z is replaced by the value
that v_x implies (PFGM, arXiv 2209.11178, appendix B.2.3). With n = ‖v_x‖/√N,

    e_x = n (γ + √(n²γ² + (1 − n²) z²)) / (1 − n²)     substitution "exact"
    e_x = γ n / (1 − n)                                substitution "published"
    v_z = −√N z / (√(e_x² + z²) + γ)

"exact" inverts the normalisation of the field. n is kept below 1 and v_z below 0, so that every
step is finite and follows the field, whatever the network predicts. The points are read once and
written once; only the norm of v_x needs a second pass.

The functions ``…_from_mean`` are for a network that predicts the mean (a denoiser).
"""

from __future__ import annotations

from typing import Literal, overload

from torch import Tensor

from .levels import Level
from .steps import Field, euler, heun, multistep

__all__ = [
    "euler_step",
    "euler_step_from_mean",
    "heun_step",
    "heun_step_from_mean",
    "multistep_step",
    "multistep_step_from_mean",
]


@overload
def euler_step(
    x: Tensor,
    field_x: Tensor,
    field_z: Tensor,
    z: Level,
    z_next: Level,
    *,
    gamma: float = ...,
    z_exp: float = ...,
    substitution: str = ...,
    return_mean: Literal[False] = ...,
    out: Tensor | None = ...,
    mean_out: None = ...,
    backend: str | None = ...,
) -> Tensor: ...


@overload
def euler_step(
    x: Tensor,
    field_x: Tensor,
    field_z: Tensor,
    z: Level,
    z_next: Level,
    *,
    gamma: float = ...,
    z_exp: float = ...,
    substitution: str = ...,
    return_mean: Literal[True],
    out: Tensor | None = ...,
    mean_out: Tensor | None = ...,
    backend: str | None = ...,
) -> tuple[Tensor, Tensor]: ...


def euler_step(
    x: Tensor,
    field_x: Tensor,
    field_z: Tensor,
    z: Level,
    z_next: Level,
    *,
    gamma: float = 5.0,
    z_exp: float = 5.0,
    substitution: str = "exact",
    return_mean: bool = False,
    out: Tensor | None = None,
    mean_out: Tensor | None = None,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """An Euler step from a network's field at (x, z).

        x_next = mean + (z_next/z)(x − mean) = x + (z_next − z) dx/dz

    with the mean that the field implies (:mod:`pfgm.functional.ode_step`). On a grid uniform in
    log z this is the published "forward Euler" (PFGM, arXiv 2209.11178, section 3.3). z_next = 0
    gives the mean.

    Without ``out`` the step is differentiable any number of times, in x, field_x, field_z and
    levels that are tensors. On every backend its gradient is that of the formula in plain torch.
    NaN in the field becomes NaN in x_next.

    Args:
        x: (B, *S) points, float32 or float64; half precision is computed in float32 and returned
            in half precision.
        field_x: (B, *S), the field in the data space; converted to the dtype of x.
        field_z: (B,), the field along z.
        z: level of x, above 0, in the units of x: a number or (B,).
        z_next: level of the result, at least 0: a number or (B,).
        gamma: softening in the field's normalisation, at least 0; of a flow, ``flow.gamma``.
        z_exp: below this z, field_z is replaced by the value that field_x implies; of a flow,
            ``flow.z_exp``.
        substitution: formula of the replacement, "exact" or "published".
        return_mean: return the mean too.
        out: (B, *S) in the dtype of x, to which the result is written. It may be an input.
        mean_out: as out, but for the mean. It must not overlap out.
        backend: "native", "triton", "torch" or "reference"; None lets :mod:`pfgm.backends` choose.

    Returns:
        x_next (B, *S), and with ``return_mean`` also the mean (B, *S), in the dtype of x.

    Raises:
        ValueError: shapes or devices differ; a level, gamma, z_exp or substitution is not allowed
            (levels in tensors are checked on the CPU and outside torch.compile); mean_out overlaps
            out, or is given without return_mean.
        TypeError: an argument has a wrong type or dtype.
        RuntimeError: out is given and an input requires grad; the requested backend cannot run.

    >>> import torch
    >>> x = torch.tensor([[3.0, 3.0]])
    >>> field_x, field_z = torch.tensor([[-0.3917, -0.3917]]), torch.tensor([-0.5223])
    >>> euler_step(x, field_x, field_z, 4.0, 2.0).round(decimals=2)  # the data is at 0
    tensor([[1.5000, 1.5000]])
    """
    field = Field(field_x, field_z, gamma, z_exp, substitution)
    result, mean = euler(
        x,
        field,
        z,
        z_next,
        return_mean=return_mean,
        out=out,
        mean_out=mean_out,
        backend=backend,
    )
    return result if mean is None else (result, mean)


def heun_step(
    x: Tensor,
    predicted: Tensor,
    field_x: Tensor,
    field_z: Tensor,
    z: Level,
    z_next: Level,
    *,
    gamma: float = 5.0,
    z_exp: float = 5.0,
    substitution: str = "exact",
    out: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """The second half of a Heun step: from x, with the average of the slopes at both ends.

        x_next = x + (z_next − z)/2 · ((x − mean)/z + (predicted − mean_next)/z_next)

    This is the published "improved Euler". The slope at x is not an argument, because it is
    (predicted − x)/(z_next − z).

    Args:
        x: (B, *S), the points at z.
        predicted: (B, *S), the result of :func:`euler_step` from x to z_next.
        field_x: (B, *S), the field at (predicted, z_next).
        field_z: (B,), the field at (predicted, z_next).
        z: level of x, above 0: a number or (B,).
        z_next: level of predicted and of the result, above 0: a number or (B,).
        gamma, z_exp, substitution, out, backend: as :func:`euler_step`; out may be x or predicted.

    Returns:
        x_next (B, *S), in the dtype of predicted.

    Raises:
        ValueError, TypeError, RuntimeError: as :func:`euler_step`.

    >>> import torch
    >>> x = torch.tensor([[3.0, 3.0]])
    >>> field_x, field_z = torch.tensor([[-0.3917, -0.3917]]), torch.tensor([-0.5223])
    >>> predicted = euler_step(x, field_x, field_z, 4.0, 2.0)
    >>> field_x, field_z = torch.tensor([[-0.2680, -0.2680]]), torch.tensor([-0.3574])
    >>> heun_step(x, predicted, field_x, field_z, 4.0, 2.0).round(decimals=2)
    tensor([[1.5000, 1.5000]])
    """
    field = Field(field_x, field_z, gamma, z_exp, substitution)
    return heun(x, predicted, field, z, z_next, out=out, backend=backend)


def multistep_step(
    x: Tensor,
    field_x: Tensor,
    field_z: Tensor,
    z: Level,
    z_next: Level,
    previous_mean: Tensor,
    z_previous: Level,
    *,
    gamma: float = 5.0,
    z_exp: float = 5.0,
    substitution: str = "exact",
    out: Tensor | None = None,
    mean_out: Tensor | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """A second-order step with one evaluation of the network.

    The mean is extrapolated linearly in log z from the mean of the previous step:

        d = mean + w (mean − previous_mean),   w = log(z/z_next) / (2 log(z_previous/z))
        x_next = d + (z_next/z)(x − d)

    (DPM-Solver++(2M), arXiv 2211.01095, algorithm 2, in the variable z). The first step of a run
    is :func:`euler_step` with ``return_mean=True``.

    Args:
        x: (B, *S) points at z.
        field_x: (B, *S), the field at (x, z).
        field_z: (B,), the field at (x, z).
        z: level of x, above 0: a number or (B,).
        z_next: level of the result, above 0: a number or (B,).
        previous_mean: (B, *S), the mean of the previous step.
        z_previous: level at the start of the previous step, not equal to z: a number or (B,).
        gamma, z_exp, substitution, out, mean_out, backend: as :func:`euler_step`. mean_out may be
            previous_mean; a whole run then needs the memory of two tensors.

    Returns:
        x_next (B, *S) and the mean (B, *S) for the next step, in the dtype of x.

    Raises:
        ValueError: z_previous equals z. Where levels are tensors on a GPU, this is not checked, and
            the result is NaN or infinite (:func:`pfgm.debug_checks` checks it).
        ValueError, TypeError, RuntimeError: as :func:`euler_step`.

    >>> import torch
    >>> x, previous_mean = torch.tensor([[3.0, 3.0]]), torch.zeros(1, 2)
    >>> field_x, field_z = torch.tensor([[-0.3917, -0.3917]]), torch.tensor([-0.5223])
    >>> x, mean = multistep_step(x, field_x, field_z, 4.0, 2.0, previous_mean, 8.0)
    >>> x.round(decimals=2)
    tensor([[1.5000, 1.5000]])
    """
    field = Field(field_x, field_z, gamma, z_exp, substitution)
    result, mean = multistep(
        x,
        field,
        z,
        z_next,
        previous_mean,
        z_previous,
        return_mean=True,
        out=out,
        mean_out=mean_out,
        backend=backend,
    )
    assert mean is not None
    return result, mean


def euler_step_from_mean(
    x: Tensor,
    mean: Tensor,
    sigma: Level,
    sigma_next: Level,
    *,
    out: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """:func:`euler_step` from a denoiser's mean (B, *S): mean + (sigma_next/sigma)(x − mean).

    sigma_next = 0 gives the mean itself. Only the ratio of the levels matters, so r can be given
    instead of sigma.

    >>> import torch
    >>> euler_step_from_mean(torch.tensor([[4.0]]), torch.tensor([[2.0]]), 1.0, 0.5)
    tensor([[3.]])
    """
    return euler(x, mean, sigma, sigma_next, out=out, backend=backend)[0]


def heun_step_from_mean(
    x: Tensor,
    predicted: Tensor,
    mean: Tensor,
    sigma: Level,
    sigma_next: Level,
    *,
    out: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """:func:`heun_step` from a denoiser's mean (B, *S) at (predicted, sigma_next).

    >>> import torch
    >>> x, mean = torch.tensor([[4.0]]), torch.tensor([[2.0]])
    >>> predicted = euler_step_from_mean(x, mean, 1.0, 0.5)
    >>> heun_step_from_mean(x, predicted, mean, 1.0, 0.5)
    tensor([[3.]])
    """
    return heun(x, predicted, mean, sigma, sigma_next, out=out, backend=backend)


def multistep_step_from_mean(
    x: Tensor,
    mean: Tensor,
    sigma: Level,
    sigma_next: Level,
    previous_mean: Tensor,
    sigma_previous: Level,
    *,
    out: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """:func:`multistep_step` from a denoiser's mean (B, *S) and the mean of the previous step.

    >>> import torch
    >>> x, mean, before = torch.tensor([[4.0]]), torch.tensor([[2.0]]), torch.tensor([[1.0]])
    >>> multistep_step_from_mean(x, mean, 1.0, 0.5, before, 2.0)
    tensor([[3.2500]])
    """
    return multistep(
        x, mean, sigma, sigma_next, previous_mean, sigma_previous, out=out, backend=backend
    )[0]
