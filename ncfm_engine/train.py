"""Training and testing one classifier; pretraining and evaluation differ only in optimiser and data."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from distilled_data.augment import cutmix
from distilled_data.loader import Loader
from distilled_data.randomness import generator_at


def train(
    network: nn.Module,
    loader: Loader,
    *,
    classes: int,
    epochs: int,
    optimiser: torch.optim.Optimizer,
    schedule: torch.optim.lr_scheduler.LRScheduler,
    cutmix_probability: float,
    seed: int,
    after_epoch: Callable[[int], None] = lambda epoch: None,
) -> None:
    """Train `network` in place with cross-entropy on class indices or probabilities.

    `schedule` steps once per epoch; `after_epoch` is called with the number of epochs done.
    """
    for epoch in range(epochs):
        network.train()
        for batch, (images, targets) in enumerate(loader):
            generator = generator_at(seed, "cutmix", epoch, batch)
            if torch.rand((), generator=generator) < cutmix_probability:
                if targets.ndim == 1:
                    targets = F.one_hot(targets, classes).float()
                images, targets = cutmix(images, targets, generator)
            optimiser.zero_grad(set_to_none=True)
            F.cross_entropy(network(images), targets).backward()
            optimiser.step()
        schedule.step()
        after_epoch(epoch + 1)


@torch.no_grad()
def logits_of(network: nn.Module, loader: Loader) -> Tensor:
    """Logits [N, classes] for an unshuffled loader."""
    network.eval()
    return torch.cat([network(images) for images, _ in loader])


def accuracy(logits: Tensor, targets: Tensor) -> float:
    """Top-1 accuracy in percent of logits [N, classes] against targets [N]."""
    return 100 * (logits.argmax(1) == targets.to(logits.device)).double().mean().item()
