"""Labelled images, sorted by content, and what is known about where they come from."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor

from distilled_data.errors import SourceError, UsageError

from .storage import BLOCK, gather

TEST_FRACTION = 0.2  # of the images of each class, where a source has no test split of its own


@dataclass(frozen=True, eq=False)
class LabelledImages:
    """Images sorted by class and, within a class, by the sha256 digest of their bytes.

    The order of the files an image came from can therefore never change a result.
    """

    images: Tensor  # uint8 [N, channels, height, width]
    targets: Tensor  # int64 [N], non-decreasing
    num_classes: int

    @classmethod
    def from_arrays(cls, images: np.ndarray, targets: ArrayLike, num_classes: int):
        """Sort uint8 `images` [N, height, width] or [N, height, width, channels] with their `targets` [N]."""
        if images.ndim == 3:
            images = images[..., None]
        images = np.moveaxis(images, -1, 1)
        targets = np.asarray(targets, dtype=np.int64)
        order = _order(targets, _digests(images))
        return cls(torch.from_numpy(gather(images, order)), torch.from_numpy(targets[order]), num_classes)

    @property
    def counts(self) -> Tensor:
        """Images per class, int64 [num_classes]."""
        return torch.bincount(self.targets, minlength=self.num_classes)

    def __len__(self) -> int:
        return len(self.targets)

    def where(self, mask: Tensor) -> "LabelledImages":
        """The images for which `mask`, bool [N], is true."""
        rows = mask.nonzero().flatten()
        images = torch.from_numpy(gather(self.images.numpy(), rows.numpy()))
        return replace(self, images=images, targets=self.targets[rows])


@dataclass(frozen=True, eq=False)
class Source:
    """A real data set in memory. It never tells a path of this machine, because it is published."""

    name: str  # as in `SOURCES`
    classes: tuple[str, ...]  # in label order
    train: LabelledImages
    test: LabelledImages
    mean: tuple[float, ...]  # per channel, of the train images in [0, 1]
    std: tuple[float, ...]
    id: str  # where it comes from, "torchvision:CIFAR10"
    revision: str  # of what provides it, "torchvision 0.26.0", or "unknown"
    license: str  # SPDX identifier, "other" or "unknown"
    citation: str  # BibTeX, or empty
    fingerprint: str  # sha256 of splits, class names, image shapes and pixels; the order of files has no part
    split: str = "test"  # what `test` is: the real test set, or a part of train cut off to choose settings by

    @classmethod
    def from_splits(cls, classes: Sequence[str], train: LabelledImages, test: LabelledImages, **origin: Any):
        """Measure `train` and `test`; `origin` gives name, id, revision, license and citation."""
        return cls(
            classes=tuple(classes), train=train, test=test, **_measured(classes, train, test), **origin
        )

    @property
    def title(self) -> str:
        """What people call it: for a folder its own name, else the name in `SOURCES`."""
        return self.id.removeprefix("folder:") if self.name == "folder" else self.name

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

    Mean, std and fingerprint are those of the new splits. Raises as `split` does.
    """
    train, test = split(source.train, source.classes, fraction, seed)
    measured = _measured(source.classes, train, test)
    return replace(source, train=train, test=test, split=f"validation {fraction:g}", **measured)


def split(
    images: LabelledImages, classes: Sequence[str], fraction: float, seed: int
) -> tuple[LabelledImages, LabelledImages]:
    """Cut `fraction` of each class, one image at least, off `images`: (the rest, the part cut off).

    The part has the images with the smallest sha256(seed, content) of their class, so adding an image to the
    data moves few others. Raises `SourceError` for a class of one image, `UsageError` for a fraction that is
    not between 0 and 1.
    """
    if not 0 < fraction < 1:
        raise UsageError(f"fraction={fraction}: expected a number between 0 and 1")
    counts = images.counts
    if counts.min() < 2:
        name = classes[int(counts.argmin())]
        raise SourceError(
            f"class {name!r} has {int(counts.min())} image; a test split cut from it needs two. "
            "Add images or remove the class."
        )
    ranks = _digests(_digests(images.images), salt=b"%d:" % seed)
    quota = (counts * fraction).round().long().clamp(min=1).minimum(counts - 1)
    place = torch.arange(len(images)) - (counts.cumsum(0) - counts).repeat_interleave(counts)
    part = torch.empty(len(images), dtype=torch.bool)
    part[torch.from_numpy(_order(images.targets.numpy(), ranks))] = place < quota.repeat_interleave(counts)
    return images.where(~part), images.where(part)


def _digests(rows: Tensor | np.ndarray, salt: bytes = b"") -> np.ndarray:
    """sha256 of `salt` and the bytes of each row, uint8 [N, 32]."""
    digests = bytearray()
    for row in rows.numpy() if isinstance(rows, Tensor) else rows:
        digest = hashlib.sha256(salt)
        digest.update(np.ascontiguousarray(row).data)
        digests += digest.digest()
    return np.frombuffer(digests, dtype=np.uint8).reshape(-1, 32)


def _order(targets: np.ndarray, digests: np.ndarray) -> np.ndarray:
    """The order that sorts by class, then by digest; int64 [N]."""
    return np.lexsort((digests.view("S32")[:, 0], targets))


def _measured(classes: Sequence[str], train: LabelledImages, test: LabelledImages) -> dict[str, Any]:
    """The fields of `Source` that follow from its images: mean, std, fingerprint."""
    # Counts of the 256 values make the sums exact and need no floating-point copy of the images.
    histogram = torch.zeros(train.images.shape[1], 256, dtype=torch.int64)
    for block in train.images.split(BLOCK):
        histogram += torch.stack([torch.bincount(c.flatten(), minlength=256) for c in block.unbind(1)])
    weight = histogram.double() / histogram.sum(1, keepdim=True)  # [channels, 256]
    value = torch.arange(256).double() / 255
    mean = (weight * value).sum(1, keepdim=True)
    std = (weight * (value - mean).square()).sum(1).sqrt()
    std = std.clamp(min=1 / 255)  # a channel that never varies must not divide by zero

    fingerprint = hashlib.sha256()
    for name, part in (("train", train), ("test", test)):
        head = [name, list(classes), list(part.images.shape), part.counts.tolist()]
        fingerprint.update(json.dumps(head).encode())
        fingerprint.update(_digests(part.images).tobytes())
    return {
        "mean": tuple(mean.flatten().tolist()),
        "std": tuple(std.tolist()),
        "fingerprint": fingerprint.hexdigest(),
    }
