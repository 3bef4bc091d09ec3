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
    decoded = _decode_all(list(files), size)
    if damaged := {file: error for file, error in decoded.items() if isinstance(error, Exception)}:
        _report_damaged(damaged, len(files), root, skip_damaged)
    images = {file: image for file, image in decoded.items() if isinstance(image, np.ndarray)}
    _check_no_class_empty([files[file] for file in images], parts, classes)
    _check_alike(images, root)

    labelled = []
    for part in parts:
        chosen = [file for file in images if files[file][0] == part]
        stacked = np.stack([images[file] for file in chosen])
        labelled.append(
            LabelledImages.from_arrays(stacked, [files[file][1] for file in chosen], len(classes))
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


def _decode_all(files: Sequence[Path], size: int | None) -> dict[Path, np.ndarray | Exception]:
    """Every file with its image, or with the reason why there is none."""

    def decode(file: Path) -> np.ndarray | Exception:
        try:
            return _decode(file, size)
        except SourceError:
            raise
        except Exception as error:  # decoders raise nearly anything on damaged bytes
            return error

    with ThreadPoolExecutor() as pool:
        return dict(zip(files, pool.map(decode, files), strict=True))


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


def _check_alike(images: dict[Path, np.ndarray], root: Path) -> None:
    """Raise `SourceError` unless all images have the same channels and size."""
    (first, expected), *others = images.items()
    for file, image in others:
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
