"""Addressed randomness: what is drawn depends on its address alone, never on what was drawn before.

A run resumed at step 500 therefore draws what an uninterrupted run draws there.
"""

import contextlib
import hashlib
import operator
import random
from collections.abc import Iterator

import numpy as np
import torch


def seed_at(*address: int | str) -> int:
    """A 63-bit seed for one purpose, e.g. `seed_at(seed, "pool", index)`."""
    plain = tuple(part if isinstance(part, str) else int(operator.index(part)) for part in address)
    digest = hashlib.sha256(repr(plain).encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1


def generator_at(*address: int | str, device: torch.device | str = "cpu") -> torch.Generator:
    """A generator for one purpose, e.g. `generator_at(seed, "real batch", step)`."""
    return torch.Generator(device).manual_seed(seed_at(*address))


def seeded(
    *address: int | str, device: torch.device | str = "cpu"
) -> contextlib.AbstractContextManager[None]:
    """`seeded_with` the seed at an address, for code that takes no generator: others' augmentation."""
    return seeded_with(seed_at(*address), device)


@contextlib.contextmanager
def seeded_with(seed: int, device: torch.device | str = "cpu") -> Iterator[None]:
    """Within it torch's own generators, of the CPU and of `device`, and those of Python and numpy start at
    `seed`. Afterwards they are as they were before.
    """
    device, before, theirs = torch.device(device), random.getstate(), np.random.get_state()
    gpus = [device] if device.type == "cuda" else []
    try:
        with torch.random.fork_rng(gpus):
            torch.default_generator.manual_seed(seed)  # torch.manual_seed would reach all GPUs
            for gpu in gpus:
                with torch.cuda.device(gpu):
                    torch.cuda.manual_seed(seed)
            random.seed(seed)
            np.random.seed(seed % 2**32)
            yield
    finally:
        random.setstate(before)
        np.random.set_state(theirs)
