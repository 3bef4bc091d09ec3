"""The arithmetic of a run, counted beforehand."""

import dataclasses

import pytest
from torch.utils.flop_counter import FlopCounterMode

from ncfm_engine.config import Recipe
from ncfm_engine.initial import initial_images
from ncfm_engine.matching import MatchingStep
from ncfm_engine.operations import operations, passes

BASE = Recipe().replace(
    {
        "ipc": 2,
        "network.width": 8,
        "network.depth": 2,
        "distill.real_batch": 30,
        "distill.frequencies": 512,
        "distill.factor": 1,
        "distill.iterations": 20,
        "distill.real_features": "fresh",
    }
)


@pytest.mark.parametrize(
    "change",
    [
        {},
        {"distill.discrepancy": "cfd"},
        {"distill.discrepancy": "dm"},
        {"distill.calibration": 0.0},
        {
            "distill.real_features": "bank",
            "distill.bank_size": 3,
            "distill.bank_refresh": 2,
            "distill.discrepancy": "dm",
        },
        {"distill.sampler_steps": 3},
        {"distill.nested": True, "ipc": 20, "distill.real_batch": 2},
    ],
    ids=str,
)
def test_the_operations_of_distilling_are_those_of_its_steps(digits, pool, change):
    recipe = BASE.replace({"distill.iterations": 5} | change)
    config = recipe.distill
    step = MatchingStep(config, digits, pool, ipc=recipe.ipc, seed=0, device="cpu")
    images = initial_images(config, digits, pool, ipc=recipe.ipc, seed=0)
    with FlopCounterMode(display=False) as counter:
        for number in range(config.iterations):
            for turn in range(1, config.sampler_steps):
                step.ascend(images, number, turn)
            step.backward(images, number)
    # psi's own products, and those of the linear classifier of images that need no logits, are small
    assert operations(recipe, digits)["distilling"] == pytest.approx(counter.get_total_flops(), rel=0.1)


def test_every_view_of_a_packed_image_is_counted(digits):
    packed = {"ipc": 3, "distill.factor": 2, "distill.sampler_steps": 3, "distill.calibration": 1.0}
    recipe = BASE.replace(packed)
    views = 3 * 2 * 2 * 10
    stage = passes(recipe, digits)["distilling"]
    assert stage.forward == 20 * (30 * 10 + 2 * views)  # real ones, and synthetic ones for psi's own turns
    assert stage.returned == 20 * 2 * views  # by a feature network, and by the one that calibrates
    assert passes(recipe.replace({"distill.calibration": 0.0}), digits)["distilling"].returned == 20 * views


@pytest.mark.parametrize(("batch_size", "epochs"), [(128, 7), (60, 14), (30, 28)])
def test_random_images_are_fewer_than_the_views_and_take_as_many_steps(digits, batch_size, epochs):
    packed = {"ipc": 3, "distill.factor": 2, "evaluate.batch_size": batch_size, "evaluate.epochs": 7}
    recipe = BASE.replace(packed | {"evaluate.repeats": 1, "evaluate.full_repeats": 0})
    assert passes(recipe, digits)["evaluating"].trained == 2 * (7 * 120 + epochs * 30)  # two label kinds
    labelled = recipe.replace({"evaluate.labels": ("hard", "teacher")})
    forward = [passes(chosen, digits)["evaluating"].forward for chosen in (recipe, labelled)]
    assert forward[1] - forward[0] == (7 * 120 + epochs * 30) * recipe.pretrain.networks


@pytest.mark.parametrize("features", ["fresh", "bank"])
def test_a_run_without_steps_does_nothing(digits, features):
    changes = {"distill.iterations": 0, "distill.sampler_steps": 3, "distill.real_features": features}
    assert operations(BASE.replace(changes), digits)["distilling"] == 0


@pytest.mark.parametrize(("iterations", "entries"), [(1, 3), (4, 3), (5, 4), (8, 4), (9, 5)])
def test_every_entry_of_a_bank_is_looked_at_once(digits, iterations, entries):
    bank = {"distill.real_features": "bank", "distill.bank_size": 3, "distill.bank_refresh": 4}
    recipe = BASE.replace(bank | {"distill.iterations": iterations})
    assert passes(recipe, digits)["distilling"].forward == entries * 30 * 10


def test_pretraining_passes_over_all_images_with_every_network(digits):
    recipe = dataclasses.replace(BASE, pretrain=dataclasses.replace(BASE.pretrain, networks=3, epochs=5))
    assert passes(recipe, digits)["pretraining"].trained == 3 * 5 * len(digits.train)
    larger = recipe.replace({"network.width": 32})
    assert operations(larger, digits)["pretraining"] > 4 * operations(recipe, digits)["pretraining"]


def test_evaluating_counts_distilled_random_and_all_images(digits):
    recipe = BASE.replace(
        {"evaluate.epochs": 7, "evaluate.repeats": 2, "evaluate.full_epochs": 3, "evaluate.full_repeats": 1}
    )
    stage = passes(recipe, digits)["evaluating"]  # two label kinds
    assert stage.trained == 2 * 2 * 2 * 7 * 20 + 3 * len(digits.train)
    assert stage.forward == (2 * 2 * (10 + 1) + 1) * len(digits.test)  # ten looks at each distilled set
    labelled = recipe.replace({"evaluate.labels": ("hard", "teacher")})  # by every network of the pool
    views = 2 * 2 * 7 * 20 * labelled.pretrain.networks
    assert passes(labelled, digits)["evaluating"].forward == stage.forward + views
    alone = passes(recipe, digits, random=False)["evaluating"]
    assert alone.trained == 2 * 2 * 7 * 20 + 3 * len(digits.train)
    assert alone.forward == (2 * 2 * 10 + 1) * len(digits.test)
