"""The command line, one module a command: ``pfgm demo | train | sample | …``."""

from __future__ import annotations

import dataclasses
import functools
import importlib.metadata
import operator
import shlex
import sys
import warnings
from itertools import pairwise
from typing import Annotated, Any, get_type_hints

import tyro

from ..backends import Unavailable
from ..common.files import reserve_standard_descriptors
from ..common.hints import instead_of
from ..common.memory import out_of_memory
from ..common.messages import print_result, unfailing_streams
from ..pretrained import PRETRAINED
from ..training import Diverged
from ..training.processes import ProcessLost
from .check import Check
from .convert import Convert
from .demo import Demo
from .evaluate import Evaluate
from .features import Features
from .help import readable_help
from .info import Info
from .sample import Sample
from .train import Train, starting_config

_DESCRIPTION = (
    "Poisson flow generative models. pfgm COMMAND --help shows the options of a command, pfgm "
    "--version the version."
)
_COMMANDS: tuple[type, ...] = (
    Demo,
    Train,
    Sample,
    Evaluate,
    Features,
    Convert,
    Check,
    Info,
)
_LONG_NAMES = {"-n": "--n", "-o": "--out"}
_MODEL_OPTIONS = ("--checkpoint", "--pretrained")  # of version 0.2
_EXPECTED_ERRORS = (
    ValueError,
    TypeError,
    OSError,
    ImportError,
    Unavailable,
    Diverged,
    ProcessLost,
)


def main(arguments: list[str] | None = None) -> int:
    """Runs one command. Returns 0, or 1 if a check failed.

    If something is wrong, it prints one sentence about it and returns 2.

    If stdout or stderr is closed, messages are dropped and the work is still done.
    """
    reserve_standard_descriptors()
    with unfailing_streams(), warnings.catch_warnings():
        warnings.showwarning = _show_warning
        return _run(sys.argv[1:] if arguments is None else arguments)


def run_command(arguments: list[str]) -> int:
    """Runs one command. Returns 0, or 1 if a check failed; errors are raised."""
    _check_values(arguments)
    return _parse(arguments).run() or 0


def _run(arguments: list[str]) -> int:
    try:
        if arguments == ["--version"]:
            print_result(f"pfgm {importlib.metadata.version('pfgm')}")
        else:
            return run_command(arguments)
    except _EXPECTED_ERRORS as error:
        print(f"pfgm: error: {error}", file=sys.stderr)
        return 2
    except (MemoryError, RuntimeError) as error:
        if not out_of_memory(error):
            raise
        print(f"pfgm: error: {_memory_message(error)}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("pfgm: interrupted", file=sys.stderr)
        return 130
    return 0


def _name(command: type) -> str:
    return command.__name__.lower()


def _parse(arguments: list[str]) -> Any:
    commands: list[Any] = []
    for kind in _COMMANDS:
        name, default = _name(kind), tyro.MISSING_NONPROP
        if kind is Train and arguments[:1] == [name]:
            default = Train(out=tyro.MISSING, settings=starting_config(arguments[1:]))
        # With constructor=, errors of the class reach _run() and are not reworded by tyro.
        subcommand = tyro.conf.subcommand(name, default=default, constructor=kind)
        commands.append(Annotated[Any, subcommand])
    union: Any = functools.reduce(operator.or_, commands)
    with readable_help():
        return tyro.cli(
            union,
            prog="pfgm",
            description=_DESCRIPTION,
            args=arguments,
            config=(tyro.conf.DisallowNone,),  # None is a default, but not a value to type
        )


def _check_values(arguments: list[str]) -> None:
    """Raises ValueError for an empty value, which as a path would mean the current folder, and for
    an option that was removed or has another name here."""
    for kind in _COMMANDS:
        if arguments[:1] == [_name(kind)]:
            _check_names(arguments, _options(kind))
    for before, argument in pairwise(["", *arguments]):
        name, _, value = argument.partition("=") if "=" in argument else (before, "", argument)
        name = _LONG_NAMES.get(name, name)
        if name.startswith("--") and not value:
            raise ValueError(f"{name[2:]} must not be empty.")


def _check_names(arguments: list[str], known: set[str]) -> None:
    for argument in arguments:
        name = argument.partition("=")[0]
        if name in _MODEL_OPTIONS and "model" in known:
            raise ValueError(f"there is no option {name}; type: {_with_model(arguments)}")
        instead = instead_of(name[2:].replace("-", "_"), known) if name[:2] == "--" else None
        if instead is not None:
            raise ValueError(f"there is no option {name}; use --{instead.replace('_', '-')}.")


def _with_model(arguments: list[str]) -> str:
    """The line to type in place of one with the options of version 0.2 that name a model."""
    models, others, rest = [], [], iter(arguments)
    for argument in rest:
        name, equals, value = argument.partition("=")
        if name not in _MODEL_OPTIONS:
            others.append(argument)
            continue
        model = (value if equals else next(rest, "")) or "MODEL"
        models.append(f"./{model}" if name == "--checkpoint" and model in PRETRAINED else model)
    return shlex.join(["pfgm", others[0], *models, *others[1:]])


def _options(kind: type) -> set[str]:
    """The options of a command as the names of their fields, those of groups of options too."""
    names = set()
    for name, each in get_type_hints(kind).items():
        is_group = isinstance(each, type) and dataclasses.is_dataclass(each)
        names |= _options(each) if is_group else {name}
    return names


def _memory_message(error: BaseException) -> str:
    """The text of a MemoryError, or the first line of the allocator's error."""
    lines = str(error).splitlines()
    if isinstance(error, MemoryError) and lines:
        return lines[0]
    return f"there is not enough memory: {lines[0] if lines else 'no reason given'}"


def _show_warning(message: Warning | str, category: type[Warning], *place: Any, **_: Any) -> None:
    """Shows a warning in one line, with the category unless it is a UserWarning."""
    kind = "" if issubclass(category, UserWarning) else f"{category.__name__}: "
    print(f"pfgm: {kind}{message}", file=sys.stderr)
