"""The discrepancy: its algebra, its closed form, its gradients, and what each player does to it."""

import pytest
import torch

from ncfm_engine.discrepancy import amplitude_and_phase, characteristic_function, dm, mmd, mse, ncfd


def features(seed: int, *shape: int, dtype=torch.float32) -> torch.Tensor:
    draw = torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)
    return torch.nn.functional.normalize(draw, dim=-1)


FREQUENCIES = torch.randn(64, 8, generator=torch.Generator().manual_seed(9)) * 3


@pytest.mark.parametrize("alpha", [0.0, 0.3, 0.5, 1.0])
def test_discrepancy_of_identical_batches_is_exactly_zero(alpha):
    batch = features(0, 3, 20, 8)
    assert ncfd(batch, batch.clone(), FREQUENCIES, alpha).tolist() == [0.0, 0.0, 0.0]


@pytest.mark.parametrize("alpha", [0.0, 0.3, 0.5, 1.0])
def test_discrepancy_is_symmetric_and_positive(alpha):
    a, b = features(0, 3, 20, 8), features(1, 3, 5, 8)
    assert torch.allclose(ncfd(a, b, FREQUENCIES, alpha), ncfd(b, a, FREQUENCIES, alpha), rtol=1e-5)
    assert (ncfd(a, b, FREQUENCIES, alpha) > 0).all()


def test_discrepancy_is_the_root_of_half_the_squared_difference_where_nothing_else_is_said():
    a, b = features(0, 3, 20, 8), features(1, 3, 5, 8)
    difference = [torch.exp(1j * (x @ FREQUENCIES.T)).mean(1) for x in (a, b)]
    expected = ((difference[0] - difference[1]).abs() / 2**0.5).mean(1)
    assert torch.allclose(ncfd(a, b, FREQUENCIES), expected, rtol=1e-5)


def test_classes_do_not_mix():
    a, b = features(0, 3, 20, 8), features(1, 3, 5, 8)
    alone = torch.cat([ncfd(a[c : c + 1], b[c : c + 1], FREQUENCIES) for c in range(3)])
    assert torch.allclose(ncfd(a, b, FREQUENCIES), alone, rtol=1e-5)


def test_characteristic_function_of_many_gaussian_samples_is_the_closed_form():
    # E exp(j t x) = exp(j t mu - t' S t / 2) for a normal x, here with S = diag(spread**2)
    mean, spread = torch.tensor([0.4, -0.2, 0.1]), torch.tensor([0.5, 0.2, 0.8])
    frequencies = torch.tensor([[1.0, 0, 0], [0, 2, 0], [0, 0, 1.5], [1, -1, 1]])
    draws = torch.randn(1, 200_000, 3, generator=torch.Generator().manual_seed(0)) * spread + mean
    real, imaginary = characteristic_function(draws, frequencies)
    length = (-0.5 * (frequencies * spread).square().sum(1)).exp()
    angle = frequencies @ mean
    assert torch.allclose(real[0], length * angle.cos(), atol=5e-3)
    assert torch.allclose(imaginary[0], length * angle.sin(), atol=5e-3)


def test_discrepancy_of_two_gaussians_that_differ_in_mean_is_the_closed_form():
    # Equal spreads: no amplitude difference, so NCFD = mean_t sqrt((1 - alpha) 2 L^2 (1 - cos(t d)))
    frequencies = torch.linspace(-3, 3, 31)[:, None]
    generator = torch.Generator().manual_seed(0)
    a = torch.randn(1, 200_000, 1, generator=generator)
    b = torch.randn(1, 200_000, 1, generator=generator) + 0.7
    length = (-0.5 * frequencies.square()).exp()
    expected = (0.7 * 2 * length.square() * (1 - (0.7 * frequencies).cos())).sqrt().mean()
    assert ncfd(a, b, frequencies, alpha=0.3).item() == pytest.approx(expected.item(), rel=0.02)


def test_amplitude_and_phase_are_those_of_complex_numbers():
    generator = torch.Generator().manual_seed(5)
    a, b = (torch.randn(2, 3, 40, generator=generator, dtype=torch.float64) / 2 for _ in range(2))
    one, other = torch.complex(*a), torch.complex(*b)
    amplitude, phase = amplitude_and_phase((a[0], a[1]), (b[0], b[1]))
    lengths, turn = one.abs() * other.abs(), one.angle() - other.angle()
    assert torch.allclose(amplitude, (one.abs() - other.abs()).square(), rtol=1e-5)
    assert torch.allclose(phase, 2 * lengths * (1 - turn.cos()), rtol=1e-5)


def test_rounding_makes_no_phase_of_which_there_is_no_root():
    points = features(0, 3, 20, 8)
    points = torch.cat([points, -points], 1)  # symmetric, and seen from afar: no phase
    assert (ncfd(points, 2 * points, FREQUENCIES / 10, alpha=0) < 1e-3).all()


def test_amplitude_sees_spread_and_phase_sees_shift():
    points, frequencies = features(0, 1, 50, 8, dtype=torch.float64), FREQUENCIES.double()
    shifted = amplitude_and_phase(
        characteristic_function(points, frequencies), characteristic_function(points + 0.5, frequencies)
    )
    assert shifted[0].max() < 1e-12
    assert shifted[1].mean() > 0.01
    centred = points - points.mean(1, keepdim=True)
    centred = torch.cat([centred, -centred], 1)  # symmetric: real characteristic functions, no phase
    small = frequencies / 10
    spread = amplitude_and_phase(
        characteristic_function(centred, small), characteristic_function(2 * centred, small)
    )
    assert spread[1].max() < 1e-12
    assert spread[0].mean() > 1e-4


@pytest.mark.parametrize("alpha", [0.0, 0.3, 0.5, 1.0])
def test_gradients_agree_with_finite_differences(alpha):
    a, b = (features(s, 2, n, 4, dtype=torch.float64).requires_grad_() for s, n in ((0, 6), (1, 3)))
    t = torch.randn(5, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(2)).requires_grad_()
    assert torch.autograd.gradcheck(lambda *x: ncfd(*x, alpha), (a, b, t))


@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0])
def test_gradients_are_finite_at_zero_amplitude_and_at_identical_batches(alpha):
    opposite = torch.tensor([[[0.5], [-0.5]]])  # at t = pi the two cancel: cos(pi/2) twice
    synthetic = torch.tensor([[[0.5], [-0.5]]], requires_grad=True)
    ncfd(opposite, synthetic, torch.tensor([[torch.pi], [1.0]]), alpha).sum().backward()
    assert synthetic.grad.isfinite().all()


def test_autocast_does_not_lower_the_precision():
    a, b = features(0, 1, 200, 8), features(1, 1, 200, 8)
    b.requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = ncfd(a, b, FREQUENCIES)
        [gradient] = torch.autograd.grad(inside.sum(), b)
    outside = ncfd(a, b, FREQUENCIES)
    assert torch.equal(inside, outside)
    assert torch.equal(gradient, torch.autograd.grad(outside.sum(), b)[0])


@pytest.mark.parametrize("distance", [lambda a, b: ncfd(a, b, FREQUENCIES), mmd, dm, mse])
def test_values_and_gradients_are_exact_but_for_the_rounding_of_float32(distance):
    found = []
    for dtype in (torch.float32, torch.float64):
        a, b = features(0, 2, 200, 8).to(dtype), features(1, 2, 100, 8).to(dtype).requires_grad_()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            value = distance(a, b)
        found.append((value, torch.autograd.grad(value.sum(), b)[0]))
    for rounded, exact in zip(*found, strict=True):
        assert (rounded - exact).norm() < 1e-4 * exact.norm()
    halves = [features(seed, 2, 50, 8).bfloat16() for seed in (0, 1)]
    assert torch.equal(distance(*halves), distance(*(half.float() for half in halves)))


def test_mmd_is_the_mean_squared_difference_over_normal_frequencies():
    # Bochner: E_t |a(t) - b(t)|^2 under t ~ N(0, I) is the MMD^2 of the Gaussian kernel of width one
    a, b = features(0, 2, 20, 8), features(1, 2, 5, 8)
    frequencies = torch.randn(200_000, 8, generator=torch.Generator().manual_seed(3))
    waves = [characteristic_function(x, frequencies) for x in (a, b)]
    expected = sum((x - y).square().mean(1) for x, y in zip(*waves, strict=True))
    assert torch.allclose(mmd(a, b), expected, rtol=0.02)


def test_dm_is_the_squared_distance_of_the_means():
    a, b = torch.tensor([[[1.0, 0], [3, 0]]]), torch.tensor([[[0.0, 1]]])
    assert dm(a, b).tolist() == [5.0]  # (2, 0) and (0, 1)


def test_mse_is_the_mean_squared_distance_of_all_pairs():
    a, b = features(0, 3, 20, 8) + 0.2, features(1, 3, 5, 8)
    expected = (a[:, :, None] - b[:, None]).square().sum(3).mean((1, 2))
    assert torch.allclose(mse(a, b), expected, rtol=1e-5)


@pytest.mark.parametrize("distance", [mmd, dm, mse])
def test_the_relatives_keep_classes_apart_and_have_gradients(distance):
    a, b = (features(s, 2, n, 4, dtype=torch.float64).requires_grad_() for s, n in ((0, 6), (1, 3)))
    alone = torch.cat([distance(a[c : c + 1], b[c : c + 1]) for c in range(2)])
    assert torch.allclose(distance(a, b), alone)
    assert torch.autograd.gradcheck(distance, (a, b))


def test_mse_does_not_fall_to_zero_at_identical_batches_and_the_others_do():
    batch = features(0, 1, 20, 8)
    assert mmd(batch, batch).abs().max() < 1e-6
    assert dm(batch, batch).max() < 1e-12
    assert mse(batch, batch).item() > 0.5
