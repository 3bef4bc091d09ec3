"""The frozen networks that look at real and synthetic images, in the precision and layout of their device."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from .kernels import half_precision
from .pool import FeaturePool, FlatNetwork


class FrozenNetwork:
    """One network of a pool at a time, somewhere between initialisation and training.

    With `compile`, its passes are fused by torch.compile: some seconds once, then much faster.
    """

    def __init__(self, pool: FeaturePool, device: str, *, precision: str = "float32", compile: bool = False):
        self._pool, self._device = pool, torch.device(device)
        self._flat = FlatNetwork(pool.template, device)
        self._half = precision == "bfloat16"
        network = self._flat.network
        self._features: Callable[[Tensor], Tensor] = network.features
        self._logits: Callable[[Tensor], Tensor] = network
        if compile:
            self._features = torch.compile(self._features, dynamic=False)
            self._logits = torch.compile(self._logits, dynamic=False)

    def load(self, index: int, beta: float) -> None:
        """Become (1 - beta) * initial + beta * trained of the network `index`."""
        self._pool.blend(index, beta, self._flat)

    def features(self, images: Tensor) -> Tensor:
        """Last maps of normalised images [N, channels, H, W], flattened, L2-normalised: float32 [N, D]."""
        with half_precision(self._device.type, self._half):
            maps = self._features(images.contiguous(memory_format=torch.channels_last))
        return F.normalize(maps.flatten(1).float())

    def logits(self, images: Tensor) -> Tensor:
        """float32 [N, classes]."""
        with half_precision(self._device.type, self._half):
            return self._logits(images.contiguous(memory_format=torch.channels_last)).float()
