"""What is freed is kept for the next step, and given back before the next stage."""

import platform
import resource
import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from children import finish, start

import ncfm_engine.search
from ncfm_engine.allocator import give_back, keep_freed
from ncfm_engine.costs import Costs, held
from ncfm_engine.search import Scores, open_studies, search, sqlite_url
from ncfm_engine.spaces import Space

LIBRARY, VERSION = platform.libc_ver()
NEW = LIBRARY == "glibc" and tuple(map(int, VERSION.split("."))) >= (2, 35)
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


def check_candidates(much: int) -> None:
    keep_freed()
    before = []
    ncfm_engine.search.MUCH = much  # in this process

    def score(architecture, check):
        before.append(held("VmRSS") // 2**20)
        faults_of_a_step()
        return Scores([1.0])

    space = Space({"a": (1, 2)}, torch.nn.Linear)
    with TemporaryDirectory() as folder:
        studies = open_studies(sqlite_url(Path(folder) / "search.db"), {"x": "exhaustive"})
        search(studies["x"], space, list(space), score)
    if (before[1] <= before[0] + 50) != (much == 0):
        sys.exit(f"{before[1]} MiB are held after a candidate that took 100, {before[0]} before it")


@pytest.mark.skipif(not NEW, reason="only glibc keeps blocks, and such large ones since 2.35")
@pytest.mark.parametrize(
    ("check", "arguments"),
    [(check_faults, ()), (check_peaks, ()), (check_candidates, (0,)), (check_candidates, (2**40,))],
)
def test_freed_memory_is_kept_within_a_stage_or_a_candidate(check, arguments, tmp_path):
    process = start(check, *arguments, output=tmp_path / "said")
    assert finish(process) == 0, (tmp_path / "said").read_text()


def test_an_older_glibc_keeps_blocks_as_large_as_it_can(monkeypatch):
    taken = {}

    def mallopt(option, value):
        return value <= (2**25 if option == -3 else 2**30) and not taken.update({option: value})

    monkeypatch.setattr("ctypes.CDLL", lambda _: SimpleNamespace(mallopt=mallopt))
    keep_freed()
    assert taken == {-3: 2**25, -1: 2**30}  # M_MMAP_THRESHOLD, M_TRIM_THRESHOLD


@pytest.mark.parametrize("error", [AttributeError, OSError, TypeError])
def test_another_c_library_is_left_alone(monkeypatch, error):
    def refuse(_):
        raise error

    monkeypatch.setattr("ctypes.CDLL", refuse)
    keep_freed()
    give_back()
