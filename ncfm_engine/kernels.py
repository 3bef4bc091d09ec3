"""How libraries compute: switches of torch that hold for a block."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def tuned_convolutions() -> Iterator[None]:
    """On a GPU, let cuDNN measure its algorithms: for a loop whose shapes are the same at every step."""
    before = torch.backends.cudnn.benchmark
    torch.backends.cudnn.benchmark = True
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
