"""Proxies: the same steps on different images, and the truth on the test set."""

import dataclasses
import math
import random
import sqlite3
import time
from functools import partial

import numpy as np
import pytest
import torch
from optuna.trial import TrialState

from distilled_data import DistilledDataset, DivergenceError, OutputError, UsageError
from distilled_data.randomness import seed_at
from ncfm_engine import progress as module_of_progress
from ncfm_engine import proxies as module
from ncfm_engine import search as module_of_search
from ncfm_engine import train as module_of_training
from ncfm_engine.config import EvaluateConfig, NetworkConfig
from ncfm_engine.evaluate import random_subset, train_and_test
from ncfm_engine.proxies import FULL, PROXIES, proxies, splits
from ncfm_engine.search import open_studies, search
from ncfm_engine.sources import Source, hold_out
from ncfm_engine.spaces import SPACES, Space
from ncfm_engine.stop import Stopped
from tests.interruptions import StopAfter, full_disk

ARCHITECTURE = {"width": 8, "depth": 2, "norm": "batch", "activation": "relu", "pooling": "avg"}
CONFIG = EvaluateConfig(epochs=6, batch_size=50, repeats=2, full_epochs=1, full_repeats=1)


@pytest.fixture(scope="module")
def held(digits):
    return hold_out(digits, 0.2)


@pytest.fixture
def ways(digits, held):
    """Of a set of 120 views, three batches; so are the 30 random images, each four times."""
    drawn = random_subset(held, ipc=3, seed=7, device="cpu")
    packed = dataclasses.replace(drawn.artifact.metadata, factor=2)
    dataset = DistilledDataset(dataclasses.replace(drawn.artifact, metadata=packed))

    def make(config=CONFIG, **options):
        test = dataclasses.replace(held, test=digits.test, split=digits.split)
        fixed = {"dataset": dataset, "source": held, "test": test, "labels": "hard"} | options
        return proxies(config=config, seed=5, device="cpu", **fixed)

    make.dataset = dataset
    return make


@pytest.mark.parametrize("validation", [0.0, 0.2])
def test_no_proxy_trains_on_what_it_is_tested_on_and_none_sees_the_test_set(digits, validation):
    seen = hold_out(digits, validation) if validation else digits
    source, test = splits(digits, seen, validation)
    parts = {
        name: set(map(bytes, part.digests.numpy()))
        for name, part in (
            ("train", source.train),
            ("held out", source.test),
            ("test", test.test),
            ("all", digits.train),
        )
    }
    assert not parts["train"] & parts["held out"]
    assert parts["train"] | parts["held out"] == parts["all"]
    assert len(source.test) == pytest.approx((validation or 0.1) * len(digits.train), rel=0.05)
    assert parts["test"] == set(map(bytes, digits.test.digests.numpy()))
    assert set(map(bytes, test.train.digests.numpy())) == parts["train"]
    assert (source.mean, source.std) == (test.mean, test.std) == (seen.mean, seen.std)
    if validation:  # the very images that the set has not seen
        assert parts["held out"] == set(map(bytes, seen.test.digests.numpy()))


def quiet(accuracy):
    pass


def test_all_proxies_take_the_same_steps_and_are_tested_on_held_out_images(ways, held, digits, monkeypatch):
    seen = {}

    def start(loaders, networks, source, config, **options):
        training = start_training(loaders, networks, source, config, **options)
        seen[name] = training.course.steps, len(training.test.targets), len(loaders[0].targets)
        return training

    start_training = module.start_training
    monkeypatch.setattr(module, "start_training", start)
    found = ways()
    for name in (*PROXIES, FULL):
        found[name].score(SPACES["convnet"], ARCHITECTURE, quiet)
    rest, real = len(held.test), len(held.train)
    batches = -(-real // 50)
    assert seen == {
        "distilled": (18, rest, 120),
        "random": (18, rest, 120),
        "early": (18, rest, real),
        FULL: (batches, len(digits.test), real),
    }


def test_a_score_is_that_of_the_protocol_with_the_same_seed(ways, held):
    dataset, network = ways.dataset, NetworkConfig(**ARCHITECTURE)
    loaders = [
        dataset.with_labels("hard").loader(50, augment=CONFIG.augment, seed=seed_at(5, repeat))
        for repeat in (0, 1)
    ]
    expected = [
        train_and_test(loader, 6, held, CONFIG, network, seed_at(5, repeat))[0]
        for repeat, loader in enumerate(loaders)
    ]
    got = ways()["distilled"].score(SPACES["convnet"], ARCHITECTURE, quiet).accuracies
    assert got == expected
    assert len(set(got)) == 2


@pytest.mark.parametrize(("batch_size", "images"), [(50, 50), (500, 120)])
def test_early_stopping_sees_as_many_images_in_a_step_as_there_are_distilled_ones(ways, batch_size, images):
    found = ways(dataclasses.replace(CONFIG, batch_size=batch_size))
    (loader,) = found["early"].loaders([0])
    assert loader.batch_size == images
    steps = found["distilled"].epochs * len(found["distilled"].loaders([0])[0])
    assert found["early"].epochs * len(loader) == pytest.approx(steps)
    assert 0 < found["early"].epochs < 1  # it ends within the first pass over all images
    assert found[FULL].loaders([0])[0].batch_size == batch_size


@pytest.mark.parametrize("epochs", [5, 10])
def test_the_rate_is_halved_at_each_fifth_of_the_steps(ways, held, epochs):
    config, network = dataclasses.replace(CONFIG, epochs=epochs), SPACES["convnet"].network
    shape = {"channels": 1, "size": (8, 8), "classes": 10}
    loaders = ways(config)["distilled"].loaders([0])
    training = module.start_training(
        loaders, [network(ARCHITECTURE, **shape, seed=0)], held, config, epochs=epochs, checks=1
    )
    steps = 3 * epochs
    assert training.course.steps == steps
    halvings = [training.rate(step) / config.learning_rate for step in range(steps)]
    assert halvings == [0.5 ** (5 * step // steps) for step in range(steps)]


def test_copies_of_random_images_have_the_labels_of_the_images(held, pool):
    options = {"ipc": 3, "seed": 7, "device": "cpu", "labels": "soft", "pool": pool}
    once, twice = (random_subset(held, copies=copies, **options) for copies in (1, 2))
    assert len(once) == 30
    assert torch.equal(twice.images, torch.cat([once.images] * 2))
    assert torch.equal(twice.soft_targets, torch.cat([once.soft_targets] * 2))


def test_one_network_for_two_trainings_at_once_is_refused(ways):
    only = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 10))
    space = Space({"x": (1,)}, lambda x, **size: only)
    with pytest.raises(UsageError, match="returned the same network twice"):
        ways(dataclasses.replace(CONFIG, at_once=2))["distilled"].score(space, {"x": 1}, quiet)


@pytest.mark.parametrize("labels", ["hard", "soft"])
def test_random_images_have_labels_of_the_kind_that_the_distilled_ones_have(ways, held, pool, labels):
    hotter = dataclasses.replace(ways.dataset.info, labels={"temperature": 2.0})
    dataset = DistilledDataset(dataclasses.replace(ways.dataset.artifact, metadata=hotter))
    (loader,) = ways(dataset=dataset, labels=labels, pool=pool)["random"].loaders([3])
    options = {"labels": labels, "pool": pool, "temperature": 2.0, "copies": 4}
    subset = random_subset(held, ipc=3, seed=3, device="cpu", **options)
    expected = subset.loader(50, augment=CONFIG.augment, seed=3)
    for (images, targets), (others, other_targets) in zip(loader, expected, strict=True):
        assert torch.equal(images, others)
        assert torch.equal(targets, other_targets)


@pytest.mark.parametrize("factor", [1, 2, 4])
def test_random_images_are_as_many_as_there_are_tiles(ways, factor):
    packed = dataclasses.replace(ways.dataset.info, factor=factor)
    dataset = DistilledDataset(dataclasses.replace(ways.dataset.artifact, metadata=packed))
    (loader,) = ways(dataset=dataset)["random"].loaders([0])
    assert loader.count == len(dataset) == 30 * factor**2


def test_random_images_come_in_batches_like_those_of_the_tiles(ways, held):
    distilled, random = (ways()[name].loaders([3])[0] for name in ("distilled", "random"))
    assert [len(images) for images, _ in random] == [len(images) for images, _ in distilled] == [50, 50, 20]
    images, counts = random.images.unique(dim=0, return_counts=True)
    assert counts.tolist() == [4] * 30
    assert torch.equal(images, random_subset(held, ipc=3, seed=3, device="cpu").images.unique(dim=0))


def test_checks_are_heard_of_the_first_network_whatever_is_trained_beside_it(ways):
    heard = []
    scores = ways(checks=3)["distilled"].score(SPACES["convnet"], ARCHITECTURE, heard.append).accuracies
    assert len(heard) == 3
    assert heard[-1] == pytest.approx(scores[0], abs=1e-3)
    heard.clear()
    together = ways(dataclasses.replace(CONFIG, at_once=2), checks=3)["distilled"]
    scores = together.score(SPACES["convnet"], ARCHITECTURE, heard.append).accuracies
    assert len(heard) == 3
    assert heard[-1] == pytest.approx(scores[0], abs=1e-3)
    assert scores[0] != scores[1]
    with pytest.raises(UsageError, match="19 checks of a training need as many steps; 6 epochs have 18"):
        ways(checks=19)


@pytest.mark.parametrize("at_once", [1, 2])
def test_the_losses_are_means_of_the_last_quarter_of_the_steps_the_lowest_at_any_scale_of_the_logits(
    ways, monkeypatch, at_once
):
    found, scales = [], [2.0**k for k in range(-8, 4)]

    def seen(training, epoch, batch):
        images, targets = training.batches.at(epoch, batch, training.course.steps)
        before = training.networks.weights.detach().clone()
        descend(training, epoch, batch)
        after = training.networks.weights.detach().clone()
        with torch.no_grad():
            training.networks.weights.copy_(before)
            logits = training.networks(images)
            training.networks.weights.copy_(after)
        pairs = zip(logits, targets, strict=True)
        loss = torch.nn.functional.cross_entropy
        found.append([[loss(scale * row, target).item() for scale in scales] for row, target in pairs])

    descend = module_of_training.Training._descend
    monkeypatch.setattr(module_of_training.Training, "_descend", seen)
    proxy = ways(dataclasses.replace(CONFIG, at_once=at_once))["distilled"]
    losses = proxy.score(SPACES["convnet"], ARCHITECTURE | {"norm": "none"}, quiet).losses
    steps = torch.tensor(found).view(-1, 18, at_once, len(scales))[:, -5:]  # of 18 a quarter is 4.5
    means = steps.mean(1).view(2, len(scales))
    assert losses == pytest.approx(means.amin(1).tolist(), rel=1e-5)
    assert means.argmin(1).tolist() != [scales.index(1)] * 2


def test_a_loss_that_is_no_number_is_the_highest(ways):
    class Masked(torch.nn.Linear):
        def forward(self, images):
            return super().forward(images.flatten(1)).masked_fill(torch.arange(10) == 0, -math.inf)

    space = Space({"a": (1,)}, lambda channels, size, classes, a: Masked(channels * math.prod(size), classes))
    scores = ways()["distilled"].score(space, {"a": 1}, quiet)
    assert min(scores.accuracies) > 0
    assert scores.losses == [torch.finfo(torch.float32).max] * 2


@pytest.mark.parametrize(("at_once", "sizes"), [(0, [2, 1]), (1, [1, 1, 1]), (3, [3])])
def test_networks_of_a_candidate_are_trained_together_as_many_as_said_or_as_is_fastest(
    ways, monkeypatch, at_once, sizes
):
    found = []

    def start(loaders, networks, *arguments, **options):
        found.append(len(networks))
        return start_training(loaders, networks, *arguments, **options)

    start_training = module.start_training
    monkeypatch.setattr(module, "start_training", start)
    monkeypatch.setattr(module, "trained_at_once", lambda *_: 2)
    config = dataclasses.replace(CONFIG, epochs=1, repeats=3, at_once=at_once)
    ways(config)["distilled"].score(SPACES["convnet"], ARCHITECTURE, quiet)
    assert found == sizes


def test_a_network_that_diverges_says_so(ways):
    wild = dataclasses.replace(CONFIG, learning_rate=1e30, repeats=1)
    with pytest.raises(DivergenceError, match=r"network 0 diverged before step 18"):
        ways(wild)["distilled"].score(SPACES["convnet"], ARCHITECTURE | {"norm": "none"}, quiet)


def test_a_network_whose_logits_are_no_numbers_when_it_is_tested_has_diverged(ways):
    class Broken(torch.nn.Linear):
        def forward(self, images):
            return super().forward(images.flatten(1)) * (1 if self.training else float("nan"))

    space = Space({"x": (1,)}, lambda channels, size, classes, x: Broken(64, classes))
    with pytest.raises(DivergenceError, match="network 0 diverged"):
        ways()["distilled"].score(space, {"x": 1}, quiet)


def test_a_stop_is_answered_in_the_middle_of_a_training(ways):
    with pytest.raises(Stopped, match=r"distilled .*'width': 8.* epoch 1 of 6"):
        ways()["distilled"].score(SPACES["convnet"], ARCHITECTURE, quiet, stop=StopAfter(4))


class Drawing(torch.nn.Sequential):
    """A module that draws at random when it is trained, by torch, Python and numpy."""

    def __init__(self, inputs, classes):
        super().__init__(torch.nn.Flatten(), torch.nn.Dropout(0.3), torch.nn.Linear(inputs, classes))

    def forward(self, images):
        logits = super().forward(images)
        return logits * random.gauss() * np.random.standard_normal() if self.training else logits


DRAWING = Space({"x": (1,)}, lambda channels, size, classes, x: Drawing(64, classes))


@pytest.mark.parametrize("at_once", [1, 2])
def test_a_training_stopped_again_and_again_comes_to_the_same_in_another_process(ways, tmp_path, at_once):
    config, told = dataclasses.replace(CONFIG, at_once=at_once), []
    whole = ways(config, checks=3)["random"].score(DRAWING, {"x": 1}, told.append)
    stops, heard = [], []
    while True:
        heard.append([])
        stops.append(StopAfter(5))
        try:
            proxy = ways(config, checks=3, folder=tmp_path)["random"]
            found = proxy.score(DRAWING, {"x": 1}, heard[-1].append, stop=stops[-1])
            break
        except Stopped:
            assert {path.name.split("-")[0] for path in tmp_path.iterdir()} == {"random"}
    assert sum(stop.asked for stop in stops) == 36 // at_once + len(stops) - 1  # no step was taken twice
    assert len(stops) > 3
    assert (found.accuracies, found.losses) == (whole.accuracies, whole.losses)
    assert heard[-1] == told  # the last process knows all that the first network got on the way
    assert found.before > 0


def test_the_seconds_before_a_stop_are_those_of_the_networks_that_were_done_too(ways, tmp_path):
    class Slow(torch.nn.Linear):
        def forward(self, images):
            time.sleep(0.02 * self.training)
            return super().forward(images.flatten(1))

    space = Space({"x": (1,)}, lambda channels, size, classes, x: Slow(64, classes))
    with pytest.raises(Stopped, match="network 1, epoch 0"):
        ways(folder=tmp_path)["distilled"].score(space, {"x": 1}, quiet, stop=StopAfter(19))
    found = ways(folder=tmp_path)["distilled"].score(space, {"x": 1}, quiet)
    assert found.before > 19 * 0.02


def test_what_a_stopped_training_left_is_used_for_that_candidate_alone(ways, tmp_path):
    def stopped(name, architecture, config=CONFIG):
        with pytest.raises(Stopped):
            ways(config, folder=tmp_path)[name].score(
                SPACES["convnet"], architecture, quiet, stop=StopAfter(2)
            )
        return sum(".previous" not in path.name for path in tmp_path.iterdir())

    assert stopped("distilled", ARCHITECTURE) == 1
    assert stopped("random", ARCHITECTURE) == 2
    assert stopped("distilled", ARCHITECTURE | {"depth": 1}) == 3
    assert stopped("distilled", ARCHITECTURE, dataclasses.replace(CONFIG, learning_rate=0.5)) == 4


def test_what_is_kept_of_a_candidate_is_removed_when_it_is_forgotten(ways, tmp_path):
    way, other = ways(folder=tmp_path)["distilled"], ARCHITECTURE | {"depth": 1}
    for architecture in (ARCHITECTURE, other):
        with pytest.raises(Stopped):
            way.score(SPACES["convnet"], architecture, quiet, stop=StopAfter(2))
    kept = set(tmp_path.iterdir())
    way.forget(SPACES["convnet"], other)
    assert len(set(tmp_path.iterdir())) == len(kept) / 2
    way.forget(SPACES["convnet"], ARCHITECTURE)
    assert not set(tmp_path.iterdir())
    way.forget(SPACES["convnet"], ARCHITECTURE)
    ways()["distilled"].forget(SPACES["convnet"], ARCHITECTURE)


@pytest.mark.parametrize("late", [False, True], ids=["told a check", "told the score"])
def test_a_storage_that_fails_when_it_is_told_what_a_training_came_to_costs_no_training(
    ways, tmp_path, monkeypatch, late
):
    for each in (module_of_training, module_of_progress):
        monkeypatch.setattr(each, "CHECKPOINT_SECONDS", 0.0)
    candidate, storage = {"x": 1}, f"sqlite:///{tmp_path / 'search.db'}"
    folder, other = tmp_path / "trainings", sqlite3.connect(tmp_path / "search.db", isolation_level=None)
    way, stop = ways(checks=3, folder=folder)["distilled"], StopAfter(1000)
    with monkeypatch.context() as patch:
        patch.setattr(module_of_search, "BUSY_SECONDS", 0.01)
        study = open_studies(storage, {"x": "exhaustive"})["x"]
    recorded = partial(way.forget, DRAWING)

    def score(architecture, check):
        def told(accuracy):
            heard.append(accuracy)
            if len(heard) == 2 and not late:
                other.execute("begin immediate")
            check(accuracy)

        heard = []
        scores = way.score(DRAWING, architecture, told, stop)
        if late:
            other.execute("begin immediate")
        return scores

    with pytest.raises(OutputError, match="database is locked"):
        search(study, DRAWING, [candidate], score, recorded=recorded)
    other.close()
    study = open_studies(storage, {"x": "exhaustive"})["x"]  # as patient as ever: a disk may be busy
    assert list(folder.iterdir())
    for trial in study.get_trials(deepcopy=False):
        if not trial.state.is_finished():
            study.tell(trial.number, state=TrialState.FAIL)  # as a minute later, when it is taken for dead
    again = partial(way.score, DRAWING, stop=stop)
    (found,) = search(study, DRAWING, [candidate], again, recorded=recorded)
    whole = ways(checks=3)["distilled"].score(DRAWING, candidate, quiet)
    assert (found.accuracies, found.losses) == ([*whole.accuracies], [*whole.losses])
    assert stop.asked == 2 * 18 + (not late)  # but for the step whose check was told, none was taken twice
    assert not list(folder.iterdir())


def test_a_damaged_training_begins_anew(ways, tmp_path):
    way = ways(folder=tmp_path)["distilled"]
    whole = ways()["distilled"].score(SPACES["convnet"], ARCHITECTURE, quiet)
    with pytest.raises(Stopped):
        way.score(SPACES["convnet"], ARCHITECTURE, quiet, stop=StopAfter(2))
    for path in tmp_path.iterdir():
        path.write_bytes(path.read_bytes()[:-9])
    with pytest.warns(UserWarning, match=r"not a whole checkpoint .* This training begins anew\."):
        assert way.score(SPACES["convnet"], ARCHITECTURE, quiet).accuracies == whole.accuracies


def test_a_full_disk_stops_no_training(ways, tmp_path, monkeypatch):
    monkeypatch.setattr(module_of_training, "CHECKPOINT_SECONDS", 0.0)
    whole = ways()["distilled"].score(SPACES["convnet"], ARCHITECTURE, quiet)
    with full_disk(100), pytest.warns(UserWarning, match=r"could not write .* This run goes on without it\."):
        found = ways(folder=tmp_path)["distilled"].score(SPACES["convnet"], ARCHITECTURE, quiet)
    assert found.accuracies == whole.accuracies


def test_a_module_of_the_user_can_be_stacked_with_others(ways):
    def net(channels, size, classes, hidden):
        layers = torch.nn.Linear(channels * size[0] * size[1], hidden), torch.nn.Linear(hidden, classes)
        return torch.nn.Sequential(torch.nn.Flatten(), *layers)

    space = Space({"hidden": (4, 6)}, net)
    alone = ways()["distilled"].score(space, {"hidden": 6}, quiet)
    at_once = ways(dataclasses.replace(CONFIG, at_once=2))["distilled"].score(space, {"hidden": 6}, quiet)
    assert at_once.accuracies == pytest.approx(alone.accuracies, abs=2)
    assert at_once.losses == pytest.approx(alone.losses, rel=1e-4)


def test_the_truth_of_another_test_set_is_another(digits):
    rest = digits.test.where(torch.arange(len(digits.test)) > 0)
    other = Source.from_splits(digits.origin, digits.classes, digits.train, rest)
    found = [splits(real, hold_out(digits, 0.2), 0.2) for real in (digits, other)]
    assert found[0][0].fingerprint == found[1][0].fingerprint  # a set made with a split has not seen it
    assert found[0][1].fingerprint != found[1][1].fingerprint


def test_random_images_with_labels_of_another_teacher_are_scored_anew(ways, held, pool):
    options = {"dataset": random_subset(held, ipc=3, seed=7, device="cpu", labels="soft", pool=pool)}
    options["labels"] = "soft"
    other = dataclasses.replace(pool, trajectory=pool.trajectory + 0.1)
    base, changed = (ways(pool=one, **options) for one in (pool, other))
    found = [way for way in (*PROXIES, FULL) if base[way].identity != changed[way].identity]
    assert found == ["random"]
    hotter = random_subset(held, ipc=3, seed=7, device="cpu", labels="soft", pool=pool, temperature=2.0)
    assert hotter.content_hash == options["dataset"].content_hash
    changed = ways(pool=pool, labels="soft", dataset=hotter)
    found = [way for way in (*PROXIES, FULL) if base[way].identity != changed[way].identity]
    assert found == ["distilled", "random"]


def test_the_same_images_packed_otherwise_are_scored_anew(ways):
    config, artifact = dataclasses.replace(CONFIG, batch_size=500), ways.dataset.artifact
    info = dataclasses.replace(artifact.metadata, factor=1)
    other = DistilledDataset(dataclasses.replace(artifact, metadata=info))
    assert other.content_hash == ways.dataset.content_hash
    base, changed = ways(config), ways(config, dataset=other)
    assert base["distilled"].identity["steps"] == changed["distilled"].identity["steps"]
    found = [way for way in (*PROXIES, FULL) if base[way].identity != changed[way].identity]
    assert found == ["distilled", "random", "early"]


def test_everything_that_decides_a_score_is_in_its_identity(ways, held, digits):
    base = {name: way.identity for name, way in ways().items()}
    for field, value in {
        "epochs": 8,
        "learning_rate": 0.5,
        "augment": "none",
        "cutmix": 0.0,
        "repeats": 3,
    }.items():
        other = ways(dataclasses.replace(CONFIG, **{field: value}))
        assert all(other[name].identity != base[name] for name in PROXIES)
    longer = ways(dataclasses.replace(CONFIG, full_epochs=9))
    assert longer[FULL].identity != base[FULL]
    assert [longer[name].identity for name in PROXIES] == [base[name] for name in PROXIES]
    others = {
        "images": ("source", dataclasses.replace(held, fingerprint="another")),
        "mean": ("source", dataclasses.replace(held, mean=(0.5,))),
        "std": ("source", dataclasses.replace(held, std=(0.5,))),
        "truth": (
            "test",
            dataclasses.replace(held, test=digits.test, split=digits.split, fingerprint="another"),
        ),
    }
    changed = {
        name: [way for way, found in ways(**{option: other}).items() if found.identity != base[way]]
        for name, (option, other) in others.items()
    }
    assert changed == {name: [*PROXIES, FULL] for name in ("images", "mean", "std")} | {"truth": [FULL]}
    assert "set" not in base["early"]  # other sets of as many steps share what they are compared with
    assert not {"set", "ipc", "steps"} & set(base[FULL])
