"""Turns of several contenders, and what is said about them."""

import statistics
from collections.abc import Callable
from contextlib import ExitStack

from ncfm_engine.report import Report, silent

from .engine import whole_periods
from .setup import Setup
from .workers import Contender, Worker

BASELINES = ("loop", "reference")  # everything else is an engine
WARM_UP = 2  # steps; the very first one is apart, because it chooses algorithms and compiles

Entry = tuple[Callable[..., Contender], tuple]  # a contender's class and its arguments, the setup first


def measure(
    entries: dict[str, Entry], *, rounds: int, seconds: float, stage: str, report: Report = silent
) -> list[dict]:
    """One row for each contender; they take turns of about `seconds` seconds, `rounds` times.

    All stay alive in processes of their own meanwhile, so that what disturbs the machine disturbs them alike.
    """
    with ExitStack() as stack:
        workers = {
            name: stack.enter_context(Worker(kind, *arguments)) for name, (kind, arguments) in entries.items()
        }
        report(stage, 0, rounds)  # before the warm-up, which may be long
        turns = {name: _warm_up(worker, entries[name][1][0], seconds) for name, worker in workers.items()}
        times: dict[str, list[float]] = {name: [] for name in workers}
        for done in range(1, rounds + 1):
            for name, worker in workers.items():
                times[name].append(worker.call("run", turns[name]) / turns[name])
            report(stage, done, rounds)
        return [
            summary(name, turns[name], times[name], worker.call("facts")) for name, worker in workers.items()
        ]


def _warm_up(worker: Worker, setup: Setup, seconds: float) -> int:
    """Steps that make one turn."""
    worker.call("run", 1)
    once = worker.call("run", WARM_UP) / WARM_UP
    return whole_periods(setup.recipe.distill, seconds / once)


def summary(name: str, iterations: int, seconds: list[float], facts: dict[str, float]) -> dict:
    """`seconds` per iteration of each round, with median and spread."""
    median = statistics.median(seconds)
    return {
        "contender": name,
        "iterations_per_round": iterations,
        "seconds": seconds,
        "median": median,
        "min": min(seconds),
        "max": max(seconds),
        "images_per_second": facts["images_per_step"] / median,
    } | facts


def ratios(rows: list[dict]) -> list[dict]:
    """How many times as long the baselines take as each engine, with both sides of every ratio in seconds."""
    baselines = [row for row in rows if row["contender"] in BASELINES]
    engines = [row for row in rows if row["contender"] not in BASELINES]
    return [
        {
            "ratio": f"{slow['contender']} / {fast['contender']}",
            "numerator": slow["median"],
            "denominator": fast["median"],
            "value": slow["median"] / fast["median"],
        }
        for fast in engines
        for slow in baselines
    ]
