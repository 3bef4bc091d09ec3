"""What a set was made of, found again: the right images, read as they were then, or a word about it."""

import dataclasses

import pytest
from artifacts import DIGITS, make_artifact

from distilled_data import DistilledDataset, SourceError, UsageError
from ncfm_engine.config import NetworkConfig, PretrainConfig, Recipe
from ncfm_engine.origin import real_images, recipe_of, teacher_pool
from ncfm_engine.sources import PLACES, SOURCES, hold_out, load_source
from ncfm_engine.stop import Stopped, StopRequest


@pytest.fixture
def small():
    """The digits in 6 x 6 pixels."""
    return load_source("digits", size=6)


def made_of(source, dataset="digits", validation=0.0, classes=DIGITS, **more) -> DistilledDataset:
    """A set that says that it was distilled from `source`."""
    recipe = {"settings": dataclasses.asdict(Recipe(ipc=2, seed=5, validation=validation))}
    origin = {"id": source.origin.id, "fingerprint": source.fingerprint} | more
    return DistilledDataset(make_artifact(2, classes=classes, dataset=dataset, source=origin, recipe=recipe))


def test_real_images_are_read_as_the_set_says_they_were(small):
    data = made_of(small, reading={"size": 6, "unknown": 1})
    assert [found.fingerprint for found in real_images(data, None, None)] == [small.fingerprint] * 2
    assert real_images(data, "digits", {"fit": "crop"})[0].fingerprint == small.fingerprint
    with pytest.raises(SourceError, match=r"is not the data .* It was read with --size 6, no --channels\."):
        real_images(data, None, {"size": 8, "channels": 3, "workers": 0})
    with pytest.raises(SourceError, match=r" It was read with no --channels\.$"):
        real_images(data, None, {"size": 6, "channels": 3})
    for nothing in ({}, {"reading": ["size"]}, {"reading": None}):
        with pytest.raises(SourceError, match=f"expected fingerprint {small.fingerprint}, got [0-9a-f]*[.]$"):
            real_images(made_of(small, **nothing), None, None)


def test_a_stop_is_heard_while_real_images_are_prepared(digits):
    foreign = DistilledDataset(make_artifact(2, classes=tuple("0123456789")))
    for size, data in enumerate((made_of(digits), foreign), start=6):
        with pytest.raises(Stopped):
            real_images(data, "digits", {"size": size}, stop=StopRequest(0))


def test_a_validation_split_is_cut_off_again_and_the_whole_is_given_beside_it(digits):
    seen = hold_out(digits, 0.25)
    whole, found = real_images(made_of(seen, validation=0.25), None, None)
    assert (whole.fingerprint, found.fingerprint) == (digits.fingerprint, seen.fingerprint)
    assert found.split == "validation 0.25"


def test_a_set_of_some_classes_or_of_another_order_is_refused(digits):
    data = made_of(digits, classes=digits.classes)
    assert real_images(data, None, None)[0].fingerprint == digits.fingerprint
    for part in ([3, 5], [*range(1, 10), 0]):
        with pytest.raises(SourceError, match=r"others, or in another order, .* of digits: .* set of all of"):
            real_images(data.select(classes=part), None, None)


def test_a_store_is_taken_as_it_is(small, tmp_path):
    load_source("digits", size=6, store=tmp_path / "store")
    data = made_of(small, reading={"size": 6})
    assert real_images(data, f"store:{tmp_path}/store", None)[0].fingerprint == small.fingerprint


def test_a_fit_that_was_recorded_without_a_size_changes_nothing(digits):
    data = made_of(digits, reading={"fit": "squash"})
    assert real_images(data, None, None)[0].fingerprint == digits.fingerprint


@pytest.mark.parametrize(
    ("dataset", "origin", "place"),
    [
        ("digits", "folder:digits", "folder:PATH"),
        ("flowers", "hf:org/flowers", r"hf:REPO\[:CONFIG"),
        ("flowers", "torchvision:Flowers", "torchvision:PLACE"),
        ("npz", "uci:npz", "uci:PLACE"),
    ],
)
def test_an_artifact_does_not_say_which_place_is_read(digits, dataset, origin, place):
    data = made_of(digits, dataset, id=origin)
    with pytest.raises(UsageError, match=f"was distilled from {origin}; name it with --dataset {place}"):
        real_images(data, None, None)
    assert real_images(data, "digits", None)[0].fingerprint == digits.fingerprint


def test_real_images_of_another_project_s_set_have_to_be_named_and_to_fit():
    foreign = DistilledDataset(make_artifact(2, classes=tuple("0123456789")))
    with pytest.raises(UsageError, match=r"does not record .*--dataset: digits, .*svhn, folder:PATH"):
        real_images(foreign, None, None)
    real, seen = real_images(foreign, "digits", None)
    assert real is seen
    with pytest.raises(SourceError, match=r"\[10, 1, 8, 8\], got \[10, 1, 6, 6\]\. Resize them: --size 8\."):
        real_images(foreign, "digits", {"size": 6})
    with pytest.raises(SourceError, match=r"\[10, 1, 8, 8\], got \[10, 3, 8, 8\]\.$"):
        real_images(foreign, "digits", {"channels": 3})
    with_names = DistilledDataset(make_artifact(2, classes=DIGITS))
    assert real_images(with_names, "digits", None)[0].classes[1] == "1"
    padded = [f"class{number:02d}" for number in range(1, 11)]
    real_images(DistilledDataset(make_artifact(2, classes=tuple(padded))), "digits", None)
    unpadded = sorted(f"class{number}" for number in range(1, 11))
    with pytest.raises(SourceError, match=r"of their names, class1, class10, class2, .* not of the numbers"):
        real_images(DistilledDataset(make_artifact(2, classes=tuple(unpadded))), "digits", None)
    turned = DistilledDataset(make_artifact(2, classes=tuple("9876543210")))
    with pytest.raises(SourceError, match="are others, or in another order"):
        real_images(turned, "digits", None)


def test_a_set_s_recipe_is_its_own_or_that_of_its_like(digits):
    own = recipe_of(made_of(digits))
    assert (own.ipc, own.seed) == (2, 5)
    for logits, labels in ((True, ("hard", "soft")), (False, ("hard",))):
        like = recipe_of(DistilledDataset(make_artifact(3, logits=logits)))
        assert (like.ipc, like.distill.factor, like.evaluate.labels) == (3, 2, labels)


def test_another_project_s_set_has_the_recipe_of_the_real_images_whatever_it_is_called(digits):
    theirs = DistilledDataset(make_artifact(2, dataset="images_best"))
    assert recipe_of(theirs, "digits").evaluate.augment == "color_crop|scale|rotate"  # without a flip
    assert recipe_of(theirs).evaluate.augment.startswith("flip")
    tiny = DistilledDataset(make_artifact(2, dataset="tinyimagenet"))
    assert recipe_of(tiny, "folder:photos").network.depth == recipe_of(tiny).network.depth == 4
    assert recipe_of(made_of(digits), "mnist").seed == 5


@pytest.mark.parametrize("name", [*(name for name in SOURCES if name not in PLACES), "MNIST", "images_best"])
def test_the_loader_of_another_project_s_set_augments_as_its_evaluation_does(name):
    theirs = DistilledDataset(make_artifact(2, dataset=name))
    strategy = recipe_of(theirs, name.lower()).evaluate.augment
    assert theirs.loader(augment="dsa").augment == theirs.select(1).loader(augment="dsa").augment == strategy
    assert ("flip" in strategy) == (name.lower() not in ("digits", "mnist", "svhn"))


def test_the_teacher_is_the_one_that_the_recipe_trains_and_another_one_is_told(digits, pool, tmp_path):
    recipe = Recipe(2, network=NetworkConfig(width=8, depth=2), pretrain=PretrainConfig(networks=2, epochs=1))
    settings = {"settings": dataclasses.asdict(recipe)}  # by which `pool` was trained

    def teacher(weights):
        labels = {"teacher": {"weights_sha256": weights}} if weights else {}
        data = DistilledDataset(make_artifact(2, recipe=settings, labels=labels))
        return teacher_pool(data, digits, device="cpu", cache=tmp_path)

    assert teacher(pool.weights_hash).weights_hash == pool.weights_hash
    for other in ("of elsewhere", None):
        with pytest.warns(UserWarning, match=f"the teacher of the set of digits .*weights {other}") as told:
            assert teacher(other).weights_hash == pool.weights_hash
        assert told[0].filename == __file__


def test_the_teacher_of_random_images_beside_another_project_s_set_is_told_before_it_is_trained(
    digits, tmp_path
):
    theirs = DistilledDataset(make_artifact(2, dataset="images_best"))
    options = {"device": "cpu", "cache": tmp_path, "stop": StopRequest(0)}
    told = pytest.warns(UserWarning, match=r"labels of 5 of our own, trained for 30 epochs, .* need none")
    with told, pytest.raises(Stopped):
        teacher_pool(theirs, digits, dataset="digits", **options)
