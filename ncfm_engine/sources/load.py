"""One entry for all sources of real data."""

from pathlib import Path

from distilled_data.errors import UnknownNameError, UsageError

from .archives import ARCHIVES, load_archive
from .digits import load_digits
from .folder import load_folder
from .source import Source

SOURCES = ("digits", *ARCHIVES, "folder")


def load_source(
    spec: str,
    *,
    data: str | Path | None = None,
    size: int | None = None,
    skip_damaged: bool = False,
    seed: int = 0,
) -> Source:
    """Load the real data set `spec`: a name in `SOURCES`, where "folder" is written "folder:PATH".

    `data` is the folder that holds the files of a torchvision data set, used as it is; without it they are
    downloaded once into the user's cache. `size` resizes the images to size x size pixels. `skip_damaged`
    leaves out the unreadable images of a folder with a warning. `seed` draws the test split of a source
    that comes without one, so an evaluation must use the seed that the distillation used.

    Raises `UnknownNameError` and `UsageError` for arguments, `SourceError` for data that is missing,
    damaged or unfit, `MissingExtraError` for an optional package that is not installed.
    """
    name, _, path = spec.partition(":")
    if name not in SOURCES or (path and name != "folder"):
        raise UnknownNameError("dataset", spec, SOURCES)
    if size is not None and size < 1:
        raise UsageError(f"size={size}: expected the side of an image in pixels, 1 or more")
    if data is not None and name not in ARCHIVES:
        raise UsageError(
            f"--data {data} has no meaning for the dataset {spec!r}, only for {', '.join(ARCHIVES)}. "
            "For images in class folders use the dataset folder:PATH."
        )
    if name == "digits":
        return load_digits(size, seed)
    if name in ARCHIVES:
        return load_archive(name, data, size)
    if not path:
        raise UsageError(
            "the dataset 'folder' needs a path: folder:PATH, with one folder of images per class"
        )
    return load_folder(path, size, skip_damaged, seed)
