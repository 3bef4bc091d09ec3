"""Room for images: main memory, or a mapped file, and nobody notices which."""

import resource
import signal

import numpy as np
import pytest
import torch

from distilled_data import SourceError
from ncfm_engine.distill import distill
from ncfm_engine.sources import load_source, storage
from ncfm_engine.sources.source import LabelledImages


@pytest.fixture
def no_memory(monkeypatch):
    monkeypatch.setattr(storage, "available_memory", lambda: 0)


def test_small_arrays_lie_in_memory_and_large_ones_in_a_mapped_file(monkeypatch, tmp_path):
    assert not isinstance(storage.empty(10, 4), np.memmap)
    monkeypatch.setattr(storage, "available_memory", lambda: 159)  # a quarter is 39.75
    mapped = storage.empty(10, 4)
    assert isinstance(mapped, np.memmap)
    mapped[:] = 7
    assert mapped.sum() == 280
    assert not isinstance(storage.empty(9, 4), np.memmap)
    assert list((tmp_path / "cache").rglob("*.*")) == []  # the file has no name, so nothing can be left


def test_a_source_in_a_mapped_file_is_the_same_source(digits, no_memory):
    mapped = load_source("digits")
    assert mapped.fingerprint == digits.fingerprint
    assert torch.equal(mapped.train.images, digits.train.images)


def test_a_run_on_mapped_images_gives_the_same_images(digits, pool, monkeypatch):
    from ncfm_engine.config import DistillConfig

    config = DistillConfig(iterations=3, real_batch=20, frequencies=32, factor=1)
    options = {"ipc": 1, "seed": 0, "device": "cpu"}
    expected = distill(config, digits, pool, **options).images
    monkeypatch.setattr(storage, "available_memory", lambda: 0)
    assert torch.equal(distill(config, load_source("digits"), pool, **options).images, expected)


def test_a_disk_without_room_is_an_error_before_anything_is_written(no_memory):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
    try:
        with pytest.raises(SourceError, match=r"do not fit into memory, and a file .*XDG_CACHE_HOME"):
            LabelledImages.from_arrays(np.zeros((100, 8, 8), np.uint8), np.arange(100) % 2, 2)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
