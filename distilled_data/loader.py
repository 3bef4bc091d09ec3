"""Batches from images that lie on the device already: gather, decode, normalise, augment and mix at once."""

import math
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, Generic, Self, TypeVar

import torch
from torch import Tensor
from torch.utils.data import Dataset, Sampler

from .augment import augment_each, draw_each, parse, parse_mix
from .augment import mix as mix_batch
from .decode import enlarge, take
from .errors import UsageError
from .indexing import as_int
from .labels import as_they_are
from .randomness import generator_at, seeded
from .tensors import per_channel
from .transfer import upload

Mix = str | Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
Place = tuple[int | str, ...]  # an address of draws, below the seed and the purpose

if TYPE_CHECKING:  # Python 3.13 has the default itself
    from typing_extensions import TypeVar

    Batch = TypeVar("Batch", default=tuple[Tensor, Tensor])
else:
    Batch = TypeVar("Batch")  # what a loader gives: a tuple, or a dict by names

AHEAD_BYTES = 64 * 2**20  # of images that a GPU makes in one go: of a single batch, launching is most of it


class Loader(Generic[Batch]):
    """Iterates over (images float32 [B, channels, H, W], targets [B, ...]) on `device`, normalised.

    `images` is uint8 [N, channels, H, W] (or float in 0..255), each of `factor` ** 2 tiles, enlarged to that
    size in each batch; `targets` [N * factor ** 2, ...] become there what `label` makes of them. Both
    lie on `device`, or, if not `resident`, where they are, and each batch is moved.

    `augment` is None, a strategy of `distilled_data.augment`, or any callable on a batch of images in [0, 1],
    which are normalised afterwards (torchvision's transforms draw once for the whole batch); `mix` is None, a
    strategy of mixing there, or any callable on normalised images and targets. Order, augmentation and mixing
    depend on seed, epoch and place in it alone, those of callables too as far as they draw from the own
    generators of torch, Python or numpy. `relabel` makes targets of the finished images [B, channels, H, W],
    in the place of the stored ones. Each pass counts as the next epoch.

    Each of `world_size` processes gets a share of every epoch. The shares are equal: some images come twice
    or, with `drop_last`, are left out, and then every batch has `batch_size` images, as CUDA graphs need it.
    An `infinite` loader goes from epoch to epoch without an end. `state_dict` says after which batch it is.
    With `keys` (image, label) a batch is a dict.
    """

    def __init__(
        self,
        images: Tensor,
        targets: Tensor,
        *,
        mean: tuple[float, ...],
        std: tuple[float, ...],
        batch_size: int,
        factor: int = 1,
        label: Callable[[Tensor], Tensor] = as_they_are,
        device: torch.device | str = "cpu",
        augment: str | Callable[[Tensor], Tensor] | None = None,
        mix: Mix | None = None,
        relabel: Callable[[Tensor], Tensor] | None = None,
        shuffle: bool = True,
        drop_last: bool = False,
        seed: int = 0,
        resident: bool = True,
        rank: int = 0,
        world_size: int = 1,
        infinite: bool = False,
        keys: tuple[str, str] | None = None,
    ):
        batch_size, world_size = as_int("batch_size", batch_size, 1), as_int("world_size", world_size, 1)
        rank, seed = as_int("rank", rank), as_int("seed", seed, None)
        if rank >= world_size:
            raise UsageError(f"rank must be 0 to {world_size - 1} of world_size {world_size}, got {rank}")
        for option, value in {"augment": augment, "mix": mix}.items():
            if isinstance(value, type) or not (value is None or isinstance(value, str) or callable(value)):
                raise UsageError(
                    f"{option} must be None, a strategy's name or a callable on batches, got {value!r}"
                )
        if isinstance(augment, str):
            parse(augment)  # an unknown name fails here, not at the first batch
        if isinstance(mix, str):
            parse_mix(mix)
        try:
            torch.empty(0, device=torch.device(device))
        except (RuntimeError, AssertionError, ImportError, TypeError) as error:
            raise UsageError(f"device {device!r} cannot be used: {str(error).splitlines()[0]}") from error
        if resident:
            images, targets = images.to(device), targets.to(device)
        self.images, self.targets, self.factor, self.label = images, targets, factor, label
        self.batch_size, self.augment, self.mix, self.relabel = batch_size, augment, mix, relabel
        self.shuffle, self.drop_last, self.seed = bool(shuffle), bool(drop_last), seed
        self.rank, self.world_size, self.infinite = rank, world_size, infinite
        self.keys = keys
        self.epoch = 0  # that the next pass is
        self._first = 0  # batch that the next pass starts with
        self._after = (0, 0)  # epoch and batch that come next in the pass that was started last
        self.device = torch.device(device)
        if infinite and len(self) == 0:
            raise UsageError(
                f"{self.share} images make no batch of {batch_size} without the rest that is dropped"
            )
        # x / 255 is normalised as (x / 255 - mean) / std = x * gain + offset
        self._gain = (1 / (255 * per_channel(std))).to(device)
        self._offset = (-per_channel(mean) / per_channel(std)).to(device)
        # Batches that are made together: on a CPU ten take twice as long so; a callable sees one at a time.
        one = batch_size * math.prod(self.images.shape[1:]) * 4
        several = self.images.device.type == "cuda" and not callable(augment)
        self._ahead = max(1, AHEAD_BYTES // one) if several else 1

    def __len__(self) -> int:
        """Number of batches in one epoch."""
        full, rest = divmod(self.share, self.batch_size)
        return full + (rest > 0 and not self.drop_last)

    def __iter__(self) -> Iterator[Batch]:
        while True:
            first, self._first = self._first, 0
            epoch, self.epoch, count = self.epoch, self.epoch + 1, len(self)
            order = upload(self.order(epoch), self.images.device)
            numbers = self.numbers(self.share, self.place(epoch))
            for begin in range(first, count, self._ahead):
                end = min(begin + self._ahead, count)
                part = slice(begin * self.batch_size, end * self.batch_size)
                places = [self.place(epoch, batch * self.batch_size) for batch in range(begin, end)]
                batches = self.batches(order[part], numbers[part], places)
                for batch, made in enumerate(batches, start=begin + 1):
                    self._after = (epoch, batch) if batch < count else (epoch + 1, 0)
                    yield made
            if not self.infinite:
                return

    def order(self, epoch: int) -> Tensor:
        """Rows of this rank in the order of `epoch`, int64 [share] on the CPU."""
        order = torch.arange(self.count, device="cpu")
        if self.shuffle:
            generator = generator_at(self.seed, "order", epoch)
            order = torch.randperm(len(order), generator=generator, device="cpu")
        length = self.share * self.world_size
        again = order.expand(-(-length // len(order)), -1).flatten()  # once: a view, nothing is copied
        return again[:length][self.rank :: self.world_size]

    def numbers(self, count: int, place: Place) -> Tensor:
        """The random numbers that augmentation takes for `count` images, float32 [count, numbers] on the CPU.

        Those of an epoch are drawn at once, which takes the host of a GPU less time than batch by batch.
        """
        if not isinstance(self.augment, str):
            return torch.empty(count, 0, device="cpu")
        return draw_each(self.augment, count, generator_at(self.seed, "augment", *place))

    def place(self, *address: int) -> Place:
        """The address of draws, below seed and purpose: (epoch,), (epoch, position where a batch begins),
        or all indices of a batch that another sampler put together.

        Of several processes each has its rank at the end, so that it draws for itself.
        """
        return address if self.world_size == 1 else (*address, self.rank)

    def batches(self, rows: Tensor, numbers: Tensor, places: Sequence[Place]) -> Iterator[Any]:
        """`rows` as one batch for each of `places`, which address its draws. All are made in one go."""
        count, several = len(rows), len(places) > 1
        size = self.batch_size if several else count
        counts = [min(size, count - begin) for begin in range(0, count, size)]
        tiles = upload(take(self.images, rows, self.factor), self.device)
        targets = self.label(upload(self.targets.index_select(0, rows), self.device))
        if callable(self.augment):
            [place] = places
            with seeded(self.seed, "augment", *place, device=self.device):
                made = self.augment(self.enlarged(tiles) / 255)
            images = self.normalise(self.checked(made, len(tiles)).float() * 255)
            if len(images) != len(targets):  # those of the teacher will take the place of these
                targets = targets.new_zeros(len(images), *targets.shape[1:])
        else:
            images = self.views(tiles)
        if isinstance(self.augment, str):
            images = augment_each(images, counts, self.augment, numbers)
        if not several:
            yield self.finished(images, targets, places[0])
            return
        for some, labels, place in zip(images.split(counts), targets.split(counts), places, strict=True):
            yield self.finished(some.clone(), labels.clone(), place)  # changed in place, or kept, for itself

    def finished(self, images: Tensor, targets: Tensor, place: Place) -> Any:
        """The batch as it is given out: mixed, labelled anew, with its keys."""
        if isinstance(self.mix, str):
            images, targets = mix_batch(images, targets, self.mix, generator_at(self.seed, "mix", *place))
        elif self.mix is not None:
            with seeded(self.seed, "mix", *place, device=self.device):
                made = self.mix(images, targets)
            images, targets = self.pair(made)
        if self.relabel is not None:
            targets = self.relabel(images)
        return (
            (images, targets) if self.keys is None else dict(zip(self.keys, (images, targets), strict=True))
        )

    def checked(self, images: Any, count: int) -> Tensor:
        """What `augment` made of `count` images. Raises `UsageError` where it does not fit their targets."""
        floats = isinstance(images, Tensor) and images.is_floating_point() and images.ndim == 4
        channels = len(self._gain)  # grey images may be made coloured
        fit = floats and channels in (1, images.shape[1])
        if not fit or (len(images) != count and self.relabel is None):
            tensor = isinstance(images, Tensor)
            got = f"{images.dtype} {list(images.shape)}" if tensor else type(images).__name__
            expected = f"[{count}, {'channels' if channels == 1 else channels}, height, width]"
            raise UsageError(f"augment must return floats {expected}, got {got}")
        return images

    def pair(self, made: Any) -> tuple[Tensor, Tensor]:
        """What `mix` made. Raises `UsageError` for anything but images and as many targets, which a teacher
        makes anew.
        """
        parts = list(made) if isinstance(made, tuple | list) else [made]
        looked_at = parts if self.relabel is None else parts[:1]
        tensors = all(isinstance(part, Tensor) and part.ndim for part in looked_at)
        if not tensors or len(parts) != 2 or len({len(part) for part in looked_at}) > 1:
            got = [list(part.shape) if isinstance(part, Tensor) else type(part).__name__ for part in parts]
            raise UsageError(f"mix must return images and as many targets, got {', '.join(map(str, got))}")
        return parts[0], parts[1]

    def set_epoch(self, epoch: int) -> None:
        """Make the next pass epoch number `epoch`, from its first batch."""
        self.epoch, self._first = as_int("epoch", epoch), 0
        self._after = (self.epoch, 0)

    def state_dict(self) -> dict[str, Any]:
        """Where the iteration is: what comes next, and what that depends on."""
        epoch, batch = self._after
        return {"epoch": epoch, "batch": batch} | self.identity

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Make the next pass go on where `state` was taken. Raises `UsageError` for another loader's."""
        self.check(state)
        batch = as_int("the state's batch", state.get("batch"))
        if batch and batch >= len(self):
            raise UsageError(f"the state's batch must be 0 to {len(self) - 1}, got {batch}")
        self.epoch, self._first = as_int("the state's epoch", state.get("epoch")), batch
        self._after = (self.epoch, self._first)

    def views(self, tiles: Tensor) -> Tensor:
        """Tiles [B, channels, h, w] in 0..255 as float32 [B, channels, H, W], normalised per channel."""
        if tiles.is_cuda:  # where each pass over the memory takes its time, so one for all that can be
            normalised = torch.addcmul(self._offset, tiles, self._gain).float()
            return enlarge(normalised, (self.images.shape[2], self.images.shape[3]))
        return self.normalise(self.enlarged(tiles))

    def enlarged(self, tiles: Tensor) -> Tensor:
        """Tiles [B, channels, h, w] as new memory, float32 [B, channels, H, W], in 0..255."""
        return enlarge(tiles.to(torch.float32, copy=True), (self.images.shape[2], self.images.shape[3]))

    def normalise(self, images: Tensor) -> Tensor:
        """Changes images in 0..255 to zero mean and unit deviation per channel."""
        return images.mul_(self._gain).add_(self._offset)  # in place: fresh memory costs more than the sums

    @property
    def identity(self) -> dict[str, Any]:
        """What a state depends on."""
        names = ("seed", "batch_size", "shuffle", "drop_last", "world_size")
        return {"images": self.count} | {name: getattr(self, name) for name in names}

    def check(self, state: dict[str, Any]) -> None:
        """Raises `UsageError` for the state of a loader with another identity."""
        theirs = {name: state.get(name) for name in self.identity} if isinstance(state, dict) else state
        if theirs != self.identity:
            raise UsageError(f"the state is of another loader: expected {self.identity}, got {theirs}")

    @property
    def count(self) -> int:
        """Images of an epoch, of all ranks."""
        return len(self.images) * self.factor**2

    @property
    def share(self) -> int:
        """Images of one rank in an epoch."""
        full, rest = divmod(self.count, self.world_size)
        return full + (rest > 0 and not self.drop_last)


class Batches(Dataset[Any]):
    """The images of a `Loader` as a dataset that gives whole batches to a `DataLoader`, often in a worker.

    An index is epoch * images of an epoch + position in the order of that epoch: a plain number, so that
    frameworks can batch indices and share them out over ranks as usual. A batch of consecutive indices is
    augmented exactly as `Loader` does it. Any other batch was put together by another sampler, which gives
    the same indices in every epoch. Its draws depend on all of its indices, so that an image in another batch
    is augmented in another way.
    """

    def __init__(self, loader: Loader[Any]):
        self.loader = loader
        nothing = torch.empty(0, device="cpu")
        self._drawn = -1, nothing, nothing  # epoch, order, numbers: in one, as threads may be in two epochs

    def __len__(self) -> int:
        return self.loader.share

    def __getitems__(self, indices: list[int]) -> Any:
        epoch, first = divmod(indices[0], len(self))
        loader = self.loader
        drawn, order, every = self._drawn
        if epoch != drawn:
            order, every = loader.order(epoch), loader.numbers(len(self), loader.place(epoch))
            self._drawn = epoch, order, every
        positions = torch.tensor(indices, device="cpu") % len(self)
        if indices == list(range(indices[0], indices[0] + len(indices))):
            place, numbers = loader.place(epoch, first), every[positions]
        else:
            place = loader.place(*indices)
            numbers = loader.numbers(len(indices), place)
        return next(loader.batches(order[positions], numbers, [place]))


class Indices(Sampler[int]):
    """The indices of one epoch after the other, for `Batches`."""

    def __init__(self, loader: Loader[Any]):
        self.loader = loader

    def __len__(self) -> int:
        return self.loader.share

    def __iter__(self) -> "Pass":
        return Pass(self.loader)

    def set_epoch(self, epoch: int) -> None:
        self.loader.set_epoch(epoch)


class Pass:
    """One pass over the indices of an epoch, which torchdata's `StatefulDataLoader` can take up again."""

    def __init__(self, loader: Loader[Any]):
        self.loader = loader
        self.epoch, self.position = -1, 0  # the epoch is the one at the first index that is asked for

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> int:
        if self.epoch < 0:
            self.epoch = self.loader.epoch
            self.loader.set_epoch(self.epoch + 1)
        if self.position == self.loader.share:
            raise StopIteration
        self.position += 1
        return self.epoch * self.loader.share + self.position - 1

    def state_dict(self) -> dict[str, Any]:
        epoch = self.loader.epoch if self.epoch < 0 else self.epoch
        return {"epoch": epoch, "position": self.position} | self.loader.identity

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.loader.check(state)
        position = as_int("the state's position", state.get("position"))
        if position > self.loader.share:
            raise UsageError(f"the state's position must be 0 to {self.loader.share}, got {position}")
        self.epoch, self.position = as_int("the state's epoch", state.get("epoch")), position
        self.loader.set_epoch(self.epoch + 1)
