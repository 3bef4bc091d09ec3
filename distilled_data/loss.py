"""The loss of training on soft labels."""

import torch.nn.functional as F
from torch import Tensor


def soft_cross_entropy(logits: Tensor, targets: Tensor, temperature: float = 1.0) -> Tensor:
    """Mean cross-entropy, a scalar, of a network's `logits` [B, classes] and `targets`.

    `targets` is [B, classes]: probabilities, or [B]: class numbers. At `temperature` 1 it is
    `torch.nn.functional.cross_entropy`. At another one, which should be the one of the soft labels, the
    network is softened likewise, and the loss is multiplied by temperature², which keeps the gradients as
    large as they were (Hinton et al. 2015, arXiv 1503.02531, section 2).
    """
    return F.cross_entropy(logits / temperature, targets) * temperature**2
