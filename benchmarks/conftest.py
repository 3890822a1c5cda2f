"""Every stored benchmark carries what it was measured on."""

from __future__ import annotations

from typing import Any

from machine import describe


def pytest_benchmark_update_machine_info(config: Any, machine_info: dict[str, Any]) -> None:
    machine_info["pfgm"] = describe()
