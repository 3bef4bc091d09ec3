"""Images on disk, one folder per class."""

import warnings
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from distilled_data.errors import SourceError

from .resize import resize
from .source import TEST_FRACTION, LabelledImages, Source, split
from .storage import empty

_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".ppm")
_FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "PPM")  # Pillow must not try others, whatever the suffix
_PLAIN_MODE = {"1": "L", "L": "L", "LA": "L", "P": "RGB", "RGB": "RGB", "RGBA": "RGB"}


def load_folder(path: str | Path, size: int | None, skip_damaged: bool, seed: int) -> Source:
    """Read `path`/CLASS/**/IMAGE, or `path`/train/CLASS/... with `path`/test or `path`/val beside it.

    Classes have the order of their names, as in torchvision's ImageFolder. Of an animation the first frame
    counts. Hidden files and links to folders below a class are left out. Without a test folder, `seed` draws
    a test split. Raises `SourceError` for anything that is missing, unreadable, or does not fit together.
    """
    root = Path(path).expanduser().resolve()
    if not root.is_dir():
        raise SourceError(f"{root} is not a folder; expected one that holds a folder of images per class")
    parts = _part_folders(root)
    classes = _class_names(parts, root)
    files = {
        file: (part, target)
        for part in parts
        for target, name in enumerate(classes)
        for file in _image_files(part / name, root)
    }
    images, readable, damaged = _decode_all(list(files), size, root)
    if damaged:
        _report_damaged(damaged, len(files), root, skip_damaged)
    _check_no_class_empty([files[file] for file in readable], parts, classes)
    labelled = []
    for part in parts:  # one after the other in `files`, and so in `readable` and `images`
        targets = [files[file][1] for file in readable if files[file][0] == part]
        first = sum(len(other) for other in labelled)
        labelled.append(
            LabelledImages.from_arrays(images[first : first + len(targets)], targets, len(classes))
        )
    train, test = labelled if len(parts) == 2 else split(labelled[0], classes, TEST_FRACTION, seed)
    return Source.from_splits(
        classes,
        train,
        test,
        name="folder",
        id=f"folder:{root.name}",
        revision="unknown",
        license="unknown",
        citation="",
    )


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
    for path in sorted(folder.rglob("*")):
        if any(name.startswith(".") for name in path.relative_to(folder).parts):
            continue
        if path.is_symlink():
            _check_inside(path, root)
        if path.suffix.lower() in _SUFFIXES:
            yield path


def _check_inside(path: Path, root: Path) -> None:
    if not path.resolve().is_relative_to(root):
        raise SourceError(
            f"{path} is a symbolic link to {path.resolve()}, outside of {root}. "
            "Put the images themselves into the folder, or remove the link."
        )


def _decode_all(
    files: Sequence[Path], size: int | None, root: Path
) -> tuple[np.ndarray, list[Path], dict[Path, Exception]]:
    """uint8 images, the files they are from in the order of `files`, and the unreadable ones with the reason.

    Raises `SourceError` unless all images have the same channels and size.
    """

    def decode(file: Path) -> np.ndarray | Exception:
        try:
            return _decode(file, size)
        except SourceError:
            raise
        except Exception as error:  # decoders raise nearly anything on damaged bytes
            return error

    images: np.ndarray | None = None
    readable: list[Path] = []
    damaged: dict[Path, Exception] = {}
    with ThreadPoolExecutor() as pool:
        for file, found in zip(files, pool.map(decode, files), strict=True):
            if isinstance(found, Exception):
                damaged[file] = found
                continue
            if images is None:
                images = empty(len(files), *found.shape)
            _check_alike(found, file, images[0], (readable or [file])[0], root)
            images[len(readable)] = found
            readable.append(file)
    return (np.empty(0) if images is None else images[: len(readable)]), readable, damaged


def _decode(file: Path, size: int | None) -> np.ndarray:
    """uint8 [height, width] for a grey image, [height, width, 3] for a colour image."""
    with Image.open(file, formats=_FORMATS) as opened:
        image = _plain(ImageOps.exif_transpose(opened), file)
    return np.asarray(image if size is None else resize(image, size))


def _plain(image: Image.Image, file: Path) -> Image.Image:
    """The same pixels in mode L or RGB. Raises `SourceError` where that would lose something."""
    mode = _PLAIN_MODE.get(image.mode)
    if mode is None:
        raise SourceError(
            f"{file} has pixels of Pillow's mode {image.mode!r}, which cannot become 8-bit grey or RGB "
            "without a loss. Convert it to one of these."
        )
    if image.has_transparency_data:
        image = image.convert({"L": "LA", "RGB": "RGBA"}[mode])
        if image.getchannel("A").getextrema() != (255, 255):
            raise SourceError(f"{file} has transparent pixels. Flatten it onto a background of your choice.")
    return image.convert(mode)


def _report_damaged(damaged: dict[Path, Exception], total: int, root: Path, skip: bool) -> None:
    """Warn of the images that are left out, or raise `SourceError` unless `skip`."""
    reasons = [f"{file.relative_to(root)} ({error})" for file, error in damaged.items()]
    if not skip:
        more = "; ..." if len(reasons) > 5 else ""
        raise SourceError(
            f"{root}: {len(damaged)} of {total} images cannot be read: {'; '.join(reasons[:5])}{more}. "
            "Replace them, or leave them out with --skip-damaged."
        )
    message = f"{root}: left out {len(damaged)} of {total} images, which cannot be read: {'; '.join(reasons)}"
    warnings.warn(message, stacklevel=4)  # the caller of `load_source`


def _check_no_class_empty(
    found: Sequence[tuple[Path, int]], parts: Sequence[Path], classes: Sequence[str]
) -> None:
    wanted = {(part, target) for part in parts for target in range(len(classes))}
    if empty := sorted(part / classes[target] for part, target in wanted - set(found)):
        raise SourceError(
            f"class folders without a readable image: {', '.join(map(str, empty))}. "
            f"Add images ({' '.join(_SUFFIXES)}) or remove the folders."
        )


def _check_alike(image: np.ndarray, file: Path, expected: np.ndarray, first: Path, root: Path) -> None:
    """Raise `SourceError` unless both images have the same channels and size."""
    if image.ndim != expected.ndim:
        grey, colour = (first, file) if expected.ndim == 2 else (file, first)
        raise SourceError(
            f"{root}: {grey.relative_to(root)} is grey, {colour.relative_to(root)} is in colour. "
            "Convert all images to one of the two."
        )
    if image.shape != expected.shape:
        raise SourceError(
            f"{root}: {first.relative_to(root)} has {expected.shape[1]} x {expected.shape[0]} pixels, "
            f"{file.relative_to(root)} has {image.shape[1]} x {image.shape[0]}. "
            "Pass --size PIXELS to resize all images."
        )
