"""Runs ``pfgm demo`` for three seeds, and stores its metrics and their mean.

python -m benchmarks.studies.demo
"""

from __future__ import annotations

import statistics
import tempfile
from typing import Any

from benchmarks.common.commands import name_backend
from benchmarks.common.machine import store
from pfgm.cli import demo

SEEDS = (0, 1, 2)
TARGETS = {"frechet_distance": "<= 0.75", "precision": ">= 0.80", "recall": ">= 0.75"}


def main() -> None:
    name_backend()
    runs: list[dict[str, Any]] = []
    for seed in SEEDS:
        with tempfile.TemporaryDirectory() as folder:
            runs.append(demo.run(folder, seed=seed))
    summary: dict[str, Any] = {
        name: {
            "mean": statistics.mean(run[name]["samples"] for run in runs),
            "target": target,
        }
        for name, target in TARGETS.items()
    }
    summary["fewest samples of a digit"] = min(min(run["samples_per_digit"]) for run in runs)
    summary["most seconds"] = max(run["seconds"]["total"] for run in runs)
    print(summary)
    print(store("demo", {"summary": summary, "runs": runs}))


if __name__ == "__main__":
    main()
