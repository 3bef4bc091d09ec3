"""Real photographs for the tests: pieces of the two that come with scikit-learn."""

import io
import struct
import tarfile
import zlib
from functools import cache
from pathlib import Path

import numpy as np
from PIL import Image

CLASSES = ("blossom", "cloud", "eaves", "leaf")


@cache
def photographs(per_class: int, classes: int = len(CLASSES), side: int = 12) -> tuple[np.ndarray, np.ndarray]:
    """uint8 [N, side, side, 3] and labels [N], each class is from a place of its own."""
    from sklearn.datasets import load_sample_images

    chosen, random = load_sample_images().images, np.random.default_rng(0)
    images, labels = [], np.tile(np.arange(classes), per_class)
    for label in labels:
        y, x = 90 * (label // 2) + random.integers(0, 80), random.integers(0, 640 - side)
        images.append(chosen[label % 2][y : y + side, x : x + side])
    return np.stack(images), labels


def encoded(image: np.ndarray | Image.Image, kind: str = "png", **options) -> bytes:
    file = io.BytesIO()
    image = image if isinstance(image, Image.Image) else Image.fromarray(image)
    image.save(file, {"jpg": "jpeg"}.get(kind, kind), **options)
    return file.getvalue()


def write_tar(path: Path, files: list[tuple[str, bytes]], mode: str = "w") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, mode) as archive:
        for name, content in files:
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            archive.addfile(entry, io.BytesIO(content))
    return path


def write_shards(
    folder: Path, images: np.ndarray, labels: np.ndarray, shards: int = 3, part: str = "train"
) -> Path:
    """WebDataset shards of PNG, and the names of the classes beside them."""
    for number in range(shards):
        files = []
        for row in range(number, len(images), shards):
            files += [(f"{row:06d}.png", encoded(images[row])), (f"{row:06d}.cls", b"%d" % labels[row])]
        write_tar(folder / f"{part}-{number:05d}.tar", files)
    (folder / "classes.txt").write_text("\n".join(CLASSES))
    return folder


def write_folder(folder: Path, images: np.ndarray, labels: np.ndarray) -> Path:
    for row, (image, label) in enumerate(zip(images, labels, strict=True)):
        path = folder / CLASSES[label] / f"{row}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(encoded(image))
    return folder


def by_pixels(images: np.ndarray, labels: np.ndarray) -> dict[bytes, int]:
    """What `pixels_of` finds in a source of these."""
    planes = images.transpose(0, 3, 1, 2)
    return {image.tobytes(): int(label) for image, label in zip(planes, labels, strict=True)}


def pixels_of(source) -> dict[bytes, int]:
    """The label of every image of a source, by its bytes."""
    return {
        image.numpy().tobytes(): target
        for part in (source.train, source.test)
        for image, target in zip(part.images, part.targets.tolist(), strict=True)
    }


def chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def png_of_16_bits(kind: int) -> bytes:
    """Two pixels of colour (2) or with an alpha channel (6), 16 bits each."""
    header = struct.pack(">IIBBBBB", 2, 1, 16, kind, 0, 0, 0)
    row = zlib.compress(b"\0" + b"\xff\xff" * 2 * {2: 3, 6: 4}[kind])
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", row) + chunk(b"IEND", b"")
