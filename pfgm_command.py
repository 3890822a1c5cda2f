"""The command ``pfgm``. It shows help and version without torch. Everything else is in pfgm.cli.

This module is outside the package, because importing the package imports torch, which takes
seconds.
"""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import MutableMapping
from typing import Annotated, Any, Union

# The texts of the commands also stand in pfgm.cli, which imports torch; the tests compare them.
COMMANDS = {
    "demo": (
        "Train on scikit-learn's digits, draw samples and measure them: a minute on two cores."
    ),
    "train": (
        "Train a network on the field of your data. Under torchrun its processes train together."
    ),
    "sample": "Draw samples from a trained model, yours or one that comes with the package.",
    "evaluate": (
        "Measure samples, of a model or those in a file or folder, against held-out data."
    ),
    "features": "Train a small classifier of labelled images, for the features of pfgm evaluate.",
    "convert": "Make a checkpoint from a published file of PFGM, PFGM++ or EDM.",
    "check": "Compare the backends with exact results and time them.",
    "info": "Show versions, backends and why the others cannot run, build flags and threads, and "
    "what the networks of the package were trained on.",
}
DESCRIPTION = (
    "Poisson flow generative models. pfgm COMMAND --help shows the options of a command, pfgm "
    "--version the version."
)


def sleep_at_barriers(environment: MutableMapping[str, str] = os.environ) -> None:
    """Makes threads that wait for each other sleep soon, unless the environment says how they wait.

    OpenMP's threads spin for milliseconds at each barrier. If other programs keep the thread that
    they wait for from running, a training step of hundreds of barriers takes seconds. OpenMP reads
    the environment when torch is imported.
    """
    if not environment.keys() & {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME"}:
        environment["GOMP_SPINCOUNT"] = "1000"  # GNU's runtime: some 50 µs
        environment["KMP_BLOCKTIME"] = "0"  # Intel's and LLVM's, in milliseconds


def main() -> int:
    """Runs the command line of this process and returns its exit code."""
    sleep_at_barriers()
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
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # drops the buffered text
        # A broken pipe is no error: the reader has stopped early.
        if not isinstance(error, BrokenPipeError):
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
        Annotated[Any, tyro.conf.subcommand(name, description=description, constructor=_no_command)]
        for name, description in COMMANDS.items()
    )
    union: Any = Union[commands]  # noqa: UP007
    with contextlib.suppress(SystemExit):  # tyro exits after it shows the help
        tyro.cli(union, prog="pfgm", description=DESCRIPTION, args=arguments)


def _no_command() -> None:
    """A placeholder for a command in the help, which shows only names and descriptions."""


if __name__ == "__main__":
    sys.exit(main())
