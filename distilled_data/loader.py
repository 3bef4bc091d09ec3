"""Batches from images that lie on the device already: gather, decode, normalise and augment at once."""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from .augment import augment as augment_batch
from .augment import parse
from .decode import enlarge
from .errors import UsageError
from .randomness import generator_at
from .transfer import upload


class Loader:
    """Iterates over (images float32 [B, channels, H, W], targets [B, ...]) on `device`, normalised.

    `tiles` is uint8 [N, channels, h, w] (or float in 0..255), enlarged to `size` (H, W) in each batch.
    The tiles lie on `device`, or, if not `resident`, where they are, and each batch is moved.
    `augment` is None, a strategy of `distilled_data.augment`, or any callable on a batch of images.
    Order and augmentation depend on (seed, epoch, batch) alone; each pass counts as the next epoch.
    """

    def __init__(
        self,
        tiles: Tensor,
        targets: Tensor,
        *,
        size: tuple[int, int],
        mean: tuple[float, ...],
        std: tuple[float, ...],
        batch_size: int,
        device: torch.device | str = "cpu",
        augment: str | Callable[[Tensor], Tensor] | None = None,
        shuffle: bool = True,
        drop_last: bool = False,
        seed: int = 0,
        resident: bool = True,
    ):
        if type(batch_size) is not int or batch_size < 1:
            raise UsageError(f"batch_size must be a whole number, 1 or more, got {batch_size!r}")
        if isinstance(augment, str):
            parse(augment)  # an unknown name fails here, not at the first batch
        if resident:
            tiles, targets = tiles.to(device), targets.to(device)
        self.tiles, self.targets = tiles, targets
        self.size, self.batch_size, self.augment = size, batch_size, augment
        self.shuffle, self.drop_last, self.seed, self.epoch = shuffle, drop_last, seed, 0
        self.device = torch.device(device)
        # x / 255 is normalised as (x / 255 - mean) / std = x * gain + offset
        std_ = torch.tensor(std).view(-1, 1, 1)
        self._gain = (1 / (255 * std_)).to(device)
        self._offset = (-torch.tensor(mean).view(-1, 1, 1) / std_).to(device)

    def __len__(self) -> int:
        """Number of batches in one epoch."""
        full, rest = divmod(len(self.tiles), self.batch_size)
        return full + (rest > 0 and not self.drop_last)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        epoch, self.epoch = self.epoch, self.epoch + 1
        order = torch.arange(len(self.tiles))
        if self.shuffle:
            order = torch.randperm(len(order), generator=generator_at(self.seed, "order", epoch))
        order = upload(order, self.tiles.device)
        for batch in range(len(self)):
            index = order[batch * self.batch_size : (batch + 1) * self.batch_size]
            tiles, targets = (upload(rows[index], self.device) for rows in (self.tiles, self.targets))
            images = self.normalise(enlarge(tiles.float(), self.size))
            if isinstance(self.augment, str):
                generator = generator_at(self.seed, "augment", epoch, batch)
                images = augment_batch(images, self.augment, generator)
            elif self.augment is not None:
                images = self.augment(images)
            yield images, targets

    def normalise(self, images: Tensor) -> Tensor:
        """Float images [..., channels, H, W] in 0..255 to zero mean and unit deviation per channel."""
        return images * self._gain + self._offset
