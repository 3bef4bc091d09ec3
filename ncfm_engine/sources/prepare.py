"""Any source into a store: read and decode in parallel, then sort by class and content.

Each unit of the source is decoded into a spool file of its own, so a run that was killed goes on after the
last whole unit, and several processes share the units. The order of a store follows from the content of the
images alone.
"""

import contextlib
import dataclasses
import json
import os
import shutil
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save
from torch.utils.data import DataLoader, Dataset

from distilled_data.errors import DistilledDataError, OutputError, SourceError
from distilled_data.format import write_file

from ..ranks import Ranks
from ..report import Report, silent
from ..stop import Stopped, StopRequest
from . import store
from .decode import Decoder, Refused
from .reader import PARTS, Damage, Reader, Record, Unit, sha256_of
from .source import TEST_FRACTION, Source, content_order, digest, pixel_sums, split_mask
from .store import INDEX_FILE, Index, is_written, map_shards, open_store, read_index, shard_path, write_index

WORK_FOLDER = "work"  # within a store that is not finished
LOCK_FILE = ".lock"
BLOCK = 2**24  # bytes of images that are sorted at once


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
    something else is replaced if `overwrite`.

    Raises `SourceError` for data that is damaged (unless `skip_damaged`: then it is left out, and named in
    the index) or does not fit together, `OutputError` for a folder that is occupied or cannot be written, and
    `Stopped` when `stop` is requested; what was done stays for the next time.
    """
    folder = Path(folder)
    plan = _Plan(reader, folder, decoder, seed, os.cpu_count() or 1 if workers is None else workers)
    stop = stop or StopRequest()
    with _writable(folder), _locked(folder) if ranks.rank == 0 else contextlib.nullcontext():
        finished = ranks.any(ranks.rank == 0 and _finished(folder, plan.stamp, overwrite))
        if not finished:
            plan.work.mkdir(exist_ok=True)
            _read(plan, ranks, stop, report)
            ranks.barrier()
            sorted_ = _sorted(plan, [_Spool.of(plan, unit) for unit in reader.units], skip_damaged)
            _write(plan, sorted_, ranks, stop, report)
            ranks.barrier()
            if ranks.rank == 0:
                _finish(plan, sorted_)
            ranks.barrier()
    index = read_index(folder)
    _check_damaged(index.damaged, sum(map(sum, index.counts.values())), reader.where, skip_damaged)
    return open_store(folder)


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

    @property
    def stamp(self) -> str:
        """Of all that decides the store."""
        units = [[unit.part, unit.what] for unit in self.reader.units]
        origin = dataclasses.asdict(self.reader.origin)
        return sha256_of([origin, units, dataclasses.asdict(self.decoder), self.seed])

    def spool(self, unit: Unit) -> Path:
        """Where the images of a unit go: `.pixels`, and when all are there `.safetensors` beside it."""
        return self.work / sha256_of([unit.part, unit.what, dataclasses.asdict(self.decoder)])[:32]


@dataclass(frozen=True)
class _Spool:
    """A decoded unit; its pixels are in a file."""

    path: Path  # without its ending
    shape: tuple[int, ...]  # of an image, or () where there is none
    first: str  # name of the first image
    names: list[int | str]  # the labels that occur
    labels: np.ndarray  # int32 [N], in `names`
    digests: np.ndarray
    sums: np.ndarray
    damaged: list[Damage]

    @classmethod
    def of(cls, plan: _Plan, unit: Unit) -> "_Spool":
        path = plan.spool(unit)
        try:
            with safe_open(path.with_suffix(".safetensors"), "np") as file:
                about = json.loads(file.metadata()["about"])
                arrays = {name: file.get_tensor(name) for name in ("labels", "digests", "sums")}
        except (OSError, SafetensorError) as error:
            raise OutputError(
                f"{path} was decoded, but is not there or cannot be read: {error}. All processes must share "
                f"{plan.folder}; run the command again."
            ) from error
        damaged = [Damage(*row) for row in about["damaged"]]
        return cls(path, tuple(about["shape"]), about["first"], about["names"], damaged=damaged, **arrays)


def _read(plan: _Plan, ranks: Ranks, stop: StopRequest, report: Report) -> None:
    """Decode this process's share of the units that are not yet."""
    if ranks.rank == 0:
        wanted = {plan.spool(unit).name for unit in plan.reader.units}
        for path in plan.work.iterdir():  # of a source that has changed since, or of a killed process
            if path.name.partition(".")[0] not in wanted:
                path.unlink(missing_ok=True)
    units = plan.reader.units[ranks.rank :: ranks.count]
    todo = [unit for unit in units if not plan.spool(unit).with_suffix(".safetensors").exists()]
    if todo:
        _ = plan.reader.classes  # some readers load them, which the workers then need not
    done, start = 0, time.monotonic()
    for number, count in enumerate(spread(partial(_decode, plan), todo, plan.workers), 1):
        done += count
        rate = done / max(time.monotonic() - start, 1e-9)
        report("decode", len(units) - len(todo) + number, len(units), images_per_second=rate)
        if stop.requested and number < len(todo):
            raise Stopped(f"prepare, {len(units) - len(todo) + number} of {len(units)} units decoded")


def _decode(plan: _Plan, unit: Unit) -> int:
    """Decode one unit into its spool; how many images it has."""
    path, shape, first = plan.spool(unit), (), ""
    names: dict[int | str, int] = {}
    labels: list[int] = []
    sums: list[np.ndarray] = []
    digests, damaged, waiting = bytearray(), [], []
    temporary = path.with_suffix(f".{os.getpid()}.tmp")
    with temporary.open("wb") as file:

        def write() -> None:
            """Some images at once: one call for each would take longer than the sums themselves."""
            block = np.stack(waiting)
            file.write(block.data)
            sums.append(pixel_sums(block))
            waiting.clear()

        for record in plan.reader.read(unit):
            try:
                if isinstance(record, Damage):
                    raise Refused(record.reason)
                label = _class(record, plan.reader.classes)
                pixels = plan.decoder(record.image)
            except Refused as reason:
                damaged.append([record.name, str(reason)])
                continue
            if not labels:
                shape, first = pixels.shape, record.name
            elif pixels.shape != shape:
                raise SourceError(_unlike(plan.reader.where, first, shape, record.name, pixels.shape))
            labels.append(names.setdefault(label, len(names)))
            digests += digest(pixels)
            waiting.append(pixels)
            if len(waiting) == 16:
                write()
        if waiting:
            write()
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path.with_suffix(".pixels"))
    arrays = {
        "labels": np.array(labels, np.int32),
        "digests": np.frombuffer(digests, np.uint8).reshape(-1, 32),
        "sums": np.concatenate(sums or [np.zeros((0, 1, 2), np.int64)]),
    }
    about = {"shape": shape, "first": first, "names": list(names), "damaged": damaged}
    write_file(path.with_suffix(".safetensors"), save(arrays, {"about": json.dumps(about)}))
    return len(labels)


def _class(record: Record, classes: Sequence[str] | None) -> int | str:
    """The label of a record, where the names of the classes are known its index. Raises `Refused`."""
    label = record.label
    if isinstance(label, str):
        if classes is None:
            return label
        if label not in classes:
            raise Refused(f"label {label!r:.80} is none of the {len(classes)} classes")
        return classes.index(label)
    if label < 0 or (classes is not None and label >= len(classes)):
        raise Refused(f"label {label} is not in 0 to {'...' if classes is None else len(classes) - 1}")
    return label


@dataclass(frozen=True)
class _Sorted:
    """All images of a source in the order of the store; nothing but their pixels is in memory."""

    classes: tuple[str, ...]
    shape: tuple[int, ...]
    paths: list[Path]  # of spools
    place: np.ndarray  # int64 [N, 2]: number in `paths`, number in there
    targets: np.ndarray
    digests: np.ndarray
    sums: np.ndarray
    rows: dict[str, np.ndarray]  # by part, into the arrays above
    test: str  # where the test images come from
    damaged: list[Damage]

    @property
    def shards(self) -> list[tuple[str, int, np.ndarray]]:
        """Part, number and rows of each file."""
        size = max(1, store.SHARD_BYTES // int(np.prod(self.shape)))
        return [
            (part, number, rows[first : first + size])
            for part, rows in self.rows.items()
            for number, first in enumerate(range(0, len(rows), size))
        ]


def _sorted(plan: _Plan, spools: list[_Spool], skip_damaged: bool) -> _Sorted:
    reader, units = plan.reader, plan.reader.units
    filled = [spool for spool in spools if len(spool.labels)]
    damaged = [damage for spool in spools for damage in spool.damaged]
    total = sum(len(spool.labels) for spool in spools)
    _check_damaged(damaged, total, reader.where, skip_damaged, quiet=True)
    if not filled:
        raise SourceError(f"{reader.where} has no image that can be used. Expected images of every class.")
    for other in filled:
        if other.shape != filled[0].shape:
            raise SourceError(
                _unlike(reader.where, filled[0].first, filled[0].shape, other.first, other.shape)
            )
    classes = tuple(reader.classes) if reader.classes is not None else _classes(reader.where, filled)
    index = {name: i for i, name in enumerate(classes)}
    known = [[index[n] if isinstance(n, str) else n for n in spool.names] for spool in filled]
    targets = np.concatenate([np.array(k, np.int64)[s.labels] for k, s in zip(known, filled, strict=True)])
    digests = np.concatenate([spool.digests for spool in filled])
    counts = [len(spool.labels) for spool in filled]
    of_part = [unit.part for unit, spool in zip(units, spools, strict=True) if len(spool.labels)]
    is_test = np.repeat([part == "test" for part in of_part], counts)
    test = "the source"
    if not is_test.any():
        _check_no_class_empty(targets, classes, "", reader.where)
        is_test = split_mask(targets, digests, classes, TEST_FRACTION, plan.seed)
        test = f"{TEST_FRACTION:g} of each class, by sha256 of seed {plan.seed} and content"
    rows = {}
    for part, mask in zip(PARTS, (~is_test, is_test), strict=True):
        chosen = np.flatnonzero(mask)
        rows[part] = chosen[content_order(targets[chosen], digests[chosen])]
        _check_no_class_empty(targets[chosen], classes, part, reader.where)
    place = np.stack(
        [np.repeat(np.arange(len(filled)), counts), np.concatenate([np.arange(n) for n in counts])], 1
    )
    sums = np.concatenate([spool.sums for spool in filled])
    paths = [spool.path.with_suffix(".pixels") for spool in filled]
    return _Sorted(classes, filled[0].shape, paths, place, targets, digests, sums, rows, test, damaged)


def _classes(source: str, spools: list[_Spool]) -> tuple[str, ...]:
    """The classes of a source that lists none: the names in their order, or 0 to the highest label."""
    found = {name for spool in spools for name in spool.names}
    numbers = {name for name in found if isinstance(name, int)}
    if numbers and numbers != found:
        raise SourceError(
            f"{source} has labels that are numbers and labels that are names, such as {min(numbers)} and "
            f"{min(found - numbers)!r}. Make them one kind."  # type: ignore[type-var]
        )
    if missing := sorted(set(range(min(len(numbers), max(numbers, default=-1) + 1))) - numbers):
        raise SourceError(
            f"{source} has {len(numbers)} different labels, up to {max(numbers)}; there is no image with "
            "the label "
            f"{missing[0]}. Labels must be 0, 1, 2, ...; or name all classes in order with --classes FILE."
        )
    return tuple(map(str, sorted(found)))  # type: ignore[type-var]


def _check_no_class_empty(targets: np.ndarray, classes: Sequence[str], part: str, source: str) -> None:
    empty = np.flatnonzero(np.bincount(targets, minlength=len(classes)) == 0)
    if len(empty):
        names = ", ".join(repr(classes[i]) for i in empty[:5]) + (", ..." if len(empty) > 5 else "")
        raise SourceError(
            f"{source} has no usable{' ' + part if part else ''} image of {len(empty)} of its {len(classes)} "
            f"classes: {names}. Add images or remove the classes."
        )
    if len(classes) < 2:
        raise SourceError(f"{source} has one class, {classes[0]!r}; expected two or more")


def _check_damaged(
    damaged: Sequence[Damage], whole: int, source: str, skip: bool, quiet: bool = False
) -> None:
    """Raise `SourceError` for what cannot be read, or if that shall be skipped, warn of it unless `quiet`."""
    if not damaged or (skip and quiet):
        return
    reasons = "; ".join(f"{damage.name} ({damage.reason})" for damage in damaged[:5])
    more = f"; and {len(damaged) - 5} more" if len(damaged) > 5 else ""
    if not skip:
        raise SourceError(
            f"{source}: {len(damaged)} of {whole + len(damaged)} images cannot be used: {reasons}{more}. "
            "Replace "
            "them, or leave them out with --skip-damaged."
        )
    warnings.warn(
        f"{source}: left out {len(damaged)} of {whole + len(damaged)} images, which cannot be used: "
        f"{reasons}{more}. "
        f"All are listed in the store's {INDEX_FILE}.",
        stacklevel=3,
    )


def _unlike(where: str, first: str, shape: Sequence[int], other: str, found: Sequence[int]) -> str:
    """The message for images of different shapes."""
    if shape[0] != found[0]:
        grey, colour = (first, other) if shape[0] == 1 else (other, first)
        return f"{where}: {grey} is grey, {colour} is in colour. Convert all with --channels 1 or 3."
    return (
        f"{where}: {first} has {shape[2]} x {shape[1]} pixels, {other} has {found[2]} x {found[1]}. Pass "
        "--size PIXELS to "
        "resize all images."
    )


def _write(plan: _Plan, found: _Sorted, ranks: Ranks, stop: StopRequest, report: Report) -> None:
    """Write this process's share of the files that are not there yet."""
    jobs = [job for job in found.shards[ranks.rank :: ranks.count] if not _is_written(plan, found, job)]
    for number, _ in enumerate(spread(partial(_write_shard, plan, found), jobs, plan.workers), 1):
        report("sort", number, len(jobs))
        if stop.requested and number < len(jobs):
            raise Stopped(f"prepare, {number} of {len(jobs)} files written")


def _write_shard(plan: _Plan, found: _Sorted, job: tuple[str, int, np.ndarray]) -> None:
    part, number, rows = job
    size = int(np.prod(found.shape))
    step = max(1, BLOCK // size)

    def blocks() -> Iterator[np.ndarray]:
        for first in range(0, len(rows), step):
            place = found.place[rows[first : first + step]]
            block = np.empty((len(place), size), np.uint8)
            order = np.lexsort(place.T[::-1])  # file by file, and through each in one direction
            ends = np.flatnonzero(np.diff(place[order, 0])) + 1
            for group in np.split(order, ends):
                with found.paths[place[group[0], 0]].open("rb", buffering=0) as file:
                    for i in group:
                        file.seek(place[i, 1] * size)
                        if file.readinto(block[i].data) != size:
                            raise SourceError(
                                f"{file.name} is too short. Remove {plan.work} and run the command again."
                            )
            yield block

    path = shard_path(plan.folder, part, number)
    store.write_shard(path, blocks(), found.shape, found.digests[rows], found.sums[rows])


def _is_written(plan: _Plan, found: _Sorted, job: tuple[str, int, np.ndarray]) -> bool:
    part, number, rows = job
    return is_written(shard_path(plan.folder, part, number), found.digests[rows])


def _finish(plan: _Plan, found: _Sorted) -> None:
    """Write the index, and remove what is not part of the store."""
    minlength = len(found.classes)
    counts = {
        part: np.bincount(found.targets[rows], minlength=minlength).tolist()
        for part, rows in found.rows.items()
    }
    shards: dict[str, list[int]] = {part: [] for part in PARTS}
    for part, _, rows in found.shards:
        shards[part].append(len(rows))
    source = map_shards(plan.folder, plan.reader.origin, found.classes, counts, shards)
    channels, height, width = found.shape
    index = Index(
        plan.reader.origin,
        found.classes,
        (channels, height, width),
        source.mean,
        source.std,
        source.fingerprint,
        counts,
        shards,
        found.test,
        dataclasses.asdict(plan.decoder),
        plan.stamp,
        tuple(found.damaged),
    )
    ours = {shard_path(plan.folder, part, number).name for part, number, _ in found.shards}
    for path in plan.folder.glob("*.safetensors"):
        if path.name not in ours:
            path.unlink()
    write_index(plan.folder, index)
    shutil.rmtree(plan.work)


def _finished(folder: Path, stamp: str, overwrite: bool) -> bool:
    """Whether the store is there already. Raises `OutputError` where something else is in its place."""
    if (folder / INDEX_FILE).exists():
        if read_index(folder).stamp == stamp:
            return True
        if not overwrite:
            raise OutputError(
                f"{folder} holds a store of other data, or of the same prepared in another way. Choose "
                "another folder, "
                "or replace it with --overwrite."
            )
        (folder / INDEX_FILE).unlink()
    elif other := [p.name for p in folder.iterdir() if not _may_be_ours(p)]:
        raise OutputError(f"{folder} is not empty and not a store: found {other[0]}. Choose another folder.")
    for path in folder.glob(".*.tmp"):
        path.unlink(missing_ok=True)
    return False


def _may_be_ours(path: Path) -> bool:
    shard = path.suffix == ".safetensors" and path.name.startswith(PARTS)
    return path.name in (WORK_FOLDER, LOCK_FILE) or shard or path.match(".*.tmp")


@contextlib.contextmanager
def _writable(folder: Path) -> Iterator[None]:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        yield
    except DistilledDataError:
        raise
    except OSError as error:
        raise OutputError(
            f"the store {folder} could not be written: {error}. Free some space, or choose another folder; "
            "what was "
            "done stays, and the same command goes on with it."
        ) from error


def _locked(folder: Path) -> FileLock:
    """Two processes that make one store take turns, and the second finds it made."""
    return FileLock(folder / LOCK_FILE)


def spread(function: Callable[[Any], Any], jobs: Sequence[Any], workers: int) -> Iterator[Any]:
    """What `function` makes of the jobs, in any order, by some processes."""
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
            f"a process that decodes images was killed, perhaps for want of memory: {error}. What is done "
            "stays; run "
            "the command again, with fewer --workers."
        ) from error


class _Jobs(Dataset):
    def __init__(self, function: Callable[[Any], Any], jobs: Sequence[Any]):
        self.function, self.jobs = function, jobs

    def __len__(self) -> int:
        return len(self.jobs)

    def __getitem__(self, index: int) -> Any:
        try:
            return self.function(self.jobs[index])
        except (DistilledDataError, OSError) as error:  # a loader would raise another one in its place
            return error


def _as_it_is(result: Any) -> Any:
    return result
