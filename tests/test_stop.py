"""Asking a run to stop: by time, by SIGTERM, and by Ctrl-C."""

import os
import signal

import pytest

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


@pytest.mark.parametrize(
    ("number", "said"), [(signal.SIGTERM, ""), (signal.SIGINT, "Ctrl-C again stops at once")]
)
def test_a_signal_requests_a_stop_instead_of_ending_the_process(number, said, capfd):
    before = signal.getsignal(number)
    with StopRequest() as stop:
        assert not stop.requested
        os.kill(os.getpid(), number)
        assert stop.requested
        assert said in capfd.readouterr().err
    assert signal.getsignal(number) == before


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
