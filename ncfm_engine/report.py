"""What a long run shows: bars on the terminal, a plot of the losses."""

import io
import json
from pathlib import Path
from typing import Protocol, Self

from distilled_data import MissingExtraError
from distilled_data.format import write_file


class Report(Protocol):
    """Called with a stage, the units done and in all, and figures to show beside them."""

    def __call__(self, stage: str, done: int, total: int, **figures: float) -> None: ...


def silent(stage: str, done: int, total: int, **figures: float) -> None:
    pass


class Bars:
    """One tqdm bar per stage, with step time and time left; a context manager that ends the last one."""

    def __init__(self):
        self._stage, self._bar = "", None

    def __call__(self, stage: str, done: int, total: int, **figures: float) -> None:
        from tqdm import tqdm

        if self._bar is None or stage != self._stage:
            self.close()
            # A resumed stage begins at `done`, which must not count as progress of this process.
            self._bar = tqdm(desc=stage, total=total, initial=done, unit="step", dynamic_ncols=True)
            self._stage = stage
        self._bar.set_postfix({name: f"{value:.4g}" for name, value in figures.items()}, refresh=False)
        self._bar.update(done - self._bar.n)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()
            self._bar = None


def plot_losses(metrics: Path, path: Path) -> None:
    """Draw the rows of `metrics.jsonl` as a PNG: discrepancy (both players pull at it) and calibration."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise MissingExtraError("matplotlib", "engine", "the loss plot") from error
    rows = [json.loads(line) for line in metrics.read_text().splitlines()]
    steps = [row["step"] for row in rows]
    figure = Figure(figsize=(9, 3.2), layout="constrained")
    for axis, name, title in zip(
        figure.subplots(1, 2),
        ("discrepancy", "calibration"),
        ("discrepancy (NCFD), mean over classes", "cross-entropy under a trained network"),
        strict=True,
    ):
        axis.plot(steps, [row[name] for row in rows], color="#2f6f9f", linewidth=1.2)
        axis.set(title=title, xlabel="step", ylim=(0, None))
        axis.grid(alpha=0.3)
        axis.spines[["top", "right"]].set_visible(False)
    picture = io.BytesIO()
    figure.savefig(picture, format="png", dpi=120)
    write_file(path, picture.getvalue())
