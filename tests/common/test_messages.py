"""Progress and text for a reader that has closed its stream."""

import io
import os
import sys

import pytest

from pfgm.common import messages
from pfgm.common.messages import (
    Unfailing,
    print_notice,
    print_result,
    progress_bar,
    unfailing_streams,
)


def broken_pipe():
    reader, writer = os.pipe()
    os.close(reader)
    return os.fdopen(writer, "w")


def closed():
    stream = io.StringIO()
    stream.close()
    return stream


def full():
    return open("/dev/full", "w")


STREAMS = {"pipe": broken_pipe, "full": full, "closed": closed, "none": lambda: None}


@pytest.fixture(params=STREAMS)
def stream(request):
    """A stream that cannot be written. Its buffered text is dropped at the end."""
    opened = STREAMS[request.param]()
    yield opened
    if opened is not None and not opened.closed:
        with open(os.devnull, "w") as nowhere:
            os.dup2(nowhere.fileno(), opened.fileno())
        opened.close()


def test_text_is_dropped_where_it_cannot_be_written(stream):
    guarded = Unfailing(Unfailing(stream))
    print("text" * 10_000, file=guarded, flush=True)
    assert guarded.write("text") == 4
    guarded.flush()
    assert not guarded.isatty()
    assert guarded.stream is stream


@pytest.mark.parametrize("name", ["stdout", "stderr"])
def test_progress_continues_on_a_broken_stream(stream, name, monkeypatch):
    monkeypatch.setattr(sys, name, stream)
    print_notice("text" * 10_000)
    assert list(progress_bar(range(50), "steps", mininterval=0)) == [*range(50)]
    with unfailing_streams():
        print("text" * 10_000, flush=True)
        print("text" * 10_000, file=sys.stderr, flush=True)
    assert getattr(sys, name) is stream


def test_writable_text_is_written(capsys, terminal):
    print_notice("a line")
    print_result("what was asked for")
    with progress_bar(total=2, desc="steps") as bar:
        bar.update()
        bar.set_postfix(loss="0.5")
    shown = capsys.readouterr()
    assert shown.out == "a line\nwhat was asked for\n"
    assert "steps" in shown.err
    assert "loss=0.5" in shown.err


def test_progress_is_a_line_a_minute_where_there_is_no_terminal(capsys, monkeypatch):
    now = 0.0
    monkeypatch.setattr(messages.time, "monotonic", lambda: now)
    with progress_bar(total=100, desc="steps", mininterval=0) as bar:
        for step in range(100):
            now = 2.0 * step
            bar.update()
            bar.set_postfix(loss=step)
    lines = capsys.readouterr().err.splitlines()
    assert [line.split("/")[0].split()[-1] for line in lines] == ["31", "61", "91"]
    assert "\r" not in "".join(lines)


def test_characters_that_the_encoding_lacks_are_escaped():
    stream = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    print("0.5 ± 0.1", file=Unfailing(stream), flush=True)
    assert stream.buffer.getvalue() == b"0.5 \\xb1 0.1\n"


def test_requested_output_must_arrive_unless_its_reader_has_closed(monkeypatch):
    monkeypatch.setattr(sys, "stdout", broken_pipe())
    print_result("text")
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    monkeypatch.setattr(sys, "stdout", full())
    with pytest.raises(OSError, match="stdout cannot be written: No space left on device"):
        print_result("text")
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    monkeypatch.setattr(sys, "stdout", None)
    with pytest.raises(OSError, match="stdout must be an open file, pipe or terminal, but it is"):
        print_result("text")
