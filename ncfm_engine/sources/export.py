"""A data set as WebDataset shards, for other programs."""

from pathlib import Path

from distilled_data.errors import MissingExtraError, UsageError
from distilled_data.export import to_png
from distilled_data.files import new_folder, write_file
from distilled_data.terminal import shortened

from .images import Images
from .reader import CLASSES_FILE, PARTS, class_names
from .source import Source

SHARD_BYTES = 2**28  # of pixels in a shard, at most; one image at least


def to_webdataset(source: Source, folder: str | Path) -> list[Path]:
    """Write train-00000.tar, ..., test-00000.tar, ... with samples of `png` and `cls`, and the names in
    classes.txt.

    What `wds:FOLDER/*.tar` reads has the same fingerprint. Raises `UsageError` unless the folder is empty or
    not there, and for names of classes that do not fit on a line each, `OutputError` where it cannot be
    written.
    """
    with MissingExtraError.unless("webdataset", "data", "writing WebDataset shards"):
        from webdataset.writer import TarWriter
    names = []
    size = max(1, SHARD_BYTES // (source.channels * source.height * source.width))
    with new_folder(folder) as place:
        write_file(place / CLASSES_FILE, "".join(f"{name}\n" for name in source.classes).encode())
        if lost := sorted(set(source.classes) - set(class_names(place / CLASSES_FILE))):
            raise UsageError(
                f"the classes {shortened([*map(repr, lost)])} cannot be named in {CLASSES_FILE}, one on a "
                "line; expected no line breaks, and no spaces at their ends"
            )
        for part, images in zip(PARTS, (source.train, source.test), strict=True):
            pixels, labels = Images.of(images.images), images.targets.tolist()
            for number, first in enumerate(range(0, len(images), size)):
                names.append(f"{part}-{number:05d}.tar")
                # as a file, since a path with a drive is taken for a URL; equal data give equal bytes
                with (place / names[-1]).open("wb") as file, TarWriter(file, mtime=0.0) as shard:
                    for row in range(first, min(first + size, len(images))):
                        shard.write({"__key__": f"{row:08d}", "png": to_png(pixels[row]), "cls": labels[row]})
    return [Path(folder) / name for name in names]
