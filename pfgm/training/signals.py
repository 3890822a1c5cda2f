"""Signals that end a run after the current step, or at once in an evaluation."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any, TypeVar

T = TypeVar("T")


class Terminated(SystemExit):
    """SIGTERM or SIGHUP arrived during training; the checkpoint has been written."""

    def __init__(self, number: int = signal.SIGTERM) -> None:
        super().__init__(128 + number)


class Signals(list[int]):
    """The numbers of the signals that have arrived."""

    _interrupts = False  # whether a signal ends a call

    def arrive(self, number: int) -> None:
        self.append(number)
        if self._interrupts:
            self._interrupts = False
            raise Terminated(number)

    def call(self, function: Callable[[], T]) -> T | None:
        """The result of a function, or None if a signal has arrived, which ends it at once."""
        try:
            self._interrupts = True
            result = None if self else function()
            self._interrupts = False  # inside, where a signal just before it does no harm
            return result
        except Terminated:
            if not self:  # the function has raised it by itself
                raise
            return None
        finally:
            self._interrupts = False


@contextmanager
def record_signals() -> Iterator[Signals]:
    """Records SIGINT, SIGTERM and SIGHUP in the list that it yields.

    A second SIGINT or SIGTERM acts as it did before. SIGHUP is recorded any number of times: a
    terminal or a session that closes may send several, and SIGTERM as well. A signal that is
    ignored, as SIGHUP is under nohup, stays ignored.
    """
    received = Signals()
    if threading.current_thread() is not threading.main_thread():
        yield received  # only the main thread receives signals
        return
    previous: dict[int, Any] = {}

    def restore(*numbers: int) -> None:
        for number in numbers:
            if number in previous:
                signal.signal(number, previous[number])

    def receive(number: int, frame: FrameType | None) -> None:
        if number != signal.SIGHUP:
            restore(signal.SIGINT, signal.SIGTERM)
        received.arrive(number)

    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        # None is a handler that was not set from Python; it could not be restored.
        if signal.getsignal(number) not in (signal.SIG_IGN, None):
            previous[number] = signal.signal(number, receive)
    try:
        yield received
    finally:
        restore(*previous)
