"""A prepared data set on disk: class-sorted images in safetensors files that are mapped, not read.

    index.json                    classes, counts, shape, mean, std, fingerprint, origin, what was left out
    train-00000.safetensors       images uint8 [n, channels, height, width], digests [n, 32], sums [n,
    channels, 2] test-00000.safetensors

Images are sorted by class and, within a class, by sha256 of their bytes, through all files of a part. Equal
images give equal files, whatever they came from. `digests` are those sha256, `sums` the sums of each
channel's pixels and of their squares: what mean, std and fingerprint of any subset follow from without
reading an image.
"""

import dataclasses
import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from distilled_data.errors import IntegrityError, SourceError
from distilled_data.format import write_file

from .images import Images
from .reader import PARTS, Damage, Origin
from .source import LabelledImages, Source, digest

INDEX_FILE = "index.json"
FORMAT_VERSION = 1
SHARD_BYTES = 2**30  # of images in a file, at most; one image at least

_PAGE = 4096  # bytes; images begin at a multiple of it, so that the fewest pages hold one


@dataclass(frozen=True)
class Index:
    """`index.json`."""

    origin: Origin
    classes: tuple[str, ...]
    shape: tuple[int, int, int]  # channels, height, width
    mean: tuple[float, ...]
    std: tuple[float, ...]
    fingerprint: str  # of `Source`
    counts: dict[str, list[int]]  # by part, images of each class
    shards: dict[str, list[int]]  # by part, images of each file
    test: str  # where the test images come from
    decoder: dict[str, Any]  # how images were resized and converted
    stamp: str  # changes with the files of the source and with how they were prepared
    damaged: tuple[Damage, ...]  # what was left out

    def to_bytes(self) -> bytes:
        content = {"format_version": FORMAT_VERSION} | dataclasses.asdict(self)
        return json.dumps(content, indent=1, sort_keys=True).encode() + b"\n"


def read_index(folder: Path) -> Index:
    """Raises `SourceError` for a folder that is no whole store."""
    path = folder / INDEX_FILE
    try:
        content = json.loads(path.read_bytes())
        if (version := content.pop("format_version")) != FORMAT_VERSION:
            raise ValueError(f"format version {version!r}, this package reads {FORMAT_VERSION}")
        tuples = {name: tuple(content.pop(name)) for name in ("classes", "shape", "mean", "std")}
        origin = Origin(**content.pop("origin"))
        damaged = tuple(Damage(**row) for row in content.pop("damaged"))
        return Index(origin=origin, damaged=damaged, **tuples, **content)
    except FileNotFoundError as error:
        raise SourceError(
            f"{folder} is not a store: it has no {INDEX_FILE}. Make one with prepare.py."
        ) from error
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise SourceError(f"{path} is not the index of a store: {error}. Prepare it again.") from error


def open_store(folder: str | Path) -> Source:
    """The images of a store, mapped. Raises `SourceError`, `IntegrityError` where the files do not fit."""
    folder = Path(folder)
    index = read_index(folder)
    source = map_shards(folder, index.origin, index.classes, index.counts, index.shards)
    if source.fingerprint != index.fingerprint:
        raise IntegrityError(
            f"{folder}: the files make up {source.fingerprint}, {INDEX_FILE} says {index.fingerprint}. "
            "Prepare it again."
        )
    return source


def verify_store(folder: str | Path) -> int:
    """Compare every image with its digest; how many they are. Raises `IntegrityError`."""
    source = open_store(folder)
    for part in (source.train, source.test):
        for row, image in enumerate(Images.of(part.images)):
            if digest(image.numpy()) != part.digests[row].numpy().tobytes():
                raise IntegrityError(
                    f"{folder}: image {row} of {'train' if part is source.train else 'test'} is not the "
                    "one that was "
                    "prepared. Prepare it again."
                )
    return len(source.train) + len(source.test)


def describe_store(folder: str | Path) -> str:
    """What is in a store, for people."""
    folder = Path(folder)
    index = read_index(folder)
    images = {part: sum(counts) for part, counts in index.counts.items()}
    nbytes = sum(path.stat().st_size for path in folder.iterdir())
    smallest, largest = min(index.counts["train"]), max(index.counts["train"])
    lines = [
        f"{folder}: {index.origin.id}, {images['train']} + {images['test']} images of "
        f"{'x'.join(map(str, index.shape))}, {len(index.classes)} classes of {smallest} to {largest}, "
        f"{nbytes / 1e6:.1f} MB",
        f"test         from {index.test}",
        f"mean         {', '.join(f'{value:.4f}' for value in index.mean)}",
        f"std          {', '.join(f'{value:.4f}' for value in index.std)}",
        f"licence      {index.origin.license}",
        f"fingerprint  {index.fingerprint}",
    ]
    if index.damaged:
        lines.append(f"left out     {len(index.damaged)}")
        lines += [f"             {damage.name}: {damage.reason}" for damage in index.damaged[:20]]
        if len(index.damaged) > 20:
            lines.append(f"             and the others in {folder / INDEX_FILE}")
    return "\n".join(lines)


def map_shards(
    folder: Path,
    origin: Origin,
    classes: Sequence[str],
    counts: dict[str, list[int]],
    shards: dict[str, list[int]],
) -> Source:
    """The images in the files of `folder`, measured."""
    parts = []
    for part in PARTS:
        tensors = [_tensors(shard_path(folder, part, number), n) for number, n in enumerate(shards[part])]
        images = [found["images"] for found in tensors]
        targets = torch.arange(len(classes)).repeat_interleave(torch.tensor(counts[part]))
        if sum(shards[part]) != len(targets) or len({image.shape[1:] for image in images}) != 1:
            raise IntegrityError(f"{folder}: the files of {part} do not fit together. Prepare it again.")
        parts.append(
            LabelledImages(
                images[0] if len(images) == 1 else Images(images),
                targets,
                len(classes),
                torch.cat([found["digests"] for found in tensors]),
                torch.cat([found["sums"] for found in tensors]),
            )
        )
    return Source.from_splits(origin, classes, *parts)


def shard_path(folder: Path, part: str, number: int) -> Path:
    return folder / f"{part}-{number:05d}.safetensors"


def write_shard(
    path: Path, images: Iterator[np.ndarray], shape: Sequence[int], digests: np.ndarray, sums: np.ndarray
) -> None:
    """Write blocks uint8 [n, channels, height, width] of `images`, as many as `digests`, piece by piece."""
    count = len(digests)
    entries = {
        "sums": ("I64", sums.shape, sums.nbytes),
        "digests": ("U8", digests.shape, digests.nbytes),
        "images": ("U8", (count, *shape), count * int(np.prod(shape))),
    }
    header: dict[str, Any] = {"__metadata__": {"content": content_hash(digests)}}
    end = 0
    for name, (dtype, sizes, nbytes) in entries.items():
        header[name] = {"dtype": dtype, "shape": list(sizes), "data_offsets": [end, end + nbytes]}
        end += nbytes
    text = json.dumps(header).encode()
    text += b" " * (-(8 + len(text) + sums.nbytes + digests.nbytes) % _PAGE)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            file.write(len(text).to_bytes(8, "little") + text)
            file.write(np.ascontiguousarray(sums, "<i8").data)
            file.write(np.ascontiguousarray(digests).data)
            for block in images:
                file.write(block.data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def is_written(path: Path, digests: np.ndarray) -> bool:
    """Whether the whole file is there already, with the images of these `digests`."""
    try:
        with safe_open(path, "np") as file:  # compares the file's size with its header
            return (file.metadata() or {}).get("content") == content_hash(digests)
    except (OSError, SafetensorError):
        return False


def content_hash(digests: np.ndarray) -> str:
    return hashlib.sha256(np.ascontiguousarray(digests).data).hexdigest()


def write_index(folder: Path, index: Index) -> None:
    write_file(folder / INDEX_FILE, index.to_bytes())


def _tensors(path: Path, count: int) -> dict[str, Tensor]:
    """The tensors of one file, mapped."""
    try:
        with safe_open(path, "pt") as file:
            found = {name: file.get_tensor(name) for name in ("images", "digests", "sums")}
    except (OSError, SafetensorError) as error:
        raise IntegrityError(f"{path} cannot be read: {error}. Prepare the store again.") from error
    if {len(tensor) for tensor in found.values()} != {count}:
        raise IntegrityError(f"{path} does not hold {count} images. Prepare the store again.")
    return found
