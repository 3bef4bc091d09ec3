"""What a long run shows: bars on the terminal, plots of the losses, notes."""

import contextlib
import io
import json
import sys
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, Self, TextIO

from distilled_data import MissingExtraError, OutputError
from distilled_data.files import write_file

UNITS = {"distil": "step", "pretrain": "epoch", "evaluate": "epoch", "search": "candidate"}  # of a stage
LOGGED_SECONDS = 30.0  # between two lines of a bar in a log, which a run of hours would fill with it


class OwnWarning(UserWarning):
    """What one of several processes has to say for itself: the others do not tell it."""


class Report(Protocol):
    """Called with a stage, the units done and in all, and figures to show beside them."""

    def __call__(self, stage: str, done: int, total: int, **figures: float) -> None: ...


def silent(stage: str, done: int, total: int, **figures: float) -> None:
    pass


class Bars:
    """One tqdm bar per stage, with step time and time left; a context manager that ends the last one. In a
    log a bar is a line at the beginning of its stage, every `LOGGED_SECONDS` and at the end.
    """

    def __init__(self):
        self._stage, self._bar = "", None
        self._show_warning = warnings.showwarning

    def __call__(self, stage: str, done: int, total: int, **figures: float) -> None:
        with contextlib.suppress(OSError):  # a log on a full disk, or whose reader is gone, ends no run
            self._show(stage, done, total, figures)

    def _show(self, stage: str, done: int, total: int, figures: Mapping[str, float]) -> None:
        from tqdm import tqdm

        if self._bar is None or stage != self._stage:
            self.close()
            # A resumed stage begins at `done`, which must not count as progress of this process.
            unit = UNITS.get(stage.partition(" ")[0], "it")
            options = {"unit": unit, "dynamic_ncols": True, "disable": sys.stderr is None}
            if sys.stderr is not None and not sys.stderr.isatty():
                often = {"mininterval": LOGGED_SECONDS, "maxinterval": LOGGED_SECONDS}
                options |= {"file": _Lines(sys.stderr), **often}
            self._bar = tqdm(desc=stage, total=total, initial=done, **options)
            self._stage = stage
        self._bar.total = total  # a process trains its share first, then has the networks of all
        shown = {name: f"{value:,.0f}" if value >= 1e4 else f"{value:.4g}" for name, value in figures.items()}
        self._bar.set_postfix(shown, refresh=False)
        self._bar.update(done - self._bar.n)

    def _warn(self, *warning: Any, **place: Any) -> None:
        """Show a warning in the place of the bar, which is shown again below it."""
        bar = self._bar
        with contextlib.suppress(OSError):
            if bar is not None:
                bar.clear()
        self._show_warning(*warning, **place)
        with contextlib.suppress(OSError):
            if bar is not None:
                bar.refresh()

    def __enter__(self) -> Self:
        self._show_warning, warnings.showwarning = warnings.showwarning, self._warn
        return self

    def __exit__(self, *error: object) -> None:
        warnings.showwarning = self._show_warning
        self.close()

    def close(self) -> None:
        bar, self._bar = self._bar, None
        if bar is not None:
            with contextlib.suppress(OSError):
                bar.close()


class _Lines:
    """A log, in which a bar becomes a line each time that it would be drawn over itself."""

    def __init__(self, log: TextIO):
        self._log = log

    def write(self, text: str) -> None:
        if line := text.strip():
            self._log.write(f"{line}\n")

    def flush(self) -> None:
        self._log.flush()


@contextlib.contextmanager
def dispensable() -> Iterator[None]:
    """For what only tells of a run: where it cannot be written, a warning says so, and the run goes on."""
    try:
        yield
    except OutputError as error:
        warnings.warn(f"{error} This run goes on without it.", stacklevel=3)


def plot_losses(metrics: Path, path: Path) -> None:
    """Draw the rows of `metrics.jsonl` as a PNG: what the players pull at, and what it is made of."""
    rows = [json.loads(line) for line in metrics.read_text().splitlines()]
    panels = {
        "discrepancy, mean over classes": ["discrepancy"],
        "cross-entropy under a trained network": ["calibration"],
        "squared differences at the frequencies": ["amplitude", "phase"],
    }
    figure, axes = _figure(list(panels), width=12)
    for axis, names in zip(axes, panels.values(), strict=True):
        for name in names:
            axis.plot([row["step"] for row in rows], [row[name] for row in rows], label=name, linewidth=1.2)
        axis.set(xlabel="step", ylim=(0, None))
    axes[-1].legend(frameon=False)
    _write(figure, path)


def plot_variants(curves: dict[str, list[dict[str, list[float]]]], path: Path) -> None:
    """Draw loss curves as a PNG: for each variant the columns of `metrics.jsonl` of several seeds.

    Discrepancies of different kinds have different units, so each is drawn relative to its first row.
    """
    titles = ["discrepancy relative to its first value", "amplitude difference", "phase difference"]
    figure, axes = _figure(titles, width=14, height=max(3.2, 0.25 * len(curves)))
    for axis, name in zip(axes, ("discrepancy", "amplitude", "phase"), strict=True):
        for color, (variant, seeds) in enumerate(curves.items()):
            for number, columns in enumerate(seeds):
                values = columns[name]
                if not any(values):  # a discrepancy without frequencies has no amplitude and no phase
                    continue
                scale = values[0] if name == "discrepancy" else 1.0
                axis.plot(
                    columns["step"],
                    [value / scale for value in values],
                    color=f"C{color % 10}",
                    linestyle=("-", "--", ":")[color // 10 % 3],
                    linewidth=1.0,
                    label=None if number else variant,
                )
        axis.set(xlabel="step", ylim=(0, None))
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside right upper", frameon=False)
    _write(figure, path)


Columns = Mapping[str, tuple[Sequence[float], Sequence[float]]]  # x and y, by title


def plot_agreement(columns: Columns, picks: Columns, best: float, path: Path) -> None:
    """Draw scores against the truth as a PNG, a panel for each way to score, all of the same height.

    Of each way, what is in `picks` is marked; a line shows the `best` truth.
    """
    figure, axes = _figure(list(columns), width=4 * len(columns), height=3.8)
    for axis, (title, (scores, truth)) in zip(axes, columns.items(), strict=True):
        axis.sharey(axes[0])
        axis.scatter(scores, truth, s=14, alpha=0.7)
        axis.scatter(*picks[title], s=90, facecolors="none", edgecolors="C3", label="best as scored")
        axis.axhline(best, color="grey", linewidth=0.8, linestyle=":", label="best in full")
        axis.set(xlabel="accuracy as scored, percent", ylabel="accuracy by full training, percent")
    shown = axes[0].get_legend_handles_labels()
    figure.legend(*shown, frameon=False, loc="outside lower center", ncols=2)  # points are anywhere within
    _write(figure, path)


def plot_regret(columns: Columns, path: Path) -> None:
    """Draw regret over seconds of searching as a PNG, a line for each way: means over random orders."""
    figure, (axis,) = _figure(["regret of the pick so far, among those trained in full"], width=6, height=3.8)
    for title, (seconds, regrets) in columns.items():
        axis.plot(seconds, regrets, label=title, linewidth=1.4)
    axis.set(xlabel="seconds of training", ylabel="points of accuracy below the best", ylim=(0, None))
    axis.legend(frameon=False)
    _write(figure, path)


def _figure(titles: list[str], width: float, height: float = 3.2) -> tuple[Any, list[Any]]:
    with MissingExtraError.unless("matplotlib", "engine", "the plot"):
        from matplotlib.figure import Figure
    figure = Figure(figsize=(width, height), layout="constrained")
    axes = list(figure.subplots(1, len(titles), squeeze=False)[0])
    for axis, title in zip(axes, titles, strict=True):
        axis.set_title(title, fontsize="medium")
        axis.grid(alpha=0.3)
        axis.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _write(figure: Any, path: Path) -> None:
    picture = io.BytesIO()
    figure.savefig(picture, format="png", dpi=120)
    write_file(path, picture.getvalue())
