"""An estimate of the time that a run takes, from its first steps."""

from __future__ import annotations

import time
from collections.abc import Callable

_SKIPPED = 5  # first steps, which take longer
_LEAST_STEPS = 10
_LEAST_SECONDS = 5.0


class TimeLeft:
    """Reports once how long the rest of a run will take.

    The estimate is made after 10 steps that took 5 seconds or more in all.

    Args:
        steps: of the run.
        report: called with a line of text; None reports nothing.
    """

    def __init__(self, steps: int, report: Callable[[str], None] | None) -> None:
        self._steps, self._report = steps, report
        self._seen = 0
        self._since = 0.0

    def after(self, step: int) -> None:
        """To be called after each step."""
        if self._report is None:
            return
        self._seen += 1
        if self._seen == _SKIPPED:
            self._since = time.perf_counter()
        counted = self._seen - _SKIPPED
        seconds = time.perf_counter() - self._since
        if counted < _LEAST_STEPS or seconds < _LEAST_SECONDS:
            return
        left = self._steps - step
        if left > 0:
            self._report(
                f"{left} steps to go: {duration(left * seconds / counted)} at the pace so far, "
                "without evaluations"
            )
        self._report = None


def duration(seconds: float) -> str:
    """A length of time in words, to two digits or so.

    >>> duration(12.3), duration(150), duration(9000), duration(400_000)
    ('12 seconds', '2.5 minutes', '2.5 hours', '4.6 days')
    """
    for name, length in (("days", 86400), ("hours", 3600), ("minutes", 60)):
        if seconds >= 1.5 * length:
            return f"{seconds / length:.2g} {name}"
    return f"{seconds:.0f} seconds"
