"""How libraries compute: products in bfloat16 on CPUs without instructions for it, tuned convolutions."""

import contextlib

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from ncfm_engine.kernels import TUNED_FROM, WideProducts, half_precision, tuned_convolutions
from ncfm_engine.stop import Stopped

SHAPES = {  # of the factors
    "conv1d": [(4, 6, 9), (8, 3, 3)],
    "conv2d": [(4, 6, 9, 9), (8, 6, 3, 3)],
    "conv3d": [(2, 3, 5, 5, 5), (4, 3, 3, 3, 3)],
    "linear": [(4, 64), (8, 64)],
    "matmul": [(2, 4, 64), (64, 8)],
    "mm": [(4, 64), (64, 8)],
    "bmm": [(3, 4, 64), (3, 64, 8)],
}
CALLS = {
    "conv1d": lambda x, w: torch.conv1d(x, w, groups=2, stride=2),
    "conv2d": lambda x, w: F.conv2d(x, w, padding=1),
    "conv3d": torch.conv3d,
    "linear": lambda x, w: F.linear(input=x, weight=w),
    "matmul": lambda x, w: x @ w,
    "mm": torch.mm,
    "bmm": lambda x, w: x.bmm(w),
}


def computed(call, shapes, *, wide, enabled=True):
    """The result and the gradients of the factors."""
    generator = torch.Generator().manual_seed(0)
    factors = [torch.randn(shape, generator=generator).requires_grad_() for shape in shapes]
    with (
        torch.autocast("cpu", torch.bfloat16, enabled=enabled),
        WideProducts() if wide else contextlib.nullcontext(),
    ):
        result = call(*factors)
    incoming = torch.randn(result.shape, generator=generator).to(result.dtype)
    return [result, *torch.autograd.grad(result, factors, incoming)]


@pytest.mark.parametrize("name", SHAPES)
def test_wide_products_are_those_of_autocast_with_their_gradients(name):
    call, shapes = CALLS[name], SHAPES[name]
    wide, expected = (computed(call, shapes, wide=wide) for wide in (True, False))
    single = computed(call, shapes, wide=False, enabled=False)
    assert [each.dtype for each in wide] == [torch.bfloat16, torch.float32, torch.float32]
    for ours, theirs, exact in zip(wide, expected, single, strict=True):
        ours, theirs = ours.float(), theirs.float()
        # Where sums in another order round to the neighbour, which only some of them do.
        torch.testing.assert_close(ours, theirs, rtol=2**-7, atol=1e-5)
        assert (ours - theirs).norm() < 0.5 * (theirs - exact).norm()


def test_wide_products_multiply_in_float32(monkeypatch):
    seen = []

    def convolve(*factors):
        seen.extend((factor.dtype, torch.is_autocast_enabled("cpu")) for factor in factors)
        return factors[0]

    monkeypatch.setattr("ncfm_engine.kernels.PRODUCTS", (convolve,))
    with torch.autocast("cpu", torch.bfloat16), WideProducts() as mode:
        mode.__torch_function__(convolve, (), (torch.ones(2), torch.ones(2).bfloat16()))
    assert seen == [(torch.float32, False)] * 2


def test_what_autocast_leaves_alone_stays_as_it_is():
    single, double, whole = torch.rand(3, 3), torch.rand(3, 3).double(), torch.ones(3, 3, dtype=torch.long)
    into = torch.zeros(3, 3)
    with torch.autocast("cpu", torch.bfloat16), WideProducts():
        assert (double @ double).dtype == torch.float64
        assert (whole @ whole).dtype == torch.int64
        torch.matmul(single, single, out=into)
        with torch.autocast("cpu", enabled=False):
            assert torch.equal(single @ single, into)
    assert torch.equal(into, single @ single)


@pytest.mark.parametrize(
    ("capabilities", "half", "slow"),
    [
        ({"avx2": True, "avx512_bf16": False}, True, True),
        ({"avx2": True, "avx512_bf16": False}, False, False),
        ({"avx512_bf16": True}, True, False),
        ({"amx_bf16": True}, True, False),
        ({"bf16": True}, True, False),
        ({"neon": True}, True, True),
    ],
)
def test_a_cpu_without_instructions_for_bfloat16_multiplies_in_float32(monkeypatch, capabilities, half, slow):
    used = []

    class Seen(WideProducts):
        def __enter__(self):
            used.append(True)
            return super().__enter__()

    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities)
    monkeypatch.setattr("ncfm_engine.kernels.WideProducts", Seen)
    network = nn.Conv2d(3, 4, 3)
    with half_precision("cpu", half):
        assert network(torch.rand(2, 3, 8, 8)).dtype == (torch.bfloat16 if half else torch.float32)
    assert bool(used) == slow
    assert not torch.is_autocast_enabled("cpu")


@pytest.mark.parametrize(
    ("before", "steps", "tuned"),
    [(False, TUNED_FROM - 1, False), (False, TUNED_FROM, True), (True, 1, True)],
)
def test_convolutions_are_tuned_where_the_steps_are_enough(monkeypatch, before, steps, tuned):
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", before)
    with contextlib.suppress(Stopped), tuned_convolutions(steps):
        assert torch.backends.cudnn.benchmark is tuned
        raise Stopped
    assert torch.backends.cudnn.benchmark is before
