"""Units of a source, decoded: what preparing a store leaves behind when it is interrupted.

A unit's pixels are in one file, one image after the other; labels, digests and damage are in a second one,
which is written last. Its name says what was read and how, so a spool is never taken for that of something
else.
"""

import dataclasses
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from distilled_data.errors import OutputError, SourceError
from distilled_data.files import replacing, write_file

from ..cache import sha256_of
from .decode import Decoder, Refused
from .reader import Damage, Reader, Record, Unit
from .source import digest, pixel_sums

BLOCK = 2**18  # bytes of images that are written at once, and no image less
REVISION = 2  # of reading and decoding; raised when files come to other images, so that no old store is taken


@dataclass(frozen=True)
class Spool:
    """A decoded unit; its pixels are in `path`, with the ending .pixels."""

    path: Path  # without an ending
    shape: tuple[int, ...]  # of an image, or () where there is none
    first: str  # name of the first image
    names: list[int | str]  # the labels that occur
    labels: np.ndarray  # int32 [N], in `names`
    digests: np.ndarray  # uint8 [N, 32]
    sums: np.ndarray  # int64 [N, channels, 2]
    damaged: list[Damage]

    @classmethod
    def read(cls, path: Path) -> "Spool":
        """Raises `OutputError` if it is not there."""
        try:
            with safe_open(path.with_suffix(".safetensors"), "np") as file:
                about = json.loads(file.metadata()["about"])
                arrays = {name: file.get_tensor(name) for name in ("labels", "digests", "sums")}
        except SafetensorError as error:
            raise OutputError(
                f"{path} was decoded, and is damaged: {error}. Remove its folder and run again."
            ) from error
        except OSError as error:
            raise OutputError(
                f"{path} was decoded, but is not there or cannot be read: {error}. All processes must share "
                "the folder of the store, and see the same source. Run the command again."
            ) from error
        damaged = [Damage(*row) for row in about["damaged"]]
        return cls(path, tuple(about["shape"]), about["first"], about["names"], damaged=damaged, **arrays)


def spool_path(work: Path, reader: Reader, decoder: Decoder, unit: Unit) -> Path:
    what = [dataclasses.asdict(reader.origin), unit.part, unit.what, dataclasses.asdict(decoder)]
    return work / sha256_of([*what, REVISION])[:32]


def decode_unit(reader: Reader, decoder: Decoder, work: Path, unit: Unit) -> int:
    """Decode one unit into its spool; how many images it has. Raises `SourceError` for different shapes."""
    path, shape, first = spool_path(work, reader, decoder, unit), (), ""
    names: dict[int | str, int] = {}
    labels: list[int] = []
    sums: list[np.ndarray] = []
    digests, damaged, waiting = bytearray(), [], []
    with replacing(path.with_suffix(".pixels")) as temporary, temporary.open("wb") as file:

        def write() -> None:
            """Some images at once: one call for each would take longer than the sums themselves."""
            block = np.stack(waiting)
            file.write(block.data)
            sums.append(pixel_sums(block))
            waiting.clear()

        for record in reader.read(unit):
            try:
                if isinstance(record, Damage):
                    raise Refused(record.reason)
                label = _class(record, reader.classes)
                pixels = decoder(record.image)
            except Refused as reason:
                damaged.append([record.name, str(reason)])
                continue
            if not labels:
                shape, first = pixels.shape, record.name
            elif pixels.shape != shape:
                raise SourceError(unlike(reader.where, first, shape, record.name, pixels.shape))
            labels.append(names.setdefault(label, len(names)))
            digests += digest(pixels)
            waiting.append(pixels)
            if len(waiting) * pixels.nbytes >= BLOCK:
                write()
        if waiting:
            write()
        file.flush()
        os.fsync(file.fileno())
    arrays = {
        "labels": np.array(labels, np.int32),
        "digests": np.frombuffer(digests, np.uint8).reshape(-1, 32),
        "sums": np.concatenate(sums or [np.zeros((0, 1, 2), np.int64)]),
    }
    about = {"shape": shape, "first": first, "names": list(names), "damaged": damaged}
    write_file(path.with_suffix(".safetensors"), save(arrays, {"about": json.dumps(about)}))
    return len(labels)


def _class(record: Record, classes: Sequence[str] | None) -> int | str:
    """The label of a record, where the names of the classes are known its index. Raises `Refused`."""
    label = record.label
    if isinstance(label, str):
        if classes is None:
            return label
        if label not in classes:
            raise Refused(f"label {label!r:.80} is none of the {len(classes)} classes")
        return classes.index(label)
    if label < 0 or (classes is not None and label >= len(classes)):
        raise Refused(f"label {label} is not in 0 to {'...' if classes is None else len(classes) - 1}")
    return label


def unlike(where: str, first: str, shape: Sequence[int], other: str, found: Sequence[int]) -> str:
    """The message for images of different shapes."""
    if shape[0] != found[0]:
        grey, colour = (first, other) if shape[0] == 1 else (other, first)
        return f"{where}: {grey} is grey, {colour} is in colour. Convert all with --channels 1 or 3."
    return (
        f"{where}: {first} has {shape[2]} x {shape[1]} pixels, {other} has {found[2]} x {found[1]}. "
        "Pass --size PIXELS to resize all images."
    )
