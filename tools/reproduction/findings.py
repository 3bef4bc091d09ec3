"""What a study found, in a JSON file with a line for each variant, and as a table."""

import dataclasses
import json
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from distilled_data import UsageError
from ncfm_engine.config import Recipe, flatten
from ncfm_engine.presets import PRESETS
from tools.listing import write_rows
from tools.markdown import score, table

from .studies import PRESET
from .tables import TABLES

DIGITS = 4  # significant ones, of the points of a curve
COLUMNS = ("step", "discrepancy", "calibration", "amplitude", "phase")


@dataclass
class Finding:
    """`runs` are those of seeds 0, 1, ...; each is what `Laboratory.run` returns."""

    variant: str
    changes: dict[str, str]
    runs: list[dict[str, Any]] = field(default_factory=list)

    @property
    def values(self) -> list[float]:
        """Accuracies in percent."""
        return [run["accuracy"] for run in self.runs]

    @property
    def curves(self) -> list[dict[str, list[float]]]:
        """Of each run that distilled."""
        return [run["curve"] for run in self.runs if run.get("curve")]

    @property
    def seconds(self) -> float:
        """Of one distillation, the median; 0 where none was made."""
        return statistics.median(run.get("seconds", 0.0) for run in self.runs)

    def row(self) -> dict[str, Any]:
        return {
            "variant": self.variant,
            "changes": self.changes,
            "n": len(self.runs),
            "mean": round(statistics.fmean(self.values), 2),
            "std": round(statistics.stdev(self.values), 2) if len(self.runs) > 1 else None,
            "seconds": self.seconds,
            "runs": self.runs,
        }


def curve(rows: Sequence[Mapping[str, float]]) -> dict[str, list[float]]:
    """Rows of `metrics.jsonl` as columns, rounded."""
    return {name: [float(f"{row[name]:.{DIGITS}g}") for row in rows] for name in COLUMNS} if rows else {}


def read(path: Path, head: Mapping[str, Any]) -> dict[str, Finding]:
    """The findings that lie at `path`, by variant. Raises `UsageError` for those of another study."""
    if not path.exists():
        return {}
    try:
        content = json.loads(path.read_text())
    except ValueError:  # of JSON or UTF-8
        content = {}
    if "findings" not in content:
        raise UsageError(f"{path} does not hold the findings of a study. Choose another --output.")
    there, here = (flatten(dict(part) | {"settings": _settings(part)}) for part in (content, head))
    for name, value in here.items():
        if there.get(name) != value:
            raise UsageError(
                f"{path} holds findings of another study: {name} is {there.get(name)!r} there and "
                f"{value!r} here. Choose another --output, or remove that file."
            )
    return _findings(content)


def _findings(content: Mapping[str, Any]) -> dict[str, Finding]:
    rows = content["findings"]
    return {row["variant"]: Finding(row["variant"], row["changes"], row["runs"]) for row in rows}


def write(path: Path, head: Mapping[str, Any], findings: Sequence[Finding]) -> None:
    write_rows(path, head, "findings", [finding.row() for finding in findings])


def _settings(head: Mapping[str, Any]) -> dict[str, Any]:
    """As this version writes them: fields that are new since have their defaults."""
    return dataclasses.asdict(Recipe.from_dict(head["settings"]))


def line(finding: Finding) -> str:
    """As it is shown on the screen."""
    return f"{finding.variant:52} {_score(finding):>11}  n={len(finding.runs)}  {finding.seconds:7.1f} s"


def difference(finding: Finding, base: Finding) -> tuple[float, float | None]:
    """How much higher the mean is than that of `base`, and the standard error of that."""
    a, b = finding.values, base.values
    gain = statistics.fmean(a) - statistics.fmean(b)
    if min(len(a), len(b)) < 2:
        return gain, None
    return gain, math.sqrt(statistics.variance(a) / len(a) + statistics.variance(b) / len(b))


def markdown(files: Sequence[Path]) -> str:
    """The findings of one study as a table, with columns for each of its files (images per class)."""
    contents = [json.loads(path.read_text()) for path in files]
    contents.sort(key=lambda content: content["ipc"])
    if contents[0]["study"] == "nested":
        return "\n\n".join(_nested(content) for content in contents) + "\n"
    found = [_findings(content) for content in contents]
    names = list(dict.fromkeys(name for part in found for name in part))
    head, rows = ["change"], [[name] for name in names]
    for content, part in zip(contents, found, strict=True):
        head += [f"{content['ipc']} per class", "n", "against the preset", "kept"]
        for row in rows:
            row += _cells(part.get(row[0]), part.get(PRESET), content["preset"])
    return "\n".join(table(head, rows)) + "\n"


def _cells(finding: Finding | None, base: Finding | None, preset: str) -> list[str]:
    if finding is None:
        return ["-"] * 4
    against = kept = ""
    if base and finding is not base:
        gain, error = difference(finding, base)
        against = f"{gain:+.1f}" if error is None else f"{gain:+.1f} ± {error:.1f}"
    changes = finding.changes
    if changes and "curve" in finding.runs[0] and "evaluate.labels" not in changes:
        kept = "yes" if is_kept(changes, preset) else "no"
    return [_score(finding), str(len(finding.runs)), against, kept]


def is_kept(changes: Mapping[str, str], preset: str) -> bool:
    """Whether the first table that makes a set by this preset makes it with these settings."""
    rows = [row for table in TABLES.values() for row in table if row.preset == preset]
    recipe = PRESETS[preset].recipe().replace(dict(rows[0].changes) if rows else {})
    return recipe.replace(dict(changes)) == recipe


def _nested(content: Mapping[str, Any]) -> str:
    findings = _findings(content)
    lengths = list(dict.fromkeys(name.split(": ")[0] for name in findings))
    ipc = content["ipc"]
    kinds = ["alone", f"first of {ipc}, nested", f"first of {ipc}", "random real images"]
    titles = [
        "distilled for this number alone",
        f"first of a nested set of {ipc}",
        f"first of a set of {ipc}",
    ]
    rows = []
    for length in lengths:
        found = [findings.get(f"{length}: {kind}") for kind in kinds]
        counts = {len(finding.runs) for finding in found if finding}
        cells = [_score(finding) if finding else "-" for finding in found]
        rows.append([length, *cells, "/".join(map(str, sorted(counts)))])
    return "\n".join(table([f"images per class, {content['dataset']}", *titles, kinds[-1], "n"], rows))


def _score(finding: Finding) -> str:
    row = finding.row()
    return score(row["mean"], row["std"])
