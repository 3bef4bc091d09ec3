"""Targets as a network learns from them, of what is stored: teacher logits or class numbers."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .errors import UsageError

Function = Callable[[Tensor], Tensor]


def as_temperature(value: Any) -> float:
    """Raises `UsageError` for what no logits can be divided by."""
    try:
        number = 0.0 if isinstance(value, str) else float(value)
    except (TypeError, ValueError):
        number = 0.0
    if not 1e-30 < number < 1e30:
        raise UsageError(f"temperature must be positive, 1e-30 to 1e30, got {value!r}")
    return number


def soften(logits: Tensor, temperature: float) -> Tensor:
    """Probabilities float32 of teacher `logits` [..., classes]: their softmax at this temperature."""
    return (logits.float() / temperature).softmax(-1)


def one_hot(numbers: Tensor, classes: int) -> Tensor:
    """Probabilities float32 [..., classes] of class `numbers` [...]."""
    zeros = torch.zeros(*numbers.shape, classes, dtype=torch.float32, device=numbers.device)
    return zeros.scatter_(-1, numbers[..., None], 1.0)


def as_float(logits: Tensor) -> Tensor:
    return logits.float()


def as_they_are(values: Any) -> Any:
    return values


def refuse_training(teacher: Function) -> None:
    if isinstance(teacher, nn.Module) and any(module.training for module in teacher.modules()):
        raise UsageError("the teacher is in training mode, where it would change; call teacher.eval()")


@torch.no_grad()
def relabelled(images: Tensor, teacher: Function, label: Function, classes: int) -> Tensor:
    """What `label` makes of the logits [B, classes] that `teacher` gives for `images` [B, ...].

    Raises `UsageError` for a teacher that is in training mode, or gives something else.
    """
    refuse_training(teacher)  # it may have come back to it with the rest of a larger module
    logits = teacher(images)
    if not isinstance(logits, Tensor) or logits.shape != (len(images), classes):
        got = list(logits.shape) if isinstance(logits, Tensor) else f"a {type(logits).__name__}"
        raise UsageError(f"a teacher must give logits [{len(images)}, {classes}] for this batch, got {got}")
    return label(logits.clone() if logits.is_inference() else logits)  # no backward pass takes those


def soft_cross_entropy(logits: Tensor, targets: Tensor, temperature: float | Tensor = 1.0) -> Tensor:
    """Mean cross-entropy, a scalar, of a network's `logits` [B, classes] and `targets`.

    `targets` is [B, classes]: probabilities, or [B]: class numbers. At `temperature` 1 it is
    `torch.nn.functional.cross_entropy`. At another one, which should be the one of the soft labels, the
    network is softened likewise, and the loss is multiplied by temperature², which keeps the gradients as
    large as they were (Hinton et al. 2015, arXiv 1503.02531, section 2).

    Raises `UsageError` for probabilities of other classes than the network has, and for a temperature that no
    logits can be divided by; one that is a tensor is not looked at, which would wait for the device.
    """
    if not isinstance(temperature, Tensor):
        as_temperature(temperature)
    if targets.is_floating_point() and targets.shape != logits.shape:
        raise UsageError(
            f"targets must be probabilities {list(logits.shape)}, as the logits are, or class numbers, got "
            f"{targets.dtype} {list(targets.shape)}"
        )
    return F.cross_entropy(logits / temperature, targets) * temperature**2
