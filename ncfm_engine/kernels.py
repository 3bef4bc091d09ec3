"""How libraries compute: switches of torch that hold for a block."""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

TUNED_FROM = 1000  # steps
BFLOAT16 = ("avx512_bf16", "amx_bf16", "bf16", "sve_bf16")  # instructions of CPUs, any of which will do
MATRICES = [getattr(place, name) for place in (torch, Tensor) for name in ("matmul", "mm", "bmm")]
SINGLE = (torch.float32, torch.bfloat16)  # what autocast lowers, and has lowered
PRODUCTS = (torch.conv1d, torch.conv2d, torch.conv3d, F.linear, *MATRICES)


@contextmanager
def half_precision(device: str, half: bool) -> Iterator[None]:
    """Where `half`, autocast to bfloat16, by `WideProducts` on a CPU that has no instructions for it."""
    capabilities = torch.cpu.get_capabilities()
    slow = half and device == "cpu" and not any(capabilities.get(name) for name in BFLOAT16)
    with torch.autocast(device, torch.bfloat16, enabled=half), WideProducts() if slow else nullcontext():
        yield


class WideProducts(TorchFunctionMode):
    """What autocast would have multiplied in bfloat16 is rounded to it, but multiplied in float32.

    A CPU without instructions for bfloat16 takes two to ten times as long to multiply in it. The results are
    the same but for the order of the sums: a product of two factors of 8 bits has 16, and float32 holds 24.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func not in PRODUCTS or not torch.is_autocast_enabled("cpu") or "out" in kwargs:
            return func(*args, **kwargs)
        values = [*args, *kwargs.values()]
        if not all(value.dtype in SINGLE for value in values if isinstance(value, Tensor)):
            return func(*args, **kwargs)
        with torch.autocast("cpu", enabled=False):
            named = {name: _rounded(value) for name, value in kwargs.items()}
            return func(*map(_rounded, args), **named).bfloat16()


def _rounded(value: Any) -> Any:
    return value.bfloat16().float() if isinstance(value, Tensor) else value


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
