"""Help of the options: each text one paragraph, and None neither a default nor a choice."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from types import NoneType
from typing import Annotated, Any, Union, get_args

import tyro
from tyro.constructors import (
    ConstructorRegistry,
    PrimitiveConstructorSpec,
    PrimitiveTypeInfo,
    StructConstructorSpec,
    StructFieldSpec,
    StructTypeInfo,
)

_HelpText = str | Callable[[], str | None] | None


def readable_help() -> ConstructorRegistry:
    """A registry that changes what tyro's help and errors show of a dataclass.

    - An option that may be None names only its other values.
    - The help shows no default that is None or empty. The text of such an option says what happens
      without it.
    - Lines of a text are joined. tyro keeps the line breaks of the source where lines are indented.
    - The options of a group, a field that is a dataclass, have no prefix. So errors of its class
      are not reworded by tyro.
    """
    registry = ConstructorRegistry()
    asking = False  # whether the rule below asks tyro for its own answer

    @registry.struct_rule
    def change(info: StructTypeInfo) -> StructConstructorSpec | None:
        nonlocal asking
        if asking or not dataclasses.is_dataclass(info.type):
            return None
        asking = True
        try:
            spec = ConstructorRegistry.get_struct_spec(info)
        finally:
            asking = False
        if not isinstance(spec, StructConstructorSpec):
            return None
        return dataclasses.replace(spec, fields=tuple(map(_readable, spec.fields)))

    @registry.primitive_rule
    def leave_out_none(info: PrimitiveTypeInfo) -> PrimitiveConstructorSpec[Any] | None:
        others = tuple(each for each in get_args(info.type) if each is not NoneType)
        if NoneType not in get_args(info.type) or not others:
            return None
        kind: Any = Union[others]  # noqa: UP007
        spec = ConstructorRegistry.get_primitive_spec(PrimitiveTypeInfo.make(kind, info.markers))
        if not isinstance(spec, PrimitiveConstructorSpec):
            return None
        return dataclasses.replace(
            spec, str_from_instance=lambda x: [] if x is None else spec.str_from_instance(x)
        )

    return registry


def _readable(field: StructFieldSpec) -> StructFieldSpec:
    """The same option with another help."""
    kind: Any = field.type
    if field.default is None or field.default in ((), {}):
        kind = Annotated[kind, tyro.conf.arg(help_behavior_hint="")]
    if dataclasses.is_dataclass(field.type):
        kind = Annotated[kind, tyro.conf.arg(name="")]
    return dataclasses.replace(field, type=kind, helptext=_paragraph(field.helptext))


def _paragraph(text: _HelpText) -> _HelpText:
    """The text in one line. A function, which tyro calls only if it shows the help, stays one."""
    if callable(text):
        return lambda: _paragraph_of(text())
    return _paragraph_of(text)


def _paragraph_of(text: str | None) -> str | None:
    return None if text is None else " ".join(text.split())
