"""A study: every candidate is done once, whoever does it and whoever is killed meanwhile."""

import contextlib
import gc
import inspect
import os
import random
import shutil
import sqlite3
import threading
import time
import warnings
import weakref
from collections import Counter

import optuna
import pytest
import torch
from children import context, finish, start
from interruptions import StopAfter
from optuna.distributions import CategoricalDistribution
from optuna.exceptions import StorageInternalError
from optuna.pruners import BasePruner
from optuna.storages import RDBStorage
from optuna.trial import TrialState, create_trial
from sqlalchemy.exc import IntegrityError, OperationalError
from torch.backends import cudnn
from torch.overrides import _get_current_function_mode_stack

from distilled_data import DeviceMemoryError, OutputError, UnknownNameError, UsageError
from ncfm_engine import search as module
from ncfm_engine.search import CHECKS, Result, Scores, adopt, open_studies, results_of, search
from ncfm_engine.spaces import Space
from ncfm_engine.stop import Stopped

pytestmark = pytest.mark.usefixtures("databases")
SMALL = Space({"a": (1, 2, 3), "b": (True, False)}, torch.nn.Linear)


@pytest.fixture(scope="module")
def tables(tmp_path_factory, databases):
    """A database without studies, made as `open_studies` makes one, which takes 0.1 s."""
    path = tmp_path_factory.mktemp("tables") / "search.db"
    open_studies(f"sqlite:///{path}", {})
    return path


@pytest.fixture
def database(tmp_path, tables):
    return f"sqlite:///{shutil.copy(tables, tmp_path / 'search.db')}"


def open_study(storage, name, strategy="exhaustive"):
    return open_studies(storage, {name: strategy})[name]


def taken(study):
    """The trial that waits longest, which runs now, without a sign of life."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Heartbeat of storage", UserWarning)
        return study.ask()


@pytest.fixture
def quick(monkeypatch):
    """Dead processes are noticed after a moment."""
    for name, seconds in {"HEARTBEAT_SECONDS": 1, "GRACE_SECONDS": 1, "WAIT_SECONDS": 0.05}.items():
        monkeypatch.setattr(module, name, seconds)


def by_width(architecture, check):
    return Scores([float(architecture["a"]), architecture["a"] + 2.0], [0.5, architecture["a"]])


def states(study):
    return Counter(trial.state.name for trial in study.trials)


def test_every_candidate_is_scored_once_and_in_their_order(database):
    candidates = SMALL.draw()
    study = open_study(database, "x")
    results = search(study, SMALL, candidates, by_width)
    assert [result.architecture for result in results] == candidates
    assert [result.value for result in results] == [candidate["a"] + 1.0 for candidate in candidates]
    assert all(result.accuracies == [result.value - 1, result.value + 1] for result in results)
    assert all(result.losses == [0.5, result.value - 1] for result in results)
    assert states(study) == {"COMPLETE": 6}
    assert study.best_value == 4  # as Optuna's own tools show it
    types = {type(name) for trial in study.trials for name in trial.params.values()}
    assert types == {int, bool}


def test_as_many_right_answers_are_one_value_however_they_fall_on_the_networks(database):
    right = iter([(75, 102, 86), (91, 97, 75)])  # of 144; the means differ in their last bit

    def score(architecture, check):
        return Scores([100 * (count / 144) for count in next(right)])

    first, second = search(open_study(database, "x"), SMALL, SMALL.draw()[:2], score)
    assert first.value == second.value == pytest.approx(100 * 263 / 432)


def test_studies_share_the_connections_to_their_database_and_the_last_one_leaves_none_open(database):
    study, other = open_studies(database, {"x": "exhaustive", "y": "halving"}).values()
    search(study, SMALL, SMALL.draw(), by_width)
    engine = study._storage._backend.engine
    assert engine is other._storage._backend.engine
    del study
    gc.collect()
    assert engine.pool.checkedin() > 0
    assert results_of(other, SMALL.draw()) == [None] * 6
    del other
    gc.collect()
    assert engine.pool.checkedin() == 0


def test_a_database_is_found_that_a_uri_names(database):
    study = open_study(database, "x")
    uri = database.replace("sqlite:///", "sqlite:///file:") + "?uri=true"
    assert list(open_studies(uri, {study.study_name: "exhaustive", "y": "exhaustive"}, make=False)) == ["x"]


def test_what_is_done_is_not_done_again_and_more_candidates_may_follow(database):
    candidates, scored = SMALL.draw(), []

    def score(architecture, check):
        scored.append(architecture)
        return Scores([1.0])

    search(open_study(database, "x"), SMALL, candidates[:2], score)
    assert search(open_study(database, "x"), SMALL, candidates[:2], score)[1].value == 1
    assert len(scored) == 2
    study = open_study(database, "x")
    assert results_of(study, candidates)[2:] == [None] * 4
    search(study, SMALL, candidates, score)
    assert len(scored) == 6
    search(open_study(database, "another"), SMALL, candidates[:1], score)
    assert len(scored) == 7


def test_what_another_search_found_is_taken_over_whole_and_once(database):
    candidates = SMALL.draw()
    complete = Result(
        candidates[0], "complete", 2.5, [2.0, 3.0], [0.5, 0.75], [1.0, 3.0], 0.5, machine="another"
    )
    own = open_study(database, "own")
    search(own, SMALL, candidates[:1], by_width)
    adopt(own, SMALL, [complete])
    assert [result.value for result in results_of(own, candidates[:1])] == [candidates[0]["a"] + 1.0]
    study = open_study(database, "x")
    for _ in range(2):
        adopt(study, SMALL, [complete])
    assert states(study) == {"COMPLETE": 1}
    assert results_of(study, candidates) == [complete, *[None] * 5]


def test_what_a_candidate_raises_is_recorded_and_the_study_goes_on(database):
    errors = {1: ValueError("three heads"), 2: RuntimeError("shape mismatch\nlong story"), 3: SystemExit(3)}

    def score(architecture, check):
        if architecture["b"] and architecture["a"] in errors:
            raise errors[architecture["a"]]
        return Scores([5.0])

    study = open_study(database, "x")
    results = {tuple(r.architecture.values()): r for r in search(study, SMALL, list(SMALL), score)}
    failed = {key: result.reason for key, result in results.items() if result.state == "failed"}
    assert failed == {
        (1, True): "ValueError: three heads",
        (2, True): "RuntimeError: shape mismatch",
        (3, True): "SystemExit: 3",
    }
    assert results[1, True].value is None
    assert states(study) == {"COMPLETE": 3, "FAIL": 3}
    lines, first = inspect.getsourcelines(score)
    [raised] = [first + index for index, line in enumerate(lines) if "raise" in line]
    assert {r.place for r in results.values()} == {"", f"test_search.py, line {raised}"}
    search(study, SMALL, list(SMALL), score)
    assert len(study.trials) == 6  # they are not tried again


def test_the_place_of_an_error_is_the_last_in_code_of_the_user(database):
    def score(architecture, check):
        if architecture["b"]:
            torch.nn.Sequential(torch.nn.Linear(4, 2))(torch.zeros(1, 7))  # fails in torch
        raise UsageError("too few")

    few = [{"a": 1, "b": b} for b in (True, False)]
    first = score.__code__.co_firstlineno
    places = [result.place for result in search(open_study(database, "x"), SMALL, few, score)]
    assert places == [f"test_search.py, line {first + line}" for line in (2, 3)]


def test_what_a_candidate_sets_for_its_process_is_not_left_to_those_after_it(database, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def settings():
        modes = torch.is_grad_enabled(), torch.get_deterministic_debug_mode(), torch.get_num_threads()
        modes += cudnn.benchmark, cudnn.deterministic, cudnn.allow_tf32, torch.is_anomaly_enabled()
        modes += torch.get_default_device(), tuple(_get_current_function_mode_stack())  # slow if not empty
        return *modes, torch.get_default_dtype(), torch.get_float32_matmul_precision(), os.getcwd()

    def score(architecture, check):
        seen.append(settings())
        cudnn.benchmark, cudnn.deterministic, cudnn.allow_tf32 = True, True, False
        torch.set_float32_matmul_precision("high")
        if architecture["b"]:  # as both are set now, by which the old way fails
            torch.backends.cuda.matmul.fp32_precision = "ieee"
        torch.set_grad_enabled(False)
        torch.autograd.set_detect_anomaly(True)
        torch.use_deterministic_algorithms(True)
        torch.set_num_threads(before[2] + 1)
        torch.set_default_dtype(torch.float64)
        torch.set_default_device("cpu" if architecture["a"] == 1 else "meta")
        os.chdir("/")
        if architecture["b"]:
            raise ValueError("so am I")
        return Scores([5.0])

    seen, before = [], settings()
    search(open_study(database, "x"), SMALL, list(SMALL), score)
    assert seen == [before] * 6
    assert settings() == before


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (OSError("no file \udcff.pt"), "OSError: no file \\udcff.pt"),  # of a name that is not UTF-8
        (ValueError("\nExpected 3 heads\ngot 2"), "ValueError: Expected 3 heads"),
        (ValueError("\x1b[1mbold\0"), r"ValueError: \x1b[1mbold\x00"),
        (KeyError(), "KeyError"),
    ],
)
def test_a_reason_is_a_line_that_can_be_written(database, error, reason):
    def score(architecture, check):
        raise error

    [result] = search(open_study(database, "x"), SMALL, list(SMALL)[:1], score)
    assert result.reason.encode() == reason.encode()


def test_a_lack_of_memory_may_be_that_of_a_moment(database):
    tries = Counter()
    moments = [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"),
        torch.AcceleratorError("CUDA error: out of memory", 2),
    ]

    def score(architecture, check):
        tries[architecture["a"]] += 1
        if architecture["a"] == 1 and moments:
            raise moments.pop()
        if architecture["a"] == 2:
            raise DeviceMemoryError("too many networks at once")
        return Scores([5.0])

    few = [{"a": a, "b": True} for a in (1, 2, 3)]
    results = search(open_study(database, "x"), SMALL, few, score)
    assert [result.state for result in results] == ["complete", "failed", "complete"]
    assert results[1].reason == "DeviceMemoryError: too many networks at once"
    assert tries == {1: 3, 2: module.LIVES, 3: 1}


def test_a_device_that_is_broken_ends_the_process_and_costs_the_candidate_one_life(database):
    def score(architecture, check):
        raise torch.AcceleratorError("CUDA error: device-side assert triggered", 710)

    study, candidate = open_study(database, "x"), next(iter(SMALL))
    with pytest.raises(torch.AcceleratorError):
        search(study, SMALL, [candidate], score)
    (result,) = search(study, SMALL, [candidate], by_width)
    assert (result.state, result.attempts) == ("complete", 2)


@pytest.mark.parametrize(
    "error", [StorageInternalError("database is locked"), OperationalError("SELECT", {}, Exception("locked"))]
)
def test_an_error_of_the_storage_is_not_the_candidates(database, error):
    raised = []

    def score(architecture, check):
        if not raised:
            raised.append(error)
            raise error
        return Scores([5.0])

    (result,) = search(open_study(database, "x"), SMALL, [next(iter(SMALL))], score)
    assert (result.state, result.attempts) == ("complete", 2)


@pytest.mark.parametrize("lock", ["immediate", "exclusive"])  # others may still read, or may not
def test_a_storage_that_another_program_has_locked_is_named_and_keeps_what_it_holds(
    database, tmp_path, monkeypatch, lock
):
    monkeypatch.setattr(module, "BUSY_SECONDS", 0.01)
    other = sqlite3.connect(tmp_path / "search.db", isolation_level=None)
    study, few = open_study(database, "x"), SMALL.draw(3)
    scored = []

    def score(architecture, check):
        scored.append(architecture)
        if len(scored) == 2:
            other.execute(f"begin {lock}")
        return Scores([5.0])

    with pytest.raises(OutputError, match=rf"^the storage {database} failed: .*database is locked\. What it"):
        search(study, SMALL, few, score)
    with pytest.raises(UsageError, match=f"^the storage {database} cannot be opened: .*database is locked"):
        open_study(database, "another")
    other.execute("rollback")
    assert [result and result.value for result in results_of(study, few)].count(5.0) == 1
    other.close()


def test_what_is_recorded_is_told_and_what_is_to_be_done_again_is_not(database):
    def score(architecture, check):
        number = architecture["a"]
        tried[number] = tried.get(number, 0) + 1
        if number == 1 and tried[number] == 1:
            raise OperationalError("SELECT", {}, Exception("locked"))
        if number == 2 and tried[number] == 1:
            raise MemoryError
        if number == 3:
            raise ValueError("no good")
        if number == 5:
            raise KeyboardInterrupt
        for _ in range(CHECKS):
            check(-number)
        return Scores([5.0])

    def recorded(candidate):
        (result,) = results_of(study, [candidate])
        told.append((candidate["a"], result.state, tried[candidate["a"]]))

    space, tried, told = Space({"a": (1, 2, 3, 4, 5)}, torch.nn.Linear), {}, []
    study = open_study(database, "x", "halving")
    for candidate in space:
        with contextlib.suppress(KeyboardInterrupt):
            search(study, space, [candidate], score, recorded=recorded)
    assert told == [(1, "complete", 2), (2, "pruned", 2), (3, "failed", 1), (4, "pruned", 1)]


def test_a_sign_of_life_that_cannot_be_written_is_left_out(database, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "BUSY_SECONDS", 0.01)
    study = open_study(database, "x")
    module._Worker(study, SMALL, by_width).put(next(iter(SMALL)))
    trial = taken(study)
    other = sqlite3.connect(tmp_path / "search.db", isolation_level=None)
    other.execute("begin immediate")
    study._storage.record_heartbeat(trial._trial_id)
    with pytest.raises(StorageInternalError, match="during the commit"):  # or the trial could never be buried
        study._storage._backend.record_first_heartbeat(trial._trial_id)
    other.close()


def test_what_a_failed_training_held_is_freed(database):
    held = []

    def score(architecture, check):
        network = torch.nn.Linear(2, 2)
        held.append(weakref.ref(network))
        raise ValueError(f"{network} is not wanted")

    search(open_study(database, "x"), SMALL, list(SMALL), score)
    assert [reference() for reference in held] == [None] * 6


def test_what_a_pruned_training_held_is_freed_at_once(database):
    held = []

    def score(architecture, check):
        network = torch.nn.Linear(2, 2)
        held.append(weakref.ref(network))
        for _ in range(CHECKS):
            check(float(-len(held)))  # each is worse than those before
        return Scores([float(-len(held))])

    gc.disable()
    try:
        results = search(open_study(database, "x", "halving"), SMALL, list(SMALL), score)
        assert [reference() for reference in held] == [None] * 6
    finally:
        gc.enable()
    assert [result.state for result in results].count("pruned") >= 3


def test_a_score_of_nothing_is_a_failure_with_a_reason(database):
    (result,) = search(open_study(database, "x"), SMALL, [next(iter(SMALL))], lambda *_: Scores([]))
    assert result.state == "failed"
    assert "mean requires at least one data point" in result.reason


def test_a_candidate_that_is_there_twice_is_refused(database):
    with pytest.raises(UsageError, match="a candidate is there twice"):
        search(open_study(database, "x"), SMALL, [*SMALL, next(iter(SMALL))], by_width)


@pytest.mark.parametrize(
    ("how", "told"), [(Stopped, r"^x, 0 of 1 architectures$"), (KeyboardInterrupt, "in the middle")]
)
def test_a_stop_leaves_what_is_in_work_to_the_next_process_however_often(database, how, told):
    def score(architecture, check):
        raise how("in the middle")

    study, candidate = open_study(database, "x"), next(iter(SMALL))
    for _ in range(module.LIVES):
        with pytest.raises(how, match=told):
            search(study, SMALL, [candidate], score, stop=StopAfter(1))
    (result,) = search(study, SMALL, [candidate], by_width)
    assert result.state == "complete"
    assert result.attempts == module.LIVES + 1


def test_progress_is_reported(database):
    lines = []

    def report(stage, done, total, **figures):
        lines.append((stage, done, total, figures))

    search(open_study(database, "x"), SMALL, list(SMALL), by_width, report=report)
    assert lines[0] == ("x", 0, 6, {})
    assert lines[-1] == ("x", 6, 6, {"best": 4.0})


def rising(architecture, check):
    """Better from the start if `a` is larger."""
    for step in range(CHECKS):
        check(10 * architecture["a"] + step)
    return Scores([10.0 * architecture["a"] + CHECKS])


MANY = Space({"a": tuple(range(14))}, torch.nn.Linear)
LARGE = Space({"a": tuple(range(85))}, torch.nn.Linear)


@pytest.mark.parametrize(("strategy", "most"), [("halving", 7), ("hyperband", 12)])
def test_what_is_worse_than_others_ends_early(database, strategy, most):
    study = open_study(database, "x", strategy)
    results = search(study, MANY, MANY.draw(), rising, machine="here")
    assert {result.machine for result in results} == {"here"}
    complete = [result for result in results if result.state == "complete"]
    pruned = [result for result in results if result.state == "pruned"]
    assert len(complete) + len(pruned) == len(MANY)
    assert 1 <= len(complete) <= most  # one of Hyperband's brackets ends nothing early
    assert max(result.value for result in complete) == 130 + CHECKS
    assert all(len(result.curve) < CHECKS and result.value == result.curve[-1] for result in pruned)
    assert all(len(result.curve) == CHECKS for result in complete)


def reported(study, a, *values):
    """The trial of the candidate `a` of a large space, in work, with these values at its checks."""
    curve = dict(enumerate(values, start=1))
    choice = {"a": CategoricalDistribution(LARGE.axes["a"])}
    trial = create_trial(
        state=TrialState.RUNNING, params={"a": a}, distributions=choice, intermediate_values=curve
    )
    study.add_trial(trial)
    return study.get_trials(deepcopy=False)[-1]


def test_halving_goes_on_with_the_best_third_at_the_first_and_at_the_third_check(database):
    study = open_study(database, "x", "halving")
    trials = [reported(study, a, a, a) for a in range(12)]
    assert not any(study.pruner.prune(study, trial) for trial in trials)  # the second
    trials = [reported(study, a, a) for a in range(12)]
    assert [study.pruner.prune(study, trial) for trial in trials] == [True] * 8 + [False] * 4
    trials = [reported(study, a, 0, 0, -a) for a in range(3)]
    assert [study.pruner.prune(study, trial) for trial in trials] == [False, True, True]
    diverged = reported(study, 13, float("nan"))
    assert study.pruner.prune(study, diverged)
    assert not study.pruner.prune(study, reported(study, 12, 12))


def test_the_best_third_is_of_all_that_came_and_of_those_that_have_a_score(database):
    study = open_study(database, "x", "halving")
    for a in range(3):
        reported(study, a, float("nan"))
    trials = [reported(study, a, a) for a in (5, 4, 3)]
    assert [study.pruner.prune(study, trial) for trial in trials] == [False, False, True]  # 2 of 6


def test_who_was_stopped_and_trained_again_does_not_compete_with_itself(database):
    study = open_study(database, "x", "halving")
    for a in (*range(12), 9, 10, 11, 9, 10, 11):
        reported(study, a, a)
    assert not study.pruner.prune(study, reported(study, 8, 8))
    assert study.pruner.prune(study, reported(study, 7, 7))


def test_in_hyperband_halving_begins_at_the_first_check_at_the_third_or_never():
    study = optuna.create_study(direction="maximize", pruner=module._pruner("hyperband"))
    shares = {}
    for checks in (1, 3):
        trials = [reported(study, a, *[a] * checks) for a in LARGE.axes["a"]]
        shares[checks] = sum(study.pruner.prune(study, trial) for trial in trials) / len(trials)
    assert shares[1] == pytest.approx(2 / 3 * 9 / 17, abs=0.08)  # brackets of 9, 5, 3: Li et al., algorithm 1
    assert shares[3] == pytest.approx(2 / 3 * 14 / 17, abs=0.08)


def test_a_candidate_stays_in_its_bracket_of_hyperband_however_often_it_is_trained(database):
    study = open_study(database, "x", "hyperband")
    for a in range(13):
        reported(study, a, 99)
        reported(study, 13, 99)
    ends = [study.pruner.prune(study, reported(study, a, a)) for a in range(13)]
    assert 0 < sum(ends) < 13  # in one bracket nobody's training ends at the first check
    assert [study.pruner.prune(study, reported(study, a, a)) for a in range(13)] == ends


def test_a_training_that_came_to_its_end_is_complete(database):
    class AtTheEnd(BasePruner):
        def prune(self, study, trial):
            return trial.last_step == CHECKS

    study = open_study(database, "x")
    study.pruner = AtTheEnd()
    (result,) = search(study, MANY, MANY.draw(1), rising)
    assert result.state == "complete"


def test_nothing_ends_early_in_an_exhaustive_search(database):
    results = search(open_study(database, "x"), MANY, MANY.draw(4), rising)
    assert {result.state for result in results} == {"complete"}


def test_a_process_that_never_gave_a_sign_of_life_is_given_up_by_one_or_two(database, quick, monkeypatch):
    def by_two(*given, **options):
        for _ in range(2):
            tell(*given, **options)

    tell = optuna.Study.tell
    monkeypatch.setattr(optuna.Study, "tell", by_two)
    study = open_study(database, "x")
    worker = module._Worker(study, SMALL, by_width)
    candidates = list(SMALL)
    worker.put(candidates[3])
    taken(study)  # and the process that did is killed at once
    results = search(open_study(database, "x"), SMALL, candidates, by_width)
    assert [result.value for result in results] == [2, 2, 3, 3, 4, 4]
    assert results[3].attempts == 2


def test_a_process_that_died_in_the_last_candidate_is_noticed_by_one_that_begins_no_trial(
    database, tmp_path, quick
):
    study, candidate = open_study(database, "x"), next(iter(SMALL))
    module._Worker(study, SMALL, by_width).put(candidate)
    trial = taken(study)
    study._storage._backend.record_first_heartbeat(trial._trial_id)
    trial.set_user_attr("begun", True)
    with sqlite3.connect(tmp_path / "search.db") as file:
        file.execute("update trial_heartbeats set heartbeat = datetime('now', '-1 hour')")
    file.close()
    (result,) = search(study, SMALL, [candidate], by_width, stop=StopAfter(9))
    assert (result.state, result.attempts) == ("complete", 2)


def test_who_looks_on_trains_when_the_others_are_gone(database, quick):
    study, left, seen = open_study(database, "x"), [True, True], []
    candidates = list(SMALL)

    def others():
        seen.append(len(study.trials))
        return bool(left and left.pop())

    results = search(study, SMALL, candidates, by_width, others=others)
    assert [result.value for result in results] == [2, 2, 3, 3, 4, 4]
    assert seen == [0, 0, 0, 1, 2, 3, 4, 5]


def test_who_gives_signs_of_life_is_not_taken_for_dead_however_long_it_takes(database, monkeypatch):
    study, candidates, found = open_study(database, "x"), list(SMALL)[:2], []
    other = module._Worker(open_study(database, "x"), SMALL, by_width)
    other.put(candidates[1])
    begun = taken(study)  # a moment ago, so that its sign of life may be to come

    def score(architecture, check):
        for seconds in (60, 0):
            with monkeypatch.context() as patch:
                patch.setattr(module, "GRACE_SECONDS", seconds)
                other.bury()
            found.append(study.trials[begun.number].state.name)
        return by_width(architecture, check)

    results = search(study, SMALL, candidates, score)
    assert found[:2] == ["RUNNING", "FAIL"]
    assert [result.attempts for result in results] == [1, 2]
    assert states(study) == {"COMPLETE": 2, "FAIL": 1}


def test_who_has_just_taken_a_trial_in_another_time_zone_is_not_taken_for_dead(database, tmp_path):
    study, candidate = open_study(database, "x"), next(iter(SMALL))
    worker = module._Worker(study, SMALL, by_width)
    worker.put(candidate)
    taken(study)
    with sqlite3.connect(tmp_path / "search.db") as file:
        file.execute("update trials set datetime_start = datetime('now', '-9 hours')")
    file.close()
    worker.bury()
    assert states(study) == {"RUNNING": 1}


def test_an_error_before_a_trial_begins_is_not_that_of_the_trial_before(database, monkeypatch):
    study, real = open_study(database, "x"), optuna.Study.optimize
    begun = []

    def optimize(self, *arguments, **options):
        begun.append(True)
        assert len(begun) < 4  # it would be tried for ever
        if len(begun) > 1:
            self.add_trial(create_trial(value=1.0))  # the last one is another process's, and finished
            raise ValueError("no such distribution")
        return real(self, *arguments, **options)

    monkeypatch.setattr(optuna.Study, "optimize", optimize)
    with pytest.raises(ValueError, match="no such distribution"):
        search(study, SMALL, list(SMALL)[:2], by_width)
    assert states(study)["COMPLETE"] == 2


def test_a_trial_that_was_put_there_by_a_process_that_died_is_taken(database):
    study = open_study(database, "x")
    module._Worker(study, SMALL, by_width).put(list(SMALL)[3])
    search(study, SMALL, list(SMALL), by_width)
    assert states(study) == {"COMPLETE": 6}


def test_of_two_trials_of_one_candidate_the_second_gives_way(database):
    study, scored = open_study(database, "x"), []
    worker = module._Worker(study, SMALL, by_width)
    for _ in range(2):  # two processes chose the same one at the same moment
        worker.put(list(SMALL)[3])

    def score(architecture, check):
        scored.append(tuple(architecture.values()))
        return by_width(architecture, check)

    results = search(study, SMALL, list(SMALL), score)
    assert len(scored) == len(set(scored)) == 6
    assert [result.attempts for result in results] == [1] * 6
    assert states(study) == {"COMPLETE": 6, "PRUNED": 1}


def test_who_finds_a_candidate_in_work_or_finds_none_gives_way(database):
    study, scored = open_study(database, "x"), []
    worker = module._Worker(study, SMALL, lambda *given: scored.append(given))
    for _ in range(2):
        worker.put(next(iter(SMALL)))
    taken(study)
    for _ in range(2):
        worker.run()
    assert [trial.user_attrs.get("given_up") for trial in study.trials] == [None, module.TAKEN, module.TAKEN]
    assert not scored


def test_a_candidate_that_kills_its_processes_counts_as_failed(database):
    study, candidate = open_study(database, "x"), next(iter(SMALL))
    for _ in range(module.LIVES):
        module._Worker(study, SMALL, by_width).put(candidate)
        study.tell(taken(study), state=TrialState.FAIL)  # as is done with those that are dead
    (result,) = search(study, SMALL, [candidate], by_width)
    assert result == Result(candidate, "failed", reason="its process died 3 times", attempts=3)


def test_a_process_that_was_taken_for_dead_gives_its_trial_up(database, quick):
    asleep, awake = threading.Event(), threading.Event()

    def sleeper(architecture, check):
        if not asleep.is_set():
            asleep.set()
            study.tell(0, state=TrialState.FAIL)  # another process says that it is dead
            awake.wait(20)
        return by_width(architecture, check)

    study = open_study(database, "x")
    other = threading.Thread(target=lambda: (asleep.wait(20), time.sleep(0.3), awake.set()))
    other.start()
    results = search(study, SMALL, list(SMALL), sleeper)
    other.join()
    assert {result.state for result in results} == {"complete"}
    assert states(study) == {"COMPLETE": 6, "FAIL": 1}


MOMENTS = Space({"width": (1, 2, 3, 4, 5), "norm": ("a", "b", "c", "d")}, lambda **_: None)
FAILING = {"width": 2, "norm": "c"}


def value(architecture) -> float:
    return 10.0 * architecture["width"] + "abcd".index(architecture["norm"])


def be_one_of_several(database, done):
    """Search with others, taking a moment for each candidate, and tell `done` which ones they were."""

    def score(architecture, check):
        time.sleep(0.1)
        check(value(architecture))
        done.put(dict(architecture))
        if architecture == FAILING:
            raise ValueError("not to be trained")
        return Scores([value(architecture) - 1, value(architecture) + 1])

    module.HEARTBEAT_SECONDS, module.GRACE_SECONDS, module.WAIT_SECONDS = 1, 3, 0.1
    search(open_study(database, "moments"), MOMENTS, list(MOMENTS), score)


def test_processes_killed_at_random_moments_and_resumed_by_two_at_once_do_everything_once(tmp_path, quick):
    database = f"sqlite:///{tmp_path / 'search.db'}"
    moments = random.Random(int(os.environ.get("KILL_SEED", "0")))

    def two():
        queues = context.SimpleQueue(), context.SimpleQueue()
        return [(start(be_one_of_several, database, queue), queue) for queue in queues]

    for _ in range(int(os.environ.get("KILLS", "1"))):  # 20 by hand before a release
        for process, _ in two():
            time.sleep(moments.uniform(0, 1))
            process.kill()
            process.join()
    for process, done in two():
        assert finish(process) == 0
        assert not done.empty()  # both had a part in it
    study = open_study(database, "moments")
    results = results_of(study, list(MOMENTS))
    assert all(results)
    failed = [result for result in results if result.state == "failed"]
    assert [(result.architecture, result.reason) for result in failed] == [
        (FAILING, "ValueError: not to be trained")
    ]
    assert all(result.value == value(result.architecture) for result in results if result not in failed)
    done = Counter(
        tuple(trial.params.items())
        for trial in study.trials
        if trial.state.name == "COMPLETE" or "reason" in trial.user_attrs
    )
    assert done == {tuple(architecture.items()): 1 for architecture in MOMENTS}


def test_tables_that_another_process_makes_at_the_same_time_are_no_error(database, monkeypatch):
    failures = [IntegrityError("INSERT", {}, Exception("UNIQUE constraint failed: alembic_version"))] * 3

    def fail_at_first(storage, *arguments, **options):
        if failures:
            raise failures.pop()
        make(storage, *arguments, **options)

    make = RDBStorage.__init__
    monkeypatch.setattr(RDBStorage, "__init__", fail_at_first)
    assert open_study(database, "x").study_name == "x"
    assert not failures


@pytest.mark.filterwarnings("ignore:.*sqlite3.Connection")  # from Python 3.13 on, of what Optuna cannot open
def test_names_and_storages_that_do_not_exist_are_refused(database, tmp_path, monkeypatch):
    with pytest.raises(UnknownNameError, match=r"unknown strategy 'halve'\. Did you mean 'halving'"):
        open_study(database, "x", "halve")
    with monkeypatch.context() as patch:
        patch.setattr(module.time, "sleep", lambda _: pytest.fail("it is tried again"))
        with pytest.raises(
            UsageError, match=r"the storage nonsense cannot be opened: .*as sqlite:///search\.db"
        ):
            open_study("nonsense", "x")
    monkeypatch.setattr(module, "OPENINGS", 0)  # which take half a second or more for each
    with pytest.raises(UsageError, match=r"the storage mssql\+pymssql://host/db cannot be opened: .*install"):
        open_study("mssql+pymssql://me:se cret@host/db?password=secret", "x")
    for nowhere in ("sqlite://", "sqlite:///", "sqlite:///:memory:"):
        with pytest.raises(UsageError, match=rf"the storage {nowhere} cannot be opened: it would lie in mem"):
            open_study(nowhere, "x")
    with pytest.raises(
        UsageError, match=r"the storage sqlite:///.*none/search.db cannot be opened: .*unable"
    ):
        open_study(f"sqlite:///{tmp_path / 'none' / 'search.db'}", "x")
    (tmp_path / "text.db").write_text("this is not a database, but it is long enough to be taken for one" * 9)
    with pytest.raises(UsageError, match=r"cannot be opened: .*not a database"):
        open_study(f"sqlite:///{tmp_path / 'text.db'}", "x")
    gc.collect()
