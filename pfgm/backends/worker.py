"""A child process that computes tasks, so that a hang or a crash there is an answer here."""

from __future__ import annotations

import collections
import contextlib
import json
import os
import queue
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from types import TracebackType
from typing import IO, Any, NamedTuple

_START = 120.0  # seconds for a process to import what it needs
_WAIT = 10.0  # seconds for a process that was killed to end: a GPU may keep it
_LONGEST = 300  # characters of a reason
_KEPT_LINES = 20  # of what a process prints


class Answer(NamedTuple):
    """The answer to a task."""

    value: Any = None
    """What the task returned."""
    failure: str | None = None
    """Why there is no value: an error, the signal that ended the process, or the time limit."""
    lost: bool = False
    """Whether the process was lost."""


class Worker:
    """A child process that answers one task after the other. After it is lost, the next task starts
    another one.

    Args:
        code: Python code that the process runs, which calls :func:`serve`. It imports from where
            this process does.

    >>> code = "from pfgm.backends.worker import serve; serve(lambda task: task + 1)"
    >>> with Worker(code) as worker:
    ...     worker.ask(1, limit=60).value
    2
    """

    def __init__(self, code: str) -> None:
        self._code = code
        self._process: subprocess.Popen[str] | None = None
        self._lines: queue.SimpleQueue[str] = queue.SimpleQueue()
        self._printed: collections.deque[str] = collections.deque()
        self._printing = threading.Thread()

    def __enter__(self) -> Worker:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.stop()

    def ask(self, task: Any, limit: float) -> Answer:
        """The answer to a task, which JSON can hold, within a limit in seconds."""
        if self._process is None:
            self._start()
            _, failure = self._line(_START)
            if failure is not None:
                return Answer(failure=failure, lost=True)
        self._send(json.dumps(task))
        line, failure = self._line(limit)
        if failure is not None:
            return Answer(failure=failure, lost=True)
        value, error, goes_on = json.loads(line)
        if not goes_on:
            self.stop()
        return Answer(value, error)

    def _send(self, line: str) -> None:
        assert self._process is not None
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # the end of its output says why
            self._process.stdin.write(line + "\n")
            self._process.stdin.flush()

    def _line(self, limit: float) -> tuple[str, str | None]:
        """The next line of the process, and None; or why there is none, and the process is gone."""
        try:
            line = self._lines.get(timeout=max(limit, 0.001))
        except queue.Empty:
            self.stop()
            return "", f"took more than {limit:.0f} s, and was stopped"
        return line, None if line else self._end()

    def stop(self) -> None:
        """Ends the process."""
        process, self._process = self._process, None
        if process is None:
            return
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)  # with the compilers that it has started
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(_WAIT)
        _close(process)

    def _start(self) -> None:
        environment = {name: os.environ[name] for name in os.environ if name != "PFGM_BACKEND"}
        start = f"import json, sys; sys.path[:] = json.loads(sys.argv[1]); {self._code}"
        process = self._process = subprocess.Popen(
            [sys.executable, "-c", start, json.dumps(sys.path)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            errors="replace",
            env=environment,
            start_new_session=True,
        )
        self._lines = queue.SimpleQueue()
        self._printed = collections.deque(maxlen=_KEPT_LINES)
        _reading(process.stdout, self._lines.put)
        self._printing = _reading(process.stderr, self._printed.append)

    def _end(self) -> str:
        """Why the process has ended."""
        process = self._process
        assert process is not None
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(_WAIT)
        self.stop()
        status = process.returncode or 0
        if status < 0:
            names = {int(each): each.name for each in signal.Signals}
            name = names.get(-status, f"signal {-status}")
            killed = "; the system may have no memory left" if -status == signal.SIGKILL else ""
            return f"the process was ended by {name}{killed}"
        self._printing.join(_WAIT)
        said = [line.strip() for line in self._printed if line.strip()] or ["nothing was printed"]
        return f"the process ended with status {status}: {said[-1][:_LONGEST]}"


def _close(process: subprocess.Popen[str]) -> None:
    assert process.stdin is not None
    with contextlib.suppress(BrokenPipeError):
        process.stdin.close()


def _reading(stream: IO[str] | None, give: Callable[[str], object]) -> threading.Thread:
    """Passes on the lines of a stream, and an empty one at its end, in a thread."""
    assert stream is not None

    def read() -> None:
        with stream:
            for line in stream:
                give(line)
        give("")

    thread = threading.Thread(target=read, daemon=True)
    thread.start()
    return thread


def serve(answer: Callable[[Any], Any], lasting: bool = True) -> None:
    """Answers the tasks of a :class:`Worker`, in its process, until there are no more.

    Args:
        lasting: whether the process goes on after an error.
    """
    # What else is printed must not look like an answer.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    print("ready", file=answers, flush=True)
    for line in sys.stdin:
        try:
            value, failure = answer(json.loads(line)), None
        except Exception as error:
            text = (str(error).strip().splitlines() or ["no message"])[0]
            value, failure = None, f"{type(error).__name__}: {text[:_LONGEST]}"
        goes_on = failure is None or lasting
        print(json.dumps([value, failure, goes_on]), file=answers, flush=True)
        if not goes_on:
            return
