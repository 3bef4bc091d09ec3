"""How time and memory of a step grow, along one axis at a time from a base point."""

import io
import math
from collections.abc import Callable, Iterator
from dataclasses import replace

from distilled_data import MissingExtraError, UsageError

from .engine import Engine
from .rounds import measure
from .setup import Setup
from .together import Team

AXES = {"classes": (10, 100, 1000), "ipc": (1, 10, 50), "size": (32, 64, 128), "ranks": (1, 2)}
LABELS = {"classes": "classes", "ipc": "images per class", "size": "pixels per image", "ranks": "ranks"}


def parse(words: list[str], most_ranks: int | None = None) -> dict[str, tuple[int, ...]]:
    """`["classes=2,4"]` as axes and their values; no words are all axes. Raises `UsageError`, also for more
    ranks than there can be.
    """
    axes = {}
    for word in words or AXES:
        name, _, values = word.partition("=")
        numbers = values.split(",") if values else [str(value) for value in AXES.get(name, ())]
        if name not in AXES or not all(number.isdecimal() and int(number) for number in numbers):
            raise UsageError(
                f"--growth {word}: expected AXIS or AXIS=VALUE,VALUE with an axis of {', '.join(AXES)}"
            )
        chosen = tuple(int(number) for number in numbers)
        if name == "ranks" and most_ranks:
            if values and max(chosen) > most_ranks:
                raise UsageError(f"--growth {word}: there are {most_ranks} GPUs, and each rank takes one")
            chosen = tuple(count for count in chosen if count <= most_ranks)
        axes[name] = chosen
    return axes


def growth(
    setup: Setup, axes: dict[str, tuple[int, ...]], at_size: Callable[[int], int], **turns
) -> Iterator[dict]:
    """A row of `measure` for every point, of the engine alone; `at_size` gives the depth of the networks.

    Images are random, so that there are some of every shape.
    """
    setup = replace(setup, dataset=None, data=None)
    for axis, values in axes.items():
        for value in values:
            contender = (
                (Team, (setup, value)) if axis == "ranks" else (Engine, (at(setup, axis, value, at_size),))
            )
            (row,) = measure({"engine": contender}, stage=f"{axis} {value}", **turns)
            yield {"axis": axis, "value": value} | row


def at(setup: Setup, axis: str, value: int, at_size: Callable[[int], int]) -> Setup:
    """The base point with one number changed."""
    if axis == "classes":
        return replace(setup, classes=value)
    if axis == "ipc":
        return replace(setup, recipe=setup.recipe.replace({"ipc": value}))
    return replace(setup, size=value, recipe=setup.recipe.replace({"network.depth": at_size(value)}))


def scale(axis: str, value: int) -> int:
    """What the work of a step is expected to be proportional to."""
    return value**2 if axis == "size" else value


def exponents(rows: list[dict]) -> list[float | None]:
    """For each row the slope, in a log-log plot of seconds, from the row before it on the same axis."""
    slopes: list[float | None] = []
    for before, row in zip([None, *rows], rows, strict=False):
        if before is None or before["axis"] != row["axis"] or before["value"] == row["value"]:
            slopes.append(None)
            continue
        steps = scale(row["axis"], row["value"]) / scale(row["axis"], before["value"])
        slopes.append(math.log(row["median"] / before["median"]) / math.log(steps))
    return slopes


def plot(rows: list[dict]) -> bytes:
    """PNG: seconds and memory per axis, log-log; a dashed line of slope 1 is growth in proportion."""
    with MissingExtraError.unless("matplotlib", "engine", "the plot of the growth"):
        from matplotlib.figure import Figure
        from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter
    axes = [axis for axis in AXES if sum(row["axis"] == axis for row in rows) > 1] or [rows[0]["axis"]]
    figure = Figure(figsize=(1.2 + 3.2 * len(axes), 5.6), layout="constrained")
    panels = figure.subplots(2, len(axes), sharey="row", squeeze=False)
    for column, axis in enumerate(axes):
        points = [row for row in rows if row["axis"] == axis]
        x = [scale(axis, row["value"]) for row in points]
        seconds = [row["median"] for row in points]
        spread = [
            [row["median"] - row["min"] for row in points],
            [row["max"] - row["median"] for row in points],
        ]
        panels[0, column].errorbar(x, seconds, spread, fmt="none", ecolor="#2f6f9f", capsize=3)
        for panel, y in (
            (panels[0, column], seconds),
            (panels[1, column], [max(row["peak_mib"], 0.1) for row in points]),
        ):
            line = [y[0] * value / x[0] for value in x]
            panel.plot(x, line, "--", color="#999999", linewidth=1, label="slope 1")
            panel.plot(x, y, "o-", color="#2f6f9f", linewidth=1.4, label="engine")
            panel.set(xscale="log", yscale="log", xlabel=LABELS[axis])
            panel.set_xticks(x, [f"{value:,}" for value in x], minor=False)
            panel.xaxis.set_minor_formatter(NullFormatter())
            panel.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            panel.yaxis.set_major_formatter(StrMethodFormatter("{x:,g}"))
            panel.yaxis.set_minor_formatter(NullFormatter())
            panel.grid(alpha=0.3)
            panel.spines[["top", "right"]].set_visible(False)
    panels[0, 0].set_ylabel("seconds per iteration")
    panels[1, 0].set_ylabel("peak memory, MiB")
    panels[0, 0].legend(frameon=False)
    picture = io.BytesIO()
    figure.savefig(picture, format="png", dpi=120)
    return picture.getvalue()
