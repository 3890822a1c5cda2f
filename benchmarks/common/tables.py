"""Markdown tables, and pages that show them between two marks."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from benchmarks.common.commands import new_parser


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def format_seconds(value: float) -> str:
    """A time with its unit, such as "1.23 ms"."""
    for unit, factor in (("s", 1.0), ("ms", 1e3), ("µs", 1e6)):
        if value * factor >= 1:
            return f"{value * factor:.3g} {unit}"
    return f"{value * 1e6:.2g} µs"


def with_headings(parts: Mapping[str, str], level: int) -> str:
    """Texts below their headings."""
    return "\n\n".join(f"{'#' * level} {title}\n\n{text}" for title, text in parts.items())


class Section(NamedTuple):
    """The part of a page that a command writes, between two marks."""

    page: Path
    name: str

    def replaced(self, text: str, content: str) -> str:
        """The page's text with the content between the marks."""
        begin, end = f"<!-- {self.name}: begin -->", f"<!-- {self.name}: end -->"
        before, rest = text.split(begin)
        _, after = rest.split(end)
        return f"{before}{begin}\n{content}\n{end}{after}"

    def write(self, content: str) -> None:
        """Puts the content between the marks of the page."""
        self.page.write_text(self.replaced(self.page.read_text(), content))


def print_or_write(
    doc: str | None, section: Section, report: Callable[[], str], content: Callable[[], str]
) -> None:
    """The command that prints a report, or with --write puts the content into the page."""
    parser = new_parser(doc)
    parser.add_argument("--write", action="store_true", help=f"write {section.page.name}")
    if parser.parse_args().write:
        section.write(content())
    else:
        print(report())
