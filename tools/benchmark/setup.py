"""What a measurement is made of: a recipe, real images or random ones, and networks of random weights."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch.nn.utils import parameters_to_vector

from distilled_data.randomness import generator_at, seed_at
from ncfm_engine.config import Recipe
from ncfm_engine.pool import FeaturePool, build
from ncfm_engine.sources import LabelledImages, Source, load_source
from ncfm_engine.sources.reader import Origin

NETWORKS = 2  # in the pool; the time does not depend on how many there are
DISTINCT = 4096  # random images that are made; larger sets repeat them


@dataclass(frozen=True)
class Setup:
    """Everything a contender needs to build itself in a process of its own."""

    recipe: Recipe
    dataset: str | None = None  # as `load_source` takes it; None: random images of the shape below
    data: Path | None = None  # folder of a named dataset
    classes: int = 10
    size: int = 32  # pixels
    channels: int = 3
    device: str = "cpu"
    threads: int | None = None  # of torch on the CPU; None: its own choice
    tf32: bool = True  # TensorFloat-32 on GPUs, as the reference has it
    memory: int | None = None  # bytes that one step of the engine may take
    options: dict[str, Any] = field(default_factory=dict)  # more keywords of `MatchingStep`

    def open(self) -> tuple[Source, FeaturePool]:
        """Set this process up and return the real images and the networks."""
        if self.threads:
            torch.set_num_threads(self.threads)
        if self.device.startswith("cuda"):
            torch.cuda.set_device(torch.device(self.device).index or 0)
            torch.backends.cudnn.benchmark = True  # this and the products as `distill` has them
            torch.backends.cudnn.allow_tf32 = self.tf32
            torch.set_float32_matmul_precision("high" if self.tf32 else "highest")
        source = load_source(self.dataset, data=self.data) if self.dataset else self._random_images()
        return source, self._random_networks(source)

    def _random_images(self) -> Source:
        config, shape = self.recipe.distill, (self.channels, self.size, self.size)
        each = max(config.real_batch, self.recipe.ipc * config.factor**2)  # for a step, and for the tiles
        count = self.classes * each
        distinct = torch.randint(
            256, (min(count, DISTINCT), *shape), generator=generator_at("images"), dtype=torch.uint8
        )
        images = distinct.repeat(-(-count // len(distinct)), 1, 1, 1)[:count]
        targets = torch.arange(self.classes).repeat_interleave(each)
        unmeasured = (
            torch.zeros(count, 32, dtype=torch.uint8),
            torch.zeros(count, self.channels, 2, dtype=torch.int64),
        )
        train = LabelledImages(images, targets, self.classes, *unmeasured)
        return Source(
            Origin("random", "random"),
            classes=tuple(f"class {label}" for label in range(self.classes)),
            train=train,
            test=train.where(torch.arange(count) % each == 0),
            mean=(0.5,) * self.channels,
            std=(0.25,) * self.channels,
            fingerprint=f"random {self.classes} {each} {shape}",
        )

    def _random_networks(self, source: Source) -> FeaturePool:
        config, seed = self.recipe.network, self.recipe.seed
        template = build(config, source, seed)

        def weights(purpose: str, index: int) -> torch.Tensor:
            network = build(config, source, seed_at(seed, purpose, index))
            return parameters_to_vector(network.parameters()).detach()

        trajectory = torch.stack(
            [torch.stack([weights("initial", index), weights("trained", index)]) for index in range(NETWORKS)]
        )
        return FeaturePool(template, trajectory.to(self.device))
