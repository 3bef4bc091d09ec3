"""The pool of feature networks: M networks, each at initialisation and after training on the real data."""

import copy
import dataclasses
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from distilled_data import CheckpointError, DivergenceError, UsageError
from distilled_data.loader import Loader
from distilled_data.randomness import seed_at

from .batches import Batches, reseeded
from .checkpoint import Checkpoint, discard, load_checkpoint, save_checkpoint
from .config import NetworkConfig, PretrainConfig
from .memory import free_memory
from .networks import build_network
from .report import Report, silent
from .sources import LabelledImages, Source
from .stop import StopRequest
from .train import CHECKPOINT_SECONDS, Course, Networks, Training, counting, grouped, named, trained_at_once

FEW_EPOCHS = 6  # in fewer the rate falls in the middle of an epoch


@dataclass(frozen=True)
class FeaturePool:
    """Weights of M networks of one architecture on their way from initialisation to the end of training.

    `trajectory` is float32 [M, S + 2, P]: initial, S snapshots evenly spaced in epochs, trained.
    """

    template: nn.Module
    trajectory: Tensor

    def __len__(self) -> int:
        return len(self.trajectory)

    @property
    def initial(self) -> Tensor:
        return self.trajectory[:, 0]

    @property
    def trained(self) -> Tensor:
        return self.trajectory[:, -1]

    def blend(self, index: int, beta: Tensor | float, out: "FlatNetwork") -> nn.Module:
        """Fill `out` with the weights at `beta` (0 initial, 1 trained) of network `index`.

        The way is piecewise linear through the points of its trajectory, which are evenly spaced in `beta`.
        """
        path = self.trajectory[index]
        segments, first = len(path) - 1, 0
        if segments > 1:
            position = round(float(beta) * segments, 12)  # k / segments * segments is not always k
            first = min(int(position), segments - 1)
            beta = position - first
        torch.lerp(path[first], path[first + 1], beta, out=out.weights)
        return out.network

    @property
    def weights_hash(self) -> str:
        """sha256 over the trained weights."""
        return hashlib.sha256(self.trained.cpu().numpy().tobytes()).hexdigest()


class FlatNetwork:
    """A frozen copy of a network; its parameters are views of one flat vector, changed by one write."""

    def __init__(self, network: nn.Module, device: torch.device | str):
        self.network = copy.deepcopy(network).to(device).eval().requires_grad_(False)
        parameters = list(self.network.parameters())
        self.weights = torch.cat([p.detach().flatten() for p in parameters])
        for parameter, part in zip(
            parameters, self.weights.split([p.numel() for p in parameters]), strict=True
        ):
            parameter.data = part.view_as(parameter)


def build(config: NetworkConfig, source: Source, seed: int) -> nn.Module:
    """A fresh network of `config` for the images and classes of `source`."""
    return build_network(
        config.name,
        channels=source.channels,
        size=(source.height, source.width),
        classes=source.num_classes,
        width=config.width,
        depth=config.depth,
        norm=config.norm,
        activation=config.activation,
        pooling=config.pooling,
        seed=seed,
    )


def real_loader(source: Source, part: LabelledImages, batch_size: int, device: str, **options) -> Loader:
    """Batches of real images, normalised; on a GPU they stay where it has room for twice as many."""
    where = torch.device(device)
    fits = where.type != "cuda" or part.images.nbytes <= free_memory(where) // 2
    return Loader(
        part.images,  # type: ignore[arg-type] - `Images` are read like a tensor
        part.targets,
        mean=source.mean,
        std=source.std,
        batch_size=batch_size,
        device=device,
        resident=fits,
        **options,
    )


def real_test_loader(source: Source, networks: int, device: str) -> Loader:
    """The test images, in batches that fill a device once for all `networks`."""
    return real_loader(source, source.test, max(64, 512 // networks), device, shuffle=False)


def pretrain(
    config: PretrainConfig, network: NetworkConfig, source: Source, *, seed: int, device: str, **options: Any
) -> FeaturePool:
    """The whole pool: what lies in the cache, and the rest trained now. Options are those of `train_pool`.

    Memory: M x (snapshots + 2) networks of float32 on `device`.
    """
    trajectories = train_pool(config, network, source, seed=seed, device=device, **options)
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
    checkpoint_seconds: float = CHECKPOINT_SECONDS,
    report: Report = silent,
) -> list[Tensor]:
    """Trajectories float32 [S + 2, P] of the networks rank, rank + ranks, ... of the pool, on the CPU.

    `share` is (rank, ranks).

    A network is cached under a key of everything that decides its weights; one that is missing, damaged or
    altered is trained again. A training that was interrupted goes on from the checkpoint that lies there too.
    Raises `Stopped` after saving one, `DivergenceError` for weights that are not finite, and `UsageError` for
    networks with running statistics.
    """
    template = build(network, source, seed)
    check_blendable(template, network)
    key = pool_key(config, network, source, seed, device)
    folder, mine = cache / "pool" / key, range(share[0], config.networks, share[1])
    cached = {index: _cached(folder, index) for index in mine}
    found = {index: trajectory for index, trajectory in cached.items() if trajectory is not None}
    missing = [index for index in mine if index not in found]
    size = config.at_once or trained_at_once(template, source, config.batch_size, device)
    for group in grouped(missing, size):
        done, total = len(found) * config.epochs, len(mine) * config.epochs
        found |= _trained(
            _training(config, network, source, [seed_at(seed, "pool", i) for i in group], device),
            folder,
            group,
            checkpoint_seconds=checkpoint_seconds,
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


def check_blendable(template: nn.Module, network: NetworkConfig) -> None:
    if any(True for _ in template.buffers()):
        raise UsageError(
            f"network.norm={network.norm!r} keeps running statistics, which cannot be blended between "
            "initialisation and training. Use instance, layer, group or none."
        )


def pool_key(
    config: PretrainConfig, network: NetworkConfig, source: Source, seed: int, device: str = "cpu"
) -> str:
    """A name for everything that decides the weights; the number of networks, in all or at once, does not.

    torch and the kind of device do: they round differently.
    """
    content = dataclasses.asdict(config) | {"network": dataclasses.asdict(network), "seed": seed}
    del content["networks"], content["at_once"]
    content |= {"fingerprint": source.fingerprint, "torch": torch.__version__}
    content["device"] = torch.device(device).type
    content |= pool_schedule(config)
    text = json.dumps(content, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:20]


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


def _cached(folder: Path, index: int) -> Tensor | None:
    found = _load_if_valid(_path(folder, index), {"pool": folder.name, "network": index})
    return found and found.tensors["trajectory"]


def _load_if_valid(path: Path, identity: dict[str, Any]) -> Checkpoint | None:
    """What lies at `path`, unless it is damaged or of something else: a cache is then as good as empty."""
    try:
        return load_checkpoint(path, identity)
    except CheckpointError:
        return None
