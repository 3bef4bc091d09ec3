"""How a candidate of an architecture search is scored: quickly by a proxy, or in full.

distilled  trained on the distilled images
random     on as many random real images, with labels of the same kind: what the distilling is worth; each
           image is there as often as a packed one has tiles, so that batches are the same
early      on all real images, for as many steps of as many images: what the small set is worth
full       on all real images, to the end: the truth that the others try to tell

All real images are those of the training set that were not held out; the first three, which take as many
optimiser steps, are tested on the others. That is equal time, but for early stopping, whose batches are
nearly always full: where the last batch of an epoch of the set is not, it sees more images in as many steps
(of 400 in batches of 128, 28 % more). The truth alone is measured on the test set.
"""

import copy
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from distilled_data import DistilledDataset, DivergenceError, UsageError
from distilled_data.randomness import seed_at

from .batches import DRAWS, real_loader
from .cache import sha256_of
from .checkpoint import discard
from .config import EvaluateConfig
from .evaluate import Loaders, deciding, normalised_as, packing, random_images, same_images, start_training
from .pool import FeaturePool
from .progress import Progress
from .search import Check, Scores
from .sources import Source, hold_out
from .spaces import Architecture, Space
from .stop import StopRequest
from .train import grouped, named, trained_at_once

PROXIES, FULL = ("distilled", "random", "early"), "full"
LATE = 0.25  # share of the steps, the last ones, whose mean loss (see `Training.losses`) ranks candidates too
VALIDATION = 0.1  # share of the training images, where a set was made without a split
PROTOCOL = tuple(name for name in deciding(EvaluateConfig()) if name not in ("epochs", "full_epochs"))


@dataclass(frozen=True)
class Proxy:
    """Trains `repeats` networks of an architecture for `epochs` of its loaders; `source` tests them."""

    name: str
    loaders: Loaders
    epochs: float
    repeats: int
    source: Source
    config: EvaluateConfig
    seed: int
    device: str
    checks: int  # tests of each training, evenly spaced, the last one at the end
    identity: Mapping[str, Any]  # all that decides a score, besides the architecture
    folder: Path | None = None  # where trainings are kept that were stopped, to go on from there

    def score(
        self, space: Space, architecture: Architecture, check: Check, stop: StopRequest | None = None
    ) -> Scores:
        """Accuracies of the networks in percent, and their losses late in the training, one that is no number
        as the highest there is; `check` gets the accuracies of the first one, whatever is trained beside it.

        With a `folder`, what was begun there before is gone on with, until `forget` is called; what cannot be
        kept there is told in a warning. Raises `DivergenceError` for weights that are not finite,
        `DeviceMemoryError`, `Stopped`, and whatever the building of the network raises.
        """
        identity = self._identity(space, architecture)
        progress = Progress(self._path(identity), identity, resume=True, dispensable=True)
        before, size = progress.seconds.get(self.name, 0.0), self.config.at_once or 1
        if self.repeats > 1 and not self.config.at_once:
            network = self._network(space, architecture, 0)
            size = trained_at_once(network, self.source, self.config.batch_size, self.device)
        names = [f"{self.name} {repeat}" for repeat in range(self.repeats)]
        missing = [repeat for repeat, name in enumerate(names) if name not in progress.finished]
        if 0 not in missing:
            for accuracy in progress.finished[names[0]].scores:
                check(accuracy)
        for group in grouped(missing, size):
            self._train(progress, space, architecture, group, check if group[0] == 0 else _unheard, stop)
        done = [progress.finished[name] for name in names]
        # Who masks a logit is trained well, but has a loss that is no number: it comes last, whatever sorts.
        losses = torch.tensor([each.loss for each in done]).nan_to_num(nan=torch.finfo(torch.float32).max)
        return Scores([each.scores[-1] for each in done], losses.tolist(), before)

    def forget(self, space: Space, architecture: Architecture) -> None:
        """Remove what the `folder` has of a candidate: when what became of it is recorded elsewhere."""
        if path := self._path(self._identity(space, architecture)):
            discard(path)

    def _identity(self, space: Space, architecture: Architecture) -> dict[str, Any]:
        """Of the trainings of this candidate, in all processes that would train it alike."""
        identity = {**self.identity, "architecture": dict(architecture), "code": space.own_code}
        identity |= {"checks": self.checks, "draws": DRAWS}
        return identity | {"torch": torch.__version__, "device": torch.device(self.device).type}

    def _path(self, identity: Mapping[str, Any]) -> Path | None:
        return self.folder and self.folder / f"{self.name}-{sha256_of(identity)[:12]}.safetensors"

    def _train(
        self,
        progress: Progress,
        space: Space,
        architecture: Architecture,
        group: list[int],
        check: Check,
        stop: StopRequest | None,
    ) -> None:
        seeds = [seed_at(self.seed, repeat) for repeat in group]
        networks = [self._network(space, architecture, seed) for seed in seeds]
        if len(set(map(id, networks))) < len(networks):
            raise UsageError(f"build returned the same network twice for {dict(architecture)}")
        options: dict[str, Any] = {"epochs": self.epochs, "checks": self.checks, "late": LATE}
        training = start_training(self.loaders(seeds), networks, self.source, self.config, **options)

        def after_test(scores: list[float]) -> None:
            for repeat, weights, score in zip(group, training.networks.weights, scores, strict=True):
                if math.isnan(score) or not weights.isfinite().all():
                    raise DivergenceError(f"network {repeat} diverged before step {training.step}")
            check(scores[0])

        progress.run(
            self.name,
            f"{self.name} {dict(architecture)}, {named(group)}",
            group,
            lambda: training,
            seed=seed_at(self.seed, "training", *group),
            stop=stop,
            after_test=after_test,
        )

    def _network(self, space: Space, architecture: Architecture, seed: int) -> nn.Module:
        source = self.source
        size = source.height, source.width
        return space.network(
            architecture, channels=source.channels, size=size, classes=source.num_classes, seed=seed
        )


def _unheard(accuracy: float) -> None:
    pass


def splits(real: Source, seen: Source, validation: float) -> tuple[Source, Source]:
    """Two sources with the same training images: one tests on images held out of them, one on the test set.

    `real` is all there is; a set was made with `seen`, normalised as that is, and if it was made with a
    `validation` split, that one is held out, otherwise `VALIDATION` of the training images.
    """
    held = replace(hold_out(real, validation or VALIDATION), mean=seen.mean, std=seen.std)
    whole = Source.from_splits(real.origin, real.classes, held.train, real.test)
    return held, replace(whole, mean=seen.mean, std=seen.std, split=real.split)


def proxies(
    dataset: DistilledDataset,
    source: Source,
    test: Source,
    config: EvaluateConfig,
    *,
    labels: str,
    seed: int,
    device: str,
    checks: int = 1,
    pool: FeaturePool | None = None,
    folder: Path | None = None,
) -> dict[str, Proxy]:
    """All of `PROXIES`, and `FULL`, by their names: `config.epochs` passes over `dataset`, or as many steps
    over others.

    `source` has held out the images that they are tested on; `test` is the same with the test set, for the
    truth. `labels` are "hard" or "soft"; `pool` labels the random images, and is needed for soft labels only.
    In `folder` trainings are kept that were stopped.
    Raises `UsageError` for more `checks` than a training has steps.
    """
    options: dict[str, Any] = {"batch_size": config.batch_size, "device": device, "augment": config.augment}
    distilled = normalised_as(source, dataset).with_labels(labels).loader(**options)
    real = real_loader(source, source.train, **options)
    steps, batch = config.epochs * len(distilled), min(config.batch_size, distilled.count)
    early = copy.copy(real)  # of the same tensors
    early.batch_size = batch
    if checks > steps:
        raise UsageError(
            f"{checks} checks of a training need as many steps; {config.epochs} epochs have {steps}"
        )
    copies = dataset.info.factor**2
    random = random_images(dataset, source, labels, pool, device, options, copies)
    protocol = {name: getattr(config, name) for name in PROTOCOL} | {"seed": seed}
    protocol |= {"images": source.fingerprint, "classes": list(source.classes)}
    protocol |= {"mean": source.mean, "std": source.std}
    few = protocol | {"steps": steps, "networks": config.repeats, "split": source.split}
    small_set = few | {"set": dataset.content_hash, "ipc": dataset.ipc, "labels": labels}
    small_set |= packing(dataset)
    drawn = {"copies": copies}
    if labels == "soft":
        said = dataset.info.labels
        small_set |= {"temperature": said.get("temperature")}
        # Without a pool nothing is scored, but what one like the set's own has scored is found.
        drawn |= {"teacher": pool.weights_hash if pool else said.get("teacher", {}).get("weights_sha256")}

    def proxy(name: str, loaders: Loaders, epochs: float, identity: Mapping[str, Any]) -> Proxy:
        settings = config.repeats, source, config, seed, device, checks
        return Proxy(name, loaders, epochs, *settings, identity, folder)

    torch.optim.AdamW([torch.zeros(1)])  # the first one imports for a second, which is no candidate's
    other = seed_at(seed, FULL)  # or what was lucky with its first weights would be so again
    whole = protocol | {"epochs": config.full_epochs, "networks": config.full_repeats, "split": test.split}
    whole |= {"test images": test.fingerprint}
    full = proxy(FULL, same_images(real), config.full_epochs, whole | {"seed": other})
    return {
        "distilled": proxy("distilled", same_images(distilled), config.epochs, small_set),
        "random": proxy("random", random, config.epochs, small_set | drawn),
        "early": proxy("early", same_images(early), steps / len(early), few | {"batch_size": batch}),
        FULL: replace(full, repeats=config.full_repeats, source=test, checks=1, seed=other),
    }
