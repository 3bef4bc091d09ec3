"""One step of the game: which images are drawn, which network looks at them, what both players are told."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from distilled_data.augment import augment
from distilled_data.decode import decode
from distilled_data.randomness import generator_at, seed_at

from .config import DistillConfig
from .discrepancy import ncfd
from .frequencies import GaussianFrequencies, SamplingNetwork
from .pretrain import FeaturePool, FlatNetwork
from .sampling import ClassSampler
from .sources import Source


class RealBatches:
    """Real images on the device; every step draws anew from the whole of every class."""

    def __init__(self, source: Source, per_class: int, device: str):
        self.sampler = ClassSampler(source.train)
        self.per_class = min(per_class, int(self.sampler.counts.min()))
        self.images = source.train.images.to(device)

    def draw(self, generator: torch.Generator, classes: slice = slice(None)) -> Tensor:
        """uint8 [C, per_class, channels, H, W]; equal draws for equal generators, whatever the chunk."""
        index = self.sampler.draw(self.per_class, generator)[classes]
        return self.images[index.to(self.images.device, non_blocking=True)]


@dataclass
class StepLosses:
    """Means over the classes, left on the device."""

    discrepancy: Tensor  # scalar
    calibration: Tensor  # scalar

    def __iadd__(self, other: "StepLosses") -> "StepLosses":
        self.discrepancy += other.discrepancy
        self.calibration += other.calibration
        return self


class MatchingStep:
    """Gradients of both players for one step: images [ipc, C, channels, H, W] in [0, 1], and psi.

    All classes go through the network at once; with `classes_per_chunk` they go in chunks whose
    gradients are added up, which gives the same result in less memory.
    """

    def __init__(
        self,
        config: DistillConfig,
        source: Source,
        pool: FeaturePool,
        *,
        seed: int,
        device: str,
        classes_per_chunk: int | None = None,
    ):
        self.config, self.pool, self.seed, self.device = config, pool, seed, device
        self.classes = source.num_classes
        self.classes_per_chunk = classes_per_chunk or self.classes
        self.real = RealBatches(source, config.real_batch, device)
        self.mean = torch.tensor(source.mean, device=device).view(-1, 1, 1)
        self.std = torch.tensor(source.std, device=device).view(-1, 1, 1)
        self._blended = FlatNetwork(pool.template, device)
        self._trained = FlatNetwork(pool.template, device)
        example = torch.zeros(1, source.channels, source.height, source.width, device=device)
        dim = self._blended.network.features(example).numel()  # type: ignore[operator]
        players = SamplingNetwork if config.adversarial else GaussianFrequencies
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed_at(seed, "sampler"))  # torch.manual_seed reaches GPUs
            self.sampler: nn.Module = players(dim, config.frequencies).to(device)

    def backward(self, images: Tensor, step: int) -> StepLosses:
        """Add the gradients of weight * discrepancy + calibration, summed over the classes."""
        draw = generator_at(self.seed, "network", step)
        index = int(torch.randint(len(self.pool), (), generator=draw))
        beta = torch.rand((), generator=draw).item()
        self.pool.blend(index, beta, self._blended)
        self.pool.blend(index, 1.0, self._trained)
        total = StepLosses(*torch.zeros(2, device=self.device))
        for first in range(0, self.classes, self.classes_per_chunk):
            total += self._chunk(images, step, slice(first, first + self.classes_per_chunk))
        return total

    def _chunk(self, images: Tensor, step: int, classes: slice) -> StepLosses:
        part = images[:, classes]
        views = decode(part.transpose(0, 1).flatten(0, 1), self.config.factor).flatten(0, 1)
        synthetic = self._augment((views - self.mean) / self.std, step)
        with torch.no_grad():
            real = self.real.draw(generator_at(self.seed, "real", step), classes).float().div_(255)
            real = self._augment((real.flatten(0, 1) - self.mean) / self.std, step)
            real_features = self._features(real)
        count = part.shape[1]
        frequencies = self.sampler(generator_at(self.seed, "frequencies", step, device=self.device))
        discrepancy = ncfd(
            real_features.unflatten(0, (count, -1)),
            self._features(synthetic).unflatten(0, (count, -1)),
            frequencies,
            self.config.alpha,
        ).sum()
        calibration = torch.zeros((), device=self.device)
        if self.config.calibration:
            targets = torch.arange(self.classes, device=self.device)[classes]
            each = len(synthetic) // count
            logits = self._trained.network(synthetic)
            calibration = F.cross_entropy(logits, targets.repeat_interleave(each), reduction="sum") / each
        (self.config.weight * discrepancy + self.config.calibration * calibration).backward()
        return StepLosses(discrepancy.detach() / self.classes, calibration.detach() / self.classes)

    def _augment(self, images: Tensor, step: int) -> Tensor:
        generator = generator_at(self.seed, "augment", step)
        return augment(images, self.config.augment, generator, shared=True)

    def _features(self, images: Tensor) -> Tensor:
        """Last feature maps, flattened and L2-normalised: [N, D]."""
        return F.normalize(self._blended.network.features(images).flatten(1))  # type: ignore[operator]
