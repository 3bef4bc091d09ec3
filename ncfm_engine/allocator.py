"""The allocator of glibc: what is freed is kept for the next step, and given back before the next stage, or
the next candidate of a search.

glibc by itself gives large blocks back as soon as they are freed, and the kernel has to fill them with zeros
for every step anew: on a CPU that can be half the time of an evaluation.
"""

import ctypes
from contextlib import suppress

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # of mallopt(3)
_ABSENT = (AttributeError, OSError, TypeError)  # another C library


def keep_freed() -> None:
    """From now on keep freed memory in this process: for commands that train, not for a library."""
    with suppress(*_ABSENT):
        libc = ctypes.CDLL(None)
        if not libc.mallopt(_MMAP_THRESHOLD, 2**30):
            libc.mallopt(_MMAP_THRESHOLD, 2**25)  # the most that versions before 2.35 take
        libc.mallopt(_TRIM_THRESHOLD, 2**30)


def give_back() -> None:
    """Give all that is kept back to the kernel."""
    with suppress(*_ABSENT):
        ctypes.CDLL(None).malloc_trim(0)
