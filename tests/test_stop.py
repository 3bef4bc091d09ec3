"""Asking a run to stop: by time, and by SIGTERM."""

import os
import signal

from ncfm_engine.stop import StopRequest


def test_a_stop_is_requested_when_its_time_is_up():
    assert StopRequest(0).requested
    assert not StopRequest(1000).requested
    assert not StopRequest().requested


def test_sigterm_requests_a_stop_instead_of_ending_the_process():
    before = signal.getsignal(signal.SIGTERM)
    with StopRequest() as stop:
        assert not stop.requested
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.requested
    assert signal.getsignal(signal.SIGTERM) == before
