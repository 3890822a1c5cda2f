"""Predicts times of the GPU kernels, from their machine code and real data. Needs no GPU.

    python -m benchmarks.machine_code [--only SECTION ...] [--paths PATH ...]
                                      [--fashion-mnist FOLDER] [--write]

Sections:

- data: the work of the kernels on real data (minutes);
- host: the host's time, measured on this machine;
- accesses: wavefronts and transfers of the CUDA kernels, counted while they run on the host, in an
  extension that is built for it with cmake and ninja;
- predicted, variants, backward, loops: compiles the kernels and runs the model (tens of
  minutes);
- published, "held out": the model beside published times.

Each section is stored in benchmarks/results/machine_code.json. ``--paths`` counts only these paths
("triton", for one) in the sections predicted and loops, and keeps what is stored of the others.
``--write`` only puts the stored tables into docs/roofline.md. Needs Triton and, for the CUDA
kernels, an extension built with nvcc.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from benchmarks.common import subjects
from benchmarks.common.commands import new_parser
from benchmarks.machine_code import accesses, host, page, results
from benchmarks.machine_code import sections as counted


def sections(paths: Sequence[str]) -> dict[str, Callable[[], Any]]:
    """The functions that count the sections, by name. Rows of other paths are kept."""
    from benchmarks.machine_code import published  # here, because it needs Triton

    def counts() -> dict[str, Any]:
        found: dict[str, Any] = results.load()["data"]
        return found

    def rows(section: str) -> list[counted.Row]:
        made = {"predicted": counted.predictions, "loops": counted.main_loops}[section]
        stored: list[counted.Row] = results.load().get(section, [])
        return counted.replaced(section, stored, made(counts(), paths))

    return {
        "data": lambda: counted.count_data(results.load().get("data", {})),
        "host": host.measure,
        "accesses": accesses.measure,
        "predicted": lambda: rows("predicted"),
        "variants": lambda: list(counted.variants()),
        "backward": lambda: list(counted.backward(counts())),
        "loops": lambda: rows("loops"),
        "published": lambda: [published.compare(one) for one in published.PUBLISHED],
        "held out": lambda: [published.compare(one) for one in published.HELD_OUT],
    }


def main(arguments: Sequence[str] | None = None) -> int:
    if os.environ.get("TRITON_INTERPRET"):
        print("TRITON_INTERPRET is set; unset it, the interpreter compiles nothing.")
        return 2

    parser = new_parser(__doc__)
    parser.add_argument("--only", nargs="+", choices=results.SECTIONS, default=results.SECTIONS)
    every = (*counted.BACKENDS, *counted.TORCH)
    parser.add_argument("--paths", nargs="+", choices=every, default=every)
    parser.add_argument("--fashion-mnist", type=Path, default=subjects.FASHION_FOLDER)
    parser.add_argument("--write", action="store_true", help="write docs/roofline.md alone")
    options = parser.parse_args(arguments)
    subjects.FASHION_FOLDER = options.fashion_mnist
    if options.write:
        page.SECTION.write(page.report(results.load()))
        return 0
    made = sections(options.paths)
    for section in options.only:
        print(section, flush=True)
        results.store(section, made[section]())
    return 0


if __name__ == "__main__":
    sys.exit(main())
