"""The loader: every sample once per epoch, addressed randomness, nothing but a gather away from the set."""

import pytest
import torch

from distilled_data import DistilledDataset, UnknownNameError, UsageError
from distilled_data.loader import Loader


@pytest.fixture
def data(artifact) -> DistilledDataset:
    return DistilledDataset(artifact)


def counting(samples: int = 10, **options) -> Loader:
    """Sample i is an image whose every pixel comes out as i, with the target 100 + i."""
    images = torch.arange(samples, dtype=torch.uint8).view(-1, 1, 1, 1).expand(-1, 1, 8, 8)
    options = {"batch_size": 4, "size": (8, 8), "mean": (0.0,), "std": (1 / 255,)} | options
    return Loader(images, 100 + torch.arange(samples), **options)


def epoch(loader: Loader) -> torch.Tensor:
    return torch.cat([images for images, _ in loader])


def order(loader: Loader) -> list[int]:
    return torch.cat([targets for _, targets in loader]).sub(100).tolist()


@pytest.mark.parametrize(
    ("samples", "batch_size", "drop_last", "sizes"),
    [
        (10, 4, False, [4, 4, 2]),
        (10, 4, True, [4, 4]),
        (8, 4, False, [4, 4]),
        (8, 4, True, [4, 4]),
        (3, 4, False, [3]),
        (3, 4, True, []),
        (3, 1, False, [1, 1, 1]),
    ],
)
def test_length_is_the_number_of_batches_of_an_epoch(samples, batch_size, drop_last, sizes):
    loader = counting(samples, batch_size=batch_size, drop_last=drop_last)
    assert len(loader) == len(sizes)
    assert [len(images) for images, _ in loader] == sizes


def test_every_sample_comes_once_per_epoch_with_its_own_target():
    loader = counting()
    for _ in range(3):
        images, targets = (torch.cat(parts) for parts in zip(*loader, strict=True))
        assert sorted(targets.tolist()) == list(range(100, 110))
        assert torch.allclose(images, (targets - 100.0).view(-1, 1, 1, 1).expand_as(images), atol=1e-4)


def test_drop_last_leaves_out_other_samples_in_each_epoch():
    loader = counting(drop_last=True)
    left_out = [set(range(10)) - set(order(loader)) for _ in range(10)]
    assert all(len(samples) == 2 for samples in left_out)
    assert set.union(*left_out) > left_out[0]


def test_unshuffled_samples_come_in_their_own_order_in_every_epoch():
    loader = counting(shuffle=False)
    assert order(loader) == order(loader) == list(range(10))


@pytest.mark.parametrize("shuffle", [True, False])
def test_equal_seeds_give_equal_order_and_augmentation_in_every_epoch(data, shuffle):
    first, second = (data.loader(20, seed=3, augment="dsa", shuffle=shuffle) for _ in range(2))
    for _ in range(3):
        for (images, targets), (others, other_targets) in zip(first, second, strict=True):
            assert torch.equal(images, others)
            assert torch.equal(targets, other_targets)


def test_order_differs_between_epochs_and_seeds():
    one, two = counting(seed=1), counting(seed=2)
    orders = [tuple(order(loader)) for loader in (one, one, one, two, two)]
    assert len(set(orders)) == len(orders)


def test_augmentation_differs_between_epochs_and_seeds(data):
    one, two = (data.loader(48, augment="color", shuffle=False, seed=seed) for seed in (1, 2))
    epochs = [epoch(loader) for loader in (one, one, two, two)]
    for index, images in enumerate(epochs):
        assert all(not torch.allclose(images, other, atol=1e-2) for other in epochs[:index])


def test_augmentation_differs_between_batches_and_between_images_of_a_batch():
    images = torch.arange(64).to(torch.uint8).view(1, 1, 8, 8).repeat(4, 1, 1, 1)
    loader = Loader(
        images,
        torch.zeros(4),
        size=(8, 8),
        mean=(0.1,),
        std=(0.1,),
        batch_size=2,
        augment="color",
        shuffle=False,
    )
    augmented = epoch(loader)
    assert len(augmented.flatten(1).unique(dim=0)) == 4


def test_batches_do_not_depend_on_torchs_own_generator_and_do_not_advance_it(data):
    torch.manual_seed(0)
    first, state = epoch(data.loader(20, augment="dsa")), torch.get_rng_state()
    torch.manual_seed(0)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(1)
    assert torch.equal(epoch(data.loader(20, augment="dsa")), first)


def test_an_epoch_broken_off_counts_and_the_next_one_is_whole():
    broken, whole = counting(), counting()
    next(iter(broken))
    order(whole)
    assert order(broken) == order(whole)


def test_a_callable_is_given_the_normalised_enlarged_batch_and_what_it_returns_is_the_batch(data):
    seen = []

    def negative(images):
        seen.append(images)
        return -images

    plain = epoch(data.loader(20))
    assert torch.equal(epoch(data.loader(20, augment=negative)), -plain)
    assert torch.equal(torch.cat(seen), plain)


def test_an_unknown_strategy_is_refused_and_names_the_close_ones(data):
    with pytest.raises(UnknownNameError, match="Did you mean 'cutout'"):
        next(iter(data.loader(augment="color_cutot")))


@pytest.mark.parametrize("labels", ["soft", "logits", "hard"])
def test_batches_without_augmentation_hold_the_samples_of_the_set(data, labels):
    data = data.with_labels(labels)
    start = 0
    for images, targets in data.loader(20, shuffle=False):
        samples = data.__getitems__(list(range(start, start + len(images))))
        assert torch.allclose(images, torch.stack([image for image, _ in samples]), atol=1e-5)
        assert images.dtype == torch.float32
        expected = [label for _, label in samples]
        assert torch.equal(targets, torch.tensor(expected) if labels == "hard" else torch.stack(expected))
        start += len(images)
    assert start == len(data)


def test_targets_are_probabilities_logits_or_class_numbers(data):
    kinds = {
        labels: next(iter(data.with_labels(labels).loader(7)))[1] for labels in ("soft", "logits", "hard")
    }
    assert torch.allclose(kinds["soft"].sum(1), torch.ones(7))
    assert kinds["logits"].shape == kinds["soft"].shape == (7, 4)
    assert torch.allclose((kinds["logits"] / 2.0).softmax(1), kinds["soft"])
    assert (kinds["hard"].shape, kinds["hard"].dtype) == ((7,), torch.int64)


def test_images_are_normalised_by_channel():
    images = torch.tensor([0, 51, 255], dtype=torch.uint8).view(1, 3, 1, 1)
    loader = Loader(
        images, torch.zeros(1), size=(1, 1), mean=(0.5, 0.2, 0.0), std=(0.5, 0.1, 0.25), batch_size=1
    )
    assert epoch(loader).flatten().tolist() == pytest.approx([-1, 0, 4], abs=1e-5)


def test_tiles_between_the_bytes_are_taken_as_they_are():
    tiles = torch.tensor([0.25, 0.75]).view(2, 1, 1, 1)
    loader = Loader(
        tiles, torch.zeros(2), size=(1, 1), mean=(0.0,), std=(1 / 255,), batch_size=2, shuffle=False
    )
    assert epoch(loader).flatten().tolist() == pytest.approx([0.25, 0.75], abs=1e-5)


def test_changing_a_batch_changes_nothing_in_the_set(data):
    loader = data.loader(48, shuffle=False)
    before = epoch(loader)
    for images, targets in loader:
        images.zero_()
        targets.zero_()
    images, targets = next(iter(loader))
    assert torch.equal(images, before)
    assert torch.equal(targets, data.soft_targets)


@pytest.mark.parametrize("batch_size", [0, -1])
def test_a_batch_size_below_one_is_refused(data, batch_size):
    with pytest.raises(UsageError, match=f"1 or more, got {batch_size}"):
        data.loader(batch_size)


def test_an_unknown_strategy_is_refused_before_the_first_batch(artifact):
    with pytest.raises(UnknownNameError):
        DistilledDataset(artifact).loader(augment="cutot")


@pytest.mark.parametrize("batch_size", [2.5, "4", None])
def test_a_batch_size_that_is_no_whole_number_is_refused(artifact, batch_size):
    with pytest.raises(UsageError):
        DistilledDataset(artifact).loader(batch_size)
