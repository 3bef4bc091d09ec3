"""Pretraining, labelling and evaluating: cached, addressed, and honest about what is compared with what."""

import dataclasses
import json
from types import SimpleNamespace

import pytest
import torch
from interruptions import StopAfter

from distilled_data import CheckpointError, DistilledDataset, UsageError
from distilled_data.randomness import seed_at
from ncfm_engine.batches import real_loader, real_test_loader
from ncfm_engine.config import EvaluateConfig, LabelConfig, NetworkConfig, PretrainConfig
from ncfm_engine.evaluate import evaluate, forget_progress, random_subset, settings_hash, train_and_test
from ncfm_engine.label import Ensemble, label, teacher
from ncfm_engine.pipeline import write_results
from ncfm_engine.pool import FlatNetwork, build
from ncfm_engine.pretrain import pretrain
from ncfm_engine.sources import hold_out
from ncfm_engine.stop import Stopped
from ncfm_engine.train import Training, accuracy, logits_of

PRETRAIN = PretrainConfig(networks=2, epochs=4, learning_rate=0.1, cutmix=0)
NETWORK = NetworkConfig(width=16, depth=2)
EVALUATE = EvaluateConfig(
    epochs=2, augment="color_crop", repeats=2, labels=("hard", "soft"), full_epochs=1, full_repeats=2
)


@pytest.fixture(scope="module")
def pool(digits, tmp_path_factory):
    cache = tmp_path_factory.mktemp("cache")
    return pretrain(PRETRAIN, NETWORK, digits, seed=0, device="cpu", cache=cache)


@pytest.fixture
def dataset(digits, pool):
    return random_subset(digits, ipc=2, seed=0, pool=pool, labels="soft", device="cpu")


@pytest.fixture
def logits(digits, pool) -> torch.Tensor:
    """Of the two trained networks for the test images."""
    test = real_loader(digits, digits.test, 64, "cpu", shuffle=False)
    network = FlatNetwork(pool.template, "cpu")
    return torch.stack([logits_of(pool.blend(index, 1.0, network), test) for index in range(2)])


def test_pretraining_learns_the_digits(digits, logits):
    assert min(accuracy(each, digits.test.targets) for each in logits) > 60  # chance is 10


def test_networks_of_a_pool_differ_in_their_start(pool):
    assert not torch.equal(pool.trajectory[0, 0], pool.trajectory[1, 0])


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
    assert torch.allclose(logits[2, 7, 1].float(), torch.stack(expected).mean(0), rtol=1e-3, atol=1e-4)


def test_large_images_pass_a_network_in_smaller_batches(digits, pool, monkeypatch):
    images, seen, ask = digits.train.images[: 3 * 10].view(3, 10, 1, 8, 8), [], Ensemble.forward
    monkeypatch.setattr(Ensemble, "forward", lambda self, views: seen.append(len(views)) or ask(self, views))
    whole = label(images, pool, digits, factor=2, device="cpu")
    monkeypatch.setattr("ncfm_engine.batches.PIXELS", 100 * 8 * 8)
    assert torch.allclose(label(images, pool, digits, factor=2, device="cpu"), whole, rtol=1e-2, atol=1e-3)
    assert seen == [120, 100, 20]
    assert [real_test_loader(digits, networks, "cpu").batch_size for networks in (1, 2)] == [100, 64]


def test_the_teacher_is_recorded_with_its_accuracy_and_weights(digits, pool, logits):
    entry = teacher(LabelConfig(temperature=2.0), NETWORK, pool, digits, "cpu")
    assert (entry["kind"], entry["temperature"]) == ("logits", 2.0)
    assert entry["teacher"]["architecture"] == "convnet width 16 depth 2 norm instance"
    assert entry["teacher"]["networks"] == 2
    assert entry["teacher"]["accuracy"] == round(accuracy(logits.mean(0), digits.test.targets), 2)
    assert entry["teacher"]["weights_sha256"] == pool.weights_hash
    assert "split" not in entry["teacher"]
    entry = teacher(LabelConfig(), NETWORK, pool, hold_out(digits, 0.2), "cpu")
    assert entry["teacher"]["split"] == "validation 0.2"


@pytest.mark.parametrize(("name", "told"), [("resnet18", "resnet18 norm instance"), ("vit", "vit")])
def test_a_teacher_is_described_by_the_settings_that_shape_it(digits, pool, name, told):
    entry = teacher(LabelConfig(), NetworkConfig(name), pool, digits, "cpu")
    assert entry["teacher"]["architecture"] == told


def test_a_random_subset_is_real_images_of_their_class_with_the_teachers_labels(digits, pool, dataset):
    for image, target in zip(dataset.images, dataset.targets, strict=True):
        of_class = digits.train.images[digits.train.targets == target]
        assert (image == of_class).flatten(1).all(1).any()
    agreement = (dataset.soft_targets.argmax(1) == dataset.targets).float().mean()
    assert agreement > 0.6
    other = random_subset(digits, ipc=2, seed=1, pool=None, labels="hard", device="cpu")
    assert not torch.equal(other.images, dataset.images)


def test_random_images_are_labelled_at_the_temperature_of_the_distilled_ones(digits, pool, monkeypatch):
    seen = []

    def watch(training, *arguments, **options):
        seen.append(training.batches.at(0, 0)[1])
        training.scores.append([0.0])

    monkeypatch.setattr(Training, "run", watch)
    images = digits.train.images[:20].view(2, 10, 1, 8, 8)
    hot = DistilledDataset.from_tensors(
        images, digits.classes, label(images, pool, digits, factor=1, device="cpu"), temperature=50.0
    )
    config = dataclasses.replace(EVALUATE, labels=("soft",), repeats=1, full_repeats=0)
    evaluate(hot, digits, config, NETWORK, seed=0, device="cpu", pool=pool)
    assert len(seen) == 2
    assert all(targets.max() < 0.25 for targets in seen)  # at 1 the teacher is surer than that


def test_soft_labels_for_a_random_subset_need_the_pool(digits):
    with pytest.raises(UsageError, match="need the pool"):
        random_subset(digits, ipc=2, seed=0, pool=None, labels="soft", device="cpu")


def test_a_teacher_labels_what_each_network_sees(digits, pool, dataset, monkeypatch):
    seen, asked, ask = [], [], Ensemble.forward

    def watch(training, *arguments, **options):
        seen.append(training.batches.at(0, 1))
        training.scores.append([0.0, 0.0])

    def count(teacher, images):
        asked.append(len(images))
        return ask(teacher, images)

    monkeypatch.setattr(Training, "run", watch)
    monkeypatch.setattr(Ensemble, "forward", count)
    config = dataclasses.replace(EVALUATE, labels=("teacher",), batch_size=8, full_repeats=0, at_once=2)
    warm = dataset.with_labels("soft", temperature=3.0)
    (row,) = evaluate(warm, digits, config, NETWORK, seed=0, device="cpu", pool=pool)
    assert (row["labels"], row["temperature"]) == ("teacher", 3.0)
    assert pool.weights_hash.startswith(row["teacher"])
    networks = [build(NETWORK, digits, 0) for _ in pool.trained]
    for network, weights in zip(networks, pool.trained, strict=True):
        torch.nn.utils.vector_to_parameters(weights, network.parameters())
    assert len(seen) == 2  # distilled, random
    assert asked == [8] * 4  # about one batch at a time, however many networks are trained at once
    for images, targets in seen:
        assert targets.shape == (2, 8, 10)
        for own, probabilities in zip(images, targets, strict=True):
            logits = torch.stack([network(own) for network in networks]).mean(0)
            assert torch.allclose(probabilities, (logits / 3).softmax(1), atol=1e-5)
    with pytest.raises(UsageError, match="need the pool"):
        evaluate(warm, digits, config, NETWORK, seed=0, device="cpu")


def test_without_random_images_only_batches_as_they_come_need_a_teacher(digits, pool, dataset):
    config = dataclasses.replace(EVALUATE, full_repeats=0)
    options = {"seed": 0, "device": "cpu"}
    rows = evaluate(dataset, digits, config, NETWORK, **options, random=False)
    beside = evaluate(dataset, digits, config, NETWORK, **options, pool=pool)
    assert [row["last_accuracies"] for row in rows] == [row["last_accuracies"] for row in beside]
    assert [(row["random_n"], row["random_mean"], row["random_accuracies"]) for row in rows] == [
        (0, None, [])
    ] * 2
    assert [row["random_n"] for row in beside] == [2, 2]
    assert not any("teacher" in row for row in rows)
    taught = dataclasses.replace(config, labels=("teacher",))
    with pytest.raises(UsageError, match="need the pool"):
        evaluate(dataset, digits, taught, NETWORK, **options, random=False)


def test_a_result_row_has_every_field_and_names_the_set_it_measured(digits, pool, dataset):
    rows = evaluate(dataset, digits, EVALUATE, NETWORK, seed=0, device="cpu", pool=pool)
    assert [row["labels"] for row in rows] == ["hard", "soft"]
    expected = (
        "dataset ipc network protocol labels epochs split test_images settings n "
        "last_mean last_std best_mean best_std random_mean random_std random_n full_mean full_std full_n "
        "seconds seed content_hash last_accuracies best_accuracies random_accuracies full_accuracies"
    )
    assert set(rows[0]) == set(expected.split())
    assert rows[0]["content_hash"] == dataset.content_hash
    assert (rows[0]["n"], rows[0]["test_images"]) == (2, 359)
    assert rows[0]["best_mean"] >= rows[0]["last_mean"]
    assert 0 <= rows[0]["full_mean"] <= 100


def test_a_quick_look_takes_no_place_of_a_long_evaluation(tmp_path):
    path = tmp_path / "results.json"
    row = {"labels": "hard", "n": 5, "last_mean": 80.0, "full_n": 3, "full_mean": 97.0, "full_std": 1.0}
    row |= {"full_accuracies": [96.0, 97.0, 98.0]}
    less = {"full_n": 0, "full_mean": None, "full_std": None, "full_accuracies": []}

    def written(row):
        write_results(path, [row], "cpu", {})
        (found,) = json.loads(path.read_text())["rows"]
        assert len(found["full_accuracies"]) == found["full_n"]
        return [found[name] for name in ("n", "last_mean", "full_n", "full_mean")]

    assert written(row) == [5, 80.0, 3, 97.0]
    assert written(row | less | {"n": 1, "last_mean": 70.0}) == [5, 80.0, 3, 97.0]
    assert written(row | less | {"last_mean": 81.0}) == [5, 81.0, 3, 97.0]
    more = {"full_n": 4, "full_mean": 98.0, "full_accuracies": [98.0] * 4}
    assert written(row | {"n": 1, "last_mean": 70.0} | more) == [5, 81.0, 4, 98.0]


def test_results_without_random_images_leave_those_there_are(tmp_path):
    path = tmp_path / "results.json"
    row = {"labels": "soft", "n": 5, "last_mean": 80.0, "random_mean": 60.0, "random_accuracies": [60.0] * 5}
    row |= {"teacher": "of the random images"}
    less = {"labels": "soft", "n": 6, "last_mean": 81.0, "random_mean": None, "random_accuracies": []}
    for one in (row, less | {"random_n": 0}):
        write_results(path, [one], "cpu", {})
    [found] = json.loads(path.read_text())["rows"]
    assert {name: found[name] for name in row} == row | {"n": 6, "last_mean": 81.0}
    again = {"n": 6, "random_n": 6, "random_mean": 61.0, "random_accuracies": [61.0] * 6, "teacher": "other"}
    write_results(path, [row | again], "cpu", {})
    [found] = json.loads(path.read_text())["rows"]
    assert {name: found[name] for name in again} == again


def test_rows_of_other_sets_and_settings_stand_beside_each_other(tmp_path):
    path, row = tmp_path / "results.json", {"n": 2, "last_mean": 50.0, "full_n": 2, "full_mean": 60.0}
    names = ("content_hash", "factor", "ipc", "network", "protocol", "labels", "split", "settings")
    row |= dict.fromkeys(names, "this")
    rows = [row, *(row | {name: "other"} for name in names)]
    for one in rows:
        write_results(path, [one], "cpu", {})
    later = row | {"last_mean": 51.0, "full_mean": 61.0}
    write_results(path, [later], "cpu", {})
    found = [{name: one[name] for name in row} for one in json.loads(path.read_text())["rows"]]
    assert found == [later, *rows[1:]]


def test_rows_are_told_apart_by_all_that_decides_a_score_but_not_by_how_many_networks_were_trained():
    usual = settings_hash(EVALUATE, NETWORK, 0)
    others = {"epochs": 3, "learning_rate": 0.5, "weight_decay": 0.5, "batch_size": 3, "augment": "flip"}
    others |= {"cutmix": 0.1, "full_epochs": 9, "precision": "bfloat16"}
    alike = {"repeats": 9, "labels": ("soft",), "full_repeats": 9, "at_once": 9}
    assert {*others, *alike} == {field.name for field in dataclasses.fields(EvaluateConfig)}
    made = {name: dataclasses.replace(EVALUATE, **{name: value}) for name, value in (others | alike).items()}
    hashes = {name: settings_hash(config, NETWORK, 0) for name, config in made.items()}
    assert {hashes[name] for name in alike} == {usual}
    hashes |= {"seed": settings_hash(EVALUATE, NETWORK, 1)}
    hashes |= {"network": settings_hash(EVALUATE, NetworkConfig(width=4), 0)}
    assert len(set(hashes.values())) == len(others) + 2 + 1


def test_an_evaluation_is_repeatable(digits, pool, dataset):
    config = dataclasses.replace(EVALUATE, labels=("hard",), full_repeats=0)
    first, second = (
        evaluate(dataset, digits, config, NETWORK, seed=0, device="cpu", pool=pool)[0] for _ in range(2)
    )
    assert {**first, "seconds": 0} == {**second, "seconds": 0}
    assert first["full_mean"] is None


def test_the_last_score_is_the_last_and_the_best_the_best(digits, dataset, monkeypatch):
    from ncfm_engine import train as module

    scores = iter([10.0, 90.0, 50.0])
    monkeypatch.setattr(module, "accuracy", lambda logits, targets: next(scores))
    loader = dataset.with_labels("hard").loader(16)
    assert train_and_test(loader, 3, digits, EVALUATE, NETWORK, 0, checks=3) == (50.0, 90.0)


def test_a_row_holds_the_last_and_the_best_scores_of_its_trainings(digits, dataset):
    config = dataclasses.replace(EVALUATE, epochs=20, labels=("hard",), repeats=1, full_repeats=0, at_once=1)
    (row,) = evaluate(dataset, digits, config, NETWORK, seed=3, device="cpu")
    here = seed_at(3, 0)
    loader = dataset.with_labels("hard").loader(config.batch_size, augment=config.augment, seed=here)
    last, best = train_and_test(loader, 20, digits, config, NETWORK, here)
    assert (row["last_mean"], row["best_mean"]) == (round(last, 2), round(best, 2))
    first = train_and_test(loader, 2, digits, config, NETWORK, here, checks=1)[0]
    assert round(first, 2) not in (row["last_mean"], row["best_mean"])


def test_distilled_and_random_images_get_the_same_number_of_optimiser_steps(digits, pool, monkeypatch):
    steps = []

    def count(training, *arguments, **options):
        steps.append(training.course.steps)
        training.scores.append([0.0])

    monkeypatch.setattr(Training, "run", count)
    packed = DistilledDataset.from_tensors(
        digits.train.images[:400].view(40, 10, 1, 8, 8), digits.classes, factor=2
    )
    config = dataclasses.replace(EVALUATE, epochs=8, labels=("hard",), repeats=1, full_repeats=0)
    evaluate(packed, digits, config, NETWORK, seed=0, device="cpu")
    assert steps == [8 * 13, 26 * 4]


BATCHED = dataclasses.replace(EVALUATE, batch_size=8, full_repeats=0)  # 3 steps an epoch


@pytest.mark.parametrize("size", [1, 2])
def test_an_evaluation_stopped_again_and_again_gives_the_same_rows(
    digits, pool, dataset, tmp_path, monkeypatch, size
):
    config, stops = dataclasses.replace(BATCHED, at_once=size), []

    def evaluated(steps, **options):
        stops.append(StopAfter(steps))
        return evaluate(
            dataset, digits, config, NETWORK, seed=0, device="cpu", pool=pool, stop=stops[-1], **options
        )

    # A clock that ticks ten seconds with every step, which is when the stop is asked for.
    clock = SimpleNamespace(monotonic=lambda: 10.0 * sum(stop.asked for stop in stops))
    monkeypatch.setattr("ncfm_engine.progress.time", clock)
    whole = evaluated(10**6)
    assert [row["seconds"] for row in whole] == [10 * 2 * 2 * 6 / size] * 2
    stops.clear()
    for _ in range(100):
        try:
            rows = evaluated(5, folder=tmp_path, resume=True)
            break
        except Stopped:
            assert list(tmp_path.glob("evaluation-*.safetensors"))
    assert len(stops) > 3
    forget_progress(tmp_path, rows)
    assert not list(tmp_path.iterdir())
    seconds = [sum(row.pop("seconds") for row in some) for some in (rows, whole)]
    assert rows == whole
    assert seconds[0] == seconds[1] + 10 * (len(stops) - 1)  # each stop was asked for once more


def test_a_training_goes_on_from_the_progress_of_its_like_alone(digits, dataset, tmp_path):
    loader, path = dataset.with_labels("hard").loader(8), tmp_path / "one.safetensors"

    def trained(alpha, times, **options):
        arguments = (loader, 4, digits, EVALUATE, NETWORK, 0)
        stop = StopAfter(times)
        return train_and_test(*arguments, stop=stop, identity={"alpha": alpha}, **options), stop.asked

    whole, asked = trained(0.5, 100)
    with pytest.raises(Stopped):
        trained(0.5, 7, path=path)
    with pytest.raises(CheckpointError, match="alpha is"):
        trained(0.25, 100, path=path)
    assert trained(0.5, 100, path=path) == (whole, asked - 7)
    assert not path.exists()


def test_a_stop_names_the_training_that_it_interrupted(digits, dataset):
    config = dataclasses.replace(BATCHED, labels=("hard",), at_once=2)
    with pytest.raises(Stopped, match=r"^evaluate, hard labels, random, networks 0-1, epoch 1 of 2$"):
        evaluate(dataset, digits, config, NETWORK, seed=0, device="cpu", stop=StopAfter(6 + 3))


def test_what_tells_most_is_evaluated_first(digits, pool, dataset):
    stages = []
    config = dataclasses.replace(BATCHED, full_repeats=1, full_epochs=1)
    evaluate(
        dataset, digits, config, NETWORK, seed=0, device="cpu", pool=pool,
        report=lambda stage, done, total: stages.append(stage),
    )  # fmt: skip
    hard, soft = (
        [f"evaluate ({kind} labels, {way})" for way in ("distilled", "random")] for kind in ("hard", "soft")
    )
    assert list(dict.fromkeys(stages)) == [*hard, "evaluate (all real images)", *soft]


def test_an_evaluation_that_died_does_not_train_again_what_was_finished(
    digits, dataset, tmp_path, monkeypatch
):
    def die(stage, done, total):
        if (stage, done) == ("evaluate (hard labels, random)", 3):  # one epoch of the second network
            raise KeyboardInterrupt

    config, stop = dataclasses.replace(BATCHED, labels=("hard",)), StopAfter(100)
    arguments = {"dataset": dataset, "source": digits, "config": config, "network": NETWORK, "seed": 0}
    arguments |= {"device": "cpu", "folder": tmp_path}
    monkeypatch.setattr("ncfm_engine.train.CHECKPOINT_SECONDS", 0)
    with pytest.raises(KeyboardInterrupt):
        evaluate(**arguments, report=die)
    (row,) = evaluate(**arguments, resume=True, stop=stop)
    assert stop.asked == 3 + 1  # steps of the last epoch, and the one before that was not saved yet
    (whole,) = evaluate(**arguments)
    assert {**row, "seconds": 0} == {**whole, "seconds": 0}


def test_a_set_without_labels_is_told_from_the_same_images_packed_otherwise(digits, dataset, tmp_path):
    images, soft = dataset.artifact.images, dataset
    plain, packed = (
        DistilledDataset.from_tensors(images, digits.classes, factor=factor, mean=digits.mean, std=digits.std)
        for factor in (1, 2)
    )
    assert plain.content_hash == packed.content_hash  # which for soft labels it is not
    config = dataclasses.replace(BATCHED, labels=("hard",), repeats=1, full_repeats=0)
    options = {"seed": 0, "device": "cpu", "random": False}
    rows = [evaluate(one, digits, config, NETWORK, **options)[0] for one in (plain, packed, soft)]
    assert [row.get("factor") for row in rows] == [None, 2, None]
    with pytest.raises(Stopped):
        evaluate(plain, digits, config, NETWORK, **options, folder=tmp_path, stop=StopAfter(2))
    with pytest.raises(CheckpointError, match="factor is not set there and 2 here"):
        evaluate(packed, digits, config, NETWORK, **options, folder=tmp_path, resume=True)


def test_progress_on_other_real_images_or_by_other_draws_is_refused(digits, dataset, tmp_path, monkeypatch):
    config = dataclasses.replace(BATCHED, labels=("hard",))
    arguments = {"dataset": dataset, "source": digits, "config": config, "network": NETWORK, "seed": 0}
    with pytest.raises(Stopped):
        evaluate(**arguments, device="cpu", folder=tmp_path, stop=StopAfter(8))
    other = {"source": dataclasses.replace(digits, fingerprint="other")}
    with pytest.raises(CheckpointError, match="fingerprint is"):
        evaluate(**arguments | other, device="cpu", folder=tmp_path, resume=True)
    monkeypatch.setattr("ncfm_engine.evaluate.DRAWS", 3)
    with pytest.raises(CheckpointError, match="draws is 2 there and 3 here"):
        evaluate(**arguments, device="cpu", folder=tmp_path, resume=True)


@pytest.mark.parametrize(
    "change",
    [
        {"config": dataclasses.replace(BATCHED, labels=("hard",), epochs=3)},
        {"network": NetworkConfig(width=4, depth=2)},
        {"seed": 1},
        {"dataset": "another"},
    ],
)
def test_two_evaluations_broken_off_in_turn_both_go_on(digits, dataset, tmp_path, change):
    config = dataclasses.replace(BATCHED, labels=("hard",))
    first = {"dataset": dataset, "source": digits, "config": config, "network": NETWORK, "seed": 0}
    if "dataset" in change:
        change = {"dataset": random_subset(digits, ipc=2, seed=1, device="cpu")}
    both, options = (first, first | change), {"device": "cpu", "folder": tmp_path, "resume": True}
    for arguments in both:
        with pytest.raises(Stopped):
            evaluate(**arguments, **options, stop=StopAfter(8))
    for arguments in both:
        rest, whole = StopAfter(10**6), StopAfter(10**6)
        (row,) = evaluate(**arguments, **options, stop=rest)
        (expected,) = evaluate(**arguments, device="cpu", stop=whole)
        assert row | {"seconds": 0} == expected | {"seconds": 0}
        assert rest.asked < whole.asked - 5
        forget_progress(tmp_path, [row])
    assert not list(tmp_path.iterdir())


def test_without_resume_an_evaluation_begins_anew(digits, dataset, tmp_path):
    config = dataclasses.replace(BATCHED, labels=("hard",))
    options = {"seed": 0, "device": "cpu", "folder": tmp_path}
    with pytest.raises(Stopped):
        evaluate(dataset, digits, config, NETWORK, **options, stop=StopAfter(20))
    stop = StopAfter(100)
    evaluate(dataset, digits, config, NETWORK, **options, stop=stop)
    assert stop.asked == 4 * 6


def test_evaluations_with_and_without_random_images_keep_their_progress_apart(
    digits, pool, dataset, tmp_path
):
    config = dataclasses.replace(BATCHED, labels=("soft",), full_repeats=0)
    options = {"seed": 0, "device": "cpu", "folder": tmp_path, "resume": True}
    ways = [{"pool": pool}, {"random": False}]
    for way in ways:
        with pytest.raises(Stopped):
            evaluate(dataset, digits, config, NETWORK, **options, **way, stop=StopAfter(5))
    for way in ways:
        forget_progress(tmp_path, evaluate(dataset, digits, config, NETWORK, **options, **way))
    assert not list(tmp_path.iterdir())


def test_more_repeats_go_on_from_the_progress_of_fewer(digits, dataset, tmp_path):
    config = dataclasses.replace(BATCHED, labels=("hard",), repeats=1)
    options = {"seed": 0, "device": "cpu", "folder": tmp_path}
    with pytest.raises(Stopped):
        evaluate(dataset, digits, config, NETWORK, **options, stop=StopAfter(6))
    stop, more = StopAfter(100), dataclasses.replace(config, repeats=2)
    evaluate(dataset, digits, more, NETWORK, **options, stop=stop, resume=True)
    assert stop.asked == 3 * 6
