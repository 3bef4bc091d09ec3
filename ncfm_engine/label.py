"""Soft labels: what the trained pool says about every decoded view."""

import torch
from torch import Tensor

from distilled_data.decode import decode

from .config import LabelConfig, NetworkConfig
from .pretrain import FeaturePool, FlatNetwork, real_loader
from .sources import Source
from .train import accuracy, logits_of


@torch.no_grad()
def label(images: Tensor, pool: FeaturePool, source: Source, *, factor: int, device: str) -> Tensor:
    """Teacher logits float16 [ipc, C, factor**2, C] of packed uint8 images [ipc, C, channels, H, W].

    Raw logits averaged over the trained networks of the pool. Every view keeps what the teacher says of
    it, also where the teacher is wrong: a corrected one-hot would be used as logits downstream.
    """
    mean = torch.tensor(source.mean, device=device).view(-1, 1, 1)
    std = torch.tensor(source.std, device=device).view(-1, 1, 1)
    packed = images.flatten(0, 1)
    total = torch.zeros(len(packed), factor**2, source.num_classes, device=device)
    for network in _trained(pool, device):
        for start in range(0, len(packed), 256):
            part = packed[start : start + 256].to(device).float() / 255
            views = (decode(part, factor) - mean) / std
            total[start : start + 256] += network(views.flatten(0, 1)).unflatten(0, views.shape[:2])
    return (total / len(pool)).unflatten(0, images.shape[:2]).half().cpu()


def teacher(
    config: LabelConfig, network: NetworkConfig, pool: FeaturePool, source: Source, device: str
) -> dict:
    """The `labels` entry of an artifact's metadata, with the accuracy of the ensemble on the test images."""
    loader = real_loader(source, source.test, 512, device, shuffle=False)
    logits = torch.stack([logits_of(member, loader) for member in _trained(pool, device)]).mean(0)
    return {
        "kind": "logits",
        "temperature": config.temperature,
        "teacher": {
            "architecture": f"{network.name} width {network.width} depth {network.depth} norm {network.norm}",
            "networks": len(pool),
            "accuracy": round(accuracy(logits, source.test.targets), 2),
            "weights_sha256": pool.weights_hash,
        },
    }


def _trained(pool: FeaturePool, device: str):
    member = FlatNetwork(pool.template, device)
    return (pool.blend(index, 1.0, member) for index in range(len(pool)))
