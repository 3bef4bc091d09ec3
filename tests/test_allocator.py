"""What is freed is kept for the next step, and given back before the next stage."""

import platform
import resource
import sys

import numpy as np
import pytest
from children import finish, start

from ncfm_engine.allocator import give_back, keep_freed
from ncfm_engine.costs import Costs

LIBRARY, VERSION = platform.libc_ver()
NEW = LIBRARY == "glibc" and tuple(map(int, VERSION.split("."))) >= (2, 35)
pytestmark = pytest.mark.skipif(not NEW, reason="only glibc keeps blocks, and such large ones since 2.35")
SIZE = 100 * 2**20


def faults_of_a_step() -> int:
    """Pages that the kernel has to fill for an array of 100 MiB, which is freed again."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    np.full(SIZE, 1, np.uint8)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before


def check_faults() -> None:
    before = faults_of_a_step()
    keep_freed()
    faults_of_a_step()
    kept = faults_of_a_step()
    give_back()
    again = faults_of_a_step()
    if 5 * kept >= min(before, again):
        sys.exit(f"{before} pages to fill, {kept} where they were kept, {again} after they were given back")


def check_peaks() -> None:
    keep_freed()
    costs = Costs(None, "cpu", resume=False)
    with costs.stage("large"):
        faults_of_a_step()
    with costs.stage("small"):
        pass
    small, large = (costs.stages[name]["peak_memory_mib"] for name in ("small", "large"))
    if small > large - 90:
        sys.exit(f"the small stage is said to take {small} MiB, the one that took 100 more {large}")


@pytest.mark.parametrize("check", [check_faults, check_peaks])
def test_freed_memory_is_kept_within_a_stage(check, tmp_path):
    process = start(check, output=tmp_path / "said")
    assert finish(process) == 0, (tmp_path / "said").read_text()
