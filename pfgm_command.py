"""The command ``pfgm``: its help and version come from here, without torch, all else from pfgm.cli.

Whatever stands in the package imports pfgm first, and torch with it, which takes seconds. So this
module stands beside the package.
"""

from __future__ import annotations

import contextlib
import os
import sys
from typing import Annotated, Any, Union

# As the classes of pfgm.cli say it.
COMMANDS = {
    "demo": (
        "Train on scikit-learn's bundled digits, sample, measure, draw: a few minutes on a laptop."
    ),
    "train": (
        "Train a network on the field of your data. Under torchrun its processes train together."
    ),
    "sample": "Draw samples from a checkpoint.",
    "evaluate": (
        "Measure samples, of a checkpoint or those in a file or folder, against held-out data."
    ),
    "info": "Show versions, backends and why the others cannot run, build flags and threads.",
}
DESCRIPTION = "Poisson flow generative models."


def main() -> int:
    """Runs the command line of this process and returns its exit code."""
    arguments = sys.argv[1:]
    if arguments not in (["--version"], ["--help"], ["-h"]):
        try:
            from pfgm.cli import main as run

            return run(arguments)
        except KeyboardInterrupt:  # while torch is imported
            print("pfgm: interrupted", file=sys.stderr)
            return 130
    if sys.stdout is None:
        return 0
    try:
        _show(arguments)
        sys.stdout.flush()
    except OSError as error:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # what is left goes nowhere
        if not isinstance(error, BrokenPipeError):  # else the reader has seen enough
            with contextlib.suppress(OSError):
                print(f"pfgm: error: {error.strerror}", file=sys.stderr)
            return 2
    return 0


def _show(arguments: list[str]) -> None:
    """Prints the version or the help."""
    if arguments == ["--version"]:
        from importlib.metadata import version

        print(f"pfgm {version('pfgm')}")
        return
    import tyro

    commands = tuple(
        Annotated[Any, tyro.conf.subcommand(name, description=description, constructor=_nothing)]
        for name, description in COMMANDS.items()
    )
    union: Any = Union[commands]  # noqa: UP007
    with contextlib.suppress(SystemExit):  # with which the help ends
        tyro.cli(union, prog="pfgm", description=DESCRIPTION, args=arguments)


def _nothing() -> None:
    """Stands for a command of which only the name is shown."""


if __name__ == "__main__":
    sys.exit(main())
