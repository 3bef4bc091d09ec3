"""Addressed randomness: what is drawn depends on its address alone, never on what was drawn before.

A run resumed at step 500 therefore draws what an uninterrupted run draws there.
"""

import contextlib
import hashlib
import math
import operator
import random
from collections.abc import Iterator, Mapping

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


def generator_states(device: torch.device) -> dict[str, torch.Tensor]:
    """The states of the generators that `seeded_with` sets, by name: of torch, of a `device` of CUDA, and,
    as float64, which holds their whole numbers exactly, of Python and numpy.
    """
    states = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        states["cuda"] = torch.cuda.get_rng_state(device)
    _, numbers, gauss = random.getstate()
    theirs = np.random.get_state(legacy=False)
    own = [*numbers, math.nan if gauss is None else gauss]
    numpy = [*theirs["state"]["key"], theirs["state"]["pos"], theirs["has_gauss"], theirs["gauss"]]
    return states | {
        name: torch.tensor(values, dtype=torch.float64, device="cpu")
        for name, values in (("python", own), ("numpy", numpy))
    }


def set_generators(states: Mapping[str, torch.Tensor], device: torch.device) -> None:
    """Let the generators go on from what `generator_states` returned for `device`; others are left alone."""
    for kind, state in states.items():
        if kind == "cpu":
            torch.set_rng_state(state)
        elif kind == "cuda":
            torch.cuda.set_rng_state(state, device)
        elif kind == "python":
            *numbers, gauss = state.tolist()
            random.setstate((3, tuple(map(int, numbers)), None if math.isnan(gauss) else gauss))
        else:
            *numbers, place, has_gauss, gauss = state.tolist()
            np.random.set_state(("MT19937", np.array(numbers, np.uint32), int(place), int(has_gauss), gauss))


@contextlib.contextmanager
def seeded_with(seed: int, device: torch.device | str = "cpu") -> Iterator[None]:
    """Within it torch's own generators, of the CPU and of `device`, and those of Python and numpy start at
    `seed`. Afterwards they are as they were before.
    """
    device, before, theirs = torch.device(device), random.getstate(), np.random.get_state()
    kind = device.type if device.type in ("cuda", "mps") else None  # that has a generator of its own
    try:
        # torch 2.11 takes no None for the kind of no devices
        with torch.random.fork_rng([device] if kind else [], device_type=kind or "cuda"):
            torch.default_generator.manual_seed(seed)  # torch.manual_seed would reach all GPUs
            if kind == "cuda":
                with torch.cuda.device(device):
                    torch.cuda.manual_seed(seed)
            elif kind == "mps":
                torch.mps.manual_seed(seed)
            random.seed(seed)
            np.random.seed(seed % 2**32)
            yield
    finally:
        random.setstate(before)
        np.random.set_state(theirs)
