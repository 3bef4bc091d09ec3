"""Asking a run to stop: by time, by SIGTERM, and by Ctrl-C."""

import os
import signal
from concurrent.futures import ThreadPoolExecutor

import pytest

from ncfm_engine.sources.spread import spread
from ncfm_engine.stop import StopRequest


def test_a_stop_is_requested_when_its_time_is_up():
    assert StopRequest(0).requested
    assert not StopRequest(1000).requested
    assert not StopRequest().requested


@pytest.fixture(autouse=True)
def as_in_a_terminal():
    """What runs in the background of a shell ignores Ctrl-C."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


SAID = "\nstopping in good order; Ctrl-C again stops at once\n"


@pytest.mark.parametrize(("number", "said"), [(signal.SIGTERM, ""), (signal.SIGINT, SAID)])
def test_a_signal_requests_a_stop_instead_of_ending_the_process(number, said, capfd):
    before = signal.getsignal(number)
    with StopRequest() as stop:
        assert not stop.requested
        os.kill(os.getpid(), number)
        assert stop.requested
        assert capfd.readouterr().err == said
    assert signal.getsignal(number) == before


def test_a_request_may_be_entered_twice():
    before = signal.getsignal(signal.SIGINT)
    with StopRequest() as stop:
        with stop:
            pass
        os.kill(os.getpid(), signal.SIGINT)
        assert stop.requested
    assert signal.getsignal(signal.SIGINT) == before


def test_a_thread_may_enter_the_request_of_the_main_one():
    """As `pipeline.run` does in a thread of whoever holds the request."""

    def enter():
        with stop:
            return True

    before = signal.getsignal(signal.SIGINT)
    with StopRequest() as stop:
        with ThreadPoolExecutor(1) as pool:
            assert pool.submit(enter).result()
        os.kill(os.getpid(), signal.SIGINT)
        assert stop.requested
    assert signal.getsignal(signal.SIGINT) == before


def test_nobody_who_hears_it_is_no_error(monkeypatch):
    def broken(file, text):
        raise BrokenPipeError

    monkeypatch.setattr("ncfm_engine.stop.os.write", broken)
    with StopRequest() as stop:
        os.kill(os.getpid(), signal.SIGINT)
        assert stop.requested


@pytest.mark.filterwarnings("ignore:This process .* use of fork")
def test_one_of_several_processes_says_it(capfd, monkeypatch):
    with StopRequest():
        child = os.fork()
        if not child:
            os.kill(os.getpid(), signal.SIGINT)
            os._exit(0)
        os.waitpid(child, 0)
    monkeypatch.setenv("RANK", "0")
    with StopRequest() as stop:
        os.kill(os.getpid(), signal.SIGINT)
        assert stop.requested
    assert capfd.readouterr().err == ""


def handler(job):
    return signal.getsignal(signal.SIGINT)


def test_processes_that_decode_leave_ctrl_c_to_the_one_that_started_them(monkeypatch):
    for name, value in {"START": {}, "ELSE": 0.0}.items():  # even for the little that there is
        monkeypatch.setattr(f"ncfm_engine.sources.spread.{name}", value)
    assert set(spread(handler, range(4), 2)) == {signal.SIG_IGN}


@pytest.mark.parametrize("first", [signal.SIGTERM, signal.SIGINT])
def test_ctrl_c_after_that_ends_it(first):
    with StopRequest() as stop:
        os.kill(os.getpid(), first)
        assert stop.requested
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)


def test_ctrl_c_that_is_ignored_stays_so():
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with StopRequest() as stop:
        os.kill(os.getpid(), signal.SIGINT)
        assert not stop.requested


def test_in_another_thread_which_hears_no_signals_its_time_still_stops_it():
    def work():
        with StopRequest(0) as stop:
            return stop.requested

    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(work).result()
