"""A child process with a budget of time, so that a hang or a crash there is an exception here."""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from typing import Any

_WAIT = 10.0  # seconds for a process that was killed to end: a GPU may keep it
_LONGEST = 300  # characters of a reason


class Lost(RuntimeError):
    """A child process ended before its code did: by a signal, an error, or the time."""


def values_of(code: str, seconds: float) -> Iterator[Any]:
    """The values that Python code gives to the function :func:`sender`, in a child process.

    Processes that it has started end with it. It imports from where this process does, and no
    backend is forced in it.

    Raises:
        Lost: the process ended before its code did; the message says why.

    >>> code = "from pfgm.backends.worker import sender; sender()(2)"
    >>> list(values_of(code, seconds=60))
    [2]
    """
    receiver, sending = multiprocessing.Pipe(duplex=False)
    start = f"import json, sys; sys.path[:] = json.loads(sys.argv[2]); {code}"
    command = [sys.executable, "-c", start, str(sending.fileno()), json.dumps(sys.path)]
    end = time.monotonic() + seconds
    with tempfile.TemporaryFile() as printed, receiver, contextlib.ExitStack() as stack:
        with sending:
            process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=printed,
                stderr=subprocess.STDOUT,
                env={name: os.environ[name] for name in os.environ if name != "PFGM_BACKEND"},
                pass_fds=[sending.fileno()],
                start_new_session=True,
            )
        stack.callback(_stop, process)
        with contextlib.suppress(EOFError):
            while receiver.poll(max(end - time.monotonic(), 0)):
                yield receiver.recv()
            raise Lost(f"took more than {seconds:.0f} s, and was stopped")
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(_WAIT)
        if process.returncode:
            printed.seek(0)
            raise Lost(_reason(process.returncode, printed.read().decode(errors="replace")))


def _stop(process: subprocess.Popen[bytes]) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)  # with the compilers that it has started
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(_WAIT)


def _reason(status: int, printed: str) -> str:
    if status < 0:
        killed = "; the system may have no memory left" if -status == signal.SIGKILL else ""
        return f"the process was ended by {signal.Signals(-status).name}{killed}"
    said = [line.strip() for line in printed.splitlines() if line.strip()]
    last = (said or ["nothing was printed"])[-1]
    return f"the process ended with status {status}: {last[:_LONGEST]}"


def sender() -> Callable[[Any], None]:
    """The function of a child process that sends a value to its parent."""
    return Connection(int(sys.argv[1]), readable=False).send


def failure_of(error: Exception) -> str:
    """An exception in a line."""
    text = (str(error).strip().splitlines() or ["no message"])[0]
    return f"{type(error).__name__}: {text[:_LONGEST]}"
