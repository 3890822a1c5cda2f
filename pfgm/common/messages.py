"""Progress bars and printed text that do not fail where stdout or stderr cannot be written."""

from __future__ import annotations

import functools
import io
import os
import sys
import time
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from typing import Any, TypeVar

T = TypeVar("T")

_MINUTE = 60.0  # seconds
_MANY = 2000  # files or items, whose reading shows a bar unasked


class Unfailing:
    """A text stream over another one. It drops text that the other stream cannot write.

    The reader of a pipe may end, a terminal may close, a disk may fill up, or a process may start
    without the stream (None). The work that prints should not fail then. Characters that the
    encoding lacks are escaped.

    >>> stream = Unfailing(None)
    >>> print("nobody reads this", file=stream)
    """

    def __init__(self, stream: Any) -> None:
        self.stream: Any = stream.stream if isinstance(stream, Unfailing) else stream
        self.failed: BaseException | None = None

    def __getattr__(self, name: str) -> Any:
        return getattr(_EMPTY_STREAM if self.stream is None else self.stream, name)

    def write(self, text: str) -> int:
        """Writes the text if possible."""
        if self.stream is not None:
            try:
                self._write(text)
            except (OSError, ValueError) as error:  # ValueError: the stream is closed
                self.failed = error
        return len(text)

    def isatty(self) -> bool:
        """Whether the stream is an open terminal."""
        try:
            return self.stream is not None and bool(self.stream.isatty())
        except ValueError:
            return False

    def _write(self, text: str) -> None:
        try:
            self.stream.write(text)
        except UnicodeEncodeError as error:
            self.stream.write(
                text.encode(error.encoding, "backslashreplace").decode(error.encoding)
            )

    def flush(self) -> None:
        """Flushes the stream if possible."""
        if self.stream is not None:
            try:
                self.stream.flush()
            except (OSError, ValueError) as error:
                self.failed = error

    def prepare_exit(self) -> None:
        """Flushes the stream now, so that the interpreter's flush at exit cannot fail."""
        if self.stream is None or self.stream.closed:
            return
        try:
            self.stream.flush()
        except OSError:
            if self.stream in (sys.__stdout__, sys.__stderr__):
                with open(os.devnull, "w") as nowhere:
                    os.dup2(nowhere.fileno(), self.stream.fileno())


_EMPTY_STREAM = io.TextIOBase()


@contextmanager
def unfailing_streams() -> Iterator[None]:
    """Makes stdout and stderr :class:`Unfailing` during a block: the whole run of a command."""
    output, errors = Unfailing(sys.stdout), Unfailing(sys.stderr)
    try:
        with redirect_stdout(output), redirect_stderr(errors):
            yield
    finally:
        output.prepare_exit()
        errors.prepare_exit()


def print_notice(text: str) -> None:
    """Prints text that may get lost: it is dropped if stdout cannot be written."""
    print(text, file=Unfailing(sys.stdout))


def print_result(text: str) -> None:
    """Prints the result of a command. A reader that stops reading early is not an error."""
    stream = Unfailing(sys.stdout).stream
    if stream is None:
        raise OSError("stdout must be an open file, pipe or terminal, but it is closed.")
    output = Unfailing(stream)
    print(text, file=output)
    output.flush()
    if output.failed is not None and not isinstance(output.failed, BrokenPipeError):
        reason = getattr(output.failed, "strerror", None) or output.failed
        raise OSError(f"stdout cannot be written: {reason}.")


class _LineAMinute:
    """The stream of a progress bar where there is no terminal: of its states, one a minute."""

    def __init__(self, stream: Unfailing) -> None:
        self._stream, self._due = stream, time.monotonic() + _MINUTE

    def write(self, text: str) -> int:
        state = text.strip()
        if text.startswith("\r") and state and time.monotonic() >= self._due:
            self._due = time.monotonic() + _MINUTE
            self._stream.write(f"{state}\n")
        return len(text)

    def flush(self) -> None:
        self._stream.flush()


@functools.cache
def _tqdm() -> Any:
    with warnings.catch_warnings():  # in a notebook without ipywidgets the bar is text
        warnings.simplefilter("ignore")
        from tqdm.auto import tqdm
    return tqdm


def progress_bar(*arguments: Any, **options: Any) -> Any:
    """A progress bar of tqdm, with its arguments. It does not fail if stderr cannot be written.

    Where stderr is no terminal, such as a log file, it is a line a minute.
    """
    tqdm, stream = _tqdm(), Unfailing(sys.stderr)
    if not stream.isatty():
        return tqdm(*arguments, file=_LineAMinute(stream), **options)
    # tqdm asks this stream for its width only with dynamic_ncols.
    return tqdm(*arguments, file=stream, dynamic_ncols=True, **options)


def reading_bar(
    items: Iterable[T], total: int, progress: bool | None, **options: Any
) -> Iterable[T]:
    """A progress bar over items that are read: None shows it for many items, in a terminal."""
    if progress is None:
        progress = total > _MANY and Unfailing(sys.stderr).isatty()
    bar: Iterable[T] = progress_bar(items, total=total, disable=not progress, **options)
    return bar
