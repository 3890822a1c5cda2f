"""Examines the papers' claims on small data.

    python -m benchmarks.claims [--only NAME ...] [--preset quick|cpu] --out DIR

Trains and measures networks. For each claim NAME it writes tables (CSV), pictures and NAME.json to
DIR; NAME.json has the command, settings, machine, versions and commit. A stopped run continues when
the command is given again.

Runs from a checkout that is installed with the extra ``test``. ``--data`` replaces the preset's
data, for example by fashion-mnist:FOLDER. ``--store`` copies tables and pictures to docs/claims, or
to its folder fashion-mnist.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.util
import sys
from collections.abc import Sequence
from pathlib import Path

from benchmarks.claims.examine import copy_results, examine, keep_preset, prepare
from benchmarks.claims.jobs import processors
from benchmarks.claims.measures import accuracy, data_of
from benchmarks.claims.presets import PRESETS, Preset
from benchmarks.claims.registry import CLAIMS
from benchmarks.common.commands import name_backend, new_parser
from benchmarks.common.folders import DOCS
from pfgm.common.files import check_folder

PUBLISHED = DOCS / "claims"


def parse(arguments: Sequence[str]) -> tuple[argparse.Namespace, Preset]:
    """The command's options, and the preset with the chosen data."""
    parser = new_parser(__doc__, "python -m benchmarks.claims")
    add = parser.add_argument
    add("--out", type=Path, required=True, help="folder for networks and results")
    names = ", ".join(CLAIMS)
    add("--only", nargs="+", choices=CLAIMS, metavar="NAME", help=f"of {names}; all unless given")
    add("--preset", choices=PRESETS, default="quick", help="size of the comparison (%(default)s)")
    add("--data", help="in place of the preset's, such as fashion-mnist:FOLDER")
    add(
        "--workers",
        type=int,
        default=processors(),
        help="processes on the CPU, one thread each (%(default)s)",
    )
    add("--store", action="store_true", help="copy tables and pictures to docs/claims")
    options = parser.parse_args(arguments)
    if options.workers < 1:
        parser.error(f"--workers must be at least 1, got {options.workers}.")
    preset = PRESETS[options.preset]
    return options, dataclasses.replace(preset, data=options.data or preset.data)


def published_folder(preset: Preset) -> Path:
    """Where the documentation keeps the results of these data."""
    name = preset.data.partition(":")[0]
    return PUBLISHED if name == "digits" else PUBLISHED / name


def check_packages() -> None:
    """Fails before the training if a package that is needed later is missing."""
    for package in ("pfgm.kernels", "diffusers", "matplotlib"):
        if importlib.util.find_spec(package) is None:
            raise ImportError(
                f"{package} is not installed, but the claims need it; install it with: "
                "pip install -e '.[test]'"
            )


def run(options: argparse.Namespace, preset: Preset, folder: Path) -> None:
    """Examines the chosen claims."""
    name_backend()
    prepare(preset, folder, options.workers)
    percent = 100 * accuracy(preset, folder)
    print(f"the classifier is right on {percent:.1f} % of the held-out {preset.data}")
    data = f" --data {options.data}" if options.data else ""
    for name in options.only or CLAIMS:
        command = f"python -m benchmarks.claims --only {name} --preset {options.preset}{data}"
        examine(
            name,
            CLAIMS[name],
            preset,
            folder,
            command=f"{command} --out DIR",
            workers=options.workers,
        )
        print(f"{name}: tables, pictures and {name}.json in {options.out}")
        if options.store:
            copy_results(folder, name, published_folder(preset))


def main(arguments: Sequence[str] | None = None) -> int:
    options, preset = parse(sys.argv[1:] if arguments is None else arguments)
    try:
        check_packages()
        data_of(preset)
        folder = check_folder(options.out).resolve()
        keep_preset(preset, folder)
    except (OSError, ValueError, ImportError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    run(options, preset, folder)
    return 0


if __name__ == "__main__":
    sys.exit(main())
