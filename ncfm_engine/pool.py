"""The pool of feature networks, as the game, labels and evaluation use it; `pretrain` makes it."""

import copy
import dataclasses
import hashlib
from dataclasses import dataclass

import torch
from torch import Tensor

from .config import NetworkConfig
from .networks import Network, build_network
from .sources import Source


@dataclass(frozen=True)
class FeaturePool:
    """Weights of M networks of one architecture on their way from initialisation to the end of training.

    `trajectory` is float32 [M, S + 2, P]: initial, S snapshots evenly spaced in epochs, trained.
    """

    template: Network
    trajectory: Tensor

    def __len__(self) -> int:
        return len(self.trajectory)

    @property
    def trained(self) -> Tensor:
        """float32 [M, P]."""
        return self.trajectory[:, -1]

    def blend(self, index: int, beta: Tensor | float, out: "FlatNetwork") -> Network:
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

    def __init__(self, network: Network, device: torch.device | str):
        self.network = copy.deepcopy(network).to(device).eval().requires_grad_(False)
        parameters = list(self.network.parameters())
        self.weights = torch.cat([p.detach().flatten() for p in parameters])
        for parameter, part in zip(
            parameters, self.weights.split([p.numel() for p in parameters]), strict=True
        ):
            parameter.data = part.view_as(parameter)


def build(config: NetworkConfig, source: Source, seed: int) -> Network:
    """A fresh network of `config` for the images and classes of `source`."""
    return build_network(
        **dataclasses.asdict(config),
        channels=source.channels,
        size=(source.height, source.width),
        classes=source.num_classes,
        seed=seed,
    )
