"""Labelled images, sorted by content, and what is known about where they come from."""

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from math import sqrt
from typing import Any

import numpy as np
import torch
from torch import Tensor

from distilled_data.errors import SourceError, UsageError

from .images import Images
from .reader import Origin

TEST_FRACTION = 0.2  # of the images of each class, where a source has no test split of its own


@dataclass(frozen=True, eq=False)
class LabelledImages:
    """Images sorted by class and, within a class, by the sha256 digest of their bytes.

    The order of the files an image came from can therefore never change a result. `images[:]` are all of them
    in one tensor, however they are held.
    """

    images: Tensor | Images  # uint8 [N, channels, height, width]; what both can do
    targets: Tensor  # int64 [N], non-decreasing
    num_classes: int
    digests: Tensor  # uint8 [N, 32]
    sums: Tensor  # int64 [N, channels, 2]: of the pixels of each channel, and of their squares

    @property
    def counts(self) -> Tensor:
        """Images per class, int64 [num_classes]."""
        return torch.bincount(self.targets, minlength=self.num_classes)

    def __len__(self) -> int:
        return len(self.targets)

    def where(self, mask: Tensor) -> "LabelledImages":
        """The images for which `mask`, bool [N], is true; none is copied."""
        rows = mask.nonzero().flatten()
        return replace(
            self,
            images=Images.of(self.images).at(rows),
            targets=self.targets[rows],
            digests=self.digests[rows],
            sums=self.sums[rows],
        )


@dataclass(frozen=True, eq=False)
class Source:
    """A real data set, in memory or in mapped files."""

    origin: Origin
    classes: tuple[str, ...]  # in label order
    train: LabelledImages
    test: LabelledImages
    mean: tuple[float, ...]  # per channel, of the train images in [0, 1]
    std: tuple[float, ...]
    fingerprint: str  # sha256 of splits, class names, image shapes and pixels; the order of files has no part
    split: str = "test"  # what `test` is: the real test set, or a part of train cut off to choose settings by

    @classmethod
    def from_splits(
        cls, origin: Origin, classes: Sequence[str], train: LabelledImages, test: LabelledImages
    ) -> "Source":
        """Measure `train` and `test`."""
        return cls(origin, tuple(classes), train, test, **_measured(classes, train, test))

    @property
    def name(self) -> str:
        return self.origin.name

    @property
    def num_classes(self) -> int:
        return len(self.classes)

    @property
    def channels(self) -> int:
        return self.train.images.shape[1]

    @property
    def height(self) -> int:
        return self.train.images.shape[2]

    @property
    def width(self) -> int:
        return self.train.images.shape[3]


def hold_out(source: Source, fraction: float = 0.1, seed: int = 0) -> Source:
    """Cut a validation split out of train: it becomes `test`, so the real test set is out of reach.

    It is `fraction` of each class, one image at least, chosen by their content and `seed`. Mean, std and
    fingerprint are those of the new splits. Raises `SourceError` for a class of one image, `UsageError` for a
    fraction that is not between 0 and 1.
    """
    train = source.train
    images = train.targets.numpy(), train.digests.numpy()
    part = torch.from_numpy(split_mask(*images, source.classes, fraction, seed, "validation"))
    train, test = train.where(~part), train.where(part)
    measured = _measured(source.classes, train, test)
    return replace(source, train=train, test=test, split=f"validation {fraction:g}", **measured)


def split_mask(
    targets: np.ndarray,
    digests: np.ndarray,
    classes: Sequence[str],
    fraction: float,
    seed: int,
    kind: str = "test",
) -> np.ndarray:
    """Which images, bool [N], make up `fraction` of each class, one image at least.

    They are those with the smallest sha256(seed, content) of their class, so adding an image to the data
    moves few others. `digests` is uint8 [N, 32]; errors name `kind`. Raises `SourceError` for a class of one
    image, `UsageError` for a fraction that is not between 0 and 1.
    """
    if not 0 < fraction < 1:
        raise UsageError(f"fraction={fraction}: expected a number between 0 and 1")
    counts = np.bincount(targets, minlength=len(classes))
    if counts.min() < 2:
        image = "image" if kind == "test" else "training image"
        raise SourceError(
            f"class {classes[int(counts.argmin())]!r} has {counts.min()} {image}; a {kind} split cut from it "
            "needs two. Add images or remove the class."
        )
    ranks = digests_of(digests, salt=b"%d:" % seed)
    quota = np.clip(np.round(counts * fraction).astype(np.int64), 1, counts - 1)
    order = content_order(targets, ranks)
    place = np.arange(len(targets)) - np.repeat(np.cumsum(counts) - counts, counts)
    part = np.empty(len(targets), dtype=bool)
    part[order] = place < np.repeat(quota, counts)
    return part


def digest(row: np.ndarray, salt: bytes = b"") -> bytes:
    """sha256 of `salt` and the bytes of `row`."""
    found = hashlib.sha256(salt)
    found.update(np.ascontiguousarray(row).data)
    return found.digest()


def digests_of(rows: Iterable[np.ndarray], salt: bytes = b"") -> np.ndarray:
    """uint8 [N, 32]."""
    return np.frombuffer(b"".join(digest(row, salt) for row in rows), np.uint8).reshape(-1, 32)


def pixel_sums(images: np.ndarray) -> np.ndarray:
    """Of uint8 [N, channels, height, width] each channel's sum and sum of squares, int64 [N, channels, 2]."""
    sums = np.empty((*images.shape[:2], 2), np.int64)
    for channel in range(images.shape[1]):
        pixels = (
            images[:, channel].reshape(len(images), -1).astype(np.float64)
        )  # sums below 2 ** 53 are exact
        sums[:, channel, 0] = pixels.sum(1)
        sums[:, channel, 1] = np.einsum("np,np->n", pixels, pixels)
    return sums


def content_order(targets: np.ndarray, digests: np.ndarray) -> np.ndarray:
    """The order that sorts by class, then by digest; int64 [N]."""
    return np.lexsort((np.ascontiguousarray(digests).view("S32")[:, 0], targets))


def _measured(classes: Sequence[str], train: LabelledImages, test: LabelledImages) -> dict[str, Any]:
    """The fields of `Source` that follow from its images: mean, std, fingerprint."""
    pixels = 255 * len(train) * train.images.shape[2] * train.images.shape[3]
    mean, std = [], []
    for total, squares in train.sums.sum(0).tolist():  # whole numbers of any size
        mean.append(total / pixels)
        variance = (squares * pixels - 255 * total * total) / (255 * pixels * pixels)
        std.append(max(sqrt(variance), 1 / 255))  # a channel that never varies must not divide by zero

    fingerprint = hashlib.sha256()
    for name, part in (("train", train), ("test", test)):
        head = [name, list(classes), list(part.images.shape), part.counts.tolist()]
        fingerprint.update(json.dumps(head).encode())
        fingerprint.update(part.digests.numpy().tobytes())
    return {"mean": tuple(mean), "std": tuple(std), "fingerprint": fingerprint.hexdigest()}
