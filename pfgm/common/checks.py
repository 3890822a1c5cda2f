"""Checks of arguments: numbers, shapes, devices and values of tensors."""

from __future__ import annotations

import math
import os
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from numbers import Integral, Real
from typing import Any, TypeGuard, TypeVar

import numpy as np
import torch
from torch import Tensor

_debug = False
R = TypeVar("R")
_FLOAT32 = torch.finfo(torch.float32)
_MAX_REASON = 200  # characters of torch's own message
_MAX_DIMENSIONS = 64  # dimensions of a tensor
_SLACK = 0.01  # by which images may lie outside of [−1, 1]; enlarging can overshoot
_MAX_INT = (1 << 63) - 1  # the largest integer that torch takes
_MAX_SIZES = 64  # values in a tuple of sizes
# The largest allowed radius with D ≤ 1, and with any D. The same as in csrc/cpu/weights.h.
_LARGEST_RADIUS, _LARGEST_OF_ALL = 1e130, 1e150


@contextmanager
def debug_checks(enabled: bool = True) -> Iterator[None]:
    """Checks values on every device while the context is open, for the whole process.

    On the CPU, values that are not finite always raise an error. On other devices a check would
    make the host wait for the device, so NaN propagates unless this context is open. Functions that
    torch.compile or torch.export traces check no values.

    >>> import pfgm
    >>> with pfgm.debug_checks():
    ...     mean = pfgm.posterior_mean(torch.zeros(1, 2), torch.ones(3, 2), r=1.0)
    """
    global _debug
    previous, _debug = _debug, enabled
    try:
        yield
    finally:
        _debug = previous


def is_number(value: object) -> bool:
    """Whether value is a real number of Python or NumPy, but not True or False."""
    return isinstance(value, (int, float, np.integer, np.floating)) and not isinstance(value, bool)


def is_whole(value: object) -> TypeGuard[int]:
    """Whether value is an integer of Python or NumPy, but not True or False."""
    return isinstance(value, Integral) and not isinstance(value, bool)


LARGEST = sys.float_info.max
"""The largest finite number. torch.compile cannot compare a symbolic number with infinity."""


def is_symbolic(*values: float) -> bool:
    """Whether torch.compile is running and one of these numbers is symbolic.

    An operator that took a symbolic number would be compiled again for each value of it. Versions
    of torch that cannot tell whether a number is symbolic do compile again.
    """
    if not torch.compiler.is_compiling():
        return False
    shapes = torch.fx.experimental.symbolic_shapes
    if not hasattr(shapes, "has_static_value"):
        return False
    return not all(shapes.has_static_value(value) for value in values)


def untouched(
    function: Callable[..., R], who: str, names: Sequence[str], /, *values: Any, **named: Any
) -> R:
    """Calls ``function(*values, **named)`` and raises ValueError if it changed a tensor in place.

    The error calls the function ``who`` and the values by their names. The version counter of a
    tensor shows a change without reading the values. A tensor of inference mode has no version
    counter, so the function gets a copy of it.

    >>> untouched(torch.relu_, "net", ["x"], torch.ones(2))
    Traceback (most recent call last):
    ...
    ValueError: net must not change x in place; change a copy, such as x.clone().
    """
    if torch.compiler.is_compiling():  # a compiled graph has no version counters
        return function(*values, **named)
    values = tuple(_versioned(value) for value in values)
    named = {name: _versioned(value) for name, value in named.items()}
    before = [_version(value) for value in (*values, *named.values())]
    result = function(*values, **named)
    arguments = (*zip(names, values, strict=True), *named.items())
    for (name, value), version in zip(arguments, before, strict=True):
        if _version(value) != version:
            raise ValueError(
                f"{who} must not change {name} in place; change a copy, such as {name}.clone()."
            )
    return result


def _versioned(value: Any) -> Any:
    if isinstance(value, Tensor) and value.is_inference():
        with torch.inference_mode(False):
            return value.clone()
    return value


def _version(value: Any) -> int:
    return value._version if isinstance(value, Tensor) else 0


def shape_or_type(value: object) -> str:
    """What an error says of a value that should be a tensor of another shape.

    >>> shape_or_type(torch.zeros(2, 3)), shape_or_type((1, 2))
    ('shape (2, 3)', 'tuple')
    """
    if isinstance(value, Tensor):
        return f"shape {tuple(value.shape)}"
    return type(value).__name__


def check_dimensions(shape: Sequence[object]) -> None:
    """Raises ValueError if a shape has more dimensions than a tensor can have."""
    if len(shape) > _MAX_DIMENSIONS:
        raise ValueError(f"shape must have at most {_MAX_DIMENSIONS} dimensions, got {len(shape)}.")


def check_seed(seed: object) -> None:
    """Raises ValueError unless the generators of torch accept this seed."""
    if not is_whole(seed) or not -(2**63) <= seed < 2**64:
        raise ValueError(f"seed must be an integer from -2^63 to below 2^64, got {seed!r}.")


def out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory could not be allocated."""
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    # The CPU allocator raises a plain RuntimeError.
    texts = ("can't allocate memory", "Storage size calculation overflowed")
    return isinstance(error, RuntimeError) and any(text in str(error) for text in texts)


@contextmanager
def allocating(what: str) -> Iterator[None]:
    """Turns an allocation error in the block into a MemoryError that says what did not fit.

    >>> with allocating("n is 10**15, and so many numbers"):
    ...     torch.empty(10**15)
    Traceback (most recent call last):
    MemoryError: n is 10**15, and so many numbers do not fit into the memory of this machine.
    """
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not out_of_memory(error):
            raise
        raise MemoryError(f"{what} do not fit into the memory of this machine.") from error


def memory_bytes() -> float:
    """Memory of the machine; infinity where the system does not report it."""
    try:
        return float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    except (AttributeError, OSError, ValueError):
        return math.inf


def usable_device(name: str) -> torch.device:
    """The device of this name; "auto" is cuda if there is a GPU, else cpu.

    Raises ValueError if there is no such device, or it cannot be used.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch warns about deprecated device names
        device = known_device(name, "auto")
    try:
        # Reading a value fails on "meta", which holds no values.
        torch.zeros(1, device=device).item()
    except (RuntimeError, AssertionError, ImportError) as error:
        raise ValueError(_device_message(name, _device_reason(error), "auto")) from error
    return device


def known_device(device: object, *others: str) -> torch.device:
    """The device, of itself or its name, if torch knows it and this machine has it.

    Raises ValueError if there is no such device. The error lists ``others`` beside the devices.
    """
    try:
        result: torch.device = torch.device(device)  # type: ignore[call-overload]
    except (RuntimeError, TypeError) as error:
        reason = "torch has no such device."
        raise ValueError(_device_message(device, reason, *others)) from error
    if (missing := _missing(result)) is not None:
        raise ValueError(_device_message(device, missing, *others))
    return result


def _missing(device: torch.device) -> str | None:
    """What this machine lacks for a device; None if torch finds it or cannot tell."""
    if device.type == "mps" and not torch.backends.mps.is_available():
        return "torch finds no GPU of Apple."
    if device.type == "cuda" and not torch.cuda.is_available():
        return "torch finds no GPU that it can use."
    if device.type == "cuda" and (device.index or 0) >= (gpus := torch.cuda.device_count()):
        return f"torch finds {gpus} of these, numbered from 0."
    return None


def _device_message(device: object, reason: str, *others: str) -> str:
    names = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
    names += ["mps"] if torch.backends.mps.is_available() else []
    names += others
    one_of = "one of " if len(names) > 1 else ""
    shown = str(device) if isinstance(device, torch.device) else device
    return f"device must be {one_of}{', '.join(names)}, got {shown!r}: {reason}"


def _device_reason(error: Exception) -> str:
    """Torch's reason why a device cannot be used, in one sentence."""
    reason = (str(error).splitlines() or [type(error).__name__])[0]
    return reason if len(reason) <= _MAX_REASON else f"{reason.partition('. ')[0][:_MAX_REASON]}."


def checks_values(device: torch.device) -> bool:
    """Whether values on this device are checked: always on the CPU, see :func:`debug_checks`.

    A compiled or exported graph cannot look at values.
    """
    return (_on_cpu(device) or _debug) and not torch.compiler.is_compiling()


def debugging() -> bool:
    """Whether values are checked on every device."""
    return _debug


def _on_cpu(device: torch.device) -> bool:
    return device.type == "cpu"


def first_bad_row(values: Tensor) -> int | None:
    """Number of the first row that holds NaN or infinity; None if all rows are finite."""
    if not values.is_floating_point():
        return None
    for start in range(0, len(values), 4096):
        rows = values[start : start + 4096]
        if not bool((finite := rows.isfinite()).all()):
            return start + int((~finite).nonzero()[0, 0])
    return None


def radius_message(radius: Tensor, row: int) -> str:
    """The error for a radius that is not allowed.

    It gives all names that the public functions use for the radius.
    """
    value = radius[row].item()
    if not 0 < value <= LARGEST:
        return f"r, sigma or z must be finite and at least 0, got {value} in row {row}."
    return (
        "r must be at most 1e+130, or with D above 1 at most 1e+130 √D and 1e+150, so that float64 "
        f"holds the weights, got {value} for r, sigma or z in row {row}. With a finite D, r is "
        "sigma √D."
    )


def check_radius(radius: Tensor, D: float) -> None:
    """Raises ValueError for the first radius that is not allowed."""
    most = min(_LARGEST_OF_ALL, _LARGEST_RADIUS * math.sqrt(max(1.0, D)))
    allowed = (radius >= 0) & (radius <= most)
    if not bool(allowed.all()):
        raise ValueError(radius_message(radius, int((~allowed).nonzero()[0])))


def non_finite_message(x: Tensor, references: Tensor) -> str:
    """The error for a distance that is not finite. It names the argument and its first bad row."""
    for argument, values in (("x", x), ("references", references)):
        row = first_bad_row(values)
        if row is not None:
            return f"{argument} must be finite, got NaN or infinity (first in row {row})."
    return f"x and references lie so far apart that their squared distance overflows {x.dtype}."


def range_message(x: Tensor, references: Tensor, row: int) -> str:
    """The error for references that a row of x needs and whose values, or their differences from x,
    its dtype cannot hold."""
    most = torch.finfo(x.dtype).max
    bad = first_bad_row(references.to(x.dtype))
    if bad is None and len(references) > 0:
        return (
            f"x is so far from references that x minus its mean overflows {x.dtype} in row {row} "
            f"of x: differences must be at most {most:.2g}. Use x in torch.float64."
        )
    where = "" if bad is None else f" (first in row {bad})"
    return (
        f"references must be at most {most:.2g} for {x.dtype} x, got larger values{where} that row "
        f"{row} of x needs. Use x in torch.float64."
    )


def least_square(features: int, dtype: torch.dtype) -> float:
    """Where d² + r² is at least this, underflow of squares takes less from it than rounding.

    The same as in csrc/cpu/weights.h.
    """
    limits = torch.finfo(dtype)
    return features * limits.tiny / limits.eps


def underflow_message(x: Tensor, row: int) -> str:
    """The error for a row of x near a reference, at a radius whose square is small too."""
    least = math.sqrt(least_square(math.prod(x.shape[1:]), torch.float64))
    return (
        f"x is so close to references in row {row} of x that the squared distance underflows "
        f"float64: distances must be 0 or at least {least:.1e}, or r, sigma or z at least that."
    )


def check_underflow(nearest: Tensor, radius: Tensor, x: Tensor) -> None:
    """Raises ValueError if a result for x (B, N) depends on squared distances that underflow."""
    least = least_square(x.shape[1], nearest.dtype)
    low = (nearest > 0) & (nearest + radius.square() < least)
    if bool(low.any()):
        raise ValueError(underflow_message(x, int(low.flatten().nonzero()[0])))


def check_range(result: Tensor, x: Tensor, references: Tensor, difference: bool = False) -> None:
    """Raises ValueError if the dtype of x cannot hold a mean over wider references, or x − mean."""
    if references.dtype.itemsize <= x.dtype.itemsize and not difference:
        return
    row = first_bad_row(result.to(x.dtype))
    if row is not None:
        raise ValueError(range_message(x, references, row))


def check_distances(nearest: Tensor, x: Tensor, references: Tensor) -> None:
    """Raises ValueError if a distance is NaN, where values are checked (:func:`checks_values`)."""
    if checks_values(x.device) and bool(nearest.isnan().any()):
        raise ValueError(non_finite_message(x, references))


def layout_hint(shape: Sequence[int], needed: Sequence[int]) -> str:
    """What to do about samples that are images with their channels last, where needed is (C, H, W).

    >>> layout_hint((32, 32, 3), (3, 32, 32))
    ' Channels come first: use x.movedim(-1, 1).'
    >>> layout_hint((2,), (3,))
    ''
    """
    if len(shape) != 3 or tuple(shape) == tuple(needed) or (shape[2], *shape[:2]) != tuple(needed):
        return ""
    return " Channels come first: use x.movedim(-1, 1)."


def check_sample_shape(x: Tensor, shape: tuple[int, ...]) -> None:
    """Raises ValueError unless x has the shape (B, *shape)."""
    if x.ndim == 0 or x.shape[1:] != shape:
        needed = ", ".join(["B", *map(str, shape)])
        hint = layout_hint(x.shape[1:], shape)
        raise ValueError(f"x must have shape ({needed}), got {tuple(x.shape)}.{hint}")


def channels_last(shape: Sequence[int]) -> bool:
    """Whether samples of this shape look like images with channels last."""
    return len(shape) == 3 and shape[2] in (1, 3) and shape[0] not in (1, 3)


def warn_channels_last(shape: Sequence[int]) -> None:
    """Warns the caller of the caller if samples of data look like images with channels last."""
    if channels_last(shape):
        warnings.warn(
            f"data has samples of shape {tuple(shape)}, as images with channels last; networks "
            'take (n, C, H, W): data.movedim(-1, 1), or pfgm.data.open(data, layout="images").',
            stacklevel=3,
        )


def are_float_images(shape: Sequence[int], dtype: torch.dtype) -> bool:
    """Whether data of this shape look like images (n, C, H, W) whose range is not that of bytes."""
    return len(shape) == 4 and shape[1] in (1, 3) and dtype != torch.uint8


def warn_image_range(low: float, high: float, *, stacklevel: int = 3) -> bool:
    """Warns of images whose values, low to high, do not look like [−1, 1].

    Flows train on any values. But pictures and figures take images to lie in [−1, 1]. By default
    the caller of the caller is warned. Returns whether there was a warning.
    """
    if not math.isfinite(low + high):  # an error elsewhere
        return False
    if low >= -1 - _SLACK and high <= 1 + _SLACK and (low < 0 or low == high):
        return False
    option, formula = f"{low:g} {high:g}", "2 * (data - low) / (high - low) - 1"
    if low >= 0 and high <= 255:
        option, formula = ("0 1", "2 * data - 1") if high <= 1 else ("0 255", "data / 127.5 - 1")
    warnings.warn(
        f"data holds images with values from {low:.4g} to {high:.4g}, but images should be in "
        f"[-1, 1], or samples will look washed out or cut off: convert them, by --range {option} "
        f"on the command line, or by {formula} in Python.",
        stacklevel=stacklevel,
    )
    return True


def check_tensor(name: str, value: object) -> None:
    """Raises TypeError unless value is a tensor."""
    if not isinstance(value, Tensor):
        remedy = f"; use torch.as_tensor({name})" if isinstance(value, (np.ndarray, list)) else ""
        raise TypeError(f"{name} must be a torch.Tensor, got {type(value).__name__}{remedy}.")


def check_dense(name: str, values: Tensor) -> None:
    """Raises TypeError for a sparse tensor."""
    if values.layout != torch.strided:
        raise TypeError(
            f"{name} must be a dense tensor, got layout {values.layout}; use {name}.to_dense()."
        )


def check_dtype(name: str, values: Tensor) -> None:
    if values.dtype != torch.uint8 and not values.is_floating_point():
        raise TypeError(
            f"{name} must be uint8 or floating point, got {values.dtype}; use {name}.float()."
        )


def check_floating(name: str, values: object, hint: str = "") -> None:
    """Raises TypeError unless values is a floating-point tensor. The hint is added to the error."""
    if not isinstance(values, Tensor) or not values.is_floating_point():
        kind = values.dtype if isinstance(values, Tensor) else type(values).__name__
        raise TypeError(f"{name} must be a floating-point tensor, got {kind}{hint}.")


def check_at_least_0(name: str, value: float | Tensor) -> None:
    """Raises ValueError unless value is a finite number of at least 0.

    Raises TypeError for a tensor that requires grad: the number has no gradient.
    """
    if isinstance(value, Tensor) and value.requires_grad:
        raise TypeError(f"{name} must be a number, got a tensor that requires grad.")
    if isinstance(value, Tensor) and (value.numel() != 1 or value.is_complex()):
        raise ValueError(
            f"{name} must be a number, got a tensor of {value.dtype} and shape "
            f"{tuple(value.shape)}."
        )
    if not (isinstance(value, Tensor) or is_number(value)) or not 0 <= value <= LARGEST:
        raise ValueError(f"{name} must be a finite number of at least 0, got {value}.")


def positive(name: str, value: Any) -> float:
    """The value as a number of Python. Raises ValueError unless float32 holds it and it is > 0."""
    number = as_number(value)
    if not _FLOAT32.tiny <= number <= _FLOAT32.max:
        raise ValueError(
            f"{name} must be a number above 0 that float32 can hold, {_FLOAT32.tiny:.2g} to "
            f"{_FLOAT32.max:.2g}, got {value}."
        )
    return number


def non_negative(name: str, value: Any) -> float:
    """The value as a number of Python. Raises ValueError unless float32 holds it and it is ≥ 0."""
    number = as_number(value)
    if not 0 <= number <= _FLOAT32.max:
        raise ValueError(
            f"{name} must be a number of at least 0 that float32 can hold, up to "
            f"{_FLOAT32.max:.2g}, got {value}."
        )
    return number


def as_float(value: Any) -> float:
    """A number as a float; infinity for an integer beyond the range of float64.

    >>> as_float(7), as_float(-(10**400))
    (7.0, -inf)
    """
    try:
        return float(value)
    except OverflowError:
        return math.inf if value > 0 else -math.inf


def as_number(value: Any) -> float:
    """A number of NumPy, or a tensor or array of one value, as a number of Python.

    NaN for other types, and for True and False.

    >>> as_number(torch.tensor(2.5)), as_number("2.5")
    (2.5, nan)
    """
    if isinstance(value, (Tensor, np.ndarray)):
        return as_number(value.item()) if math.prod(value.shape) == 1 else math.nan
    if isinstance(value, (bool, np.bool_)):
        return math.nan
    if isinstance(value, (int, float)):
        return value if -LARGEST <= value <= LARGEST else as_float(value)
    return as_float(value) if isinstance(value, Real) else math.nan


def finite_values(name: str, value: Any) -> Tensor:
    """A number, nested lists of numbers, or a tensor or array of them, in float64 on the CPU.

    Raises TypeError if it is something else, and ValueError unless all are finite.
    """
    try:
        if np.iscomplexobj(value) or (isinstance(value, Tensor) and value.is_complex()):
            raise TypeError("complex")
        values = torch.as_tensor(value, dtype=torch.float64, device="cpu").detach()
    except (TypeError, ValueError, RuntimeError, OverflowError) as error:
        raise TypeError(f"{name} must hold real numbers, got {value!r:.80}.") from error
    check_finite(name, values)
    return values


def check_finite(name: str, values: Tensor) -> None:
    """Raises ValueError for NaN or infinity."""
    if not bool(values.isfinite().all()):
        raise ValueError(f"{name} must be finite, got NaN or infinity.")


def check_bool(name: str, value: object) -> None:
    """Raises ValueError unless the value is True or False, such as for the text "false" of JSON."""
    if not isinstance(value, bool):
        raise ValueError(f"{name} must be True or False, got {value!r}.")


def check_choice(name: str, value: str, allowed: Iterable[str]) -> None:
    if not isinstance(value, str) or value not in allowed:
        raise ValueError(f"{name} must be one of {', '.join(allowed)}, got {value!r}.")


def positive_int(name: str, value: Any, most: int = _MAX_INT) -> int:
    """The value as an int. Raises ValueError unless it is an integer from 1 to ``most``."""
    return whole(name, value, 1, most)


def whole(name: str, value: Any, least: int, most: int = _MAX_INT) -> int:
    """The value as an int. Raises ValueError unless it is an integer from least to most."""
    if not is_whole(value) or not least <= value <= most:
        too_large = is_whole(value) and value > most
        limit = f" and at most {most}" if most != _MAX_INT or too_large else ""
        got = type(value).__name__ if isinstance(value, torch.nn.Module) else repr(value)
        raise ValueError(f"{name} must be an integer of at least {least}{limit}, got {got}.")
    return int(value)


def int_tuple(name: str, values: Any, most: int = _MAX_INT) -> tuple[int, ...]:
    """A list or tuple of integers as a tuple.

    Raises ValueError if it is empty or holds anything but integers from 1 to ``most``.
    """
    if not isinstance(values, Sequence) or isinstance(values, str) or len(values) == 0:
        raise ValueError(f"{name} must be a non-empty list or tuple, got {values!r}.")
    if len(values) > _MAX_SIZES:
        raise ValueError(f"{name} must have at most {_MAX_SIZES} values, got {len(values)}.")
    return tuple(positive_int(f"{name}[{i}]", value, most) for i, value in enumerate(values))
