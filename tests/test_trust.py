"""What a proxy is worth, against figures worked out by hand and by scipy's documentation."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from ncfm_engine import trust as module
from ncfm_engine.trust import BEST, agreement, best, lead, regret_over_time, select, trust, trust_by_loss

TRUTH = [10.0, 20.0, 30.0, 40.0, 50.0]
RESULTS = Path(__file__).parents[1] / "tools" / "results"


def test_correlations_are_those_of_ranks():
    same = agreement([math.exp(value) for value in TRUTH], TRUTH)
    assert (same["spearman"], same["kendall"]) == (pytest.approx(1), pytest.approx(1))
    opposite = agreement([-value for value in TRUTH], TRUTH)
    assert (opposite["spearman"], opposite["kendall"]) == (pytest.approx(-1), pytest.approx(-1))
    # One pair of neighbours exchanged: rho = 1 - 6 * 2 / (5 * 24), tau = (9 - 1) / 10.
    swapped = agreement([10, 30, 20, 40, 50], TRUTH)
    assert swapped["spearman"] == pytest.approx(0.9)
    assert swapped["kendall"] == pytest.approx(0.8)
    assert swapped["n"] == 5


@pytest.mark.parametrize("levels", [3, 1000])
def test_correlations_and_those_of_resamples_are_scipys(levels, monkeypatch):
    random = np.random.default_rng(1)
    truth = random.integers(levels, size=40)
    proxy = np.round(truth + levels * random.random(40))
    values = {"spearman": stats.spearmanr, "kendall": stats.kendalltau}
    monkeypatch.setattr(module, "RESAMPLES", 50)
    found = agreement(proxy, truth)
    draws = np.random.default_rng(0).integers(40, size=(50, 40))
    for name, scipys in values.items():
        assert found[name] == pytest.approx(scipys(proxy, truth).statistic)
        resampled = [scipys(proxy[draw], truth[draw]).statistic for draw in draws]
        interval = found[f"{name}_low"], found[f"{name}_high"]
        assert interval == pytest.approx(np.percentile(resampled, [2.5, 97.5]))


def test_a_lead_is_taken_from_the_same_samples(monkeypatch):
    random = np.random.default_rng(2)
    truth = random.random(30)
    good, bad = truth + 0.2 * random.random(30), truth + 2 * random.random(30)
    monkeypatch.setattr(module, "RESAMPLES", 50)
    found = lead(good, bad, truth)

    def difference(places):
        one, other = (stats.spearmanr(values[places], truth[places]).statistic for values in (good, bad))
        return one - other

    assert found["spearman"] == pytest.approx(difference(np.arange(30)))
    resampled = [difference(draw) for draw in np.random.default_rng(0).integers(30, size=(50, 30))]
    assert [found["spearman_low"], found["spearman_high"]] == pytest.approx(
        np.percentile(resampled, [2.5, 97.5])
    )
    assert lead(good[:2], bad[:2], truth[:2]) == dict.fromkeys(found)
    assert lead([1, 2, 3], [1, 3, 2], [1, 2, 3])["spearman"] == pytest.approx(0.5)


def test_ways_are_compared_with_the_first_one():
    columns = {"a": [[k] for k in TRUTH], "b": [[k] for k in (10, 30, 20, 40, 50)]}
    found = trust(columns, dict.fromkeys(columns, [1.0] * 5), TRUTH)
    assert found["a"]["behind"]["spearman"] == 0
    assert found["b"]["behind"]["spearman"] == pytest.approx(0.1)


def test_ties_share_their_rank():
    # Ranks 1.5 1.5 3 against 1 2 3: Pearson's correlation of these is sqrt(3) / 2; tau-b is 2 / sqrt(2 * 3).
    tied = agreement([5, 5, 7], [1, 2, 3])
    assert tied["spearman"] == pytest.approx(math.sqrt(3) / 2)
    assert tied["kendall"] == pytest.approx(2 / math.sqrt(6))


def test_the_interval_holds_the_value_and_narrows_with_more_candidates():
    truth = [float(k) for k in range(120)]
    proxy = [k + 40 * ((k * 37) % 11) / 11 for k in range(120)]
    few, many = agreement(proxy[::6], truth[::6]), agreement(proxy, truth)
    for found in (few, many):
        assert found["spearman_low"] < found["spearman"] < found["spearman_high"]
        assert found["kendall_low"] < found["kendall"] < found["kendall_high"]
    assert many["spearman_high"] - many["spearman_low"] < few["spearman_high"] - few["spearman_low"]


def test_there_is_no_correlation_where_nothing_varies_or_of_two_candidates():
    constant = agreement([3, 3, 3, 3], [1, 2, 3, 4])
    assert constant["spearman"] is constant["kendall"] is constant["spearman_low"] is None
    assert agreement([1, 2], [1, 2])["spearman"] is None


def test_of_four_candidates_or_fewer_there_is_no_interval():
    four, five = (agreement(range(count), range(count)) for count in (4, 5))
    assert four["spearman"] == pytest.approx(1)
    assert (four["spearman_low"], four["kendall_high"]) == (None, None)
    assert five["spearman_low"] == pytest.approx(1)


def test_regret_over_time_ends_with_that_of_the_pick_after_all_seconds():
    seconds, regrets = regret_over_time([1, 2, 3, 9, 5], TRUTH, [1, 2, 3, 4, 5], 50)
    assert seconds[-1] == pytest.approx(15)
    assert regrets[-1] == 10
    assert regrets[0] == pytest.approx(50 - 30, abs=3)  # any one of them
    assert seconds[0] == pytest.approx(3, abs=0.3)
    perfect = regret_over_time(TRUTH, TRUTH, [1] * 5, 50)[1]
    assert perfect == sorted(perfect, reverse=True)
    assert perfect[-1] == 0
    # The best of two of five is the best of all with probability 2/5, the second with 3/10, ...
    assert perfect[1] == pytest.approx(0 * 0.4 + 10 * 0.3 + 20 * 0.2 + 30 * 0.1, abs=2)


def test_the_best_the_middle_and_some_others_are_verified():
    values = [float((k * 7) % 30) for k in range(30)]  # every number below 30 once
    groups = select(values, 4, seed=1)
    assert sorted(values[k] for k in groups["best"]) == [26, 27, 28, 29]
    assert sorted(values[k] for k in groups["middle"]) == [13, 14, 15, 16]
    chosen = [k for group in groups.values() for k in group]
    assert len(set(chosen)) == len(chosen) == 12
    assert groups == select(values, 4, seed=1)
    assert groups["random"] != select(values, 4, seed=2)["random"]


@pytest.mark.parametrize("count", [1, 3, 5, 7])
def test_of_few_candidates_none_is_verified_twice(count):
    chosen = [k for group in select([1.0] * count, 2).values() for k in group]
    assert sorted(set(chosen)) == sorted(chosen)
    assert len(chosen) == min(6, count)


def test_the_best_are_a_share_by_the_truth_and_five_at_least():
    assert sorted(best([float(k) for k in range(50)], 0.2)) == list(range(40, 50))
    assert len(best([1.0, 2.0, 3.0], 0.2)) == 3
    assert len(best([float(k) for k in range(10)], 0.2)) == 5


def alone(accuracies, truth):
    """The trust in one way to score."""
    return trust({"way": accuracies}, {"way": [1.0] * len(truth)}, truth).get("way")


def test_a_proxy_is_the_mean_of_its_networks():
    accuracies = [[1, 9], [2, 2], [9, 3], [4, 4], [5, 5]]  # means 5, 2, 6, 4, 5
    found = alone(accuracies, TRUTH)
    assert (found["pick"], found["tied"]) == (2, 1)
    assert found["pick_accuracy"] == 30
    assert found["regret"] == 20
    assert found["regret_over_time"]["regret"][-1] == 20
    assert found["all"]["spearman"] == pytest.approx(agreement([5, 2, 6, 4, 5], TRUTH)["spearman"])
    assert found["single"] == [
        pytest.approx(agreement([1, 2, 9, 4, 5], TRUTH)["spearman"]),
        pytest.approx(agreement([9, 2, 3, 4, 5], TRUTH)["spearman"]),
    ]
    assert found["top"]["n"] == 5


def test_a_ranking_by_losses_has_the_lowest_first_and_says_what_it_gains_on_the_accuracies():
    truth = [float(value) for value in range(10, 110, 10)]
    accuracies = {
        "a": [[1.0], [3.0], [2.0], [4.0], [5.0], [6.0], [7.0], [9.0], [8.0], [10.0]],
        "b": [[1.0]] * 10,
    }
    losses = {"a": [[9.0 - k, 11.0 - k] for k in range(10)], "b": [[float(7 * k % 10)] for k in range(10)]}
    seconds = dict.fromkeys("ab", [1.0] * 10)
    found = trust_by_loss(accuracies, losses, seconds, truth)
    assert found["a"]["all"]["spearman"] == pytest.approx(1)
    by_accuracy = trust(accuracies, seconds, truth)["a"]["all"]["spearman"]
    assert by_accuracy < 1
    assert found["a"]["gain"]["spearman"] == pytest.approx(1 - by_accuracy)
    assert found["a"]["gain"]["spearman_low"] >= 0
    assert found["b"]["gain"]["spearman"] is None  # all accuracies are equal
    assert (found["a"]["pick"], found["a"]["regret"], found["b"]["pick"]) == (9, 0, 0)
    older = {way: [None if k == 3 else row for k, row in enumerate(rows)] for way, rows in losses.items()}
    assert trust_by_loss(accuracies, older, seconds, truth) == {}
    known = [None, *truth[1:]]
    assert trust_by_loss(accuracies, losses, seconds, known)["a"]["all"]["n"] == 9
    pruned = [{"a": way["a"], "b": [None, *way["b"][1:]]} for way in (accuracies, losses)]
    found = trust_by_loss(*pruned, seconds, truth)["a"]
    by_accuracy = trust(pruned[0], seconds, truth)["a"]["all"]["spearman"]
    assert (found["all"]["n"], found["gain"]["spearman"]) == (9, pytest.approx(1 - by_accuracy))


def test_the_best_that_are_compared_by_themselves_are_so_by_the_truth():
    truth = [float(7 * k % 12) for k in range(12)]
    found = alone([[value if value > 6 else 100 - value] for value in truth], truth)
    for name in ("spearman", "kendall"):
        assert found["top"][name] == pytest.approx(1)
        assert found["all"][name] < 0.9
    # of 6 to 11 the lowest is taken for the highest: rank differences 5, -1, -1, ...; 10 pairs against 5
    assert found["half"]["spearman"] == pytest.approx(1 - 6 * (25 + 5) / (6 * 35))
    assert found["half"]["kendall"] == pytest.approx((10 - 5) / 15)
    assert (found["half"]["n"], found["top"]["n"]) == (6, 5)


def test_candidates_that_tie_for_the_best_are_counted():
    found = alone([[1, 9], [5, 5], [9, 1], [4, 4], [2, 2]], TRUTH)
    assert (found["pick"], found["tied"]) == (0, 3)


def test_as_many_right_answers_are_a_tie_however_they_fall_on_the_networks():
    right = [(75, 102, 86), (91, 97, 75), (0, 0, 1)]  # of 144; the means differ in their last bit
    found = alone([[100 * (count / 144) for count in counts] for counts in right], TRUTH[:3])
    assert (found["pick"], found["tied"]) == (0, 2)
    assert found["all"]["spearman"] == pytest.approx(-math.sqrt(3) / 2)


def test_what_ended_early_or_failed_counts_against_the_regret():
    ended = alone([[1], [2], [3], [4], None], TRUTH)  # the best one was not trained to the end
    assert (ended["pick"], ended["regret"], ended["all"]["n"]) == (3, 10, 4)
    assert ended["regret_over_time"]["regret"][-1] == 10
    assert ended["regret_of_first"] == 10  # all four are among the first
    unknown = alone([[1], [2], [3], [4], [5]], [10.0, 20.0, 30.0, 40.0, None])
    assert (unknown["pick"], unknown["pick_accuracy"], unknown["regret"]) == (4, None, None)


def test_all_ways_are_compared_on_the_candidates_that_all_of_them_know():
    ways = {"one": [[1], [2], None, [4], [5]], "other": [[5], None, [3], [2], [1]]}
    found = trust(ways, {way: [1, 2, 3, 4, 5] for way in ways}, TRUTH)
    assert [found[way]["all"]["n"] for way in ways] == [3, 3]
    assert found["one"]["all"]["spearman"] == pytest.approx(1)
    assert found["other"]["all"]["spearman"] == pytest.approx(-1)
    assert [found[way]["pick"] for way in ways] == [4, 0]


def test_of_too_few_candidates_to_correlate_the_regret_is_told():
    few = alone([[1], None], [10.0, 20.0])
    assert (few["pick"], few["regret"], few["all"]["n"], few["all"]["spearman"]) == (0, 10, 1, None)
    none = trust({"one": [[1], None], "other": [None, [1]]}, {"one": [1, 1], "other": [1, 1]}, [10.0, 20.0])
    assert [none[way]["regret"] for way in ("one", "other")] == [10, 0]
    assert none["one"]["all"]["n"] == 0
    assert none["one"]["regret_of_first"] is None
    assert none["one"]["regret_over_time"] == {"seconds": [], "regret": []}


def test_the_best_of_the_first_five_is_what_who_trains_these_in_full_takes():
    scores = {"right": [1, 2, 3, 4, 5, 6, 7], "wrong": [7, 6, 5, 4, 3, 2, 1], "tied": [1, 1, 1, 1, 1, 1, 1]}
    columns = {way: [[float(value)] for value in values] for way, values in scores.items()}
    found = trust(columns, dict.fromkeys(scores, [1.0] * 7), [10.0, 60.0, 20.0, 30.0, 40.0, 50.0, 70.0])
    assert [found[way]["regret"] for way in scores] == [0, 60, 60]
    assert [found[way]["regret_of_first"] for way in scores] == [0, 10, 10]


def test_nothing_is_said_without_a_truth_or_a_score():
    assert alone([[1], [2]], [None, None]) is None
    assert alone([None, None], [10.0, 20.0]) is None


@pytest.mark.parametrize("path", sorted(RESULTS.glob("*/*/search.json")), ids=lambda path: path.parent.name)
def test_what_is_published_of_trust_is_what_its_candidates_give(path):
    content = json.loads(path.read_text())

    def of(way: str, name: str, otherwise: object) -> list:
        results = [row.get(way) or {} for row in content["candidates"]]
        return [result[name] if result.get("state") == "complete" else otherwise for result in results]

    ways = content["trust"]
    found = trust(
        {way: of(way, "accuracies", None) for way in ways},
        {way: of(way, "seconds", 0.0) for way in ways},
        of("full", "value", None),
    )
    for way, published in ways.items():
        for group in ("all", *BEST, "behind"):
            assert published[group] == pytest.approx(found[way][group])
        for name, column in published["regret_over_time"].items():
            assert column == pytest.approx(found[way]["regret_over_time"][name])
        for name in ("pick", "tied", "pick_accuracy", "regret", "regret_of_first"):
            assert published[name] == found[way][name]
