"""The option ``--store``, which writes what a run measured to results/, one file per module."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import pytest

from benchmarks.common.machine import describe, store
from benchmarks.common.posterior_paths import ONE_THREAD
from pfgm import use_backend

Rows = dict[str, list[dict[str, Any]]]
_STORED = {"native", "native" + ONE_THREAD, "products"}  # the library's; each has its peers' ratios
_FIGURES: pytest.StashKey[Rows] = pytest.StashKey()


def pytest_configure(config: pytest.Config) -> None:
    rows: Rows = defaultdict(list)
    config.stash[_FIGURES] = rows
    describe()  # notes the commit before the run changes the tree


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--store", action="store_true", help="write results/MODULE.json")


def pytest_benchmark_update_machine_info(config: Any, machine_info: dict[str, Any]) -> None:
    machine_info["pfgm"] = describe()


@pytest.fixture(autouse=True)
def _native_unless_named() -> Any:
    """A benchmark that names no backend is one of the native kernels."""
    with use_backend("native"):
        yield


@pytest.fixture(autouse=True)
def _keep_figures(request: pytest.FixtureRequest) -> Any:
    """Keeps the figures of each benchmark, to be written at the end of the session."""
    yield
    benchmark = request.node.funcargs.get("benchmark")
    if benchmark is None or benchmark.disabled or benchmark.stats is None:
        return
    stats = benchmark.stats.stats
    module = request.node.path.stem.removeprefix("bench_")
    request.config.stash[_FIGURES][module].append(
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
        for module, rows in session.config.stash[_FIGURES].items():
            store(module, [r for r in rows if "times as long" not in r or r["path"] in _STORED])
