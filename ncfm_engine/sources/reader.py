"""What every source of real data gives: its origin, and its images in units that are read independently."""

import dataclasses
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from distilled_data.errors import UsageError
from distilled_data.terminal import shortened

PARTS: tuple[str, ...] = ("train", "test")
CLASSES_FILE = "classes.txt"  # beside shards: the names of their classes, one on a line


@dataclass(frozen=True)
class Origin:
    """Where a data set comes from. It never tells a path of this machine, because it is published."""

    name: str  # "cifar10"
    id: str  # "torchvision:CIFAR10", "hf:org/name", "folder:photos"
    revision: str = "unknown"  # of what provides it, "torchvision 0.26.0", a commit
    license: str = "unknown"  # SPDX identifier, "other" or "unknown"
    citation: str = ""  # BibTeX


@dataclass(frozen=True)
class Record:
    """One image as it was found: a file's bytes, or pixels [height, width] or [height, width, 3]."""

    name: str  # for people: a file, a key in a shard, a row
    label: int | str  # index or name of the class
    image: bytes | np.ndarray


@dataclass(frozen=True)
class Damage:
    """Something that cannot be read, and why."""

    name: str
    reason: str


@dataclass(frozen=True)
class Unit:
    """Some images of one part that one process reads at a time; the same ones while `what` is the same."""

    part: str  # of `PARTS`
    what: Any  # plain JSON: where they are, with what tells a change, such as a file's size and time


class Reader(Protocol):
    """A source. It is pickled where processes do not fork."""

    @property
    def origin(self) -> Origin: ...

    @property
    def where(self) -> str:
        """For messages; it may tell a path."""
        ...

    @property
    def classes(self) -> Sequence[str] | None:
        """In label order; None: as the labels found say."""
        ...

    @property
    def units(self) -> Sequence[Unit]: ...

    def read(self, unit: Unit) -> Iterator[Record | Damage]:
        """Its images. What is wrong with one is `Damage`, which is remembered; raises `SourceError` for what
        another try may read.
        """
        ...


@dataclass
class ArrayReader:
    """Images in memory: by part uint8 [N, height, width] or [N, height, width, 3] and labels [N]."""

    origin: Origin
    classes: Sequence[str] | None
    arrays: dict[str, tuple[np.ndarray, np.ndarray]]
    stamp: Any  # plain JSON that changes with the arrays
    rows: int = 4096  # in a unit
    units: Sequence[Unit] = dataclasses.field(init=False)
    where: str = dataclasses.field(init=False)

    def __post_init__(self):
        self.where = self.origin.name
        self.units = [
            Unit(part, {"rows": [first, min(first + self.rows, len(labels))], "of": self.stamp})
            for part, (_, labels) in self.arrays.items()
            for first in range(0, len(labels), self.rows)
        ]

    def read(self, unit: Unit) -> Iterator[Record | Damage]:
        images, labels = self.arrays[unit.part]
        for row in range(*unit.what["rows"]):
            yield Record(f"{unit.part} image {row}", int(labels[row]), images[row])


def class_names(path: Path) -> list[str]:
    """Of a file with one on each line. Raises `UsageError`."""
    try:
        names = [line.strip() for line in path.read_text(encoding="utf-8-sig").split("\n") if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(
            f"the class names in {path} cannot be read: {error}. Expected a name on each line."
        ) from error
    if fault := fault_of(names):
        raise UsageError(f"{path} holds {fault}")
    return names


def fault_of(names: Sequence[str]) -> str:
    """What is wrong with these names of classes; nothing with those that can be used."""
    repeated = [repr(name) for name, count in Counter(names).items() if count > 1]
    if not repeated and len(names) > 1:
        return ""
    more = f"; more than once: {shortened(repeated)}" if repeated else ""
    return f"{len(names)} class names; expected two or more, all different{more}"


def stamp(path: Path) -> list[int]:
    """Size and time of change of a file, which tell that it is another one; nothing for one that is gone."""
    try:
        status = path.stat()
    except OSError:
        return []
    return [status.st_size, status.st_mtime_ns]
