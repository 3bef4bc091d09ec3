"""Whether a ranking by a proxy can be trusted: compared with the truth, which is full training."""

import statistics
from collections.abc import Mapping, Sequence
from itertools import combinations_with_replacement
from typing import Any

import numpy as np

BEST = {"half": 0.5, "top": 0.2}  # shares of the candidates, the best by the truth, each compared by itself
FIRST = 5  # candidates of a ranking that one might train in full, to take the best of them
RESAMPLES = 1000  # of the bootstrap
ORDERS = 200  # in which the candidates might have been tried
DECIMALS = 9  # of a mean: who has as many right answers is equal, however they fall on its networks
UNDEFINED = np.array([np.nan])


def select(values: Sequence[float], k: int, seed: int = 0) -> dict[str, list[int]]:
    """Which candidates to train in full: the `k` best by `values`, the `k` in the middle, `k` of the others
    at random. Indices by "best", "middle" and "random"; of few candidates a group may be smaller.
    """
    order = np.argsort(-np.asarray(values), kind="stable").tolist()
    best, rest = order[:k], order[k:]
    start = max(0, (len(order) - k) // 2 - len(best))
    middle = rest[start : start + k]
    others = [index for index in rest if index not in middle]
    drawn = np.random.default_rng(seed).permutation(len(others))[:k]
    return {"best": best, "middle": middle, "random": sorted(others[index] for index in drawn)}


def agreement(proxy: Sequence[float], truth: Sequence[float]) -> dict[str, Any]:
    """Spearman's and Kendall's (tau-b) rank correlation, each with the interval that holds 95 % of bootstrap
    samples of the candidates. None where nothing varies, or for fewer than three candidates; of fewer than
    five there is no interval, which would often be a point.
    """
    found: dict[str, Any] = {"n": len(proxy)}
    for name, correlation in (("spearman", _spearman), ("kendall", _kendall)):
        found |= _interval(name, correlation(proxy, truth) if len(proxy) >= 3 else UNDEFINED)
    return found


def lead(proxy: Sequence[float], other: Sequence[float], truth: Sequence[float]) -> dict[str, Any]:
    """By how much Spearman's correlation of `proxy` with the truth is above that of `other`, and the interval
    that holds 95 % of the differences, both being taken from the same samples. None as in `agreement`.
    """
    found = _spearman(proxy, truth) - _spearman(other, truth) if len(proxy) >= 3 else UNDEFINED
    return _interval("spearman", found)


def _interval(name: str, values: np.ndarray) -> dict[str, float | None]:
    """Of one value for all the candidates, and then for each of the samples of them."""
    resampled = values[1:][np.isfinite(values[1:])]
    low, high = np.percentile(resampled, [2.5, 97.5]).tolist() if len(resampled) else (None, None)
    if not np.isfinite(values[0]):
        return dict.fromkeys([name, f"{name}_low", f"{name}_high"])
    return {name: float(values[0]), f"{name}_low": low, f"{name}_high": high}


def _samples(count: int) -> np.ndarray:
    """How often each candidate is in each of the bootstrap samples, [R, n]. The first row is the candidates
    themselves, each once; of fewer than five there are no others.
    """
    rows = RESAMPLES if count >= 5 else 0
    draws = np.random.default_rng(0).integers(count, size=(rows, count))
    places = (draws + count * np.arange(rows)[:, None]).ravel()
    times = np.bincount(places, minlength=rows * count).reshape(rows, count)
    return np.concatenate([np.ones((1, count)), times])


def _spearman(x: Sequence[float], y: Sequence[float], samples: np.ndarray | None = None) -> np.ndarray:
    """Pearson's correlation of the ranks in each of the `samples`, by default those of the bootstrap, ties
    having their mean rank; [R].
    """
    samples, centred = _samples(len(x)) if samples is None else samples, []
    for values in (np.asarray(x, float), np.asarray(y, float)):
        below = (values[None] < values[:, None]) + 0.5 * (values[None] == values[:, None])  # [n, n]
        ranks = samples @ below.T
        means = (samples * ranks).sum(1, keepdims=True) / samples.sum(1, keepdims=True)
        centred.append(ranks - means)
    products = [(samples * a * b).sum(1) for a, b in combinations_with_replacement(centred, 2)]  # xx, xy, yy
    with np.errstate(invalid="ignore"):
        return products[1] / np.sqrt(products[0] * products[2])


def _single(x: Sequence[float], y: Sequence[float]) -> float | None:
    """Spearman's correlation alone, without an interval; None as in `agreement`."""
    found = _spearman(x, y, np.ones((1, len(x)))) if len(x) >= 3 else UNDEFINED
    return _interval("spearman", found)["spearman"]


def _kendall(x: Sequence[float], y: Sequence[float]) -> np.ndarray:
    """Concordant less discordant pairs in each of the samples, over those that are no ties; [R]."""
    samples, signs = _samples(len(x)), []
    for values in (np.asarray(x, float), np.asarray(y, float)):
        signs.append(np.sign(values[None] - values[:, None]))
    pairs = combinations_with_replacement(signs, 2)  # xx, xy, yy
    products = [((samples @ (a * b)) * samples).sum(1) for a, b in pairs]
    with np.errstate(invalid="ignore"):
        return products[1] / np.sqrt(products[0] * products[2])


def best(truth: Sequence[float], share: float) -> list[int]:
    """The best `share` by the truth, five at least, so that every proxy is asked about the same ones."""
    count = max(5, round(share * len(truth)))
    return np.argsort(-np.asarray(truth), kind="stable")[:count].tolist()


def regret_over_time(
    proxy: Sequence[float], truth: Sequence[float], seconds: Sequence[float], best: float
) -> tuple[list[float], list[float]]:
    """How many points of accuracy the pick so far lies below `best` after each candidate, and the seconds
    spent by then, both means over `ORDERS` random orders of the candidates.
    """
    values, right, costs = (np.asarray(column, float) for column in (proxy, truth, seconds))
    generator = np.random.default_rng(0)
    orders = np.stack([generator.permutation(len(values)) for _ in range(ORDERS)])
    leads = np.maximum.accumulate(values[orders], axis=1)
    new = np.concatenate([np.ones((ORDERS, 1), bool), leads[:, 1:] > leads[:, :-1]], axis=1)
    places = np.maximum.accumulate(np.where(new, np.arange(len(values)), 0), axis=1)
    picks = np.take_along_axis(orders, places, axis=1)
    regrets = best - right[picks]
    return costs[orders].cumsum(1).mean(0).round(2).tolist(), regrets.mean(0).round(3).tolist()


def trust_by_loss(
    accuracies: Mapping[str, Sequence[Sequence[float] | None]],
    losses: Mapping[str, Sequence[Sequence[float] | None]],
    seconds: Mapping[str, Sequence[float]],
    truth: Sequence[float | None],
) -> dict[str, dict[str, Any]]:
    """`trust` in the ranking of the same candidates by their training losses, the lowest first; {} where some
    have none. Late in training these rank networks, too (Ru et al. 2021, arXiv 2006.04492). "gain" is by how
    much its correlation is above that of the accuracies.
    """
    if any(
        bool(a) != bool(b) for way in accuracies for a, b in zip(accuracies[way], losses[way], strict=True)
    ):
        return {}
    scores = {way: [row and [-loss for loss in row] for row in column] for way, column in losses.items()}
    found = trust(scores, seconds, truth)
    common = [i for i, value in enumerate(truth) if value is not None and all(s[i] for s in scores.values())]
    right = [value for index in common if (value := truth[index]) is not None]
    for way, about in found.items():
        by_loss, by_accuracy = (
            [round(statistics.fmean(column[index] or ()), DECIMALS) for index in common]
            for column in (scores[way], accuracies[way])
        )
        about["gain"] = lead(by_loss, by_accuracy, right)
        del about["regret_over_time"]  # plotted of accuracies alone
    return found


def trust(
    accuracies: Mapping[str, Sequence[Sequence[float] | None]],
    seconds: Mapping[str, Sequence[float]],
    truth: Sequence[float | None],
) -> dict[str, dict[str, Any]]:
    """What each way to score is worth, by its name; {} while nothing has a truth or a way has no score.

    `accuracies` are those of the networks of each candidate (percent), None where it was not scored to the
    end; the proxy is their mean, and "single" the Spearman correlation of one network of each. Correlations
    are over the candidates that are known in all ways, "all" of them and those of `BEST`. The pick is the
    best of all, whether its truth is known or not, the first of those that are "tied"; its "regret" is what
    its truth falls short of the best one there is, in points, and "regret_of_first" what the best of the
    first `FIRST` does, of those that correlations are over; "behind" is how much less its correlation is
    than that of the first way.
    """
    known = [index for index, value in enumerate(truth) if value is not None]
    common = [index for index in known if all(column[index] for column in accuracies.values())]
    if not known or not all(any(column) for column in accuracies.values()):
        return {}
    right = [value for index in common if (value := truth[index]) is not None]
    highest = max(value for value in truth if value is not None)
    groups = {group: best(right, share) for group, share in BEST.items()}
    found, first = {}, []
    for way, column in accuracies.items():
        means = {i: round(statistics.fmean(row), DECIMALS) for i, row in enumerate(column) if row}
        proxy, spent = [means[index] for index in common], [seconds[way][index] for index in common]
        times, regrets = regret_over_time(proxy, right, spent, highest)
        pick = max(means, key=lambda index: means[index])
        accuracy = truth[pick]
        leaders = np.argsort(-np.asarray(proxy), kind="stable")[:FIRST].tolist()
        first = first or proxy
        networks = zip(*(row for index in common if (row := column[index])), strict=True)
        found[way] = {
            "all": agreement(proxy, right),
            **{
                group: agreement([proxy[place] for place in places], [right[place] for place in places])
                for group, places in groups.items()
            },
            "single": [_single(values, right) for values in networks],
            "behind": lead(first, proxy, right),
            "pick": pick,
            "tied": sum(mean == means[pick] for mean in means.values()),
            "pick_accuracy": accuracy,
            "regret": None if accuracy is None else highest - accuracy,
            "regret_of_first": highest - max(right[place] for place in leaders) if leaders else None,
            "regret_over_time": {"seconds": times, "regret": regrets},
        }
    return found
