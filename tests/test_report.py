"""What a long run shows: bars, and plots of its numbers."""

import errno
import io
import json
import re
import sys
import warnings

import pytest

from ncfm_engine import report
from ncfm_engine.report import Bars, plot_agreement, plot_losses, plot_regret, plot_variants


@pytest.fixture
def axes(monkeypatch, tmp_path):
    """Call a function that plots: its panels by their titles."""

    def plot(function, *arguments):
        figures = []
        monkeypatch.setattr(report, "_write", lambda figure, path: figures.append(figure))
        function(*arguments, tmp_path / "plot.png")
        return {axis.get_title(): axis for axis in figures[0].axes}

    return plot


def lines(axis):
    return [(line.get_label(), *map(list, line.get_data())) for line in axis.lines]


def test_a_bar_goes_on_where_the_run_does_and_ends_with_its_stage(capsys):
    with Bars() as bars:
        bars("search (distilled)", 0, 9)
        bars("distil", 30, 100)
        bars("distil", 40, 100, loss=0.123456, images_per_second=53774.6)
        bars("label", 1, 2)
        bars("label", 1, 4)
    search, _, _, first, _, last = capsys.readouterr().err.splitlines()
    assert search.endswith("candidate/s]")
    assert "step" in first
    assert first.startswith("distil:  40%")
    assert "40/100" in first
    assert "loss=0.1235" in first
    assert "images_per_second=53,775" in first
    assert last.startswith("label:  25%")


class Terminal(io.StringIO):
    def isatty(self):
        return True

    def lines(self):
        """What is seen in the end."""
        for line in self.getvalue().split("\n"):
            seen = ""
            for text in line.split("\r"):
                seen = text + seen[len(text) :]
            yield seen.rstrip()


def test_a_warning_is_a_line_of_its_own_and_the_bar_goes_on_below(monkeypatch):
    monkeypatch.setattr(sys, "stderr", Terminal())
    monkeypatch.setattr(
        warnings, "showwarning", lambda message, *_: print(f"note: {message}", file=sys.stderr)
    )
    with warnings.catch_warnings(), Bars() as bars:
        warnings.simplefilter("always")
        warnings.warn("before any bar", stacklevel=1)
        bars("distil", 3, 10)
        warnings.warn("beside it", stacklevel=1)
    before, beside, bar, end = sys.stderr.lines()  # type: ignore[attr-defined]
    assert (before, beside, end) == ("note: before any bar", "note: beside it", "")
    assert bar.startswith("distil:  30%")


def test_a_log_gets_a_line_of_a_bar_every_half_minute(monkeypatch, capsys):
    now = 0
    monkeypatch.setattr("tqdm.std.time", lambda: now)
    with Bars() as bars:
        for now in range(1001):
            bars("distil", now, 1000)
    said = capsys.readouterr().err
    assert "\r" not in said
    steps = [int(found) for found in re.findall(r"(\d+)/1000 ", said)]
    assert (steps[0], steps[1], steps[-1]) == (0, 30, 1000)
    assert len(steps) == said.count("\n") <= 40


def test_losses_are_drawn_over_their_steps(axes, tmp_path):
    names = ("step", "discrepancy", "calibration", "amplitude", "phase")
    rows = [dict(zip(names, row, strict=True)) for row in ((10, 1, 2, 3, 4), (20, 5, 6, 7, 8))]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    drawn = axes(plot_losses, tmp_path / "metrics.jsonl")
    assert {title: lines(axis) for title, axis in drawn.items()} == {
        "discrepancy, mean over classes": [("discrepancy", [10, 20], [1, 5])],
        "cross-entropy under a trained network": [("calibration", [10, 20], [2, 6])],
        "squared differences at the frequencies": [
            ("amplitude", [10, 20], [3, 7]),
            ("phase", [10, 20], [4, 8]),
        ],
    }


def test_variants_are_drawn_relative_to_where_they_began_and_named_once(axes):
    one = {"step": [1, 2], "discrepancy": [4, 2], "amplitude": [0, 0], "phase": [4, 3]}
    two = one | {"discrepancy": [2, 3]}
    drawn = axes(plot_variants, {"dm": [one, two]})
    relative, amplitude, phase = map(lines, drawn.values())
    assert [line[1:] for line in relative] == [([1, 2], [1, 0.5]), ([1, 2], [1, 1.5])]
    assert amplitude == []
    assert [line[1:] for line in phase] == [([1, 2], [4, 3])] * 2
    assert [label for label, *_ in phase if not label.startswith("_")] == ["dm"]


def test_scores_are_drawn_against_the_truth_with_the_picks_and_the_best(axes):
    columns = {"distilled": ([1, 2], [3, 4]), "random": ([5, 6], [7, 8])}
    picks = {"distilled": ([2], [4]), "random": ([6], [8])}
    drawn = axes(plot_agreement, columns, picks, 9)
    points = {title: [c.get_offsets().tolist() for c in axis.collections] for title, axis in drawn.items()}
    assert points == {"distilled": [[[1, 3], [2, 4]], [[2, 4]]], "random": [[[5, 7], [6, 8]], [[6, 8]]]}
    assert [list(axis.lines[0].get_ydata()) for axis in drawn.values()] == [[9, 9], [9, 9]]
    figure = drawn["random"].figure
    figure.draw_without_rendering()
    [legend] = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == ["best as scored", "best in full"]
    panels = [axis.get_tightbbox() for axis in drawn.values()]
    assert not any(legend.get_window_extent().overlaps(panel) for panel in panels)  # nor what they hold


def test_regret_is_drawn_over_seconds(axes):
    [axis] = axes(plot_regret, {"distilled": ([1, 2], [3, 4]), "random": ([5, 6], [7, 8])}).values()
    assert lines(axis) == [("distilled", [1, 2], [3, 4]), ("random", [5, 6], [7, 8])]
    assert (axis.get_xlabel(), axis.get_ylabel()) == (
        "seconds of training",
        "points of accuracy below the best",
    )


class Full(io.StringIO):
    def write(self, text):
        raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # of tqdm before 4.69
@pytest.mark.parametrize("stream", [Full(), None])
def test_a_stream_that_is_full_or_closed_ends_no_run(monkeypatch, stream):
    monkeypatch.setattr(sys, "stderr", stream)
    with Bars() as bars:
        for stage in ("pretrain", "distil"):
            for done in range(3):
                bars(stage, done, 2, loss=0.1)
