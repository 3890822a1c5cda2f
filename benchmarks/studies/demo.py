"""Runs ``pfgm demo`` for three seeds.

python -m benchmarks.studies.demo
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import torch

from benchmarks.common.rows import Row, mean_of
from benchmarks.common.study import Study, run
from pfgm.cli.demo import Demo

SEEDS = (0, 1, 2)
TARGETS = {
    "frechet_distance": "<= 0.65",
    "precision": ">= 0.80",
    "recall": ">= 0.75",
    "seconds": "<= 90",
}


def settings(options: argparse.Namespace) -> Iterator[Row]:
    """The runs."""
    yield from ({"seed": seed} for seed in SEEDS)


def measure(options: argparse.Namespace, seed: int) -> Row:
    """The figures of a run, and its time from the command to the pictures."""
    with tempfile.TemporaryDirectory() as folder:
        began = time.perf_counter()
        Demo(Path(folder), seed=seed).run()
        seconds = time.perf_counter() - began
        figures = json.loads((Path(folder) / "evaluation" / "metrics.json").read_text())
    names = ("frechet_distance", "precision", "recall")
    found = {name: figures[name] for name in names}
    return found | {"seconds": seconds, "threads": torch.get_num_threads()}


def shown(rows: list[Row]) -> list[Row]:
    """The mean of each figure beside its target."""
    names = ("frechet_distance", "precision", "recall")
    samples = [
        {name: row[name]["samples"] for name in names} | {"seconds": row["seconds"]} for row in rows
    ]
    means = mean_of(samples)
    return [{"figure": name, "mean": means[name], "target": t} for name, t in TARGETS.items()]


STUDY = Study("demo", settings, measure, shown)

if __name__ == "__main__":
    run(STUDY, __doc__)
