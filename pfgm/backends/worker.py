"""A child process with a budget of time, so that a hang or a crash there is an exception here."""

from __future__ import annotations

import contextlib
import json
import os
import queue
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
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
    environment = {name: os.environ[name] for name in os.environ if name != "PFGM_BACKEND"}
    start = f"import json, sys; sys.path[:] = json.loads(sys.argv[1]); {code}"
    command = [sys.executable, "-c", start, json.dumps(sys.path)]
    lines: queue.SimpleQueue[str] = queue.SimpleQueue()
    end = time.monotonic() + seconds
    with tempfile.TemporaryFile() as errors, contextlib.ExitStack() as stack:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
            env=environment,
            start_new_session=True,
        )
        stack.callback(_stop, process)
        threading.Thread(target=_read, args=(process.stdout, lines.put), daemon=True).start()
        try:
            while line := lines.get(timeout=max(end - time.monotonic(), 0.001)):
                yield json.loads(line)
        except queue.Empty:
            raise Lost(f"took more than {seconds:.0f} s, and was stopped") from None
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(_WAIT)
        if process.returncode:
            errors.seek(0)
            raise Lost(_reason(process.returncode, errors.read().decode(errors="replace")))


def _read(stream: Any, put: Callable[[str], None]) -> None:
    """Passes on the lines of a stream, and an empty one at its end."""
    with stream:
        for line in stream:
            put(line)
    put("")


def _stop(process: subprocess.Popen[str]) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)  # with the compilers that it has started
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(_WAIT)


def _reason(status: int, printed: str) -> str:
    if status < 0:
        names = {int(each): each.name for each in signal.Signals}
        killed = "; the system may have no memory left" if -status == signal.SIGKILL else ""
        return f"the process was ended by {names.get(-status, f'signal {-status}')}{killed}"
    said = [line.strip() for line in printed.splitlines() if line.strip()]
    last = (said or ["nothing was printed"])[-1]
    return f"the process ended with status {status}: {last[:_LONGEST]}"


def sender() -> Callable[[Any], None]:
    """The function of a child process that sends a value, which JSON can hold, to its parent."""
    sent = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what else is printed is no value
    return lambda value: print(json.dumps(value), file=sent, flush=True)


def failure_of(error: Exception) -> str:
    """An exception in a line."""
    text = (str(error).strip().splitlines() or ["no message"])[0]
    return f"{type(error).__name__}: {text[:_LONGEST]}"
