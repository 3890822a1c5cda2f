"""Signals that end a call at once, or are recorded until the step is done."""

import inspect
import signal
import sys
import threading

import pytest

from pfgm.training.signals import Signals, Terminated, record_signals

NUMBERS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


@pytest.fixture(autouse=True)
def handlers():
    """Handlers that list what reaches them. They are in place again after each recording."""
    arrived = []

    def handler(number, frame):
        arrived.append(number)

    before = {number: signal.signal(number, handler) for number in NUMBERS}
    yield arrived
    assert all(signal.getsignal(number) is handler for number in NUMBERS)
    for number, previous in before.items():
        signal.signal(number, previous)


def test_the_second_signal_acts_as_before_and_hang_ups_are_recorded(handlers):
    with record_signals() as received:
        for number in (signal.SIGHUP, signal.SIGHUP, signal.SIGTERM, signal.SIGHUP):
            signal.raise_signal(number)
        assert received == [1, 1, 15, 1]
        assert not handlers
        signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGINT)
        assert handlers == [15, 2]
        assert received == [1, 1, 15, 1]


def test_a_call_ends_at_the_signal_and_no_other_begins(handlers):
    with record_signals() as received:
        assert received.call(lambda: 3) == 3
        signal.raise_signal(signal.SIGHUP)  # between calls it waits for the step
        assert received.call(lambda: pytest.fail("the call began")) is None
    with record_signals() as received:

        def work():
            signal.raise_signal(signal.SIGTERM)
            pytest.fail("the call goes on")

        assert received.call(work) is None
        assert received == [15]
    assert not handlers


def test_a_second_signal_does_not_end_what_the_first_has_ended():
    """While the call puts things in order, a hang-up is recorded alone."""
    ordered = []
    with record_signals() as received:

        def work():
            try:
                signal.raise_signal(signal.SIGTERM)
            finally:
                signal.raise_signal(signal.SIGHUP)
                ordered.append("all")

        assert received.call(work) is None
        assert received == [15, 1]
    assert ordered == ["all"]


def test_a_signal_after_the_work_does_not_lose_its_result():
    source, first = inspect.getsourcelines(Signals.call)
    last = first + next(i for i, line in enumerate(source) if "return result" in line)

    def trace(frame, event, argument):
        if (frame.f_code, event, frame.f_lineno) == (Signals.call.__code__, "line", last):
            signal.raise_signal(signal.SIGTERM)
        return trace

    before = sys.gettrace()
    with record_signals() as received:
        sys.settrace(trace)
        try:
            assert received.call(lambda: 3) == 3
        finally:
            sys.settrace(before)
        assert received == [15]


def test_what_the_call_raises_itself_is_raised():
    with record_signals() as received:

        def ends():
            raise Terminated(signal.SIGHUP)

        def fails():
            raise KeyError("figure")

        with pytest.raises(Terminated) as caught:
            received.call(ends)
        assert caught.value.code == 129
        with pytest.raises(KeyError):
            received.call(fails)
        signal.raise_signal(signal.SIGTERM)  # nothing is left that would end at once
        assert received == [15]
    assert Terminated().code == 143


def test_other_threads_record_nothing_and_ignored_signals_stay_ignored():
    seen = []

    def work():
        with record_signals() as received:
            seen.append(received.call(lambda: 5))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [5]
    for ignored in (signal.SIGHUP, signal.SIGINT):
        handler = signal.signal(ignored, signal.SIG_IGN)
        with record_signals() as received:
            signal.raise_signal(ignored)
            assert received == []
            signal.raise_signal(signal.SIGTERM)
            assert received == [15]
            assert signal.getsignal(ignored) is signal.SIG_IGN
        signal.signal(ignored, handler)
