"""Training of the pool of feature networks on the real data, and the cache of what was trained."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from distilled_data import CheckpointError, DivergenceError, UsageError
from distilled_data.files import make_folder
from distilled_data.randomness import seed_at

from .batches import DRAWS, Batches, real_loader, reseeded
from .cache import sha256_of
from .checkpoint import Checkpoint, discard, load_checkpoint, save_checkpoint
from .config import NetworkConfig, PretrainConfig
from .pool import FeaturePool, build
from .report import Report, silent
from .sources import Source
from .stop import StopRequest, in_turn
from .train import Course, Networks, Training, counting, grouped, named, trained_at_once

FEW_EPOCHS = 6  # in fewer the rate falls in the middle of an epoch


def pretrain(
    config: PretrainConfig,
    network: NetworkConfig,
    source: Source,
    *,
    seed: int,
    device: str,
    cache: Path,
    stop: StopRequest | None = None,
    report: Report = silent,
) -> FeaturePool:
    """The whole pool: what lies in the folder `cache`, and the rest trained now. Raises as `train_pool` does.

    Memory: M x (snapshots + 2) networks of float32 on `device`.
    """
    trajectories = train_pool(
        config, network, source, seed=seed, device=device, cache=cache, stop=stop, report=report
    )
    return FeaturePool(build(network, source, seed), torch.stack(trajectories).to(device))


def train_pool(
    config: PretrainConfig,
    network: NetworkConfig,
    source: Source,
    *,
    seed: int,
    device: str,
    cache: Path,
    share: tuple[int, int] = (0, 1),
    stop: StopRequest | None = None,
    report: Report = silent,
) -> list[Tensor]:
    """Trajectories float32 [S + 2, P] of the networks rank, rank + ranks, ... of the pool, on the CPU.

    `share` is (rank, ranks).

    A network is cached under a key of everything that decides its weights; one that is missing, damaged or
    altered is trained again. A training that was interrupted goes on from the checkpoint that lies there too.
    Processes with the same share to train take turns, and the second finds it trained.
    Raises `Stopped` after saving one, `DivergenceError` for weights that are not finite, and `UsageError` for
    networks with running statistics.
    """
    template = build(network, source, seed)
    check_blendable(template, network)
    key = pool_key(config, network, source, seed, device)
    folder, mine = cache / "pool" / key, range(share[0], config.networks, share[1])
    found: dict[int, Tensor] = {}

    def missing() -> list[int]:
        for index in [index for index in mine if index not in found]:
            if cached := _load_if_valid(_path(folder, index), {"pool": key, "network": index}):
                found[index] = cached.tensors["trajectory"]
        return [index for index in mine if index not in found]

    if missing():
        lock = cache / "locks" / f"{key}-{share[0]}-{share[1]}"
        make_folder(lock.parent)
        size = config.at_once or trained_at_once(template, source, config.batch_size, device)
        with in_turn(lock, stop, "pretrain"):  # another run may have the same networks to train
            for group in grouped(missing(), size):
                done, total = len(found) * config.epochs, len(mine) * config.epochs
                found |= _trained(
                    _training(config, network, source, [seed_at(seed, "pool", i) for i in group], device),
                    folder,
                    group,
                    stop=stop,
                    after_epoch=counting(report, "pretrain", done, total, len(group)),
                )
    if all(_path(folder, index).exists() for index in range(config.networks)):
        for path in folder.glob("training-*"):  # of groups that were made up differently
            last = path.name.split(".")[0].split("-")[2]
            if int(last) < config.networks:  # the others are of a larger pool
                path.unlink(missing_ok=True)
    report("pretrain", len(mine) * config.epochs, len(mine) * config.epochs)
    return [found[index] for index in mine]


def count_cached(
    config: PretrainConfig, network: NetworkConfig, source: Source, *, seed: int, device: str, cache: Path
) -> int:
    """How many networks of the pool need not be trained, as far as the names of the files say."""
    folder = cache / "pool" / pool_key(config, network, source, seed, device)
    return sum(_path(folder, index).exists() for index in range(config.networks))


def check_blendable(template: nn.Module, network: NetworkConfig) -> None:
    """Raise `UsageError` for networks with buffers, which a trajectory of weights does not hold."""
    if list(template.buffers()):
        raise UsageError(
            f"network.norm={network.norm!r} keeps running statistics, which cannot be blended between "
            "initialisation and training. Use instance, layer, group or none."
        )


def pool_key(
    config: PretrainConfig, network: NetworkConfig, source: Source, seed: int, device: str = "cpu"
) -> str:
    """A name for everything that decides the weights; the number of networks, in all or at once, does not.

    The version of torch and the kind of device do: they round differently.
    """
    content = dataclasses.asdict(config) | {"network": dataclasses.asdict(network), "seed": seed}
    del content["networks"], content["at_once"]
    content |= {"fingerprint": source.fingerprint, "torch": torch.__version__, "draws": DRAWS}
    content["device"] = torch.device(device).type
    content |= pool_schedule(config)
    return sha256_of(content)[:20]


def _training(
    config: PretrainConfig, network: NetworkConfig, source: Source, seeds: list[int], device: str
) -> Training:
    networks = Networks([build(network, source, seed) for seed in seeds], device, config.precision)
    loader = real_loader(source, source.train, config.batch_size, device, augment=config.augment)
    batches = Batches(
        [reseeded(loader, seed) for seed in seeds], classes=source.num_classes, cutmix=config.cutmix
    )
    parts = config.snapshots + 1
    course = Course(
        config.epochs * len(batches),
        lambda weights: torch.optim.SGD(
            weights, config.learning_rate, config.momentum, weight_decay=config.weight_decay
        ),
        milestones=_milestones(config.epochs, len(batches)),
        decay=0.2,
        kept={config.epochs * k // parts * len(batches) for k in range(1, parts)},
    )
    return Training(networks, batches, course)


def pool_schedule(config: PretrainConfig) -> dict[str, str]:
    """What tells the schedule of few epochs from the one that they had before, for keys and identities."""
    return {"milestones": "in steps"} if config.epochs < FEW_EPOCHS else {}


def _milestones(epochs: int, steps: int) -> list[int]:
    """Two thirds and five sixths of all steps: at the ends of epochs, as published, unless they are few."""
    if epochs < FEW_EPOCHS:  # or most of the steps would have a twenty-fifth of the rate
        return [epochs * steps * 2 // 3, epochs * steps * 5 // 6]
    return [epochs * 2 // 3 * steps, epochs * 5 // 6 * steps]


def _trained(training: Training, folder: Path, group: list[int], **options: Any) -> dict[int, Tensor]:
    """Run the training of these networks, from its checkpoint if there is one, and cache each of them."""
    initial = training.networks.weights.detach().cpu().clone()
    path = folder / f"training-{group[0]:03d}-{group[-1]:03d}.safetensors"
    identity = {"pool": folder.name, "networks": group}
    if interrupted := _load_if_valid(path, identity):
        training.restore(interrupted.tensors, interrupted.progress)

    def save(tensors: Mapping[str, Tensor], progress: Mapping[str, Any]) -> None:
        save_checkpoint(path, tensors, identity=identity, progress=progress)

    training.run(f"pretrain, {named(group)}", save=save, **options)
    weights = [initial, *training.snapshots, training.networks.weights.detach().cpu()]
    trajectories = {}
    for index, trajectory in zip(group, torch.stack(weights, 1), strict=True):
        if trajectory.isfinite().all():
            trajectories[index] = trajectory
            discard(_path(folder, index))  # what is damaged
            save_checkpoint(
                _path(folder, index),
                {"trajectory": trajectory},
                identity={"pool": folder.name, "network": index},
                progress={},
            )
    discard(path)
    for index in group:
        if index not in trajectories:
            raise DivergenceError(
                f"feature network {index} has weights that are not finite after {training.course.steps} "
                "steps. Try a smaller --set pretrain.learning_rate."
            )
    return trajectories


def _path(folder: Path, index: int) -> Path:
    return folder / f"network-{index:03d}.safetensors"


def _load_if_valid(path: Path, identity: dict[str, Any]) -> Checkpoint | None:
    """What lies at `path`, unless it is damaged or of something else: a cache is then as good as empty."""
    try:
        return load_checkpoint(path, identity)
    except CheckpointError:
        return None
