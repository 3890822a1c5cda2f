"""Makes Markdown of the docstrings' few marks: roles, examples without a heading, and (B, *S)."""

from __future__ import annotations

import re
from typing import Any

import griffe

_ROLE = re.compile(r":(?:func|class|meth|mod|attr):`([^`]+)`")


class Docstrings(griffe.Extension):
    def on_package(self, *, pkg: griffe.Module, **_: Any) -> None:
        self._visit(pkg)

    def _visit(self, obj: griffe.Object) -> None:
        if obj.docstring is not None:
            obj.docstring.value = _markdown(obj.docstring.value, obj)
        for member in obj.members.values():
            if isinstance(member, griffe.Object):
                self._visit(member)


def _markdown(text: str, obj: griffe.Object) -> str:
    def linked(match: re.Match[str]) -> str:
        name = match[1]
        target = name if name.startswith("pfgm") else _resolved(name, obj)
        # Optional: what no page describes stays a name.
        return f'<autoref identifier="{target}" optional>`{name}`</autoref>'

    lines: list[str] = []
    in_example = False
    for line in _ROLE.sub(linked, text).splitlines():
        if line.startswith(">>>") and not in_example:
            lines.append("Examples:")
            in_example = True
        elif not line:
            in_example = False
        if in_example:
            lines.append(f"    {line}")
        else:
            lines.append(line.replace("*S", r"\*S"))
    return "\n".join(lines)


def _resolved(name: str, obj: griffe.Object) -> str:
    """The full name, also of a method that the class of obj inherits."""
    try:
        return obj.resolve(name)
    except griffe.NameResolutionError:
        inherited = {} if obj.parent is None else obj.parent.inherited_members
        return inherited[name].canonical_path if name in inherited else name
