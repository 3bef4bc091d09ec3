"""A search, the same by random images and by early stopping, and the truth about some of the candidates."""

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

from distilled_data import UsageError
from ncfm_engine.cache import sha256_of
from ncfm_engine.proxies import FULL, PROXIES, Proxy
from ncfm_engine.report import Report
from ncfm_engine.search import EARLY_ENDING, Result, adopt, open_studies, results_of, search
from ncfm_engine.spaces import Architecture, Space
from ncfm_engine.stop import StopRequest
from ncfm_engine.trust import select

ALL = 0  # for `verify`: every candidate
COMPARED = ("all", "verified")  # candidates that random images and early stopping are to score
OTHERS = "by other searches"
ACCURACY = "accuracy"
RANKINGS = (ACCURACY, "loss")


@dataclass
class Campaign:
    """`ways` are `ncfm_engine.proxies.proxies`; each has a study of its own in the storage, which is named by
    all that decides its scores, so that searches with anything in common share it. `machine` says where this
    process trains, which it does not while there are `others`.
    """

    space: Space
    candidates: Sequence[Architecture]
    ways: Mapping[str, Proxy]
    storage: str
    strategy: str = "exhaustive"
    verify: int | None = None  # so many best, middle and random candidates; None: nothing is verified
    compare: str = "all"  # one of COMPARED
    seed: int = 0
    ranked_by: str = ACCURACY  # one of RANKINGS: which candidates are the best, of those to verify
    machine: str = ""
    others: Callable[[], bool] = lambda: False

    def run(self, stop: StopRequest, report: Report) -> None:
        """Do all of it, or what is left, together with all processes that do the same. Raises `Stopped`."""
        for way in PROXIES[:1] if self.verify is None else self._choosing:
            self._score(way, self.candidates, stop, report)
        if self.verify is not None:
            chosen = sorted({index for group in self.verified().values() for index in group})
            for way in [way for way in (*PROXIES, FULL) if way not in self._choosing]:
                self._score(way, [self.candidates[index] for index in chosen], stop, report)

    def results(self) -> dict[str, list[Result | None]]:
        """What is known by now, by way, in the order of the candidates; where nothing is verified here, of
        the other ways what searches in the same storage did that verified some.
        """
        found = {way: results_of(self._studies[way], self.candidates) for way in [*PROXIES, FULL]}
        if self.verify is None and not all(any(found[way]) for way in found):
            return {way: found[way] for way in PROXIES[:1]}
        return found

    @property
    def truth(self) -> str:
        """A name for all that decides the truth: where it is equal, what another search found holds here."""
        return self._name(FULL)

    def knows_truth(self) -> bool:
        """Whether every candidate has been trained in full, by this search or another; makes no studies."""
        found = open_studies(self.storage, {self.truth: self._strategy(FULL)}, make=False)
        return self.truth in found and all(results_of(found[self.truth], self.candidates))

    def take_truth(self, results: Sequence[Result]) -> None:
        """Put what another search found by full trainings into the storage, unless it is there."""
        adopt(self._studies[FULL], self.space, results)

    def check_ranking(self) -> None:
        """Raise `UsageError` where candidates have not what they are to be ranked by."""
        if self.ranked_by == ACCURACY:
            return
        scored = [r for way in PROXIES for r in results_of(self._studies[way], self.candidates) if r]
        older = sum(result.state == "complete" and not result.losses for result in scored)
        if older:
            raise UsageError(
                f"--rank-by loss: an older version scored {older} candidates in the storage, and kept no "
                "losses. Score them again with another --storage, or rank by accuracy."
            )

    def verified(self) -> dict[str, list[int]]:
        """The candidates that are trained in full, by the reason for it."""
        if self.verify == ALL:
            return {"all": list(range(len(self.candidates)))}
        if self.verify is None:
            known = results_of(self._studies[FULL], self.candidates)
            return {OTHERS: [index for index, result in enumerate(known) if result]}
        groups: dict[str, list[int]] = {}
        for way in self._choosing:
            found = enumerate(results_of(self._studies[way], self.candidates))
            complete = {index: result for index, result in found if result and result.state == "complete"}
            if way == "distilled":
                scored = {index: _rank(result, self.ranked_by) for index, result in complete.items()}
                places = select(list(scored.values()), self.verify, self.seed)
                groups = {name: [list(scored)[place] for place in group] for name, group in places.items()}
                [other] = set(RANKINGS) - {self.ranked_by}
                groups |= _best(complete, other, other)
            else:
                groups |= _best(complete, way, self.ranked_by)
        return groups

    @property
    def _choosing(self) -> Sequence[str]:
        """The ways by which those to verify are chosen of all candidates."""
        return PROXIES if self.compare == "all" else PROXIES[:1]

    def _score(self, way: str, candidates: Sequence[Architecture], stop: StopRequest, report: Report) -> None:
        proxy = self.ways[way]
        options = {"machine": self.machine, "others": self.others, "stop": stop, "report": report}
        options["recorded"] = partial(proxy.forget, self.space)
        score = partial(proxy.score, self.space, stop=stop)
        search(self._studies[way], self.space, candidates, score, **options)

    @cached_property
    def _studies(self) -> dict[str, Any]:
        names = {way: self._name(way) for way in (*PROXIES, FULL)}
        studies = open_studies(self.storage, {name: self._strategy(way) for way, name in names.items()})
        return {way: studies[name] for way, name in names.items()}

    def _strategy(self, way: str) -> str:
        return self.strategy if way in self._choosing and self.strategy in EARLY_ENDING else "exhaustive"

    def _name(self, way: str) -> str:
        axes = {name: list(values) for name, values in self.space.axes.items()}
        identity = {"axes": axes, "strategy": self._strategy(way), **self.ways[way].identity}
        if self.space.own_code:
            identity["code"] = self.space.own_code
        return f"{way} {sha256_of(identity)[:12]}"


def _best(complete: Mapping[int, Result], name: str, by: str) -> dict[str, list[int]]:
    """The pick of a ranking, as the group of that `name`; none of candidates that it cannot rank."""
    if not complete or (by != ACCURACY and not all(result.losses for result in complete.values())):
        return {}
    return {f"best by {name}": [max(complete, key=lambda index: _rank(complete[index], by))]}


def _rank(result: Result, by: str) -> float:
    return result.value or 0.0 if by == ACCURACY else -statistics.fmean(result.losses)
