"""Batches of real images, for one network or for several that are trained together: each network draws for
itself, and what all of them drew is gathered and augmented at once.

The draws are those of `distilled_data.loader.Loader` and `distilled_data.augment.cutmix`, so a network sees
the same images whether it is trained alone or beside others. The numbers are drawn on the CPU and uploaded
from pinned memory: nothing waits for a GPU.
"""

import copy
from collections.abc import Sequence
from itertools import product

import torch
from torch import Tensor

from distilled_data.augment import augment_each, draw_cutmix
from distilled_data.decode import take
from distilled_data.labels import one_hot
from distilled_data.loader import Loader
from distilled_data.randomness import generator_at
from distilled_data.transfer import upload

from .memory import free_memory
from .sources import LabelledImages, Source

Address = tuple[int, int]  # epoch, batch

PIXELS = 2**22  # of a batch to test on: 256 of 128 x 128 take the memory that training on 128 takes
DRAWS = 2  # raised when the same seed draws other numbers: what was trained by these is something else


def real_loader(source: Source, part: LabelledImages, batch_size: int, device: str, **options) -> Loader:
    """Batches of real images, normalised; on a GPU they stay where it has room for twice as many."""
    where = torch.device(device)
    fits = where.type != "cuda" or part.images.nbytes <= free_memory(where) // 2
    return Loader(
        part.images,  # type: ignore[arg-type] - `Images` are read like a tensor
        part.targets,
        mean=source.mean,
        std=source.std,
        batch_size=batch_size,
        device=device,
        resident=fits,
        **options,
    )


def images_per_pass(source: Source, most: int, views: int = 1) -> int:
    """Images of the size of the real ones, of `views` each, that pass a network which is not trained."""
    return max(1, min(most, PIXELS // (views * source.height * source.width)))


def real_test_loader(source: Source, networks: int, device: str) -> Loader:
    """The test images, in batches that fill a device once for all `networks`."""
    size = max(64, images_per_pass(source, 512) // networks)
    return real_loader(source, source.test, size, device, shuffle=False)


def reseeded(loader: Loader, seed: int) -> Loader:
    """A loader of the same tensors, from its first epoch, whose order and augmentation `seed` decides."""
    other = copy.copy(loader)
    other.seed, other.epoch = seed, 0
    return other


class Batches:
    """Training batches of M networks, one loader each: images [M, B, channels, H, W], targets [M, B, ...].

    The loaders have the same number of images, batch size, augmentation and `relabel`; loaders of the same
    images share their memory (see `reseeded`). With probability `cutmix` a network's batch is mixed; targets
    are then probabilities [M, B, classes] for all that is made in one go, which on a GPU are several batches.
    """

    def __init__(self, loaders: Sequence[Loader], *, classes: int, cutmix: float):
        first = loaders[0]
        self.loaders, self.classes, self.cutmix = loaders, classes, cutmix
        shared = all(loader.images is first.images for loader in loaders)
        self.images = first.images if shared else torch.cat([loader.images for loader in loaders])
        self.targets = first.targets if shared else torch.cat([loader.targets for loader in loaders])
        self._starts = [0 if shared else m * first.count for m in range(len(loaders))]
        self._drawn: dict[int, tuple[Tensor, Tensor]] = {}  # order and numbers [M, images, ...] of an epoch
        self._ahead = max(1, first._ahead // len(loaders))
        self._made: dict[Address, tuple[Tensor, Tensor]] = {}

    def __len__(self) -> int:
        """Number of batches in one epoch."""
        return len(self.loaders[0])

    def at(self, epoch: int, batch: int, steps: int | None = None) -> tuple[Tensor, Tensor]:
        """The batch at this address, whatever was asked for before. Of a training of so many `steps` none is
        made that comes later.
        """
        now = epoch, batch
        if now not in self._made:
            end = epoch + max(1, self._ahead // len(self)), 0  # of a small set several epochs
            end = end if steps is None else min(end, divmod(steps, len(self)))
            self._made = {place: made for place, made in self._made.items() if now < place < end}
            addresses = self._alike(now, end)
            # "unsafe" is what autograd does not take for views: a network may change its images in place
            made = (parts.unsafe_split(len(self.loaders)) for parts in self._several(addresses))
            self._made |= zip(addresses, zip(*made, strict=True), strict=True)
        return self._made.pop(now)

    def _alike(self, now: Address, end: Address) -> list[Address]:
        """This batch, and those of its size before the `end` that are made with it."""
        full = self.loaders[0].share // self.loaders[0].batch_size
        first, count = (0, full) if now[1] < full else (full, 1)  # of its size in an epoch
        start, stop = (epoch * count + min(max(batch - first, 0), count) for epoch, batch in (now, end))
        numbers = range(start, min(stop, start + self._ahead))
        return [(number // count, first + number % count) for number in numbers]

    def _several(self, addresses: Sequence[Address]) -> tuple[Tensor, Tensor]:
        """Batches of one size, one after the other, each for all networks: [batches x M, B, ...]."""
        first = self.loaders[0]
        epochs = sorted({epoch for epoch, _ in addresses})
        self._drawn = {epoch: self._drawn.get(epoch) or self._draw(epoch) for epoch in epochs}
        index, numbers = (self._parts(addresses, which) for which in range(2))
        index = upload(index, self.images.device)
        tiles = take(self.images, index.flatten(), first.factor)
        targets = first.label(upload(self.targets[index], first.device))  # they may lie in main memory
        images = first.views(upload(tiles, first.device)).unflatten(0, index.shape)
        if first.augment is not None:
            assert isinstance(first.augment, str), "the engine augments by strategies, which have addresses"
            counts, flat = [images.shape[1]] * len(images), images.flatten(0, 1)
            images = augment_each(flat, counts, first.augment, numbers.flatten(0, 1)).view_as(images)
        images, targets = self._mix(images, targets, addresses)
        if first.relabel is not None:
            targets = torch.stack([first.relabel(one) for one in images])  # not in M times the memory
        return images, targets

    def _draw(self, epoch: int) -> tuple[Tensor, Tensor]:
        pairs = zip(self.loaders, self._starts, strict=True)
        order = torch.stack([loader.order(epoch) + start for loader, start in pairs])
        numbers = [loader.numbers(loader.share, loader.place(epoch)) for loader in self.loaders]
        return order, torch.stack(numbers)

    def _parts(self, addresses: Sequence[Address], which: int) -> Tensor:
        """Of what was drawn for these batches, their order or their numbers: [batches x M, B, ...]."""
        size = self.loaders[0].batch_size
        return torch.cat(
            [self._drawn[epoch][which][:, batch * size :][:, :size] for epoch, batch in addresses]
        )

    def _mix(self, images: Tensor, targets: Tensor, addresses: Sequence[Address]) -> tuple[Tensor, Tensor]:
        if not self.cutmix:
            return images, targets
        count, (height, width), device = images.shape[1], images.shape[-2:], images.device
        partners = torch.arange(images.shape[:2].numel()).view(-1, count)  # at first everyone is its own
        boxes = torch.zeros(len(images), 4, dtype=torch.int64)  # top, bottom, left, right
        for place, ((epoch, batch), loader) in enumerate(product(addresses, self.loaders)):
            generator = generator_at(loader.seed, "cutmix", epoch, batch)
            if torch.rand((), generator=generator) < self.cutmix:
                drawn, rows, columns = draw_cutmix(count, height, width, generator)
                boxes[place] = torch.tensor([rows.start, rows.stop, columns.start, columns.stop])
                partners[place] = drawn + place * count
        areas = (boxes[:, 1] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 2])
        if len(images) == 1 and not areas.any():
            return images, targets
        if targets.ndim == 2:
            targets = one_hot(targets, self.classes)
        partner = upload(partners.flatten(), device)
        box = upload(boxes, device).view(-1, 4, 1, 1, 1, 1).unbind(1)  # each [batches x M, 1, 1, 1, 1]
        rows, columns = torch.arange(height, device=device)[:, None], torch.arange(width, device=device)
        inside = (rows >= box[0]) & (rows < box[1]) & (columns >= box[2]) & (columns < box[3])
        shares = upload((areas / (height * width)).float(), device).view(-1, 1, 1)
        images = torch.where(inside, images.flatten(0, 1)[partner].view_as(images), images)
        return images, torch.lerp(targets, targets.flatten(0, 1)[partner].view_as(targets), shares)
