"""Images on disk, one folder per class."""

import os
from collections.abc import Iterator, Sequence
from pathlib import Path

from distilled_data.errors import SourceError

from .reader import PARTS, Damage, Origin, Record, Unit, stamp

FILES = 1024  # in a unit

_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".ppm")


class FolderReader:
    """`path`/CLASS/**/IMAGE, or `path`/train/CLASS/... with `path`/test or `path`/val beside it.

    Classes have the order of their names, as in torchvision's ImageFolder. Hidden files and links to folders
    below a class are left out. Raises `SourceError` for folders that do not fit together.
    """

    def __init__(self, path: str | Path):
        self.root = root = Path(path).expanduser().resolve()
        self.where = str(root)
        if not root.is_dir():
            raise SourceError(f"{root} is not a folder; expected one that holds a folder of images per class")
        folders = _part_folders(root)
        self.classes = _class_names(folders, root)
        self.origin = Origin(root.name, f"folder:{root.name}")
        self.units = []
        for part, folder in zip(PARTS, folders, strict=False):
            files = [
                [str(file.relative_to(root)), label, *stamp(file)]
                for label, name in enumerate(self.classes)
                for file in _image_files(folder / name, root)
            ]
            self.units += [Unit(part, files[first : first + FILES]) for first in range(0, len(files), FILES)]

    def read(self, unit: Unit) -> Iterator[Record | Damage]:
        for name, label, *_ in unit.what:
            try:
                content = (self.root / name).read_bytes()
            except FileNotFoundError as error:
                yield Damage(name, str(error.strerror))
            except OSError as error:  # which may be over tomorrow, so it must not be remembered as damage
                raise SourceError(f"{self.root / name} cannot be read: {error.strerror}") from error
            else:
                yield Record(name, label, content)


def _part_folders(root: Path) -> list[Path]:
    """The train and the test folder, or `root` alone where it holds the classes themselves."""
    test = next((root / name for name in ("test", "val") if (root / name).is_dir()), None)
    return [root / "train", test] if test and (root / "train").is_dir() else [root]


def _class_names(parts: Sequence[Path], root: Path) -> list[str]:
    folders = [
        child
        for part in parts
        for child in part.iterdir()
        if child.is_dir() and not child.name.startswith(".")
    ]
    for folder in folders:
        _check_inside(folder, root)
    names = [{folder.name for folder in folders if folder.parent == part} for part in parts]
    if different := names[0] ^ names[-1]:
        raise SourceError(
            f"{parts[0]} and {parts[-1]} must hold the same class folders; only one of them has "
            f"{', '.join(sorted(different))}"
        )
    if len(names[0]) < 2:
        raise SourceError(
            f"{parts[0]} holds {len(names[0])} class folders ({', '.join(names[0])}); expected two or more, "
            "each with the images of one class"
        )
    return sorted(names[0])


def _image_files(folder: Path, root: Path) -> Iterator[Path]:
    def refuse(error: OSError) -> None:  # os.walk would leave the folder out
        raise SourceError(f"the folder {error.filename} cannot be read: {error.strerror}") from error

    for place, folders, files in os.walk(folder, onerror=refuse):
        for name in sorted(folders + files):
            path = Path(place, name)
            if name.startswith("."):
                continue
            if path.is_symlink():
                _check_inside(path, root)
            if name in files and path.suffix.lower() in _SUFFIXES:
                yield path
        folders[:] = sorted(name for name in folders if not name.startswith("."))


def _check_inside(path: Path, root: Path) -> None:
    if not path.resolve().is_relative_to(root):
        raise SourceError(
            f"{path} is a symbolic link to {path.resolve()}, outside of {root}. "
            "Put the images themselves into the folder, or remove the link."
        )
