"""A prepared data set on disk: class-sorted images in safetensors files that are mapped, not read.

    index.json                    classes, counts, shape, mean, std, fingerprint, origin, what was left out
    train-00000.safetensors       images uint8 [n, channels, height, width], digests uint8 [n, 32],
                                  sums int64 [n, channels, 2]
    test-00000.safetensors        likewise

Images are sorted by class and, within a class, by sha256 of their bytes, through all files of a part. Equal
images give equal files, whatever they came from. `digests` are those sha256, `sums` the sums of each
channel's pixels and of their squares: what mean, std and fingerprint of any subset follow from without
reading an image.
"""

import contextlib
import dataclasses
import json
import math
import mmap
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from distilled_data.errors import IntegrityError, SourceError
from distilled_data.files import regular, replacing, write_file

from .images import Images
from .reader import PARTS, Damage, Origin
from .source import LabelledImages, Source, digest, pixel_sums

INDEX_FILE = "index.json"
FORMAT_VERSION = 1
AGAIN = "Remove the folder and prepare it again."
SHARD_BYTES = 2**30  # of images in a file, at most; one image at least

_PAGE = 4096  # bytes; images begin at a multiple of it, so that the fewest pages hold one


def _memory() -> float:
    """Bytes that this machine has; infinite where Python cannot tell: on Windows, and on some Macs."""
    with contextlib.suppress(AttributeError, ValueError, OSError):
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return math.inf


MEMORY = _memory()


@dataclass(frozen=True)
class Index:
    """`index.json`."""

    origin: Origin
    classes: tuple[str, ...]
    shape: tuple[int, ...]  # channels, height, width
    mean: tuple[float, ...]
    std: tuple[float, ...]
    fingerprint: str  # of `Source`
    counts: dict[str, list[int]]  # by part, images of each class
    shards: dict[str, list[int]]  # by part, images of each file
    test: str  # where the test images come from
    decoder: dict[str, Any]  # how images were resized and converted
    stamp: str  # changes with the files of the source and with how they were prepared
    damaged: tuple[Damage, ...]  # what was left out


def read_index(folder: Path) -> Index:
    """Raises `SourceError` for a folder that is no whole store."""
    path = folder / INDEX_FILE
    try:
        content = json.loads(regular(path).read_bytes())
        if (version := content.pop("format_version")) != FORMAT_VERSION:
            raise ValueError(f"format version {version!r}, this package reads {FORMAT_VERSION}")
        tuples = {name: tuple(content.pop(name)) for name in ("classes", "shape", "mean", "std")}
        origin = Origin(**content.pop("origin"))
        damaged = tuple(Damage(**row) for row in content.pop("damaged"))
        sizes = {name: {part: list(content[name][part]) for part in PARTS} for name in ("counts", "shards")}
        if not all(isinstance(word, str) for word in (*tuples["classes"], *dataclasses.astuple(origin))):
            raise ValueError("classes, or an origin, that are not texts")
        _check_sizes(len(tuples["classes"]), tuples["shape"], **sizes)
        return Index(origin=origin, damaged=damaged, **tuples, **content | sizes)
    except (FileNotFoundError, NotADirectoryError) as error:
        raise SourceError(
            f"{folder} is not a store: it has no {INDEX_FILE}. Make one with prepare.py."
        ) from error
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise SourceError(f"{path} is not the index of a store: {error}. {AGAIN}") from error


def _check_sizes(
    classes: int, shape: Sequence[Any], counts: dict[str, list[Any]], shards: dict[str, list[Any]]
) -> None:
    """Raise `ValueError` for what would make tensors of other sizes than the files have."""
    for numbers, least in (
        (shape, 1),
        *((c, 0) for c in counts.values()),
        *((s, 1) for s in shards.values()),
    ):
        if not numbers or not all(type(number) is int and number >= least for number in numbers):
            raise ValueError(f"sizes that are not whole numbers, {least} or more")
    for part in PARTS:
        if len(counts[part]) != classes or sum(counts[part]) != sum(shards[part]):
            raise ValueError(f"counts of {part} that do not fit its classes and files")


def open_store(folder: str | Path, index: Index | None = None) -> Source:
    """The images of a store, mapped. Raises `SourceError`, `IntegrityError` where the files do not fit.

    `index` is that of the folder, if it was read already: images of another one are refused then.
    """
    folder = Path(folder).expanduser()
    index = index or read_index(folder)
    source = map_shards(folder, index.origin, index.classes, index.shape, index.counts, index.shards)
    if (source.fingerprint, source.mean, source.std) != (index.fingerprint, index.mean, index.std):
        raise IntegrityError(
            f"{folder}: the files make up {source.fingerprint}, mean {source.mean}, std {source.std}; "
            f"{INDEX_FILE} says {index.fingerprint}, {index.mean}, {index.std}. {AGAIN}"
        )
    return source


def verify_store(folder: str | Path) -> int:
    """Compare every image with its digest and its sums; how many they are. Raises `IntegrityError`."""
    source = open_store(folder)
    for part, images in zip(PARTS, (source.train, source.test), strict=True):
        for row, image in enumerate(Images.of(images.images)):
            pixels = image.numpy()
            sums = torch.from_numpy(pixel_sums(pixels[None])[0])
            if digest(pixels) != images.digests[row].numpy().tobytes() or not torch.equal(
                sums, images.sums[row]
            ):
                raise IntegrityError(
                    f"{folder}: image {row} of {part} is not the one that was prepared. {AGAIN}"
                )
    return len(source.train) + len(source.test)


def describe_store(folder: str | Path) -> str:
    """What is in a store, for people."""
    folder = Path(folder).expanduser()
    index = read_index(folder)
    images = {part: sum(counts) for part, counts in index.counts.items()}
    nbytes = sum(path.stat().st_size for path in folder.iterdir())
    smallest, largest = min(index.counts["train"]), max(index.counts["train"])
    lines = [
        f"{folder}: {index.origin.id}, {images['train']} + {images['test']} images of "
        f"{'x'.join(map(str, index.shape))}, {len(index.classes)} classes of {smallest} to {largest}, "
        f"{nbytes / 1e6:.1f} MB",
        f"classes      {', '.join(index.classes[:5])}{', ...' if len(index.classes) > 5 else ''}",
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
    shape: Sequence[int],
    counts: dict[str, list[int]],
    shards: dict[str, list[int]],
) -> Source:
    """The images in the files of `folder`, measured."""
    parts = []
    scattered = sum(map(sum, shards.values())) * math.prod(shape) > MEMORY / 2
    for part in PARTS:
        tensors = [
            _tensors(shard_path(folder, part, number), count, shape, scattered)
            for number, count in enumerate(shards[part])
        ]
        images = [found["images"] for found in tensors]
        targets = torch.arange(len(classes)).repeat_interleave(torch.tensor(counts[part]))
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
    with replacing(path) as temporary, temporary.open("wb") as file:
        file.write(_header(len(digests), shape))
        file.write(np.ascontiguousarray(sums, "<i8").data)
        file.write(np.ascontiguousarray(digests).data)
        for block in images:
            file.write(block.data)
        file.flush()
        os.fsync(file.fileno())


def is_written(path: Path, shape: Sequence[int], digests: np.ndarray, sums: np.ndarray) -> bool:
    """Whether the whole file is there already, with the images of these `digests`."""
    try:
        found = _tensors(path, len(digests), shape, scattered=True)
    except IntegrityError:
        return False
    return np.array_equal(found["digests"].numpy(), digests) and np.array_equal(found["sums"].numpy(), sums)


def write_index(folder: Path, index: Index) -> None:
    content = {"format_version": FORMAT_VERSION} | dataclasses.asdict(index)
    write_file(folder / INDEX_FILE, json.dumps(content, indent=1, sort_keys=True).encode() + b"\n")


def _layout(count: int, shape: Sequence[int]) -> dict[str, tuple[torch.dtype, list[int], int, int]]:
    """Type, shape, begin and end of each tensor of a file with `count` images [channels, height, width]."""
    sizes = {
        "sums": (torch.int64, [count, shape[0], 2]),
        "digests": (torch.uint8, [count, 32]),
        "images": (torch.uint8, [count, *shape]),
    }
    layout, end = {}, 0
    for name, (dtype, size) in sizes.items():
        begin, end = end, end + math.prod(size) * dtype.itemsize
        layout[name] = dtype, size, begin, end
    return layout


def _header(count: int, shape: Sequence[int]) -> bytes:
    """Of a safetensors file; the images begin at a page."""
    layout, kinds = _layout(count, shape), {torch.int64: "I64", torch.uint8: "U8"}
    header = {
        name: {"dtype": kinds[dtype], "shape": size, "data_offsets": [begin, end]}
        for name, (dtype, size, begin, end) in layout.items()
    }
    text = json.dumps(header).encode()
    text += b" " * (-(8 + len(text) + layout["images"][2]) % _PAGE)
    return len(text).to_bytes(8, "little") + text


def _tensors(path: Path, count: int, shape: Sequence[int], scattered: bool) -> dict[str, Tensor]:
    """The tensors of one file, mapped; if `scattered`, single images will be read from the disk."""
    header, layout = _header(count, shape), _layout(count, shape)
    try:
        with regular(path).open("rb", buffering=0) as file:
            if (
                file.read(len(header)) != header
                or os.fstat(file.fileno()).st_size != len(header) + layout["images"][3]
            ):
                raise ValueError(f"it does not hold {count} images of {list(shape)}")
            mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
    except (OSError, ValueError) as error:
        raise IntegrityError(f"{path} cannot be read: {error}. {AGAIN}") from error
    if scattered and hasattr(mmap, "MADV_RANDOM"):  # which Windows lacks
        mapped.madvise(mmap.MADV_RANDOM)  # else the kernel reads megabytes around every image
    return {
        name: torch.frombuffer(mapped, dtype=dtype, count=math.prod(size), offset=len(header) + begin).view(
            size
        )
        for name, (dtype, size, begin, _) in layout.items()
    }
