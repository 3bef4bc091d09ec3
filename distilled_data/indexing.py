"""What an index names, and how the samples it names become a batch."""

from typing import Any

import numpy as np
import torch
from torch import Tensor


def rows_of(index: Any, length: int) -> list[int]:
    """Row numbers of a list, array or tensor of numbers, or of a mask. Raises `IndexError`."""
    rows = np.asarray(index)
    if len(rows) == 0:
        return []
    mask = rows.dtype == bool
    if rows.ndim != 1 or rows.dtype.kind not in "biu" or (mask and len(rows) != length):
        raise IndexError(f"expected whole numbers or a mask of {length}, got {index!r:.80}")
    numbers = np.flatnonzero(rows).tolist() if mask else rows.tolist()
    for number in numbers:
        if not -length <= number < length:
            raise IndexError(f"index {number} is outside the {length} samples")
    return numbers


def stacked(column: list[Any]) -> Any:
    """One tensor of the values where they can be stacked, else the values."""
    if all(isinstance(value, Tensor) for value in column):
        return torch.stack(column) if len({value.shape for value in column}) == 1 else column
    return torch.tensor(column) if all(type(value) is int for value in column) else column
