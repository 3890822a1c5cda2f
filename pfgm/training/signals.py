"""Signals that end long work after the step at hand, with nothing lost."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

__all__ = ["Terminated", "noticed"]


class Terminated(SystemExit):
    """SIGTERM or SIGHUP arrived during training; the checkpoint has been written."""

    def __init__(self, number: int = signal.SIGTERM) -> None:
        super().__init__(128 + number)


@contextmanager
def noticed() -> Iterator[list[int]]:
    """SIGINT, SIGTERM and SIGHUP are put into the list; a second of the first two acts as before.

    SIGHUP may come more than once, and beside SIGTERM, where a terminal or a session closes; all of
    that is one wish. A signal that is ignored, as SIGHUP is under nohup, stays ignored.
    """
    received: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield received  # only the main thread is sent signals
        return
    previous: dict[int, Any] = {}

    def restore(*numbers: int) -> None:
        for number in numbers:
            if number in previous:
                signal.signal(number, previous[number])

    def receive(number: int, frame: FrameType | None) -> None:
        received.append(number)
        if number != signal.SIGHUP:
            restore(signal.SIGINT, signal.SIGTERM)

    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        # None is a handler that is not Python's, which could not be put back.
        if signal.getsignal(number) not in (signal.SIG_IGN, None):
            previous[number] = signal.signal(number, receive)
    try:
        yield received
    finally:
        restore(*previous)
