"""Ways to interrupt a run, for the tests of resuming."""

import multiprocessing.util
import os
import signal
import time
from pathlib import Path

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
