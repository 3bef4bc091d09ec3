"""A training as anybody would write it, for what the engine does to be compared with."""

from collections.abc import Iterator

import torch
import torch.nn.functional as F

from distilled_data.augment import cutmix
from distilled_data.randomness import generator_at


def plain_epochs(network, loader, seed: int, descent, schedule, epochs: int) -> Iterator[int]:
    """Trains on ten classes, one batch in two mixed by CutMix; the number of each epoch when it is done."""
    for epoch in range(epochs):
        for batch, (images, targets) in enumerate(loader):
            generator = generator_at(seed, "cutmix", epoch, batch)
            if torch.rand((), generator=generator) < 0.5:
                images, targets = cutmix(images, F.one_hot(targets, 10).float(), generator)
            descent.zero_grad()
            F.cross_entropy(network(images), targets).backward()
            descent.step()
        schedule.step()
        yield epoch
