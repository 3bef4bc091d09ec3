"""Where the time of a step goes, and how near it comes to the arithmetic limit of the device."""

import dataclasses
import time

import torch
from torch._C._autograd import DeviceType
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

from .engine import Engine, whole_periods
from .setup import Setup

# The first row with a word that is part of an operation's name; the order keeps names apart that share words.
KINDS = {
    "elementwise (fused)": "triton_ cpp_fused",
    "convolution": "conv",
    "pooling and resampling": "pool upsample grid_sampl",
    "matrix multiplication": "mm matmul linear",
    "normalisation": "group_norm groupnorm batch_norm batchnorm layer_norm layernorm",
    "random and copy": "rand normal_ uniform_ copy clone cat stack index gather topk sort fill zero empty",
    "elementwise and reductions": "add sub mul div pow square sqrt exp log sin cos tanh relu threshold clamp "
    "where mean sum norm neg wave",
}
OPTIMISER, OTHER, OUTSIDE = "optimiser", "other", "outside of operations (Python, launches, waiting)"
MATRIX = {"cpu": 512, "cuda": 8192}  # side of the square matrices that measure the rate
RATE_SECONDS = 0.5


class Profiled(Engine):
    """The engine, with questions about one step of it."""

    def shares(self, iterations: int, seconds: float) -> dict[str, float]:
        """Share of the wall time by kind of operation, largest first; on a GPU by the GPU's work.

        Profiling slows the host down, so a GPU's work is compared with `seconds` per step without profiler.
        """
        gpu = self.setup.device.startswith("cuda")
        activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * gpu
        with profile(activities=activities) as profiler:
            wall = self.run(iterations)
        wall = 1e6 * (seconds * iterations if gpu else wall)  # microseconds, as the profiler counts
        found = dict.fromkeys([*KINDS, OPTIMISER, OTHER], 0.0)
        launched = executed = 0.0
        for event in profiler.events() or ():
            if event.device_type == DeviceType.CPU:
                spent = event.self_device_time_total if gpu else event.self_cpu_time_total
                found[kind_of(event)] += spent
                launched += spent
            elif not event.is_user_annotation:
                executed += event.self_device_time_total
        found[OTHER] += max(0.0, executed - launched)  # kernels of a graph belong to no operation
        found[OUTSIDE] = max(0.0, wall - max(launched, executed))
        total = sum(found.values())
        rows = sorted(found.items(), key=lambda row: -row[1])
        return {name: spent / total for name, spent in rows if spent}

    def operations(self) -> float:
        """Floating-point operations of convolutions and matrix products in one step, two per multiply-add."""
        steps = whole_periods(self.setup.recipe.distill, 1)
        with FlopCounterMode(display=False) as counter:
            self.run(steps)
        return counter.get_total_flops() / steps

    def rates(self) -> dict[str, float]:
        """Operations per second of square matrix products on this device, best of several, by precision."""
        gpu = self.setup.device.startswith("cuda")
        single = "float32 (TF32)" if gpu and self.setup.tf32 else "float32"
        return {
            name: self._rate(dtype, MATRIX["cuda" if gpu else "cpu"])
            for name, dtype in ((single, torch.float32), ("bfloat16", torch.bfloat16))
        }

    def _rate(self, dtype: torch.dtype, side: int) -> float:
        a, b = (torch.randn(side, side, device=self.setup.device).to(dtype) for _ in range(2))
        best, end = float("inf"), time.perf_counter() + RATE_SECONDS
        while best == float("inf") or time.perf_counter() < end:
            self._wait()
            start = time.perf_counter()
            torch.mm(a, b)
            self._wait()
            best = min(best, time.perf_counter() - start)
        return 2 * side**3 / best


def kind_of(event) -> str:
    """The kind of a profiler event; what runs inside of an optimiser's step is the optimiser's."""
    ancestor = event
    while ancestor is not None:
        if ancestor.name.startswith("Optimizer."):
            return OPTIMISER
        ancestor = ancestor.cpu_parent
    name = event.name.lower()
    return next((kind for kind, words in KINDS.items() if any(w in name for w in words.split())), OTHER)


def profile_step(setup: Setup, iterations: int) -> dict:
    """Shares of time, operations per step, measured rates, and the fraction of each limit that is reached."""
    # A compiled or captured step hides its operations from the counter.
    counted = Profiled(dataclasses.replace(setup, options={})).operations()
    engine = Profiled(setup)
    engine.run(whole_periods(setup.recipe.distill, 2))
    iterations = whole_periods(setup.recipe.distill, iterations)
    seconds = engine.run(iterations) / iterations
    rates = engine.rates()
    return {
        "seconds": seconds,
        "shares": engine.shares(iterations, seconds),
        "operations": counted,
        "rates": rates,
        "limit_seconds": {name: counted / rate for name, rate in rates.items()},
        "fraction": {name: counted / rate / seconds for name, rate in rates.items()},
    }
