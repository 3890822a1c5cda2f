"""``--store`` keeps what a run measured in results/, one file for each module."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest

from benchmarks.common.machine import describe, store

Rows = dict[str, list[dict[str, Any]]]
_ROWS: pytest.StashKey[Rows] = pytest.StashKey()


def pytest_configure(config: pytest.Config) -> None:
    rows: Rows = defaultdict(list)
    config.stash[_ROWS] = rows
    describe()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--store", action="store_true", help="write results/MODULE.json")


def pytest_benchmark_update_machine_info(config: Any, machine_info: dict[str, Any]) -> None:
    machine_info["pfgm"] = describe()


@pytest.fixture(autouse=True)
def _stored(request: pytest.FixtureRequest) -> Any:
    """Notes what the test gave its benchmark; written at the end of the session."""
    yield
    benchmark = request.node.funcargs.get("benchmark")
    if benchmark is None or benchmark.disabled or benchmark.stats is None:
        return
    stats = benchmark.stats.stats
    request.config.stash[_ROWS][Path(request.node.path).stem.removeprefix("bench_")].append(
        {
            "benchmark": request.node.name,
            "median seconds": stats.median,
            "quartiles": [stats.q1, stats.q3],
            "rounds": stats.rounds,
            **benchmark.extra_info,
        }
    )


def pytest_sessionfinish(session: pytest.Session) -> None:
    if session.config.getoption("--store"):
        for module, rows in session.config.stash[_ROWS].items():
            store(module, rows)
