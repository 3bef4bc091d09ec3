"""The sampling network: distinct frequencies, seeded, differentiable."""

import torch

from ncfm_engine.frequencies import GaussianFrequencies, SamplingNetwork


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_all_frequencies_are_distinct_rows():
    for count, scales in ((16, 1), (100, 7), (1024, 64)):
        network, made = SamplingNetwork(24, count), []
        network.layers.register_forward_hook(lambda layers, noise, scale, made=made: made.append(len(scale)))
        frequencies = network(generator())
        assert made == [scales]
        assert frequencies.shape == (count, 24)
        assert len(frequencies.unique(dim=0)) == count


def test_frequencies_of_one_scale_are_independent_in_direction():
    rows = torch.nn.functional.normalize(SamplingNetwork(256, 64)(generator()))
    cosine = rows @ rows.T - torch.eye(64)
    assert cosine.abs().max() < 0.35


def test_scales_differ_between_groups_of_sixteen_and_stay_within_e():
    network = SamplingNetwork(512, 1024)
    for parameter in network.parameters():
        parameter.data *= 30  # whatever psi learns, the bound holds
    frequencies = network(generator())
    group = frequencies.view(64, 16, 512).square().mean(1).sqrt()
    # e = 2.72 either way, times the root mean square of 16 normal draws, which lies in 0.3..1.8 here
    assert group.min() > 0.3 / 2.72
    assert group.max() < 1.8 * 2.72
    assert group.std(0).mean() > 0.5


def test_the_same_generator_gives_the_same_frequencies_and_another_gives_others():
    for player in (SamplingNetwork(8, 32), GaussianFrequencies(8, 32)):
        assert torch.equal(player(generator(1)), player(generator(1)))
        assert not torch.equal(player(generator(1)), player(generator(2)))


def test_every_parameter_of_the_sampling_network_gets_a_gradient():
    network = SamplingNetwork(8, 32)
    network(generator()).square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in network.parameters())


def test_the_baseline_is_standard_normal_and_has_nothing_to_learn():
    baseline = GaussianFrequencies(500, 200)
    frequencies = baseline(generator())
    assert not list(baseline.parameters())
    assert abs(frequencies.mean()) < 0.02
    assert abs(frequencies.std() - 1) < 0.02
