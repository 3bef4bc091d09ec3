"""Which real images stand for a class."""

import sys

import pytest
import torch

from distilled_data.errors import MissingExtraError
from distilled_data.randomness import generator_at
from ncfm_engine.selection import clusters, herding


@pytest.fixture
def features():
    """Three groups of 30, 20 and 10 points around corners of a cube, far apart."""
    centres = torch.eye(4)[:3].repeat_interleave(torch.tensor([30, 20, 10]), 0)
    return centres + 0.05 * torch.randn(60, 4, generator=generator_at(7))


def test_herding_follows_the_mean_better_than_random_images_at_every_length(features):
    mean, chosen = features.mean(0), herding(features, 20)
    assert len(set(chosen.tolist())) == 20
    for length in range(1, 21):
        draws = [torch.randperm(60, generator=generator_at(n))[:length] for n in range(200)]
        random = torch.stack([(features[rows].mean(0) - mean).norm() for rows in draws])
        assert (features[chosen[:length]].mean(0) - mean).norm() <= random.quantile(0.1)


def test_a_prefix_of_a_herd_is_the_shorter_herd(features):
    assert torch.equal(herding(features, 20)[:7], herding(features, 7))


def test_the_first_of_a_herd_is_the_point_nearest_to_the_mean(features):
    distance = (features - features.mean(0)).norm(dim=1)
    assert herding(features, 1).item() == distance.argmin()


def test_missing_scikit_learn_names_the_extra(features, monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.cluster", None)
    with pytest.raises(MissingExtraError, match=r"'scikit-learn'.*distilled-data\[data\]"):
        clusters(features, 3, seed=0)


def test_clusters_give_one_point_of_each_group_the_largest_first(features):
    chosen = clusters(features, 3, seed=0)
    assert [0 <= chosen[0] < 30, 30 <= chosen[1] < 50, 50 <= chosen[2] < 60] == [True] * 3
    for row, group in zip(chosen.tolist(), (slice(0, 30), slice(30, 50), slice(50, 60)), strict=True):
        distance = (features[group] - features[group].mean(0)).norm(dim=1)
        assert row == group.start + distance.argmin()
    assert torch.equal(clusters(features, 3, seed=0), chosen)
    drawn = [clusters(features, 12, seed).tolist() for seed in (5, 2**32 + 5, 2**31 + 5, 6)]
    assert drawn[0] == drawn[1]
    assert drawn[0] not in drawn[2:]


@pytest.mark.parametrize("choose", [herding, lambda features, count: clusters(features, count, 0)])
def test_a_class_with_fewer_images_gives_each_of_them_before_any_one_twice(features, choose):
    chosen = choose(features[:5], 12)
    assert sorted(chosen[:5].tolist()) == [0, 1, 2, 3, 4]
    assert torch.equal(chosen[5:10], chosen[:5])


def test_equal_images_are_one_cluster(features):
    for count in (2, 4):
        assert clusters(features[:1].repeat(6, 1), count, seed=0).tolist() == [0] * count


def test_images_that_are_equal_but_for_rounding_leave_no_cluster_to_another_image(features):
    """Features of equal images differ in the last bits where the batches they are in have other sizes."""
    centres = features[[50, 40, 30, 20]]
    rounded = centres.repeat(10, 1) + 1e-8 * torch.randn(40, 4, generator=generator_at(8))
    chosen = clusters(rounded, 20, seed=0).tolist()
    assert {row % 4 for row in chosen} == {0, 1, 2, 3}
    assert chosen.count(0) <= chosen.count(chosen[0]) <= 3
