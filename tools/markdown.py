"""Results as Markdown."""

from collections.abc import Iterable, Sequence


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """The lines of a table, whatever text is in its cells."""
    every = [[" ".join(cell.splitlines()).replace("|", r"\|") for cell in cells] for cells in (head, *rows)]
    lines = [f"| {' | '.join(cells)} |" for cells in every]
    return [lines[0], "|---" * len(head) + "|", *lines[1:]]


def score(mean: float | None, std: float | None, missing: str = "-") -> str:
    """A mean, and the standard deviation where there is one, with one decimal."""
    if mean is None:
        return missing
    return f"{mean:.1f}" if std is None else f"{mean:.1f} ± {std:.1f}"
