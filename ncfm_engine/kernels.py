"""How libraries compute: switches of torch that hold for a block."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

TUNED_FROM = 1000  # steps


@contextmanager
def tuned_convolutions(steps: int) -> Iterator[None]:
    """On a GPU, let cuDNN measure its algorithms for a loop of the same shapes that has `steps` enough to
    make up for it.
    """
    before = torch.backends.cudnn.benchmark
    torch.backends.cudnn.benchmark = before or steps >= TUNED_FROM
    try:
        yield
    finally:
        torch.backends.cudnn.benchmark = before


@contextmanager
def rounded_products(rounded: bool) -> Iterator[None]:
    """Where `rounded`, let float32 matrix products round their factors, on a GPU to TensorFloat-32."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high" if rounded else before)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)
