"""The operator library "pfgm", and its one registrar.

The arguments of an operator are the fields of named tuples (:mod:`pfgm.core.problems`), one after
another. Its schema, the call with such tuples, and the tuples that its implementations take all
follow from their fields.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import chain, islice
from typing import Any, get_type_hints

import torch
from torch import Tensor

from ..common import transforms

library = torch.library.Library("pfgm", "DEF")

_SCHEMA_TYPES = {
    Tensor: "Tensor",
    Tensor | None: "Tensor?",
    bool: "bool",
    int: "int",
    float: "float",
    str: "str",
}


class Operator:
    """An operator of the library.

    Args:
        name: its name.
        takes: named tuples, and single arguments as a schema has them, such as "str? backend=None".
        returns: the results, as a schema has them.
        types: types in the schema of the fields for which it has another than the annotation.
    """

    def __init__(self, name: str, takes: Sequence[Any], returns: str, **types: str) -> None:
        self.name = name
        self._takes = takes
        arguments = [each for group in takes for each in _arguments(group, types)]
        # An argument is its type, its name and perhaps "=" with a default.
        self._names = [each.split("=")[0].split()[-1] for each in arguments]
        assert len(set(self._names)) == len(self._names), f"{name} has two arguments of one name"
        library.define(f"{name}({', '.join(arguments)}) -> ({returns})")
        self.overload = getattr(torch.ops.pfgm, name).default
        defaults = zip(self._names, self.overload._schema.arguments, strict=True)
        self._defaults = {key: each.default_value for key, each in defaults}

    def __call__(self, *groups: Any) -> Any:
        """Calls the operator with its named tuples and single arguments."""
        return self.overload(*as_arguments(*groups))

    def groups(self, arguments: Sequence[Any], named: dict[str, Any] | None = None) -> list[Any]:
        """The named tuples and single arguments of a call with these arguments."""
        by_name = self._defaults | dict(zip(self._names, arguments, strict=False)) | (named or {})
        values = iter(by_name.values())
        return [
            next(values) if isinstance(group, str) else group(*islice(values, len(group._fields)))
            for group in self._takes
        ]

    def indices(self, *names: str) -> list[int]:
        """The positions of arguments in the schema."""
        return [self._names.index(name) for name in names]

    def register(
        self,
        compute: Callable[..., Any],
        *,
        fake: Callable[..., Any],
        transformed: Callable[..., Any] | None = None,
        gradient: Callable[..., Any] | None = None,
        save: Callable[..., None] | None = None,
    ) -> None:
        """Registers the implementations. The first three take what ``takes`` lists.

        Args:
            compute: the implementation on every device.
            fake: returns empty results of the right shapes, for tracing.
            transformed: the implementation under the transforms of torch.func; None if there is
                none.
            gradient: the backward pass; None for an operator without results.
            save: saves what the backward pass needs; None saves nothing.
        """
        library.impl(self.name, self._implementation(compute), "CompositeExplicitAutograd")
        torch.library.register_fake(f"pfgm::{self.name}", self._implementation(fake), lib=library)
        if transformed is not None:
            library.impl(self.name, self._implementation(transformed), transforms.TRANSFORM_KEY)
        if gradient is not None:
            torch.library.register_autograd(
                f"pfgm::{self.name}", gradient, setup_context=save or save_nothing, lib=library
            )

    def _implementation(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def implementation(*arguments: Any, **named: Any) -> Any:
            return function(*self.groups(arguments, named))

        return implementation


def as_arguments(*groups: Any) -> tuple[Any, ...]:
    """The fields of named tuples, and single arguments, as the arguments of an operator."""
    return tuple(chain.from_iterable(g if isinstance(g, tuple) else (g,) for g in groups))


def _arguments(group: Any, types: dict[str, str]) -> list[str]:
    """The arguments of a schema for a named tuple, or for a single argument."""
    if isinstance(group, str):
        return [group]
    arguments = []
    for name, hint in get_type_hints(group).items():
        argument = f"{types.get(name) or _SCHEMA_TYPES[hint]} {name}"
        if name in group._field_defaults:
            argument += f"={group._field_defaults[name]!r}"
        arguments.append(argument)
    return arguments


def save_nothing(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    """Saves nothing for the backward pass."""


def no_gradient(message: str) -> Callable[..., None]:
    """A backward pass that raises RuntimeError."""

    def gradient(ctx: Any, *gradients: Tensor) -> None:
        raise RuntimeError(message)

    return gradient


def check_like(
    name: str, value: Tensor, x: Tensor, shape: Sequence[int], dtype: torch.dtype
) -> None:
    """Raises ValueError unless value has this shape and dtype, on the device of x."""
    if value.shape != shape or value.dtype != dtype:
        raise ValueError(
            f"{name} must have shape {tuple(shape)} and dtype {dtype}, got {tuple(value.shape)} "
            f"and {value.dtype}."
        )
    if value.device != x.device:
        raise ValueError(f"{name} and x must be on one device, got {value.device} and {x.device}.")
