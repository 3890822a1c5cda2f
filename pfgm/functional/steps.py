"""Single steps of the flow's ODE, from a network's output to the next points in one pass.

The ODE is dx/dz = (x − mean)/z at every number of augmented dimensions, with z = sigma at D = ∞
(PFGM++, arXiv 2302.04265, section 3.3). A network that predicts PFGM's field (v_x, v_z) gives

    mean = x − z v_x/v_z

where, for z < z_exp, v_z is small and the network's error large beside it: there it is replaced by
what v_x implies (PFGM, arXiv 2209.11178, appendix B.2.3). With n = ‖v_x‖/√N and

    e_x = n (γ + √(n²γ² + (1 − n²) z²)) / (1 − n²)     substitution "exact": inverts the field's
    e_x = γ n / (1 − n)                                "published"           normalisation
    v_z = −√N z / (√(e_x² + z²) + γ)

A network can be off: n is kept below 1 and v_z below 0, so that the step stays finite and never
goes against the field. Apart from the norm of v_x, memory sees each input and each result once.

Each step has a form ``…_from_mean`` for a network that predicts the mean (a denoiser).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple, overload

import torch
from torch import Tensor

from .. import ops
from ..backends.problems import OdeStep
from ..common.checks import LARGEST, checks_values, is_number, varies
from ..common.transforms import batched
from .field import per_query

__all__ = [
    "Field",
    "euler_step",
    "euler_step_from_mean",
    "heun_step",
    "heun_step_from_mean",
    "multistep_step",
    "multistep_step_from_mean",
]

Level = Tensor | float

_HALF = (torch.bfloat16, torch.float16)
_DTYPES = (torch.float32, torch.float64, *_HALF)
_SUBSTITUTIONS = ("exact", "published")


class Field(NamedTuple):
    """A predicted field, and how the posterior mean is read from it."""

    x: Tensor
    """(B, *S), v_x."""
    z: Tensor
    """(B,), v_z."""
    gamma: float = 5.0
    """Softening in the field's normalisation."""
    z_exp: float = 5.0
    """Below this z, v_z is replaced by what v_x implies."""
    substitution: str = "exact"
    """How: "exact" or "published"."""


# ---- the steps, from a field or from the mean ------------------------------------------------
#
# All are next = x + toward (mean − x) + blend (history − x): pfgm/backends/reference.py. They
# return the next points, and the mean where it is asked for.


def euler(
    x: Tensor,
    slope: Field | Tensor,
    z: Level,
    z_next: Level,
    *,
    return_mean: bool = False,
    out: Tensor | None = None,
    mean_out: Tensor | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Along the line from x at z to the mean at 0."""
    z, z_next = _levels(x, slope, z, z_next, zero=True)
    levels = (z, (z - z_next) / z, 0.0)
    return _take(x, slope, None, levels, return_mean, out, mean_out, backend)


def mean_of(x: Tensor, slope: Field | Tensor, z: Level) -> Tensor:
    """The posterior mean (B, *S) that the slope at points x implies, in memory of its own.

    A network may return the same buffer at each call, as one in a CUDA graph does, or x itself.
    """
    return euler(x, slope, z, 0.0)[0] if isinstance(slope, Field) else slope.clone()


def heun(
    x: Tensor,
    predicted: Tensor,
    slope: Field | Tensor,
    z: Level,
    z_next: Level,
    *,
    out: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """Again from x with the average of the slopes at both ends; the slope is that at predicted.

    The slope at the start is (predicted − x)/(z_next − z), so that
    next = ½ (x + predicted) + ½ (z/z_next − 1)(mean − predicted).
    """
    z, z_next = _levels(x, slope, z, z_next)
    levels = (z_next, (z - z_next) / (2 * z_next), 0.5)
    _check_rows("x", x, predicted, predicted.shape)
    result, _ = _take(predicted, slope, x, levels, False, out, None, backend)
    return result


def multistep(
    x: Tensor,
    slope: Field | Tensor,
    z: Level,
    z_next: Level,
    previous_mean: Tensor,
    z_previous: Level,
    *,
    return_mean: bool = False,
    out: Tensor | None = None,
    mean_out: Tensor | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor | None]:
    """An Euler step toward d = mean + w (mean − previous_mean): the mean at the middle of the step.

    w = log(z/z_next) / (2 log(z_previous/z)) extrapolates linearly in log z.
    """
    z, z_next, z_previous = _levels(x, slope, z, z_next, z_previous)
    w = _log(z / z_next) / (2 * _log(z_previous / z))
    length = (z - z_next) / z
    levels = (z, length * (1 + w), -length * w)
    _check_rows("previous_mean", previous_mean, x, x.shape)
    return _take(x, slope, previous_mean, levels, return_mean, out, mean_out, backend)


def _log(value: Any) -> Any:
    return value.log() if isinstance(value, Tensor) else math.log(value)


def _levels(x: Tensor, slope: Field | Tensor, *values: Level, zero: bool = False) -> Sequence[Any]:
    """z, z_next and where given z_previous, checked: floats, or all (B,) in float64."""
    if all(type(value) is float and 0 < value <= LARGEST for value in values):
        levels: Sequence[Any] = values
    else:
        levels = _unusual_levels(x, slope, values, zero)
    if any(not isinstance(level, Tensor) and varies(level) for level in levels):
        levels = [per_query("level", level, x) for level in levels]
    if len(levels) == 3 and not torch.compiler.is_compiling():
        same = levels[2] == levels[0]
        if _holds(same):
            letter = _letter(slope)
            raise ValueError(f"{letter}_previous equals {letter}; both must differ.")
    return levels


def _holds(condition: Tensor | bool) -> bool:
    """Whether it holds in any row; not looked at where it differs between samples of a vmap."""
    if isinstance(condition, Tensor):
        return not batched(condition) and bool(condition.any())
    return condition


def _unusual_levels(
    x: Tensor, slope: Field | Tensor, values: Sequence[Level], zero: bool
) -> list[Any]:
    """Levels with tensors or integers among them, zero or not allowed."""
    letter = _letter(slope)
    names = (letter, f"{letter}_next", f"{letter}_previous")[: len(values)]
    may_be_zero = (False, zero, False)[: len(values)]
    if not any(isinstance(value, Tensor) for value in values):
        for name, value, zero in zip(names, values, may_be_zero, strict=True):
            _check_number(name, value, zero)
        return [float(value) for value in values]
    wide = [per_query(name, value, x) for name, value in zip(names, values, strict=True)]
    # Values are looked at where the tensors are, which a compiled graph cannot do.
    if checks_values(x.device) and not torch.compiler.is_compiling():
        for name, level, zero in zip(names, wide, may_be_zero, strict=True):
            if batched(level):
                continue
            allowed = level.isfinite() & ((level >= 0) if zero else (level > 0))
            if not bool(allowed.all()):
                _check_number(name, level[~allowed][0].item(), zero)
    return wide


def _letter(slope: Field | Tensor) -> str:
    return "z" if isinstance(slope, Field) else "sigma"


def _check_number(name: str, value: Any, zero: bool) -> None:
    if not is_number(value):
        raise TypeError(
            f"{name} is a {type(value).__name__}; allowed is a number or a tensor of shape (B,)."
        )
    if not (0 < value <= LARGEST or (zero and value == 0)):
        least = "of at least 0" if zero else "above 0"
        raise ValueError(f"{name} is {value}; allowed is any finite number {least}.")


def _check_rows(name: str, value: Tensor, x: Tensor, shape: torch.Size) -> None:
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} is a {type(value).__name__}; allowed is a torch.Tensor.")
    if value.shape != shape:
        raise ValueError(f"{name} has shape {tuple(value.shape)}; needed is {tuple(shape)}.")
    if not value.is_floating_point():
        raise TypeError(f"{name} has dtype {value.dtype}; allowed is floating point.")
    if value.device != x.device:
        raise ValueError(f"{name} is on {value.device} and x on {x.device}; both must be on one.")


def _check(x: Tensor, slope: Field | Tensor) -> None:
    if not isinstance(x, Tensor):
        raise TypeError(f"x is a {type(x).__name__}; allowed is a torch.Tensor.")
    if x.ndim == 0 or math.prod(x.shape[1:]) == 0:
        raise ValueError(
            f"x has shape {tuple(x.shape)}; allowed is (B, *S) with at least one value in S."
        )
    if x.dtype not in _DTYPES:
        raise TypeError(f"x has dtype {x.dtype}; allowed are {', '.join(map(str, _DTYPES))}.")
    if not isinstance(slope, Field):
        _check_rows("mean", slope, x, x.shape)
        return
    _check_rows("field_x", slope.x, x, x.shape)
    _check_rows("field_z", slope.z, x, x.shape[:1])
    for name, value in (("gamma", slope.gamma), ("z_exp", slope.z_exp)):
        if not 0 <= value <= LARGEST:
            raise ValueError(f"{name} is {value}; allowed is any finite number of at least 0.")
    if slope.substitution not in _SUBSTITUTIONS:
        raise ValueError(
            f"substitution is {slope.substitution!r}; allowed are 'exact' and 'published'."
        )


def _take(
    x: Tensor,
    slope: Field | Tensor,
    history: Tensor | None,
    levels: tuple[Any, Any, Any],
    return_mean: bool,
    out: Tensor | None,
    mean_out: Tensor | None,
    backend: str | None,
) -> tuple[Tensor, Tensor | None]:
    """The step on flat rows, in float32 where x has half precision."""
    _check(x, slope)
    dtype = torch.float32 if x.dtype in _HALF else x.dtype
    field = slope if isinstance(slope, Field) else None
    step = OdeStep(
        x=_flat(x, dtype),
        slope=_flat(slope.x if isinstance(slope, Field) else slope, dtype),
        field_z=None if field is None else _typed(field.z, dtype),
        history=None if history is None else _flat(history, dtype),
        levels=_stacked(x, levels),
        gamma=5.0 if field is None else float(field.gamma),
        z_exp=0.0 if field is None else float(field.z_exp),
        exact=field is None or field.substitution == "exact",
    )
    if mean_out is not None and not return_mean:
        raise ValueError("mean_out is given without return_mean=True.")
    given = slope if return_mean and isinstance(slope, Tensor) else None
    with_mean = return_mean and field is not None
    if out is None and mean_out is None:
        result, mean = ops.ode_step.compute(step, with_mean, backend)
        mean = given if mean is None else mean.reshape(x.shape).to(x.dtype)
        return result.reshape(x.shape).to(x.dtype), mean
    if out is None:
        out = torch.empty_like(x, memory_format=torch.contiguous_format)
    if with_mean and mean_out is None:
        mean_out = torch.empty_like(x, memory_format=torch.contiguous_format)
    flat_out = step.x if out is x and _is_flat(x, dtype) else _flat_output("out", out, x, dtype)
    flat_mean = None if mean_out is None else _flat_output("mean_out", mean_out, x, dtype)
    ops.ode_step.compute_into(step, flat_out, flat_mean, backend)
    if not _is_flat(out, dtype):
        out.copy_(flat_out.view(x.shape))
    if mean_out is not None and flat_mean is not None and not _is_flat(mean_out, dtype):
        mean_out.copy_(flat_mean.view(x.shape))
    return out, given if mean_out is None else mean_out


def _stacked(x: Tensor, levels: tuple[Any, Any, Any]) -> tuple[float, float, float] | Tensor:
    if not any(isinstance(level, Tensor) for level in levels):
        return levels
    return torch.stack([per_query("level", level, x) for level in levels])


def _typed(values: Tensor, dtype: torch.dtype) -> Tensor:
    return values if values.dtype == dtype else values.to(dtype)


def _flat(values: Tensor, dtype: torch.dtype) -> Tensor:
    if values.ndim != 2:
        values = values[:, None] if values.ndim == 1 else values.flatten(1)
    return _typed(values, dtype)


def _is_flat(out: Tensor, dtype: torch.dtype) -> bool:
    return out.dtype == dtype and (out.ndim == 2 or out.is_contiguous())


def _flat_output(name: str, out: Tensor, x: Tensor, dtype: torch.dtype) -> Tensor:
    """out as (B, N), or memory of that form whose content is copied to out."""
    if not isinstance(out, Tensor):
        raise TypeError(f"{name} is a {type(out).__name__}; allowed is a torch.Tensor.")
    if out.shape != x.shape or out.dtype != x.dtype:
        raise ValueError(
            f"{name} has shape {tuple(out.shape)} and dtype {out.dtype}; needed are those of x, "
            f"{tuple(x.shape)} and {x.dtype}."
        )
    if out.device != x.device:
        raise ValueError(f"{name} is on {out.device} and x on {x.device}; both must be on one.")
    rows, features = x.shape[0], math.prod(x.shape[1:])
    if _is_flat(out, dtype):
        return out.view(rows, features)
    return torch.empty(rows, features, dtype=dtype, device=x.device)


# ---- the public functions --------------------------------------------------------------------


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
    """An Euler step of the flow from a network's field at (x, z).

        x_next = mean + (z_next/z)(x − mean) = x + (z_next − z) dx/dz

    with the mean that the field implies (:mod:`pfgm.functional.steps`): the published "forward
    Euler" on a grid uniform in log z (PFGM, arXiv 2209.11178, section 3.3). z_next = 0 gives the
    mean.

    Without ``out`` it can be differentiated in x, field_x, field_z and levels given as tensors, any
    number of times; the gradient is that of the formula in plain torch, whatever the backend. NaN
    in the field is passed on to x_next.

    Args:
        x: (B, *S) points, float32 or float64; half precision is computed in float32 and returned
            in half precision.
        field_x: (B, *S), the field's part in the data space; converted to the dtype of x.
        field_z: (B,), its part along z.
        z: level of x, above 0, in the units of x: a number or (B,).
        z_next: level to go to, at least 0: a number or (B,).
        gamma: softening in the field's normalisation, at least 0.
        z_exp: below this z, field_z is replaced by what field_x implies.
        substitution: how: "exact" or "published".
        return_mean: return the mean too.
        out: (B, *S) in the dtype of x, takes the result; may be x, field_x or any other tensor.
        mean_out: as out, takes the mean; must not be out.
        backend: "native", "triton" or "reference"; None lets :mod:`pfgm.backends` choose.

    Returns:
        x_next (B, *S), and with ``return_mean`` also the mean (B, *S), in the dtype of x.

    Raises:
        ValueError: shapes or devices differ, a level is out of range (in a tensor: on the CPU and
            outside torch.compile), gamma, z_exp or substitution is not allowed, mean_out overlaps
            out or comes without return_mean.
        TypeError: an argument has a wrong type or dtype.
        RuntimeError: out is given and an input requires grad; the backend asked for cannot run.

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
    """The second half of a Heun step: from x again, with the average of the slopes at both ends.

        x_next = x + (z_next − z)/2 · ((x − mean)/z + (predicted − mean_next)/z_next)

    the published "improved Euler". ``predicted`` is what :func:`euler_step` made of x, and the
    field is the network's at (predicted, z_next). The slope at x needs no memory of its own: it is
    (predicted − x)/(z_next − z).

    Args:
        x: (B, *S), the points at z.
        predicted: (B, *S), the result of the Euler step from x to z_next.
        field_x: (B, *S), the field at (predicted, z_next).
        field_z: (B,), likewise.
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
    """A second-order step from one evaluation: the mean is extrapolated linearly in log z.

        d = mean + w (mean − previous_mean),   w = log(z/z_next) / (2 log(z_previous/z))
        x_next = d + (z_next/z)(x − d)

    (DPM-Solver++(2M), arXiv 2211.01095, algorithm 2, in the variable z). The first step of a run,
    which has no history, is :func:`euler_step` with ``return_mean=True``.

    Args:
        x: (B, *S) points at z.
        field_x: (B, *S), the field at (x, z).
        field_z: (B,), likewise.
        z: level of x, above 0: a number or (B,).
        z_next: level to go to, above 0: a number or (B,).
        previous_mean: (B, *S), the mean of the step before.
        z_previous: the level of that step, other than z: a number or (B,).
        gamma, z_exp, substitution, out, mean_out, backend: as :func:`euler_step`; mean_out may be
            previous_mean, so that a whole run needs the memory of two tensors.

    Returns:
        x_next (B, *S) and the mean (B, *S) for the next step, in the dtype of x.

    Raises:
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

    sigma_next = 0 gives the mean itself. sigma may be r as well: only ratios count.

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
    """:func:`multistep_step` from a denoiser's mean (B, *S) and that of the step before.

    >>> import torch
    >>> x, mean, before = torch.tensor([[4.0]]), torch.tensor([[2.0]]), torch.tensor([[1.0]])
    >>> multistep_step_from_mean(x, mean, 1.0, 0.5, before, 2.0)
    tensor([[3.2500]])
    """
    return multistep(
        x, mean, sigma, sigma_next, previous_mean, sigma_previous, out=out, backend=backend
    )[0]
