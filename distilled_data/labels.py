"""Targets as a network learns from them, of what is stored: teacher logits or class numbers."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

Function = Callable[[Tensor], Tensor]


def soften(logits: Tensor, temperature: float) -> Tensor:
    """Probabilities float32 of teacher `logits` [..., classes]: their softmax at this temperature."""
    return (logits.float() / temperature).softmax(-1)


def one_hot(numbers: Tensor, classes: int) -> Tensor:
    """Probabilities float32 [..., classes] of class `numbers` [...]."""
    zeros = torch.zeros(*numbers.shape, classes, device=numbers.device)
    return zeros.scatter_(-1, numbers[..., None], 1.0)


def as_float(logits: Tensor) -> Tensor:
    return logits.float()


def as_they_are(targets: Tensor) -> Tensor:
    return targets


@torch.no_grad()
def relabelled(images: Tensor, teacher: Function, label: Function) -> Tensor:
    """What `label` makes of the logits that `teacher` gives for `images`."""
    return label(teacher(images))


def soft_cross_entropy(logits: Tensor, targets: Tensor, temperature: float = 1.0) -> Tensor:
    """Mean cross-entropy, a scalar, of a network's `logits` [B, classes] and `targets`.

    `targets` is [B, classes]: probabilities, or [B]: class numbers. At `temperature` 1 it is
    `torch.nn.functional.cross_entropy`. At another one, which should be the one of the soft labels, the
    network is softened likewise, and the loss is multiplied by temperature², which keeps the gradients as
    large as they were (Hinton et al. 2015, arXiv 1503.02531, section 2).
    """
    return F.cross_entropy(logits / temperature, targets) * temperature**2
