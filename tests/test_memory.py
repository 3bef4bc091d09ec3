"""The memory of a step: counted as it is measured, and cut to a budget."""

import contextlib
import dataclasses
import gc
import itertools
import re
from unittest import mock

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from distilled_data import UsageError
from ncfm_engine.config import DistillConfig
from ncfm_engine.distill import distill
from ncfm_engine.initial import initial_images
from ncfm_engine.matching import MatchingStep
from ncfm_engine.memory import Footprint, Layout, choose_layout, is_out_of_memory, layout_for

BASE = DistillConfig(real_batch=100, real_features="fresh", frequencies=256, factor=1, weight=1.0)


def count(digits, pool, config=BASE, ipc=10, device="cpu") -> Footprint:
    kept = pool.trajectory[..., 0].numel()
    return Footprint.of(config, pool.template, digits, ipc=ipc, kept_networks=kept, device=device)


@contextlib.contextmanager
def recorded():
    """A profile of memory; what torch makes of the other events at its end would take ten times as long."""
    gc.collect()  # garbage that is freed meanwhile would count
    unread = mock.patch.object(torch.autograd.profiler.profile, "_parse_kineto_results", return_value=[])
    options = {"activities": [ProfilerActivity.CPU], "profile_memory": True, "acc_events": True}
    with unread, profile(**options) as record:
        yield record


def peak_of(record: profile) -> int:
    sizes = [e.nbytes() for e in record.profiler.kineto_results.events() if e.name() == "[memory]"]
    return max(itertools.accumulate(sizes, initial=0))


def measured(digits, pool, config, ipc, layout) -> int:
    """Bytes that the tensors of one step take at their peak, as the allocator saw them."""
    step = MatchingStep(config, digits, pool, ipc=ipc, seed=0, device="cpu", layout=layout)
    images = initial_images(config, digits, pool, ipc=ipc, seed=0)
    step.backward(images, 0)  # what is made once is made here; a bank is refreshed in the next step
    images.grad = None
    with recorded() as record:
        step.backward(images, 1)
    return peak_of(record)


@pytest.mark.parametrize(
    ("change", "ipc", "layout"),
    [
        ({}, 10, Layout(10, 100)),
        ({}, 10, Layout(3, 100)),
        ({"frequencies": 2048}, 2, Layout(10, 100)),
        ({"real_features": "bank", "bank_size": 2, "bank_refresh": 1}, 2, Layout(10, 100)),
        ({"real_features": "bank", "bank_size": 2, "bank_refresh": 1}, 2, Layout(1, 100)),
        ({"discrepancy": "mmd"}, 10, Layout(10, 100)),
        ({"discrepancy": "dm"}, 10, Layout(10, 100)),
        ({"precision": "bfloat16"}, 10, Layout(10, 100)),
        ({"factor": 2}, 10, Layout(5, 50)),
        ({"calibration": 0.0}, 50, Layout(2, 10)),
    ],
)
def test_the_count_is_at_least_the_measured_peak_and_not_far_above(digits, pool, change, ipc, layout):
    config = dataclasses.replace(BASE, **change)
    counts = count(digits, pool, config, ipc)
    of_step = counts.step(layout) + counts.fixed(layout)["frequencies"]
    of_step += counts.fixed(layout)["synthetic images with gradient and optimiser"] // 4  # the gradient
    if config.real_features == "bank":
        of_step += counts.fixed(layout)["bank of real features"] // config.bank_size  # the new entry
    peak = measured(digits, pool, config, ipc, layout)
    assert 0.5 * of_step < peak <= of_step


def test_what_a_run_keeps_of_its_images_is_counted(digits, pool):
    ipc, layout, peaks, counted = 20, Layout(2, 40), [], []
    base = dataclasses.replace(BASE, iterations=2, calibration=0.0, real_batch=20, frequencies=16)
    for change in ({}, {"ema": 0.9}, {"quantised": 1.0}, {"ema": 0.9, "quantised": 1.0}):
        config = dataclasses.replace(base, **change)
        with recorded() as record:
            distill(config, digits, pool, ipc=ipc, seed=0, device="cpu", layout=layout)
        peaks.append(peak_of(record) - (peaks[0] if peaks else 0))
        counted.append(count(digits, pool, config, ipc).total(layout) - (counted[0] if counted else 0))
    for more, expected in zip(peaks[1:], counted[1:], strict=True):
        assert 0.9 * expected < more <= 1.1 * expected


def test_what_lies_on_the_device_all_the_time_is_counted_to_the_byte(digits, pool):
    config = dataclasses.replace(BASE, real_features="bank", bank_size=3)
    step = MatchingStep(config, digits, pool, ipc=2, seed=0, device="cpu")
    images = initial_images(config, digits, pool, ipc=2, seed=0)
    step.backward(images, 0)
    networks = pool.trajectory, step.blended._flat.weights, step.trained._flat.weights
    there = {
        "feature networks": sum(weights.nbytes for weights in networks),
        "real images": digits.train.images.nbytes,
        "bank of real features": sum(features.nbytes for features in step.real._bank.values()),
        "synthetic images with gradient and optimiser": 4 * images.nbytes,  # and two moments
    }
    counts = count(digits, pool, config, ipc=2)
    fixed, half = (each.fixed(step.layout) for each in (counts, dataclasses.replace(counts, num_classes=5)))
    assert {name: fixed[name] for name in there} == there
    for name in set(there) - {"feature networks"}:
        assert half[name] == fixed[name] / 2


def test_a_budget_of_what_the_error_names_is_enough(digits, pool):
    for ipc in (1, 7, 50):
        counts = count(digits, pool, ipc=ipc)
        with pytest.raises(UsageError) as error:
            choose_layout(counts, 1000)
        number, unit = re.search(r"minimum of ([\d.]+)(KiB|MiB)", str(error.value)).groups()
        unit = {"KiB": 2**10, "MiB": 2**20}[unit]
        assert 0 <= float(number) * unit - counts.total(Layout(1, 1)) < 0.11 * unit
        choose_layout(counts, int(float(number) * unit))


def test_without_a_budget_all_classes_go_at_once_on_a_gpu_and_caches_decide_on_a_cpu(digits, pool):
    assert choose_layout(count(digits, pool, device="cuda")).classes == 10
    large = dataclasses.replace(count(digits, pool), largest=4 * 2**20)
    assert choose_layout(large).classes < 10
    assert choose_layout(dataclasses.replace(large, cpu=False)).classes == 10


def test_a_budget_is_kept_and_used(digits, pool):
    counts = count(digits, pool)
    least = counts.total(Layout(1, 1))
    for budget in (least, 2 * least, 4 * least):
        layout = choose_layout(counts, budget)
        assert counts.total(layout) <= budget
    assert choose_layout(counts, 2**40) == choose_layout(counts)
    few, more = (choose_layout(counts, factor * least).classes for factor in (1, 3))
    assert few < more


def test_a_tight_budget_moves_the_bank_to_host_memory_first_and_then_the_real_images(digits, pool):
    counts = count(digits, pool, dataclasses.replace(BASE, real_features="bank"), device="cuda")
    # What all classes at once need with everything on the device, and without the bank.
    whole, without = (counts.total(Layout(10, 1, bank_resident=bank)) for bank in (True, False))
    layouts = [choose_layout(counts, budget) for budget in (whole, whole - 1, without - 1)]
    places = [(layout.bank_resident, layout.images_resident) for layout in layouts]
    assert places == [(True, True), (False, True), (False, False)]


def test_chunks_become_smaller_before_the_bank_moves(digits, pool):
    config = dataclasses.replace(BASE, real_features="bank")
    counts = count(digits, pool, config, ipc=100, device="cuda")
    whole = choose_layout(counts)
    layout = choose_layout(counts, counts.total(whole) - counts.per_class)
    assert layout.bank_resident
    assert layout.classes < whole.classes == 10


def test_a_budget_below_the_minimum_names_it_and_what_takes_it(digits, pool):
    counts = count(digits, pool)
    least = counts.total(Layout(1, 1))
    with pytest.raises(UsageError) as error:
        choose_layout(counts, least - 1)
    for words in (
        "below the minimum of",
        "one class forward and backward",
        "feature networks",
        "real images",
    ):
        assert words in str(error.value)


def test_chunks_are_even(digits, pool):
    counts = count(digits, pool)
    for budget in range(counts.total(Layout(1, 1)), counts.total(Layout(10, 100)), 50_000):
        size = choose_layout(counts, budget).classes
        rest = 10 % size
        assert rest == 0 or size - rest <= 10 // size


def test_a_prefix_is_counted_with_the_set(digits, pool):
    nested = count(digits, pool, dataclasses.replace(BASE, nested=True))
    plain = count(digits, pool)
    assert nested.per_class - plain.per_class == 12 * plain.views_per_class * BASE.frequencies


def test_a_gpu_gets_a_layout_that_fits_into_what_it_has_free_or_keeps_for_later(digits, pool, monkeypatch):
    counts = count(digits, pool, ipc=500, device="cuda")
    whole = counts.total(choose_layout(counts))
    free = [0, whole]  # at first, and once what is kept is given back
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: free.pop(0))
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free[0], 2**40))
    layout = layout_for(counts, "cuda")
    assert layout.classes < 10
    assert counts.total(layout) <= 0.9 * whole
    assert layout_for(counts, "cuda", 2**40) == choose_layout(counts)
    free[:] = [0, whole // 10]
    with pytest.raises(UsageError, match=r"the free memory of cuda, .* is below the minimum"):
        layout_for(counts, "cuda")


@pytest.mark.parametrize(
    ("message", "expected"),
    [
        ("CUDA out of memory. Tried to allocate 2.00 GiB", True),
        ("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`", True),
        ("CUDA error: CUBLAS_STATUS_NOT_INITIALIZED when calling `cublasCreate(handle)`", True),
        ("cuDNN error: CUDNN_STATUS_NOT_INITIALIZED", True),
        ("GET was unable to find an engine to execute this computation", True),
        ("[enforce fail at alloc_cpu.cpp:117] err == 0. DefaultCPUAllocator: can't allocate memory", True),
        ("mat1 and mat2 shapes cannot be multiplied (2x3 and 4x5)", False),
        ("CUDA error: an illegal memory access was encountered", False),
    ],
)
def test_errors_of_a_full_device_are_told_from_others(message, expected):
    assert is_out_of_memory(RuntimeError(message)) == expected
    assert is_out_of_memory(torch.OutOfMemoryError())
