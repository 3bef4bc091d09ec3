"""Spools into the files of a store: by class and content."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from distilled_data.errors import SourceError

from . import store
from .reader import PARTS, Damage, Reader
from .source import TEST_FRACTION, content_order, split_mask
from .spool import Spool, unlike
from .store import is_written, shard_path, write_shard

BLOCK = 2**24  # bytes of images that are sorted at once


@dataclass(frozen=True)
class Shard:
    """A file of a store."""

    part: str
    number: int
    rows: np.ndarray  # into the arrays of `Sorted`


@dataclass(frozen=True)
class Sorted:
    """All images of a source in the order of the store; everything but their pixels is in memory."""

    classes: tuple[str, ...]
    shape: tuple[int, ...]
    paths: list[Path]  # of pixels
    place: np.ndarray  # int64 [N, 2]: number in `paths`, number in there
    targets: np.ndarray  # int64 [N]
    digests: np.ndarray
    sums: np.ndarray
    rows: dict[str, np.ndarray]  # by part, into the arrays above
    test: str  # where the test images come from

    @classmethod
    def of(cls, reader: Reader, spools: Sequence[Spool], seed: int) -> "Sorted":
        """Raises `SourceError` for what does not fit together."""
        where = reader.where
        filled = [spool for spool in spools if len(spool.labels)]
        if not filled:
            raise SourceError(f"{where} has no image that can be used. Expected images of every class.")
        shape = filled[0].shape
        for other in filled:
            if other.shape != shape:
                raise SourceError(unlike(where, filled[0].first, shape, other.first, other.shape))
        classes = _classes(where, filled) if reader.classes is None else tuple(reader.classes)
        _check_names(where, classes)
        counts = [len(spool.labels) for spool in filled]
        index: dict[int | str, int] = {name: i for i, name in enumerate(classes)}
        labels = [np.array([index.get(n, n) for n in s.names], np.int64)[s.labels] for s in filled]
        targets, digests = np.concatenate(labels), np.concatenate([spool.digests for spool in filled])
        parts = [unit.part for unit, spool in zip(reader.units, spools, strict=True) if len(spool.labels)]
        if any(unit.part == "test" for unit in reader.units):
            is_test, test = np.repeat([part == "test" for part in parts], counts), "the source"
        else:
            check_no_class_empty(targets, classes, "", where)
            is_test = split_mask(targets, digests, classes, TEST_FRACTION, seed)
            test = f"{TEST_FRACTION:g} of each class, by sha256 of seed {seed} and content"
        rows = {}
        for part, mask in zip(PARTS, (~is_test, is_test), strict=True):
            chosen = np.flatnonzero(mask)
            check_no_class_empty(targets[chosen], classes, part, where)
            rows[part] = chosen[content_order(targets[chosen], digests[chosen])]
        number = np.repeat(np.arange(len(filled), dtype=np.int64), counts)
        within = np.concatenate([np.arange(count, dtype=np.int64) for count in counts])
        sums = np.concatenate([spool.sums for spool in filled])
        paths = [spool.path.with_suffix(".pixels") for spool in filled]
        return cls(classes, shape, paths, np.stack([number, within], 1), targets, digests, sums, rows, test)

    @property
    def shards(self) -> list[Shard]:
        size = max(1, store.SHARD_BYTES // int(np.prod(self.shape)))
        return [
            Shard(part, number, rows[first : first + size])
            for part, rows in self.rows.items()
            for number, first in enumerate(range(0, len(rows), size))
        ]

    @property
    def counts(self) -> dict[str, list[int]]:
        """By part, images of each class."""
        return {
            part: np.bincount(self.targets[rows], minlength=len(self.classes)).tolist()
            for part, rows in self.rows.items()
        }

    def write(self, folder: Path, shard: Shard) -> None:
        rows = shard.rows
        path, blocks = shard_path(folder, shard.part, shard.number), self._blocks(rows)
        write_shard(path, blocks, self.shape, self.digests[rows], self.sums[rows])

    def is_written(self, folder: Path, shard: Shard) -> bool:
        rows = shard.rows
        path = shard_path(folder, shard.part, shard.number)
        return is_written(path, self.shape, self.digests[rows], self.sums[rows])

    def _blocks(self, rows: np.ndarray) -> Iterator[np.ndarray]:
        size = int(np.prod(self.shape))
        step = max(1, BLOCK // size)
        for first in range(0, len(rows), step):
            place = self.place[rows[first : first + step]]
            block = np.empty((len(place), size), np.uint8)
            order = np.lexsort(place.T[::-1])  # file by file, and through each in one direction
            for group in np.split(order, np.flatnonzero(np.diff(place[order, 0])) + 1):
                with self.paths[place[group[0], 0]].open("rb", buffering=0) as file:
                    for i in group:
                        file.seek(place[i, 1] * size)
                        if file.readinto(block[i].data) != size:
                            raise SourceError(
                                f"{file.name} is too short. Remove that file's folder and run the command "
                                "again."
                            )
            yield block


def _classes(where: str, spools: Sequence[Spool]) -> tuple[str, ...]:
    """The classes of a source that lists none: the names in their order, or 0 to the highest label."""
    found = {name for spool in spools for name in spool.names}
    numbers = {name for name in found if isinstance(name, int)}
    names = {name for name in found if isinstance(name, str)}
    if numbers and names:
        raise SourceError(
            f"{where} has labels that are numbers and labels that are names, such as {min(numbers)} and "
            f"{min(names)!r}. Make them one kind."
        )
    if missing := sorted(set(range(len(numbers))) - numbers):
        raise SourceError(
            f"{where} has {len(numbers)} different labels, up to {max(numbers)}; there is no image with "
            f"the label {missing[0]}. Labels must be 0, 1, 2, ...: number them anew."
        )
    return tuple(map(str, sorted(numbers) or sorted(names)))


def _check_names(where: str, classes: Sequence[str]) -> None:
    """Raise `SourceError` for a name that no artifact could hold."""
    for name in classes:
        if not name or name.encode(errors="replace").decode() != name:
            raise SourceError(f"{where} has a class named {name!r}; expected a text that is UTF-8")


def check_no_class_empty(
    targets: np.ndarray | Sequence[int], classes: Sequence[str], part: str, where: str
) -> None:
    """Raise `SourceError` unless there is an image of each class in `part`, or of all parts, ""."""
    empty = np.flatnonzero(np.bincount(targets, minlength=len(classes)) == 0)
    if len(empty):
        names = ", ".join(repr(classes[i]) for i in empty[:5]) + (", ..." if len(empty) > 5 else "")
        raise SourceError(
            f"{where} has no usable{' ' + part if part else ''} image of {len(empty)} of its {len(classes)} "
            f"classes: {names}. Add images or remove the classes."
        )
    if len(classes) < 2:
        raise SourceError(f"{where} has one class, {classes[0]!r}; expected two or more")


def check_damaged(damaged: Sequence[Damage], whole: int, where: str, skip: bool) -> None:
    """Raise `SourceError` for what cannot be used, unless it is to be skipped."""
    if damaged and not skip:
        raise SourceError(
            f"{where}: {len(damaged)} of {whole + len(damaged)} images cannot be used: "
            f"{damage_list(damaged)}. Replace them, or leave them out with --skip-damaged."
        )


def damage_list(damaged: Sequence[Damage]) -> str:
    """The first five, as text."""
    reasons = "; ".join(f"{damage.name} ({damage.reason})" for damage in damaged[:5])
    return reasons + (f"; and {len(damaged) - 5} more" if len(damaged) > 5 else "")
