"""The time that a run has used, and what it leaves of its minutes."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from ..common.messages import progress_bar
from .processes import Processes

_OVERRUN = 1.05  # of the minutes, by which the last evaluation may end later
_TIME_BAR = "{desc}: {percentage:3.0f}%|{bar}| {elapsed}<{remaining}{postfix}"
_FIRST_EVALUATION = 0.25  # share of the time at which an evaluation is timed at the latest


class TimeUsed:
    """Seconds of a run, and the share of its minutes, which the learning rate follows.

    The first process decides for all. Training ends early enough for the last evaluation, which is
    taken to last as long as the longest one so far.

    >>> now = iter([0.0, 0.0, 60.0])
    >>> time = TimeUsed(4.0, Processes(), clock=lambda: next(now))
    >>> time.start()
    >>> time.begin()
    >>> time.end_step()
    >>> time.share
    0.25
    """

    def __init__(
        self, minutes: float | None, processes: Processes, clock: Callable[[], float]
    ) -> None:
        self.budget = math.inf if minutes is None else 60.0 * float(minutes)
        """Seconds; infinite without minutes."""
        self.share = 0.0
        """The share of the time for training that is used; 1 if no other step fits."""
        self.before = 0.0
        """Seconds before the clock was started."""
        self.evaluation = 0.0
        """Seconds of the longest evaluation so far."""
        self._processes, self._clock = processes, clock
        self._started: float | None = None
        self._last = 0.0

    @property
    def seconds(self) -> float:
        """Seconds of the run so far, by the clock of this process."""
        return self.before + (0.0 if self._started is None else self._clock() - self._started)

    @property
    def left(self) -> float:
        """Seconds that are left."""
        return max(self.budget - self.seconds, 0.0)

    def start(self, since: float | None = None) -> None:
        """Starts the clock, unless it runs; ``since`` is an earlier time of it."""
        if self._started is None:
            self._started = self._clock() if since is None else since

    def begin(self) -> None:
        """Notes the beginning of the first step or evaluation."""
        self._last = self.seconds

    def stop(self) -> None:
        """Stops the clock, and keeps the time."""
        self.before, self._started = self.seconds, None

    def end_step(self) -> None:
        """Notes the end of a step."""
        if math.isinf(self.budget):
            return
        seconds = self.seconds
        step, self._last = seconds - self._last, seconds
        end = self.budget - self.evaluation
        end = end if end > 0 else self.budget  # no time for another evaluation
        share = 1.0 if seconds + step > end else seconds / end
        self.share = self._processes.of_leader(max(self.share, share))

    def evaluates(self, *, due: bool, last: bool) -> bool:
        """Whether there is an evaluation after this step: if it is due, and there is time for it.

        The first one comes after a quarter of the time at the latest, so that its time is known.
        """
        if last:
            evaluates = self.seconds + self.evaluation <= _OVERRUN * self.budget
        elif not self.evaluation:
            evaluates = due or self.share >= _FIRST_EVALUATION
        else:
            evaluates = due and self.seconds + 2 * self.evaluation <= self.budget
        return self._processes.of_leader(evaluates) > 0

    def end_evaluation(self) -> None:
        """Notes the end of an evaluation that has not been broken off."""
        seconds = self.seconds
        self.evaluation, self._last = max(self.evaluation, seconds - self._last), seconds

    def state(self) -> dict[str, float]:
        """What a checkpoint holds."""
        return {"seconds": self.seconds, "share": self.share, "evaluation": self.evaluation}

    def load(self, state: dict[str, float], minutes_before: float | None) -> None:
        """Goes on from the state of a checkpoint, of a run with these minutes."""
        self.before, self.evaluation = state["seconds"], state["evaluation"]
        same = minutes_before is not None and self.budget == 60.0 * minutes_before
        self.share = state["share"] if same else min(self.before / self.budget, 1.0)


def training_bar(time: TimeUsed, step: int, steps: int | None, *, disable: bool) -> Any:
    """A bar over the steps or the seconds. The time left is from the average of the run."""
    length: dict[str, Any] = {"total": steps, "initial": step, "unit": "step"}
    if steps is None:
        length = {"total": time.budget, "initial": time.seconds, "bar_format": _TIME_BAR}
    return progress_bar(**length, desc="training", smoothing=0, disable=disable)
