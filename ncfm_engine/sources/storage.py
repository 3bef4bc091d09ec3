"""Room for images: main memory, or a mapped file where they would take too much of it."""

import math
import os
import tempfile
from pathlib import Path

import numpy as np

from distilled_data.errors import SourceError
from ncfm_engine.cache import cache_folder

SHARE = 0.25  # of the memory that is available; a source is copied once, when it is sorted
BLOCK = 4096  # images that are handled at once


def empty(*shape: int) -> np.ndarray:
    """uint8 array of `shape`, in memory or in a file that vanishes with the process, even a killed one."""
    size = math.prod(shape)
    processes = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))  # torchrun: each loads its own
    if size <= SHARE * available_memory() / processes:
        return np.empty(shape, np.uint8)
    folder = cache_folder() / "mapped"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as file:  # without a name; the map keeps its content
            os.posix_fallocate(file.fileno(), 0, size)  # a full disk is found now, not by a signal later
            return np.memmap(file, np.uint8, "r+", shape=shape)
    except OSError as error:
        raise SourceError(
            f"{size / 2**30:.1f} GiB of images do not fit into memory, and a file for them in {folder} could "
            f"not be made: {error.strerror}. Free some space, or point XDG_CACHE_HOME at a larger disk."
        ) from error


def gather(images: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """`images[rows]`, in room of its own."""
    found = empty(len(rows), *images.shape[1:])
    for first in range(0, len(rows), BLOCK):
        found[first : first + BLOCK] = images[rows[first : first + BLOCK]]
    return found


def available_memory() -> int:
    """Bytes that can be taken without swapping."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))
    except (OSError, StopIteration):
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2
