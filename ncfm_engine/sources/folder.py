"""Images on disk, one folder per class."""

import errno
import os
import re
import stat
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from distilled_data.errors import SourceError
from distilled_data.terminal import shortened

from .reader import PARTS, Damage, Origin, Record, Unit, stamp
from .sorting import check_no_class_empty

FILES = 1024  # in a unit

_IMAGE = re.compile(
    r"\.(png|jpe?g|jpe|jfif|webp|bmp|gif|p[bgnp]m|"
    # These the decoder cannot read, and names; they must not be left out in silence.
    r"apng|avif|dib|exr|hei[cf]|hdr|ico|j2k|jp2|jxl|mpo|pfm|psd|svg|tga|tiff?)\Z",
    re.IGNORECASE,
)
# What lies beside images and is none.
_NOTE = re.compile(r"\.(csv|db|html?|ini|jsonl?|log|md|tsv|txt|url|xml|ya?ml)\Z", re.IGNORECASE)
_TEST_FOLDERS = ("test", "val", "valid", "validation")
_ANNOTATIONS = "val_annotations.txt"  # of Tiny ImageNet: name and class of each file in `images` beside it
_SPLITS = frozenset(("train", "training", "testing", "eval", "dev", *_TEST_FOLDERS))


class FolderReader:
    """`path`/CLASS/**/IMAGE, or `path`/train/CLASS/... with test, val, valid or validation beside it, which
    may be as in Tiny ImageNet: all images in one folder, and their classes in a file beside that.

    Classes have the order of their names, as in torchvision's ImageFolder. Hidden files and links to folders
    below a class are left out, and with a warning what has no suffix of an image and another folder of test
    images. Raises `SourceError` for folders that do not fit together.
    """

    def __init__(self, path: str | Path):
        # Not Path.resolve, which raises a RuntimeError where links go round in a circle.
        self.root = root = Path(os.path.realpath(Path(path).expanduser()))
        self.where = str(root)
        if not root.is_dir():
            raise SourceError(f"{root} is not a folder; expected one that holds a folder of images per class")
        folders = {folder: _annotated(folder, root) for folder in _part_folders(root)}
        self.classes = _class_names(folders, root)
        self.origin = Origin(root.name, f"folder:{root.name}")
        others: list[Path] = []
        files = {
            part: [
                [str(file.relative_to(root)), label, *stamp(file)]
                for label, name in enumerate(self.classes)
                for file in told.get(name) or _image_files(folder / name, root, others)
            ]
            for part, (folder, told) in zip(PARTS, folders.items(), strict=False)
        }
        self.units = [
            Unit(part, found[first : first + FILES])
            for part, found in files.items()
            for first in range(0, len(found), FILES)
        ]
        if others:
            warnings.warn(
                f"{root}: left out {len(others)} files whose names are not those of images, such as "
                f"{others[0].relative_to(root)}. Give images a suffix, such as .png.",
                stacklevel=2,
            )
        for folder, told in folders.items():
            named = {image for images in told.values() for image in images}
            unnamed = [i for i in _image_files(folder / "images", root, []) if i not in named] if told else []
            if unnamed:
                warnings.warn(
                    f"{root}: left out {len(unnamed)} images that {_ANNOTATIONS} does not name, such as "
                    f"{unnamed[0].relative_to(root)}.",
                    stacklevel=2,
                )
        for part, found in files.items():  # now, and not after hours of decoding
            labels = [label for _, label, *_ in found]
            check_no_class_empty(labels, self.classes, part if len(files) > 1 else "", self.where)

    def read(self, unit: Unit) -> Iterator[Record | Damage]:
        for name, label, *_ in unit.what:
            path = self.root / name
            try:
                # Asked first, because who opens a pipe waits for what will never be written.
                content = path.read_bytes() if stat.S_ISREG(path.stat().st_mode) else None
            except OSError as error:
                if error.errno not in (errno.ENOENT, errno.ELOOP):
                    # It may be over tomorrow, so it must not be remembered as damage.
                    raise SourceError(f"{path} cannot be read: {error.strerror}") from error
                yield Damage(name, str(error.strerror))
            else:
                yield Damage(name, "not a regular file") if content is None else Record(name, label, content)


def _part_folders(root: Path) -> list[Path]:
    """The train and the test folder, or `root` alone where it holds the classes themselves. Of several for
    testing it is the first with the classes of train: others may hold images without labels.
    """
    found = [name for name in _TEST_FOLDERS if (root / name).is_dir()]
    if not found or not (root / "train").is_dir():
        return [root]
    train, *classes = (_classes_in(root / name, root) for name in ("train", *found))
    test = found[classes.index(train) if train in classes else 0]
    if unused := [name for name in found if name != test]:
        warnings.warn(
            f"{root}: the test images are those in {test}; left out: {', '.join(unused)}. To use their "
            "images, move them into another folder.",
            stacklevel=3,
        )
    return [root / "train", root / test]


def _classes_in(folder: Path, root: Path) -> set[str]:
    return set(_annotated(folder, root)) or {
        child.name for child in folder.iterdir() if child.is_dir() and not child.name.startswith(".")
    }


def _annotated(folder: Path, root: Path) -> dict[str, list[Path]]:
    """The images of each class as a file tells them; nothing where there is none."""
    path, images, found = folder / _ANNOTATIONS, folder / "images", {}
    if not (path.is_file() and images.is_dir()):
        return found
    _check_inside(images, root)
    named: set[str] = set()
    for number, line in enumerate(path.read_text(encoding="utf-8", errors="replace").splitlines(), start=1):
        name, label, *_ = (*line.split("\t"), "")
        if not label or Path(name).name != name or "\0" in name:
            raise SourceError(
                f"{path}, line {number}: expected the name of an image in {images.name}, a tab and its "
                f"class, got {line[:80]!r}"
            )
        if name in named:
            raise SourceError(f"{path}, line {number}: {name} is there twice. Remove one of the lines.")
        named.add(name)
        if (images / name).is_symlink():
            _check_inside(images / name, root)
        found.setdefault(label, []).append(images / name)
    return found


def _class_names(parts: Mapping[Path, Mapping[str, object]], root: Path) -> list[str]:
    """`parts` are folders of classes, or what is told of the images in them."""
    unsorted = [part for part, told in parts.items() if not told]
    children = [child for part in unsorted for child in part.iterdir() if not child.name.startswith(".")]
    for child in children:
        if child.is_symlink() and not child.suffix and not child.exists():
            raise SourceError(
                f"{child} is a symbolic link to {os.readlink(child)}, which is not there, so perhaps a class "
                "is missing. Mend the link, or remove it."
            )
    folders = [child for child in children if child.is_dir()]
    for folder in folders:
        _check_inside(folder, root)
        _check_name(folder)
    for part in unsorted:
        _check_no_splits([folder for folder in folders if folder.parent == part], part)
    names = [
        set(told) or {folder.name for folder in folders if folder.parent == part}
        for part, told in parts.items()
    ]
    if names[0] != names[-1]:
        alone = zip(parts, (names[0] - names[-1], names[-1] - names[0]), strict=False)
        found = "; ".join(f"only {part.name} has {shortened(sorted(own))}" for part, own in alone if own)
        raise SourceError(
            f"{' and '.join(map(str, parts))} must hold the same class folders; {found}. Add the folders "
            "with their images, or remove those without a counterpart; images without labels are no test "
            "images."
        )
    if len(names[0]) < 2:
        found = f"one class folder ({min(names[0])})" if names[0] else "no class folders"
        raise SourceError(
            f"{next(iter(parts))} holds {found}; expected two or more, each with the images of one class"
        )
    return sorted(names[0])


def _check_name(folder: Path) -> None:
    try:
        folder.name.encode()
    except UnicodeEncodeError as error:  # no artifact could hold it
        raise SourceError(
            f"the name of the class folder {os.fsencode(folder)!r} is not UTF-8. Rename the folder."
        ) from error


def _check_no_splits(folders: Sequence[Path], part: Path) -> None:
    """One class may be called "train", as that of CIFAR-100 is: then it holds images, not only folders."""
    splits = [folder for folder in folders if folder.name.casefold() in _SPLITS]
    if len(splits) > 1 or any(not _holds_images(folder) for folder in splits):
        raise SourceError(
            f"{part} holds {', '.join(sorted(folder.name for folder in splits))}, named like a split of "
            "data, not like a class. Expected a folder of images per class; or train, with such folders, and "
            f"one of {', '.join(_TEST_FOLDERS)} beside it, in small letters. Rename the folders, or name the "
            "one that holds the classes."
        )


def _holds_images(folder: Path) -> bool:
    return any(_IMAGE.search(path.name) and not path.is_dir() for path in folder.iterdir())


def _image_files(folder: Path, root: Path, others: list[Path]) -> Iterator[Path]:
    """Files that are named like images; what is named neither so nor like notes is added to `others`."""

    def refuse(error: OSError) -> None:  # os.walk would leave the folder out
        raise SourceError(f"the folder {error.filename} cannot be read: {error.strerror}") from error

    for place, folders, found in os.walk(folder, onerror=refuse):
        files = frozenset(found)
        for name in sorted((*folders, *files)):
            path = Path(place, name)
            if name.startswith("."):
                continue
            if path.is_symlink():
                _check_inside(path, root)
            if name in files and _IMAGE.search(name):
                yield path
            elif name in files and not _NOTE.search(name):
                others.append(path)
        folders[:] = sorted(name for name in folders if not name.startswith("."))


def _check_inside(path: Path, root: Path) -> None:
    target = Path(os.path.realpath(path))
    if not target.is_relative_to(root):
        raise SourceError(
            f"{path} is a symbolic link to {target}, outside of {root}. "
            "Put the images themselves into the folder, or remove the link."
        )
