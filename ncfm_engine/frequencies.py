"""Where the characteristic functions are compared: the sampling network psi, and its fixed baseline."""

import torch
from torch import Tensor, nn

DRAWS_PER_SCALE = 16  # frequencies that share one scale vector, each with a normal draw of its own
LOG_RANGE = 1.0  # scales lie within a factor of exp(LOG_RANGE) around one
NOISE, HIDDEN = 64, 128  # units of the perceptron


class SamplingNetwork(nn.Module):
    """psi of NCFM §4.2.2: T distinct frequencies from an adversarial Gaussian scale mixture.

    A small perceptron maps noise to K = T/16 scale vectors [K, D]; each scales 16 independent standard
    normal draws. The scales are kept within a factor of e around one, because a frequency far beyond
    the features' spread sees only sampling noise, which would always look like a discrepancy.
    """

    def __init__(self, dim: int, num_frequencies: int):
        super().__init__()
        self.dim, self.num_frequencies = dim, num_frequencies
        self.layers = nn.Sequential(nn.Linear(NOISE, HIDDEN), nn.LeakyReLU(0.2), nn.Linear(HIDDEN, dim))

    def forward(self, generator: torch.Generator) -> Tensor:
        """Frequencies [T, D], differentiable in the parameters."""
        scales = -(-self.num_frequencies // DRAWS_PER_SCALE)
        device = generator.device
        noise = torch.randn(scales, NOISE, generator=generator, device=device)
        normal = torch.randn(scales, DRAWS_PER_SCALE, self.dim, generator=generator, device=device)
        scale = (LOG_RANGE * self.layers(noise).tanh()).exp()
        return (scale[:, None] * normal).flatten(0, 1)[: self.num_frequencies]


class GaussianFrequencies(nn.Module):
    """The baseline without a player: T standard normal frequencies, new at each call."""

    def __init__(self, dim: int, num_frequencies: int):
        super().__init__()
        self.dim, self.num_frequencies = dim, num_frequencies

    def forward(self, generator: torch.Generator) -> Tensor:
        """Frequencies [T, D]."""
        return torch.randn(self.num_frequencies, self.dim, generator=generator, device=generator.device)
