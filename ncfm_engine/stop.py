"""Stopping a run in good order: when its time is up, or when the machine is about to be taken away."""

import signal
import threading
import time
from types import FrameType
from typing import Self


class Stopped(Exception):  # noqa: N818 - not an error: the run can go on
    """Raised by a stage after it saved its progress. The message says where: "distil, step 40 of 400"."""


class StopRequest:
    """Asked by every loop between two steps: `if stop.requested: save; raise Stopped`.

    Requested after `seconds` (None: never), or once SIGTERM arrived while this was entered as a context.
    """

    def __init__(self, seconds: float | None = None):
        self._deadline = None if seconds is None else time.monotonic() + seconds
        self._terminated = False
        self._before = None

    @property
    def requested(self) -> bool:
        late = self._deadline is not None and time.monotonic() >= self._deadline
        return self._terminated or late

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():  # Python allows handlers there only
            self._before = signal.signal(signal.SIGTERM, self._on_signal)
        return self

    def __exit__(self, *error: object) -> None:
        if self._before is not None:
            signal.signal(signal.SIGTERM, self._before)
            self._before = None

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        self._terminated = True
