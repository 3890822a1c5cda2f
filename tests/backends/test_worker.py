"""A child process whose hangs and crashes are answers."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from pfgm.backends import worker
from pfgm.backends.worker import Worker

# Without torch, a process starts in no time.
SERVE = f"import runpy; serve = runpy.run_path({worker.__file__!r})['serve']; "
RUN = SERVE + "import os, signal, sys, time; serve(lambda code: eval(code))"


@pytest.fixture
def ask():
    with Worker(RUN) as one:
        yield lambda code, limit=30.0: one.ask(code, limit)


@pytest.mark.parametrize(
    ("code", "reason"),
    [
        ("os.kill(os.getpid(), signal.SIGSEGV)", "the process was ended by SIGSEGV"),
        ("os.kill(os.getpid(), signal.SIGKILL)", "SIGKILL; the system may have no memory left"),
        ("os.abort()", "ended by SIGABRT"),
        ("(print('CUDA is lost', file=sys.stderr), sys.stderr.flush(), os._exit(3))",
         "ended with status 3: CUDA is lost"),
        ("os._exit(0)", "ended with status 0: nothing was printed"),
        ("(os.close(1), os.write(1, b''))", None),
    ],
)  # fmt: skip
def test_a_crash_is_an_answer_and_the_next_task_has_another_process(ask, code, reason):
    first = ask("os.getpid()").value
    answer = ask(code)
    assert answer.value is None
    if reason is None:
        assert "Bad file descriptor" in answer.failure
        assert not answer.lost
        assert ask("os.getpid()").value == first
        return
    assert reason in answer.failure
    assert answer.lost
    assert ask("os.getpid()").value not in (first, None)


def test_a_hang_ends_at_the_limit(ask):
    pid = ask("os.getpid()").value
    started = time.monotonic()
    answer = ask("time.sleep(600)", limit=1.0)
    assert answer == (None, "took more than 1 s, and was stopped", True)
    assert time.monotonic() - started < 20
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)
    assert ask("1 + 1").value == 2


def test_what_a_process_has_started_ends_with_it(ask):
    pid = ask("__import__('subprocess').Popen(['sleep', '600']).pid").value
    os.kill(pid, 0)
    ask("time.sleep(600)", limit=0.2)
    stat, ends = Path(f"/proc/{pid}/stat"), time.monotonic() + 10
    while stat.exists() and stat.read_text().split()[2] != "Z":  # until init has taken the orphan
        assert time.monotonic() < ends
        time.sleep(0.05)


def test_an_error_is_an_answer_of_the_same_process(ask):
    pid = ask("os.getpid()").value
    answer = ask("int('seven')")
    assert answer.failure == "ValueError: invalid literal for int() with base 10: 'seven'"
    assert not answer.lost
    assert "MemoryError" in ask("bytearray(1 << 62)").problem
    assert ask("os.getpid()").value == pid


def test_a_process_that_does_not_last_ends_after_an_error():
    with Worker(RUN.replace("eval(code))", "eval(code), lasting=False)")) as one:
        first = one.ask("os.getpid()", 30).value
        assert not one.ask("1 / 0", 30).lost
        assert one.ask("os.getpid()", 30).value not in (first, None)


def test_printed_text_is_no_answer(ask):
    assert ask("(print('one'), os.write(1, b'two'), 3)[-1]").value == 3


def test_a_process_that_does_not_start_is_an_answer():
    with Worker("raise SystemExit('no torch here')") as one:
        answer = one.ask("1", 30)
        assert answer == (None, "the process ended with status 1: no torch here", True)


def test_the_process_imports_what_this_one_does_and_forces_no_backend(ask, monkeypatch, tmp_path):
    (tmp_path / "planted.py").write_text("value = 7")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("PFGM_BACKEND", "reference")
    assert ask("(__import__('planted').value, os.environ.get('PFGM_BACKEND'))").value == [7, None]
