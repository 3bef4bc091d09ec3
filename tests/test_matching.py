"""One step of the game: what is drawn, and what the step does to each player."""

import dataclasses

import pytest
import torch
from torch._dynamo.utils import counters
from torch.nn.utils import parameters_to_vector

from distilled_data.randomness import generator_at, seed_at
from ncfm_engine.config import DISCREPANCIES, DistillConfig, NetworkConfig, Recipe
from ncfm_engine.features import FrozenNetwork
from ncfm_engine.frequencies import SamplingNetwork
from ncfm_engine.initial import initial_images
from ncfm_engine.matching import MatchingStep
from ncfm_engine.memory import Footprint, Layout
from ncfm_engine.operations import passes
from ncfm_engine.pool import FeaturePool, FlatNetwork, build

SMALL = DistillConfig(real_batch=30, real_features="fresh", frequencies=64, factor=1)


def game(digits, pool, config=SMALL, **options) -> tuple[MatchingStep, torch.Tensor]:
    images = initial_images(config, digits, pool, ipc=2, seed=0)
    return MatchingStep(config, digits, pool, ipc=2, seed=0, device="cpu", **options), images


def test_one_image_step_lowers_the_discrepancy(digits, pool):
    step, images = game(digits, pool, dataclasses.replace(SMALL, calibration=0))
    before = step.backward(images, 0).discrepancy.mean()
    with torch.no_grad():
        images -= 1e-2 * images.grad / images.grad.norm()
    assert step.backward(images, 0).discrepancy.mean() < before


def test_one_step_of_the_sampling_network_raises_the_discrepancy(digits, pool):
    step, images = game(digits, pool)
    before = step.backward(images, 0).discrepancy.mean()
    ascent = torch.optim.SGD(step.sampler.parameters(), 1e-3, maximize=True)
    ascent.step()
    assert step.backward(images, 0).discrepancy.mean() > before


def test_the_sampling_network_starts_as_the_seed_says(digits, pool):
    step, _ = game(digits, pool)
    dim = step.sampler(torch.Generator()).shape[1]
    torch.manual_seed(seed_at(0, "sampler"))
    expected = SamplingNetwork(dim, SMALL.frequencies)
    for weights, other in zip(step.sampler.parameters(), expected.parameters(), strict=True):
        assert torch.equal(weights, other)


def test_an_image_step_lowers_the_calibration_loss(digits, pool):
    step, images = game(digits, pool, dataclasses.replace(SMALL, weight=0, calibration=1))
    before = step.backward(images, 0).calibration.mean()
    with torch.no_grad():
        images -= 1e-1 * images.grad / images.grad.norm()
    assert step.backward(images, 0).calibration.mean() < before


def test_calibration_gradient_is_that_of_the_mean_cross_entropy_of_each_class(digits, pool):
    config = dataclasses.replace(SMALL, weight=0, calibration=1, augment="flip")
    step, images = game(digits, pool, config)
    loss = step.backward(images, 0).calibration.mean()
    index = int(torch.randint(2, (), generator=generator_at(0, "network", 0)))
    network = FlatNetwork(pool.template, "cpu")
    pool.blend(index, 1.0, network)
    flipped = step._augment(step.normalise(images.flatten(0, 1)), 0, 0, slice(None))
    labels = torch.arange(10).repeat(2)
    expected = torch.nn.functional.cross_entropy(network.network(flipped), labels)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)


WRITTEN = dataclasses.replace(SMALL, factor=2, alpha=0.3, weight=7.0, calibration=3.0, augment="none")


def points_of(digits, pool, step, images) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Real and synthetic features [C, B, D] of step 4 of `WRITTEN`, and its calibration loss [C]."""
    generator = generator_at(0, "network", 4)
    index, beta = int(torch.randint(2, (), generator=generator)), torch.rand((), generator=generator)
    start, end = pool.trajectory[index]
    networks = [build(NetworkConfig(width=8, depth=2), digits, 0) for _ in range(2)]
    for network, weights in zip(networks, ((1 - beta) * start + beta * end, end), strict=True):
        torch.nn.utils.vector_to_parameters(weights, network.parameters())
    blended, trained = networks
    rows = step.real.images.draw(30, generator_at(0, "real", 4)).flatten()
    real = (digits.train.images[rows] / 255 - digits.mean[0]) / digits.std[0]
    quarters = [images[..., top : top + 4, left : left + 4] for top in (0, 4) for left in (0, 4)]
    views = torch.stack(quarters, 2).transpose(0, 1).flatten(0, 2)  # class by class
    views = torch.nn.functional.interpolate(views, size=(8, 8), mode="bilinear", align_corners=False)
    views = (views - digits.mean[0]) / digits.std[0]
    points = [blended.features(x).flatten(1) for x in (real, views)]
    points = [(x / x.norm(dim=1, keepdim=True)).unflatten(0, (10, -1)) for x in points]
    likely = trained(views).log_softmax(1).unflatten(0, (10, -1)).diagonal(dim1=0, dim2=2)  # [views, C]
    return *points, -likely.mean(0)


def equation_8(real, synthetic, frequencies) -> tuple[torch.Tensor, ...]:
    """Discrepancy [C] of `WRITTEN`, amplitude and phase."""
    a, b = (torch.exp(1j * (x @ frequencies.T)).mean(1) for x in (real, synthetic))
    amplitude, phase = (a.abs() - b.abs()).square(), 2 * (a.abs() * b.abs() - (a * b.conj()).real)
    return (0.3 * amplitude + 0.7 * phase).sqrt().mean(1), amplitude.mean(1), phase.mean(1)


def test_both_players_get_the_gradients_of_what_the_paper_writes(digits, pool):
    step, images = game(digits, pool, WRITTEN)
    losses = step.backward(images, 4)
    same, players = images.detach().clone().requires_grad_(), list(step.sampler.parameters())
    *points, calibration = points_of(digits, pool, step, same)
    discrepancy, amplitude, phase = equation_8(*points, step.sampler(generator_at(0, "frequencies", 4)))
    gradients = torch.autograd.grad((7 * discrepancy + 3 * calibration).sum(), [same, *players])
    for found, expected in zip((images.grad, *(p.grad for p in players)), gradients, strict=True):
        assert (found - expected).norm() < 1e-3 * expected.norm()
    for name, value in (("discrepancy", discrepancy), ("amplitude", amplitude), ("phase", phase)):
        assert torch.allclose(getattr(losses, name), value, rtol=1e-3)
    assert torch.allclose(losses.calibration, calibration, rtol=1e-4)


@pytest.mark.parametrize("layout", [Layout(10, 300), Layout(3, 7)])
def test_a_turn_of_psi_gets_the_gradients_of_the_weighted_discrepancy(digits, pool, layout):
    step, images = game(digits, pool, WRITTEN, layout=layout)
    step.ascend(images, 4, 2)
    *points, _ = points_of(digits, pool, step, images)
    discrepancy = equation_8(*points, step.sampler(generator_at(0, "frequencies", 4, 2)))[0]
    players = list(step.sampler.parameters())
    for player, expected in zip(players, torch.autograd.grad(7 * discrepancy.sum(), players), strict=True):
        assert (player.grad - expected).norm() < 1e-3 * expected.norm()


@pytest.mark.parametrize("name", ["mmd", "dm", "mse"])
def test_a_step_without_frequencies_compares_as_its_name_says(digits, pool, name):
    step, images = game(digits, pool, dataclasses.replace(WRITTEN, discrepancy=name))
    losses = step.backward(images, 4)
    real, synthetic, _ = points_of(digits, pool, step, images)

    def mean(kernel, a, b):
        return kernel(torch.cdist(a, b).square()).mean((1, 2))

    expected = {
        "mmd": sum(
            sign * mean(lambda square: (-square / 2).exp(), a, b)
            for sign, a, b in ((1, real, real), (1, synthetic, synthetic), (-2, real, synthetic))
        ),
        "dm": (real.mean(1) - synthetic.mean(1)).square().sum(1),
        "mse": mean(lambda square: square, real, synthetic),
    }
    assert torch.allclose(losses.discrepancy, expected[name], rtol=1e-3, atol=1e-6)
    assert not losses.amplitude.any()
    assert not losses.phase.any()


@pytest.mark.parametrize(("precision", "products"), [("float32", "highest"), ("bfloat16", "high")])
def test_products_are_rounded_where_the_networks_are(digits, pool, precision, products):
    step, images = game(digits, pool, dataclasses.replace(SMALL, precision=precision))
    seen = []
    step.sampler.register_forward_hook(lambda *_: seen.append(torch.get_float32_matmul_precision()))
    step.backward(images, 0)
    step.ascend(images, 0, 1)
    assert seen == [products] * 2
    assert torch.get_float32_matmul_precision() == "highest"


@pytest.mark.parametrize(("shared", "features"), [(True, "fresh"), (False, "fresh"), (False, "bank")])
def test_classes_and_real_images_in_chunks_give_the_gradients_of_all_at_once(digits, pool, shared, features):
    config, gradients = dataclasses.replace(SMALL, augment_shared=shared, real_features=features), []
    for layout in (Layout(10, 300), Layout(3, 7)):
        step, images = game(digits, pool, config, layout=layout)
        assert step.layout == layout
        step.backward(images, 0)
        gradients.append((images.grad, next(step.sampler.parameters()).grad))
    assert torch.allclose(gradients[0][0], gradients[1][0], rtol=1e-4, atol=1e-5)
    assert torch.allclose(gradients[0][1], gradients[1][1], rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("features", ["fresh", "bank"])
def test_a_part_of_the_classes_gets_the_gradients_it_has_among_all(digits, pool, shared, features):
    config = dataclasses.replace(SMALL, augment_shared=shared, real_features=features)
    whole, images = game(digits, pool, config)
    losses = whole.backward(images, 3)
    part, _ = game(digits, pool, config, part=slice(4, 7))
    assert part.layout.classes <= 3
    some = images[:, 4:7].clone()
    assert torch.allclose(part.backward(some, 3).discrepancy, losses.discrepancy[4:7], rtol=1e-5)
    assert torch.allclose(some.grad, images.grad[:, 4:7], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", DISCREPANCIES)
def test_every_discrepancy_falls_along_its_image_gradient(digits, pool, name):
    step, images = game(digits, pool, dataclasses.replace(SMALL, discrepancy=name, calibration=0))
    before = step.backward(images, 0).discrepancy.mean()
    images = images - 1e-2 * images.grad / images.grad.norm()
    assert step.backward(images, 0).discrepancy.mean() < before


def test_amplitude_and_phase_are_those_that_the_discrepancy_weighs(digits, pool):
    losses = {}
    for alpha in (0.0, 1.0):
        step, images = game(digits, pool, dataclasses.replace(SMALL, alpha=alpha, calibration=0))
        losses[alpha] = step.backward(images, 0)
    # Jensen: the mean of a square root is below the root of the mean, and not far below
    for alpha, part in ((0.0, losses[0.0].phase), (1.0, losses[1.0].amplitude)):
        ratio = losses[alpha].discrepancy / part.sqrt()
        assert 0.5 < ratio.min() <= ratio.max() <= 1


def test_a_bank_of_one_entry_refreshed_at_every_step_is_fresh(digits, pool):
    bank = dataclasses.replace(SMALL, real_features="bank", bank_size=1, bank_refresh=1)
    (fresh, images), (banked, _) = game(digits, pool), game(digits, pool, bank)
    for number in (0, 1, 5):
        losses = [step.backward(images, number).discrepancy for step in (fresh, banked)]
        assert torch.equal(*losses)


def test_a_bank_looks_at_real_images_once_per_refresh_and_gives_every_entry(digits, pool, monkeypatch):
    bank = dataclasses.replace(SMALL, real_features="bank", bank_size=3, bank_refresh=4)
    step, _ = game(digits, pool, bank)
    made, make = [], step.real._make
    monkeypatch.setattr(step.real, "_make", lambda entry: made.append(entry) or make(entry))
    used, kept = [], []
    for number in range(40):
        used.append(step.real.prepare(number).number)
        kept.append(list(step.real._bank))
    assert kept == [list(range(number // 4, number // 4 + 3)) for number in range(40)]
    assert made == list(range(12))  # three to begin with, then one every fourth step
    assert all(number // 4 <= entry < number // 4 + 3 for number, entry in enumerate(used))
    assert set(used) >= set(range(2, 10))


def test_a_bank_started_in_the_middle_is_the_one_that_was_there(digits, pool):
    bank = dataclasses.replace(SMALL, real_features="bank", bank_size=3, bank_refresh=2)
    (whole, images), (resumed, _) = game(digits, pool, bank), game(digits, pool, bank)
    for number in range(8):
        expected = whole.backward(images, number).discrepancy
    assert torch.equal(resumed.backward(images, 7).discrepancy, expected)


def test_psi_alone_ascends_without_touching_the_images(digits, pool):
    step, images = game(digits, pool)
    before = step.backward(images, 0).discrepancy.mean()
    gradient, held = images.grad.clone(), images.clone()
    step.sampler.zero_grad()
    step.ascend(images, 0, 1)
    assert torch.equal(images.grad, gradient)
    assert torch.equal(images, held)
    torch.optim.SGD(step.sampler.parameters(), 1e-3, maximize=True).step()
    assert step.backward(images, 0).discrepancy.mean() > before


def test_turns_of_psi_look_at_fresh_real_images_once(digits, pool, monkeypatch):
    (step, images), (single, _) = (
        game(digits, pool, dataclasses.replace(SMALL, sampler_steps=3)),
        game(digits, pool),
    )
    looked, look = [], step.real._look
    monkeypatch.setattr(
        step.real, "_look", lambda entry, classes: looked.append(entry) or look(entry, classes)
    )
    for number in (4, 5):
        for turn in (1, 2):
            step.ascend(images, number, turn)
        expected = single.backward(images, number).discrepancy
        assert torch.equal(step.backward(images, number).discrepancy, expected)
    assert looked == [4, 5]


def test_a_turn_of_psi_has_frequencies_of_its_own(digits, pool):
    step, images = game(digits, pool)
    gradients = []
    for turn in (1, 2):
        step.sampler.zero_grad()
        step.ascend(images, 0, turn)
        gradients.append(next(step.sampler.parameters()).grad.clone())
    assert not torch.allclose(*gradients)


@pytest.mark.parametrize("discrepancy", ["cfd", "mmd"])
def test_a_nested_step_matches_a_prefix_and_the_whole(digits, pool, discrepancy):
    config = dataclasses.replace(SMALL, calibration=0, discrepancy=discrepancy, nested=True)
    images = initial_images(config, digits, pool, ipc=6, seed=0)
    options = {"ipc": 6, "seed": 0, "device": "cpu"}
    nested = MatchingStep(config, digits, pool, **options)
    plain = MatchingStep(dataclasses.replace(config, nested=False), digits, pool, **options)
    lengths = [nested._prefix(6, number) for number in range(6)]
    assert len(set(lengths)) > 2
    for number, length in enumerate(lengths):
        parts = images, images[:length]
        whole, prefix = (plain.backward(part.clone(), number).discrepancy for part in parts)
        found = nested.backward(images, number).discrepancy
        assert torch.allclose(found, (whole + prefix) / 2, rtol=1e-5)


def test_every_scale_of_prefix_is_as_likely(digits, pool):
    step, _ = game(digits, pool, dataclasses.replace(SMALL, nested=True, factor=4))
    drawn = torch.tensor([step._prefix(50 * 16, number) for number in range(4000)])
    assert set((drawn % 16).tolist()) == {0}
    assert (drawn // 16).min() == 1
    assert 40 <= (drawn // 16).max() < 50
    for low, high in ((1, 2), (7, 14), (20, 40)):  # P(low <= k < high) = log(high / low) / log(50)
        share = ((drawn // 16 >= low) & (drawn // 16 < high)).double().mean().item()
        assert share == pytest.approx(0.1772, abs=0.03)
    assert step._prefix(16, 0) is None


def test_bfloat16_rounds_and_changes_nothing_else(digits, pool):
    values = []
    for precision in ("float32", "bfloat16"):
        step, images = game(digits, pool, dataclasses.replace(SMALL, precision=precision))
        losses = step.backward(images, 0)
        values.append((losses.discrepancy, losses.calibration))
    for whole, rounded in zip(*values, strict=True):
        assert not torch.equal(whole, rounded)
        assert torch.allclose(whole, rounded, rtol=0.02)


def test_a_step_draws_by_its_number_alone(digits, pool):
    step, images = game(digits, pool)
    first = step.backward(images, 5).discrepancy
    step.backward(images, 6)
    assert torch.equal(step.backward(images, 5).discrepancy, first)
    assert not torch.equal(step.backward(images, 6).discrepancy, first)


def test_a_class_of_few_images_takes_none_from_the_others(digits, pool):
    """Each class gives as many as before, the small one its own again and again."""
    kept = digits.train.targets > 0
    kept[:2] = True
    few = dataclasses.replace(digits, train=digits.train.where(kept))
    (step, images), (whole, _) = game(few, pool), game(digits, pool)
    losses, expected = step.backward(images, 3), whole.backward(images, 3)
    assert torch.equal(losses.discrepancy[1:], expected.discrepancy[1:])
    assert not torch.equal(losses.discrepancy[0], expected.discrepancy[0])
    options = {"ipc": 2, "kept_networks": 0, "device": "cpu"}
    memory = [Footprint.of(SMALL, pool.template, source, **options) for source in (few, digits)]
    assert memory[0].per_class == memory[1].per_class
    distilling = [passes(Recipe(distill=SMALL), source)["distilling"] for source in (few, digits)]
    assert distilling[0] == distilling[1]


def test_the_real_and_synthetic_images_of_a_step_are_augmented_alike(digits, pool, monkeypatch):
    config = dataclasses.replace(SMALL, real_batch=1)
    step, images = game(digits, pool, config)
    seen, features = [], step.blended.features
    monkeypatch.setattr(step.blended, "features", lambda x: seen.append(x) or features(x))
    rows = step.real.images.draw(1, generator_at(0, "real", 3))
    images = (digits.train.images[rows[:, 0]].float() / 255).expand(2, -1, -1, -1, -1).clone()
    step.backward(images, 3)
    real, synthetic = torch.cat(seen[:-1]), seen[-1].detach()
    assert torch.allclose(synthetic, real.repeat_interleave(2, 0), atol=1e-5)
    assert not torch.allclose(real, step.normalise(images[0]), atol=1e-3)


def test_unshared_augmentation_differs_between_the_images_of_a_step(digits, pool):
    step, _ = game(digits, pool, dataclasses.replace(SMALL, augment_shared=False))
    same = step.normalise(digits.train.images[:1].float() / 255).repeat(20, 1, 1, 1)
    views = step._augment(same, 3, 3, slice(None))
    assert len({tuple(view.flatten().tolist()) for view in views}) == 20
    assert not torch.equal(step._augment(same, 4, 3, slice(None)), views)


def test_a_blend_is_the_straight_line_between_initial_and_trained_weights(digits, pool):
    network = FlatNetwork(pool.template, "cpu")
    model = pool.blend(1, 0.25, network)
    flat = torch.nn.utils.parameters_to_vector(model.parameters())
    assert torch.allclose(flat, 0.75 * pool.trajectory[1, 0] + 0.25 * pool.trained[1])
    again = pool.blend(0, 1.0, network)
    assert torch.equal(torch.nn.utils.parameters_to_vector(again.parameters()), pool.trained[0])


def test_features_are_unit_vectors_of_the_last_map(pool):
    network = FrozenNetwork(pool, "cpu")
    network.load(0, 0.5)
    features = network.features(torch.randn(4, 1, 8, 8, generator=generator_at(0)))
    assert features.shape == (4, 8 * 2 * 2)
    assert torch.allclose(features.norm(dim=1), torch.ones(4))


def test_compiled_passes_give_what_plain_ones_give(digits):
    config = NetworkConfig(width=8, depth=2, activation="sigmoid")  # of ReLU rounding may turn a gradient off
    networks = [build(config, digits, seed) for seed in range(4)]
    weights = torch.stack([parameters_to_vector(network.parameters()).detach() for network in networks])
    smooth, gradients, graphs = FeaturePool(networks[0], weights.unflatten(0, (2, 2))), [], []
    for compiled in (False, True):
        counters.clear()
        step, images = game(digits, smooth, layout=Layout(10, 100), compile=compiled)
        step.backward(images, 0)
        losses = step.backward(images, 1)  # by another network, so its weights must not be compiled in
        gradients.append((losses.discrepancy, losses.calibration, images.grad))
        graphs.append(counters["stats"]["unique_graphs"])
    assert graphs == [0, 3]  # features of real images, those of synthetic ones, logits
    for plain, fused in zip(*gradients, strict=True):
        assert torch.allclose(plain, fused, rtol=1e-3, atol=1e-4)
