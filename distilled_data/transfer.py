"""From main memory to a device."""

import torch
from torch import Tensor


def upload(tensor: Tensor, device: torch.device | str) -> Tensor:
    """A tensor on `device`; one from the CPU goes to a GPU of CUDA without waiting for what that does.

    Other devices are waited for: "mps" would read memory that may be another tensor's by then
    (pytorch/pytorch#189690).
    """
    pinned = tensor.device.type == "cpu" and torch.device(device).type == "cuda"
    return tensor.pin_memory().to(device, non_blocking=True) if pinned else tensor.to(device)
