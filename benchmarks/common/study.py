"""A study: a table of settings, a measure, and perhaps a picture. Its module is a command."""

from __future__ import annotations

import argparse
import functools
import json
from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch

from benchmarks.common.commands import name_backend, new_parser
from benchmarks.common.folders import RESULTS
from benchmarks.common.machine import store
from benchmarks.common.rows import Row, markdown


class Study(NamedTuple):
    """What a command measures. Its rows are in results/NAME.json."""

    name: str
    settings: Callable[[argparse.Namespace], Iterable[Row]]
    """The settings, in the order in which they are measured. The iterator may read
    :func:`known_rows` for what earlier ones have shown."""
    measure: Callable[..., Row]
    """The figures of a setting: measure(options, **setting)."""
    shown: Callable[[list[Row]], list[Row]] = list
    """The rows that are printed, such as means, from all that were measured."""
    draw: Callable[[list[Row], argparse.Namespace], object] | None = None
    """Draws the picture of the documentation."""
    add_arguments: Callable[[argparse.ArgumentParser], None] | None = None
    threads: int | None = None
    """The number of torch's threads, if the figures depend on it."""


def known_rows(name: str) -> list[Row]:
    """The rows in results/NAME.json."""
    path = RESULTS / f"{name}.json"
    rows: list[Row] = json.loads(path.read_text())["result"] if path.exists() else []
    return rows


def measured(
    name: str, settings: Iterable[Row], measure: Callable[..., Row], *, again: bool = False
) -> list[Row]:
    """The rows {**setting, **figures} of the settings.

    A setting that has a row in results/NAME.json is measured only if it is to be measured again.
    The file is written after each new row.
    """
    chosen = []
    for setting in settings:
        rows = known_rows(name)
        place = next((i for i, r in enumerate(rows) if setting.items() <= r.items()), len(rows))
        if again or place == len(rows):
            rows[place : place + 1] = [{**setting, **measure(**setting)}]
            store(name, rows)
            print(rows[place], flush=True)
        chosen.append(rows[place])
    return chosen


def run(study: Study, doc: str | None) -> None:
    """The command of a study."""
    name_backend()
    parser = new_parser(doc)
    parser.add_argument("--again", action="store_true", help="measure what has a row, too")
    if study.draw:
        parser.add_argument("--draw", action="store_true", help="draw the documentation's picture")
    if study.add_arguments:
        study.add_arguments(parser)
    options = parser.parse_args()
    if study.threads:
        torch.set_num_threads(study.threads)
    rows = measured(
        study.name,
        study.settings(options),
        functools.partial(study.measure, options),
        again=options.again,
    )
    print(markdown(study.shown(rows)))
    if study.draw and options.draw:
        study.draw(rows, options)
