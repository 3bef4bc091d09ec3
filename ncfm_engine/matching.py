"""One step of the game: what both players are told about all classes."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from distilled_data.augment import apply, draw
from distilled_data.decode import decode
from distilled_data.randomness import generator_at, seeded
from distilled_data.tensors import per_channel

from .config import DistillConfig
from .discrepancy import amplitude_and_phase, characteristic_function, dm, mmd, mse, weigh
from .features import FrozenNetwork
from .frequencies import GaussianFrequencies, SamplingNetwork
from .kernels import rounded_products
from .memory import Footprint, Layout, layout_for
from .pool import FeaturePool
from .real import RealFeatures, RealImages
from .sources import Source

PLAIN = {"mmd": mmd, "dm": dm, "mse": mse}  # discrepancies without frequencies


class StepLosses(NamedTuple):
    """One value per class, left on the device: float32 [C] each."""

    discrepancy: Tensor
    calibration: Tensor
    amplitude: Tensor  # differences that the discrepancy weighs, means over the frequencies; zero
    phase: Tensor  # where it has none


class MatchingStep:
    """Gradients of both players for one step: images [ipc, C, channels, H, W] in [0, 1], and psi.

    `part` is the classes of this process (all); `layout` says how many go through at once, by default what
    fits into `memory` bytes. Gradients of the chunks are added up, so the layout changes rounding only.
    Nothing in a step waits for the device.
    """

    def __init__(
        self,
        config: DistillConfig,
        source: Source,
        pool: FeaturePool,
        *,
        ipc: int,
        seed: int,
        device: str,
        layout: Layout | None = None,
        memory: int | None = None,
        part: slice = slice(None),
        compile: bool = False,
    ):
        self.config, self.seed, self.device = config, seed, device
        self.num_classes = source.num_classes  # of all processes
        self.part, self._numbers = part, range(source.num_classes)[part]
        self._labels = torch.tensor(self._numbers, device=device)
        footprint = Footprint.of(
            config,
            pool.template,
            source,
            ipc=ipc,
            kept_networks=pool.trajectory[..., 0].numel(),
            device=device,
            num_classes=len(self._numbers),
        )
        self.layout = layout or layout_for(footprint, device, memory)
        self.mean, self.std = per_channel(source.mean).to(device), per_channel(source.std).to(device)
        self.blended, self.trained = (
            FrozenNetwork(pool, device, precision=config.precision, compile=compile) for _ in range(2)
        )
        self.real = RealFeatures(
            config,
            RealImages(source, device, part=part, resident=self.layout.images_resident),
            self.blended,
            networks=len(pool),
            normalise=self.normalise,
            seed=seed,
            layout=self.layout,
        )
        player = SamplingNetwork if config.discrepancy == "ncfd" else GaussianFrequencies
        with seeded(seed, "sampler"):
            self.sampler: nn.Module = player(footprint.dim, config.frequencies).to(device)

    def backward(self, images: Tensor, step: int) -> StepLosses:
        """Set `images.grad` and add to psi's gradients those of weight * discrepancy + calibration.

        Both terms are summed over the classes. `images` are those of `part`.
        """
        with rounded_products(self.config.precision == "bfloat16"):
            entry = self.real.prepare(step)
            if self.config.calibration:
                self.trained.load(entry.network, 1.0)
            frequencies = leaf = None
            if self.config.has_frequencies:
                frequencies = self.sampler(generator_at(self.seed, "frequencies", step, device=self.device))
                # psi's own graph is walked once, after all chunks
                leaf = frequencies.detach().requires_grad_(frequencies.requires_grad)
            gradient = torch.empty_like(images)
            images.grad = gradient
            rows = []
            for first in range(0, len(self._numbers), self.layout.classes):
                classes = slice(first, first + self.layout.classes)
                part = images.detach()[:, classes].requires_grad_()
                real = self.real.features(entry, classes)
                rows.append(self._chunk(part, real, leaf, step, entry.number, classes))
                gradient[:, classes] = part.grad  # type: ignore[assignment]
            if frequencies is not None and frequencies.requires_grad:
                frequencies.backward(leaf.grad)  # type: ignore[union-attr]
            return StepLosses(*torch.cat(rows, dim=1))

    def ascend(self, images: Tensor, step: int, turn: int) -> None:
        """Set the gradients of psi alone, at frequencies of this turn's own; the images hold still."""
        with rounded_products(self.config.precision == "bfloat16"):
            entry = self.real.prepare(step)
            frequencies = self.sampler(generator_at(self.seed, "frequencies", step, turn, device=self.device))
            leaf = frequencies.detach().requires_grad_()
            for first in range(0, len(self._numbers), self.layout.classes):
                classes = slice(first, first + self.layout.classes)
                with torch.no_grad():
                    views = self._views(images[:, classes], step, entry.number, classes)
                    synthetic = self.blended.features(views).unflatten(0, (images[:, classes].shape[1], -1))
                rows = self._compare(self.real.features(entry, classes), synthetic, leaf, step)
                (self.config.weight * rows[0].sum()).backward()
            frequencies.backward(leaf.grad)

    def use(self, layout: Layout) -> None:
        """Cut the next steps in another way."""
        self.layout = self.real.layout = layout

    def normalise(self, images: Tensor) -> Tensor:
        """Images [..., channels, H, W] in [0, 1] to zero mean and unit deviation of the real data."""
        return (images - self.mean) / self.std

    def _chunk(
        self, part: Tensor, real: Tensor, frequencies: Tensor | None, step: int, entry: int, classes: slice
    ) -> Tensor:
        """Gradients of some classes, images [ipc, c, channels, H, W]: what `StepLosses` holds, as [4, c]."""
        count = part.shape[1]
        views = self._views(part, step, entry, classes)
        # Each term frees its network's activations before the other begins; they meet at the views.
        seen = views.detach().requires_grad_()
        features = self.blended.features(seen).unflatten(0, (count, -1))
        rows = self._compare(real, features, frequencies, step)
        (self.config.weight * rows[0].sum()).backward()
        calibration = torch.zeros_like(rows[0])
        if self.config.calibration:
            targets = self._labels[classes].repeat_interleave(len(seen) // count)
            loss = F.cross_entropy(self.trained.logits(seen), targets, reduction="none")
            calibration = loss.unflatten(0, (count, -1)).mean(1)
            (self.config.calibration * calibration.sum()).backward()
        views.backward(seen.grad)
        return torch.stack([rows[0], calibration, *rows[1:]]).detach()

    def _views(self, part: Tensor, step: int, entry: int, classes: slice) -> Tensor:
        """What the networks see of images [ipc, c, channels, H, W]: [c * ipc * factor**2, channels, H, W]."""
        views = decode(part.transpose(0, 1).flatten(0, 1), self.config.factor).flatten(0, 1)
        return self._augment(self.normalise(views), step, entry, classes)

    def _compare(
        self, real: Tensor, synthetic: Tensor, frequencies: Tensor | None, step: int
    ) -> tuple[Tensor, ...]:
        """Discrepancy, amplitude and phase of each class, [c] each: means over all images and the prefix."""
        parts = [synthetic]
        if (length := self._prefix(synthetic.shape[1], step)) is not None:
            parts.append(synthetic[:, :length])
        if frequencies is None:
            values = [PLAIN[self.config.discrepancy](real, part) for part in parts]
            rows = [(value, torch.zeros_like(value), torch.zeros_like(value)) for value in values]
        else:
            function, rows = characteristic_function(real, frequencies), []
            for part in parts:
                amplitude, phase = amplitude_and_phase(function, characteristic_function(part, frequencies))
                rows.append((weigh(amplitude, phase, self.config.alpha), amplitude.mean(1), phase.mean(1)))
        return tuple(torch.stack(values).mean(0) for values in zip(*rows, strict=True))

    def _prefix(self, views: int, step: int) -> int | None:
        """Number of views of the first k images per class that the step matches too, with every scale of k
        as likely; None where nothing is nested.
        """
        each = self.config.factor**2
        ipc = views // each
        if not self.config.nested or ipc == 1:
            return None
        share = torch.rand((), generator=generator_at(self.seed, "prefix", step)).item()
        return int(ipc**share) * each

    def _augment(self, views: Tensor, step: int, entry: int, classes: slice) -> Tensor:
        """As the real images of the entry, or with numbers of each view's own."""
        if self.config.augment_shared:
            operations, numbers = draw(self.config.augment, 1, generator_at(self.seed, "augment", entry))
            return apply(views, operations, numbers)
        each = len(views) // len(self._numbers[classes])
        generator = generator_at(self.seed, "augment synthetic", step)
        operations, numbers = draw(self.config.augment, self.num_classes * each, generator)
        chosen = numbers.unflatten(0, (-1, each))[list(self._numbers[classes])]
        return apply(views, operations, chosen.flatten(0, 1))
