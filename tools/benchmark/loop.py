"""The baseline: NCFM as the paper writes it down, one class after the other, and whether it agrees with us.

It draws by the addresses of `ncfm_engine.matching`, so that both sides can be given the same step.
"""

import dataclasses

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from distilled_data import DistilledDataError, UsageError
from distilled_data.augment import augment
from distilled_data.decode import decode
from distilled_data.randomness import generator_at
from ncfm_engine.config import DistillConfig
from ncfm_engine.discrepancy import ncfd
from ncfm_engine.frequencies import GaussianFrequencies, SamplingNetwork
from ncfm_engine.initial import initial_images
from ncfm_engine.pool import FlatNetwork
from ncfm_engine.sampling import ClassSampler, real_per_class

from .engine import Engine, images_per_step
from .setup import Setup
from .workers import Contender

PLAYERS = {"ncfd": SamplingNetwork, "cfd": GaussianFrequencies}
TOLERANCE = {  # relative, float32
    "discrepancy": 1e-3,
    "cross-entropy": 1e-3,
    "image gradients": 5e-2,  # a rounding error can switch a ReLU, and with it the gradient of a patch
    "psi gradients": 1e-3,
}


class Loop(Contender):
    """Per class and step: one real and one synthetic forward, one backward for both players, one update."""

    def __init__(self, setup: Setup):
        super().__init__(setup)
        if setup.recipe.distill.discrepancy not in PLAYERS:
            raise UsageError(f"the loop plays {' and '.join(PLAYERS)} only; add --without loop")
        source, self.pool = setup.open()
        recipe, config, device = setup.recipe, setup.recipe.distill, setup.device
        self.config, self.seed, self.device = config, recipe.seed, device
        self.classes, self.draws = source.num_classes, ClassSampler(source.train)
        self.real_images = source.train.images.to(device)
        self.real_batch = real_per_class(config.real_batch, source.train.counts)
        self.mean = torch.tensor(source.mean, device=device).view(-1, 1, 1)
        self.std = torch.tensor(source.std, device=device).view(-1, 1, 1)
        self.blended, self.trained = (FlatNetwork(self.pool.template, device) for _ in range(2))
        packed = initial_images(config, source, self.pool, ipc=recipe.ipc, seed=recipe.seed).to(device)
        self.images = [part.clone().requires_grad_() for part in packed.unbind(1)]
        self.optimisers = [
            torch.optim.AdamW([part], config.learning_rate, weight_decay=0) for part in self.images
        ]
        example = torch.zeros(1, source.channels, source.height, source.width, device=device)
        dim = self.features(example).shape[1]
        self.psi: nn.Module = PLAYERS[config.discrepancy](dim, config.frequencies).to(device)
        rate, momentum = config.sampler_learning_rate, config.sampler_momentum
        players = list(self.psi.parameters())
        self.ascent = torch.optim.SGD(players, rate, momentum, maximize=True) if players else None
        self.images_per_step = images_per_step(config, recipe.ipc, source.train.counts)

    def iterate(self, step: int) -> tuple[float, float]:
        """Means over the classes of discrepancy and cross-entropy."""
        index, discrepancy, calibration = self.begin(step), 0.0, 0.0
        for label in range(self.classes):
            loss = self.discrepancy(label, index[label], step)
            self.optimisers[label].zero_grad()
            if self.ascent:
                self.ascent.zero_grad()
            (self.config.weight * loss).backward()
            self.optimisers[label].step()
            if self.ascent:
                self.ascent.step()
            discrepancy += loss.item()
        for label in range(self.classes if self.config.calibration else 0):
            loss = self.calibration(label, step)
            self.optimisers[label].zero_grad()
            (self.config.calibration * loss).backward()
            self.optimisers[label].step()
            calibration += loss.item()
        with torch.no_grad():
            for images in self.images:
                images.clamp_(0, 1)
        return discrepancy / self.classes, calibration / self.classes

    def begin(self, step: int) -> Tensor:
        """Blend the network of this step; which real images it sees, int64 [C, B]."""
        draw = generator_at(self.seed, "network", step)
        network = int(torch.randint(len(self.pool), (), generator=draw))
        self.pool.blend(network, torch.rand((), generator=draw).item(), self.blended)
        self.pool.blend(network, 1.0, self.trained)
        return self.draws.draw(self.real_batch, generator_at(self.seed, "real", step)).to(self.device)

    def discrepancy(self, label: int, index: Tensor, step: int) -> Tensor:
        """Equation 8 between one class's real images at `index` [B] and its synthetic images: a scalar."""
        with torch.no_grad():
            real = self.features(self.augmented(self.real_images[index].float() / 255, step))
        synthetic = self.features(self.synthetic(label, step))
        frequencies = self.psi(generator_at(self.seed, "frequencies", step, device=self.device))
        return ncfd(real[None], synthetic[None], frequencies, self.config.alpha)[0]

    def calibration(self, label: int, step: int) -> Tensor:
        """Cross-entropy of one class's synthetic images under the trained network: a scalar."""
        logits = self.trained.network(self.synthetic(label, step))
        return F.cross_entropy(logits, torch.full((len(logits),), label, device=self.device))

    def synthetic(self, label: int, step: int) -> Tensor:
        return self.augmented(decode(self.images[label], self.config.factor).flatten(0, 1), step)

    def augmented(self, images: Tensor, step: int) -> Tensor:
        generator = generator_at(self.seed, "augment", step)
        return augment((images - self.mean) / self.std, self.config.augment, generator, shared=True)

    def features(self, images: Tensor) -> Tensor:
        return F.normalize(self.blended.network.features(images).flatten(1))


def agreement(setup: Setup, loop_config: DistillConfig | None = None) -> dict[str, float]:
    """Relative differences between engine and loop in one step, in float32 with the same draws.

    Each is that of the class that differs most: a class's losses, and the gradient of its images, depend on
    no other class. Raises `DistilledDataError` when the two do not compute the same step.
    """
    config = dataclasses.replace(setup.recipe.distill, real_features="fresh", precision="float32")
    setup = dataclasses.replace(setup, tf32=False, recipe=dataclasses.replace(setup.recipe, distill=config))
    engine, loop = Engine(setup), Loop(setup)
    loop.config = loop_config or config
    loop.psi.load_state_dict(engine.game.sampler.state_dict())
    losses, rows, index = engine.game.backward(engine.images, 0), [], loop.begin(0)
    for label in range(loop.classes):
        discrepancy = loop.discrepancy(label, index[label], 0)
        (config.weight * discrepancy).backward()
        calibration = torch.zeros((), device=setup.device)
        if config.calibration:
            calibration = loop.calibration(label, 0)
            (config.calibration * calibration).backward()
        rows.append((discrepancy.detach(), calibration.detach()))
    discrepancies, calibrations = (torch.stack(row)[:, None] for row in zip(*rows, strict=True))
    found = {
        "discrepancy": _apart(losses.discrepancy[:, None], discrepancies),
        "cross-entropy": _apart(losses.calibration[:, None], calibrations),
        "image gradients": _apart(
            engine.images.grad.transpose(0, 1).flatten(1),  # type: ignore[union-attr]
            torch.stack([images.grad.flatten() for images in loop.images]),  # type: ignore[union-attr]
        ),
    }
    if loop.ascent:
        ours, plainly = (
            torch.cat([p.grad.flatten() for p in psi.parameters() if p.grad is not None])[None]
            for psi in (engine.game.sampler, loop.psi)
        )
        found["psi gradients"] = _apart(ours, plainly)
    for name, difference in found.items():
        if not difference <= TOLERANCE[name]:
            raise DistilledDataError(
                f"engine and loop do not compute the same step: the {name} of a class differ by "
                f"{difference:.1e} relative, expected at most {TOLERANCE[name]:g}. Times of different work "
                "cannot be compared, so none were taken."
            )
    return found


def _apart(ours: Tensor, theirs: Tensor) -> float:
    """Largest relative difference in norm between the rows of [C, N] and [C, N]."""
    return ((ours - theirs).norm(dim=1) / theirs.norm(dim=1).clamp_min(1e-12)).max().item()
