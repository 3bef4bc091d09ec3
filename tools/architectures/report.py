"""What a search has found: `search.json`, from which the Markdown and the plots are made."""

import dataclasses
import json
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from distilled_data import UsageError
from distilled_data.files import write_file
from hub.card import plain
from ncfm_engine.proxies import FULL, PROXIES
from ncfm_engine.report import plot_agreement, plot_regret
from ncfm_engine.search import EARLY_ENDING, Result
from ncfm_engine.spaces import name_of
from ncfm_engine.trust import BEST, FIRST, trust, trust_by_loss
from tools.listing import write_rows
from tools.markdown import score, table

from .campaign import ACCURACY, OTHERS, RANKINGS, Campaign

RESULTS_FILE, REPORT_FILE = "search.json", "report.md"
SCATTER_FILE, REGRET_FILE = "scatter.png", "regret.png"
TITLES = {
    "distilled": "distilled images",
    "random": "random images",
    "early": "early stopping",
    FULL: "all images",
}
SHOWN = 10  # candidates in the report
MACHINES = "; "  # between those that a truth is of, which was taken from another search
CHOSEN = (
    " These candidates are the best, some in the middle and some at random by the ranking of the distilled "
    "images"
)
CHOSEN_BY_OTHERS = " Other searches in the same storage chose these candidates and trained them"
AND_BY_OTHERS = ", and what other searches in the same storage chose"
SELECTED = ": correlations may not be those among all candidates."
CHOSEN_BEFORE = (
    " These candidates are those that the search `{}` trained in full; its report says how they were chosen."
)
NOT_ALL = (
    " Random images and early stopping have tried only {} of the {} candidates, among which are their picks."
)

TITLE = "## Can the ranking be trusted?"
UNKNOWN = (
    "That cannot be told: in one of the three ways no candidate was scored to the end. More are with "
    "--strategy exhaustive."
)
OPEN = "That cannot be told yet: some candidates are open. Go on with the same command."
PRUNED = (
    " with candidates that they do not prune; only those that none of them pruned are compared, which are "
    "few and good ones."
)
FEW = " There is no correlation to show: too few of them, {}, were scored to the end in all three ways."

STOPPED = "**The search was stopped before its end.** The same command goes on with it."
RANKED = " Ranked by the training loss, the lowest first."
BY_LOSS = (
    "The same by the training loss instead of the accuracy (`--rank-by loss`): the mean of the last quarter "
    "of the steps, the logits of each network scaled as makes it lowest. It does not see what helps on other "
    "images alone, such as dropout."
)

Content = Mapping[str, Any]
AGAIN = "They are tried again when the code of their space has changed, or with another `--storage`."


def summary(head: Content, campaign: Campaign) -> dict[str, Any]:
    """All that is known by now, for JSON. `trust` is {} until there are a truth and scores of each way."""
    results = campaign.results()
    found = _trust(results) if FULL in results else ({}, {})
    scored = [result for found in results.values() for result in found if result]
    machines = sorted({machine for result in scored for machine in result.machine.split(MACHINES)} - {""})
    return dict(head) | {
        "machines": machines,
        "verified": campaign.verified() if FULL in results else {},
        "trust": found[0],
        "trust_by_loss": found[1],
        "candidates": [
            {"architecture": dict(candidate)}
            | {way: _row(found[index], machines) for way, found in results.items()}
            for index, candidate in enumerate(campaign.candidates)
        ],
    }


def write(folder: Path, content: Content) -> None:
    """The JSON file, the Markdown and, where there is a truth to compare with, the plots."""
    head = {name: value for name, value in content.items() if name != "candidates"}
    write_rows(folder / RESULTS_FILE, head, "candidates", content["candidates"])
    write_file(folder / REPORT_FILE, markdown(content).encode())
    found, rows = content["trust"], content["candidates"]
    for name in (SCATTER_FILE, REGRET_FILE):
        (folder / name).unlink(missing_ok=True)
    if found:
        best = max(row[FULL]["value"] for row in rows if _complete(row[FULL]))
        scores = {TITLES[way]: _pairs(rows, way) for way in found}
        picks = {TITLES[way]: _pairs([rows[found[way]["pick"]]], way) for way in found}
        plot_agreement(scores, picks, best, folder / SCATTER_FILE)
    if found and _is_timed(content):
        regrets = {TITLES[way]: way_found["regret_over_time"] for way, way_found in found.items()}
        plot_regret(
            {title: (columns["seconds"], columns["regret"]) for title, columns in regrets.items()},
            folder / REGRET_FILE,
        )


def read(folder: Path) -> Content:
    """What `write` has written into a folder. Raises `UsageError` where there is nothing of the kind."""
    path = folder / RESULTS_FILE
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        _ = found["space"], dict(found["settings"])
        for result in full_trainings(found):
            inside = {axis: value in found["axes"][axis] for axis, value in result.architecture.items()}
            scores = [result.value, *result.accuracies, *result.curve]
            if not (inside.keys() == found["axes"].keys() and all(inside.values())):
                raise ValueError(f"{result.architecture} is not of these axes")
            if not 0 <= statistics.fmean(scores) <= 100:
                raise ValueError(f"the accuracies {scores}")
    except OSError as error:
        raise UsageError(f"{path}, which a search writes, cannot be read: {error.strerror}") from error
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise UsageError(f"{path} is not what a search has found: {error!r}") from error
    return found


def full_trainings(content: Content) -> list[Result]:
    """The truth that a search has found, of the candidates that did not fail."""
    machines, found = content["machines"], []
    for row in content["candidates"]:
        if _complete(row.get(FULL)):
            number = row[FULL].get("machine")
            machine = MACHINES.join(machines) if number is None else machines[number]
            found.append(Result(row["architecture"], **row[FULL] | {"machine": machine}))
    return found


def _pairs(rows: Sequence[Content], way: str) -> tuple[list[float], list[float]]:
    """Score and truth of those of the candidates that have both."""
    both = [row for row in rows if _complete(row[way]) and _complete(row[FULL])]
    return [row[way]["value"] for row in both], [row[FULL]["value"] for row in both]


def _complete(result: Content | None) -> bool:
    return result is not None and result["state"] == "complete"


def _has_failed(row: Content, way: str) -> bool:
    return bool(row.get(way)) and row[way]["state"] == "failed"


def _row(result: Result | None, machines: Sequence[str]) -> dict[str, Any] | None:
    """The fields that say something; the machine by its number, where there are several."""
    if result is None:
        return None
    row = dataclasses.asdict(result)
    del row["architecture"]
    machine = row.pop("machine")
    row["machine"] = machines.index(machine) if len(machines) > 1 and machine in machines else None
    return {name: value for name, value in row.items() if value not in (None, (), [], "")}


def _trust(results: Mapping[str, Sequence[Result | None]]) -> tuple[dict[str, Any], dict[str, Any]]:
    """By accuracy, and by loss."""

    def complete(way: str, field: str) -> list[Any]:
        found = results[way]
        return [getattr(one, field) if one and one.state == "complete" else None for one in found]

    accuracies, losses, seconds = (
        {way: complete(way, field) for way in PROXIES} for field in ("accuracies", "losses", "seconds")
    )
    truth = complete(FULL, "value")
    return trust(accuracies, seconds, truth), trust_by_loss(accuracies, losses, seconds, truth)


def markdown(content: Content) -> str:
    """The report: what was searched, the best, how far that can be trusted, and what failed."""
    rows = content["candidates"]
    complete = [row for row in rows if _complete(row["distilled"])]
    ranked_by = content.get("ranked_by", ACCURACY)
    complete.sort(key=lambda row: -_rank(row["distilled"], ranked_by))
    states = [row["distilled"]["state"] if row["distilled"] else "open" for row in rows]
    counts = ", ".join(
        f"{states.count(s)} {s}" for s in ("complete", "pruned", "failed", "open") if s in states
    )
    lines = [
        f"# Architectures for {plain(content['dataset'])}",
        "",
        f"{len(rows)} candidate{'' if len(rows) == 1 else 's'} of the space `{content['space']}` ({counts}), "
        f"strategy {content['strategy']}. Networks of each: {content['networks']}, trained for "
        f"{content['steps']} steps on {content['set']} ({content['ipc']} per class, {content['labels']} "
        f"labels, content hash `{content['content_hash'][:16]}`). Accuracy in percent on "
        f"{content['tested_on']} images held out of the training set"
        + (", from which the distilled images were made too." if content["seen"] else ".")
        + ("" if ranked_by == ACCURACY else RANKED),
        "",
        *([STOPPED, ""] if content.get("stopped") else []),
        *([f"The {SHOWN} best; the rest is in `{RESULTS_FILE}`.", ""] if len(complete) > SHOWN else []),
        *_best(complete[:SHOWN], FULL in rows[0]),
        *_module(content, complete),
    ]
    if content["trust"]:
        lines += ["", *_trust_table(content), *_by_loss(content)]
    elif any(_complete(row.get(FULL)) for row in rows):
        begun = any(row.get(way) is None for row in rows for way in PROXIES)
        lines += ["", TITLE, "", OPEN if begun else UNKNOWN]
    lines += _failed(rows)
    lines += ["", MACHINES.join([*content["machines"], f"`{content['command']}`"]) + "."]
    return "\n".join(lines) + "\n"


def _failed(rows: Sequence[Content]) -> list[str]:
    """A line for all candidates that failed for the same reason in the same ways."""
    failed: dict[tuple[str, str, str], list[str]] = {}
    for row in rows:
        titles: dict[tuple[str, str], list[str]] = {}
        for way, title in TITLES.items():
            if _has_failed(row, way):
                titles.setdefault((row[way]["reason"], row[way].get("place", "")), []).append(title)
        for why, same in titles.items():
            failed.setdefault((", ".join(same), *why), []).append(name_of(row["architecture"]))
    lines = []
    for (titles_of_all, reason, place), names in failed.items():
        more = f" and {len(names) - 1} more" if len(names) > 1 else ""
        where = f" ({plain(place)})" if place else ""
        lines.append(f"- {names[0]}{more}, {titles_of_all}: {plain(reason)}{where}")
    return ["", "## Failed", "", *lines, "", AGAIN] if lines else []


def _rank(result: Content, by: str) -> float:
    return result["value"] if by == ACCURACY else -statistics.fmean(result["losses"])


def _best(rows: Sequence[Content], verified: bool) -> list[str]:
    if not rows:
        return ["No candidate is complete."]
    losses = all("losses" in row["distilled"] for row in rows)
    titles = [TITLES["distilled"], *["training loss"] * losses, *[TITLES[FULL]] * verified]
    head = [*rows[0]["architecture"], *titles, "seconds"]
    return table(
        head,
        [
            [
                *map(str, row["architecture"].values()),
                _mean(row["distilled"]),
                *([_loss(row["distilled"])] if losses else []),
                *([_mean(row[FULL])] if verified else []),
                f"{row['distilled']['seconds']:.1f}",
            ]
            for row in rows
        ],
    )


def _loss(result: Content) -> str:
    mean = statistics.fmean(result["losses"])
    return f"{mean:.3f}" if mean < 1e9 else "-"  # see `Proxy.score`: it was no number


def _module(content: Content, ranked: Sequence[Content]) -> list[str]:
    """How the one to go on with is made; of a search of an older version nobody knows for which images."""
    if not ranked or "images" not in content:
        return []
    known = [row for row in ranked if _complete(row.get(FULL))]
    best = max(known, key=lambda row: row[FULL]["value"]) if known else ranked[0]
    which = "best of those trained in full" if known else "first of these"
    channels, size, classes = content["images"].values()
    images = f"channels={channels}, size={tuple(size)}, classes={classes}"
    return [
        "",
        f"The {which}, as a new module:",
        "",
        "```python",
        "from ncfm_engine.spaces import load_space",
        "",
        f"architecture = {dict(best['architecture'])!r}",
        f"network = load_space({content['space']!r}).network(architecture, {images}, seed=0)",
        "```",
    ]


def _mean(result: Content | None) -> str:
    if result is None or "accuracies" not in result:
        return "-"
    values = result["accuracies"]
    return score(statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else None)


def _trust_table(content: Content) -> list[str]:
    found, rows, settings = content["trust"], content["candidates"], content["settings"]
    truth = [row[FULL]["value"] for row in rows if _complete(row[FULL])]
    compared = found[PROXIES[0]]["all"]["n"]
    timed = _timed(content)
    of = f", of the {len(timed)} by one machine in all ways" if len(timed) < len(_compared(content)) else ""

    def correlation(group: str, name: str) -> list[str]:
        return [_interval(found[way][group], name) for way in PROXIES]

    correlations = {
        f"Spearman, all {compared}": correlation("all", "spearman"),
        "below distilled images by": ["", *correlation("behind", "spearman")[1:]],
        "Kendall, all": correlation("all", "kendall"),
        **_of_the_best(found, "spearman", "kendall"),
        "Spearman, all, of single networks": [
            ", ".join("-" if value is None else f"{value:z.2f}" for value in found[way]["single"])
            for way in PROXIES
        ],
    }
    lines = (correlations if compared >= 3 else {}) | {
        f"accuracy of the pick (best of those trained in full {max(truth):.1f})": [
            _points(found[way]["pick_accuracy"]) + _tied(found[way]["tied"]) for way in PROXIES
        ],
        **_regrets(found),
        f"seconds for one trained to the end{of}": [
            f"{_seconds(timed, way):.2f}" if timed else "-" for way in PROXIES
        ],
    }
    return [
        TITLE,
        "",
        f"{len(truth)} candidates were trained on all images but those held out, and tested on the test set, "
        f"in {_seconds(rows, FULL):.1f} s each (networks of each: {settings['full_repeats']}, epochs: "
        f"{settings['full_epochs']}). Rank correlation with that, and intervals that hold 95 % of "
        "bootstrap samples of the candidates. All three ways take as many optimiser steps"
        + (PRUNED if content["strategy"] in EARLY_ENDING else ".")
        + _chosen(content["verified"], rows)
        + (CHOSEN_BEFORE.format(other) if (other := content.get("truth_of")) else "")
        + (NOT_ALL.format(tried, len(rows)) if (tried := _tried_by_all(rows)) < len(rows) else "")
        + ("" if compared >= 3 else FEW.format(compared)),
        "",
        *table(["", *(TITLES[way] for way in PROXIES)], [[name, *cells] for name, cells in lines.items()]),
        "",
        f"![score against full accuracy]({SCATTER_FILE})",
        *([f"![regret over time]({REGRET_FILE})"] if _is_timed(content) else []),
    ]


def _by_loss(content: Content) -> list[str]:
    """What the ranking by losses would be worth."""
    found = content.get("trust_by_loss")
    if not found or found[PROXIES[0]]["all"]["n"] < 3:
        return []
    lines = {
        f"Spearman, all {found[PROXIES[0]]['all']['n']}": [
            _interval(found[way]["all"], "spearman") for way in PROXIES
        ],
        "above that by accuracy by": [_interval(found[way]["gain"], "spearman") for way in PROXIES],
        **_of_the_best(found, "spearman"),
        "accuracy of the pick": [_points(found[way]["pick_accuracy"]) for way in PROXIES],
        **_regrets(found),
    }
    return [
        "",
        BY_LOSS,
        "",
        *table(["", *(TITLES[way] for way in PROXIES)], [[name, *cells] for name, cells in lines.items()]),
    ]


def _of_the_best(found: Content, *names: str) -> dict[str, list[str]]:
    """Correlations of the better half and of the best fifth, but for what would stand there twice."""
    counts = {group: found[PROXIES[0]][group]["n"] for group in ("all", *BEST)}
    groups = {count: group for group, count in reversed(counts.items())}  # of equal ones the larger share
    return {
        f"{name.capitalize()}, the {count} best": [_interval(found[way][group], name) for way in PROXIES]
        for count, group in reversed(groups.items())
        if group != "all"
        for name in names
    }


def _regrets(found: Content) -> dict[str, list[str]]:
    """Of the picks, and of the best of those that come first, where more than these are known."""
    rows = {"regret, points": [_points(found[way]["regret"]) for way in PROXIES]}
    if found[PROXIES[0]]["all"]["n"] > FIRST:
        rows[f"regret of the best of the first {FIRST}, points"] = [
            _points(found[way]["regret_of_first"]) for way in PROXIES
        ]
    return rows


def _chosen(verified: Content, rows: Sequence[Content]) -> str:
    """Why it is these that were trained in full, "" if these are all that could be."""
    known = {index for index, row in enumerate(rows) if row[FULL] is not None}
    failed = {index for index, row in enumerate(rows) if _has_failed(row, PROXIES[0])}
    if len(known | failed) == len(rows) or "all" in verified:
        return ""
    if OTHERS in verified:
        return CHOSEN_BY_OTHERS + SELECTED
    chosen = {index for group in verified.values() for index in group}
    picks = ["of the others"] if any(f"best by {way}" in verified for way in PROXIES) else []
    picks += [f"of the ranking by {by}" for by in RANKINGS if f"best by {by}" in verified]
    also = f", and the picks {' and '.join(picks)}" if picks else ""
    return CHOSEN + also + ("" if chosen >= known else AND_BY_OTHERS) + SELECTED


def _tried_by_all(rows: Sequence[Content]) -> int:
    return sum(all(row[way] is not None for way in PROXIES) for row in rows)


def _is_timed(content: Content) -> bool:
    """Whether there is a regret over time: what was pruned took time as well, and machines differ."""
    timed = {id(row) for row in _timed(content)}
    known = [row for row in _compared(content) if _complete(row[FULL])]
    return content["strategy"] not in EARLY_ENDING and all(id(row) in timed for row in known)


def _timed(content: Content) -> list[Content]:
    """Candidates that one machine trained to the end in all three ways, so that seconds can be compared."""
    return [row for row in _compared(content) if len({row[way].get("machine") for way in PROXIES}) == 1]


def _compared(content: Content) -> list[Content]:
    return [row for row in content["candidates"] if all(_complete(row[way]) for way in PROXIES)]


def _seconds(rows: Sequence[Content], way: str) -> float:
    """Mean of the candidates that were trained to the end."""
    return statistics.fmean(row[way]["seconds"] for row in rows if _complete(row[way]))


def _points(value: float | None) -> str:
    return "no full training" if value is None else f"{value:.1f}"


def _tied(count: int) -> str:
    return f" (one of {count} equals)" if count > 1 else ""


def _interval(found: Content, name: str) -> str:
    if found[name] is None:
        return "-"
    if found[name + "_low"] is None:
        return f"{found[name]:z.2f}"
    return f"{found[name]:z.2f} ({found[name + '_low']:z.2f} to {found[name + '_high']:z.2f})"


def comparison(contents: Sequence[Content]) -> str:
    """A table of the searches that know their truth, one line each."""
    contents = [content for content in contents if content["trust"]]
    names = [TITLES[way].removesuffix(" images") for way in PROXIES]
    counts = [{found["trust"]["distilled"][group]["n"] for found in contents} for group in ("all", "half")]
    alike = all(len(count) == 1 for count in counts)
    titles = ["Spearman of {}", "of the {} best"] if alike else ["Spearman", "of the better half"]
    head = ["set, labels, steps" + ("" if alike else ", candidates")]
    for title in (*(t.format(*count) for t, count in zip(titles, counts, strict=True)), "regret, points"):
        head += [f"{title}: {names[0]}", *names[1:]]
    rows = []
    for content in sorted(
        contents, key=lambda content: (content["steps"], content["set"], content["labels"])
    ):
        found = [content["trust"][way] for way in PROXIES]
        what = [content["set"], content["labels"], content["steps"]]
        cells = [", ".join(map(str, what if alike else [*what, found[0]["all"]["n"]]))]
        cells += [_interval(way["all"], "spearman") for way in found]
        best_of = [way["half"]["spearman"] for way in found]
        cells += ["-" if value is None else f"{value:z.2f}" for value in best_of]
        cells += [_points(way["regret"]) for way in found]
        rows.append(cells)
    return "\n".join(table(head, rows)) + "\n"
