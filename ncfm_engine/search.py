"""Architecture search: many processes, on one machine or on many, score the candidates of one study.

The study lies in a storage of Optuna, and every process that calls `search` on it takes candidates until all
are done. Nothing says which process does what, and none of them matters: a candidate whose process died is
tried again by another one, and of two processes that took the same one the second gives way.

What became of a trial is read from its state in the storage:

COMPLETE  scored by training to the end
PRUNED    scored, but ended early because others were better by then (halving, hyperband)
FAIL      with a `reason`: it raised or diverged, and is not tried again; `given_up`: stopped on request;
          else its process died or had no memory for it, and it is tried again up to `LIVES` times
"""

import contextlib
import functools
import gc
import itertools
import math
import random
import statistics
import time
import traceback
import warnings
import weakref
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import torch

from distilled_data import DeviceMemoryError, MissingExtraError, OutputError, UnknownNameError, UsageError
from distilled_data.terminal import without_login

from .allocator import give_back
from .costs import held
from .memory import is_out_of_memory
from .report import Report, silent
from .spaces import LIBRARIES, Architecture, Space, settings_kept
from .stop import Stopped, StopRequest
from .trust import DECIMALS

if TYPE_CHECKING:
    from optuna import Study, Trial
    from optuna.trial import FrozenTrial
else:
    Study = Trial = FrozenTrial = Any  # of Optuna, which is imported where it is needed

HEARTBEAT_SECONDS = 15  # between two signs of life of a running trial
GRACE_SECONDS = 60  # without one, after which its process is taken for dead
WAIT_SECONDS = 1.0  # between two looks at what other processes are doing
OPENINGS = 4  # times that a storage is tried again, for others may be making its tables at that moment
BUSY_SECONDS = 60  # that a process waits for others that write to the same file
MUCH = 2**30  # bytes of main memory, for one process of a search to hold between two candidates
LIVES = 3  # times that a candidate may cost its process the life, or all memory, before it counts as failed

TAKEN = "another process has it"

CHECKS = 9  # scores on the way, at each ninth of a training: 1 and 3 are the rungs of halving by 3
STRATEGIES = ("exhaustive", "random", "halving", "hyperband")
EARLY_ENDING = ("halving", "hyperband")

Check = Callable[[float], None]  # gets a score on the way; what it raises ends the training


class Scores(NamedTuple):
    """Of the networks of a candidate: accuracies in percent, losses late in training, if known, and seconds
    that were taken by processes which were stopped.
    """

    accuracies: Sequence[float]
    losses: Sequence[float] = ()
    before: float = 0.0


Score = Callable[[Architecture, Check], Scores]


@dataclass(frozen=True)
class Result:
    """What became of one candidate. `value` is its mean accuracy in percent, at the end or when pruned."""

    architecture: Architecture
    state: Literal["complete", "pruned", "failed"]
    value: float | None = None
    accuracies: Sequence[float] = ()  # of the single networks, if complete
    losses: Sequence[float] = ()  # of them, late in their training
    curve: Sequence[float] = ()  # accuracies at the checks
    seconds: float = 0.0  # that the scoring took
    reason: str = ""
    place: str = ""  # in the code of the user, where it failed
    attempts: int = 1  # with those whose process died or was stopped
    machine: str = ""  # that scored it


def sqlite_url(path: Path) -> str:
    """The storage in a file, in SQLAlchemy's own words: what it takes as quoted depends on its version."""
    with MissingExtraError.unless("optuna", "search", "architecture search"):
        from sqlalchemy import URL
    return URL.create("sqlite", database=str(path)).render_as_string()


def open_studies(storage: str, strategies: Mapping[str, str], *, make: bool = True) -> dict[str, Study]:
    """Studies of one database, and their strategies, by name; made, as the database is, if they do not exist,
    or with `make=False` left out, as all are where SQLite would make the database.

    `storage` is a URL as Optuna takes it, e.g. "sqlite:///search.db". To open it takes 0.1 s, a study 0.01.
    Raises `UsageError` if it cannot be opened, `UnknownNameError` for a strategy that does not exist.
    """
    for strategy in strategies.values():
        if strategy not in STRATEGIES:
            raise UnknownNameError.of("strategy", strategy, STRATEGIES)
    with MissingExtraError.unless("optuna", "search", "architecture search"):
        import optuna
        from sqlalchemy import make_url
        from sqlalchemy.exc import SQLAlchemyError

    class Patient(optuna.storages.RDBStorage):
        def record_first_heartbeat(self, trial_id: int) -> None:
            super().record_heartbeat(trial_id)

        def record_heartbeat(self, trial_id: int) -> None:
            # Of a thread of its own, which would end with a traceback where others write for long.
            with contextlib.suppress(SQLAlchemyError, optuna.exceptions.OptunaError):
                super().record_heartbeat(trial_id)

    def opened() -> dict[str, Study]:
        file = storage.startswith("sqlite:///") and "uri=true" not in storage
        if file and not make and not Path(make_url(storage).database or "").exists():
            return {}
        with _calm():
            database = Patient(
                storage,
                engine_kwargs=patient,
                heartbeat_interval=HEARTBEAT_SECONDS,
                grace_period=GRACE_SECONDS,
            )
        weakref.finalize(database, database.engine.dispose)  # or its connections are left open
        if storage.startswith("sqlite") and database.engine.url.database in (None, "", ":memory:"):
            raise UsageError("it would lie in memory, where no other process and no later one finds it")
        known = strategies if make else optuna.get_all_study_names(database)
        return {
            name: optuna.create_study(
                storage=database,
                study_name=name,
                direction="maximize",
                sampler=optuna.samplers.RandomSampler(),  # never asked
                pruner=_pruner(strategy),
                load_if_exists=True,
            )
            for name, strategy in strategies.items()
            if name in known
        }

    optuna.logging.set_verbosity(optuna.logging.ERROR)  # what fails is in the results
    patient = {"connect_args": {"timeout": BUSY_SECONDS}} if storage.startswith("sqlite") else {}
    try:
        make_url(storage).get_dialect()  # what is no URL of a database does not become one
        for _ in range(OPENINGS):
            with contextlib.suppress(SQLAlchemyError, optuna.exceptions.OptunaError):
                return opened()
            time.sleep(random.uniform(0.1, 0.5))
        return opened()
    except (ImportError, ValueError, SQLAlchemyError, optuna.exceptions.OptunaError) as error:
        place = without_login(storage).partition("?")[0]  # where a password may be too
        said = (_words_of_database(error) or str(error).splitlines()[0]).replace(storage, place)
        raise UsageError(
            f"the storage {place} cannot be opened: {said.rstrip('.')}. Expected a database that can be "
            "written, such as sqlite:///search.db"
        ) from error


def search(
    study: Study,
    space: Space,
    candidates: Sequence[Architecture],
    score: Score,
    *,
    machine: str = "",
    others: Callable[[], bool] = lambda: False,
    recorded: Callable[[Architecture], None] = lambda candidate: None,
    stop: StopRequest | None = None,
    report: Report = silent,
) -> list[Result]:
    """Score candidates until all of them are done, here or by other processes; results in their order.

    `score(architecture, check)` trains networks and says how good they are. It calls `check`
    with an accuracy `CHECKS` times, the last time at the end, or not at all if the strategy ends nothing
    early; what it raises itself makes the candidate a failed one. What is scored here is said to be scored by
    `machine`, in words. While there are `others` that score, this process looks on: a candidate that kills
    its process does not kill this one. `recorded` is called with a candidate when it is in the storage what
    became of it here. Raises `Stopped` when `stop` is requested: what is in work is left to the next process.
    Raises `UsageError` for a candidate that is there twice, and `OutputError` where the storage fails.
    """
    if len({_key(candidate) for candidate in candidates}) < len(candidates):
        raise UsageError("a candidate is there twice")
    worker = _Worker(study, space, score, machine, recorded)
    with _storage_of(study):
        while True:
            progress = _Progress(study, candidates)
            report(study.study_name, len(progress.done), len(candidates), **progress.figures())
            if len(progress.done) == len(candidates):
                return list(progress.done.values())
            if stop and stop.requested:
                raise Stopped(f"{study.study_name}, {len(progress.done)} of {len(candidates)} architectures")
            if others() or not (progress.open or progress.waiting):
                worker.bury()
                time.sleep(WAIT_SECONDS)
                continue
            if progress.open:
                worker.put(random.choice(progress.open))
            worker.run()


def adopt(study: Study, space: Space, results: Sequence[Result]) -> None:
    """Add to `study` what another one is known to have found, all of it complete, of candidates that are not
    done in it.

    Raises `OutputError` where the storage fails.
    """
    import optuna

    axes = _axes_of(space)
    with _storage_of(study):
        done = _Progress(study, [result.architecture for result in results]).done
        for result in results:
            if _key(result.architecture) in done:
                continue
            names = ("accuracies", "losses", "seconds", "machine")
            scored = {name: getattr(result, name) for name in names}
            trial = optuna.create_trial(
                value=result.value,
                params=dict(result.architecture),
                distributions=axes,
                user_attrs={"scored": scored},
                intermediate_values=dict(enumerate(result.curve, start=1)),
            )
            study.add_trial(trial)


def results_of(study: Study, candidates: Sequence[Architecture]) -> list[Result | None]:
    """What is known of the candidates by now, in their order; None for those that are not done.

    Raises `OutputError` where the storage fails.
    """
    with _storage_of(study):
        done = _Progress(study, candidates).done
    return [done.get(_key(candidate)) for candidate in candidates]


@contextlib.contextmanager
def _storage_of(study: Study) -> Iterator[None]:
    """Tells an error of the storage as one, also where Optuna breaks down over it."""
    try:
        yield
    except Exception as error:
        if said := _words_of_database(error):
            storage: Any = study._storage
            place = storage._backend.engine.url.set(query={})  # which hides the password itself
            raise OutputError(
                f"the storage {place} failed: {said}. What it holds is kept. "
                "See that no other program locks it and that it has space; then the same search goes on."
            ) from error
        raise


def _words_of_database(error: BaseException | None) -> str | None:
    """Those of the error that is behind `error`, if it is one of the database."""
    from sqlalchemy.exc import SQLAlchemyError

    while error and not isinstance(error, SQLAlchemyError):
        error = error.__context__
    return str(error).splitlines()[0] if error else None


class _Progress:
    """What is `done`, in the order of the candidates, and what is `open`; the rest is being worked on.

    `waiting` is the number of trials that were put into the storage, and that nobody has begun yet.
    """

    def __init__(self, study: Study, candidates: Sequence[Architecture]):
        trials: dict[Any, list[FrozenTrial]] = {}
        for trial in study.get_trials(deepcopy=False):
            trials.setdefault(_key(trial.params), []).append(trial)
        self.done: dict[Any, Result] = {}
        self.open: list[Architecture] = []
        self.waiting = sum(trial.state.name == "WAITING" for same in trials.values() for trial in same)
        for candidate in candidates:
            same = trials.get(_key(candidate), [])
            if result := _result(candidate, same):
                self.done[_key(candidate)] = result
            elif not any(trial.state.name in ("RUNNING", "WAITING") for trial in same):
                self.open.append(candidate)

    def figures(self) -> dict[str, float]:
        values = [result.value for result in self.done.values() if result.value is not None]
        states = [result.state for result in self.done.values()]
        counts = {state: states.count(state) for state in ("pruned", "failed") if state in states}
        return counts | ({"best": max(values)} if values else {})


def _key(architecture: Architecture) -> tuple[Any, ...]:
    return tuple(sorted(architecture.items()))


def _result(candidate: Architecture, trials: Sequence[FrozenTrial]) -> Result | None:
    """What the trials of one candidate come to, or None if it is not done."""
    finished = [t for t in trials if t.state.is_finished() and t.user_attrs.get("given_up") != TAKEN]
    mine = [trial for trial in finished if "given_up" not in trial.user_attrs]
    for trial in mine:
        notes, scored = trial.user_attrs, trial.user_attrs.get("scored", {})
        if trial.state.name == "FAIL" and "reason" not in notes:
            continue
        states: dict[str, Any] = {"COMPLETE": "complete", "PRUNED": "pruned", "FAIL": "failed"}
        return Result(
            candidate,
            states[trial.state.name],
            None if trial.value is None else round(trial.value, DECIMALS),
            scored.get("accuracies", ()),
            scored.get("losses", ()),
            [value for _, value in sorted(trial.intermediate_values.items())],
            scored.get("seconds", 0.0),
            notes.get("reason", ""),
            notes.get("place", ""),
            len(finished),
            scored.get("machine", ""),
        )
    if len(mine) < LIVES:
        return None
    reasons = [trial.user_attrs["memory"] for trial in mine if "memory" in trial.user_attrs]
    reason = reasons[-1] if reasons else f"its process died {len(mine)} times"
    return Result(candidate, "failed", reason=reason, attempts=len(finished))


def _axes_of(space: Space) -> dict[str, Any]:
    """As Optuna has them."""
    from optuna.distributions import CategoricalDistribution

    return {name: CategoricalDistribution(tuple(values)) for name, values in space.axes.items()}


class _Worker:
    """Runs one trial after the other in this process."""

    def __init__(
        self,
        study: Study,
        space: Space,
        score: Score,
        machine: str = "",
        recorded: Callable[[Architecture], None] = lambda candidate: None,
    ):
        self.study, self.score, self.machine, self.recorded = study, score, machine, recorded
        self._axes = _axes_of(space)
        self._number = -1  # of the trial in work
        self._seen: dict[int, float] = {}  # trials that had not begun, and when that was first seen here
        self._fatal: Exception | None = None  # after which this process cannot compute any more

    def put(self, candidate: Architecture) -> None:
        """Add a trial of this candidate, which the next `run` of any process will take."""
        import optuna

        waiting = optuna.trial.TrialState.WAITING
        trial = optuna.create_trial(state=waiting, params=dict(candidate), distributions=self._axes)
        self.study.add_trial(trial)

    def run(self) -> None:
        """Run the trial that waits longest."""
        import optuna

        self._number = -1
        try:
            with _calm():
                self.study.optimize(self._objective, n_trials=1, catch=(Exception,), callbacks=[self._end])
        except (ValueError, optuna.exceptions.UpdateFinishedTrialError):
            # This process was taken for dead, since it was asleep for long: another one does the trial.
            trials = self.study.get_trials(deepcopy=False)
            if self._number < 0 or not trials[self._number].state.is_finished():
                raise
        if torch.cuda.is_available():
            torch.cuda.empty_cache()  # other processes need it too
        if self._fatal:
            raise self._fatal

    def bury(self) -> None:
        """Let trials fail whose process is dead: then they are open again."""
        import optuna

        with _calm():
            optuna.storages.fail_stale_trials(self.study)
        for trial in self.study.get_trials(deepcopy=False, states=(optuna.trial.TrialState.RUNNING,)):
            now = time.monotonic()  # of this machine: another one's clock may have another time
            age = now - self._seen.setdefault(trial.number, now)
            if "begun" not in trial.user_attrs and age > GRACE_SECONDS:  # it has never given a sign of life
                with contextlib.suppress(ValueError, optuna.exceptions.UpdateFinishedTrialError):
                    self.study.tell(trial.number, state=optuna.trial.TrialState.FAIL)

    def _objective(self, trial: Trial) -> float:
        from optuna import TrialPruned
        from optuna.exceptions import OptunaError
        from sqlalchemy.exc import SQLAlchemyError

        self._number = trial.number
        # before another thread begins to do so: one that has "begun" and none could never be buried
        storage: Any = self.study._storage
        storage._backend.record_first_heartbeat(trial._trial_id)
        trial.set_user_attr("begun", True)
        if self._is_taken(trial):
            trial.set_user_attr("given_up", TAKEN)
            raise TrialPruned
        checks = 0

        def check(accuracy: float) -> None:
            nonlocal checks
            checks += 1
            trial.report(accuracy, checks)
            if checks < CHECKS and trial.should_prune():
                raise TrialPruned

        began = time.monotonic()
        try:
            with settings_kept():
                scores = self.score(trial.params, check)
            mean = statistics.fmean(scores.accuracies)
        except TrialPruned as pruned:
            seconds = round(time.monotonic() - began, 2)
            trial.set_user_attr("scored", {"seconds": seconds, "machine": self.machine})
            raise pruned.with_traceback(None) from None  # which would hold what the training had
        except (Stopped, KeyboardInterrupt):
            trial.set_user_attr("given_up", "stopped on request")
            raise
        except (OptunaError, SQLAlchemyError):  # of the storage
            raise
        except (Exception, SystemExit) as error:
            lack = isinstance(error, (DeviceMemoryError, MemoryError)) or is_out_of_memory(error)
            if isinstance(error, torch.AcceleratorError) and not lack:
                self._fatal = error
                raise
            text = reason_of(error)
            trial.set_user_attr("memory" if lack else "reason", text)
            trial.set_user_attr("place", place_of(error))
            if isinstance(error, SystemExit):  # of a user's code: one candidate has failed, not the search
                raise RuntimeError(text) from None
            raise
        seconds = round(scores.before + time.monotonic() - began, 2)
        values = {"accuracies": [*scores.accuracies], "losses": [*scores.losses]}
        trial.set_user_attr("scored", values | {"seconds": seconds, "machine": self.machine})
        return mean

    def _end(self, _: Study, trial: FrozenTrial) -> None:
        if _result(trial.params, [trial]):
            self.recorded(trial.params)
        _free(trial)

    def _is_taken(self, trial: Trial) -> bool:
        """Whether an earlier trial of the same candidate is done or in work, or this one has no candidate."""
        key, trials = _key(trial.params), self.study.get_trials(deepcopy=False)
        same = [other for other in trials if other.number < trial.number and _key(other.params) == key]
        busy = any(not other.state.is_finished() for other in same)
        return not key or busy or _result(trial.params, same) is not None


def reason_of(error: BaseException) -> str:
    """What an error of a user's code is called, on one line."""
    text = f"{type(error).__name__}: {str(error).strip()}".splitlines()[0].rstrip(": ")
    # A lone surrogate cannot be written, and a report is no place for colours of a terminal.
    return "".join(sign if sign.isprintable() else ascii(sign)[1:-1] for sign in text[:500])


def place_of(error: BaseException) -> str:
    """Where an error came out of code that is not installed, nor of this project: file and line, or ""."""
    place, own = "", {__name__.partition(".")[0], "distilled_data"}
    for frame, line in traceback.walk_tb(error.__traceback__):
        file = Path(frame.f_code.co_filename)
        installed = any(map(file.is_relative_to, LIBRARIES)) or not file.is_file()
        if not installed and frame.f_globals.get("__name__", "").partition(".")[0] not in own:
            place = f"{file.name}, line {line}"
    return place


def _pruner(strategy: str) -> Any:
    """Halving, asynchronous (Li et al. 2018, arXiv 1810.05934), or Hyperband (Li et al. 2016, 1603.06560).

    At 1 and 3 of the 9 checks a candidate goes on if it is among the best third of those that came so far. In
    Hyperband's other two brackets that begins at 3, or never. Optuna's own pruners ask the same of trials, so
    that a candidate that was stopped and trained again would compete with itself.
    """
    from optuna.pruners import BasePruner, NopPruner

    shares = {"halving": [1], "hyperband": [9, 5, 3]}.get(strategy)  # of the brackets: algorithm 1 there
    if shares is None:
        return NopPruner()

    @functools.cache
    def bracket_of(candidate: tuple[Any, ...]) -> int:
        place = zlib.crc32(repr(candidate).encode()) % sum(shares)
        return sum(place >= end for end in itertools.accumulate(shares))

    class OncePerCandidate(BasePruner):
        def prune(self, study: Study, trial: FrozenTrial) -> bool:
            step, bracket, values = trial.last_step, bracket_of(_key(trial.params)), {}
            if step not in (1, 3) or step < 3**bracket:
                return False
            for other in [*study.get_trials(deepcopy=False), trial]:
                if step in other.intermediate_values and bracket_of(key := _key(other.params)) == bracket:
                    values[key] = other.intermediate_values[step]
            ranked = sorted((value for value in values.values() if not math.isnan(value)), reverse=True)
            own = trial.intermediate_values[step]
            return math.isnan(own) or own < ranked[: max(1, len(values) // 3)][-1]

    return OncePerCandidate()


def _free(trial: FrozenTrial) -> None:
    """An error holds what the training had until garbage is collected, which takes 0.2 s. So may a network
    that refers to itself, but only the memory of a GPU is too scarce to wait for that. What is kept for the
    steps of a candidate (see `keep_freed`) is given back where it is much, or every process would hold for
    hours what its largest one needed; that takes as long as a tenth of a training of small ones.
    """
    if trial.state.name == "FAIL" or torch.cuda.is_available():
        gc.collect()
    if held("RssAnon") > MUCH:
        give_back()


@contextlib.contextmanager
def _calm() -> Iterator[None]:
    """Heartbeats are called experimental, in a warning at every turn."""
    from optuna.exceptions import ExperimentalWarning

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ExperimentalWarning)
        yield
