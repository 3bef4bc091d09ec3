"""The loader: every sample once per epoch, addressed randomness, nothing but a gather away from the set."""

import io
import pickle
import random
import re

import numpy as np
import pytest
import torch
from children import context
from torch.utils._python_dispatch import TorchDispatchMode

from distilled_data import DistilledDataset, UnknownNameError, UsageError
from distilled_data.loader import Loader
from distilled_data.randomness import generator_at, seeded


def counting(samples: int = 10, **options) -> Loader:
    """Sample i is an image whose every pixel comes out as i, with the target 100 + i."""
    images = torch.arange(samples, dtype=torch.uint8).view(-1, 1, 1, 1).expand(-1, 1, 8, 8)
    options = {"batch_size": 4, "mean": (0.0,), "std": (1 / 255,)} | options
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


@pytest.mark.parametrize(("labels", "mix"), [("soft", "cutmix"), ("hard", "mixup"), ("logits", None)])
def test_no_batch_waits_for_the_device(data, labels, mix):
    # tensors on "meta" have no values: reading one on the host raises
    loader = data.with_labels(labels).loader(20, device="meta", augment="dsa", mix=mix)
    assert [len(images) for images, _ in loader] == [20, 20, 8]


class Copies(TorchDispatchMode):
    """Counts copies that nobody waits for, and tensors of float64, which "mps" has not."""

    def __init__(self):
        super().__init__()
        self.unawaited, self.doubles = 0, 0

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        made = function(*arguments, **(options or {}))
        self.unawaited += bool((options or {}).get("non_blocking"))
        self.doubles += isinstance(made, torch.Tensor) and made.dtype == torch.float64
        return made


@pytest.mark.parametrize(("labels", "mix"), [("soft", "cutmix"), ("hard", "mixup"), ("logits", None)])
def test_a_device_other_than_cudas_is_waited_for_and_given_no_float64(data, labels, mix):
    with Copies() as copies:
        list(data.with_labels(labels).loader(20, device="meta", augment="dsa", mix=mix))
    assert (copies.unawaited, copies.doubles) == (0, 0)


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
        images, torch.zeros(4), mean=(0.1,), std=(0.1,), batch_size=2, augment="color", shuffle=False
    )
    augmented = epoch(loader)
    assert len(augmented.flatten(1).unique(dim=0)) == 4


def test_what_is_drawn_once_for_a_batch_differs_between_batches(data):
    loader = data.loader(3, augment="none|flip", shuffle=False)
    plain, mirrored = epoch(data.loader(48, shuffle=False)), 0
    for batch, (images, _) in enumerate(loader):
        rows = plain[3 * batch : 3 * batch + 3]
        mirrored += not torch.equal(images, rows)
    assert 0 < mirrored < len(loader)


def test_an_image_is_augmented_alike_whatever_the_size_of_the_batch(data):
    assert torch.equal(*(epoch(data.loader(size, augment="crop_flip")) for size in (5, 48)))


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


def test_a_callable_is_given_enlarged_images_in_one_and_what_it_returns_is_normalised(data):
    seen = []

    def inverted(images):
        seen.append(images.clone())
        return 1 - images

    order = data.loader(20).order(0)
    result = epoch(data.loader(20, augment=inverted))
    enlarged = data.artifact.images.flatten(0, 1).float()
    assert torch.equal(torch.cat(seen)[:, 0].amax(), torch.cat(seen).amax())
    torch.testing.assert_close((torch.cat(seen) * 255).round().byte(), data.images[order])
    assert 0 <= torch.cat(seen).min() < torch.cat(seen).max() <= enlarged.max() / 255
    torch.testing.assert_close(result, (1 - torch.cat(seen) - 0.5) / 0.25)


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
    loader = Loader(images, torch.zeros(1), mean=(0.5, 0.2, 0.0), std=(0.5, 0.1, 0.25), batch_size=1)
    assert epoch(loader).flatten().tolist() == pytest.approx([-1, 0, 4], abs=1e-5)


def test_tiles_between_the_bytes_are_taken_as_they_are():
    tiles = torch.tensor([0.25, 0.75]).view(2, 1, 1, 1)
    loader = Loader(tiles, torch.zeros(2), mean=(0.0,), std=(1 / 255,), batch_size=2, shuffle=False)
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


@pytest.mark.parametrize("batch_size", [0, -1, 2.5, "4", None])
def test_a_batch_size_that_is_no_number_above_zero_is_refused(data, batch_size):
    with pytest.raises(UsageError, match=f"1 or more, got {batch_size!r}"):
        data.loader(batch_size)


@pytest.mark.parametrize("option", [{"augment": ("flip", "crop")}, {"mix": 5}, {"seed": None}, {"seed": 1.5}])
def test_an_option_of_no_use_is_refused_before_the_first_batch(data, option):
    (name, value), *_ = option.items()
    with pytest.raises(UsageError, match=re.escape(f"{name} must be") + ".*" + re.escape(f"got {value!r}")):
        data.loader(**option)


def test_an_unknown_strategy_is_refused_before_the_first_batch_and_names_the_close_ones(data):
    with pytest.raises(UnknownNameError, match="Did you mean 'cutout'"):
        data.loader(augment="color_cutot")


# Resuming, ranks, workers


def same(one, two):
    return len(one) == len(two) and all(
        torch.equal(a, b) for x, y in zip(one, two, strict=True) for a, b in zip(x, y, strict=True)
    )


def test_a_loader_goes_on_after_the_batch_where_its_state_was_taken(data):
    whole = data.loader(5, augment="color_crop", seed=3)
    expected = [list(whole) for _ in range(3)]
    first = data.loader(5, augment="color_crop", seed=3)
    list(first)
    for number, _ in enumerate(first):
        if number == 2:
            state = first.state_dict()
            break
    resumed = data.loader(5, augment="color_crop", seed=3)
    resumed.load_state_dict(state)
    assert same(list(resumed), expected[1][3:])
    assert same(list(resumed), expected[2])


@pytest.mark.parametrize("labels", ["hard", "soft"])
def test_batches_made_ahead_as_on_a_gpu_are_those_made_one_by_one(data, labels):
    options = {"augment": "dsa", "mix": "cutmix|mixup|none", "rank": 1, "world_size": 2}
    one, ahead = (data.with_labels(labels).loader(3, **options) for _ in range(2))
    ahead._ahead = 3
    assert len(one) == 8  # the last ones that are made together are fewer
    for _ in range(3):
        expected = list(one)
        passing = iter(ahead)
        batches = [next(passing) for _ in range(5)]
        state = ahead.state_dict()
        ahead = data.with_labels(labels).loader(3, **options)
        ahead._ahead = 3
        ahead.load_state_dict(state)
        batches += ahead  # from the middle of what the other one made
        for batch, other in zip(batches, expected, strict=True):
            assert all(torch.equal(here, there) for here, there in zip(batch, other, strict=True))


def test_batches_made_ahead_can_be_changed_in_place_and_kept(data):
    loader = data.loader(3, augment="crop_flip")
    loader._ahead = 3
    passing = iter(loader)
    with torch.inference_mode():
        next(passing)
    shift, weight = (torch.ones((), requires_grad=True) for _ in range(2))
    images, targets = next(passing)
    loss = (images.add_(shift) * weight).sum() + (targets * shift).sum()
    other, labels = next(passing)
    other.mul_(2)
    labels.mul_(2)
    loss.backward()
    assert other.untyped_storage().nbytes() == other.nbytes


def test_the_state_after_the_last_batch_is_the_next_epoch(data):
    loader = data.loader(5)
    list(loader)
    assert (loader.state_dict()["epoch"], loader.state_dict()["batch"]) == (1, 0)
    loader.set_epoch(7)
    assert (loader.state_dict()["epoch"], loader.state_dict()["batch"]) == (7, 0)
    next(iter(loader))
    assert (loader.state_dict()["epoch"], loader.state_dict()["batch"]) == (7, 1)


def test_the_state_of_another_loader_is_refused(data):
    with pytest.raises(UsageError, match="another loader"):
        data.loader(5, seed=1).load_state_dict(data.loader(5).state_dict())


def test_ranks_augment_alike_images_differently():
    images = torch.randint(
        0, 256, (1, 1, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)
    )
    options = {"mean": (0.5,), "std": (0.2,), "batch_size": 6, "augment": "color_crop"}

    def batch(rank, world_size):
        loader = Loader(images.expand(12, -1, -1, -1), torch.arange(12), **options)
        loader.rank, loader.world_size = rank, world_size
        return next(iter(loader))[0]

    ranks = [batch(rank, 2) for rank in (0, 1)]
    assert not torch.equal(*ranks)
    assert torch.equal(ranks[1], batch(1, 2))


def test_the_first_epoch_is_number_0(data):
    loader = data.loader(5, seed=2)
    assert loader.epoch == 0
    assert (loader.state_dict()["epoch"], loader.state_dict()["batch"]) == (0, 0)
    first = list(loader)
    loader.set_epoch(0)
    assert same(list(loader), first)
    assert loader.order(0)[:6].tolist() == [33, 4, 47, 19, 17, 3]
    # whoever changes these raises `DRAWS` of ncfm_engine.batches
    drawn = data.loader(5, augment="crop|flip", seed=2).numbers(2, (0,))
    expected = [0.2287671, 0.0215118, 0.2371363, 0.0665904, 0.5554769, 0.0728647]
    assert drawn.flatten().tolist() == pytest.approx(expected, abs=1e-6)


def test_ranks_share_an_epoch_out_evenly_and_together_see_every_image(data):
    for world_size in (2, 5):
        parts = [data.loader(4, rank=rank, world_size=world_size).order(0) for rank in range(world_size)]
        assert {len(part) for part in parts} == {-(-len(data) // world_size)}
        assert set(torch.cat(parts).tolist()) == set(range(len(data)))
        short = [
            data.loader(4, rank=rank, world_size=world_size, drop_last=True).order(0)
            for rank in range(world_size)
        ]
        assert torch.cat(short).unique().numel() == len(data) // world_size * world_size
    with pytest.raises(UsageError, match="rank must be"):
        data.loader(rank=2, world_size=2)


def test_an_infinite_loader_is_the_epochs_one_after_the_other(data):
    finite, infinite = data.loader(5, seed=1), iter(data.loader(5, seed=1, infinite=True))
    expected = [*finite, *finite]
    assert same([next(infinite) for _ in expected], expected)
    with pytest.raises(UsageError, match="make no batch"):
        data.loader(1000, drop_last=True, infinite=True)


def test_an_infinite_pass_goes_on_at_the_batch_of_a_state_that_is_loaded_into_it(data):
    loader = data.loader(20, seed=1, infinite=True)
    passing = iter(loader)
    next(passing)
    loader.load_state_dict(loader.state_dict() | {"epoch": 4, "batch": 1})
    expected = data.loader(20, seed=1)
    epochs = []
    for number in (0, 4, 5):
        expected.set_epoch(number)
        epochs.append(list(expected))
    assert same([next(passing) for _ in range(7)], epochs[0][1:] + epochs[1][1:] + epochs[2])
    assert same([next(iter(loader))], list(expected)[:1])  # of epoch 6, from its first batch


@pytest.mark.parametrize("workers", [0, 2])
def test_a_dataloader_gives_the_batches_of_the_loader_with_workers_and_without(data, workers):
    # Each has got all that it knows by pickle, as after "spawn", but need not import torch.
    options = {"num_workers": workers, "multiprocessing_context": context if workers else None}
    drawn = {"augment": "dsa", "mix": "cutmix|mixup", "seed": 2, "rank": 1, "world_size": 2}
    made, loader = data.dataloader(5, **drawn, **options), data.loader(5, **drawn)
    assert len(made) == len(loader)
    assert made.persistent_workers == (workers > 0)
    for _ in range(2):
        assert same(list(made), list(loader))
    made.sampler.set_epoch(0)
    assert same(list(made)[:1], list(data.loader(5, **drawn))[:1])


# Mixing, others' transforms


def test_a_mix_gives_probabilities_whatever_the_labels(data):
    for labels in ("soft", "hard"):
        images, targets = next(iter(data.with_labels(labels).loader(48, mix="mixup", shuffle=False)))
        assert targets.shape == (48, 4)
        assert torch.allclose(targets.sum(1), torch.ones(48))
        plain = next(iter(data.with_labels(labels).loader(48, shuffle=False)))[0]
        assert not torch.allclose(images, plain)
    with pytest.raises(UsageError, match="mixes probabilities"):
        data.with_labels("logits").loader(mix="cutmix")
    with pytest.raises(UnknownNameError):
        data.loader(mix="cutmx")


def test_a_mix_depends_on_seed_epoch_and_batch_alone(data):
    batches = [list(data.loader(20, mix="mixup", seed=seed)) for seed in (1, 1, 2)]
    assert same(batches[0], batches[1])
    assert not same(batches[0], batches[2])
    loader = data.loader(20, mix="mixup", shuffle=False)
    assert not same(list(loader), list(loader))


class Teacher(torch.nn.Module):
    """Logits [B, 4] that every pixel has a say in."""

    def __init__(self, pixels: int):
        super().__init__()
        self.last = torch.nn.Linear(pixels, 4)
        torch.nn.init.normal_(self.last.weight, generator=torch.Generator().manual_seed(0))

    def forward(self, images):
        return self.last(images.flatten(1))


@pytest.fixture
def teacher(data) -> Teacher:
    return Teacher(data[0][0].numel()).eval()


def test_a_teacher_labels_the_images_as_they_come_out_in_every_epoch(data, teacher):
    options = {"augment": "dsa", "mix": "cutmix", "teacher": teacher, "shuffle": False}
    loader, logits = data.with_labels("soft", 3.0).loader(5, **options), data.with_labels("logits")
    epochs = [list(loader) for _ in range(2)]
    for images, targets in epochs[0]:
        assert not targets.requires_grad
        assert torch.equal(targets, (teacher(images) / 3).softmax(1))
    assert not torch.equal(epochs[0][0][1], epochs[1][0][1])
    for images, targets in logits.loader(5, **options):
        assert torch.equal(targets, teacher(images))
    worker = pickle.loads(pickle.dumps(logits.dataloader(5, **options).dataset))
    assert same([worker.__getitems__([0, 1, 2, 3, 4])], list(logits.loader(5, **options))[:1])


def test_a_teacher_that_cannot_label_is_refused_before_the_first_batch(data, teacher):
    with pytest.raises(UsageError, match=r"call teacher\.eval\(\)"):
        data.loader(teacher=Teacher(4))
    with pytest.raises(UsageError, match="labels='hard' take no teacher"):
        data.with_labels("hard").loader(teacher=teacher)
    for no_network in ("resnet18", Teacher):
        with pytest.raises(UsageError, match="teacher must be None, a network"):
            data.loader(teacher=no_network)
    with pytest.raises(UsageError, match=r"call teacher\.eval\(\)"):
        data.loader(teacher=torch.nn.Sequential(teacher, torch.nn.Dropout()).eval().append(torch.nn.ReLU()))


def test_a_teacher_that_gives_no_logits_of_these_classes_is_refused_at_the_batch(data, teacher):
    batches = iter(data.select(classes=[0, 1]).loader(5, teacher=teacher))
    with pytest.raises(UsageError, match=r"must give logits \[5, 2\] for this batch, got \[5, 4\]"):
        next(batches)
    batches = iter(data.loader(5, teacher=lambda images: {"logits": teacher(images)}))
    with pytest.raises(UsageError, match="got a dict"):
        next(batches)


def test_a_teacher_that_went_back_to_training_is_refused_at_the_batch(data, teacher):
    whole = torch.nn.ModuleDict({"teacher": teacher, "student": torch.nn.Linear(1, 1)})
    batches = iter(data.loader(5, teacher=teacher))
    next(batches)
    whole.train()
    with pytest.raises(UsageError, match=r"call teacher\.eval\(\)"):
        next(batches)


def noisy(images):
    return images + torch.randn_like(images)


def paired(images, targets):
    share = torch.rand(())
    return images.lerp(images.flip(0), share), targets.lerp(targets.flip(0), share)


def drawn_elsewhere(images):
    return images + 0.1 * random.random() + 0.01 * float(np.random.rand())


@pytest.mark.parametrize("augment", [noisy, drawn_elsewhere])
def test_callables_draw_the_same_when_an_epoch_is_resumed(data, augment):
    options = {"augment": augment, "mix": paired, "seed": 4}
    state = torch.get_rng_state()
    others = random.getstate(), np.random.get_state()[1].tolist()
    expected = list(data.loader(5, **options))
    assert torch.equal(torch.get_rng_state(), state)
    assert others == (random.getstate(), np.random.get_state()[1].tolist())
    torch.manual_seed(77)
    resumed = data.loader(5, **options)
    resumed.load_state_dict(data.loader(5, **options).state_dict() | {"batch": 2})
    assert same(list(resumed), expected[2:])
    assert same(list(data.dataloader(5, **options)), expected)


def test_torch_from_2_11_on_can_seed_the_cpu(monkeypatch):
    fork = torch.random.fork_rng

    def as_torch_2_11_forks(devices, device_type):
        return fork(devices, device_type=torch.device(device_type).type)

    monkeypatch.setattr(torch.random, "fork_rng", as_torch_2_11_forks)
    with seeded(0, "augment"):
        drawn = torch.rand(3)
    assert torch.equal(drawn, torch.rand(3, generator=generator_at(0, "augment")))


def test_on_a_mac_the_generator_of_its_gpu_is_seeded_too_and_left_as_it_was(monkeypatch):
    gpu = torch.Generator().manual_seed(5)
    monkeypatch.setattr(torch.mps, "get_rng_state", lambda device: gpu.get_state())
    monkeypatch.setattr(torch.mps, "set_rng_state", lambda state, device: gpu.set_state(state))
    monkeypatch.setattr(torch.mps, "manual_seed", gpu.manual_seed)
    before, drawn = gpu.get_state(), []
    for _ in range(2):
        with seeded(0, "augment", device="mps"):
            drawn.append(torch.rand(3, generator=gpu))
        assert torch.equal(gpu.get_state(), before)
        torch.rand(1, generator=gpu)
        before = gpu.get_state()
    assert torch.equal(*drawn)


@pytest.mark.parametrize(
    ("augment", "got"),
    [
        (lambda images: None, "NoneType"),
        (lambda images: images > 0.5, r"torch\.bool \[5, 1, 6, 6\]"),
        (lambda images: images[:2], r"torch\.float32 \[2, 1, 6, 6\]"),
        (lambda images: images[:, 0], r"torch\.float32 \[5, 6, 6\]"),
    ],
)
def test_what_augment_returns_is_checked(data, augment, got):
    with pytest.raises(UsageError, match=r"augment must return floats \[5, \w+, height, width\], got " + got):
        next(iter(data.loader(5, augment=augment)))


def test_what_mix_says_of_targets_is_of_no_account_where_a_teacher_gives_them(data):
    teacher = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(36, 4)).eval()
    mixes = (
        lambda images, targets: (images.repeat(2, 1, 1, 1), None),
        lambda images, targets: (images, targets[:1]),
    )
    shapes = [[len(part) for part in next(iter(data.loader(5, mix=mix, teacher=teacher)))] for mix in mixes]
    assert shapes == [[10, 10], [5, 5]]


@pytest.mark.parametrize(
    ("mix", "got"),
    [
        (lambda images, targets: images, r"\[5, 1, 6, 6\]$"),
        (lambda images, targets: (images, targets[:2]), r"\[5, 1, 6, 6\], \[2, 4\]$"),
        (lambda images, targets: None, "NoneType$"),
    ],
)
def test_what_mix_returns_is_checked(data, mix, got):
    with pytest.raises(UsageError, match="mix must return images and as many targets, got " + got):
        next(iter(data.loader(5, mix=mix)))


def test_transforms_of_torchvision_are_taken(data):
    v2 = pytest.importorskip("torchvision.transforms.v2")
    augment = v2.Compose([v2.RandomHorizontalFlip(), v2.RandomErasing(p=1)])
    for labels in ("soft", "hard"):
        mixing = v2.RandomChoice([v2.CutMix(num_classes=4), v2.MixUp(num_classes=4)])
        loader = data.with_labels(labels).loader(12, augment=augment, mix=mixing, seed=1)
        first = list(loader)
        loader.set_epoch(0)
        assert same(list(loader), first)
        assert all(targets.shape == (12, 4) for _, targets in first)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_module_of_kornia_is_taken(data):
    augmentation = pytest.importorskip("kornia.augmentation")
    module = augmentation.RandomAffine(15.0, translate=(0.1, 0.1), p=1.0)
    one, two = (list(data.loader(12, augment=module, seed=seed)) for seed in (1, 1))
    assert same(one, two)
    assert not torch.allclose(one[0][0], next(iter(data.loader(12, seed=1)))[0])


def test_batches_are_dicts_when_the_samples_are(data):
    named = data.with_format("dict", image_key="x", label_key="y")
    for loader in (named.loader(12, seed=1), named.dataloader(12, seed=1)):
        for batch, (images, targets) in zip(loader, data.loader(12, seed=1), strict=True):
            assert torch.equal(batch["x"], images)
            assert torch.equal(batch["y"], targets)


@pytest.mark.parametrize("name", ["transform", "target_transform"])
def test_a_loader_refuses_transforms_of_single_samples(data, name):
    setattr(data, name, lambda sample: sample)
    for make in (data.loader, data.dataloader):
        with pytest.raises(UsageError, match="augment="):
            make(12)


# The DataLoader, as frameworks take it apart


def test_a_dataloader_counts_images_and_batches(data):
    loader = data.dataloader(20)
    assert (len(loader), len(loader.dataset), len(loader.sampler)) == (3, 48, 48)
    assert [len(images) for images, _ in loader] == [20, 20, 8]
    assert [len(images) for images, _ in data.dataloader(20, drop_last=True)] == [20, 20]


def test_batches_put_together_otherwise_hold_their_own_images_and_draws(data):
    loader = data.dataloader(10, augment="color", seed=1)
    order = [index for batch in loader.batch_sampler for index in batch]
    plain = data.loader(48, seed=1)
    for indices in (order[5:15], order[0::2], order[40:] + order[:2]):
        images, targets = loader.dataset.__getitems__(indices)
        rows = plain.order(0)[torch.tensor(indices) % 48]
        assert torch.equal(targets, data.soft_targets[rows])
        assert images.shape == (len(indices), 1, 6, 6)
    pixels = torch.arange(64, dtype=torch.uint8).view(8, 8).expand(4, 10, 1, 8, 8).contiguous()
    equal = DistilledDataset.from_tensors(pixels).dataloader(10, augment="color", seed=1).dataset
    straight, again, shifted = (equal.__getitems__(list(range(at, at + 10)))[0] for at in (0, 0, 5))
    assert torch.equal(straight, again)
    assert torch.equal(straight[5:], shifted[:5])  # their numbers stay with the images
    assert len(torch.cat([straight, shifted[5:]]).flatten(1).unique(dim=0)) == 15
    sampled, otherwise = (equal.__getitems__(indices)[0] for indices in ([3, 0, 7], [3, 0, 8]))
    assert torch.equal(sampled, equal.__getitems__([3, 0, 7])[0])
    # a sampler that does not tell the epoch: only what else is in the batch changes
    assert len(torch.cat([straight[[3, 0]], sampled[:2], otherwise[:2]]).flatten(1).unique(dim=0)) == 6


def test_a_state_of_another_dataloader_is_refused(data):
    state = iter(data.dataloader(5, seed=1).sampler).state_dict()
    with pytest.raises(UsageError, match="another loader"):
        iter(data.dataloader(5, seed=2).sampler).load_state_dict(state)


def test_threads_in_two_epochs_get_the_batches_of_their_own(data, monkeypatch):
    options = {"augment": "color", "seed": 1}
    loader = data.loader(5, **options)
    expected = [list(loader), list(loader)]
    dataset = data.dataloader(5, **options).dataset
    numbers, seen = dataset.loader.numbers, []

    def interrupted(count, place):  # another thread runs while this one draws
        if place == (1,) and not seen:
            seen.append(None)
            seen[0] = [dataset.__getitems__([*range(48 + 5, 48 + 10)]), dataset.__getitems__([*range(5)])]
        return numbers(count, place)

    monkeypatch.setattr(dataset.loader, "numbers", interrupted)
    assert same([dataset.__getitems__([*range(48, 53)])], expected[1][:1])
    assert same(seen[0], [expected[1][1], expected[0][0]])


def test_a_dataloader_that_was_not_begun_does_not_count_an_epoch(data):
    loader = data.dataloader(5, seed=1)
    iter(loader.sampler)
    assert same(list(loader), list(data.loader(5, seed=1)))


def test_autocast_does_not_reach_the_images(data):
    expected = list(data.loader(12))
    with torch.autocast("cpu", torch.bfloat16):
        assert same(list(data.loader(12)), expected)


def test_whole_numbers_of_numpy_are_seeds_and_epochs_like_any_others(data):
    numpy = pytest.importorskip("numpy")
    loader = data.loader(12, seed=numpy.int64(3))
    loader.set_epoch(numpy.int64(1))
    expected = data.loader(12, seed=3)
    expected.set_epoch(1)
    assert same(list(loader), list(expected))


def test_colours_of_torchvision_are_changed_between_0_and_1(data):
    v2 = pytest.importorskip("torchvision.transforms.v2")
    brighter = v2.ColorJitter(brightness=(1.0, 1.0))  # leaves them, but for what is not between 0 and 1
    for (images, _), (expected, _) in zip(data.loader(12, augment=brighter), data.loader(12), strict=True):
        torch.testing.assert_close(images, expected, atol=1e-4, rtol=0)


def test_a_state_of_options_from_numpy_is_read_by_torch(data):
    state = data.loader(5, shuffle=np.bool_(False), drop_last=np.bool_(True)).state_dict()
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    loader = data.loader(5, shuffle=False, drop_last=True)
    loader.load_state_dict(torch.load(file, weights_only=True))
    assert loader.state_dict() == state


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16])
def test_batches_are_float32_whatever_augment_returns(data, dtype):
    images, _ = next(iter(data.loader(5, augment=lambda images: images.to(dtype))))
    assert images.dtype == torch.float32
