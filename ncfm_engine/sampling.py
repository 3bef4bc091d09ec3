"""Draws of real images from every class at once."""

import torch
from torch import Tensor

from .sources import LabelledImages


def real_per_class(real_batch: int, counts: Tensor) -> int:
    """How many images each class gives to a step, a small one its own more than once; `counts` are all."""
    return min(real_batch, int(counts.max()))


class ClassSampler:
    """Draws indices into `part.images`, the same number from every class, without replacement."""

    def __init__(self, part: LabelledImages):
        self.counts, self.num_classes = part.counts, part.num_classes
        self._first = (self.counts.cumsum(0) - self.counts)[:, None]
        self._absent = torch.arange(int(self.counts.max())) >= self.counts[:, None]

    def draw(self, per_class: int, generator: torch.Generator) -> Tensor:
        """int64 [C, per_class]; a class with fewer images gives each of them before any one twice."""
        score = torch.rand(self._absent.shape, generator=generator).masked_fill_(self._absent, 2.0)
        order = score.topk(min(per_class, score.shape[1]), largest=False).indices
        return order.gather(1, torch.arange(per_class) % self.counts[:, None]) + self._first
