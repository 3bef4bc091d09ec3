"""Batches from images that lie on the device already: gather, decode, normalise and augment at once."""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset, Sampler

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

    Of `world_size` processes each gets its share of every epoch, all of them as many images: some are there
    twice, or with `drop_last` some are left out. An `infinite` loader
    goes from epoch to epoch without an end. `state_dict` says after which batch it is.
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
        rank: int = 0,
        world_size: int = 1,
        infinite: bool = False,
    ):
        if type(batch_size) is not int or batch_size < 1:
            raise UsageError(f"batch_size must be a whole number, 1 or more, got {batch_size!r}")
        if not 0 <= rank < world_size:
            raise UsageError(f"rank must be 0 to {world_size - 1} of world_size {world_size}, got {rank}")
        if isinstance(augment, str):
            parse(augment)  # an unknown name fails here, not at the first batch
        if resident:
            tiles, targets = tiles.to(device), targets.to(device)
        self.tiles, self.targets = tiles, targets
        self.size, self.batch_size, self.augment = size, batch_size, augment
        self.shuffle, self.drop_last, self.seed = shuffle, drop_last, seed
        self.rank, self.world_size, self.infinite = rank, world_size, infinite
        self.epoch = 0  # that the next pass is
        self._first = 0  # batch that the next pass starts with
        self._after = (0, 0)  # epoch and batch that come next in the pass that was started last
        self.device = torch.device(device)
        if infinite and len(self) == 0:
            raise UsageError(
                f"{self._share()} images make no batch of {batch_size} without the rest that is dropped"
            )
        # x / 255 is normalised as (x / 255 - mean) / std = x * gain + offset
        std_ = torch.tensor(std).view(-1, 1, 1)
        self._gain = (1 / (255 * std_)).to(device)
        self._offset = (-torch.tensor(mean).view(-1, 1, 1) / std_).to(device)

    def __len__(self) -> int:
        """Number of batches in one epoch."""
        full, rest = divmod(self._share(), self.batch_size)
        return full + (rest > 0 and not self.drop_last)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        first, self._first = self._first, 0
        while True:
            epoch, self.epoch = self.epoch, self.epoch + 1
            order = upload(self.order(epoch), self.tiles.device)
            for batch in range(first, len(self)):
                last = batch == len(self) - 1
                self._after = (epoch + 1, 0) if last else (epoch, batch + 1)
                yield self.batch(order[batch * self.batch_size : (batch + 1) * self.batch_size], epoch, batch)
            if not self.infinite:
                return
            first = 0

    def order(self, epoch: int) -> Tensor:
        """Rows of this rank in the order of `epoch`, int64 on the CPU."""
        order = torch.arange(len(self.tiles))
        if self.shuffle:
            order = torch.randperm(len(order), generator=generator_at(self.seed, "order", epoch))
        length = self._share() * self.world_size
        return order.repeat(-(-length // len(order)))[:length][self.rank :: self.world_size]

    def batch(self, rows: Tensor, epoch: int, batch: int) -> tuple[Tensor, Tensor]:
        """Images and targets of `rows`, augmented as number `batch` of `epoch` is."""
        tiles, targets = (upload(column[rows], self.device) for column in (self.tiles, self.targets))
        images = self.normalise(enlarge(tiles.float(), self.size))
        if isinstance(self.augment, str):
            place = (epoch, batch) if self.world_size == 1 else (epoch, batch, self.rank)
            images = augment_batch(images, self.augment, generator_at(self.seed, "augment", *place))
        elif self.augment is not None:
            images = self.augment(images)
        return images, targets

    def set_epoch(self, epoch: int) -> None:
        """Make the next pass epoch number `epoch`, from its first batch."""
        self.epoch, self._first, self._after = epoch, 0, (epoch, 0)

    def state_dict(self) -> dict[str, Any]:
        """Where the iteration is: what comes next, and what that depends on."""
        epoch, batch = self._after
        return {"epoch": epoch, "batch": batch} | self._identity()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Make the next pass go on where `state` was taken. Raises `UsageError` for another loader's."""
        identity = {name: value for name, value in state.items() if name not in ("epoch", "batch")}
        if identity != self._identity():
            raise UsageError(f"the state is of another loader: expected {self._identity()}, got {identity}")
        self.epoch, self._first = state["epoch"], state["batch"]
        self._after = (self.epoch, self._first)

    def normalise(self, images: Tensor) -> Tensor:
        """Float images [..., channels, H, W] in 0..255 to zero mean and unit deviation per channel."""
        return images * self._gain + self._offset

    def _identity(self) -> dict[str, Any]:
        names = ("seed", "batch_size", "shuffle", "drop_last", "world_size")
        return {"images": len(self.tiles)} | {name: getattr(self, name) for name in names}

    def _share(self) -> int:
        """Images of one rank in an epoch."""
        full, rest = divmod(len(self.tiles), self.world_size)
        return full + (rest > 0 and not self.drop_last)


class Places(Sampler):
    """For a `DataLoader` over `Batches`: (epoch, batch, rows) of every batch of a `Loader`."""

    def __init__(self, loader: Loader):
        self.loader = loader

    def __len__(self) -> int:
        return len(self.loader)

    def __iter__(self) -> Iterator[tuple[int, int, Tensor]]:
        loader = self.loader
        epoch, loader.epoch = loader.epoch, loader.epoch + 1
        order = loader.order(epoch)
        for batch in range(len(loader)):
            yield epoch, batch, order[batch * loader.batch_size : (batch + 1) * loader.batch_size]

    def set_epoch(self, epoch: int) -> None:
        self.loader.set_epoch(epoch)


class Batches(Dataset):
    """The batches of a `Loader` by their places, made where they are asked for: in a worker process."""

    def __init__(self, loader: Loader):
        self.loader = loader

    def __len__(self) -> int:
        return len(self.loader)

    def __getitem__(self, place: tuple[int, int, Tensor]) -> tuple[Tensor, Tensor]:
        epoch, batch, rows = place
        return self.loader.batch(rows, epoch, batch)
