"""Runs ``pfgm demo`` for three seeds, and once with labels.

python -m benchmarks.studies.demo
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Iterator

from benchmarks.common.rows import Row, mean_of
from benchmarks.common.study import Study, run
from pfgm.cli import demo

SEEDS = (0, 1, 2)
TARGETS = {"frechet_distance": "<= 0.75", "precision": ">= 0.80", "recall": ">= 0.75"}


def settings(options: argparse.Namespace) -> Iterator[Row]:
    """The runs."""
    yield from ({"conditional": False, "seed": seed} for seed in SEEDS)
    yield {"conditional": True, "seed": 0}


def measure(options: argparse.Namespace, conditional: bool, seed: int) -> Row:
    """The metrics of a run."""
    with tempfile.TemporaryDirectory() as folder:
        return demo.run(folder, seed=seed, conditional=conditional)


def shown(rows: list[Row]) -> list[Row]:
    """The mean of each metric beside its target."""
    samples = [
        {name: row[name]["samples"] for name in TARGETS} for row in rows if not row["conditional"]
    ]
    means = mean_of(samples)
    return [{"metric": m, "mean": means[m], "target": target} for m, target in TARGETS.items()]


STUDY = Study("demo", settings, measure, shown)

if __name__ == "__main__":
    run(STUDY, __doc__)
