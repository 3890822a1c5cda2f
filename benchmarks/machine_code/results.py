"""The stored counts and predictions: results/machine_code.json, one line per row."""

from __future__ import annotations

import datetime
import json
from typing import Any

from benchmarks.common.folders import RESULTS
from benchmarks.common.machine import describe

PATH = RESULTS / "machine_code.json"
SECTIONS = (
    "data", "host", "accesses", "predicted", "variants", "backward", "loops", "published",
    "held out",
)  # fmt: skip


def load() -> dict[str, Any]:
    """All sections; empty if nothing is stored."""
    if not PATH.exists():
        return {}
    content: dict[str, Any] = json.loads(PATH.read_text())
    return content


def store(section: str, content: Any) -> None:
    """Replaces one section, with the date and the machine.

    Raises:
        ValueError: there is no such section.
    """
    if section not in SECTIONS:
        raise ValueError(f"section is {section!r}; allowed is one of {', '.join(SECTIONS)}.")
    kept = load()
    kept[section] = content
    made = {key: describe()[key] for key in ("processor", "threads", "python", "versions")}
    made["date"] = datetime.date.today().isoformat()
    kept.setdefault("made", {})[section] = made
    PATH.write_text(as_text(kept))


def as_text(content: dict[str, Any]) -> str:
    """JSON with one line for each entry of a section."""
    parts = [f"{json.dumps(name)}: {_section(value)}" for name, value in content.items()]
    return "{\n" + ",\n".join(parts) + "\n}\n"


def _section(value: Any) -> str:
    if isinstance(value, dict):
        lines = [f"  {json.dumps(key)}: {json.dumps(entry)}" for key, entry in value.items()]
        return "{\n" + ",\n".join(lines) + "\n}"
    return "[\n" + ",\n".join(f"  {json.dumps(entry)}" for entry in value) + "\n]"
