"""The pool of feature networks: M networks, each at initialisation and after training on the real data."""

import copy
import dataclasses
import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor, nn

from distilled_data import DivergenceError, UsageError
from distilled_data.format import write_file
from distilled_data.loader import Loader
from distilled_data.randomness import seed_at

from .config import NetworkConfig, PretrainConfig
from .networks import build_network
from .report import Report, silent
from .sources import LabelledImages, Source
from .train import accuracy, logits_of, train


@dataclass(frozen=True)
class FeaturePool:
    """Flat weights of M networks of one architecture: `initial` and `trained`, float32 [M, parameters]."""

    template: nn.Module
    initial: Tensor
    trained: Tensor
    accuracies: tuple[float, ...]  # percent on the source's test images

    def __len__(self) -> int:
        return len(self.trained)

    def blend(self, index: int, beta: Tensor | float, out: "FlatNetwork") -> nn.Module:
        """Fill `out` with (1 - beta) * initial + beta * trained of one and the same network."""
        torch.lerp(self.initial[index], self.trained[index], beta, out=out.weights)
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
    """Batches of real images, normalised like everything else in a run."""
    size = (source.height, source.width)
    return Loader(
        part.images,
        part.targets,
        size=size,
        mean=source.mean,
        std=source.std,
        batch_size=batch_size,
        device=device,
        **options,
    )


def pretrain(
    config: PretrainConfig,
    network: NetworkConfig,
    source: Source,
    *,
    seed: int,
    device: str,
    cache: Path,
    report: Report = silent,
) -> FeaturePool:
    """Train the pool, or take from `cache` the networks that are already there.

    A network is cached under a key of everything that decides its weights; a file that is damaged or of
    another shape is trained again. Memory: 2 M networks of float32 on `device`.
    """
    template = build(network, source, seed)
    if any(True for _ in template.buffers()):
        raise UsageError(
            f"network.norm={network.norm!r} keeps running statistics, which cannot be blended between "
            "initialisation and training. Use instance, layer, group or none."
        )
    folder = cache / "pool" / pool_key(config, network, source, seed, device)
    rows = []
    for index in range(config.networks):
        path = folder / f"network-{index:03d}.safetensors"
        done, total = index * config.epochs, config.networks * config.epochs  # in epochs
        report("pretrain", done, total)
        row = _cached(path, template)
        if row is None:
            row = _train_one(
                config,
                network,
                source,
                seed_at(seed, "pool", index),
                device,
                lambda epoch, done=done, total=total: report("pretrain", done + epoch, total),
            )
            if not all(tensor.isfinite().all() for tensor in row.values()):
                raise DivergenceError(
                    f"feature network {index} has weights that are not finite after {config.epochs} epochs. "
                    "Try a smaller --set pretrain.learning_rate."
                )
            write_file(path, save(row))
        rows.append(row)
    return FeaturePool(
        template,
        torch.stack([row["initial"] for row in rows]).to(device),
        torch.stack([row["trained"] for row in rows]).to(device),
        tuple(row["accuracy"].item() for row in rows),
    )


def pool_key(
    config: PretrainConfig, network: NetworkConfig, source: Source, seed: int, device: str = "cpu"
) -> str:
    """A name for everything that decides the weights; the number of networks does not.

    torch and the kind of device do: they round differently.
    """
    content = dataclasses.asdict(config) | {"network": dataclasses.asdict(network), "seed": seed}
    del content["networks"]
    content |= {"fingerprint": source.fingerprint, "torch": torch.__version__}
    content["device"] = torch.device(device).type
    text = json.dumps(content, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:20]


def _cached(path: Path, template: nn.Module) -> dict[str, Tensor] | None:
    count = sum(p.numel() for p in template.parameters())
    try:
        row = load(path.read_bytes())
    except (FileNotFoundError, SafetensorError):
        return None
    shapes = {name: tuple(tensor.shape) for name, tensor in row.items()}
    whole = shapes == {"initial": (count,), "trained": (count,), "accuracy": ()}
    return row if whole and all(tensor.isfinite().all() for tensor in row.values()) else None


def _train_one(
    config: PretrainConfig,
    network: NetworkConfig,
    source: Source,
    seed: int,
    device: str,
    after_epoch: Callable[[int], None],
) -> dict[str, Tensor]:
    model = build(network, source, seed).to(device)
    initial = nn.utils.parameters_to_vector(model.parameters()).detach().cpu().clone()
    optimiser = torch.optim.SGD(
        model.parameters(), config.learning_rate, config.momentum, weight_decay=config.weight_decay
    )
    steps = [config.epochs * 2 // 3, config.epochs * 5 // 6]
    train(
        model,
        real_loader(source, source.train, config.batch_size, device, augment=config.augment, seed=seed),
        classes=source.num_classes,
        epochs=config.epochs,
        optimiser=optimiser,
        schedule=torch.optim.lr_scheduler.MultiStepLR(optimiser, steps, 0.2),
        cutmix_probability=config.cutmix,
        seed=seed,
        after_epoch=after_epoch,
    )
    test = real_loader(source, source.test, 512, device, shuffle=False)
    return {
        "initial": initial,
        "trained": nn.utils.parameters_to_vector(model.parameters()).detach().cpu(),
        "accuracy": torch.tensor(accuracy(logits_of(model, test), source.test.targets)),
    }
