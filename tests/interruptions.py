"""Ways to interrupt a run, for the tests of resuming."""

import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

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


def killed(code: str) -> None:
    """Run `code` in a Python of its own, which must end by SIGKILL."""
    root = str(Path(__file__).parents[1])
    environment = os.environ | {"PYTHONPATH": root, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], env=environment, timeout=120)
    assert done.returncode == -signal.SIGKILL
