"""Addressed randomness: what is drawn depends on its address alone, never on what was drawn before.

A run resumed at step 500 therefore draws what an uninterrupted run draws there.
"""

import hashlib

import torch


def seed_at(*address: int | str) -> int:
    """A 63-bit seed for one purpose, e.g. `seed_at(seed, "pool", index)`."""
    digest = hashlib.sha256(repr(address).encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1


def generator_at(*address: int | str, device: torch.device | str = "cpu") -> torch.Generator:
    """A generator for one purpose, e.g. `generator_at(seed, "real batch", step)`."""
    return torch.Generator(device).manual_seed(seed_at(*address))
