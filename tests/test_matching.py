"""One step of the game: what is drawn, and what the step does to each player."""

import dataclasses

import pytest
import torch

from distilled_data.randomness import generator_at
from ncfm_engine.config import DistillConfig
from ncfm_engine.distill import initial_images
from ncfm_engine.matching import MatchingStep, RealBatches
from ncfm_engine.pretrain import FlatNetwork
from ncfm_engine.sampling import ClassSampler

SMALL = DistillConfig(real_batch=30, frequencies=64, factor=1)


def game(digits, pool, config=SMALL, **options) -> tuple[MatchingStep, torch.Tensor]:
    images = initial_images(config, digits, ipc=2, seed=0).requires_grad_()
    return MatchingStep(config, digits, pool, seed=0, device="cpu", **options), images


def test_real_batches_hold_their_class_and_no_image_twice(digits):
    real = RealBatches(digits, 50, "cpu")
    smallest = int(digits.train.counts.min())
    index = real.sampler.draw(smallest, generator_at(0))
    assert (digits.train.targets[index] == torch.arange(10)[:, None]).all()
    assert all(len(set(row.tolist())) == smallest for row in index)
    assert real.draw(generator_at(0)).shape == (10, 50, 1, 8, 8)


def test_real_batches_differ_between_steps_and_cover_the_whole_class(digits):
    sampler = ClassSampler(digits.train)
    draws = [sampler.draw(30, generator_at(0, "real", step)) for step in range(60)]
    assert not torch.equal(draws[0].sort().values, draws[1].sort().values)
    assert len(torch.cat([d.flatten() for d in draws]).unique()) == len(digits.train)


def test_every_step_of_the_game_draws_other_real_images(digits, pool, monkeypatch):
    step, images = game(digits, pool)
    drawn, draw = [], step.real.draw

    def watch(*arguments):
        drawn.append(draw(*arguments))
        return drawn[-1]

    monkeypatch.setattr(step.real, "draw", watch)
    step.backward(images, 0)
    step.backward(images, 1)
    assert not torch.equal(*drawn)


def test_a_draw_larger_than_a_class_gives_every_image_before_any_twice(digits):
    counts = digits.train.counts
    index = ClassSampler(digits.train).draw(int(counts.max()) + 20, generator_at(0))
    for row, count in zip(index, counts.tolist(), strict=True):
        assert len(row[:count].unique()) == count


def test_a_real_batch_is_never_larger_than_the_smallest_class(digits):
    assert RealBatches(digits, 10_000, "cpu").per_class == int(digits.train.counts.min())


def test_a_chunk_draws_what_the_whole_draws(digits):
    real = RealBatches(digits, 20, "cpu")
    whole = real.draw(generator_at(1))
    assert torch.equal(real.draw(generator_at(1), slice(3, 5)), whole[3:5])


def test_one_image_step_lowers_the_discrepancy(digits, pool):
    step, images = game(digits, pool, dataclasses.replace(SMALL, calibration=0))
    before = step.backward(images, 0).discrepancy
    with torch.no_grad():
        images -= 1e-2 * images.grad / images.grad.norm()
    assert step.backward(images, 0).discrepancy < before


def test_one_step_of_the_sampling_network_raises_the_discrepancy(digits, pool):
    step, images = game(digits, pool)
    before = step.backward(images, 0).discrepancy
    ascent = torch.optim.SGD(step.sampler.parameters(), 1e-3, maximize=True)
    ascent.step()
    assert step.backward(images, 0).discrepancy > before


def test_an_image_step_lowers_the_calibration_loss(digits, pool):
    step, images = game(digits, pool, dataclasses.replace(SMALL, weight=0, calibration=1))
    before = step.backward(images, 0).calibration
    with torch.no_grad():
        images -= 1e-1 * images.grad / images.grad.norm()
    assert step.backward(images, 0).calibration < before


def test_calibration_gradient_is_that_of_the_mean_cross_entropy_of_each_class(digits, pool):
    config = dataclasses.replace(SMALL, weight=0, calibration=1, augment="flip")
    step, images = game(digits, pool, config)
    loss = step.backward(images, 0).calibration
    index = int(torch.randint(2, (), generator=generator_at(0, "network", 0)))
    network = FlatNetwork(pool.template, "cpu")
    pool.blend(index, 1.0, network)
    flipped = step._augment((images.detach().flatten(0, 1) - step.mean) / step.std, 0)
    labels = torch.arange(10).repeat(2)
    expected = torch.nn.functional.cross_entropy(network.network(flipped), labels)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)


def test_classes_in_chunks_give_the_gradients_of_all_at_once(digits, pool):
    gradients = []
    for chunk in (None, 3):
        step, images = game(digits, pool, classes_per_chunk=chunk)
        step.backward(images, 0)
        gradients.append((images.grad, next(step.sampler.parameters()).grad))
    assert torch.allclose(gradients[0][0], gradients[1][0], rtol=1e-4, atol=1e-5)
    assert torch.allclose(gradients[0][1], gradients[1][1], rtol=1e-3, atol=1e-5)


def test_a_step_draws_by_its_number_alone(digits, pool):
    step, images = game(digits, pool)
    first = step.backward(images, 5).discrepancy
    step.backward(images, 6)
    assert torch.equal(step.backward(images, 5).discrepancy, first)
    assert not torch.equal(step.backward(images, 6).discrepancy, first)


def test_the_real_and_synthetic_images_of_a_step_are_augmented_alike(digits, pool):
    step, _ = game(digits, pool)
    image = digits.train.images[:1].float() / 255
    alone, among = step._augment(image, 3), step._augment(image.repeat(7, 1, 1, 1), 3)
    assert torch.allclose(among, alone.expand_as(among), atol=1e-6)
    assert not torch.allclose(alone, image, atol=1e-3)


def test_a_blend_is_the_straight_line_between_initial_and_trained_weights(digits, pool):
    network = FlatNetwork(pool.template, "cpu")
    model = pool.blend(1, 0.25, network)
    flat = torch.nn.utils.parameters_to_vector(model.parameters())
    assert torch.allclose(flat, 0.75 * pool.initial[1] + 0.25 * pool.trained[1])
    again = pool.blend(0, 1.0, network)
    assert torch.equal(torch.nn.utils.parameters_to_vector(again.parameters()), pool.trained[0])


def test_features_are_unit_vectors_of_the_last_map(digits, pool):
    step, _ = game(digits, pool)
    features = step._features(torch.randn(4, 1, 8, 8, generator=generator_at(0)))
    assert features.shape == (4, 8 * 2 * 2)
    assert torch.allclose(features.norm(dim=1), torch.ones(4))
