"""Independent work, done by several processes."""

import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from torch.utils.data import DataLoader, Dataset

from distilled_data.errors import DistilledDataError, SourceError


def default_workers() -> int:
    """The cores that this process may use, shared with the others that torchrun started beside it."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, cores // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))


def spread(function: Callable[[Any], Any], jobs: Sequence[Any], workers: int) -> Iterator[Any]:
    """What `function` makes of the jobs, in any order, in so many processes. Raises what `function` raises.

    Raises `SourceError` if a process is killed.
    """
    if min(workers, len(jobs)) < 2:
        yield from map(function, jobs)
        return
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "This DataLoader will create")  # more than cores, as was asked for
        loader = DataLoader(
            _Jobs(function, jobs),
            batch_size=None,
            num_workers=min(workers, len(jobs)),
            collate_fn=_as_it_is,
            in_order=False,
        )
        results = iter(loader)
    try:
        for result in results:
            if isinstance(result, Exception):
                raise result
            yield result
    except RuntimeError as error:  # of the loader
        if not str(error).startswith("DataLoader worker"):
            raise
        raise SourceError(
            f"a process that decodes images has ended: {error}. It says why above, or was killed, perhaps "
            "for want of memory. What is done stays; run the command again, with fewer --workers."
        ) from error
    finally:
        del results  # or the traceback keeps it, and as garbage of a cycle it waits 5 s for each process


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


def _as_it_is(result: Any) -> Any:
    return result
