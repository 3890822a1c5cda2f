"""Support for the transforms of torch.func and for forward-mode differentiation.

An operator of torch.library has a gradient, but no tangent and no batching rule. Under a transform
the operations use a :class:`torch.autograd.Function` that has both, or a formula in plain torch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

TRANSFORM_KEY = "FuncTorchDynamicLayerFrontMode"
"""Dispatch key of the implementation that is called inside a transform of torch.func."""


def in_torch_func() -> bool:
    """Whether a transform of torch.func surrounds the call."""
    return torch._C._are_functorch_transforms_active()


def forward_mode() -> bool:
    """Whether the call is in forward-mode differentiation, by torch.func.jvp or dual numbers."""
    return forward_ad._current_level >= 0


def check_no_tangent(name: str, *values: Any) -> None:
    """Raises RuntimeError if a value has a tangent, because the operator would drop it."""
    # Inside an autograd.Function, which computes the tangents itself, values have no tangents.
    if (
        forward_mode()
        and torch._C._is_fwd_grad_enabled()
        and any(
            isinstance(value, Tensor) and forward_ad.unpack_dual(value).tangent is not None
            for value in values
        )
    ):
        raise RuntimeError(
            f"torch.ops.pfgm.{name} has no forward-mode derivative; the functions of pfgm have one."
        )


def batched(value: Tensor) -> bool:
    """Whether a value differs between the samples of a vmap. No branch can depend on it then."""
    functorch = torch._C._functorch
    while functorch.is_functorch_wrapped_tensor(value):
        if functorch.is_batchedtensor(value):
            return True
        value = functorch.get_unwrapped(value)
    return False


class Rowwise(torch.autograd.Function):
    """A function that treats the rows of its tensors separately, with a batching rule."""

    shared: Sequence[int] = ()
    """Positions of the arguments that all rows have in common, such as references."""

    @classmethod
    def vmap(cls, info: Any, in_dims: tuple[Any, ...], *arguments: Any) -> Any:
        return map_rows(cls.apply, info.batch_size, in_dims, arguments, cls.shared)


def map_rows(
    function: Callable[..., tuple[Tensor, ...]],
    samples: int,
    in_dims: Sequence[Any],
    arguments: Sequence[Any],
    shared: Sequence[int],
    *,
    by_rows: bool = True,
) -> tuple[tuple[Tensor, ...], tuple[int | None, ...]]:
    """The batching rule of a function that treats the rows of its tensors separately.

    The rows of all samples go into one call. There is one call for each sample if a shared argument
    differs between samples.

    Args:
        function: takes the arguments, the first of shape (B, ...), and returns tensors (B, ...).
            Results that are not needed are empty, of shape (0,).
        samples, in_dims, arguments: as a ``vmap`` method gets them, as are the results.
        shared: positions of the arguments that all rows have in common, such as references.
        by_rows: whether every result is (B, ...); False means one call for each sample.
    """
    dims = [
        dim if isinstance(argument, Tensor) else None
        for argument, dim in zip(arguments, in_dims, strict=True)
    ]
    placed = [
        argument if dim is None else argument.movedim(dim, 0)
        for argument, dim in zip(arguments, dims, strict=True)
    ]
    if not by_rows or any(dims[place] is not None for place in shared):
        each = [
            function(*(a if d is None else a[k] for a, d in zip(placed, dims, strict=True)))
            for k in range(samples)
        ]
        results = tuple(torch.stack(each_sample) for each_sample in zip(*each, strict=True))
        return results, (0,) * len(results)
    rows = placed[0].shape[0 if dims[0] is None else 1]
    for place, (argument, dim) in enumerate(zip(placed, dims, strict=True)):
        if isinstance(argument, Tensor) and place not in shared:
            if dim is None:
                argument = argument.expand(samples, *argument.shape)
            placed[place] = argument.flatten(0, 1)
    outputs = function(*placed)
    wanted = [len(result) == samples * rows for result in outputs]
    results = tuple(
        result.unflatten(0, (samples, rows)) if want else result
        for result, want in zip(outputs, wanted, strict=True)
    )
    return results, tuple(0 if want else None for want in wanted)
