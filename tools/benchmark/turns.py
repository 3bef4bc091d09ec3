"""Contenders that take turns in one process, so that what else the machine does hits all of them."""

import statistics
from collections.abc import Callable
from typing import Any

Measured = tuple[float, int]  # seconds, bytes of memory or 0


def turns(contenders: dict[str, Callable[[], Measured]], rounds: int) -> dict[str, list[Measured]]:
    """What each took in each round; a round before the first is not counted."""
    measured: dict[str, list[Measured]] = {name: [] for name in contenders}
    for turn in range(rounds + 1):
        for name, run in contenders.items():
            value = run()
            if turn:
                measured[name].append(value)
    return measured


def report(what: str, measured: dict[str, list[Measured]]) -> list[dict[str, Any]]:
    """Print a table, and return its rows; a ratio is that of the first contender's median to one's own."""
    print(f"\n{what}: median ms (min to max), times as fast as the first")
    rows, first = [], statistics.median(seconds for seconds, _ in next(iter(measured.values())))
    for name, values in measured.items():
        seconds = [value for value, _ in values]
        middle, memory = statistics.median(seconds), max(memory for _, memory in values)
        shown = f"{1000 * middle:8.1f} ({1000 * min(seconds):.1f} to {1000 * max(seconds):.1f})"
        print(f"{shown:28}  {first / middle:6.2f}  {name}" + (f", {memory / 1e6:.1f} MB" if memory else ""))
        rows.append({"what": what, "contender": name, "seconds": seconds, "memory": memory})
    return rows
