"""Stopping a run in good order: when its time is up, or when the machine is about to be taken away."""

import contextlib
import os
import signal
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any, Self


class Stopped(Exception):  # noqa: N818 - not an error: the run can go on
    """Raised by a stage after it saved its progress. The message says where: "distil, step 40 of 400"."""


SIGNALS = (signal.SIGTERM, signal.SIGINT)
STOPPING = b"\nstopping in good order; Ctrl-C again stops at once\n"


class StopRequest:
    """Asked by every loop between two steps: `if stop.requested: save; raise Stopped`.

    Requested after `seconds` (None: never), or once SIGTERM or Ctrl-C arrived while this was entered as a
    context. A second Ctrl-C is a `KeyboardInterrupt`, as ever.
    """

    def __init__(self, seconds: float | None = None):
        self._deadline = None if seconds is None else time.monotonic() + seconds
        self._terminated = False
        self._before: list[dict[int, Any]] = []  # the handlers that were there, each time it was entered
        self._process = os.getpid()

    @property
    def requested(self) -> bool:
        late = self._deadline is not None and time.monotonic() >= self._deadline
        return self._terminated or late

    def __enter__(self) -> Self:
        if _hears_signals():
            heard = [number for number in SIGNALS if signal.getsignal(number) not in (signal.SIG_IGN, None)]
            self._before.append({number: signal.signal(number, self._on_signal) for number in heard})
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in (self._before.pop() if _hears_signals() else {}).items():
            signal.signal(number, handler)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        again, self._terminated = self._terminated, True
        if number == signal.SIGINT:
            if again:
                raise KeyboardInterrupt
            self.announce()

    def announce(self) -> None:
        """Tell whoever pressed Ctrl-C that it was heard, once for this process and all that it forked. Under
        torchrun nothing is told, since a second Ctrl-C does not reach the process there.
        """
        if os.getpid() == self._process and "RANK" not in os.environ:
            with contextlib.suppress(OSError):  # `| tee log` may have ended by it
                os.write(2, STOPPING)  # whatever the main program was writing


def _hears_signals() -> bool:
    """Whether this is the thread that Python allows handlers in."""
    return threading.current_thread() is threading.main_thread()


@contextlib.contextmanager
def in_turn(
    file: Path, stop: StopRequest | None, place: str, look: Callable[[], None] = lambda: None
) -> Iterator[None]:
    """Holds the lock `file`; another process may hold it for hours, and a stop is heard meanwhile.

    Raises `Stopped` then, which says `place` first. While it waits it calls `look`; that it waits, it tells
    in a warning.
    """
    from filelock import FileLock, Timeout

    lock, told = FileLock(file), False
    waiting = f"{place}, waiting for another process that does the same"
    while not lock.is_locked:
        try:
            lock.acquire(timeout=0.5)
        except Timeout:
            if stop and stop.requested:
                raise Stopped(waiting) from None
            look()
            if not told:
                warnings.warn(waiting, stacklevel=3)
            told = True
    try:
        yield
    finally:
        lock.release()
