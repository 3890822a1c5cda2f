"""Signals that end a run after the current step."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any


class Terminated(SystemExit):
    """SIGTERM or SIGHUP arrived during training; the checkpoint has been written."""

    def __init__(self, number: int = signal.SIGTERM) -> None:
        super().__init__(128 + number)


@contextmanager
def record_signals() -> Iterator[list[int]]:
    """Records SIGINT, SIGTERM and SIGHUP in the list that it yields.

    A second SIGINT or SIGTERM acts as it did before. SIGHUP is recorded any number of times: a
    terminal or a session that closes may send several, and SIGTERM as well. A signal that is
    ignored, as SIGHUP is under nohup, stays ignored.
    """
    received: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield received  # only the main thread receives signals
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
        # None is a handler that was not set from Python; it could not be restored.
        if signal.getsignal(number) not in (signal.SIG_IGN, None):
            previous[number] = signal.signal(number, receive)
    try:
        yield received
    finally:
        restore(*previous)
