"""Any source into a store: read and decode in parallel, then sort by class and content.

Each unit of the source is decoded into a spool of its own, so a run that was killed goes on after the last
whole unit, and several processes share the units. The order of a store follows from the content of the
images alone.
"""

import contextlib
import dataclasses
import multiprocessing
import re
import shutil
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

from distilled_data.errors import DistilledDataError, IntegrityError, OutputError, SourceError, UsageError
from distilled_data.files import move

from ..cache import sha256_of
from ..ranks import Ranks
from ..report import Report, silent
from ..stop import Stopped, StopRequest, in_turn
from .decode import Decoder
from .reader import PARTS, Reader
from .sorting import Sorted, check_damaged, damage_list
from .source import Source
from .spool import Spool, decode_unit, spool_path
from .spread import default_workers, spread
from .store import INDEX_FILE, Index, map_shards, open_store, read_index, shard_path, write_index

WORK_FOLDER = ".preparing"  # within a store that is not finished, or is being replaced
LOCK_FILE = ".lock"

_OURS = re.compile(
    rf"({'|'.join(PARTS)})-\d{{5}}\.safetensors|"
    rf"\.({'|'.join(PARTS)})-\d{{5}}\.safetensors\..*\.tmp|\.index\.json\..*\.tmp"
)


def prepare(
    reader: Reader,
    folder: str | Path,
    *,
    decoder: Decoder = Decoder(),  # noqa: B008 - frozen
    skip_damaged: bool = False,
    overwrite: bool = False,
    seed: int = 0,
    workers: int | None = None,
    ranks: Ranks = Ranks(),  # noqa: B008 - frozen
    stop: StopRequest | None = None,
    report: Report = silent,
) -> Source:
    """Make the store `folder` of a source, or go on making it, or just open it, and return its images.

    `seed` draws the test split of a source without one; `workers` processes decode, by default one for each
    core. Of several `ranks` each does its share, and all must see the folder. A folder that holds a store of
    something else, or a damaged one, is replaced if `overwrite`.

    Raises `SourceError` for data that is damaged (unless `skip_damaged`: then it is left out, and named in
    the index) or does not fit together, `OutputError` for a folder that is occupied or cannot be written, and
    `Stopped` when `stop` is requested; what was done stays for the next time. `UsageError` in a script
    without a main guard, where processes do not fork.
    """
    workers = default_workers() if workers is None else workers
    plan = _Plan(reader, Path(folder).expanduser(), decoder, seed, workers)
    stop = stop or StopRequest()
    with _writable(plan.folder), contextlib.ExitStack() as held:
        finished = _finished(plan) if ranks.rank == 0 else None
        if ranks.rank == 0 and finished is None:
            held.enter_context(_lock(plan.folder, stop))
        if not ranks.any(ranks.rank == 0 and (finished is not None or _begun(plan, overwrite))):
            _work(plan, ranks, stop, report, "decode")
            spools = [Spool.read(path) for path in plan.spools]
            damaged = tuple(damage for spool in spools for damage in spool.damaged)
            check_damaged(damaged, sum(len(s.labels) for s in spools), reader.where, skip_damaged)
            found = Sorted.of(reader, spools, seed)
            _work(plan, ranks, stop, report, "sort", found)
            if ranks.rank == 0:
                _finish(plan, found, damaged)
            ranks.barrier()
        index, source = finished or (read_index(plan.folder), None)
        if index.stamp != plan.stamp:
            raise SourceError(
                f"{plan.folder} was replaced by another process, or not all see the same source. Run again."
            )
        whole = sum(map(sum, index.counts.values()))
        check_damaged(index.damaged, whole, reader.where, skip_damaged)
        if index.damaged:
            warnings.warn(
                f"{reader.where}: left out {len(index.damaged)} of {whole + len(index.damaged)} images, "
                f"which cannot be used: {damage_list(index.damaged)}. "
                f"All are listed in the store's {INDEX_FILE}.",
                stacklevel=2,
            )
        return source or open_store(plan.folder, index)


@dataclass(frozen=True)
class _Plan:
    reader: Reader
    folder: Path
    decoder: Decoder
    seed: int
    workers: int

    @property
    def work(self) -> Path:
        return self.folder / WORK_FOLDER

    @cached_property
    def stamp(self) -> str:
        """Of all that decides the store."""
        return sha256_of([[path.name for path in self.spools], self.seed])

    @cached_property
    def spools(self) -> list[Path]:
        """One for each unit; cached, as the names of a million files go into their hashes."""
        return [spool_path(self.work, self.reader, self.decoder, unit) for unit in self.reader.units]


def _finished(plan: _Plan) -> tuple[Index, Source] | None:
    """The very store, if it is there, whole, and not worked on: who only reads it may not be able to lock it.

    Where another process replaces its files meanwhile, they do not fit the index, or are mapped already.
    """
    stamp = plan.stamp
    with contextlib.suppress(SourceError, IntegrityError):
        index = read_index(plan.folder)
        if index.stamp == stamp and not plan.work.exists():
            return index, open_store(plan.folder, index)
    return None


def _begun(plan: _Plan, overwrite: bool) -> bool:
    """Whether the store is there already; if not, make its work folder, and keep what a killed run left.

    A store that is to be replaced stays until all of the new one is on the disk. Raises `OutputError` where
    something else is in its place.
    """
    folder = plan.folder
    if (folder / INDEX_FILE).exists():
        if _is_whole(folder, plan.stamp, overwrite):
            shutil.rmtree(plan.work, ignore_errors=True)  # of a run that was killed at its very end
            return True
        if not overwrite:
            raise OutputError(
                f"{folder} holds a store of other data, or of the same prepared in another way. Choose "
                "another folder, or replace it with --overwrite."
            )
    elif not plan.work.exists() and (other := [p.name for p in folder.iterdir() if p.name != LOCK_FILE]):
        raise OutputError(f"{folder} is not empty and not a store: found {other[0]}. Choose another folder.")
    wanted = {path.name for path in plan.spools}
    plan.work.mkdir(exist_ok=True)
    for path in plan.work.iterdir():  # of a source that has changed since, or of a killed process
        known = path.name.partition(".")[0] in wanted or _OURS.fullmatch(path.name)
        if path.suffix == ".tmp" or not known:
            path.unlink(missing_ok=True)
    return False


def _is_whole(folder: Path, stamp: str, overwrite: bool) -> bool:
    """Whether there is this very store, which can be opened. Raises for a damaged one, unless `overwrite`."""
    try:
        if read_index(folder).stamp != stamp:
            return False
        open_store(folder)
    except DistilledDataError:
        if not overwrite:
            raise
        return False
    return True


def _work(
    plan: _Plan, ranks: Ranks, stop: StopRequest, report: Report, stage: str, found: Sorted | None = None
) -> None:
    """Do this process's share of a stage, and wait for the others. Raises `Stopped` in all if in one."""
    jobs: Sequence[Any]
    function: Callable[[Any], Any]
    if found is None:
        jobs = plan.reader.units[ranks.rank :: ranks.count]
        paths = plan.spools[ranks.rank :: ranks.count]
        decoded = [path.with_suffix(".safetensors").exists() for path in paths]
        todo = [unit for unit, done in zip(jobs, decoded, strict=True) if not done]
        function = partial(decode_unit, plan.reader, plan.decoder, plan.work)
        if todo:
            _ = plan.reader.classes  # some readers load them, which the workers then need not
    else:
        jobs = found.shards[ranks.rank :: ranks.count]
        todo = [shard for shard in jobs if not found.is_written(plan.work, shard)]
        function = partial(found.write, plan.work)
    done, images, start, stopped = len(jobs) - len(todo), 0, time.monotonic(), False
    try:
        for count in spread(function, todo, plan.workers):
            done, images = done + 1, images + (count or 0)
            rate = {"images_per_second": images / max(time.monotonic() - start, 1e-9)} if images else {}
            report(stage, done, len(jobs), **rate)
            if stopped := stop.requested and done < len(jobs):
                break
    except SourceError:
        if not stop.requested:  # the signal may have gone to the workers too, and killed them
            raise
        stopped = True
    if ranks.any(stopped):
        units = "units decoded" if found is None else "files written"
        raise Stopped(f"prepare, {done} of {len(jobs)} {units}")


def _finish(plan: _Plan, found: Sorted, damaged: tuple) -> None:
    """Put what was written in the place of what is there, and write the index."""
    index = _index(plan, found, damaged)  # which lets go of the files: Windows moves none that is mapped
    (plan.folder / INDEX_FILE).unlink(missing_ok=True)
    for path in plan.folder.iterdir():
        if _OURS.fullmatch(path.name):
            path.unlink()
    for shard in found.shards:
        place = shard.part, shard.number
        move(shard_path(plan.work, *place), shard_path(plan.folder, *place))
    write_index(plan.folder, index)
    shutil.rmtree(plan.work)


def _index(plan: _Plan, found: Sorted, damaged: tuple) -> Index:
    """Of what was written."""
    shards = {part: [len(shard.rows) for shard in found.shards if shard.part == part] for part in PARTS}
    source = map_shards(plan.work, plan.reader.origin, found.classes, found.shape, found.counts, shards)
    return Index(
        plan.reader.origin,
        found.classes,
        found.shape,
        source.mean,
        source.std,
        source.fingerprint,
        found.counts,
        shards,
        found.test,
        dataclasses.asdict(plan.decoder),
        plan.stamp,
        damaged,
    )


@contextlib.contextmanager
def _writable(folder: Path) -> Iterator[None]:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        yield
    except DistilledDataError:
        raise
    except OSError as error:
        raise OutputError(
            f"the store {folder} could not be written: {error}. Free some space, or choose another folder "
            "(XDG_CACHE_HOME for the cache); what was done stays, and the same command goes on with it."
        ) from error


@contextlib.contextmanager
def _lock(folder: Path, stop: StopRequest) -> Iterator[None]:
    """Two processes that make one store take turns, and the second finds it made."""

    def look() -> None:
        if getattr(multiprocessing.current_process(), "_inheriting", False):  # that is its own parent
            raise UsageError(
                "data are prepared while a new process imports the script that started it. Where "
                "processes do not fork, what a script does must stand under "
                '`if __name__ == "__main__":`.'
            )

    with in_turn(folder / LOCK_FILE, stop, f"prepare {folder}", look):
        yield
