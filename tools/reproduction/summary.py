"""What is known of the sets of a table: one JSON file, from which the Markdown is made."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from distilled_data import Metadata
from ncfm_engine.config import Recipe, differences
from ncfm_engine.networks import QUARTER
from ncfm_engine.presets import PRESETS
from tools.markdown import score, table

from .ranking import augmentation_robust_score, label_robust_score
from .tables import FINGERPRINTS, PAPER, PAPER_ARCHITECTURES, REPORTED

TITLES = {"resnet18": "ResNet-18", "vgg11": "VGG-11", "alexnet": "AlexNet"}
NO_AUGMENTATION = "ncfm without augmentation"
HEADLINE = (
    "the paper",
    "**hard labels, last epoch**",
    "random real images, hard labels",
    "**soft labels, last epoch**",
    "random real images, soft labels",
    "all real images",
    "bytes of the file, labels and metadata included",
)


def summary(
    name: str, info: Metadata, rows: Sequence[dict[str, Any]], costs: Mapping[str, Any], size: int
) -> dict[str, Any]:
    """One set: what was published for it, and what its artifact says and was measured.

    `rows` are those that belong to the table, `size` is the artifact's in bytes.
    """
    recipe, preset = Recipe.from_dict(info.recipe["settings"]), info.recipe["preset"]
    dataset = FINGERPRINTS.get(info.source["fingerprint"], info.dataset)  # whatever the folder was called
    key = dataset, info.ipc
    return {
        "row": name,
        "preset": preset,
        "dataset": dataset,
        "ipc": info.ipc,
        "network": f"{recipe.network.name} of width {recipe.network.width} and depth {recipe.network.depth}",
        "changes": differences(PRESETS[preset].recipe(), recipe),
        "iterations": recipe.distill.iterations,
        "paper": PAPER.get(key),
        "paper_architectures": PAPER_ARCHITECTURES.get(key, {}),
        "reported": REPORTED.get(key),
        **scores(rows, recipe.network.name),
        "bytes": size,
        "stages": dict(costs),
        "rows": list(rows),
    }


def scores(rows: Sequence[Mapping[str, Any]], network: str) -> dict[str, float | None]:
    """LRS and ARS of DD-Ranking, as far as what they need was measured."""

    def found(labels: str, protocol: str = "ncfm") -> Mapping[str, Any] | None:
        return next(
            (r for r in rows if (r["network"], r["labels"], r["protocol"]) == (network, labels, protocol)),
            None,
        )

    hard, own = found("hard"), found("soft")  # which every set of ours comes with
    plain = found("soft", NO_AUGMENTATION)
    lrs = ars = None
    if hard and own and hard["full_mean"] is not None:
        fractions = (hard["full_mean"], hard["last_mean"], own["last_mean"], own["random_mean"])
        lrs = round(label_robust_score(*(value / 100 for value in fractions)), 3)
    if own and plain:
        gains = [(row["last_mean"] - row["random_mean"]) / 100 for row in (own, plain)]
        ars = round(augmentation_robust_score(*gains), 3)
    return {"lrs": lrs, "ars": ars}


def markdown(content: Mapping[str, Any]) -> str:
    """A table with a column for each set, and below it where and how each was measured."""
    return _table(content["sets"], _cells()) + "\n" + "".join(map(_provenance, content["sets"]))


def headline(tables: Mapping[str, Mapping[str, Any]]) -> str:
    """One table of the sets of several, which have names, with the lines that tell most."""
    sets = [of | {"table": name} for name, content in tables.items() for of in content["sets"]]
    sets.sort(key=lambda of: (of["dataset"], -of["ipc"]))
    return _table(sets, {title: cell for title, cell in _cells().items() if title in HEADLINE})


Cell = Callable[[Mapping[str, Any]], str]


def _table(sets: Sequence[Mapping[str, Any]], cells: Mapping[str, Cell]) -> str:
    titles = [f"{s['dataset']}, {s['ipc']} per class" for s in sets]
    columns = [
        f"{title} ({s.get('table', s['row'])})" if titles.count(title) > 1 else title
        for title, s in zip(titles, sets, strict=True)
    ]
    rows = {title: [cell(s) for s in sets] for title, cell in cells.items()}
    shown = [[title, *(value or "-" for value in row)] for title, row in rows.items() if any(row)]
    return "\n".join(table(["accuracy in percent", *columns], shown)) + "\n"


def _cells() -> dict[str, Cell]:
    """What stands in each line of the table, by its title."""
    cells: dict[str, Cell] = {
        "the paper": lambda s: _number(s["paper"]),
        "the reference, as its users report it": lambda s: s["reported"] or "",
        "**hard labels, last epoch**": _of("last", "hard"),
        "hard labels, best of ten looks at the test set": _of("best", "hard"),
        "random real images, hard labels": _of("random", "hard"),
        "**soft labels, last epoch**": _of("last", "soft"),
        "soft labels, best of ten looks at the test set": _of("best", "soft"),
        "random real images, soft labels": _of("random", "soft"),
        "**its teacher's labels for every batch, last epoch**": _of("last", "teacher"),
        "random real images, its labels for every batch": _of("random", "teacher"),
        "all real images": _of("full", "hard"),
        "without augmentation, hard labels": _of("last", "hard", protocol=NO_AUGMENTATION),
        "random real images likewise": _of("random", "hard", protocol=NO_AUGMENTATION),
    }
    for name, title in TITLES.items():
        cells[f"{title}, the paper"] = lambda s, name=name: _number(s["paper_architectures"].get(name))
        for scale, width in (("", ""), (QUARTER, ", a quarter as wide")):
            of = {"network": name + scale}
            cells[f"{title}{width}, hard labels, last epoch"] = _of("last", "hard", **of)
            cells[f"{title}{width}, random real images"] = _of("random", "hard", **of)
    return cells | {
        "label robust score (LRS)": lambda s: "" if s["lrs"] is None else f"{s['lrs']:.3f}",
        "augmentation robust score (ARS)": lambda s: "" if s["ars"] is None else f"{s['ars']:.3f}",
        "bytes of the file, labels and metadata included": lambda s: f"{s['bytes']:,}",
        "steps": lambda s: f"{s['iterations']:,}",
        "minutes: pretraining (0: the networks were there), distilling, evaluating": _minutes,
        "peak memory, MiB": lambda s: _peak(s, "peak_memory_mib"),
        "peak memory of the GPU, MiB": lambda s: _peak(s, "peak_gpu_mib"),
    }


def _of(kind: str, labels: str, protocol: str = "ncfm", network: str | None = None) -> Cell:
    def cell(of: Mapping[str, Any]) -> str:
        wanted = network or of["network"].split()[0], labels, protocol
        for row in of["rows"]:
            if (row["network"], row["labels"], row["protocol"]) == wanted:
                return _score(row, kind)
        return ""

    return cell


def _score(row: Mapping[str, Any], kind: str) -> str:
    return score(row[f"{kind}_mean"], row[f"{kind}_std"], missing="")


def _minutes(of: Mapping[str, Any]) -> str:
    stages = {name: cost["seconds"] for name, cost in of["stages"].items()}
    evaluating = sum(seconds for name, seconds in stages.items() if name.startswith("evaluating"))
    return ", ".join(f"{s / 60:.1f}" for s in (stages["pretraining"], stages["distilling"], evaluating))


def _peak(of: Mapping[str, Any], name: str) -> str:
    values = [cost[name] for cost in of["stages"].values() if cost[name] is not None]
    return f"{max(values):,}" if values else ""


def _provenance(of: Mapping[str, Any]) -> str:
    row = of["rows"][0]
    versions = ", ".join(f"{name} {version}" for name, version in row["versions"].items())
    trained = dict.fromkeys(
        f"{r['network']} {r['n']} x {r['epochs']} epochs"
        + (f", {r['full_n']} on all images" if r["full_n"] else "")
        + (", without augmentation" if r["protocol"] == NO_AUGMENTATION else "")
        for r in of["rows"]
    )
    changes = f" with {', '.join(of['changes'])}" if of["changes"] else ""
    return (
        f"- `{of['row']}`: {of['network']}, preset `{of['preset']}`{changes}. Networks trained: "
        f"{'; '.join(trained)}. {row['device']}, {versions}; seed {row['seed']}; content hash "
        f"`{row['content_hash'][:16]}`; `{row['command']}`.\n"
    )


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.1f}"
