"""What an index names, and how the samples it names become a batch."""

import operator
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .errors import UsageError


def as_int(name: str, value: Any, least: int | None = 0) -> int:
    """`value` as an int, numpy's and others too. Raises `UsageError`, also for one that is below `least`."""
    try:
        number = operator.index(value)
    except TypeError:
        number = None
    if number is None or isinstance(value, bool) or (least is not None and number < least):
        more = "" if least is None else f", {least} or more"
        raise UsageError(f"{name} must be a whole number{more}, got {value!r}")
    return number


def ordered(kind: str, classes: Any) -> list[Any]:
    """Classes, of an array or each of one too, as a list. Raises `UsageError` for one text, and for what has
    no order.
    """
    classes = _python(classes)
    if not isinstance(classes, Iterable) or isinstance(classes, str | set | frozenset):
        raise UsageError(f"classes must be several {kind}, in an order, got {classes!r}")
    return [_python(one) for one in classes]


def _python(value: Any) -> Any:
    """`value`, or those of an array, a tensor or a number of theirs."""
    return value.tolist() if hasattr(value, "tolist") else value


def rows_of(index: Any, length: int, *, masks: bool = True) -> list[int]:
    """Row numbers of a list, array or tensor of numbers, or of a mask, if `masks`. Raises `IndexError`."""
    expected = f"expected whole numbers or a mask of {length}" if masks else "expected whole numbers"
    try:
        rows = np.asarray([plain(part) for part in index] if isinstance(index, Sequence) else plain(index))
    except (TypeError, ValueError, RuntimeError) as error:
        raise IndexError(f"{expected}, got {index!r:.80}") from error
    if rows.ndim == 1 and len(rows) == 0:
        return []
    if rows.ndim != 1 or rows.dtype.kind not in ("biu" if masks else "iu"):
        raise IndexError(f"{expected}, got {index!r:.80}")
    mask = rows.dtype == bool
    if mask and len(rows) != length:
        raise IndexError(f"{expected}, got a mask of {len(rows)}")
    numbers = np.flatnonzero(rows).tolist() if mask else rows.tolist()
    for number in numbers:
        if not -length <= number < length:
            raise IndexError(f"index {number} is outside the {length} samples")
    return numbers


def plain(value: Any) -> Any:
    """Numbers of a tensor, of which numpy takes none from a GPU, or the value itself."""
    return value.tolist() if isinstance(value, Tensor) else value


def stacked(column: Sequence[Any]) -> Any:
    """One tensor of the values where they can be stacked, else the values."""
    if all(isinstance(value, Tensor) for value in column):
        return torch.stack(list(column)) if len({value.shape for value in column}) == 1 else list(column)
    return torch.tensor(column, device="cpu") if all(type(value) is int for value in column) else list(column)
