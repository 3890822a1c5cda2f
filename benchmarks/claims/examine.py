"""Examines one claim: trains networks, measures them, and writes tables and pictures."""

from __future__ import annotations

import datetime
import json
import shutil
import time
from pathlib import Path

from benchmarks.claims import methods
from benchmarks.claims.claim import Claim
from benchmarks.claims.jobs import Job, Tables, measured_tables, run_jobs
from benchmarks.claims.measures import accuracy, classifier_path, train_classifier
from benchmarks.claims.presets import Preset
from benchmarks.common import machine
from benchmarks.common.rows import Row, write_csv
from pfgm.common.files import write_atomic, write_json


def keep_preset(preset: Preset, folder: Path) -> None:
    """Writes the preset to the folder.

    Raises:
        ValueError: the folder belongs to another preset.
    """
    path = folder / "preset.json"
    content = json.dumps(preset.described(), indent=2) + "\n"
    if path.exists() and path.read_text() != content:
        raise ValueError(
            f"out must be a new folder or have the same settings, got {folder}, which has networks "
            "and figures of other settings (preset.json)."
        )
    write_atomic(path, lambda file: file.write(content.encode()))


def examine(
    name: str, claim: Claim, preset: Preset, folder: Path, *, command: str, workers: int
) -> Tables:
    """Examines a claim, and writes its tables, pictures and circumstances to the folder."""
    started = time.perf_counter()
    train(claim, preset, folder, name, workers)
    trained = time.perf_counter()
    tables = measured_tables(claim.jobs(preset), preset, folder, title=name, workers=workers)
    tables |= claim.derive(tables, preset)
    for table, rows in tables.items():
        write_csv(folder / f"{table}.csv", rows)
    claim.draw(tables, folder)
    circumstances = {
        "claim": claim.title,
        "command": command,
        "date": datetime.date.today().isoformat(),
        "machine": {**machine.describe(), "workers": workers, "threads of a worker": 1},
        # Earlier calls may have trained and measured a part.
        "seconds of the last call": {
            "training": round(trained - started),
            "measuring": round(time.perf_counter() - trained),
        },
        "accuracy of the classifier": accuracy(preset, folder),
        "preset": preset.described(),
    }
    write_json(folder / f"{name}.json", circumstances)
    return tables


def prepare(preset: Preset, folder: Path, workers: int) -> None:
    """Trains the classifier, unless the folder has it."""
    jobs = [] if classifier_path(folder).exists() else [Job("classifier", _classifier, {})]
    for _ in run_jobs(jobs, preset, folder, title="classifier", workers=workers):
        pass


def _classifier(preset: Preset, folder: Path, spec: None) -> list[Row]:
    train_classifier(preset, folder)
    return []


def train(claim: Claim, preset: Preset, folder: Path, name: str, workers: int) -> None:
    """Trains the networks of a claim that the folder lacks."""
    specs = dict.fromkeys(job.spec for job in claim.jobs(preset) if job.spec is not None)
    jobs = [
        Job("networks", _train, {}, spec, preset.steps * (1 + spec.width / preset.width))
        for spec in specs
        if not methods.is_trained(spec, preset, folder)
    ]
    for _ in run_jobs(jobs, preset, folder, title=f"{name}: networks", workers=workers):
        pass


def _train(preset: Preset, folder: Path, spec: methods.Spec) -> list[Row]:
    methods.train(spec, preset, folder)
    return []


def copy_results(folder: Path, name: str, target: Path) -> None:
    """Copies a claim's tables, pictures and circumstances, but not its networks."""
    target.mkdir(parents=True, exist_ok=True)
    for suffix in ("json", "csv", "png"):
        for path in folder.glob(f"{name}*.{suffix}"):
            shutil.copyfile(path, target / path.name)
