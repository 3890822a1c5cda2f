"""One step of the flow's ODE, for the solvers and for the public functions.

The argument slope is what the network predicts: a field, or the mean itself. Both give dx/dz.
Every step has the form next = x + toward (mean − x) + blend (history − x). It returns the next
points, and the mean if it is wanted. :mod:`pfgm.functional.ode_step` has the formulas.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import ops
from ..backends import native_direct, triton_direct
from ..backends.problems import OdeStep
from ..common.checks import check_at_least_0, check_dense
from .levels import Level, per_query, step_levels

__all__ = ["Field", "Level", "euler", "heun", "mean_of", "multistep"]

_HALF = (torch.bfloat16, torch.float16)
_DTYPES = (torch.float32, torch.float64, *_HALF)
_SUBSTITUTIONS = ("exact", "published")
_NO_FIELD = (0.0, 0.0, "exact")  # γ, z_exp and substitution of a step from a mean


class Field(NamedTuple):
    """A predicted field, with the settings that turn it into the posterior mean."""

    x: Tensor
    """(B, *S), v_x."""
    z: Tensor
    """(B,), v_z."""
    gamma: float = 5.0
    """Softening in the field's normalisation."""
    z_exp: float = 5.0
    """Below this z, v_z is replaced by the value that v_x implies."""
    substitution: str = "exact"
    """Formula of the replacement, "exact" or "published"."""


# ---- the steps -------------------------------------------------------------------------------


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
    """An Euler step: along the straight line from x at level z to the mean at level 0."""
    given = (z, z_next, 1.0)
    found = _take_directly(
        native_direct.EULER, x, slope, None, given, return_mean, out, mean_out, backend
    )
    if found is not None:
        return found
    z, z_next = step_levels(x, _level_symbol(slope), z, z_next, next_may_be_zero=True)
    levels = (z, (z - z_next) / z, 0.0)
    return _take(x, slope, None, levels, return_mean, out, mean_out, backend)


def mean_of(x: Tensor, slope: Field | Tensor, z: Level) -> Tensor:
    """The posterior mean (B, *S) that the slope at points x implies, in new memory.

    A network may return x itself, or the same memory at each call, as CUDA graphs do.
    """
    if isinstance(slope, Field):
        return euler(x, slope, z, 0.0)[0]
    _check_tensor("mean", slope, x, x.shape)
    return slope.clone()


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
    """The second half of a Heun step: from x, with the average of dx/dz at both ends.

    The argument slope is that at predicted. dx/dz at x is (predicted − x)/(z_next − z), so
    next = ½ (x + predicted) + ½ (z/z_next − 1)(mean − predicted).
    """
    given = (z, z_next, 1.0)
    found = _take_directly(
        native_direct.HEUN, predicted, slope, x, given, False, out, None, backend
    )
    if found is not None:
        return found[0]
    z, z_next = step_levels(x, _level_symbol(slope), z, z_next)
    levels = (z_next, (z - z_next) / (2 * z_next), 0.5)
    _check_tensor("x", x, predicted, predicted.shape)
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
    """An Euler step toward mean + w (mean − previous_mean), an estimate of the mean at midstep.

    w = log(z/z_next) / (2 log(z_previous/z)) extrapolates linearly in log z.
    """
    given = (z, z_next, z_previous)
    found = _take_directly(
        native_direct.MULTISTEP,
        x,
        slope,
        previous_mean,
        given,
        return_mean,
        out,
        mean_out,
        backend,
    )
    if found is not None:
        return found
    z, z_next, z_previous = step_levels(x, _level_symbol(slope), z, z_next, z_previous)
    w = _log(z / z_next) / (2 * _log(z_previous / z))
    length = (z - z_next) / z
    levels = (z, length * (1 + w), -length * w)
    _check_tensor("previous_mean", previous_mean, x, x.shape)
    return _take(x, slope, previous_mean, levels, return_mean, out, mean_out, backend)


def _log(value: Any) -> Any:
    return value.log() if isinstance(value, Tensor) else math.log(value)


def _level_symbol(slope: Field | Tensor) -> str:
    return "z" if isinstance(slope, Field) else "sigma"


# ---- checks ----------------------------------------------------------------------------------


def _check_tensor(name: str, value: Tensor, x: Tensor, shape: torch.Size) -> None:
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} is a {type(value).__name__}; allowed is a torch.Tensor.")
    if value.shape != shape:
        raise ValueError(f"{name} has shape {tuple(value.shape)}; allowed is {tuple(shape)}.")
    if not value.is_floating_point():
        raise TypeError(f"{name} has dtype {value.dtype}; allowed is floating point.")
    if value.device != x.device:
        raise ValueError(
            f"{name} is on {value.device} and x on {x.device}; both must be on one device."
        )


def _check(x: Tensor, slope: Field | Tensor) -> None:
    if not isinstance(x, Tensor):
        raise TypeError(f"x is a {type(x).__name__}; allowed is a torch.Tensor.")
    check_dense("x", x)
    if x.ndim == 0 or math.prod(x.shape[1:]) == 0:
        raise ValueError(
            f"x has shape {tuple(x.shape)}; allowed is (B, *S) with at least one value in S."
        )
    if x.dtype not in _DTYPES:
        raise TypeError(f"x has dtype {x.dtype}; allowed are {', '.join(map(str, _DTYPES))}.")
    if not isinstance(slope, Field):
        _check_tensor("mean", slope, x, x.shape)
        return
    _check_tensor("field_x", slope.x, x, x.shape)
    _check_tensor("field_z", slope.z, x, x.shape[:1])
    for name, value in (("gamma", slope.gamma), ("z_exp", slope.z_exp)):
        check_at_least_0(name, value)
    if slope.substitution not in _SUBSTITUTIONS:
        raise ValueError(
            f"substitution is {slope.substitution!r}; allowed are 'exact' and 'published'."
        )


# ---- a step in one call ----------------------------------------------------------------------


def _take_directly(
    method: int,
    x: Tensor,
    slope: Field | Tensor,
    history: Tensor | None,
    levels: tuple[Level, Level, Level],
    return_mean: bool,
    out: Tensor | None,
    mean_out: Tensor | None,
    backend: str | None,
) -> tuple[Tensor, Tensor | None] | None:
    """The step by :mod:`pfgm.backends.native_direct`, or None where that does not answer."""
    if isinstance(slope, Field):
        if mean_out is not None and not return_mean:
            return None
        return native_direct.step(
            method,
            x,
            slope.x,
            slope.z,
            history,
            levels,
            (slope.gamma, slope.z_exp, slope.substitution),
            return_mean,
            out,
            mean_out,
            backend,
        )
    if mean_out is not None:
        return None
    found = native_direct.step(
        method, x, slope, None, history, levels, _NO_FIELD, False, out, None, backend
    )
    return (found[0], slope) if found is not None and return_mean else found


# ---- steps on flat rows ----------------------------------------------------------------------


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
    _check(x, slope)
    if mean_out is not None and not return_mean:
        raise ValueError("mean_out is given without return_mean; allowed is return_mean=True.")
    step = _flat_step(x, slope, history, levels)
    with_mean = return_mean and isinstance(slope, Field)
    if out is None and mean_out is None:
        found = triton_direct.step(step, with_mean, None, None, backend)
        result, mean = found or ops.ode_step.compute(step, with_mean, backend)
        result = result.reshape(x.shape).to(x.dtype)
        mean = None if mean is None else mean.reshape(x.shape).to(x.dtype)
    else:
        result, mean = _take_into(out, mean_out, x, step, with_mean, backend)
    return result, slope if return_mean and isinstance(slope, Tensor) else mean


def _flat_step(
    x: Tensor, slope: Field | Tensor, history: Tensor | None, levels: tuple[Any, Any, Any]
) -> OdeStep:
    """The step on rows (B, N), in float32 where x has half precision."""
    dtype = torch.float32 if x.dtype in _HALF else x.dtype
    field = slope if isinstance(slope, Field) else None
    return OdeStep(
        x=_flat(x, dtype),
        slope=_flat(slope.x if isinstance(slope, Field) else slope, dtype),
        field_z=None if field is None else _typed(field.z, dtype),
        history=None if history is None else _flat(history, dtype),
        levels=_stacked(x, levels),
        gamma=5.0 if field is None else float(field.gamma),
        z_exp=0.0 if field is None else float(field.z_exp),
        exact=field is None or field.substitution == "exact",
    )


def _take_into(
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
        ops.ode_step.check_separate(out, mean_out)
    if triton_direct.step(step, with_mean, flat_out, flat_mean, backend) is None:
        ops.ode_step.compute_into(step, flat_out, flat_mean, backend)
    if not _is_flat(out, dtype):
        out.copy_(flat_out.view(x.shape))
    if mean_out is not None and flat_mean is not None and not _is_flat(mean_out, dtype):
        mean_out.copy_(flat_mean.view(x.shape))
    return out, mean_out


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
    """Whether a step in this dtype can be written to a view (B, N) of out."""
    return out.dtype == dtype and (out.ndim == 2 or out.is_contiguous())


def _flat_output(name: str, out: Tensor, x: Tensor, dtype: torch.dtype) -> Tensor:
    """A view (B, N) of out, or new memory to be copied to out."""
    if not isinstance(out, Tensor):
        raise TypeError(f"{name} is a {type(out).__name__}; allowed is a torch.Tensor.")
    if out.shape != x.shape or out.dtype != x.dtype:
        raise ValueError(
            f"{name} has shape {tuple(out.shape)} and dtype {out.dtype}; allowed are those of x, "
            f"{tuple(x.shape)} and {x.dtype}."
        )
    if out.device != x.device:
        raise ValueError(
            f"{name} is on {out.device} and x on {x.device}; both must be on one device."
        )
    rows, features = x.shape[0], math.prod(x.shape[1:])
    if _is_flat(out, dtype):
        return out.view(rows, features)
    return torch.empty(rows, features, dtype=dtype, device=x.device)
