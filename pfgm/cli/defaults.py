"""Help without "(default: None)": an option without a default shows none."""

from __future__ import annotations

import dataclasses
from typing import Annotated, Any

import tyro
from tyro.constructors import ConstructorRegistry, StructConstructorSpec, StructTypeInfo

__all__ = ["without_none"]


def without_none() -> ConstructorRegistry:
    """A registry under which tyro's help of a dataclass shows no default that is None.

    The help of such an option says what happens without it.
    """
    registry = ConstructorRegistry()
    asking = False  # whether the rule below asks tyro for its own answer

    @registry.struct_rule
    def hide(info: StructTypeInfo) -> StructConstructorSpec | None:
        nonlocal asking
        if asking or not dataclasses.is_dataclass(info.type):
            return None
        asking = True
        try:
            found = ConstructorRegistry.get_struct_spec(info)
        finally:
            asking = False
        if not isinstance(found, StructConstructorSpec):
            return None
        fields = tuple(
            dataclasses.replace(field, type=_hidden(field.type)) if field.default is None else field
            for field in found.fields
        )
        return dataclasses.replace(found, fields=fields)

    return registry


def _hidden(kind: Any) -> Any:
    """The same type, of an option whose help shows no default."""
    return Annotated[kind, tyro.conf.arg(help_behavior_hint="")]
