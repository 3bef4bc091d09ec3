"""Independent work, done by several processes."""

import multiprocessing
import os
import signal
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

from torch.utils.data import DataLoader, Dataset

from distilled_data.errors import DistilledDataError, SourceError
from distilled_data.labels import as_they_are

START = {"fork": 0.0}  # seconds that it takes to start processes, about, by method
ELSE = 5.0  # by any other method


def default_workers() -> int:
    """The cores that this process may use, shared with the others that torchrun started beside it."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, cores // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))


def spread(function: Callable[[Any], Any], jobs: Sequence[Any], workers: int) -> Iterator[Any]:
    """What `function` makes of the jobs, in any order, in so many processes. Raises what `function` raises.

    Before any is started, jobs are done here for as long as starting them takes: so little work is done
    without them, and much work takes longer by no more than that time and one job. Raises `SourceError` if a
    process is killed.
    """
    method = multiprocessing.get_start_method(allow_none=True) or multiprocessing.get_all_start_methods()[0]
    begun, number = time.monotonic(), 0
    while number < len(jobs) and (
        min(workers, len(jobs) - number) < 2 or time.monotonic() - begun < START.get(method, ELSE)
    ):
        yield function(jobs[number])
        number += 1
    if number == len(jobs):
        return
    jobs = jobs[number:]
    results: Any = None
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "This DataLoader will create")  # more than cores, as asked for
            loader = DataLoader(
                _Jobs(function, jobs),
                batch_size=None,
                num_workers=min(workers, len(jobs)),
                collate_fn=as_they_are,
                in_order=False,
                worker_init_fn=partial(_begin, None if method == "forkserver" else os.getpid()),
            )
            results = iter(loader)  # which sees a process that has ended meanwhile
        for result in results:
            if isinstance(result, Exception):
                raise result
            yield result
    except RuntimeError as error:  # of the loader
        error.__traceback__ = None  # where it was raised, the loader is held
        if not str(error).startswith("DataLoader worker"):
            raise
        raise SourceError(
            f"a process that decodes images has ended: {error}. It says why above, or was killed, perhaps "
            "for want of memory. What is done stays; run the command again, with fewer --workers."
        ) from error
    finally:
        del results  # or a traceback keeps it, and as garbage of a cycle it waits 5 s for each process


class _Jobs(Dataset):
    def __init__(self, function: Callable[[Any], Any], jobs: Sequence[Any]):
        self.function, self.jobs = function, jobs

    def __len__(self) -> int:
        return len(self.jobs)

    def __getitem__(self, index: int) -> Any:
        try:
            return self.function(self.jobs[index])
        except (
            DistilledDataError,
            OSError,
            MemoryError,
        ) as error:  # a loader would raise another in its place
            return error


def _begin(parent: int | None, worker: int) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all processes; this one's ends the others
    if parent not in (None, os.getppid()):  # it was killed; torch's loop ends with the parent that it finds
        os._exit(1)
