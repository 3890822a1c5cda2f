"""A child process whose hangs and crashes are exceptions."""

import os
import time
from pathlib import Path

import pytest

from pfgm.backends import worker
from pfgm.backends.worker import Lost, values_of

# Without torch, a process starts in no time.
SENDER = f"import runpy; send = runpy.run_path({worker.__file__!r})['sender'](); "
SENDER += "import os, signal, subprocess, sys, time; send(os.getpid()); "


def received(code, seconds=30.0):
    """What a process sent after its number, and why it was lost."""
    values = []
    try:
        values.extend(values_of(SENDER + code, seconds))  # in parts, as they arrive
    except Lost as lost:
        return str(lost)
    return values[1:]


@pytest.mark.parametrize(
    ("code", "reason"),
    [
        ("os.kill(os.getpid(), signal.SIGSEGV)", "the process was ended by SIGSEGV"),
        ("os.kill(os.getpid(), signal.SIGKILL)", "SIGKILL; the system may have no memory left"),
        ("print('CUDA is lost', file=sys.stderr); sys.exit(3)", "status 3: CUDA is lost"),
        ("os._exit(1)", "ended with status 1: nothing was printed"),
        ("int('seven')", "status 1: ValueError: invalid literal for int() with base 10: 'seven'"),
    ],
)
def test_a_crash_has_a_reason(code, reason):
    assert received(code).endswith(reason)


def test_what_was_sent_before_a_crash_arrives():
    values = values_of(SENDER + "send([1, 'two']); os.abort()", 30)
    assert [next(values), next(values)][1] == [1, "two"]
    with pytest.raises(Lost, match="SIGABRT"):
        next(values)


def test_a_hang_ends_with_the_budget_and_all_that_it_has_started():
    values = values_of(SENDER + "send(subprocess.Popen(['sleep', '600']).pid); time.sleep(600)", 3)
    parent, child = next(values), next(values)
    started = time.monotonic()
    with pytest.raises(Lost, match="took more than 3 s, and was stopped"):
        next(values)
    assert time.monotonic() - started < 20
    with pytest.raises(ProcessLookupError):
        os.kill(parent, 0)
    stat, ends = Path(f"/proc/{child}/stat"), time.monotonic() + 10
    while stat.exists() and stat.read_text().split()[2] != "Z":  # until init has taken the orphan
        assert time.monotonic() < ends
        time.sleep(0.05)


def test_printed_text_is_no_value():
    assert received("print('one'); os.write(1, b'two'); send(3)") == [3]


def test_the_process_imports_what_this_one_does_and_forces_no_backend(monkeypatch, tmp_path):
    (tmp_path / "planted.py").write_text("value = 7")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("PFGM_BACKEND", "reference")
    code = "import planted; send(planted.value); send(os.environ.get('PFGM_BACKEND'))"
    assert received(code) == [7, None]
