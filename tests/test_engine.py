"""Pretraining, labelling and evaluating: cached, addressed, and honest about what is compared with what."""

import dataclasses

import pytest
import torch

from distilled_data import DistilledDataset, DivergenceError, UsageError
from ncfm_engine.config import EvaluateConfig, LabelConfig, NetworkConfig, PretrainConfig
from ncfm_engine.evaluate import evaluate, random_subset
from ncfm_engine.label import label, teacher
from ncfm_engine.pretrain import build, pool_key, pretrain, real_loader
from ncfm_engine.train import accuracy, logits_of

PRETRAIN = PretrainConfig(networks=2, epochs=6, learning_rate=0.1, cutmix=0)
NETWORK = NetworkConfig(width=16, depth=2)
EVALUATE = EvaluateConfig(
    epochs=2, augment="color_crop", repeats=2, labels=("hard", "soft"), full_epochs=1, full_repeats=2
)


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def pool(digits, cache):
    return pretrain(PRETRAIN, NETWORK, digits, seed=0, device="cpu", cache=cache)


@pytest.fixture
def dataset(digits, pool):
    return random_subset(digits, ipc=2, seed=0, pool=pool, labels="soft", device="cpu")


def test_pretraining_learns_the_digits(pool):
    assert min(pool.accuracies) > 60  # chance is 10


def test_recorded_accuracy_is_that_of_the_trained_weights(digits, pool):
    network = build(NETWORK, digits, 0)
    torch.nn.utils.vector_to_parameters(pool.trained[1], network.parameters())
    test = real_loader(digits, digits.test, 64, "cpu", shuffle=False)
    assert accuracy(logits_of(network, test), digits.test.targets) == pytest.approx(pool.accuracies[1])


def test_networks_of_a_pool_differ_in_their_start(pool):
    assert not torch.equal(pool.initial[0], pool.initial[1])


def test_a_pool_is_taken_from_the_cache_and_only_what_is_damaged_is_trained_again(digits, cache, pool):
    folder = cache / "pool" / pool_key(PRETRAIN, NETWORK, digits, 0)
    first, second = sorted(folder.iterdir())
    before = first.stat().st_mtime_ns
    second.write_bytes(second.read_bytes()[:-10])
    again = pretrain(PRETRAIN, NETWORK, digits, seed=0, device="cpu", cache=cache)
    assert first.stat().st_mtime_ns == before
    assert torch.equal(again.trained, pool.trained)


def test_a_larger_pool_begins_with_the_networks_of_a_smaller_one(digits, cache, pool):
    larger = dataclasses.replace(PRETRAIN, networks=3)
    assert pool_key(larger, NETWORK, digits, 0) == pool_key(PRETRAIN, NETWORK, digits, 0)


@pytest.mark.parametrize("change", [{"epochs": 7}, {"learning_rate": 0.2}, {"augment": "color"}])
def test_everything_else_about_pretraining_has_a_cache_key_of_its_own(digits, change):
    other = dataclasses.replace(PRETRAIN, **change)
    assert pool_key(other, NETWORK, digits, 0) != pool_key(PRETRAIN, NETWORK, digits, 0)
    assert pool_key(PRETRAIN, NETWORK, digits, 1) != pool_key(PRETRAIN, NETWORK, digits, 0)
    changed = dataclasses.replace(digits, fingerprint="other")
    assert pool_key(PRETRAIN, NETWORK, changed, 0) != pool_key(PRETRAIN, NETWORK, digits, 0)


def test_running_statistics_are_refused_because_they_cannot_be_blended(digits, cache):
    with pytest.raises(UsageError, match="cannot be blended"):
        pretrain(PRETRAIN, NetworkConfig(norm="batch", depth=2), digits, seed=0, device="cpu", cache=cache)


def test_labels_are_the_mean_logits_of_the_trained_networks_for_every_view(digits, pool):
    images = digits.train.images[: 3 * 10].view(3, 10, 1, 8, 8)
    logits = label(images, pool, digits, factor=2, device="cpu")
    assert logits.shape == (3, 10, 4, 10)
    assert logits.dtype == torch.float16
    tile = images[2, 7, :, :4, 4:].float()[None] / 255  # the second view in row-major order
    view = torch.nn.functional.interpolate(tile, size=(8, 8), mode="bilinear", align_corners=False)
    expected = []
    for weights in pool.trained:
        network = build(NETWORK, digits, 0)
        torch.nn.utils.vector_to_parameters(weights, network.parameters())
        expected.append(network((view - digits.mean[0]) / digits.std[0])[0])
    assert torch.allclose(logits[2, 7, 1].float(), torch.stack(expected).mean(0), atol=0.02)


def test_the_teacher_is_recorded_with_its_accuracy_and_weights(digits, pool):
    entry = teacher(LabelConfig(temperature=2.0), NETWORK, pool, digits, "cpu")
    assert entry["temperature"] == 2.0
    assert entry["teacher"]["networks"] == 2
    assert entry["teacher"]["accuracy"] >= min(pool.accuracies) - 1
    assert entry["teacher"]["weights_sha256"] == pool.weights_hash


def test_a_random_subset_is_real_images_of_their_class_with_the_teachers_labels(digits, pool, dataset):
    for image, target in zip(dataset.images, dataset.targets, strict=True):
        of_class = digits.train.images[digits.train.targets == target]
        assert (image == of_class).flatten(1).all(1).any()
    agreement = (dataset.soft_targets.argmax(1) == dataset.targets).float().mean()
    assert agreement > 0.6
    other = random_subset(digits, ipc=2, seed=1, pool=None, labels="hard", device="cpu")
    assert not torch.equal(other.images, dataset.images)


def test_random_images_are_labelled_at_the_temperature_of_the_distilled_ones(digits, pool, monkeypatch):
    from ncfm_engine import evaluate as module

    seen = []

    def watch(network, loader, *, epochs, after_epoch, **options):
        seen.append(loader.targets)
        after_epoch(epochs)

    monkeypatch.setattr(module, "train", watch)
    images = digits.train.images[:20].view(2, 10, 1, 8, 8)
    hot = DistilledDataset.from_tensors(
        images, digits.classes, label(images, pool, digits, factor=1, device="cpu"), temperature=50.0
    )
    config = dataclasses.replace(EVALUATE, labels=("soft",), repeats=1, full_repeats=0)
    evaluate(hot, digits, config, NETWORK, seed=0, device="cpu", pool=pool)
    assert all(targets.max() < 0.25 for targets in seen)  # at 1 the teacher is surer than that


def test_a_pool_that_diverged_is_named_and_not_cached(digits, tmp_path):
    wild = dataclasses.replace(PRETRAIN, networks=1, epochs=3, learning_rate=1e30)
    with pytest.raises(DivergenceError, match=r"feature network 0 .* pretrain.learning_rate"):
        pretrain(wild, NETWORK, digits, seed=0, device="cpu", cache=tmp_path)
    assert not list(tmp_path.rglob("*.safetensors"))


def test_soft_labels_for_a_random_subset_need_the_pool(digits):
    with pytest.raises(UsageError, match="need the pool"):
        random_subset(digits, ipc=2, seed=0, pool=None, labels="soft", device="cpu")


def test_a_result_row_has_every_field_and_names_the_set_it_measured(digits, pool, dataset):
    rows = evaluate(dataset, digits, EVALUATE, NETWORK, seed=0, device="cpu", pool=pool)
    assert [row["labels"] for row in rows] == ["hard", "soft"]
    expected = (
        "dataset ipc network protocol labels epochs split settings n last_mean last_std best_mean best_std "
        "random_mean random_std full_mean full_std full_n seconds seed content_hash"
    )
    assert set(rows[0]) == set(expected.split())
    assert rows[0]["content_hash"] == dataset.content_hash
    assert rows[0]["n"] == 2
    assert rows[0]["best_mean"] >= rows[0]["last_mean"]
    assert 0 <= rows[0]["full_mean"] <= 100


def test_an_evaluation_is_repeatable(digits, pool, dataset):
    config = dataclasses.replace(EVALUATE, labels=("hard",), full_repeats=0)
    first, second = (
        evaluate(dataset, digits, config, NETWORK, seed=0, device="cpu", pool=pool)[0] for _ in range(2)
    )
    assert {**first, "seconds": 0} == {**second, "seconds": 0}
    assert first["full_mean"] is None


def test_the_last_score_is_the_last_and_the_best_the_best(digits, dataset, monkeypatch):
    from ncfm_engine import evaluate as module

    scores = iter([10.0, 90.0, 50.0])
    monkeypatch.setattr(module, "accuracy", lambda logits, targets: next(scores))
    loader = dataset.with_labels("hard").loader(16)
    assert module.train_and_test(loader, 3, digits, EVALUATE, NETWORK, 0, checks=3) == (50.0, 90.0)


def test_distilled_and_random_images_get_the_same_number_of_optimiser_steps(digits, pool, monkeypatch):
    from ncfm_engine import evaluate as module

    steps = []

    def count(network, loader, *, epochs, after_epoch, **options):
        steps.append(epochs * len(loader))
        after_epoch(epochs)

    monkeypatch.setattr(module, "train", count)
    packed = DistilledDataset.from_tensors(
        digits.train.images[:400].view(40, 10, 1, 8, 8), digits.classes, factor=2
    )
    config = dataclasses.replace(EVALUATE, epochs=8, labels=("hard",), repeats=1, full_repeats=0)
    evaluate(packed, digits, config, NETWORK, seed=0, device="cpu")
    assert steps == [8 * 13, 26 * 4]
