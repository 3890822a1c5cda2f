"""``pfgm check``, and the check that comes before the first run on a GPU."""

from __future__ import annotations

import os
import sys
import time
from dataclasses import dataclass

import torch

from .. import backends
from ..backends import verdicts
from ..common.checks import usable_device
from ..common.messages import print_result
from ..training.locks import FolderInUse, locked

_PAUSE = 1.0  # seconds between looks at the check of another process


@dataclass
class Check:
    """Compare the backends with exact results, time them, and let a GPU's kernels prove
    themselves."""

    quick: bool = False
    """Fewer problems: some 20 seconds in place of a minute."""
    device: str = "auto"
    """auto: cuda if there is a GPU, else cpu."""

    def run(self) -> int:
        report = backends.check(self.device, quick=self.quick, report=_print)
        print_result(str(report))
        return int(bool(report.failures))


def _print(line: str) -> None:
    print(f"pfgm check: {line}", file=sys.stderr)


def proven_device(name: str) -> torch.device:
    """The device of this name. On a GPU without a verdict, ``pfgm check --quick`` runs first.

    Of several processes that start together one checks, and the others wait for it.

    Raises:
        ValueError: there is no such device, or it cannot be used.
    """
    device = usable_device(name)
    while verdicts.needed(device) and not os.environ.get("PFGM_BACKEND"):
        try:
            with locked(verdicts.folder()):
                if verdicts.needed(device):  # another process may have checked before the lock
                    _check_first(device)
            return device
        except FolderInUse:
            time.sleep(_PAUSE)
        except OSError:  # nothing can be kept there, which the check says
            _check_first(device)
            return device
    return device


def _check_first(device: torch.device) -> None:
    _print(f"the kernels have not proved themselves on {device}, so they are checked first")
    report = backends.check(device, quick=True, report=_print)
    _print(f"passed: {', '.join(report.passed) or 'none'}. {report.kept}")
