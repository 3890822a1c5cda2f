"""Which flow, network and batch for which training time, on one thread.

    python -m benchmarks.studies.budget [--data fashion-mnist] [--minutes 3]

It also writes ``pfgm/training/budget.json``, the rows to which ``pfgm train --minutes`` fits its
choice: those of PFGM and PFGM++ in which no other setting is changed, the command and a recipe.

Each run trains with labels for some minutes of processor time, with the learning rate, warm-up and
average that follow from the minutes, as ``pfgm train --minutes`` does. So other work on the machine
hardly matters. ``minutes`` are those of one thread. The figures are those of 1000 samples, 100 of
each label, with 10 evaluations: the Fréchet distance to the held-out images in the features of a
small classifier, and the share of samples to which it gives the label that was asked for.
``cost`` is the time of a step in that of the default network with batches of 32. OT-CFM has
torchcfm's loss, and "defaults" is ``pfgm train`` as it comes, broken off after these minutes. The
rows "pfgm train --minutes" are runs of the command on two threads, with minutes by the clock. Rows
with a number of steps compare the precisions. Figures are those of the better of the schedules
"log" and "rho".

A run that was stopped continues from its checkpoint in ``--out``.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import nn

import pfgm
from benchmarks.common.folders import DOCS
from benchmarks.common.models import model
from benchmarks.common.rows import Row, grouped, select
from benchmarks.common.study import Study, known_rows, run
from benchmarks.studies.flows import (
    CLASSES,
    SAMPLES,
    TRAINING,
    Images,
    Velocity,
    figures,
    images_of,
    matching_loss,
    of_training_images,
)
from pfgm.common.files import write_atomic
from pfgm.evaluation import draw_samples
from pfgm.flows.flow import Flow
from pfgm.integrations.flow_matching import as_denoiser
from pfgm.plotting import quality_curve
from pfgm.training import TrainConfig, Trainer, budget, runs
from pfgm.training.config import Precision
from pfgm.training.processes import Processes
from pfgm.training.rehearsal import seconds_of
from pfgm.training.run_config import Method, RunConfig

_FITTED: dict[str, Method] = {"PFGM": "pfgm", "PFGM++ 128": "pfgm++"}
_METHODS = _FITTED | {"EDM": "edm", "OT-CFM": "edm", "PFGM, defaults": "pfgm"}
COMMAND = "pfgm train --minutes"
RECIPE = "recipes/fashion-mnist.json"
_FASHION = "fashion-mnist"
_DEFAULTS = TrainConfig().schedule._asdict()


class Size(NamedTuple):
    """The sizes of a network, and of its batches."""

    width: int
    multipliers: tuple[int, ...]
    patch: int
    batch: int


class Run(NamedTuple):
    """A training of some minutes of one thread."""

    data: str
    flow: str
    size: Size | None  # None where the command chooses, and for a recipe
    minutes: float  # 0 if the steps are given
    seed: int = 0
    precision: Precision = "bfloat16"
    changes: Mapping[str, Any] = MappingProxyType({})
    """Settings of the training in place of those that follow from the minutes."""


def _runs() -> Iterator[Run]:
    """Sizes on the same data for the same time, then the best of them for other times and flows."""
    best, three = Size(48, (1, 2, 2), 2, 32), (1, 2, 2)
    sizes = [*(Size(64, three, 2, 64), Size(32, three, 2, 64), Size(64, three, 2, 32))]
    for size in (*sizes, Size(64, three, 4, 64), best):
        yield Run(_FASHION, "PFGM", size, 3.0)
    for size in (Size(32, three, 2, 64), Size(48, three, 2, 64)):
        yield Run(_FASHION, "PFGM", size, 9.0)
    for minutes in (3.0, 9.0):
        yield Run(_FASHION, "PFGM++ 128", best, minutes)
    for flow in _FITTED:
        yield Run("digits", flow, Size(24, (1, 2), 1, 64), 1.0, precision="float32")
        yield Run("mnist-5k", flow, best, 3.0)
    yield Run(_FASHION, "EDM", best, 3.0)
    yield Run(_FASHION, "PFGM++ 128", Size(64, three, 2, 32), 3.0)
    yield Run(_FASHION, "PFGM++ 128", best, 3.0, seed=1)
    for flow in ("PFGM++ 128", "PFGM", "EDM", "OT-CFM"):
        yield Run(_FASHION, flow, best, 1.0)
    yield Run("digits", "PFGM", Size(16, (1, 2), 1, 64), 0.25, precision="float32")
    yield Run("mnist-5k", "PFGM", best, 1.0)
    yield Run(_FASHION, "OT-CFM", best, 3.0)
    default = Size(32, (1, 2), 1, 128)
    yield Run(_FASHION, "PFGM, defaults", default, 3.0, precision="float32", changes=_DEFAULTS)
    for size in (Size(96, three, 2, 32), Size(48, three, 2, 128), Size(32, three, 1, 32)):
        yield Run(_FASHION, "PFGM++ 128", size, 3.0)
    for change in ({"warmup": 570}, {"reference_batch": 16384}):
        yield Run(_FASHION, "PFGM++ 128", best, 3.0, changes=change)
    yield Run(_FASHION, "EDM", best, 3.0, seed=1)
    yield Run(_FASHION, "EDM", best, 9.0)
    yield Run("mnist-5k", "PFGM", Size(32, three, 2, 32), 3.0)
    for data, minutes in ((_FASHION, 5.0), (_FASHION, 20.0), ("mnist-5k", 5.0)):
        yield Run(data, COMMAND, None, minutes, precision="auto")
    yield Run(_FASHION, COMMAND, Size(64, three, 2, 32), 20.0, precision="auto")
    yield Run(_FASHION, RECIPE, None, 96.0, precision="auto")
    yield from _precisions(best)
    for minutes, rate in ((1.0, 0.012), (3.0, 0.012), (3.0, 0.006)):
        yield Run(_FASHION, "OT-CFM", best, minutes, changes={"learning_rate": rate})
    yield Run("mnist-5k", "EDM", best, 3.0)
    for changes in ({}, {"learning_rate": 0.012}):
        yield Run("mnist-5k", "OT-CFM", best, 3.0, changes=changes)


def _precisions(size: Size) -> Iterator[Run]:
    """The same steps in each precision, with two seeds."""
    thousand: Mapping[str, Any] = {"minutes": None, "steps": 1000}
    digits = ("digits", "PFGM", Size(24, (1, 2), 1, 64), 0.0)
    for setting in (digits, (_FASHION, "PFGM++ 128", size, 0.0)):
        for seed in (0, 1):
            for precision in ("float32", "bfloat16"):
                yield Run(*setting, seed=seed, precision=precision, changes=thousand)


RUNS = list(_runs())


def trained(row: Run, out: Path) -> tuple[Flow, nn.Module, Row]:
    """The flow and the network of a run, and how long its steps took."""
    assert row.size is not None
    images = images_of(row.data)
    width, multipliers, patch, batch = row.size
    sizes: dict[str, Any] = {"width": width, "multipliers": multipliers, "patch": patch}
    options: dict[str, Any] = {"seed": row.seed, "classes": CLASSES}
    flow, network = model(_METHODS[row.flow], images.train, **options, **sizes)
    if row.flow == "OT-CFM":
        network = as_denoiser(Velocity(network.get_submodule("backbone")))
    unit = _reference_seconds(row)
    name = f"{row.data}-{row.flow}-{width}-{len(multipliers)}-{patch}-{batch}-{row.minutes:g}"
    changed = [f"{name}-{value}" for name, value in row.changes.items()]
    name = "-".join([name, str(row.seed), row.precision, *changed]).replace(" ", "-")
    training: dict[str, Any] = {"minutes": row.minutes, "batch_size": batch}
    training |= {"precision": row.precision, "seed": row.seed} | dict(row.changes)
    config = TrainConfig(**training)
    loss = matching_loss if row.flow == "OT-CFM" else None
    trainer = _trainer(flow, network, images, config, out / name, loss)
    if (out / name / "latest.json").exists():
        trainer.resume()
    network = trainer.train()
    done: Row = {"steps": trainer.step}
    if row.minutes:
        done["cost"] = round(60 * row.minutes / trainer.step / unit, 4)
    return flow, network, done


def _trained_by_command(row: Run, out: Path) -> tuple[Flow, nn.Module, Row]:
    """The flow and the network of a run of the command."""
    sizes = row.size._asdict() if row.size else {}
    name = "-".join([row.data, "command", f"{row.minutes:g}", *map(str, sizes.values())])
    folder, data = out / name.replace(" ", ""), row.data
    if data != _FASHION:
        images, data = images_of(data), f"{folder}.npz"
        write_atomic(
            folder.with_suffix(".npz"),
            lambda file: np.savez(file, x=images.train, labels=images.labels),
        )
    if not (folder / "latest.json").exists():
        torch.set_num_threads(2)
        batch = sizes.pop("batch", None)
        training = TrainConfig(minutes=row.minutes, seed=row.seed, batch_size=batch)
        runs.start(RunConfig(data=data, labels=True, training=training, **sizes), folder)
        torch.set_num_threads(1)
    steps = json.loads((folder / "latest.json").read_text())["step"]
    return _with_choice(row, *pfgm.load(folder), RunConfig.load(folder), steps)


def _trained_by_recipe(row: Run, out: Path) -> tuple[Flow, nn.Module, Row]:
    """The flow and the network of the package, which a recipe has trained."""
    recipe = RunConfig.load(Path(__file__).parents[2] / row.flow)
    steps = recipe.training.steps
    assert steps is not None
    return _with_choice(row, *pfgm.load(row.data), recipe, steps)


def _with_choice(
    row: Run, flow: Flow, network: nn.Module, chosen: RunConfig, steps: int
) -> tuple[Flow, nn.Module, Row]:
    """A trained network, with its sizes and the time of its steps."""
    names = {method: name for name, method in _FITTED.items()}
    batch = chosen.training.batch_for(len(images_of(row.data).train))
    cost = _seconds_of_step(row, flow, network, batch) / _reference_seconds(row)
    size = [chosen.width, [*(chosen.multipliers or ())], chosen.patch, batch]
    choice = {"flow": names[chosen.method], "size": size}
    return flow, network, {"steps": steps, "cost": round(cost, 4), "choice": choice}


def _trainer(
    flow: Flow,
    network: nn.Module,
    images: Images,
    config: TrainConfig,
    out: Path | None = None,
    loss: Any = None,
) -> Trainer:
    options: dict[str, Any] = {"labels": images.labels, "folder": out, "loss": loss}
    trainer = Trainer(flow, network, images.train, config, progress=False, **options)
    trainer._clock = time.process_time
    trainer._time._clock = time.process_time
    return trainer


def _reference_seconds(row: Run) -> float:
    """Seconds of a step of the default network with batches of 32."""
    flow, network = model("pfgm", images_of(row.data).train, classes=CLASSES)
    return _seconds_of_step(row, flow, network, budget.REFERENCE_BATCH)


def _seconds_of_step(row: Run, flow: Flow, network: nn.Module, batch: int) -> float:
    precision: Precision = "bfloat16" if row.precision == "auto" else row.precision
    config = TrainConfig(steps=1, batch_size=batch, precision=precision)
    step = _trainer(flow, network, images_of(row.data), config)._rehearsal()
    return seconds_of([step], Processes(), time.process_time)[0]


def measure(options: argparse.Namespace, flow: str, data: str, **setting: Any) -> Row:
    """Trains a network and measures its samples."""
    if flow == TRAINING:
        floor: Row = of_training_images(data)["10"]
        return floor
    if setting["size"]:
        width, multipliers, patch, batch = setting["size"]
        setting["size"] = Size(width, tuple(multipliers), patch, batch)
    training = {COMMAND: _trained_by_command, RECIPE: _trained_by_recipe}.get(flow, trained)
    process, network, row = training(Run(data, flow, **setting), options.out)
    best: Row = {}
    for schedule in ("log", "rho"):
        sampler: dict[str, Any] = {"solver": "multistep", "schedule": schedule, "steps": 10}
        samples, _ = draw_samples(
            process, network, SAMPLES, seed=setting["seed"], batch_size=250, **sampler
        )
        measured = figures(samples.clamp(-1, 1), data) | {"schedule": schedule}
        if not best or measured["features"] < best["features"]:
            best = measured
    return row | best


def settings(options: argparse.Namespace) -> Iterator[Row]:
    """The runs that the options choose."""
    for data in dict.fromkeys(each.data for each in RUNS):
        if data in options.data:
            yield {"data": data, "flow": TRAINING, "size": [], "minutes": 0, "seed": 0}
    for each in RUNS:
        if each.data in options.data and each.minutes in (options.minutes or [each.minutes]):
            row = each._asdict()
            size = [list(v) if isinstance(v, tuple) else v for v in each.size or ()]
            yield row | {"size": size, "changes": dict(each.changes)}


def rows_of_the_fit(rows: list[Row]) -> list[budget.Row]:
    """What ``budget.json`` holds of these rows."""
    rows = [row | row.get("choice", {}) for row in rows]
    return [
        budget.Row(
            data=f"{row['data']}, {row['flow']}",
            shape=(1, 8, 8) if row["data"] == "digits" else (1, 28, 28),
            width=row["size"][0],
            multipliers=tuple(row["size"][1]),
            patch=row["size"][2],
            batch=row["size"][3],
            cost=row["cost"],
            steps=row["steps"],
            quality=round(row["features"], 3),
        )
        for row in rows
        if row["flow"] in _FITTED and not row["changes"]
    ]


def shown(rows: list[Row]) -> list[Row]:
    """The rows for people, with sizes in words."""
    names = ["data", "flow", "minutes", "seed", "precision"]
    names += ["steps", "features", "recall", "agreement"]
    return [{"size": _named(row)} | {n: row[n] for n in names if n in row} for row in rows]


def draw(rows: list[Row], options: argparse.Namespace) -> None:
    """Draws the distance in features against the minutes: each flow with its best size."""
    del rows, options
    rows = [r for r in select(known_rows("budget"), data=_FASHION) if r["flow"] != TRAINING]
    rows = [r for r in rows if not r["changes"] or r["flow"] not in _FITTED]
    curves = {}
    for (flow,), part in grouped(rows, ["flow"]).items():
        best = [
            min((r for r in part if r["minutes"] == m), key=lambda r: float(r["features"]))
            for m in sorted({r["minutes"] for r in part})
        ]
        curves[flow] = (
            [r["minutes"] for r in best],
            [r["features"] for r in best],
            [0.0] * len(best),
        )
    quality_curve(
        curves,
        DOCS / "images" / "budget.png",
        xlabel="minutes",
        ylabel="Fréchet distance, features",
        title="Fashion-MNIST with labels, 10 evaluations",
        log_y=True,
    )


def _named(row: Row) -> str:
    """The size of a row, and what was changed in it, in words."""
    changes = [
        f"{name} {value}" for name, value in row.get("changes", {}).items() if value is not None
    ]
    if row["flow"] == "PFGM, defaults":
        changes = []
    if not row["size"]:
        return ", ".join(changes)
    width, multipliers, patch, batch = row["size"]
    size = f"width {width}, {' '.join(map(str, multipliers))}, patch {patch}, batch {batch}"
    return ", ".join([size, *changes])


def add_arguments(parser: argparse.ArgumentParser) -> None:
    names = list(dict.fromkeys(each.data for each in RUNS))
    parser.add_argument("--data", nargs="+", choices=names, default=names)
    parser.add_argument("--minutes", nargs="+", type=float, help="these times alone")
    parser.add_argument("--out", type=Path, default=Path("runs/budget"), help="checkpoints")


STUDY = Study("budget", settings, measure, shown, draw, add_arguments, threads=1)

if __name__ == "__main__":
    run(STUDY, __doc__)
    budget.write_rows(rows_of_the_fit(known_rows(STUDY.name)))
