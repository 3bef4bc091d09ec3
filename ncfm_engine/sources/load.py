"""One entry for all sources of real data."""

import os
import warnings
from pathlib import Path

import numpy as np

from distilled_data.errors import UnknownNameError, UsageError

from ..cache import cache_folder, sha256_of
from ..ranks import Ranks
from ..report import Report, silent
from ..stop import StopRequest
from .archives import ARCHIVES, ArchiveReader
from .decode import FITS, Decoder
from .digits import read_digits
from .folder import FolderReader
from .hub import HubReader, divided
from .npz import NpzReader
from .prepare import prepare
from .reader import Reader, class_names
from .shards import ShardReader, is_remote
from .source import Source
from .store import open_store

PLACES = {  # kinds of sources that are found at a place
    "folder": "PATH",
    "hf": "REPO[:CONFIG[:TRAIN[,TEST]]]",
    "wds": "URL-or-glob",
    "npz": "PATH",
    "store": "PATH",
}
SOURCES = ("digits", *ARCHIVES, *PLACES)
SPECS = ", ".join(f"{name}:{PLACES[name]}" if name in PLACES else name for name in SOURCES)  # in words
CHANGES = ("size", "fit", "channels", "label_column")  # keywords of `load_source` that decide its images


def open_reader(
    spec: str,
    *,
    data: str | Path | None = None,
    classes: str | Path | None = None,
    label_column: str | None = None,
) -> Reader:
    """The reader of `spec`, see `load_source`, but for stores."""
    name, _, place = spec.partition(":")
    if name not in SOURCES or (place and name not in PLACES):
        if os.path.isdir(spec):
            raise UsageError(f"{spec} is a folder; if it holds class folders, its dataset is folder:{spec}")
        raise UnknownNameError.of("dataset", spec, SOURCES)
    for flag, value, kinds in (
        ("--data", data, tuple(ARCHIVES)),
        ("--classes", classes, ("wds", "npz")),
        ("--label-column", label_column, ("hf",)),
    ):
        if value is not None and name not in kinds:
            hint = "" if name == "folder" else " For images in class folders use the dataset folder:PATH."
            raise UsageError(
                f"{flag} {value} has no meaning for the dataset {spec!r}, only for {', '.join(kinds)}.{hint}"
            )
    if name in PLACES and not place:
        raise UsageError(f"the dataset {name!r} needs a place: {name}:{PLACES[name]}")
    names = None if classes is None else class_names(Path(classes).expanduser())
    if name in ARCHIVES:
        return ArchiveReader(name, data)  # type: ignore[return-value] - of a cached property
    readers = {
        "digits": read_digits,
        "folder": lambda: FolderReader(place),
        "hf": lambda: HubReader(place, label_column),
        "wds": lambda: ShardReader(place, names),
        "npz": lambda: NpzReader(place, names),
    }
    return readers[name]()


def load_source(
    spec: str,
    *,
    data: str | Path | None = None,
    classes: str | Path | None = None,
    label_column: str | None = None,
    size: int | None = None,
    fit: str = "crop",
    channels: int | None = None,
    seed: int = 0,
    store: str | Path | None = None,
    skip_damaged: bool = False,
    overwrite: bool = False,
    workers: int | None = None,
    ranks: Ranks = Ranks(),  # noqa: B008 - frozen
    stop: StopRequest | None = None,
    report: Report = silent,
) -> Source:
    """The real data set `spec`, through a store that is made once: `store`, or one in the user's cache.

    `spec` is a name of `SOURCES`, or a kind of `PLACES` and the place, "folder:photos"; "store:PATH" is a
    store that is there already. `data` is the folder that holds the files of a torchvision data set, used as
    it is; without it they are downloaded once into the user's cache. `classes` is a file with the names of
    the classes, one on a line, for shards and arrays that have numbers; `label_column` names a column of a
    Hub data set. `size` in pixels makes images square: `fit` "crop" cuts off both ends of the longer side,
    "squash" keeps all of it. `channels` 1 or 3 converts to grey or colour. `seed` draws the test split of a
    source without one: an evaluation must use that of the distillation. `skip_damaged` leaves damaged images
    out, `overwrite` replaces another `store` at that place, `workers` processes decode, by default one for
    each core; the rest are those of `prepare`.

    Raises `UnknownNameError` and `UsageError` for arguments, `SourceError` for data that is missing,
    damaged or unfit, `MissingExtraError` for an optional package that is not installed, `OutputError` for a
    store that cannot be written, and `Stopped`. Warns where one in a hundred test images or more is a
    training image too.
    """
    if size is not None and (type(size) is not int or size < 1):
        raise UsageError(f"size={size}: expected the side of an image in pixels, 1 or more")
    if fit not in FITS or channels not in (None, 1, 3):
        raise UsageError(f"fit={fit!r}, channels={channels!r}: expected {' or '.join(FITS)}, and 1 or 3")
    if spec.startswith("store:"):
        changed = [data, classes, label_column, size, channels, store, *([fit] if fit != "crop" else [])]
        if any(value is not None for value in changed):
            raise UsageError(f"{spec} is prepared already; how images are read was decided then")
        return _told(open_store(spec.removeprefix("store:")))
    if size is None and fit != "crop":
        raise UsageError(f"fit={fit!r} says how images come to a size, and none is given: add --size")
    if ranks.rank:
        ranks.barrier()  # the first one may have to download
    reader = open_reader(spec, data=data, classes=classes, label_column=label_column)
    if ranks.count > 1 and ranks.rank == 0:
        ranks.barrier()
    decoder = Decoder(size, fit, channels)
    if store is None:
        files = [str(Path(path).expanduser().resolve()) for path in (data, classes) if path is not None]
        key = sha256_of([_absolute(spec), files, label_column, size, fit, channels, seed])[:12]
        store, overwrite = cache_folder() / "stores" / f"{reader.origin.name}-{key}", True
    source = prepare(
        reader,
        store,
        decoder=decoder,
        skip_damaged=skip_damaged,
        overwrite=overwrite,
        seed=seed,
        workers=workers,
        ranks=ranks,
        stop=stop,
        report=report,
    )
    return _told(source)


def _told(source: Source) -> Source:
    # Eight bytes of a sha256 tell images apart; more would take seconds with millions of them.
    train, test = (part.digests.numpy()[:, :8].copy().view("<u8") for part in (source.train, source.test))
    known = int(np.isin(test, train).sum())
    if 100 * known >= len(test):  # fewer, as the 10 of CIFAR-100, change no accuracy by a point
        warnings.warn(
            f"{source.name}: {known} of {len(test)} test images are training images too, pixel for pixel, so "
            "accuracies are too high. Remove them from one of the two.",
            stacklevel=3,
        )
    return source


def _absolute(spec: str) -> str:
    """The same for the same place, wherever it is named from."""
    kind, _, place = spec.partition(":")
    place = os.path.expanduser(place)
    local = kind in PLACES and (kind != "hf" or Path(divided(place)[0]).exists())
    return f"{kind}:{os.path.abspath(place)}" if local and not is_remote(place) else spec
