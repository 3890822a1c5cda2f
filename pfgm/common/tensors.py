"""Helpers for tensors and modules: dtypes, shapes, devices, evaluation mode."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from .checks import check_floating
from .devices import known_device
from .numbers import is_number, is_symbolic
from .wrappers import module_of


def wide_dtype(device: torch.device) -> torch.dtype:
    """float64, or float32 on devices without float64."""
    return torch.float32 if device.type == "mps" else torch.float64


def unfilled(size: int, device: torch.device) -> Tensor:
    """Uninitialised bytes (size,), which the caller writes before it reads them.

    Under :func:`torch.use_deterministic_algorithms` torch fills new tensors, which takes as long as
    a kernel.
    """
    if not torch.are_deterministic_algorithms_enabled():
        return torch.empty(size, dtype=torch.uint8, device=device)
    storage = torch.UntypedStorage(size, device=device)
    return torch.empty(0, dtype=torch.uint8, device=device).set_(storage)


def dequantise(references: Tensor, dtype: torch.dtype) -> Tensor:
    """References in a floating-point dtype. A byte u becomes u/127.5 − 1."""
    values = references.to(dtype)
    return values.div_(127.5).sub_(1) if references.dtype == torch.uint8 else values


def as_int64(name: str, integers: Tensor) -> Tensor:
    """The integers as int64, the only wide dtype with which torch compares and orders."""
    values = integers.long()
    if integers.dtype == torch.uint64 and bool((values < 0).any()):
        raise ValueError(f"{name} must be below 2^63, got {int(values.min()) + 2**64}.")
    return values


def as_labels(name: str, labels: object, count: int) -> Tensor:
    """The labels as int64. Raises an error unless they are a tensor (count,) of integers."""
    if not isinstance(labels, Tensor):
        raise TypeError(
            f"{name} must be a torch.Tensor of integers, of shape ({count},), got "
            f"{type(labels).__name__}."
        )
    if labels.shape != (count,) or labels.is_floating_point() or labels.is_complex():
        raise ValueError(
            f"{name} must be integers of shape ({count},), got {labels.dtype} of shape "
            f"{tuple(labels.shape)}."
        )
    return as_int64(name, labels)


def contiguous(values: Tensor) -> Tensor:
    """The values, copied if their memory holds them in another order or negated."""
    return values.resolve_neg().contiguous()


def contiguous_features(rows: Tensor) -> Tensor:
    """Rows (B, N) with contiguous features, copied if they are not or if their memory is negated.

    Rows may overlap each other.
    """
    rows = rows.resolve_neg()
    return rows if rows.shape[1] <= 1 or rows.stride(1) == 1 else rows.contiguous()


def mark_written(*outputs: Tensor | None) -> None:
    """Tells torch that tensors were written to, as its own operators do."""
    for values in outputs:
        if values is not None and not values.is_inference():
            torch.autograd.graph.increment_version(values)


def flat_rows(samples: Tensor) -> Tensor:
    """Samples (B, *S) as (B, N). Samples without dimensions, (B,), become (B, 1).

    >>> flat_rows(torch.zeros(5, 3, 2)).shape, flat_rows(torch.zeros(5)).shape
    (torch.Size([5, 6]), torch.Size([5, 1]))
    """
    return samples.flatten(1) if samples.ndim > 1 else samples[:, None]


def over_samples(values: Tensor, x: Tensor) -> Tensor:
    """Values (B,) reshaped to broadcast over samples x (B, *S)."""
    return values.view(-1, *[1] * (x.ndim - 1))


def per_row(level: Tensor | float, x: Tensor, name: str = "level") -> Tensor:
    """The level of each of the points x (B, *S), as (B,) in the dtype of x.

    It is a number or a tensor (B,), or (B, 1, …, 1) as in code for EDM.

    >>> per_row(torch.ones(2, 1, 1, 1), torch.zeros(2, 3, 8, 8)).shape
    torch.Size([2])
    """
    check_floating("x", x)
    if not isinstance(level, Tensor):
        most = torch.finfo(x.dtype).max
        if not is_number(level) or not (is_symbolic(level) or 0 <= level <= most):
            raise ValueError(
                f"{name} must be a number of at least 0 that {x.dtype} can hold, got {level!r}."
            )
        return x.new_full(x.shape[:1], level)
    if level.is_complex():
        raise TypeError(f"{name} must be real, got {level.dtype}.")
    rows = x.shape[0]  # len(x) would fix the batch of a traced or exported network
    if level.ndim > 1 and level.shape == (rows, *[1] * (x.ndim - 1)):
        level = level.flatten()
    if level.shape not in ((), (rows,)):
        raise ValueError(
            f"{name} must be a number or have shape ({rows},), one value for each row of x, or "
            f"({rows}, 1, …, 1) with a 1 for each dimension of a sample, got shape "
            f"{tuple(level.shape)}."
        )
    return level.to(x).expand(rows)


def common_device(
    device: torch.device | str | None, generator: torch.Generator | None
) -> torch.device:
    """The device if given, else that of the generator, else the CPU."""
    if generator is None:
        return torch.device("cpu") if device is None else known_device(device)
    if not isinstance(generator, torch.Generator):
        raise TypeError(
            "generator must be a torch.Generator, such as torch.Generator().manual_seed(0), got "
            f"{type(generator).__name__}."
        )
    if device is not None and known_device(device).type != generator.device.type:
        raise ValueError(f"device must be that of generator, {generator.device}, got {device}.")
    return generator.device if device is None else known_device(device)


def network_device(net: Callable[..., Any]) -> torch.device:
    """The device of a module's parameters or buffers; the CPU if it has none."""
    module = module_of(net)
    if module is not None:
        for tensor in (*module.parameters(), *module.buffers()):
            return tensor.device
    return torch.device("cpu")


def parameter_dtype(net: nn.Module, x: Tensor) -> torch.dtype:
    """The dtype of a network's first parameter; that of x if it has none.

    In a replica of nn.DataParallel, and inside FSDP with use_orig_params=False, parameters are
    plain attributes of their modules.
    """
    for parameter in net.parameters():
        return parameter.dtype
    for module in net.modules():
        for value in module.__dict__.values():
            if isinstance(value, Tensor) and value.is_floating_point():
                return value.dtype
    return x.dtype


def is_wider(net: nn.Module, x: Tensor) -> bool:
    """Whether a network is in float64 and x is not."""
    return parameter_dtype(net, x) == torch.float64 and x.dtype != torch.float64


@contextmanager
def evaluating(net: Callable[..., Any]) -> Iterator[None]:
    """Turns gradients off and puts the network in evaluation mode during a block.

    Afterwards each module is in the mode that it was in before.
    """
    module = module_of(net)
    training = [] if module is None else [m for m in module.modules() if m.training]
    try:
        if module is not None:
            module.eval()
        with torch.no_grad():
            yield
    finally:
        for each in training:
            each.training = True
