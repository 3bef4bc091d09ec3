"""Addressed randomness: what is drawn depends on its address alone, never on what was drawn before.

A run resumed at step 500 therefore draws what an uninterrupted run draws there.
"""

import contextlib
import hashlib
import operator
from collections.abc import Iterator

import torch


def seed_at(*address: int | str) -> int:
    """A 63-bit seed for one purpose, e.g. `seed_at(seed, "pool", index)`."""
    plain = tuple(part if isinstance(part, str) else int(operator.index(part)) for part in address)
    digest = hashlib.sha256(repr(plain).encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1


def generator_at(*address: int | str, device: torch.device | str = "cpu") -> torch.Generator:
    """A generator for one purpose, e.g. `generator_at(seed, "real batch", step)`."""
    return torch.Generator(device).manual_seed(seed_at(*address))


@contextlib.contextmanager
def seeded(*address: int | str, device: torch.device | str = "cpu") -> Iterator[None]:
    """Within it torch's own generators, of the CPU and of `device`, start at the address.

    For code that takes no generator: others' augmentation. Afterwards they are as they were before.
    """
    device = torch.device(device)
    gpus = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(gpus):
        torch.default_generator.manual_seed(seed_at(*address))
        for gpu in gpus:
            with torch.cuda.device(gpu):
                torch.cuda.manual_seed(seed_at(*address))
        yield
