"""Soft labels: what the trained pool says about every decoded view."""

import torch
from torch import Tensor, nn

from distilled_data.decode import decode
from distilled_data.tensors import per_channel

from .batches import images_per_pass, real_test_loader
from .config import LabelConfig, NetworkConfig
from .pool import FeaturePool, FlatNetwork
from .sources import Source
from .train import accuracy, logits_of


class Ensemble(nn.Module):
    """The trained networks of a pool as one, frozen: the mean of their logits [B, classes]."""

    def __init__(self, pool: FeaturePool, device: torch.device | str):
        super().__init__()
        members = (pool.blend(index, 1.0, FlatNetwork(pool.template, device)) for index in range(len(pool)))
        self.members = nn.ModuleList(members)
        self.eval()

    def forward(self, images: Tensor) -> Tensor:
        total: Tensor = sum(member(images) for member in self.members)  # type: ignore[assignment]
        return total / len(self.members)


def label(images: Tensor, pool: FeaturePool, source: Source, *, factor: int, device: str) -> Tensor:
    """Teacher logits float16 [ipc, C, factor**2, C] of packed uint8 images [ipc, C, channels, H, W].

    Raw logits averaged over the trained networks of the pool. Every view keeps what the teacher says of
    it, also where the teacher is wrong: a corrected one-hot would be used as logits downstream.
    """
    mean, std = per_channel(source.mean).to(device), per_channel(source.std).to(device)
    network, logits = Ensemble(pool, device), []
    for part in images.flatten(0, 1).split(images_per_pass(source, 256, factor**2)):
        views = (decode(part.to(device).float() / 255, factor) - mean) / std
        logits.append(network(views.flatten(0, 1)).unflatten(0, views.shape[:2]))
    return torch.cat(logits).unflatten(0, images.shape[:2]).half().cpu()


def teacher(
    config: LabelConfig, network: NetworkConfig, pool: FeaturePool, source: Source, device: str
) -> dict:
    """The `labels` entry of an artifact's metadata, with the accuracy of the ensemble on the test images.

    It says so where those are a part of train, see `Source.split`.
    """
    logits = logits_of(Ensemble(pool, device), real_test_loader(source, 1, device))
    size = f" width {network.width} depth {network.depth}" if network.name == "convnet" else ""
    norm = "" if network.name == "vit" else f" norm {network.norm}"
    return {
        "kind": "logits",
        "temperature": config.temperature,
        "teacher": {
            "architecture": f"{network.name}{size}{norm}",
            "networks": len(pool),
            "accuracy": round(accuracy(logits, source.test.targets), 2),
            **({} if source.split == "test" else {"split": source.split}),
            "weights_sha256": pool.weights_hash,
        },
    }
