"""Progress bars and lines of text, which cost no work where nobody can read them any more."""

from __future__ import annotations

import io
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from typing import Any

__all__ = ["Unfailing", "progress_bar", "say", "show", "unfailing_streams"]


class Unfailing:
    """A text stream that drops what its own stream does not take.

    The reader of a pipe ends, a terminal closes, a disk fills up, or a process is started without
    the stream (None): nothing of that is an error of the work that the text is about. Characters
    that the encoding lacks are escaped.

    >>> stream = Unfailing(None)
    >>> print("nobody reads this", file=stream)
    """

    def __init__(self, stream: Any) -> None:
        self._stream = stream.stream if isinstance(stream, Unfailing) else stream
        self.failed: BaseException | None = None

    @property
    def stream(self) -> Any:
        """The stream itself."""
        return self._stream

    def __getattr__(self, name: str) -> Any:
        return getattr(_NOWHERE if self._stream is None else self._stream, name)

    def write(self, text: str) -> int:
        """Writes the text if that is possible."""
        if self._stream is not None:
            try:
                self._write(text)
            except (OSError, ValueError) as error:  # ValueError: the stream is closed
                self.failed = error
        return len(text)

    def isatty(self) -> bool:
        """Whether the stream is a terminal; one that is closed is none."""
        try:
            return self._stream is not None and bool(self._stream.isatty())
        except ValueError:
            return False

    def _write(self, text: str) -> None:
        try:
            self._stream.write(text)
        except UnicodeEncodeError as error:
            self._stream.write(
                text.encode(error.encoding, "backslashreplace").decode(error.encoding)
            )

    def flush(self) -> None:
        """Flushes the stream if that is possible."""
        if self._stream is not None:
            try:
                self._stream.flush()
            except (OSError, ValueError) as error:
                self.failed = error

    def leave(self) -> None:
        """Makes sure that the interpreter, which flushes the stream at its end, does not fail."""
        if self._stream is None or self._stream.closed:
            return
        try:
            self._stream.flush()
        except OSError:
            if self._stream in (sys.__stdout__, sys.__stderr__):
                with open(os.devnull, "w") as nowhere:
                    os.dup2(nowhere.fileno(), self._stream.fileno())


_NOWHERE = io.TextIOBase()


@contextmanager
def unfailing_streams() -> Iterator[None]:
    """Makes stdout and stderr :class:`Unfailing`, for a command that runs in its own process."""
    output, errors = Unfailing(sys.stdout), Unfailing(sys.stderr)
    try:
        with redirect_stdout(output), redirect_stderr(errors):
            yield
    finally:
        output.leave()
        errors.leave()


def say(text: str) -> None:
    """Prints what is good to know; without stdout it is dropped."""
    print(text, file=Unfailing(sys.stdout))


def show(text: str) -> None:
    """Prints what a command is for: only a reader who has seen enough is no error.

    Raises:
        OSError: stdout is closed or takes nothing.
    """
    stream = Unfailing(sys.stdout).stream
    if stream is None:
        raise OSError(
            "stdout is closed; allowed is any file, pipe or terminal that can be written."
        )
    shown = Unfailing(stream)
    print(text, file=shown)
    shown.flush()
    if shown.failed is not None and not isinstance(shown.failed, BrokenPipeError):
        reason = getattr(shown.failed, "strerror", None) or shown.failed
        raise OSError(f"stdout cannot be written: {reason}.")


def progress_bar(*arguments: Any, **options: Any) -> Any:
    """A progress bar of tqdm on stderr, with tqdm's arguments; it lives on without stderr."""
    from tqdm.auto import tqdm

    stream = Unfailing(sys.stderr)
    # tqdm asks only sys.stderr itself for its width, unless it is told to ask at each turn.
    return tqdm(*arguments, file=stream, dynamic_ncols=stream.isatty(), **options)
