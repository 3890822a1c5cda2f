"""Steps of the flow's ODE: from a network's prediction to the next points in one pass.

The ODE is dx/dz = (x − mean)/z for every number of augmented dimensions, with z = sigma at D = ∞
(PFGM++, arXiv 2302.04265, section 3.3). Only ratios of levels matter to a mean, so r can be given
too. A network predicts the mean itself (a denoiser), or PFGM's field (v_x, v_z), which gives

    mean = x − z v_x/v_z

For z < z_exp the network's error is large compared with v_z. There v_z is replaced by the value
that v_x implies (PFGM, arXiv 2209.11178, appendix B.2.3). With n = ‖v_x‖/√N,

    e_x = n (γ + √(n²γ² + (1 − n²) z²)) / (1 − n²)     substitution "exact"
    e_x = γ n / (1 − n)                                substitution "published"
    v_z = −√N z / (√(e_x² + z²) + γ)

"exact" inverts the normalisation of the field. n is kept below 1 and v_z below 0, so that every
step is finite and follows the field, whatever the network predicts. The points are read once and
written once; only the norm of v_x needs a second pass.

Every step has the form next = x + toward (mean − x) + blend (history − x).
"""

from __future__ import annotations

import math
from typing import Any, Literal, NamedTuple, overload

import torch
from torch import Tensor

from ..common.checks import check_choice, check_dense, check_tensor
from ..common.dtypes import HALF, POINTS
from ..common.numbers import check_at_least_0
from ..common.tensors import flat_rows
from ..core.problems import OdeStep
from ..ops import eager, ode_step
from ..ops.eager import EULER, HEUN, MULTISTEP
from .levels import Level, per_query, step_levels


class Field(NamedTuple):
    """A predicted field, with the settings that turn it into the posterior mean.

    >>> import torch
    >>> field = Field(torch.zeros(1, 2), -torch.ones(1), gamma=3.0)
    """

    field_x: Tensor
    """(B, *S), the field in the data space."""
    field_z: Tensor
    """(B,), the field along z."""
    gamma: float = 5.0
    """Softening in the field's normalisation, at least 0; of a flow, ``flow.gamma``."""
    z_exp: float = 5.0
    """Below this z, field_z is replaced by the value that field_x implies; of a flow,
    ``flow.z_exp``."""
    substitution: str = "exact"
    """Formula of the replacement, "exact" or "published"."""


@overload
def euler_step(
    x: Tensor,
    prediction: Field | Tensor,
    z: Level,
    z_next: Level,
    *,
    return_mean: Literal[False] = ...,
    out: Tensor | None = ...,
    mean_out: None = ...,
    backend: str | None = ...,
) -> Tensor: ...


@overload
def euler_step(
    x: Tensor,
    prediction: Field | Tensor,
    z: Level,
    z_next: Level,
    *,
    return_mean: Literal[True],
    out: Tensor | None = ...,
    mean_out: Tensor | None = ...,
    backend: str | None = ...,
) -> tuple[Tensor, Tensor]: ...


def euler_step(
    x: Tensor,
    prediction: Field | Tensor,
    z: Level,
    z_next: Level,
    *,
    return_mean: bool = False,
    out: Tensor | None = None,
    mean_out: Tensor | None = None,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """An Euler step from a network's prediction at (x, z).

        x_next = mean + (z_next/z)(x − mean) = x + (z_next − z) dx/dz

    On a grid uniform in log z this is the published "forward Euler" (PFGM, arXiv 2209.11178,
    section 3.3). :mod:`pfgm.functional.steps` has the mean that a field implies. z_next = 0 gives
    the mean.

    Without ``out`` the step is differentiable any number of times, in x, the prediction and levels
    that are tensors. On every backend its gradient is that of the formula in plain torch. NaN in
    the prediction becomes NaN in x_next.

    Args:
        x: (B, *S) points, float32 or float64; half precision is computed in float32 and returned
            in half precision.
        prediction: a :class:`pfgm.Field` at (x, z), or the posterior mean (B, *S). It is converted
            to the dtype of x.
        z: level of x, above 0, in the units of x: a number or (B,). For a mean it may be sigma.
        z_next: level of the result, at least 0: a number or (B,).
        return_mean: return the mean too; a predicted mean is returned itself.
        out: (B, *S) in the dtype of x, to which the result is written. It may be an input, except
            for a predicted mean that is returned too.
        mean_out: as out, but for the mean of a field. It must not overlap out.
        backend: "native", "triton", "torch" or "reference"; None lets :mod:`pfgm.backends` choose.

    Returns:
        x_next (B, *S), and with ``return_mean`` also the mean (B, *S), in the dtype of x.

    Raises:
        ValueError: shapes or devices differ; a level, gamma, z_exp or substitution is not allowed
            (levels in tensors are checked on the CPU and outside torch.compile); out overlaps
            mean_out or a predicted mean that is returned; mean_out is given without return_mean, or
            with a predicted mean.
        TypeError: an argument has a wrong type or dtype.
        RuntimeError: out is given and an input requires grad; the requested backend cannot run.

    >>> import torch
    >>> x = torch.tensor([[3.0, 3.0]])
    >>> field = Field(torch.tensor([[-0.3917, -0.3917]]), torch.tensor([-0.5223]))
    >>> euler_step(x, field, 4.0, 2.0).round(decimals=2)  # the data is at 0
    tensor([[1.5000, 1.5000]])
    >>> euler_step(x, torch.zeros(1, 2), 4.0, 2.0)
    tensor([[1.5000, 1.5000]])
    """
    levels = (z, z_next, 1.0)
    result, mean = _step(EULER, x, prediction, None, levels, return_mean, out, mean_out, backend)
    return result if mean is None else (result, mean)


def heun_step(
    x: Tensor,
    x_next: Tensor,
    prediction: Field | Tensor,
    z: Level,
    z_next: Level,
    *,
    out: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """The second half of a Heun step: from x, with the average of the slopes at both ends.

        x + (z_next − z)/2 · ((x − mean)/z + (x_next − mean_next)/z_next)

    This is the published "improved Euler". The mean at x is not an argument, because its slope is
    (x_next − x)/(z_next − z).

    Args:
        x: (B, *S), the points at z.
        x_next: (B, *S), the result of :func:`euler_step` from x to z_next.
        prediction: a :class:`pfgm.Field` at (x_next, z_next), or the posterior mean there (B, *S).
        z: level of x, above 0: a number or (B,).
        z_next: level of x_next and of the result, above 0: a number or (B,).
        out, backend: as :func:`euler_step`.

    Returns:
        The corrected x_next (B, *S), in the dtype of x_next.

    Raises:
        ValueError, TypeError, RuntimeError: as :func:`euler_step`.

    >>> import torch
    >>> x, mean = torch.tensor([[4.0]]), torch.tensor([[2.0]])
    >>> x_next = euler_step(x, mean, 1.0, 0.5)
    >>> heun_step(x, x_next, mean, 1.0, 0.5)
    tensor([[3.]])
    """
    levels = (z, z_next, 1.0)
    return _step(HEUN, x_next, prediction, x, levels, False, out, None, backend)[0]


def multistep_step(
    x: Tensor,
    prediction: Field | Tensor,
    z: Level,
    z_next: Level,
    previous_mean: Tensor,
    z_previous: Level,
    *,
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
        prediction: a :class:`pfgm.Field` at (x, z), or the posterior mean there (B, *S).
        z: level of x, above 0: a number or (B,).
        z_next: level of the result, above 0: a number or (B,).
        previous_mean: (B, *S), the mean of the previous step.
        z_previous: level at the start of the previous step, not equal to z: a number or (B,).
        out, mean_out, backend: as :func:`euler_step`. mean_out may be previous_mean; a whole run
            then needs the memory of two tensors.

    Returns:
        x_next (B, *S) and the mean (B, *S) for the next step, in the dtype of x; a predicted mean
        is returned itself.

    Raises:
        ValueError: z_previous equals z. Where levels are tensors on a GPU, this is not checked, and
            the result is NaN or infinite (:func:`pfgm.debug_checks` checks it).
        ValueError, TypeError, RuntimeError: as :func:`euler_step`.

    >>> import torch
    >>> x, mean, before = torch.tensor([[4.0]]), torch.tensor([[2.0]]), torch.tensor([[1.0]])
    >>> x, mean = multistep_step(x, mean, 1.0, 0.5, before, 2.0)
    >>> x
    tensor([[3.2500]])
    """
    levels = (z, z_next, z_previous)
    result, mean = _step(
        MULTISTEP, x, prediction, previous_mean, levels, True, out, mean_out, backend
    )
    assert mean is not None
    return result, mean


def implied_mean(x: Tensor, prediction: Field | Tensor, z: Level) -> Tensor:
    """The posterior mean (B, *S) that the prediction at points x implies, in new memory.

    A network may return x itself, or the same memory at each call, as CUDA graphs do.
    """
    if isinstance(prediction, Field):
        return euler_step(x, prediction, z, 0.0)
    _check_like("prediction", prediction, x, x.shape)
    return prediction.clone()


def _step(
    method: int,
    x: Tensor,
    prediction: Field | Tensor,
    history: Tensor | None,
    levels: tuple[Level, Level, Level],
    return_mean: bool,
    out: Tensor | None,
    mean_out: Tensor | None,
    backend: str | None,
) -> tuple[Tensor, Tensor | None]:
    """The next points, and the mean if it is wanted. Levels are z, z_next and z_previous.

    In a Heun step x are the points at z_next, and history those at z.
    """
    field_z: Tensor | None
    if isinstance(prediction, Field):
        slope, field_z, with_mean = prediction.field_x, prediction.field_z, return_mean
        law = prediction.gamma, prediction.z_exp, prediction.substitution
    else:
        slope, field_z, with_mean, law = prediction, None, False, (0.0, 0.0, "exact")
    returned = return_mean and isinstance(prediction, Tensor)
    if returned and isinstance(out, Tensor) and ode_step.share_memory(out, slope):
        raise ValueError(
            "out must not overlap a predicted mean that is returned too; pass prediction.clone()."
        )
    result: tuple[Tensor, Tensor | None] | None = None
    if mean_out is None or with_mean:
        operands = (x, slope, field_z, history, out, mean_out, *levels)
        options = {"method": method, "law": law, "with_mean": with_mean}
        result = eager.one_call(eager.step, backend, *operands, **options)
    if result is None:
        coefficients = _coefficients(method, x, *levels)
        _check(method, x, prediction, history)
        if mean_out is not None and not return_mean:
            raise ValueError("mean_out needs return_mean=True.")
        step = _flat_step(x, slope, field_z, history, coefficients, law)
        if out is not None or mean_out is not None:
            result = _compute_into(out, mean_out, x, step, with_mean, backend)
        else:
            x_next, mean = ode_step.compute(step, with_mean, backend)
            mean = None if mean is None else mean.reshape(x.shape).to(x.dtype)
            result = x_next.reshape(x.shape).to(x.dtype), mean
    return (result[0], slope) if returned else result


def _coefficients(
    method: int, x: Tensor, z: Level, z_next: Level, z_previous: Level
) -> tuple[Any, Any, Any]:
    """z, toward and blend of :class:`~pfgm.core.problems.OdeStep`."""
    if method == EULER:
        z, z_next = step_levels(x, z, z_next, next_may_be_zero=True)
        return z, (z - z_next) / z, 0.0
    if method == HEUN:
        # dx/dz at x is (x_next − x)/(z_next − z), so the result is
        # ½ (x + x_next) + ½ (z/z_next − 1)(mean − x_next).
        z, z_next = step_levels(x, z, z_next)
        return z_next, (z - z_next) / (2 * z_next), 0.5
    z, z_next, z_previous = step_levels(x, z, z_next, z_previous)
    w = _log(z / z_next) / (2 * _log(z_previous / z))
    length = (z - z_next) / z
    return z, length * (1 + w), -length * w


def _log(value: Any) -> Any:
    return value.log() if isinstance(value, Tensor) else math.log(value)


_HISTORY = {HEUN: "x", MULTISTEP: "previous_mean"}


def _check(method: int, x: Tensor, prediction: Field | Tensor, history: Tensor | None) -> None:
    name = "x_next" if method == HEUN else "x"
    check_tensor(name, x)
    check_dense(name, x)
    if x.ndim == 0 or math.prod(x.shape[1:]) == 0:
        raise ValueError(
            f"{name} must have shape (B, *S) with at least one value in S, got {tuple(x.shape)}."
        )
    if x.dtype not in POINTS:
        raise TypeError(f"{name} must be one of {', '.join(map(str, POINTS))}, got {x.dtype}.")
    if method in _HISTORY:
        _check_like(_HISTORY[method], history, x, x.shape)
    if not isinstance(prediction, Field):
        if not isinstance(prediction, Tensor):
            raise TypeError(
                "prediction must be a pfgm.Field, or a torch.Tensor that holds the mean, got "
                f"{type(prediction).__name__}."
            )
        _check_like("prediction", prediction, x, x.shape)
        return
    _check_like("field_x", prediction.field_x, x, x.shape)
    _check_like("field_z", prediction.field_z, x, x.shape[:1])
    for name, value in (("gamma", prediction.gamma), ("z_exp", prediction.z_exp)):
        check_at_least_0(name, value)
    check_choice("substitution", prediction.substitution, ("exact", "published"))


def _check_like(name: str, value: Any, x: Tensor, shape: torch.Size) -> None:
    check_tensor(name, value)
    if value.shape != shape:
        raise ValueError(f"{name} must have shape {tuple(shape)}, got {tuple(value.shape)}.")
    if not value.is_floating_point():
        raise TypeError(f"{name} must be floating point, got {value.dtype}.")
    if value.device != x.device:
        raise ValueError(f"{name} and x must be on one device, got {value.device} and {x.device}.")


def _flat_step(
    x: Tensor,
    slope: Tensor,
    field_z: Tensor | None,
    history: Tensor | None,
    coefficients: tuple[Any, Any, Any],
    law: tuple[float, float, str],
) -> OdeStep:
    """The step on rows (B, N), in float32 where x has half precision."""
    dtype = torch.float32 if x.dtype in HALF else x.dtype
    gamma, z_exp, substitution = law
    return OdeStep(
        x=flat_rows(x).to(dtype),
        slope=flat_rows(slope).to(dtype),
        field_z=None if field_z is None else field_z.to(dtype),
        history=None if history is None else flat_rows(history).to(dtype),
        **_by_row(x, coefficients),
        gamma=float(gamma),
        z_exp=float(z_exp),
        exact=substitution == "exact",
    )


def _compute_into(
    out: Tensor | None,
    mean_out: Tensor | None,
    x: Tensor,
    step: OdeStep,
    with_mean: bool,
    backend: str | None,
) -> tuple[Tensor, Tensor | None]:
    """Writes the step to out and mean_out. If only one of them is given, the other is created."""
    dtype = step.x.dtype
    if out is None:
        out = torch.empty_like(x, memory_format=torch.contiguous_format)
    if with_mean and mean_out is None:
        mean_out = torch.empty_like(x, memory_format=torch.contiguous_format)
    flat_out = step.x if out is x and _is_flat(x, dtype) else _flat_output("out", out, x, dtype)
    flat_mean = None if mean_out is None else _flat_output("mean_out", mean_out, x, dtype)
    if mean_out is not None:  # flat_out and flat_mean may be other memory
        ode_step.check_separate(out, mean_out)
    ode_step.compute_into(step, flat_out, flat_mean, backend)
    if not _is_flat(out, dtype):
        out.copy_(flat_out.view(x.shape))
    if mean_out is not None and flat_mean is not None and not _is_flat(mean_out, dtype):
        mean_out.copy_(flat_mean.view(x.shape))
    return out, mean_out


def _by_row(x: Tensor, levels: tuple[Any, Any, Any]) -> dict[str, Any]:
    """The levels of the step, as numbers or, if one is a tensor, of each row."""
    rows = None
    if any(isinstance(level, Tensor) for level in levels):
        rows = torch.stack([per_query("level", level, x) for level in levels])
        levels = (0.0, 0.0, 0.0)
    return dict(zip(("z", "toward", "blend", "row_levels"), (*levels, rows), strict=True))


def _is_flat(out: Tensor, dtype: torch.dtype) -> bool:
    """Whether a step in this dtype can be written to a view (B, N) of out."""
    return out.dtype == dtype and (out.ndim == 2 or out.is_contiguous())


def _flat_output(name: str, out: Tensor, x: Tensor, dtype: torch.dtype) -> Tensor:
    """A view (B, N) of out, or new memory to be copied to out."""
    check_tensor(name, out)
    if out.shape != x.shape or out.dtype != x.dtype:
        raise ValueError(
            f"{name} must have the shape and dtype of x, {tuple(x.shape)} and {x.dtype}, got "
            f"{tuple(out.shape)} and {out.dtype}."
        )
    if out.device != x.device:
        raise ValueError(f"{name} and x must be on one device, got {out.device} and {x.device}.")
    rows, features = x.shape[0], math.prod(x.shape[1:])
    if _is_flat(out, dtype):
        return out.view(rows, features)
    return torch.empty(rows, features, dtype=dtype, device=x.device)
