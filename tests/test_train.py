"""Training: the same result alone or beside others, and the same bits stopped and resumed or not."""

import contextlib
import copy
import dataclasses
import itertools
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from interruptions import StopAfter
from loops import plain_epochs
from torch.nn.utils import parameters_to_vector, vector_to_parameters
from torch.utils.checkpoint import checkpoint

from distilled_data import DeviceMemoryError, UsageError
from distilled_data.augment import cutmix
from distilled_data.loader import Loader
from distilled_data.randomness import generator_at
from ncfm_engine.batches import Batches, real_loader, reseeded
from ncfm_engine.checkpoint import load_checkpoint, save_checkpoint
from ncfm_engine.networks import Network, PatchEncoder, build_network, pooled_classifier
from ncfm_engine.stop import Stopped
from ncfm_engine.train import Course, Networks, Training, grouped, trained_at_once

SEEDS = (5, 6, 7)
AUGMENT = "flip_color_crop|scale|rotate"
OPTIMISERS = {
    "sgd": lambda weights: torch.optim.SGD(weights, 0.05, 0.9, weight_decay=5e-4),
    "adamw": lambda weights: torch.optim.AdamW(weights, 1e-3, weight_decay=0.01),
}


@pytest.fixture(scope="module")
def loader(digits):
    chosen = torch.arange(0, len(digits.train), 5)
    images, targets = digits.train.images[chosen], digits.train.targets[chosen]
    options = {"mean": digits.mean, "std": digits.std, "batch_size": 64}
    return Loader(images, targets, augment=AUGMENT, **options)


def network_of(seed, norm="instance", activation="relu"):
    shape = {"channels": 1, "size": 8, "classes": 10, "width": 8, "depth": 2}
    return build_network("convnet", norm=norm, activation=activation, seed=seed, **shape)


def training_of(
    loader,
    seeds,
    optimiser="sgd",
    norm="instance",
    precision="float32",
    decay=0.2,
    activation="relu",
    **changes,
):
    settings = {"steps": 3, "milestones": (1, 2, 2), "tested": {2, 3}, "kept": {1}} | changes  # in epochs
    for name, epochs in settings.items():
        several = not isinstance(epochs, int)
        settings[name] = [epoch * len(loader) for epoch in epochs] if several else epochs * len(loader)
    return Training(
        Networks([network_of(seed, norm, activation) for seed in seeds], "cpu", precision),
        Batches([reseeded(loader, seed) for seed in seeds], classes=10, cutmix=0.5),
        Course(optimiser=OPTIMISERS[optimiser], decay=decay, **settings),
        images_to_test(loader),
    )


def images_to_test(loader):
    options = {"mean": (0.3,), "std": (0.4,), "batch_size": 512}
    return Loader(loader.images, loader.targets, shuffle=False, **options)


class Kept(torch.nn.Module):
    """Has parameters where `torch.func.functional_call` does not look for them."""

    def __init__(self, bias=True):
        super().__init__()
        self.linear = torch.nn.Linear(64, 10, bias=bias)
        self.weights = [self.linear.weight]

    def forward(self, images):
        return F.linear(images.flatten(1), self.weights[0], self.linear.bias)


class Recomputed(torch.nn.Module):
    """Makes its hidden values again for the backward pass, from the parameters that it has then."""

    def __init__(self, reentrant):
        super().__init__()
        self.first, self.last, self.reentrant = torch.nn.Linear(64, 16), torch.nn.Linear(16, 10), reentrant
        self.between = torch.nn.Sequential(torch.nn.Linear(16, 16), torch.nn.Tanh())

    def forward(self, images):
        hidden = self.first(images.flatten(1))
        return self.last(checkpoint(self.between, hidden, use_reentrant=self.reentrant))


class Renormed(torch.nn.Linear):
    """Gives its weights other memory in each pass, as those of EEGNet are kept short, and its gradients."""

    def __init__(self):
        super().__init__(64, 10)

    def forward(self, images):
        self.weight.data = torch.renorm(self.weight.data, p=2, dim=0, maxnorm=0.5)
        self.zero_grad()
        return super().forward(images.flatten(1))


class Scaled(torch.nn.Module):
    """Assigns a buffer that the backward pass needs as it was, and lets a copy of its weights follow them."""

    def __init__(self):
        super().__init__()
        self.first, self.last = torch.nn.Linear(64, 16), torch.nn.Linear(16, 10)
        self.slow = torch.nn.Linear(64, 16).requires_grad_(False)
        self.register_buffer("scale", torch.ones(16))

    def forward(self, images):
        hidden = self.first(images.flatten(1)) + self.slow(images.flatten(1))
        logits = self.last(hidden * self.scale)
        self.scale = 0.9 * self.scale + 0.1 * hidden.detach().std(0)
        self.slow.weight.data = 0.9 * self.slow.weight.data + 0.1 * self.first.weight.data
        return logits


@pytest.mark.parametrize(
    "build", [Kept, partial(Recomputed, True), partial(Recomputed, False), Renormed, Scaled]
)
def test_whatever_a_network_alone_does_it_is_trained_as_in_a_plain_loop(loader, build):
    torch.manual_seed(0)
    plain = build()
    alone = Networks([copy.deepcopy(plain)], "cpu")
    descents = [OPTIMISERS["sgd"](weights) for weights in (plain.parameters(), [alone.weights])]
    initial = alone.weights.detach().clone()
    for images, targets in itertools.islice(loader, 4):
        for descent, logits in zip(descents, (plain(images), alone(images)[0]), strict=True):
            descent.zero_grad(set_to_none=descent is descents[0])
            F.cross_entropy(logits, targets).backward()
            descent.step()
    assert torch.equal(alone.weights[0], parameters_to_vector(list(trained_of(plain))))
    assert (alone.weights != initial).float().mean() > 0.5
    state = dict(plain.named_buffers()) | dict(plain.named_parameters())
    for name, buffer in alone.buffers.items():
        assert torch.equal(buffer[0], state[name])


def trained_of(module):
    return (weights for weights in module.parameters() if weights.requires_grad)


@pytest.mark.parametrize(
    ("module", "message"),
    [
        (torch.nn.Linear(64, 10, dtype=torch.float64), "float32, got parameter weight of torch.float64"),
        (torch.nn.LazyLinear(10), "parameter weight has no shape yet"),
        (torch.nn.Flatten(), "without parameters"),
    ],
)
def test_what_makes_no_row_of_weights_is_named(module, message):
    with pytest.raises(UsageError, match=message):
        Networks([module], "cpu")


def trained(training):
    training.run()
    return training.networks.weights.detach()


def plain_training(loader, seed, optimiser, norm, layout):
    """The same with a module of its own and torch's schedule: the reference."""
    network, loader = network_of(seed, norm), reseeded(loader, seed)
    network.register_forward_pre_hook(lambda network, inputs: inputs[0].clone(memory_format=layout))
    descent = OPTIMISERS[optimiser](network.parameters())
    schedule = torch.optim.lr_scheduler.MultiStepLR(descent, [1, 2, 2], 0.2)
    for _ in plain_epochs(network, loader, seed, descent, schedule, epochs=3):
        pass
    return network


@pytest.mark.parametrize(
    ("optimiser", "norm", "layout"),
    [("sgd", "instance", torch.contiguous_format), ("adamw", "batch", torch.channels_last)],
)
def test_one_network_is_trained_bit_for_bit_like_a_plain_module(loader, optimiser, norm, layout):
    reference = plain_training(loader, 5, optimiser, norm, layout)
    training = training_of(loader, [5], optimiser, norm)
    assert torch.equal(trained(training)[0], parameters_to_vector(reference.parameters()))
    for ours, expected in zip(training.networks.buffers.values(), reference.buffers(), strict=True):
        assert torch.equal(ours[0], expected)
    logits = reference.eval()(next(iter(images_to_test(loader)))[0])
    right = (logits.argmax(1) == loader.targets).double().mean().item()
    assert training.scores[-1] == [100 * right]


@pytest.mark.parametrize("norm", ["instance", "batch"])
def test_networks_trained_at_once_become_what_each_becomes_alone(loader, norm):
    one = partial(training_of, loader, norm=norm, activation="sigmoid")  # relu makes steps of rounding
    training = one(SEEDS)
    together = trained(training)
    for k, seed in enumerate(SEEDS):
        alone = one([seed])
        assert torch.allclose(together[k], trained(alone)[0], atol=1e-6)
        assert torch.allclose(training.snapshots[0][k], alone.snapshots[0][0], atol=1e-5)
        for name, buffer in alone.networks.buffers.items():  # running statistics
            assert torch.allclose(training.networks.buffers[name][k], buffer[0], atol=1e-4)
        scores = [score[k] for score in training.scores]
        assert scores == pytest.approx([score for (score,) in alone.scores], abs=0.5)


def test_adamw_at_once_gives_the_same_function_as_alone(loader):
    together = trained(training_of(loader, SEEDS, "adamw"))
    images = next(iter(images_to_test(loader)))[0]
    for weights, seed in zip(together, SEEDS, strict=True):
        # Weights may differ: AdamW makes steps out of the rounding of the gradient of a bias before a norm.
        mine, other = network_of(0), network_of(0)
        vector_to_parameters(weights, mine.parameters())
        vector_to_parameters(trained(training_of(loader, [seed], "adamw"))[0], other.parameters())
        assert torch.allclose(mine(images), other(images), atol=1e-3)


def own_images(loader, shift):
    other = reseeded(loader, 0)
    other.images = loader.images.roll(shift, 0)
    return other


def test_real_images_are_normalised_as_their_source_says(digits):
    source = dataclasses.replace(digits, mean=(0.25,), std=(0.5,))
    loader = real_loader(source, source.test, 7, "cpu", shuffle=False)
    images, targets = next(iter(loader))
    assert torch.allclose(images, (digits.test.images[:7].float() / 255 - 0.25) / 0.5)
    assert torch.equal(targets, digits.test.targets[:7])


@pytest.mark.parametrize("ahead", [1, 3, 50])  # as on a CPU; as on a GPU, of a large set and of a small one
@pytest.mark.parametrize("shared", [True, False])
def test_every_network_sees_the_images_that_its_own_loader_gives(loader, shared, ahead):
    loaders = [reseeded(loader if shared else own_images(loader, seed), seed) for seed in SEEDS]
    batches, mixed = Batches(loaders, classes=10, cutmix=0.5), 0
    batches._ahead = ahead
    for epoch in range(3):
        own = [iter(loader) for loader in loaders]
        for batch in range(len(batches)):
            images, targets = batches.at(epoch, batch)
            for k, (seed, (alone, labels)) in enumerate(zip(SEEDS, map(next, own), strict=True)):
                generator, labels = generator_at(seed, "cutmix", epoch, batch), F.one_hot(labels, 10).float()
                if torch.rand((), generator=generator) < 0.5:
                    (alone, labels), mixed = cutmix(alone, labels, generator), mixed + 1
                assert torch.equal(images[k], alone)
                assert torch.allclose(targets[k], labels)
    assert 0 < mixed < 3 * len(batches) * len(SEEDS)
    assert torch.equal(batches.at(2, len(batches) - 1)[0], images)
    assert not torch.equal(batches.at(1, len(batches) - 1)[0], images)


@pytest.mark.parametrize(("ahead", "epochs"), [(3, {0}), (9, {0}), (10, {0, 1}), (17, {0, 1, 2})])
def test_as_many_whole_epochs_of_a_small_set_are_made_in_one_go_as_fit(loader, ahead, epochs):
    batches = Batches([loader], classes=10, cutmix=0.0)
    batches._ahead = ahead
    for batch in (0, 4):  # of 64 and of 32 images
        batches.at(0, batch)
        assert len(batches._made) < ahead
    assert {epoch for epoch, _ in batches._made} | {0} == epochs
    for epoch in range(9, 0, -1):  # backwards: what comes much later goes
        batches.at(epoch, 0)
        assert len(batches._made) < max(ahead, len(batches))


@pytest.mark.parametrize("steps", [2, 5, 13])
def test_no_batch_is_made_that_comes_after_the_last_step(loader, monkeypatch, steps):
    def noted(addresses):
        made.extend(addresses)
        return several(addresses)

    training, made = training_of(loader, SEEDS), []
    batches, several = training.batches, training.batches._several
    monkeypatch.setattr(batches, "_ahead", 50)
    monkeypatch.setattr(batches, "_several", noted)
    training.course = dataclasses.replace(training.course, steps=steps)
    training.run()
    assert sorted(made) == [divmod(step, len(batches)) for step in range(steps)]


def test_batches_made_in_one_go_are_found_without_a_walk_through_the_epoch(loader, monkeypatch):
    batches, full = Batches([loader], classes=10, cutmix=0.0), 10**15
    batches._ahead = 3
    monkeypatch.setattr(Loader, "share", loader.batch_size * full + 1)
    assert batches._alike((2, full - 2), (4, 0)) == [(2, full - 2), (2, full - 1), (3, 0)]
    assert batches._alike((2, full), (4, 0)) == [(2, full), (3, full)]


def test_batches_made_in_one_go_are_of_the_memory_of_one_loader_and_can_be_changed_in_place(loader):
    first = reseeded(loader, 0)
    first._ahead = 7
    batches = Batches([reseeded(first, seed) for seed in SEEDS], classes=10, cutmix=0.0)
    assert batches._ahead == 7 // len(SEEDS) > 1
    (images, _), (others, _) = (batches.at(0, number) for number in range(2))
    before, shift = others.clone(), torch.ones((), requires_grad=True)
    images.add_(shift).sum().backward()  # as a network may do
    assert torch.equal(others, before)


@pytest.mark.parametrize("epochs", [1, 2, 3, 7, 60])
def test_the_rate_falls_as_torchs_own_schedule_does(loader, epochs):
    milestones = [epochs * k // 5 for k in range(1, 5)]
    training = training_of(loader, [5], steps=epochs, milestones=milestones, decay=0.3)
    descent = OPTIMISERS["sgd"]([torch.zeros(1, requires_grad=True)])
    schedule = torch.optim.lr_scheduler.MultiStepLR(descent, milestones, 0.3)
    for epoch in range(epochs):
        first = epoch * len(loader)
        for step in (first, first + len(loader) - 1):
            assert training.rate(step) == pytest.approx(schedule.get_last_lr()[0], rel=1e-15)
        descent.step()
        schedule.step()


@pytest.mark.parametrize(
    ("optimiser", "norm", "seeds"),
    [("sgd", "instance", SEEDS), ("adamw", "batch", SEEDS), ("adamw", "none", [5])],
)
def test_a_training_stopped_at_any_step_and_resumed_ends_with_the_same_bits(
    loader, tmp_path, optimiser, norm, seeds
):
    whole = training_of(loader, seeds, optimiser, norm)
    whole.run()
    path = tmp_path / "training.safetensors"
    for attempt in itertools.count():
        training = training_of(loader, seeds, optimiser, norm)
        if found := load_checkpoint(path, {}):
            training.restore(found.tensors, found.progress)
            assert training.step == attempt * 5

        def save(tensors, progress):
            save_checkpoint(path, tensors, identity={}, progress=progress)

        with contextlib.suppress(Stopped):
            training.run("toy", save=save, stop=StopAfter(5))
            break
    assert attempt >= 2
    assert torch.equal(training.networks.weights, whole.networks.weights)
    assert torch.equal(torch.stack(training.snapshots), torch.stack(whole.snapshots))
    assert training.scores == whole.scores
    for name, buffer in whole.networks.buffers.items():
        assert torch.equal(training.networks.buffers[name], buffer)


def test_a_stop_says_which_training_it_was_and_how_far_it_got(loader):
    training = training_of(loader, [5])
    with pytest.raises(Stopped, match=r"^toy, epoch 1 of 3$"):
        training.run("toy", stop=StopAfter(len(training.batches) + 1))


@pytest.mark.parametrize("work", ["__call__", "accuracies"])
def test_a_training_or_a_test_without_memory_says_which_it_was_and_what_there_is_to_do(
    loader, monkeypatch, work
):
    def fail(*_):
        raise torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate")

    monkeypatch.setattr(Networks, work, fail)
    said = r"^toy: 3 networks at once do not fit into the memory of cpu \(CUDA out of memory\.\)\. Train"
    with pytest.raises(DeviceMemoryError, match=said):
        training_of(loader, SEEDS).run("toy")


def test_the_state_is_saved_when_the_time_has_passed_and_not_before(loader, monkeypatch):
    from ncfm_engine import train as module

    seconds = itertools.count()  # the clock is looked at once at the start, once per step and once per save
    monkeypatch.setattr(module, "time", type("Clock", (), {"monotonic": lambda: next(seconds)}))
    saved = []
    training = training_of(loader, [5])
    monkeypatch.setattr(module, "CHECKPOINT_SECONDS", 4)
    training.run(save=lambda tensors, progress: saved.append(progress["step"]))
    assert saved == [3, 7, 11]
    assert training.step == 3 * len(training.batches)


def test_bfloat16_computes_in_half_precision_and_keeps_whole_weights(loader):
    whole, half = (training_of(loader, SEEDS, precision=name) for name in ("float32", "bfloat16"))
    images = loader.views(loader.images[:8])
    logits = half.networks(images)
    assert logits.dtype == torch.float32
    assert not torch.equal(logits, whole.networks(images))
    assert torch.allclose(logits, whole.networks(images), atol=0.05)
    half.run()
    assert half.networks.weights.dtype == torch.float32
    assert half.optimiser.state[half.networks.weights]["momentum_buffer"].dtype == torch.float32


def small_vit(seed):
    torch.manual_seed(seed)
    return Network(PatchEncoder(1, (8, 8), dim=16, layers=1, heads=2), pooled_classifier(16, 3))


def test_attention_can_be_stacked():
    built = [small_vit(seed) for seed in (0, 1)]
    images = torch.rand(2, 2, 1, 8, 8, generator=generator_at(0))
    targets = torch.tensor([[0, 1], [2, 0]])
    expected, gradients = [], []
    for network, part, labels in zip(built, images, targets, strict=True):
        expected.append(network(part))
        F.cross_entropy(expected[-1], labels).backward()
        gradients.append(parameters_to_vector([weights.grad for weights in network.parameters()]))
    stacked = Networks(built, "cpu")
    logits = stacked(images)
    assert torch.allclose(logits, torch.stack(expected), atol=1e-4)
    sum(map(F.cross_entropy, logits, targets)).backward()
    difference = stacked.weights.grad - torch.stack(gradients)
    assert difference.norm() < 1e-3 * stacked.weights.grad.norm()
    same = stacked(images[0])  # the same images for all of them
    assert torch.allclose(same[0], expected[0], atol=1e-4)


def test_weights_that_require_no_gradient_stay_what_each_network_has(loader):
    networks = [network_of(seed) for seed in SEEDS]
    for network in networks:
        next(network.parameters()).requires_grad_(False)
    frozen = torch.stack([next(network.parameters()).clone() for network in networks])
    name = next(name for name, _ in networks[0].named_parameters())
    images, _ = next(iter(loader))
    expected = torch.stack([network(images) for network in networks])
    stacked = Networks(networks, "cpu")
    assert torch.allclose(stacked(images), expected, atol=1e-5)
    stacked(images).square().sum().backward()
    assert stacked.weights.shape[1] + frozen[0].numel() == sum(p.numel() for p in networks[0].parameters())
    assert torch.equal(stacked.buffers[name], frozen)


def test_networks_are_grouped_in_order():
    assert grouped([0, 2, 5], 2) == [[0, 2], [5]]
    assert grouped([0, 2, 5], 9) == [[0, 2, 5]]
    assert grouped([], 1) == []


@pytest.mark.parametrize("norm", ["instance", "batch"])
def test_a_cpu_trains_one_network_at_a_time_and_a_gpu_what_half_of_its_memory_holds(
    digits, monkeypatch, norm
):
    batch, kept = 64, {}
    assert trained_at_once(network_of(0, norm), digits, batch, "cpu") == 1

    def keep(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    three = Networks([network_of(seed, norm) for seed in range(3)], "cpu")
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        three(torch.zeros(batch, 1, 8, 8))
    kept.pop(three.weights.untyped_storage().data_ptr(), None)
    size = sum(tensor.untyped_storage().nbytes() for tensor in kept.values()) / 3
    for total, expected in ((2.5 * 2 * size, 2), (20.5 * 2 * size, 20), (0, 1)):
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device, total=total: (0, int(total)))
        assert trained_at_once(network_of(0, norm), digits, batch, "cuda:1") == expected
    unstackable = Returns(lambda logits: logits if logits.sum() > 0 else -logits)
    assert trained_at_once(unstackable, digits, batch, "cuda:1") == 1
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (0, 2**30))
    assert trained_at_once(Returns(lambda logits: logits), digits, batch, "cuda:1") > 1
    assert trained_at_once(Kept(), digits, batch, "cuda:1") == 1
    normed = torch.nn.Sequential(Kept(bias=False), torch.nn.LayerNorm(10))  # which sees no scale
    assert trained_at_once(normed, digits, batch, "cuda:1") == 1


class Averaged(torch.nn.Module):
    """Divides by a running scale of its input, which it changes in place or assigns anew."""

    def __init__(self, seed, assigned):
        super().__init__()
        torch.manual_seed(seed)
        self.linear, self.assigned = torch.nn.Linear(64, 10), assigned
        self.register_buffer("scale", torch.ones(64))
        self.register_buffer("before", torch.ones(64))
        self.register_buffer("seen", torch.empty(0))

    def forward(self, images):
        flat = images.flatten(1)
        if self.training:
            scale = flat.square().mean(0)
            if self.assigned:
                self.before, self.scale = self.scale, torch.lerp(self.scale, scale, 0.1)
                self.seen = flat.detach().sum(1)
            else:
                self.before.copy_(self.scale)
                self.scale.lerp_(scale, 0.1)
        return self.linear(flat) / self.scale.mean()


def trained_buffers(loader, networks):
    batches = Batches([reseeded(loader, seed) for seed in SEEDS[: len(networks)]], classes=10, cutmix=0.0)
    course = Course(12, OPTIMISERS["sgd"], [], 1.0, [12])
    training = Training(Networks(networks, "cpu"), batches, course, images_to_test(loader))
    training.run()
    assert training.networks.buffers["seen"].shape == (len(networks), 0)  # of another shape: no state
    return torch.stack([training.networks.buffers[name] for name in ("scale", "before")])


@pytest.mark.parametrize("count", [1, 2])
def test_a_buffer_that_a_network_assigns_anew_is_kept_as_one_that_it_changes(loader, count):
    assigned, changed = (
        trained_buffers(loader, [Averaged(seed, way) for seed in SEEDS[:count]]) for way in (True, False)
    )
    assert torch.equal(assigned, changed)
    assert not torch.equal(*assigned)


def test_a_network_that_comes_in_eval_mode_is_trained_like_any_other(loader):
    ready, resting = Averaged(5, False), Averaged(5, False).eval()
    assert torch.equal(trained_buffers(loader, [ready]), trained_buffers(loader, [resting]))


class Returns(torch.nn.Module):
    def __init__(self, made_of):
        super().__init__()
        self.linear, self.made_of = torch.nn.Linear(64, 10), made_of

    def forward(self, images):
        return self.made_of(self.linear(images.flatten(1)))


@pytest.mark.parametrize(
    ("made_of", "message"),
    [
        (lambda logits: (logits, logits), r"logits \[64, classes\], got tuple"),
        (lambda logits: {"logits": logits}, r"logits \[64, classes\], got dict"),
        (lambda logits: None, r"logits \[64, classes\], got NoneType"),
        (lambda logits: logits.mean(1), r"logits \[64, classes\], got \[64\]"),
        (lambda logits: torch.cat([logits, logits], 1), "must return 10 logits, got 20"),
    ],
    ids=["tuple", "dict", "nothing", "one", "twenty"],
)
@pytest.mark.parametrize("count", [1, 2])
def test_what_is_no_logits_is_named(loader, made_of, message, count):
    batches = Batches([reseeded(loader, seed) for seed in SEEDS[:count]], classes=10, cutmix=0.0)
    networks = Networks([Returns(made_of) for _ in range(count)], "cpu")
    training = Training(networks, batches, Course(1, OPTIMISERS["sgd"], [], 1.0, []), images_to_test(loader))
    with pytest.raises(UsageError, match=message):
        training.run()
