"""How well a network trained on the artifact does on real test images, beside random and all images."""

import dataclasses
import hashlib
import json
import statistics
import time
from typing import Any

import torch

from distilled_data import DistilledDataset, UsageError
from distilled_data.loader import Loader
from distilled_data.randomness import generator_at, seed_at

from .config import EvaluateConfig, NetworkConfig
from .label import label
from .pretrain import FeaturePool, build, real_loader
from .report import Report, silent
from .sampling import ClassSampler
from .sources import Source
from .train import accuracy, logits_of, train

CHECKS = 10  # evenly spaced tests during a training, for the best-over-epochs column


def evaluate(
    dataset: DistilledDataset,
    source: Source,
    config: EvaluateConfig,
    network: NetworkConfig,
    *,
    seed: int,
    device: str,
    pool: FeaturePool | None = None,
    report: Report = silent,
) -> list[dict[str, Any]]:
    """Rows of `results.json` (accuracies in percent), one for each label kind of `config.labels`.

    Distilled and random images share labels, optimiser steps and augmentation; every repeat has a network
    and a random subset of its own. `pool` labels the random subset and is needed for soft labels only.
    """
    full = []
    for repeat in range(config.full_repeats):
        report("evaluate (all real images)", repeat, config.full_repeats)
        here = seed_at(seed, repeat)
        loader = real_loader(
            source, source.train, config.batch_size, device, augment=config.augment, seed=here
        )
        full.append(train_and_test(loader, config.full_epochs, source, config, network, here, checks=1)[0])
        report("evaluate (all real images)", repeat + 1, config.full_repeats)
    return [
        _row(dataset, source, config, network, labels, seed, device, pool, full, report)
        for labels in config.labels
    ]


def train_and_test(
    loader: Loader,
    epochs: int,
    source: Source,
    config: EvaluateConfig,
    network: NetworkConfig,
    seed: int,
    checks: int = CHECKS,
) -> tuple[float, float]:
    """Train a new network for `epochs`; its test accuracy in percent at the end, and the best of `checks`."""
    device = str(loader.device)
    model = build(network, source, seed).to(device)
    optimiser = torch.optim.AdamW(model.parameters(), config.learning_rate, weight_decay=config.weight_decay)
    test = real_loader(source, source.test, 512, device, shuffle=False)
    tested = {round(epochs * (k + 1) / checks) for k in range(checks)}
    found = []

    def after_epoch(done: int) -> None:
        if done in tested:
            found.append(accuracy(logits_of(model, test), source.test.targets))

    train(
        model,
        loader,
        classes=source.num_classes,
        epochs=epochs,
        optimiser=optimiser,
        schedule=torch.optim.lr_scheduler.MultiStepLR(optimiser, [epochs * k // 5 for k in range(1, 5)], 0.5),
        cutmix_probability=config.cutmix,
        seed=seed,
        after_epoch=after_epoch,
    )
    return found[-1], max(found)


def random_subset(
    source: Source,
    *,
    ipc: int,
    seed: int,
    device: str,
    labels: str = "hard",
    pool: FeaturePool | None = None,
    temperature: float = 1.0,
) -> DistilledDataset:
    """`ipc` random real images per class as a `DistilledDataset`, with the same teacher's labels if soft."""
    index = ClassSampler(source.train).draw(ipc, generator_at(seed, "random subset"))
    images = source.train.images[index.T]
    logits = None
    if labels == "soft":
        if pool is None:
            raise UsageError("soft labels for the random subset need the pool that labelled the artifact")
        logits = label(images, pool, source, factor=1, device=device)
    return DistilledDataset.from_tensors(
        images,
        source.classes,
        logits,
        mean=source.mean,
        std=source.std,
        temperature=temperature,
        labels=labels,
    )


def epochs_of_as_many_steps(epochs: int, loader: Loader, other: Loader) -> int:
    """How often to pass over `other` to take the optimiser steps of `epochs` passes over `loader`."""
    return max(1, round(epochs * len(loader) / len(other)))


def _row(
    dataset: DistilledDataset,
    source: Source,
    config: EvaluateConfig,
    network: NetworkConfig,
    labels: str,
    seed: int,
    device: str,
    pool: FeaturePool | None,
    full: list[float],
    report: Report,
) -> dict[str, Any]:
    start, last, best, random = time.monotonic(), [], [], []
    options = {"batch_size": config.batch_size, "device": device, "augment": config.augment}
    for repeat in range(config.repeats):
        report(f"evaluate ({labels} labels)", repeat, config.repeats)
        here = seed_at(seed, repeat)
        loader = dataset.with_labels(labels).loader(**options, seed=here)
        scores = train_and_test(loader, config.epochs, source, config, network, here)
        last.append(scores[0])
        best.append(scores[1])
        subset = random_subset(
            source,
            ipc=dataset.ipc,
            seed=here,
            device=device,
            labels=labels,
            pool=pool,
            temperature=dataset.info.labels.get("temperature", 1.0),
        ).loader(**options, seed=here)
        epochs = epochs_of_as_many_steps(config.epochs, loader, subset)
        random.append(train_and_test(subset, epochs, source, config, network, here, checks=1)[0])
        report(f"evaluate ({labels} labels)", repeat + 1, config.repeats)
    return {
        "dataset": source.title,
        "ipc": dataset.ipc,
        "network": network.name,
        "protocol": "ncfm",
        "labels": labels,
        "epochs": config.epochs,
        "split": source.split,
        "settings": _short_hash(config, network, seed),
        "n": config.repeats,
        **_mean_std("last", last),
        **_mean_std("best", best),
        **_mean_std("random", random),
        **_mean_std("full", full),
        "full_n": len(full),
        "seconds": round(time.monotonic() - start, 1),
        "seed": seed,
        "content_hash": dataset.content_hash,
    }


def _short_hash(config: EvaluateConfig, network: NetworkConfig, seed: int) -> str:
    """Tells rows of different settings apart; how many networks were trained is not one of them."""
    content = dataclasses.asdict(config) | {"network": dataclasses.asdict(network), "seed": seed}
    for name in ("repeats", "full_repeats", "labels"):
        del content[name]
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:12]


def _mean_std(name: str, values: list[float]) -> dict[str, float | None]:
    return {
        f"{name}_mean": round(statistics.fmean(values), 2) if values else None,
        f"{name}_std": round(statistics.stdev(values), 2) if len(values) > 1 else None,
    }
