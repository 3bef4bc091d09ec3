"""This engine as a contender: the one place of the benchmark that knows how a step of it is built."""

import math

import torch

from ncfm_engine.config import DistillConfig
from ncfm_engine.initial import initial_images
from ncfm_engine.matching import MatchingStep, StepLosses
from ncfm_engine.memory import Footprint, layout_for
from ncfm_engine.ranks import Ranks

from .setup import Setup
from .workers import Contender


class Engine(Contender):
    """The steps of `ncfm_engine.distill`, without its logs and checkpoints."""

    def __init__(self, setup: Setup, ranks: Ranks | None = None):
        super().__init__(setup)
        self.ranks = ranks or Ranks()
        source, pool = setup.open()
        recipe, config, device = setup.recipe, setup.recipe.distill, setup.device
        part = self.ranks.part(source.num_classes)
        footprint = Footprint.of(
            config,
            pool.template,
            source,
            ipc=recipe.ipc,
            kept_networks=pool.trajectory[..., 0].numel(),
            device=device,
            num_classes=part.stop - part.start,
        )
        self.game = MatchingStep(
            config,
            source,
            pool,
            ipc=recipe.ipc,
            seed=recipe.seed,
            device=device,
            layout=layout_for(footprint, device, setup.memory),
            part=part,
            **setup.options,
        )
        images = initial_images(config, source, pool, ipc=recipe.ipc, seed=recipe.seed)[:, part]
        self.images = images.contiguous().to(device).requires_grad_()
        self.optimisers: list[torch.optim.Optimizer] = [
            torch.optim.AdamW([self.images], config.learning_rate, weight_decay=0.0)
        ]
        self.players = list(self.game.sampler.parameters())
        if self.players:
            rate, momentum = config.sampler_learning_rate, config.sampler_momentum
            self.optimisers.append(torch.optim.SGD(self.players, rate, momentum, maximize=True))
        self.images_per_step = images_per_step(config, recipe.ipc, source.train.counts[part])

    def iterate(self, step: int) -> StepLosses:
        for optimiser in self.optimisers:
            optimiser.zero_grad()
        losses = self.game.backward(self.images, step)
        self.ranks.all_reduce(*(player.grad for player in self.players if player.grad is not None))
        for optimiser in self.optimisers:
            optimiser.step()
        with torch.no_grad():
            self.images.clamp_(0, 1)
        return losses


def images_per_step(config: DistillConfig, ipc: int, counts: torch.Tensor) -> int:
    """Images that pass a network in a step with fresh features: real ones once, views once per loss."""
    real = min(config.real_batch, int(counts.min()))
    return len(counts) * (real + (2 if config.calibration else 1) * ipc * config.factor**2)


def whole_periods(config: DistillConfig, iterations: float) -> int:
    """About as many steps, so that a feature bank is refreshed as often as in a long run."""
    period = config.bank_refresh if config.real_features == "bank" else 1
    return max(1, math.ceil(iterations / period)) * period
