"""Networks and their conditions: keyword arguments whose tensors have one row for each sample."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..common.tensors import as_int64
from ..networks.registry import label_count, label_names, label_number

Network = Callable[..., Any]
"""``net(x, level, **condition)``; the class of the flow says what it returns."""
Condition = Mapping[str, Any]
"""Keyword arguments of a network, such as {"labels": labels}."""


def check_network(net: object, name: str = "net") -> None:
    """Raises TypeError unless net can be called as a network."""
    if isinstance(net, type) or not callable(net):
        kind = f"the class {net.__name__}" if isinstance(net, type) else f"a {type(net).__name__}"
        raise TypeError(
            f"{name} must be a torch.nn.Module, or a function of x and the level, got {kind}."
        )
    signature = _signature(net)
    try:
        signature.bind_partial(None, None)
    except TypeError as error:
        raise TypeError(
            f"{name} must take x and the level, net(x, level), got one that takes "
            f"({', '.join(signature.parameters)})."
        ) from error


def _signature(net: Network) -> inspect.Signature:
    try:
        return inspect.signature(net.forward if isinstance(net, nn.Module) else net)
    except ValueError:  # code that is not Python's shows none, as of torch.jit.trace
        return inspect.signature(lambda *_, **__: None)


def as_condition(
    name: str,
    condition: Condition | None,
    net: Network | None = None,
    x: Tensor | None = None,
) -> Condition:
    """The condition, empty for None, with labels that are a tensor of integers as int64.

    With a network and points x, a list of the names of its labels becomes a tensor. One name is
    that of all points.
    """
    if condition is None:
        return {}
    if not isinstance(condition, Mapping):
        raise TypeError(
            f"{name} must be a dict of keyword arguments of the network, such as {{'labels': "
            f"labels}}, got {type(condition).__name__}."
        )
    labels = condition.get("labels")
    if isinstance(labels, Tensor) and labels.dtype in (torch.uint16, torch.uint32, torch.uint64):
        return {**condition, "labels": as_int64("labels", labels)}
    if x is None or not isinstance(labels, (list, tuple)):
        return condition
    names = label_names(net)
    if not names or not all(isinstance(label, str) for label in labels):
        return condition  # which a network of another library may take
    classes = label_count(net) or len(names)
    found = torch.tensor([label_number(name, names, classes) for name in labels], device=x.device)
    return {**condition, "labels": found.expand(len(x)) if len(found) == 1 else found}


def check_condition(net: Network, condition: Condition, count: int) -> None:
    """Raises ValueError unless the network takes these names and each tensor has count rows."""
    taken = _signature(net).parameters
    kinds = {parameter.kind for parameter in taken.values()}
    for name in condition:
        if name not in taken and inspect.Parameter.VAR_KEYWORD not in kinds:
            others = ", ".join(list(taken)[2:]) or "none"
            raise ValueError(f"condition has {name!r}; the conditions of this network: {others}.")
    check_rows(condition, count)


def check_rows(condition: Condition, count: int) -> None:
    """Raises ValueError unless each tensor of the condition has count rows."""
    for name, value in condition.items():
        if isinstance(value, Tensor) and value.shape[:1] != (count,):
            raise ValueError(
                f"condition[{name!r}] must have {count} rows like x, got shape "
                f"{tuple(value.shape)}."
            )


def map_tensors(condition: Condition, function: Callable[[Tensor], Tensor]) -> Condition:
    """The condition with its tensors replaced, such as by their rows or on another device."""
    return {
        name: function(value) if isinstance(value, Tensor) else value
        for name, value in condition.items()
    }
