"""The memory of a step: counted as it is measured, and cut to a budget."""

import dataclasses

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from distilled_data import UsageError
from ncfm_engine.config import DistillConfig
from ncfm_engine.initial import initial_images
from ncfm_engine.matching import MatchingStep
from ncfm_engine.memory import Footprint, Layout, choose_layout

BASE = DistillConfig(real_batch=100, frequencies=256, factor=1, weight=1.0)


def count(digits, pool, config=BASE, ipc=10) -> Footprint:
    return Footprint.of(config, pool.template, digits, ipc=ipc, kept_networks=pool.trajectory[..., 0].numel())


def measured(digits, pool, config, ipc, layout) -> int:
    """Bytes that the tensors of one step take at their peak, as the allocator saw them."""
    step = MatchingStep(config, digits, pool, ipc=ipc, seed=0, device="cpu", layout=layout)
    images = initial_images(config, digits, ipc=ipc, seed=0)
    step.backward(images, 0)  # what is made once, like the bank, is made here
    images.grad = None
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        step.backward(images, 1)
    sizes = [e.nbytes() for e in record.profiler.kineto_results.events() if e.name() == "[memory]"]
    now = peak = 0
    for size in sizes:
        now += size
        peak = max(peak, now)
    return peak


@pytest.mark.parametrize(
    ("change", "ipc", "layout"),
    [
        ({}, 10, Layout(10, 100)),
        ({}, 10, Layout(3, 100)),
        ({"frequencies": 2048}, 2, Layout(10, 100)),
        ({"real_features": "bank", "bank_size": 2}, 10, Layout(10, 100)),
        ({"factor": 2}, 10, Layout(5, 50)),
        ({"calibration": 0.0}, 50, Layout(2, 10)),
    ],
)
def test_the_count_is_at_least_the_measured_peak_and_not_far_above(digits, pool, change, ipc, layout):
    config = dataclasses.replace(BASE, **change)
    counts = count(digits, pool, config, ipc)
    of_step = counts.step(layout) + counts.fixed(layout)["frequencies"]
    of_step += counts.fixed(layout)["synthetic images with gradient and optimiser"] // 4  # the gradient
    peak = measured(digits, pool, config, ipc, layout)
    assert 0.5 * of_step < peak <= of_step


def test_without_a_budget_all_classes_go_at_once_on_a_gpu_and_caches_decide_on_a_cpu(digits, pool):
    counts = count(digits, pool)
    assert choose_layout(counts, "cuda").classes == 10
    large = dataclasses.replace(counts, largest=4 * 2**20)
    assert choose_layout(large, "cpu").classes < 10
    assert choose_layout(large, "cuda").classes == 10


def test_a_budget_is_kept_and_used(digits, pool):
    counts = count(digits, pool)
    least = counts.total(Layout(1, 1))
    for budget in (least, 2 * least, 4 * least):
        layout = choose_layout(counts, "cpu", budget)
        assert counts.total(layout) <= budget
    assert choose_layout(counts, "cpu", 2**40) == choose_layout(counts, "cpu")
    few, more = (choose_layout(counts, "cpu", factor * least).classes for factor in (1, 3))
    assert few < more


def test_a_tight_budget_moves_the_bank_to_host_memory_first_and_then_the_real_images(digits, pool):
    counts = count(digits, pool, dataclasses.replace(BASE, real_features="bank"))
    whole = counts.total(choose_layout(counts, "cuda"))
    bank, images = (counts.fixed(Layout(1, 1))[name] for name in ("bank of real features", "real images"))
    least = counts.total(Layout(1, 1, images_resident=False, bank_resident=False))
    places = [
        (layout.bank_resident, layout.images_resident)
        for layout in (
            choose_layout(counts, "cuda", budget) for budget in (whole, whole - bank, least + images // 2)
        )
    ]
    assert places == [(True, True), (False, True), (False, False)]


def test_chunks_become_smaller_before_the_bank_moves(digits, pool):
    counts = count(digits, pool, dataclasses.replace(BASE, real_features="bank"), ipc=100)
    whole = choose_layout(counts, "cuda")
    layout = choose_layout(counts, "cuda", counts.total(whole) - counts.per_class)
    assert layout.bank_resident
    assert layout.classes < whole.classes == 10


def test_a_budget_below_the_minimum_names_it_and_what_takes_it(digits, pool):
    counts = count(digits, pool)
    least = counts.total(Layout(1, 1))
    with pytest.raises(UsageError) as error:
        choose_layout(counts, "cpu", least - 1)
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
        size = choose_layout(counts, "cpu", budget).classes
        rest = 10 % size
        assert rest == 0 or size - rest <= 10 // size


def test_half_precision_halves_the_activations(digits, pool):
    half = count(digits, pool, dataclasses.replace(BASE, precision="bfloat16"))
    assert half.saved == pytest.approx(count(digits, pool).saved / 2, abs=1)
    assert torch.finfo(torch.bfloat16).bits == 16
