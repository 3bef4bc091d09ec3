"""How well a network trained on the artifact does on real test images, beside random and all images."""

import dataclasses
import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from distilled_data import DistilledDataset, UsageError
from distilled_data.loader import Loader
from distilled_data.randomness import generator_at, seed_at

from .batches import DRAWS, Batches, real_loader, real_test_loader, reseeded
from .cache import sha256_of
from .checkpoint import discard
from .config import EvaluateConfig, NetworkConfig, flatten
from .label import Ensemble, label
from .pool import FeaturePool, build
from .progress import Finished, Progress
from .report import Report, silent
from .sampling import ClassSampler
from .sources import Source
from .stop import StopRequest
from .train import Course, Networks, Training, counting, grouped, named, trained_at_once

PROGRESS_PREFIX = "evaluation"  # of files in the run folder, until the rows are there
CHECKS = 10  # evenly spaced tests during a training, for the best-over-epochs column

Loaders = Callable[[Sequence[int]], list[Loader]]  # one for each seed


def evaluate(
    dataset: DistilledDataset,
    source: Source,
    config: EvaluateConfig,
    network: NetworkConfig,
    *,
    seed: int,
    device: str,
    pool: FeaturePool | None = None,
    random: bool = True,
    folder: Path | None = None,
    resume: bool = False,
    stop: StopRequest | None = None,
    report: Report = silent,
) -> list[dict[str, Any]]:
    """Rows of `results.json`, one for each label kind of `config.labels`, in that order.

    Of test accuracies in percent each has `last_mean`, `last_std` and the list `last_accuracies` of `n`
    networks at the last epoch, and likewise `best_` of the tests on the way, `random_` of random images and
    `full_` of all; a mean of no networks is None, and a deviation of one.

    `source` has the classes of `dataset` by the same numbers, which nothing here compares.
    Distilled and random images share labels, optimiser steps and augmentation; every repeat has a network
    and a random subset of its own, unless `random` is false. `pool` labels, see `needs_teacher`.
    With a `folder` progress is kept there, until `forget_progress`, and `resume` goes on from it. Raises
    `Stopped` after saving it when `stop` is requested, `CheckpointError` for that of other real images,
    `DivergenceError` for weights or logits that are not finite, and `UsageError` where `pool` is missing.
    """
    if not needs_teacher(config, random):
        pool = None
    elif pool is None:
        raise UsageError(
            f"labels {', '.join(config.labels)} need the pool of networks that labelled the artifact "
            "(pool=); without it expected hard alone, or soft without random images (random=False)"
        )
    identity = _identity(dataset, source, config, network, seed, device, pool)
    teacher, settings = pool.weights_hash if pool else None, settings_hash(config, network, seed)
    path = folder and _progress_path(folder, settings, dataset.content_hash, teacher)
    progress = Progress(path, identity, resume)
    trainings = _Trainings(source, config, network, seed, device, progress, stop, report)
    options: dict[str, Any] = {"batch_size": config.batch_size, "device": device, "augment": config.augment}

    @cache
    def full() -> list[Finished]:
        """Trained after the first label kind, whose scores say most if the time runs out."""
        all_images = same_images(real_loader(source, source.train, **options))
        return trainings.run("all real images", config.full_repeats, config.full_epochs, all_images)

    return [_row(dataset, labels, pool, random, trainings, full, options) for labels in config.labels]


def needs_teacher(config: EvaluateConfig, random: bool = True) -> bool:
    """Whether an evaluation needs networks that label: batches as they come, or `random` images softly."""
    return "teacher" in config.labels or (random and "soft" in config.labels)


def forget_progress(folder: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Remove the progress of the `evaluate` that returned these rows; they are safe now."""
    teacher = next((row["teacher"] for row in rows if "teacher" in row), None)
    for row in rows:
        discard(_progress_path(folder, row["settings"], row["content_hash"], teacher))


def _progress_path(folder: Path, settings: str, content_hash: str, teacher: str | None) -> Path:
    """Other evaluations that were broken off in the same folder do not disturb this one."""
    hashes = [settings, content_hash[:12], *([teacher[:12]] if teacher else [])]
    return folder / f"{PROGRESS_PREFIX}-{'-'.join(hashes)}.safetensors"


def _row(
    dataset: DistilledDataset,
    labels: str,
    pool: FeaturePool | None,
    random: bool,
    trainings: "_Trainings",
    full: Callable[[], list[Finished]],
    options: dict[str, Any],
) -> dict[str, Any]:
    source, config, device = trainings.source, trainings.config, trainings.device
    stored = labels
    if labels == "teacher":
        assert pool, "see evaluate"
        stored, options = "soft", options | {"teacher": Ensemble(pool, device)}
    distilled = same_images(normalised_as(source, dataset).with_labels(stored).loader(**options))
    names = f"{labels} labels, distilled", f"{labels} labels, random"
    batches = [math.ceil(n / config.batch_size) for n in (len(dataset), dataset.ipc * source.num_classes)]
    epochs = epochs_of_as_many_steps(config.epochs, *batches)
    of_distilled = trainings.run(names[0], config.repeats, config.epochs, distilled, CHECKS)
    of_random = []
    if random:
        images = random_images(dataset, source, labels, pool, device, options)
        of_random = trainings.run(names[1], config.repeats, epochs, images)
    of_all = full()
    row = {
        "dataset": source.name,
        "ipc": dataset.ipc,
        "network": trainings.network.name,
        "protocol": "ncfm" if config.augmented else "ncfm without augmentation",
        "labels": labels,
        "epochs": config.epochs,
        "split": source.split,
        "test_images": len(source.test),
        "settings": settings_hash(config, trainings.network, trainings.seed),
        "n": config.repeats,
        **_mean_std("last", [each.scores[-1] for each in of_distilled]),
        **_mean_std("best", [max(each.scores) for each in of_distilled]),
        **_mean_std("random", [each.scores[-1] for each in of_random]),
        "random_n": len(of_random),
        **_mean_std("full", [each.scores[-1] for each in of_all]),
        "full_n": len(of_all),
        "seconds": round(sum(trainings.progress.seconds.get(name, 0.0) for name in names), 1),
        "seed": trainings.seed,
        "content_hash": dataset.content_hash,
    }
    row |= packing(dataset)
    if labels != "hard":
        row["temperature"] = dataset.info.labels.get("temperature")
        row |= {"teacher": pool.weights_hash[:16]} if pool else {}
    return row


@dataclass(frozen=True)
class _Trainings:
    """The trainings of one evaluation: those that are recorded already are not run again."""

    source: Source
    config: EvaluateConfig
    network: NetworkConfig
    seed: int
    device: str
    progress: Progress
    stop: StopRequest | None
    report: Report

    def run(self, name: str, repeats: int, epochs: int, loaders: Loaders, checks: int = 1) -> list[Finished]:
        """What every repeat comes to."""
        recorded, config = self.progress.finished, self.config
        missing = [repeat for repeat in range(repeats) if f"{name} {repeat}" not in recorded]
        self.progress.seconds.setdefault(name, 0.0)
        network = build(self.network, self.source, self.seed)
        size = config.at_once or trained_at_once(network, self.source, config.batch_size, self.device)
        for group in grouped(missing, size):
            done = sum(f"{name} {repeat}" in recorded for repeat in range(repeats)) * epochs
            seeds = [seed_at(self.seed, repeat) for repeat in group]
            self.progress.run(
                name,
                f"evaluate, {name}, {named(group)}",
                group,
                partial(self._start, loaders, seeds, epochs, checks),
                seed=seed_at(self.seed, "training", *group),
                stop=self.stop,
                after_epoch=counting(self.report, f"evaluate ({name})", done, repeats * epochs, len(group)),
            )
        return [recorded[f"{name} {repeat}"] for repeat in range(repeats)]

    def _start(self, loaders: Loaders, seeds: list[int], epochs: int, checks: int) -> Training:
        networks = [build(self.network, self.source, seed) for seed in seeds]
        return start_training(
            loaders(seeds), networks, self.source, self.config, epochs=epochs, checks=checks
        )


def train_and_test(
    loader: Loader,
    epochs: int,
    source: Source,
    config: EvaluateConfig,
    network: NetworkConfig,
    seed: int,
    checks: int = CHECKS,
    *,
    path: Path | None = None,
    identity: dict[str, Any] | None = None,
    stop: StopRequest | None = None,
) -> tuple[float, float]:
    """Train a new network for `epochs`; its test accuracy in percent at the end, and the best of `checks`.

    `seed` decides the initial weights, the seed of the loader everything else. Progress is kept at `path`
    until it ends, for a training of the same `identity` to go on from; raises `Stopped` when `stop` is
    requested.
    """

    def start() -> Training:
        networks = [build(network, source, seed)]
        return start_training([loader], networks, source, config, epochs=epochs, checks=checks)

    progress = Progress(path, identity or {}, resume=True)
    if not progress.finished:
        own = seed_at(seed, "training", 0)
        progress.run("training", "evaluate, training", [0], start, seed=own, stop=stop)
    progress.forget()
    [(scores, _)] = progress.finished.values()
    return scores[-1], max(scores)


def start_training(
    loaders: list[Loader],
    networks: Sequence[nn.Module],
    source: Source,
    config: EvaluateConfig,
    *,
    epochs: float,
    checks: int,
    late: float = 0.0,
) -> Training:
    """The training of networks of one architecture, each by a loader of its own, by the protocol.

    The test images of `source` are looked at `checks` times, evenly spaced, the last time at the end. Of the
    last steps, a share `late` of all, the losses are kept.
    """
    device = str(loaders[0].device)
    batches = Batches(loaders, classes=source.num_classes, cutmix=config.cutmix)
    steps = max(1, round(epochs * len(batches)))
    course = Course(
        steps,
        lambda weights: torch.optim.AdamW(weights, config.learning_rate, weight_decay=config.weight_decay),
        milestones=[steps * k // 5 for k in range(1, 5)],
        decay=0.5,
        tested={round(steps * (k + 1) / checks) for k in range(checks)},
        weighed=math.ceil(steps * late),
    )
    test = real_test_loader(source, len(networks), device)
    return Training(Networks(networks, device, config.precision), batches, course, test)


def same_images(loader: Loader) -> Loaders:
    """Every network sees these images, in its own order."""
    return lambda seeds: [reseeded(loader, seed) for seed in seeds]


def normalised_as(source: Source, dataset: DistilledDataset) -> DistilledDataset:
    """The set with its images as networks see those of `source`; one of another project may say otherwise."""
    info = dataclasses.replace(dataset.info, mean=source.mean, std=source.std)
    artifact = dataclasses.replace(dataset.artifact, metadata=info)
    return DistilledDataset(artifact, dataset.labels, dataset.folder)


def random_images(
    dataset: DistilledDataset,
    source: Source,
    labels: str,
    pool: FeaturePool | None,
    device: str,
    options: dict[str, Any],
    copies: int = 1,
) -> Loaders:
    """Every network sees a random subset of its own, as many real images as `dataset` has packed ones, each
    of them `copies` times in an epoch.
    """

    @cache
    def loader(seed: int) -> Loader:
        temperature = dataset.info.labels.get("temperature", 1.0)
        choice = {"ipc": dataset.ipc, "pool": pool, "temperature": temperature, "copies": copies}
        choice["labels"] = "hard" if labels == "teacher" else labels
        subset = random_subset(source, seed=seed, device=device, **choice)
        return (subset.with_labels("soft") if labels == "teacher" else subset).loader(**options)

    return lambda seeds: [reseeded(loader(seed), seed) for seed in seeds]


def random_subset(
    source: Source,
    *,
    ipc: int,
    seed: int,
    device: str,
    labels: str = "hard",
    pool: FeaturePool | None = None,
    temperature: float = 1.0,
    copies: int = 1,
) -> DistilledDataset:
    """`ipc` random real images per class, each `copies` times, as a `DistilledDataset`; of `labels` "soft"
    with those that `pool` gives. Raises `UsageError` where it is missing then.
    """
    index = ClassSampler(source.train).draw(ipc, generator_at(seed, "random subset"))
    images = source.train.images.index_select(0, index.T.flatten()).unflatten(0, index.T.shape)
    logits = None
    if labels == "soft":
        if pool is None:
            raise UsageError("soft labels for the random subset need the pool of networks that give them")
        logits = label(images, pool, source, factor=1, device=device)
    return DistilledDataset.from_tensors(
        torch.cat([images] * copies),
        source.classes,
        None if logits is None else torch.cat([logits] * copies),
        mean=source.mean,
        std=source.std,
        temperature=temperature,
        labels=labels,
    )


def epochs_of_as_many_steps(epochs: int, batches: int, other: int) -> int:
    """How often to pass over `other` batches for the optimiser steps of `epochs` passes over `batches`."""
    return max(1, round(epochs * batches / other))


def _identity(
    dataset: DistilledDataset,
    source: Source,
    config: EvaluateConfig,
    network: NetworkConfig,
    seed: int,
    device: str,
    pool: FeaturePool | None,
) -> dict[str, Any]:
    """Everything that decides a score; which repeats are made, and how many at once, does not."""
    return flatten({"evaluate": deciding(config), "network": dataclasses.asdict(network)}) | {
        "content_hash": dataset.content_hash,
        **packing(dataset),
        "ipc": dataset.ipc,
        "temperature": dataset.info.labels.get("temperature"),
        "fingerprint": source.fingerprint,
        "split": source.split,
        "teacher": pool and pool.weights_hash,
        "seed": seed,
        "draws": DRAWS,
        "torch": torch.__version__,
        "device": torch.device(device).type,
    }


def packing(dataset: DistilledDataset) -> dict[str, int]:
    """The factor of a packed set whose content hash does not tell it, as no view has labels of its own."""
    factor = dataset.info.factor
    return {"factor": factor} if factor > 1 and dataset.artifact.logits is None else {}


def settings_hash(config: EvaluateConfig, network: NetworkConfig, seed: int) -> str:
    """Tells rows of different settings apart; how many networks were trained is not one of them."""
    content = deciding(config) | {"network": dataclasses.asdict(network), "seed": seed}
    return sha256_of(content)[:12]


def deciding(config: EvaluateConfig) -> dict[str, Any]:
    """The settings that decide what a training comes to."""
    content = dataclasses.asdict(config)
    for name in ("repeats", "full_repeats", "labels", "at_once"):
        del content[name]
    return content


def _mean_std(name: str, values: list[float]) -> dict[str, Any]:
    return {
        f"{name}_accuracies": [round(value, 2) for value in values],
        f"{name}_mean": round(statistics.fmean(values), 2) if values else None,
        f"{name}_std": round(statistics.stdev(values), 2) if len(values) > 1 else None,
    }
