"""Ways to interrupt a run, for the tests of resuming, and to let it find no space."""

import contextlib
import multiprocessing.util
import os
import resource
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from ncfm_engine.sources import spread as module
from ncfm_engine.sources.prepare import prepare
from ncfm_engine.sources.shards import ShardReader
from ncfm_engine.sources.spread import spread
from ncfm_engine.stop import StopRequest


class StopAfter(StopRequest):
    """Requests to stop once it was asked `times` times."""

    def __init__(self, times: int):
        super().__init__()
        self.asked, self.times = 0, times

    @property
    def requested(self) -> bool:
        self.asked += 1
        return self.asked > self.times


@contextlib.contextmanager
def full_disk(largest: int | None = None) -> Iterator[Callable[[int | None], None]]:
    """No file grows beyond `largest` bytes, a real limit, at which writing fails as on a full disk. What is
    yielded sets another one; None is as before. Nor do Python and its children keep what they compile: they
    would leave the first bytes of it, beside installed modules, too, which nobody could import again.
    """
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    keeps_none, told = sys.dont_write_bytecode, os.environ.get("PYTHONDONTWRITEBYTECODE", "")
    sys.dont_write_bytecode, os.environ["PYTHONDONTWRITEBYTECODE"] = True, "1"
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)

    def limit(size: int | None) -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, before if size is None else (size, before[1]))

    try:
        limit(largest)
        yield limit
    finally:
        limit(None)
        signal.signal(signal.SIGXFSZ, handler)
        sys.dont_write_bytecode, os.environ["PYTHONDONTWRITEBYTECODE"] = keeps_none, told  # "" is no


def be_killed_by_the_workers(folder: Path) -> None:
    """Start workers that kill this process before they do anything else; a file for each is named by it."""

    def kill(_: object) -> None:
        (folder / str(os.getpid())).touch()
        parent = os.getppid()
        os.kill(parent, signal.SIGKILL)
        while os.getppid() == parent:
            time.sleep(0.001)

    multiprocessing.set_start_method("fork", force=True)
    multiprocessing.util.register_after_fork(be_killed_by_the_workers, kill)
    list(spread(time.sleep, [0.1] * 4, workers=2))


def prepare_on_a_full_disk(shards: str, folder: Path) -> None:
    """Tell in which way no store is made by two other processes, of which none can write more than 3 kB."""
    os.chdir(folder)
    module.START, module.ELSE = {}, 0
    with full_disk(3000):
        try:
            prepare(ShardReader(shards), "store", workers=2)
        except Exception as error:
            print(type(error).__name__, error, flush=True)
