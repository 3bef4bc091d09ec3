"""What every stage of a run took, over all the pieces that it was done in."""

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch

from distilled_data.files import read_json, write_json

from .allocator import give_back
from .report import dispensable

COSTS_FILE = "costs.json"  # of the run folder


class Costs:
    """`stages` is {name: {"seconds", "peak_memory_mib", "peak_gpu_mib"}}, kept in `path` if there is one.

    Seconds are added up over the pieces, peaks are the largest of them; the last is None without a GPU.
    What a killed process had spent on its last stage is not counted.
    """

    def __init__(self, path: Path | None, device: str, resume: bool):
        self.path, where = path, torch.device(device)
        self._gpu = where if where.type == "cuda" else None
        self.stages: dict[str, dict[str, Any]] = {}
        if path and resume and path.exists():
            self.stages = read_json(path)

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Count what is done inside as a piece of this stage, however it ends."""
        give_back()
        forget_peak()
        if self._gpu:
            torch.cuda.reset_peak_memory_stats(self._gpu)
        start = time.monotonic()
        try:
            yield
        finally:
            gpu = torch.cuda.max_memory_allocated(self._gpu) // 2**20 if self._gpu else None
            self._add(name, time.monotonic() - start, held("VmHWM") // 2**20, gpu)

    def _add(self, name: str, seconds: float, memory: int, gpu: int | None) -> None:
        before = self.stages.get(name, {"seconds": 0.0, "peak_memory_mib": 0, "peak_gpu_mib": None})
        self.stages[name] = {
            "seconds": round(before["seconds"] + seconds, 1),
            "peak_memory_mib": max(before["peak_memory_mib"], memory),
            "peak_gpu_mib": max(before["peak_gpu_mib"] or 0, gpu or 0) or None,
        }
        if self.path and self.path.parent.is_dir():
            with dispensable():  # nor does it hide why a stage ended
                write_json(self.path, self.stages)


def forget_peak() -> None:
    """Let "VmHWM" be what is held now, where that can be done."""
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")  # proc(5): resets the peak resident set size


def held(name: str) -> int:
    """Bytes of main memory that Linux counts under this name for this process: "VmRSS" now, "VmHWM" at most.

    Other systems tell only the most it ever held, and Windows nothing, which is 0 here. On Linux that would
    include the process that started it.
    """
    with suppress(OSError):
        for line in Path("/proc/self/status").read_text(errors="replace").splitlines():
            if line.startswith(name + ":"):
                return int(line.split()[1]) * 1024
    try:
        import resource
    except ModuleNotFoundError:
        return 0
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
