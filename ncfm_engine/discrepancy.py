"""Neural characteristic function discrepancy, equations 5 to 8 of NCFM (arXiv 2502.20653).

Computed in float32 (or float64 when given that) whatever autocast is on.
"""

import torch
from torch import Tensor

# Keeps square roots differentiable at zero; far below the sampling error of any batch, 1/sqrt(B).
_TINY = 1e-12


def characteristic_function(features: Tensor, frequencies: Tensor) -> tuple[Tensor, Tensor]:
    """Equation 5: the empirical characteristic function 1/B sum_b exp(j <t, x_b>).

    features [C, B, D], frequencies [T, D] -> (real part [C, T], imaginary part [C, T]).
    """
    with torch.autocast(features.device.type, enabled=False):
        dtype = torch.promote_types(features.dtype, torch.float32)
        angle = features.to(dtype) @ frequencies.to(dtype).T  # [C, B, T]
        return angle.cos().mean(1), angle.sin().mean(1)


def amplitude_and_phase(
    real: tuple[Tensor, Tensor], synthetic: tuple[Tensor, Tensor]
) -> tuple[Tensor, Tensor]:
    """Equation 7: squared amplitude difference and phase difference of two characteristic functions, [C, T].

    Their sum is |a - b|^2, so the phase term 2 |a||b| (1 - cos) is computed as |a - b|^2 - amplitude: two
    equal functions then give exactly zero, where 2 (|a||b| - Re a conj b) would leave rounding errors of
    the order of 1e-7, which the square root of equation 8 makes 3e-4.
    """
    (a_re, a_im), (b_re, b_im) = real, synthetic
    a_square, b_square = a_re.square() + a_im.square(), b_re.square() + b_im.square()
    a_length, b_length = (a_square + _TINY).sqrt(), (b_square + _TINY).sqrt()
    amplitude = ((a_square - b_square) / (a_length + b_length)).square()
    distance = (a_re - b_re).square() + (a_im - b_im).square()
    return amplitude, (distance - amplitude).clamp_min(0)


def ncfd_of(real: tuple[Tensor, Tensor], synthetic: tuple[Tensor, Tensor], alpha: float = 0.5) -> Tensor:
    """Equation 8 on characteristic functions ([C, T], [C, T]): [C]."""
    amplitude, phase = amplitude_and_phase(real, synthetic)
    square = alpha * amplitude + (1 - alpha) * phase
    return ((square + _TINY).sqrt() - _TINY**0.5).mean(1)


def ncfd(real: Tensor, synthetic: Tensor, frequencies: Tensor, alpha: float = 0.5) -> Tensor:
    """Discrepancy of each class: real [C, B, D], synthetic [C, S, D], frequencies [T, D] -> [C].

    Zero for equal batches, symmetric, differentiable in all three. `alpha` weighs amplitude (diversity)
    against phase (realism); at 1/2 the bracket is half of |a - b|^2.
    """
    return ncfd_of(
        characteristic_function(real, frequencies), characteristic_function(synthetic, frequencies), alpha
    )
