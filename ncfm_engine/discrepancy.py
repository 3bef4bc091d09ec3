"""Neural characteristic function discrepancy, equations 5 to 8 of NCFM (arXiv 2502.20653).

Computed in float32 (or float64 when given that) whatever autocast is on. Below it stand the distances that
it generalises, with the same shapes. The gradient of `mmd` is rounded if `backward` too is called in
autocast, which torch advises against.
"""

import torch
from torch import Tensor

# Keeps square roots differentiable at zero; far below the sampling error of any batch, 1/sqrt(B).
_TINY = 1e-12


class _MeanWave(torch.autograd.Function):
    """(mean cos, mean sin) over the batch of angle = features @ frequencies.T; keeps the angle alone.

    Plain autograd keeps as much, but takes three more tensors of the angle's size at its peak.
    """

    @staticmethod
    def forward(ctx, features: Tensor, frequencies: Tensor) -> tuple[Tensor, Tensor]:
        angle = features @ frequencies.T  # [C, B, T]
        ctx.save_for_backward(features, frequencies, angle)
        return angle.cos().mean(1), angle.sin().mean(1)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, cosine: Tensor, sine: Tensor):  # [C, T] each
        features, frequencies, angle = ctx.saved_tensors
        slope = angle.cos().mul_(sine[:, None]).sub_(angle.sin().mul_(cosine[:, None]))
        slope = slope.div_(features.shape[1])
        with torch.autocast(features.device.type, enabled=False):  # whatever the caller's backward is in
            of_features = slope @ frequencies if ctx.needs_input_grad[0] else None
            of_frequencies = (
                slope.flatten(0, 1).T @ features.flatten(0, 1) if ctx.needs_input_grad[1] else None
            )
        return of_features, of_frequencies


def characteristic_function(features: Tensor, frequencies: Tensor) -> tuple[Tensor, Tensor]:
    """Equation 5: the empirical characteristic function 1/B sum_b exp(j <t, x_b>).

    features [C, B, D], frequencies [T, D] -> (real part [C, T], imaginary part [C, T]).
    """
    with torch.autocast(features.device.type, enabled=False):
        features = _exact(features)
        return _MeanWave.apply(features, frequencies.to(features.dtype))


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


def weigh(amplitude: Tensor, phase: Tensor, alpha: float) -> Tensor:
    """Equation 8 on what `amplitude_and_phase` returned, [C, T] each: [C].

    `alpha` weighs amplitude (diversity) against phase (realism); at 1/2 the bracket is half of |a - b|^2.
    """
    square = alpha * amplitude + (1 - alpha) * phase
    return ((square + _TINY).sqrt() - _TINY**0.5).mean(1)


def ncfd(real: Tensor, synthetic: Tensor, frequencies: Tensor, alpha: float = 0.5) -> Tensor:
    """Discrepancy of each class: real [C, B, D], synthetic [C, S, D], frequencies [T, D] -> [C].

    Zero for equal batches, symmetric, differentiable in all three.
    """
    functions = [characteristic_function(features, frequencies) for features in (real, synthetic)]
    return weigh(*amplitude_and_phase(*functions), alpha)


def mmd(real: Tensor, synthetic: Tensor) -> Tensor:
    """Squared maximum mean discrepancy (Gretton et al. 2012) of each class under exp(-|x - y|^2 / 2): [C].

    By Bochner's theorem it is the mean of |a - b|^2 over all standard normal frequencies.
    """

    def kernel(a: Tensor, b: Tensor) -> Tensor:
        with torch.autocast(a.device.type, enabled=False):
            square = a.square().sum(2)[:, :, None] + b.square().sum(2)[:, None] - 2 * a @ b.mT
            return (-square / 2).exp().mean((1, 2))

    real, synthetic = _exact(real), _exact(synthetic)
    return kernel(real, real) + kernel(synthetic, synthetic) - 2 * kernel(real, synthetic)


def dm(real: Tensor, synthetic: Tensor) -> Tensor:
    """Squared distance of the mean features of each class (DM, arXiv 2110.04181): [C]."""
    return (_exact(real).mean(1) - _exact(synthetic).mean(1)).square().sum(1)


def mse(real: Tensor, synthetic: Tensor) -> Tensor:
    """Squared distance between the points of each class, the mean over all pairs: [C]."""
    real, synthetic = _exact(real), _exact(synthetic)
    spread = (real.square().sum(2).mean(1) - real.mean(1).square().sum(1)).clamp_min(0)
    return (synthetic - real.mean(1, keepdim=True)).square().sum(2).mean(1) + spread


def _exact(features: Tensor) -> Tensor:
    return features.to(torch.promote_types(features.dtype, torch.float32))
