"""Real images and their features: where they lie, and how often a network looks at them."""

from collections.abc import Callable, Iterator
from itertools import repeat
from typing import Any, NamedTuple

import torch
from torch import Tensor

from distilled_data.augment import apply, draw
from distilled_data.randomness import generator_at
from distilled_data.transfer import upload

from .config import DistillConfig
from .features import FrozenNetwork
from .memory import Layout
from .sampling import ClassSampler, real_per_class
from .sources import Source


class RealImages:
    """The training images of the classes `part`, as bytes: on the device, or in host memory.

    In host memory they may as well be a memory-mapped file; only the rows that are drawn are read. On the
    way to a GPU each batch is copied while the one before it is looked at.
    """

    def __init__(self, source: Source, device: str, *, part: slice = slice(None), resident: bool = True):
        self.sampler = ClassSampler(source.train)
        self.part, self.device = part, torch.device(device)
        counts = self.sampler.counts
        self._first = int(counts[: part.start or 0].sum())
        images = source.train.images.narrow(0, self._first, int(counts[part].sum()))
        self._streamed = self.device.type == "cuda" and not resident
        self.images = images if self._streamed else images.to(device)
        self._stream = torch.cuda.Stream(device) if self._streamed else None

    def draw(self, per_class: int, generator: torch.Generator) -> Tensor:
        """Rows of `images`, int64 [C, per_class] on the CPU: of a class the same ones, whatever `part` is."""
        return self.sampler.draw(per_class, generator)[self.part] - self._first

    def batches(self, rows: Tensor, size: int) -> Iterator[Tensor]:
        """uint8 images [size or fewer, channels, H, W] on the device, of `rows` int64 [N] on the CPU."""
        parts = rows.split(size)
        if not self._streamed:
            index = upload(rows, self.device)
            yield from (self.images.index_select(0, part) for part in index.split(size))
            return
        ahead = self._send(parts[0])
        for following in [*parts[1:], None]:
            images, done = ahead
            if following is not None:
                ahead = self._send(following)
            torch.cuda.current_stream(self.device).wait_event(done)
            images.record_stream(torch.cuda.current_stream(self.device))
            yield images

    def _send(self, rows: Tensor) -> tuple[Tensor, Any]:
        """The images on their way, and the event of their arrival."""
        pinned = self.images.index_select(0, rows).pin_memory()
        with torch.cuda.stream(self._stream):
            return pinned.to(self.device, non_blocking=True), torch.cuda.current_stream().record_event()


class Entry(NamedTuple):
    number: int  # address of its draws
    network: int  # index in the pool


class RealFeatures:
    """What the blended network makes of real images: anew at every step, or from a rolling bank.

    An entry is one blended network, one draw of real images and one draw of augmentation, all addressed by
    its number. Fresh features are those of entry number `step`. A bank holds `bank_size` entries, replaces
    the oldest every `bank_refresh` steps, and gives each step one of them, drawn at random; so it is the
    same after a resume, and with one entry, refreshed at every step, it is fresh.
    """

    def __init__(
        self,
        config: DistillConfig,
        images: RealImages,
        network: FrozenNetwork,
        *,
        networks: int,
        normalise: Callable[[Tensor], Tensor],
        seed: int,
        layout: Layout,
    ):
        self.config, self.images, self.network, self.seed, self.layout = config, images, network, seed, layout
        self.networks, self.normalise = networks, normalise
        self.per_class = real_per_class(config.real_batch, images.sampler.counts)
        self._bank: dict[int, Tensor] = {}
        self._drawn: tuple[int, tuple[Tensor, list[str], Tensor]] | None = None
        self._bank_device = images.device if layout.bank_resident else torch.device("cpu")

    def prepare(self, step: int) -> Entry:
        """The step's entry, with its network loaded."""
        entry = step
        if size := self.config.kept_entries:
            refresh = self.config.bank_refresh if self.config.real_features == "bank" else 1
            oldest = step // refresh
            alive = range(oldest, oldest + size)
            self._bank = {number: self._bank[number] for number in alive if number in self._bank}
            for number in alive:
                if number not in self._bank:
                    self._bank[number] = self._make(number)
            entry = oldest + int(torch.randint(size, (), generator=generator_at(self.seed, "bank", step)))
        return self._load(entry)

    def features(self, entry: Entry, classes: slice) -> Tensor:
        """float32 [C, B, D] of some classes of the part, on the device, for the entry just prepared."""
        if entry.number in self._bank:
            return self._bank[entry.number][classes].to(self.images.device, non_blocking=True)
        return self._look(entry.number, classes)

    def _load(self, entry: int) -> Entry:
        generator = generator_at(self.seed, "network", entry)
        index = int(torch.randint(self.networks, (), generator=generator))
        self.network.load(index, torch.rand((), generator=generator).item())
        return Entry(entry, index)

    def _make(self, entry: int) -> Tensor:
        self._load(entry)
        count = len(range(self.images.sampler.num_classes)[self.images.part])
        bank = torch.empty(0)
        for first in range(0, count, self.layout.classes):
            features = self._look(entry, slice(first, first + self.layout.classes))
            if first == 0:
                pinned = self._bank_device != self.images.device
                shape = (count, *features.shape[1:])
                bank = torch.empty(shape, device=self._bank_device, pin_memory=pinned)
            # In stream order, so what reads it on the device reads it later; the host never does.
            bank[first : first + len(features)].copy_(features, non_blocking=True)
        return bank

    @torch.no_grad()
    def _look(self, entry: int, classes: slice) -> Tensor:
        rows, operations, numbers = self._draw(entry)
        rows = rows[classes]
        if not self.config.augment_shared:
            of_class = numbers.unflatten(0, (-1, self.per_class))[self.images.part][classes]
            numbers = of_class.flatten(0, 1)
        size, found = self.layout.images, []
        parts = numbers.split(size) if len(numbers) > 1 else repeat(numbers)
        for images, part in zip(self.images.batches(rows.flatten(), size), parts, strict=False):
            images = apply(self.normalise(images.float() / 255), operations, part)
            found.append(self.network.features(images))
        return torch.cat(found).unflatten(0, (len(rows), -1))

    def _draw(self, entry: int) -> tuple[Tensor, list[str], Tensor]:
        """Rows of the part's classes, operations and numbers; once for all chunks, which do not change it."""
        if self._drawn is None or self._drawn[0] != entry:
            rows = self.images.draw(self.per_class, generator_at(self.seed, "real", entry))
            total = self.images.sampler.num_classes * self.per_class
            count = 1 if self.config.augment_shared else total
            drawn = draw(self.config.augment, count, generator_at(self.seed, "augment", entry))
            self._drawn = entry, (rows, *drawn)
        return self._drawn[1]
