"""Arrays in an `.npz` file, read without holding them whole."""

import zipfile
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO

import numpy as np
from numpy.lib import format as npy

from distilled_data.errors import SourceError

from ..cache import sha256_of
from .reader import Damage, Origin, Record, Unit, fault_of, stamp

_NAMES = {  # of MedMNIST, of Keras, of tools/convert.py; the first pair that is there counts
    "train": (("train_images", "train_labels"), ("x_train", "y_train"), ("images", "labels"), ("x", "y")),
    "test": (("test_images", "test_labels"), ("x_test", "y_test")),
}
_ERRORS = (OSError, ValueError, EOFError, RuntimeError, zipfile.BadZipFile, zlib.error)  # encrypted, cut, ...
_ERRORS += (MemoryError, OverflowError)  # of a header that promises more than there can be
_BLOCK = 2**22  # bytes that are read at once


class NpzReader:
    """uint8 images [N, height, width], [N, height, width, 3] or channels first, and integer labels [N].

    The file may hold `classes`, their names. Nothing is ever unpickled. Raises `SourceError`.
    """

    def __init__(self, path: str | Path, classes: Sequence[str] | None = None):
        self.path = Path(path).expanduser().resolve()
        self.where = str(self.path)
        self.origin = Origin(self.path.stem, f"npz:{self.path.name}")
        try:
            with zipfile.ZipFile(self.path) as file:
                held = {name.removesuffix(".npy") for name in file.namelist() if name.endswith(".npy")}
                if classes is None and "classes" in held:
                    classes = [str(name) for name in self._whole(file, "classes").astype(np.str_).flatten()]
                    if fault := fault_of(classes):
                        raise ValueError(fault)
                factor = self._whole(file, "factor") if {"factor", "mean", "std"} <= held else np.array(1)
                if factor.dtype.kind in "iu" and factor.size == 1 and factor.item() > 1:  # of our own export
                    raise ValueError(
                        f"a distilled set with {factor} x {factor} tiles to an image, not images"
                    )
        except _ERRORS as error:
            raise SourceError(f"{self.path} cannot be read as .npz: {error}") from error
        self.classes = classes
        self.arrays = {
            part: next((pair for pair in pairs if held >= set(pair)), None) for part, pairs in _NAMES.items()
        }
        if self.arrays["train"] is None:
            raise SourceError(
                f"{self.path} holds the arrays {', '.join(sorted(held))}; expected images and labels, "
                "named as in " + " or ".join(f"{images} and {labels}" for images, labels in _NAMES["train"])
            )
        self.units = [
            Unit(part, [*pair, *stamp(self.path), *([] if classes is None else [sha256_of(classes)])])
            for part, pair in self.arrays.items()
            if pair is not None
        ]

    def read(self, unit: Unit) -> Iterator[Record | Damage]:
        name, labels_name, *_ = unit.what
        try:
            with zipfile.ZipFile(self.path) as file:
                labels = self._whole(file, labels_name)
                with file.open(f"{name}.npy") as stream:
                    count, blocks = _images(stream)
                    if labels.dtype.kind not in "iu" or labels.size != count:
                        raise ValueError(
                            f"{labels_name} is {labels.dtype} {list(labels.shape)}; expected an integer "
                            f"for each of the {count} images"
                        )
                    row = 0
                    for block in blocks:
                        for image in block:
                            yield Record(f"{name}[{row}]", int(labels.flat[row]), image)
                            row += 1
        except _ERRORS as error:
            raise SourceError(f"{self.path}, array {name}: {error}") from error

    @staticmethod
    def _whole(file: zipfile.ZipFile, name: str) -> np.ndarray:
        with file.open(f"{name}.npy") as stream:
            return npy.read_array(stream, allow_pickle=False)


def _images(stream: IO[bytes]) -> tuple[int, Iterator[np.ndarray]]:
    """Their number, and blocks uint8 [n, height, width] or [n, height, width, 3] of them."""
    major = npy.read_magic(stream)
    header = npy.read_array_header_1_0 if major == (1, 0) else npy.read_array_header_2_0
    shape, fortran, dtype = header(stream)
    first = len(shape) == 4 and shape[1] in (1, 3) and shape[3] not in (1, 3)
    channels = shape[1 if first else -1] if len(shape) == 4 else 1
    if dtype != np.uint8 or len(shape) not in (3, 4) or channels not in (1, 3) or fortran or 0 in shape:
        raise ValueError(
            f"{dtype} {list(shape)}{', column by column' if fortran else ''}; expected uint8 [N, height, "
            "width], [N, height, width, 3] or [N, 3, height, width]"
        )

    def blocks() -> Iterator[np.ndarray]:
        size = int(np.prod(shape[1:]))
        step = max(1, _BLOCK // size)
        for start in range(0, shape[0], step):
            count = min(step, shape[0] - start)
            content = stream.read(count * size)
            if len(content) != count * size:
                raise ValueError(f"it ends after {start} of {shape[0]} images")
            block = np.frombuffer(content, np.uint8).reshape(count, *shape[1:])
            block = block.transpose(0, 2, 3, 1) if first else block
            yield block[..., 0] if block.ndim == 4 and channels == 1 else block

    return shape[0], blocks()
