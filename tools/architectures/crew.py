"""Several processes at one search: each of them runs the same command."""

import contextlib
import os
import subprocess
import sys
from typing import Self

import torch

from ncfm_engine.sources.spread import default_workers
from ncfm_engine.stop import StopRequest

LEADER = "ARCHITECTURE_SEARCH_LEADER"  # in the environment of a hand: the process that started it
REPLACEMENTS = 10  # of each hand that was killed, or ended by an error, until another candidate is done
GOOD_ENDS = (0, 2, 75)  # exit codes: done, refused (the leader will say why), stopped on request


def default_jobs(device: str) -> int:
    """Processes at once: a CPU is busiest with one on each core, a GPU waits for any single one."""
    return 4 if device.startswith("cuda") else default_workers()


def is_hand() -> bool:
    """Whether this process was started by another one to help it."""
    return LEADER in os.environ


class Leash(StopRequest):
    """A hand stops when its leader is gone, too."""

    @property
    def requested(self) -> bool:
        # On Windows the parent may be a launcher, and stays what it was when it is gone.
        orphaned = is_hand() and os.name != "nt" and os.getppid() != int(os.environ[LEADER])
        return orphaned or super().requested


class Crew:
    """`count` hands that this process starts with its own arguments, and looks on; a single one is itself.

    They share the cores. They are started by `mend`, which also replaces those that were killed. Leaving the
    context ends them.
    """

    def __init__(self, count: int):
        self._hands: list[subprocess.Popen[bytes]] = []
        self._count, self._missing = count, 0 if is_hand() or count == 1 else count
        self._threads = max(1, torch.get_num_threads() // count)
        self._replacements, self._progress = 0, ("", 0)

    def mend(self, stage: str, done: int) -> None:
        """Start hands, or replace those that died, but not for ever while no candidate is done."""
        if (stage, done) != self._progress:
            self._replacements, self._progress = REPLACEMENTS * self._count, (stage, done)
        torch.set_num_threads(self._threads)
        lost = [hand for hand in self._hands if hand.poll() not in (None, *GOOD_ENDS)]
        again = min(len(lost), self._replacements)
        self._missing, self._replacements = self._missing + again, self._replacements - again
        self._hands = [hand for hand in self._hands if hand.poll() is None]
        for _ in range(self._missing):
            environment = os.environ | {LEADER: str(os.getpid())}
            command = [sys.executable, *sys.argv]
            hand = subprocess.Popen(
                command,
                env=environment,
                stdout=subprocess.DEVNULL,
                process_group=0,  # Ctrl-C is for this process; it would find hands that are still importing
            )
            self._hands.append(hand)
        self._missing = 0

    def works(self) -> bool:
        """Whether there are hands; where all of them end, the leader does the rest, or says why none can."""
        return any(hand.poll() is None for hand in self._hands)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        for hand in self._hands:
            hand.terminate()
        for hand in self._hands:
            with contextlib.suppress(KeyboardInterrupt):
                hand.wait()
