"""The loss on soft labels."""

import math

import pytest
import torch
import torch.nn.functional as F

from distilled_data import UsageError, soft_cross_entropy


@pytest.fixture
def logits():
    return torch.randn(6, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def test_it_is_cross_entropy_on_probabilities_and_on_class_numbers(logits):
    numbers = torch.tensor([0, 1, 2, 3, 0, 1])
    probabilities = (F.one_hot(numbers, 4) + 0.5).div(3).double()
    assert torch.equal(soft_cross_entropy(logits, numbers), F.cross_entropy(logits, numbers))
    assert torch.equal(soft_cross_entropy(logits, probabilities), F.cross_entropy(logits, probabilities))
    by_hand = -sum(
        p * (row[k] - row.exp().sum().log()) for row, ps in zip(logits, probabilities, strict=True)
        for k, p in enumerate(ps)
    ) / 6  # fmt: skip
    torch.testing.assert_close(soft_cross_entropy(logits, probabilities), by_hand)


@pytest.mark.parametrize("targets", [torch.zeros(6, 5), torch.zeros(5, 4), torch.zeros(6)])
def test_probabilities_of_other_classes_or_images_are_refused(logits, targets):
    with pytest.raises(UsageError, match=r"\[6, 4\], as the logits are, or class numbers, got torch.float32"):
        soft_cross_entropy(logits, targets)


@pytest.mark.parametrize("temperature", [0, -4.0, math.nan, math.inf, "4", None])
def test_a_temperature_that_nothing_can_be_divided_by_is_refused(logits, temperature):
    with pytest.raises(UsageError, match="temperature must be positive"):
        soft_cross_entropy(logits, logits.softmax(1), temperature)


def test_a_temperature_may_be_a_tensor_and_is_not_looked_at(logits):
    soft = logits.softmax(1)
    temperature = torch.tensor(4.0, dtype=torch.float64, requires_grad=True)
    loss = soft_cross_entropy(logits, soft, temperature)
    torch.testing.assert_close(loss, soft_cross_entropy(logits, soft, 4.0))
    assert loss.requires_grad
    assert soft_cross_entropy(logits.to("meta"), soft.to("meta"), temperature.to("meta")).is_meta


def test_a_network_that_says_what_the_teacher_says_has_no_gradient_at_the_temperature(logits):
    student = logits.clone().requires_grad_()
    for temperature in (1.0, 4.0):
        soft = (logits / temperature).softmax(1)
        (gradient,) = torch.autograd.grad(soft_cross_entropy(student, soft, temperature), student)
        torch.testing.assert_close(gradient, torch.zeros_like(gradient))


def test_temperature_leaves_the_size_of_gradients(logits):
    teacher, student = logits * 0.01, torch.zeros_like(logits).requires_grad_()  # where softmax is linear
    sizes = []
    for temperature in (1.0, 10.0):
        soft = (teacher / temperature).softmax(1)
        (gradient,) = torch.autograd.grad(soft_cross_entropy(student, soft, temperature), student)
        sizes.append(gradient.norm())
    torch.testing.assert_close(sizes[0], sizes[1], rtol=0.02, atol=0)
