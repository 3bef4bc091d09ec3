"""This engine as a contender: the one place of the benchmark that knows how a step of it is built."""

import math

import torch

from ncfm_engine.config import DistillConfig
from ncfm_engine.distill import Match
from ncfm_engine.initial import initial_images
from ncfm_engine.matching import MatchingStep
from ncfm_engine.ranks import Ranks
from ncfm_engine.sampling import real_per_class

from .setup import Setup
from .workers import Contender


class Engine(Contender):
    """The steps of `ncfm_engine.distill`, without its logs and checkpoints."""

    def __init__(self, setup: Setup, ranks: Ranks | None = None):
        super().__init__(setup)
        ranks = ranks or Ranks()
        source, pool = setup.open()
        config, ipc, seed, device = setup.recipe.distill, setup.recipe.ipc, setup.recipe.seed, setup.device
        part = ranks.part(source.num_classes)
        options = {"memory": setup.memory, "part": part} | setup.options
        self.game = MatchingStep(config, source, pool, ipc=ipc, seed=seed, device=device, **options)
        images = initial_images(config, source, pool, ipc=ipc, seed=seed)[:, part]
        self.images = images.contiguous().to(device)
        self.match = Match(config, self.game, self.images, ranks, None, {})
        self.images_per_step = images_per_step(config, ipc, source.train.counts, part)

    def iterate(self, step: int) -> None:
        self.match.play()
        self.match.pending.clear()


def images_per_step(config: DistillConfig, ipc: int, counts: torch.Tensor, part: slice = slice(None)) -> int:
    """Images that pass a network in a step with fresh features: real ones once, views once per loss; those of
    the classes `part`, where `counts` are of all.
    """
    real = real_per_class(config.real_batch, counts)
    return len(counts[part]) * (real + (2 if config.calibration else 1) * ipc * config.factor**2)


def whole_periods(config: DistillConfig, iterations: float) -> int:
    """About as many steps, so that a feature bank is refreshed as often as in a long run."""
    period = config.bank_refresh if config.real_features == "bank" else 1
    return max(1, math.ceil(iterations / period)) * period
