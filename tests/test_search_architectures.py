"""The command: search, baselines and truth in one folder; resumed, shared, stopped, with failures."""

import dataclasses
import functools
import importlib
import json
import math
import os
import re
import signal
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import optuna
import pytest
import sqlalchemy
import torch
from artifacts import make_artifact
from children import is_alive, run_tool, start
from commands import ROOT, called, flags
from filelock import FileLock
from optuna.distributions import CategoricalDistribution
from optuna.trial import TrialState, create_trial

from distilled_data import DistilledDataset, OutputError, UsageError
from hub import PushOptions, push_folder
from ncfm_engine import trust
from ncfm_engine.cache import cache_folder
from ncfm_engine.config import EvaluateConfig, Recipe
from ncfm_engine.networks import build_network
from ncfm_engine.proxies import FULL, PROXIES
from ncfm_engine.search import STRATEGIES
from ncfm_engine.spaces import SPACES, Space
from ncfm_engine.train import Training
from tools.architectures import crew
from tools.architectures.campaign import Campaign
from tools.architectures.crew import LEADER
from tools.architectures.report import comparison, full_trainings, markdown, read, summary, write

pytestmark = pytest.mark.usefixtures("databases")
COMMAND = [str(ROOT / "tools" / "search_architectures.py")]
QUICK = ["evaluate.epochs=2", "evaluate.full_epochs=1", "evaluate.full_repeats=1"]
AXES = ("--axis", "width=4,8", "--axis", "depth=1,2", "--axis", "norm=instance,batch")
ONE = ("--axis", "activation=relu", "--axis", "pooling=avg")


HEAD = {"dataset": "d", "space": "s", "strategy": "random", "networks": 1, "steps": 2, "set": "x", "ipc": 1}
HEAD |= {"labels": "hard", "content_hash": "0" * 64, "tested_on": 3, "seen": False}
HEAD |= {"machines": [], "command": "c", "settings": {"full_epochs": 2, "full_repeats": 1}}


@pytest.fixture
def set_folder(finished):
    return str(finished[0] / "out")


def content(folder):
    return json.loads((folder / "search.json").read_text())


def module_of(report, which):
    """What the code in a report makes, of which it says `which` candidate that is."""
    _, found, code = report.partition(f"\n{which}")
    assert found
    exec(code.partition("```python\n")[2].partition("```")[0], names := {})
    return names


def test_a_search_with_its_truth_is_one_command(here, set_folder, tmp_path, monkeypatch):
    monkeypatch.setattr("ncfm_engine.plan.seconds_of", lambda *_: (0, 0.01))  # of 30 images, twice; of 1438
    words = "--labels hard --seeds 2 --verify 1 --output found"
    arguments = (set_folder, *AXES, *ONE, *words.split())
    status, planned, error = here("search_architectures.py", *arguments, "--dry-run", settings=QUICK)
    assert (status, list(tmp_path.iterdir())) == (0, []), error
    status, output, error = here("search_architectures.py", *arguments, "--jobs", "1", settings=QUICK)
    assert status == 0, error
    soft = here("search_architectures.py", set_folder, *AXES, *ONE, "--verify", "1", "--dry-run")[1]
    assert "\nteacher      2 networks, 2 epochs, where the cache lacks them\n" in soft
    assert "teacher" not in here("search_architectures.py", set_folder, *AXES, *ONE, "--dry-run")[1]
    found = content(tmp_path / "found")
    assert len(found["candidates"]) == 8
    assert "time         about 29s on distilled, random, early, 1m 18s in full, one after" in planned
    assert [line for line in planned.splitlines() if not line.startswith("time")] == [
        "candidates   8 of convnet, 2 networks each, on distilled, random, early",
        f"steps        {found['steps']}, 2 epochs of 30 images",
        "strategy     exhaustive",
        "truth        of 6 at most, 1 network each, 1 epoch",
        "writes       found, trials into found/search.db",
    ]
    for row in found["candidates"]:
        for way in ("distilled", "random", "early"):
            assert row[way]["state"] == "complete"
            assert len(row[way]["accuracies"]) == 2
    groups = {"best", "middle", "random", "best by loss", "best by random", "best by early"}
    assert set(found["verified"]) == groups
    verified = {index for group in found["verified"].values() for index in group}
    assert 3 <= len(verified) <= 6  # and the picks of the loss, of random images and of early stopping
    assert {k for k, row in enumerate(found["candidates"]) if row["full"]} == verified
    assert set(found["trust"]) == {"distilled", "random", "early"}
    for way, of_way in found["trust"].items():
        values = {k: found["candidates"][k][way]["value"] for k in verified}
        assert of_way["pick"] == max(values, key=lambda k: values[k])
        truth = {k: found["candidates"][k]["full"]["value"] for k in verified}
        assert of_way["regret"] == pytest.approx(max(truth.values()) - truth[of_way["pick"]])
        assert of_way["all"]["n"] == len(verified)
    assert set(found["trust_by_loss"]) == {"distilled", "random", "early"}
    losses = [sum(row["distilled"]["losses"]) for row in found["candidates"]]
    assert found["trust_by_loss"]["distilled"]["pick"] == losses.index(min(losses))
    assert re.search(r"\| above that by accuracy by( \|[^|]*\d\.\d\d[^|]*){3}\|\n", output)
    assert output.startswith("# Architectures for digits\n\n8 candidates of the space `convnet` (8 complete)")
    assert "from which the distilled images were made too" in output
    settings = found["settings"]
    of_truth = f"(networks of each: {settings['full_repeats']}, epochs: {settings['full_epochs']})"
    assert f" s each {of_truth}. Rank correlation" in output
    assert output == (tmp_path / "found" / "report.md").read_text() + "\n"
    best = max(verified, key=lambda k: found["candidates"][k]["full"]["value"])
    made = module_of(output, "The best of those trained in full")
    assert made["architecture"] == found["candidates"][best]["architecture"]
    assert made["network"](torch.zeros(2, 1, 8, 8)).shape == (2, 10)
    assert str(tmp_path) not in (tmp_path / "found" / "search.json").read_text()
    for name in ("scatter.png", "regret.png"):
        assert (tmp_path / "found" / name).read_bytes().startswith(b"\x89PNG")

    status, output, error = here(
        "search_architectures.py", *arguments, "--rank-by", "loss", "--jobs", "1", settings=QUICK
    )
    assert status == 0, error
    again = content(tmp_path / "found")
    assert again["verified"]["best"] == [losses.index(min(losses))]
    first = output.index("| seconds |\n") + len("| seconds |\n")
    shown = [line.split(" | ")[-2 - 1] for line in output[first:].splitlines()[1:9]]
    assert shown == [f"{loss / 2:.3f}" for loss in sorted(losses)]
    assert [row["distilled"] for row in again["candidates"]] == [
        row["distilled"] for row in found["candidates"]
    ]
    assert "These candidates are the best, some in the middle and some at random by the ranking" in output
    assert "other searches" not in output
    assert "the picks of the others and of the ranking by accuracy: correlations may not be" in output
    of_others = markdown(found | {"verified": {"best": sorted(verified)[:1]}})
    assert "and what other searches in the same storage chose" in of_others
    everything = [
        row | {"full": row["full"] or {"state": "failed", "reason": "?"}} for row in found["candidates"]
    ]
    assert "These candidates are" not in markdown(found | {"candidates": everything}).split("## Failed")[0]
    could_not = {"distilled": {"state": "failed", "reason": "?"}}
    everything = [row if row["full"] else row | could_not for row in found["candidates"]]
    assert "These candidates are" not in markdown(found | {"candidates": everything})

    unread = ("--dataset", "npz:missing.npz")  # the folder is looked at before the images are
    status, _, error = here("search_architectures.py", *arguments, "--seed", "3", *unread, settings=QUICK)
    assert status == 2
    assert "holds the results of another search: seed 0, not 3. Choose another --output" in error

    more = [*QUICK, "evaluate.at_once=1"]  # as an error advises whose candidates need too much memory
    status, _, error = here("search_architectures.py", *arguments, "--jobs", "1", settings=more)
    assert status == 0, error

    before = {name: row["distilled"] for name, row in enumerate(found["candidates"])}
    (tmp_path / "found" / "search.json").unlink()
    status, _, error = here("search_architectures.py", *arguments, "--jobs", "1", settings=QUICK)
    assert status == 0, error  # nothing is trained again
    assert {k: row["distilled"] for k, row in enumerate(content(tmp_path / "found")["candidates"])} == before


@pytest.mark.parametrize(
    ("words", "lines"),
    [
        (
            "",
            [
                "1 network each, on distilled\n",
                "truth        none\n",
                "the other, for the passes through candidates alone\n",
            ],
        ),
        ("--verify all --storage sqlite:///x.db", ["truth        of 8 at most", "trials into --storage\n"]),
        ("--verify 3 --strategy halving", ["truth        of 8 at most", "halving, ending at 1/9 or 3/9\n"]),
        (
            "--verify 3 --strategy halving",
            ["time         at most ", "for the passes through candidates alone\n"],
        ),
    ],
)
def test_what_is_asked_for_is_told_before_anything_is_trained(here, set_folder, tmp_path, words, lines):
    arguments = (set_folder, *AXES, *ONE, *words.split(), "--dry-run")
    status, output, error = here("search_architectures.py", *arguments)
    assert (status, list(tmp_path.iterdir())) == (0, []), error
    assert all(line in output for line in lines), output


def test_a_set_that_does_not_say_what_it_is_of_leaves_the_time_of_the_truth_open(here, finished, tmp_path):
    own = DistilledDataset.from_folder(finished[0] / "out")
    DistilledDataset.from_tensors(own.artifact.images, own.classes).to_folder(tmp_path / "theirs")
    words = "theirs --dataset digits --verify 1 --dry-run"
    status, planned, error = here("search_architectures.py", *words.split(), *AXES, *ONE)
    assert status == 0, error
    assert re.search(
        r"\ntime         about .* on distilled, random, early, an unknown time in full, ", planned
    )


def studies(storage):
    """The ways of the studies in a database."""
    database = optuna.storages.RDBStorage(storage)
    names = [name.split()[0] for name in optuna.get_all_study_names(database)]
    database.engine.dispose()
    return sorted(names)


def test_searches_in_one_storage_share_what_they_have_in_common(here, set_folder, tmp_path):
    few = (set_folder, *AXES, *ONE, "--candidates", "2", "--verify", "all", "--jobs", "1")
    storage = ("--storage", f"sqlite:///{tmp_path / 'common.db'}")
    found = []
    for labels in ("hard", "soft"):
        arguments = (*few, *storage, "--labels", labels, "--output", labels)
        status, _, error = here("search_architectures.py", *arguments, settings=QUICK)
        assert status == 0, error
        found.append(content(tmp_path / labels)["candidates"])
    for hard, soft in zip(*found, strict=True):
        assert hard["full"] == soft["full"]  # to the seconds that it took: it is the same trial
        assert hard["early"] == soft["early"]
    assert studies(storage[1]) == ["distilled", "distilled", "early", "full", "random", "random"]

    every = (set_folder, *AXES, *ONE, "--jobs", "1", "--labels", "hard", *storage, "--output", "every")
    status, output, error = here("search_architectures.py", *every, settings=QUICK)
    assert status == 0, error
    known = content(tmp_path / "every")
    assert len(known["candidates"]) == 8
    assert [row["full"] for row in known["candidates"] if row["full"]] == [row["full"] for row in found[0]]
    assert known["trust"]["distilled"]["all"]["n"] == 2
    assert "Other searches in the same storage chose these candidates" in output


def test_random_images_and_early_stopping_may_score_no_more_than_is_verified(here, set_folder, tmp_path):
    words = ("--labels", "hard", "--verify", "1", "--jobs", "1", "--output", "found")
    every = (set_folder, *AXES, *ONE, *words)
    few = (*every, "--compare", "verified")
    status, planned, error = here("search_architectures.py", *few, "--dry-run", settings=QUICK)
    assert status == 0, error
    assert "8 of convnet, 1 network each, on distilled, and 4 at most on random, early\n" in planned
    assert "of 4 at most" in planned
    status, output, error = here("search_architectures.py", *few, settings=QUICK)
    assert status == 0, error
    found = content(tmp_path / "found")
    assert set(found["verified"]) == {"best", "middle", "random", "best by loss"}
    verified = {index for group in found["verified"].values() for index in group}
    for way, expected in (("distilled", set(range(8))), ("random", verified), ("early", verified)):
        assert {k for k, row in enumerate(found["candidates"]) if row[way]} == expected
    assert {k for k, row in enumerate(found["candidates"]) if row["full"]} == verified
    assert found["trust"]["early"]["all"]["n"] == len(verified)
    assert f"have tried only {len(verified)} of the 8 candidates, among which are their picks" in output
    assert "of the distilled images, and the picks of the ranking by loss: corr" in output

    status, output, error = here("search_architectures.py", *every, settings=QUICK)
    assert status == 0, error
    assert all(row["random"] and row["early"] for row in content(tmp_path / "found")["candidates"])
    assert "have tried only" not in output


def test_a_report_names_the_machines_that_trained_not_the_one_that_wrote_it(
    here, set_folder, tmp_path, monkeypatch
):
    few = (set_folder, *AXES, *ONE, "--candidates", "2", "--jobs", "1", "--labels", "hard", "--output", "x")
    monkeypatch.setattr("platform.machine", lambda: "another")
    status, _, error = here("search_architectures.py", *few, settings=QUICK)
    assert status == 0, error
    monkeypatch.undo()
    status, output, error = here("search_architectures.py", *few, settings=QUICK)
    assert status == 0, error
    [machine] = content(tmp_path / "x")["machines"]
    assert machine.startswith("cpu (another), torch ")
    assert output.rstrip().splitlines()[-1].startswith(f"{machine}; `search_architectures.py")


def test_another_proxy_is_compared_with_the_truth_of_a_search(here, set_folder, tmp_path):
    few = (set_folder, "--jobs", "1", "--labels", "hard")
    first = (*few, *AXES, *ONE, "--verify", "1", "--output", "first")
    status, _, error = here("search_architectures.py", *first, settings=QUICK)
    assert status == 0, error
    longer = ["evaluate.epochs=4"]  # the other settings are those of the truth
    status, output, error = here("search_architectures.py", *few, "--truth-of", "first", settings=longer)
    assert status == 0, error
    [second] = (tmp_path / "searches").iterdir()
    truth = {
        str(r["architecture"]): r["full"] for r in content(tmp_path / "first")["candidates"] if r["full"]
    }
    found = content(second)
    assert {str(row["architecture"]): row["full"] for row in found["candidates"]} == truth
    assert found["trust"]["distilled"]["all"]["n"] == len(truth) < 8
    assert found["steps"] == 2 * content(tmp_path / "first")["steps"]
    assert "These candidates are those that the search `first` trained in full; its report says how" in output
    assert not (second / "search.db").exists()

    (tmp_path / "first" / "search.db").rename(tmp_path / "elsewhere.db")  # search.json is enough
    alone = (*few, "--truth-of", "first", "--output", "alone")
    status, _, error = here("search_architectures.py", *alone, settings=longer)
    assert status == 0, error
    rows = content(tmp_path / "alone")["candidates"]
    assert {str(row["architecture"]): row["full"] for row in rows} == truth
    assert [row["early"]["accuracies"] for row in rows] == [
        row["early"]["accuracies"] for row in found["candidates"]
    ]
    assert not (tmp_path / "first" / "search.db").exists()
    (tmp_path / "elsewhere.db").rename(tmp_path / "first" / "search.db")
    for going_on, place in ((alone, "alone"), (alone[:-2], "first")):
        _, planned, _ = here("search_architectures.py", *going_on, "--dry-run", settings=longer)
        assert planned.endswith(f", trials into {place}/search.db\n")

    def refused(*words, settings=longer):
        status, _, error = here("search_architectures.py", *few, *words, settings=settings)
        return error if status == 2 else status

    assert "no --axis, --candidates, --verify or --compare" in refused("--truth-of", "first", *AXES)
    assert "nowhere/search.json, which a search writes, cannot be" in refused("--truth-of", "nowhere")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "search.json").write_text('{"space": "convnet", "axes": {}, "candidates": []}')
    assert "other/search.json is not what a search has found" in refused("--truth-of", "other")
    other = [*longer, "evaluate.full_epochs=3"]
    assert "was not measured by these settings" in refused("--truth-of", "first", settings=other)
    names = ["distilled", "distilled", "early", "early", "full", "random", "random"]
    assert studies(f"sqlite:///{tmp_path / 'first' / 'search.db'}") == names  # nothing is left there by that
    assert "--seed, images, the code" in refused("--truth-of", "first", "--seed", "1").replace("\n", " ")
    assert "would be replaced" in refused("--truth-of", "first", "--output", "first")
    content_of = content(tmp_path / "first")
    older = {name: value for name, value in content_of.items() if name != "truth"}
    (tmp_path / "first" / "search.json").write_text(json.dumps(older))
    assert refused("--truth-of", "first", "--output", "second") == 0  # by the database beside it
    missing = ("--storage", f"sqlite:///{tmp_path / 'typo.db'}")
    assert "and its --storage" in refused("--truth-of", "first", *missing)
    assert not (tmp_path / "typo.db").exists()
    rows = [row | {"full": None} for row in content_of["candidates"]]
    (tmp_path / "first" / "search.json").write_text(json.dumps(content_of | {"candidates": rows}))
    told = " ".join(refused("--truth-of", "first").split())
    assert "trained nothing in full: it had no --verify, or all failed" in told


def test_the_truth_that_is_published_here_can_be_compared_with(here, tmp_path, monkeypatch):
    results = ROOT / "tools" / "results"
    known = content(results / "search-digits" / "digits-ipc10-hard-25")
    known["candidates"] = [row for row in known["candidates"] if row["architecture"]["width"] == 8][:2]
    monkeypatch.setattr("platform.machine", lambda: "this one")
    machine = f"cpu (this one), torch {torch.__version__}"
    known["machines"] = ["cuda (another)", machine]
    (tmp_path / "known").mkdir()
    (tmp_path / "known" / "search.json").write_text(json.dumps(known))
    words = (
        str(results / "digits" / "digits-ipc1"),
        "--truth-of",
        "known",
        "--labels",
        "hard",
        "--jobs",
        "1",
    )
    options = ("--output", "found", "--set", "evaluate.epochs=2")
    status, _, error = here("search_architectures.py", *words, *options)
    assert status == 0, error
    pairs = zip(content(tmp_path / "found")["candidates"], known["candidates"], strict=True)
    for found, row in pairs:
        assert found["full"] == row["full"] | {"value": pytest.approx(row["full"]["value"])}
    assert content(tmp_path / "found")["machines"] == [machine, "cuda (another)"]  # each of them once


@pytest.mark.parametrize(
    ("part", "changes"),
    [
        ("architecture", {"width": 5}),
        ("architecture", {"width": [8]}),
        ("architecture", {"heads": 2}),
        ("full", {"value": "high"}),
        ("full", {"value": None}),
        ("full", {"value": math.nan}),
        ("full", {"curve": ["high"]}),
        ("full", {"score": 1}),
        ("axes", {"width": 8}),
        ("axes", {"heads": [2]}),
        ("settings", None),
    ],
)
def test_what_was_changed_in_results_by_hand_is_refused_before_anything_is_trained(tmp_path, part, changes):
    known = content(ROOT / "tools" / "results" / "search-digits" / "digits-ipc10-hard-25")
    (tmp_path / "search.json").write_text(json.dumps(known))
    assert read(tmp_path) == known
    place = known if part in known else known["candidates"][0]
    place[part] = place[part] | changes if changes else 3
    (tmp_path / "search.json").write_text(json.dumps(known))
    with pytest.raises(UsageError, match=r"search\.json is not what a search has found: "):
        read(tmp_path)


SPACE = """
import torch
from ncfm_engine.spaces import Space

def net(channels, size, classes, kind):
    if kind == "raises":
        raise ValueError("three heads are too many")
    if kind == "hungry":
        torch.empty(2**50)
    layer = torch.nn.Linear(channels * size[0] * size[1], classes)
    if kind == "diverges":
        torch.nn.init.constant_(layer.weight, 1e38)
    return torch.nn.Sequential(torch.nn.Flatten(), layer)

def space():
    return Space({"kind": ("plain", "raises", "hungry", "diverges")}, net)
"""


def test_what_many_candidates_failed_by_is_said_once():
    failed = {"state": "failed", "reason": "ValueError: no width"}
    rows = [{"architecture": {"width": width}, "distilled": failed} for width in range(2)]
    text = markdown(HEAD | {"trust": {}, "candidates": rows})
    assert "\n## Failed\n\n- width=0 and 1 more, distilled images: ValueError: no width\n\n" in text
    in_all_ways = [row | dict.fromkeys(PROXIES, failed) for row in rows]
    alone = {"architecture": {"width": 2}, "distilled": failed | {"reason": "OSError"}, "random": failed}
    text = markdown(HEAD | {"trust": {}, "candidates": [*in_all_ways, alone]})
    assert text.partition("## Failed\n\n")[2].startswith(
        "- width=0 and 1 more, distilled images, random images, early stopping: ValueError: no width\n"
        "- width=2, distilled images: OSError\n"
        "- width=2, random images: ValueError: no width\n\n"
    )


def test_names_and_reasons_are_text_in_the_report_whatever_is_in_them():
    image = "x\n\n![](https://host/seen.png) <img src=x>"
    rows = [{"architecture": {"a": 1}, "distilled": {"state": "failed", "reason": image}}]
    text = markdown(HEAD | {"dataset": image, "trust": {}, "candidates": rows})
    assert "![](" not in text
    assert "<img" not in text
    assert text.splitlines()[0].startswith("# Architectures for x ")


def test_networks_that_cannot_be_trained_are_in_the_report_with_the_reason(here, set_folder, tmp_path):
    (tmp_path / "unlucky_space.py").write_text(SPACE)
    words = "--space unlucky_space:space --jobs 1"
    arguments = (set_folder, *words.split(), "--verify", "1", "--labels", "hard")
    assert here("search_architectures.py", *arguments, "--dry-run", settings=QUICK)[0] == 0
    status, output, error = here("search_architectures.py", *arguments, settings=QUICK)
    assert status == 0, error
    (folder,) = (tmp_path / "searches").glob("out-*-unlucky_space-space-hard-*")
    rows = {row["architecture"]["kind"]: row for row in content(folder)["candidates"]}
    assert rows["plain"]["full"]["state"] == "complete"
    states = {kind: row["distilled"]["state"] for kind, row in rows.items()}
    assert states == {"plain": "complete", "raises": "failed", "hungry": "failed", "diverges": "failed"}
    line = 1 + SPACE.splitlines().index('        raise ValueError("three heads are too many")')
    where = rf"(unlucky\_space.py, line {line})"
    ways = "distilled images, random images, early stopping"
    assert f"- kind=raises, {ways}: ValueError: three heads are too many {where}\n" in output
    assert f"- kind=diverges, {ways}: DivergenceError: network 0 diverged before step 2\n" in output
    assert "memory" in rows["hungry"]["distilled"]["reason"]
    assert "tried again when the code of their space has changed, or with another `--storage`." in output
    assert "(1 complete, 3 failed)" in output
    assert module_of(output, "The best of those")["network"](torch.zeros(2, 1, 8, 8)).shape == (2, 10)
    assert here("search_architectures.py", *arguments, "--dry-run", settings=QUICK)[0] == 0  # no warning
    (tmp_path / "unlucky_space.py").write_text(SPACE.replace("too many", "too few"))
    with pytest.warns(UserWarning, match="the code of unlucky_space:space has changed since searches"):
        assert here("search_architectures.py", *arguments, "--dry-run", settings=QUICK)[0] == 0
    (tmp_path / "unlucky_space.py").write_text(SPACE)
    few = (*arguments[:5], "--axis", "kind=raises,hungry")
    (tmp_path / "leaving_space.py").write_text(SPACE.replace("raise ValueError", "raise SystemExit"))
    leaving = [word.replace("unlucky", "leaving") for word in few]
    raising = (*leaving[:-1], "kind=raises")
    place = rf"leaving_space\.py, line {line}"
    reason = rf"kind=raises: SystemExit: three heads are too many \({place}\)"
    for these, why in ((few, "kind=.*"), (leaving, "kind=.*"), (raising, reason)):
        status, planned, _ = here("search_architectures.py", *these, "--dry-run", settings=QUICK)
        assert status == 0
        unknown = rf"\ntime         unknown: none of the candidates tried could be trained; {why}\n"
        assert re.search(unknown, planned)
    status, output, error = here("search_architectures.py", *few, settings=QUICK)
    assert (status, "No candidate is complete." in output) == (1, True)
    assert "error: none of 2 candidates could be trained; searches/out-" in " ".join(error.split())


RIVAL = """
import torch
from pathlib import Path
from ncfm_engine.spaces import Space

def net(channels, size, classes, width):
    Path("found/search.json").write_text(Path("theirs").read_text())
    return torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(channels * size[0] * size[1], classes))

def space():
    return Space({"width": (1,)}, net)
"""


@pytest.mark.parametrize(
    ("theirs", "stopped", "status", "words"),
    [
        ('{"settings": {}}', False, 2, "holds the results of another search"),
        ('{"settings": {}}', True, 75, ""),
        ('{"settings"', True, 75, ""),  # damaged
    ],
)
def test_results_that_another_search_put_there_meanwhile_are_not_replaced(
    here, set_folder, tmp_path, theirs, stopped, status, words
):
    (tmp_path / "rival.py").write_text(RIVAL)
    (tmp_path / "theirs").write_text(theirs)
    few = (set_folder, "--space", "rival:space", "--labels", "hard", "--jobs", "1", "--output", "found")
    settings = QUICK
    if stopped:
        few, settings = (*few, "--time-budget", "3s"), [*QUICK, "evaluate.epochs=100000"]
    found, _, error = here("search_architectures.py", *few, settings=settings)
    assert (found, words in " ".join(error.split())) == (status, True), error
    assert (tmp_path / "found" / "search.json").read_text() == theirs


def test_a_search_stops_when_its_time_is_up_and_goes_on(here, set_folder, tmp_path):
    name = "a?%20b" if sqlalchemy.__version__ >= "2.1" else "a %20b"  # before, no URL can have a ? in a name
    arguments = (set_folder, "--axis", "width=4", "--labels", "hard", "--output", name, "--jobs", "1")
    status, output, _ = here("search_architectures.py", *arguments, "--time-budget", "2s", settings=QUICK)
    assert status == 75  # 180 of them take longer, wherever it was stopped
    assert "go on with the same command" in output
    stopped = "\n\n**The search was stopped before its end.** The same command goes on with it.\n\n"
    assert stopped in (tmp_path / name / "report.md").read_text()
    few = (*arguments, "--candidates", "3")
    status, output, error = here("search_architectures.py", *few, settings=QUICK)
    assert status == 0, error
    assert "(3 complete)" in output
    assert stopped not in output
    assert "trusted" not in output  # nothing was verified
    assert (tmp_path / name / "search.db").exists()


def test_a_search_goes_on_in_the_middle_of_a_training(here, set_folder, tmp_path, monkeypatch):
    def run(output, stops_at):
        steps.append(0)
        monkeypatch.setattr(crew.Leash, "requested", property(lambda self: steps[-1] >= stops_at))
        words = f"--axis width=4 --candidates 2 --labels hard --jobs 1 --output {output}".split()
        return here("search_architectures.py", set_folder, *words, settings=["evaluate.epochs=20"])

    def descend(*arguments):
        steps[-1] += 1
        return one(*arguments)

    monkeypatch.setattr("ncfm_engine.train.CHECKPOINT_SECONDS", 0.0)
    steps, one = [], Training._descend
    monkeypatch.setattr(Training, "_descend", descend)
    assert run("whole", math.inf)[0] == 0
    assert run("stopped", 24)[0] == 75
    kept = [path.name.partition(".")[0] for path in (tmp_path / "stopped" / "trainings").iterdir()]
    assert len(set(kept)) == 1  # of the second one
    assert run("stopped", math.inf)[0] == 0
    assert steps == [40, 24, 16]
    whole, stopped = (
        [candidate["distilled"] for candidate in content(tmp_path / name)["candidates"]]
        for name in ("whole", "stopped")
    )
    for key in ("accuracies", "losses"):
        assert [result[key] for result in whole] == [result[key] for result in stopped]
    assert not (tmp_path / "stopped" / "trainings").exists()


@pytest.mark.filterwarnings("ignore:pretrain, waiting")
def test_a_search_that_waits_for_the_teacher_of_another_hears_a_stop(here, set_folder, monkeypatch):
    monkeypatch.setattr("ncfm_engine.pretrain.pool_key", lambda *_: "teacher")
    (locks := cache_folder() / "locks").mkdir(parents=True)
    arguments = (set_folder, *AXES, "--verify", "1", "--output", "found", "--jobs", "1")
    waiting = "pretrain, waiting for another process that does the same"
    with FileLock(locks / "teacher-0-1"):
        status, output, _ = here("search_architectures.py", *arguments, "--time-budget", "1s", settings=QUICK)
    assert (status, f"({waiting})" in output) == (75, True)


def test_the_strategies_that_end_early_say_what_they_ended(here, set_folder, tmp_path):
    words = "--labels hard --strategy halving --candidates 12 --jobs 1"
    arguments = (set_folder, *AXES, *words.split())
    status, output, error = here("search_architectures.py", *arguments, settings=["evaluate.epochs=9"])
    assert status == 0, error
    (folder,) = (tmp_path / "searches").iterdir()
    states = [row["distilled"]["state"] for row in content(folder)["candidates"]]
    assert set(states) == {"complete", "pruned"}
    assert f"12 candidates of the space `convnet` ({states.count('complete')} complete, " in output


def hands(leader):
    children = Path(f"/proc/{leader}/task/{leader}/children").read_text().split()
    return [process for process in map(int, children) if is_alive(process) and is_hand_of(leader, process)]


def is_hand_of(leader, process):
    """Not one of those that prepare the data, or ask git for the revision."""
    try:
        return f"{LEADER}={leader}\0".encode() in Path(f"/proc/{process}/environ").read_bytes()
    except (FileNotFoundError, ProcessLookupError):  # it has ended meanwhile
        return False


def wait_for(condition, what):
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline, what
        time.sleep(0.05)


@pytest.mark.skipif(not os.path.isdir("/proc/self/task"), reason="children are looked up as Linux shows them")
def test_hands_that_are_killed_are_replaced_and_end_with_their_leader(set_folder, tmp_path):
    arguments = [set_folder, "--axis", "width=4", "--labels", "hard", "--jobs", "2", "--seeds", "50"]
    leader = start(
        run_tool,
        [*COMMAND, *arguments, *flags(QUICK)],
        tmp_path,
        output=tmp_path / "said",
        OMP_NUM_THREADS="1",
    )
    try:
        wait_for(lambda: len(hands(leader.pid)) == 2, "two hands")
        first, other = hands(leader.pid)
        assert os.getpgid(first) == first  # so that Ctrl-C comes to the leader alone
        os.kill(first, signal.SIGKILL)
        wait_for(lambda: len(set(hands(leader.pid)) - {first, other}) == 1, "another hand")
        (second,) = set(hands(leader.pid)) - {first, other}
    finally:
        leader.kill()
        leader.join()
    wait_for(lambda: not is_alive(second), "the end of the hand")


@pytest.mark.parametrize(
    ("system", "parent", "stops"), [("posix", 7, False), ("posix", 1, True), ("nt", 8, False)]
)
def test_a_hand_stops_without_its_leader_where_the_system_tells(system, parent, stops, monkeypatch):
    environment = {LEADER: "7"}
    monkeypatch.setattr(crew, "os", SimpleNamespace(name=system, environ=environment, getppid=lambda: parent))
    assert crew.Leash().requested == stops


def test_hands_that_end_at_once_are_not_replaced_for_ever(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["-c", "open('starts', 'a').write('x'); raise SystemExit(1)"])
    monkeypatch.setattr(crew, "REPLACEMENTS", 3)
    threads = torch.get_num_threads()

    try:
        torch.set_num_threads(4)
        with crew.Crew(2) as hands:
            for done in (0, 0, 1, 1, 1, 1, 1):  # all of them are dead each time
                hands.mend("search", done)
                assert torch.get_num_threads() == 2  # they share the cores
                wait_for(lambda: not hands.works(), "the end of the hands")
            assert len(Path("starts").read_text()) == (2 + 2) + 2 * 3
    finally:
        torch.set_num_threads(threads)


def test_hands_are_ended_by_who_leaves_them(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["-c", "import time; time.sleep(30)"])
    with crew.Crew(2) as hands:
        hands.mend("search", 0)
        assert hands.works()
    assert [hand.returncode for hand in hands._hands] == [-signal.SIGTERM] * 2
    for count in (1, 2):  # alone, and as a hand
        with crew.Crew(count) as none:
            none.mend("search", 0)
            assert not none.works()
        monkeypatch.setenv(LEADER, "1")


def test_a_set_of_the_hub_is_searched_by_its_name(set_folder, tmp_path, loopback):
    options = PushOptions(revision="v1", endpoint=loopback.url, token="hf_alice")
    push_folder(set_folder, "org/digits-tiny", options)
    words = [*COMMAND, "org/digits-tiny@v1", *AXES, *ONE, "--candidates", "2", "--jobs", "1", *flags(QUICK)]
    hub = {"HF_ENDPOINT": loopback.url, "HF_TOKEN": "hf_alice", "HF_HOME": str(tmp_path / "hf")}
    done = called([sys.executable, *words], tmp_path, **hub)
    assert done.returncode == 0, done.stderr
    assert "digits-tiny (3 per class, soft labels" in done.stdout
    [folder] = (tmp_path / "searches").glob("digits-tiny-*-convnet-*")
    assert (folder / "search.json").exists()


def test_a_folder_that_is_misspelt_is_told_before_the_hub_is_asked(set_folder, tmp_path, loopback):
    (tmp_path / "sets" / "digits-ipc10").mkdir(parents=True)
    hub = {"HF_ENDPOINT": loopback.url, "HF_HOME": str(tmp_path / "hf"), "PYTHONWARNINGS": "default"}
    done = called([sys.executable, *COMMAND, "sets/digts-ipc10"], tmp_path, **hub)
    first, last = done.stderr.index("note: there is no folder"), done.stderr.index("error: ")
    assert "there is sets/digits-ipc10;" in " ".join(done.stderr[first:last].split())
    assert done.returncode == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--verify", "none"], "'none' is neither a number, 1 or more, nor 'all'"),
        (["--verify", "0"], "'0' is neither a number, 1 or more, nor 'all'"),
        (["--verify", "1", "--set", "evaluate.full_repeats=0"], "--verify needs evaluate.full_repeats of 1"),
        (["--compare", "verified"], "--compare verified needs --verify"),
        (["--axis", "width"], r"--axis width: expected name=value,value"),
        (["--axis", "width=4", "--axis", "width=8"], "--axis is given twice for one name: width=4 width=8"),
        (["--set", "validation=0.2"], "--set validation does not change a search"),
        (["--set", "evaluate.labels=hard"], "--set evaluate.labels does not change a search"),
        (["--seed", "-1"], "--seed must be 0 or more, got -1"),
        (["--jobs", "0"], "argument --jobs: '0' is not a number, 1 or more"),
        (["--candidates", "-1"], "argument --candidates: '-1' is not a number, 1 or more"),
        (["--labels", "both"], "argument --labels: invalid choice: 'both'"),
        (["--space", "grid"], "unknown space 'grid'"),
        (["--seeds", "0"], "EvaluateConfig.repeats must be 1 or more, got 0"),
        (["--storage", "nonsense"], "the storage nonsense cannot be opened"),
    ],
)
def test_wrong_usage_ends_with_2_and_a_reason(here, set_folder, arguments, message):
    status, _, error = here("search_architectures.py", set_folder, *arguments)
    assert status == 2
    assert message in " ".join(error.split())


def test_a_report_of_nothing_yet_can_be_read():
    text = markdown(HEAD | {"trust": {}, "candidates": [{"architecture": {"a": 1}, "distilled": None}]})
    assert "(1 open)" in text
    assert "No candidate is complete." in text
    assert "too." not in text


def test_a_report_says_why_nothing_is_said_of_trust_and_what_was_pruned():
    done = {"state": "complete", "value": 50.0, "accuracies": [50.0], "seconds": 1.0}
    pruned = {"state": "pruned"}
    ways = {"distilled": done, "random": pruned, "early": done, "full": done}
    text = markdown(HEAD | {"trust": {}, "candidates": [{"architecture": {"a": 1}} | ways]})
    assert "## Can the ranking be trusted?\n\nThat cannot be told: in one of the three" in text
    truths = [done | {"value": value, "accuracies": [value]} for value in (1.0, 2.0, 3.0)]
    ways = ("distilled", "random", "early")
    rows = [{"architecture": {"a": 1}} | dict.fromkeys((*ways, "full"), truth) for truth in truths]
    values, column = [truth["value"] for truth in truths], [truth["accuracies"] for truth in truths]
    found = trust.trust(dict.fromkeys(ways, column), dict.fromkeys(ways, [1.0] * 3), values)
    content = HEAD | {"trust": found, "candidates": rows, "verified": {}, "strategy": "halving"}
    assert "| Spearman, all 3 | 1.00 | 1.00 | 1.00 |" in markdown(content)
    assert "Kendall, the best" not in markdown(content)  # all three are
    assert "steps with candidates that they do not prune" in markdown(content)
    assert "regret.png" not in markdown(content)
    assert "optimiser steps.\n" in markdown(
        content | {"strategy": "exhaustive"}
    )  # all are known: none chosen
    assert "regret.png" in markdown(content | {"strategy": "exhaustive"})
    tied = {way: of_way | {"tied": 2} for way, of_way in found.items()}
    assert "| 3.0 (one of 2 equals) |" in markdown(content | {"trust": tied})


def test_a_report_says_by_what_the_candidates_are_ranked_and_what_the_losses_would_be_worth():
    ways, losses, values = ("distilled", "random", "early"), [[0.5], [1.5], [1.0]], [30.0, 10.0, 20.0]
    done = {"state": "complete", "value": 50.0, "accuracies": [50.0], "seconds": 1.0}
    rows = [
        {"architecture": {"a": a}}
        | dict.fromkeys(ways, done | {"losses": losses[a]})
        | {"full": done | {"value": values[a], "accuracies": [values[a]]}}
        for a in range(3)
    ]
    columns = [dict.fromkeys(ways, column) for column in ([done["accuracies"]] * 3, losses, [1.0] * 3)]
    found = {"trust": trust.trust(columns[0], columns[2], values)}
    found |= {"trust_by_loss": trust.trust_by_loss(*columns, values)}
    content = HEAD | found | {"candidates": rows, "verified": {}}

    def shown(text):
        return [line.split(" | ")[0] for line in text.split("##")[0].splitlines() if line.startswith("| ")][
            1:
        ]

    text = markdown(content)
    assert shown(text) == ["| 0", "| 1", "| 2"]
    assert "Ranked by" not in text
    assert text.partition("such as dropout.\n\n")[2].splitlines()[2:6] == [
        "| Spearman, all 3 | 1.00 | 1.00 | 1.00 |",
        "| above that by accuracy by | - | - | - |",
        "| accuracy of the pick | 30.0 | 30.0 | 30.0 |",
        "| regret, points | 0.0 | 0.0 | 0.0 |",
    ]
    text = markdown(content | {"ranked_by": "loss"})
    assert shown(text) == ["| 0", "| 2", "| 1"]
    assert "training set. Ranked by the training loss, the lowest first.\n" in text
    assert "| 2 | 50.0 | 1.000 | 20.0 | 1.0 |\n" in text
    rows[2]["distilled"] = done | {"losses": [torch.finfo(torch.float32).max]}
    assert "| 2 | 50.0 | - | 20.0 | 1.0 |\n" in markdown(content | {"ranked_by": "loss"})


def test_values_of_an_axis_keep_their_place_in_the_table():
    done = {"state": "complete", "value": 5.0, "accuracies": [5.0], "seconds": 1.0}
    cell = {"op": "|conv_3x3~0|+|none~0|\n", "width": 4}
    text = markdown(HEAD | {"trust": {}, "candidates": [{"architecture": cell, "distilled": done}]})
    assert r"| \|conv_3x3~0\|+\|none~0\| | 4 | 5.0 | 1.0 |" in text.splitlines()


def test_a_report_tells_all_that_was_found_of_every_way():
    def correlation(n, spearman, kendall):
        values = {"spearman": spearman, "kendall": kendall}
        bounds = {f"{name}_low": value - 0.1 for name, value in values.items()}
        return {"n": n} | values | bounds | {f"{name}_high": value + 0.1 for name, value in values.items()}

    def of(base):
        return {
            "all": correlation(6, base, base + 0.01),
            "half": correlation(5, base + 0.02, base + 0.03),
            "top": correlation(4, base + 0.06, base + 0.07),
            "single": [base + 0.04, None],
            "behind": correlation(6, base + 0.05, 0.0),
            "pick": 0,
            "pick_accuracy": 100 * base,
            "tied": 1,
            "regret": 50 * base,
            "regret_of_first": 10 * base,
            "regret_over_time": {"seconds": [1.0], "regret": [0.0]},
        }

    seconds = {"distilled": 1.0, "random": 2.0, "early": 3.0, "full": 4.5}
    done = {"state": "complete", "accuracies": [50.0]}
    rows = [
        {"architecture": {"a": a}}
        | {way: done | {"value": 90.0 + a, "seconds": s} for way, s in seconds.items()}
        for a in range(6)
    ]
    found = {"distilled": of(0.5), "random": of(0.3), "early": of(0.4)}
    content = HEAD | {"trust": found, "candidates": rows, "verified": {}, "strategy": "exhaustive"}
    text = markdown(content)
    assert "6 candidates were trained on all images but those held out" in text
    assert " in 4.5 s each (networks of each: 1, epochs: 2). Rank correlation" in text
    table = text.partition("trusted?")[2]
    assert [line for line in table.splitlines() if line.startswith("|")] == [
        "|  | distilled images | random images | early stopping |",
        "|---|---|---|---|",
        "| Spearman, all 6 | 0.50 (0.40 to 0.60) | 0.30 (0.20 to 0.40) | 0.40 (0.30 to 0.50) |",
        "| below distilled images by |  | 0.35 (0.25 to 0.45) | 0.45 (0.35 to 0.55) |",
        "| Kendall, all | 0.51 (0.41 to 0.61) | 0.31 (0.21 to 0.41) | 0.41 (0.31 to 0.51) |",
        "| Spearman, the 5 best | 0.52 (0.42 to 0.62) | 0.32 (0.22 to 0.42) | 0.42 (0.32 to 0.52) |",
        "| Kendall, the 5 best | 0.53 (0.43 to 0.63) | 0.33 (0.23 to 0.43) | 0.43 (0.33 to 0.53) |",
        "| Spearman, the 4 best | 0.56 (0.46 to 0.66) | 0.36 (0.26 to 0.46) | 0.46 (0.36 to 0.56) |",
        "| Kendall, the 4 best | 0.57 (0.47 to 0.67) | 0.37 (0.27 to 0.47) | 0.47 (0.37 to 0.57) |",
        "| Spearman, all, of single networks | 0.54, - | 0.34, - | 0.44, - |",
        "| accuracy of the pick (best of those trained in full 95.0) | 50.0 | 30.0 | 40.0 |",
        "| regret, points | 25.0 | 15.0 | 20.0 |",
        "| regret of the best of the first 5, points | 5.0 | 3.0 | 4.0 |",
        "| seconds for one trained to the end | 1.00 | 2.00 | 3.00 |",
    ]
    assert "![score against full accuracy](scatter.png)\n![regret over time](regret.png)" in table
    for index, row in enumerate(rows):  # of two machines
        for way in PROXIES:
            row[way] |= {"machine": 1 if way == "distilled" and index else 0, "seconds": 3.0 + index}
    lines = markdown(content).splitlines()
    last = next(line for line in lines if line.startswith("| seconds"))
    assert last.endswith(" to the end, of the 1 by one machine in all ways | 3.00 | 3.00 | 3.00 |")
    assert "![regret over time](regret.png)" not in lines
    rows[0]["distilled"]["machine"] = 1
    last = next(line for line in markdown(content).splitlines() if line.startswith("| seconds"))
    assert last.endswith(", of the 0 by one machine in all ways | - | - | - |")
    for count, shown in ((4, "0.52"), (6, None)):  # of equally many candidates once
        for way in found.values():
            way["half"]["n"], way["top"]["n"] = count, count
        lines = [line for line in markdown(content).splitlines() if line.startswith("| Spearman, the ")]
        assert [line.split(" (")[0] for line in lines] == [f"| Spearman, the 4 best | {shown}"] * bool(shown)


def test_plots_show_scores_with_their_truth_the_picks_and_the_regret_over_time(tmp_path, monkeypatch):
    drawn = {}
    for name in ("plot_agreement", "plot_regret"):
        monkeypatch.setattr(
            f"tools.architectures.report.{name}", lambda *given, n=name: drawn.update({n: given})
        )
    scored = {"distilled": (1.0, 3.0, 2.0), "random": (6.0, 5.0, 4.0), "early": (7.0, 8.0, 9.0)}
    truth = (20.0, 30.0, None)
    done = {"state": "complete", "seconds": 1.0}
    rows = [
        {"architecture": {"a": a}}
        | {way: done | {"value": values[a], "accuracies": [values[a]]} for way, values in scored.items()}
        | {"full": None if truth[a] is None else done | {"value": truth[a], "accuracies": [truth[a]]}}
        for a in range(3)
    ]
    columns = {way: [[value] for value in values] for way, values in scored.items()}
    found = trust.trust(columns, dict.fromkeys(scored, [2.0] * 3), truth)
    write(tmp_path, HEAD | {"trust": found, "candidates": rows, "verified": {}})
    titles = ("distilled images", "random images", "early stopping")
    scores = [([1.0, 3.0], [20.0, 30.0]), ([6.0, 5.0], [20.0, 30.0]), ([7.0, 8.0], [20.0, 30.0])]
    picks = [([3.0], [30.0]), ([6.0], [20.0]), ([], [])]  # what early stopping picks has no truth
    pairs = (dict(zip(titles, of_each, strict=True)) for of_each in (scores, picks))
    assert drawn["plot_agreement"] == (*pairs, 30.0, tmp_path / "scatter.png")
    (regrets, path) = drawn["plot_regret"]
    assert path == tmp_path / "regret.png"
    assert [(title, seconds, regret[-1]) for title, (seconds, regret) in regrets.items()] == [
        *zip(titles, [[2.0, 4.0]] * 3, [0.0, 10.0, 0.0], strict=True)
    ]
    drawn.clear()
    write(tmp_path, HEAD | {"trust": found, "candidates": rows, "verified": {}, "strategy": "halving"})
    assert list(drawn) == ["plot_agreement"]  # what was pruned took time as well
    drawn.clear()
    rows[0]["random"] |= {"machine": 1}
    write(tmp_path, HEAD | {"trust": found, "candidates": rows, "verified": {}})
    assert list(drawn) == ["plot_agreement"]  # seconds of different machines


def test_a_report_has_no_rows_of_correlations_that_are_of_too_few_candidates():
    ways, truths = ("distilled", "random", "early"), [1.0, 2.0, 3.0, 4.0, 5.0]
    scored = {way: [None if a == place else [a] for a in truths] for place, way in enumerate(ways, start=1)}
    done = [{"state": "complete", "value": a, "accuracies": [a], "seconds": 1.0} for a in truths]
    rows = [{"architecture": {"a": a}} | dict.fromkeys((*ways, "full"), of) for a, of in enumerate(done)]
    found = trust.trust(scored, dict.fromkeys(ways, [1.0] * 5), truths)
    text = markdown(HEAD | {"trust": found, "candidates": rows, "verified": {}, "strategy": "halving"})
    assert "no correlation to show: too few of them, 2, were scored to the end in all three ways" in text
    assert "Spearman" not in text
    assert "| regret, points | 0.0 | 0.0 | 0.0 |" in text


def test_the_benchmark_has_every_contender_in_every_round(here, set_folder, tmp_path):
    arguments = (set_folder, "--axis", "width=4", "--axis", "depth=1", "--candidates", "2", "--networks", "2")
    arguments = (*arguments, "--epochs", "1", "--jobs", "2", "--rounds", "1", "--output", "rates.json")
    status, output, error = here("benchmark_search.py", *arguments)
    assert status == 0, error
    rows = json.loads((tmp_path / "rates.json").read_text())["rows"]
    names = ["one at a time", "2 stacked", "2 processes", "2 processes, 2 stacked"]
    assert [row["contender"] for row in rows] == names
    for row in rows:
        assert len(row["seconds"]) == 1
        rate = 60 * 2 * 2 / row["seconds"][0]
        assert row["networks_per_minute"] == pytest.approx(rate, rel=0.02)
    assert "| one at a time | " in output
    assert output.count("|\n") == 6


def test_searches_are_compared_in_one_table():
    def search(name, labels, steps, values):
        trust = {
            way: {
                "all": {
                    "n": 72,
                    "spearman": value,
                    "spearman_low": value - 0.1,
                    "spearman_high": value + 0.1,
                },
                "half": {"n": 36, "spearman": None, "spearman_low": None, "spearman_high": None},
                "regret": 2 * value,
            }
            for way, value in values.items()
        }
        full = {"state": "complete", "seconds": 20.0, "value": 50.0}
        rows = [{way: {"state": "complete", "seconds": 2.0} for way in values} | {"full": full}]
        return {"set": name, "labels": labels, "steps": steps, "trust": trust, "candidates": rows}

    values = {"distilled": 0.5, "random": 0.25, "early": 0.75}
    table = comparison([search("b", "hard", 100, values), search("a", "soft", 25, values)])
    head, _, *lines = table.splitlines()
    assert head.startswith("| set, labels, steps | Spearman of 72: distilled | random | early stopping | ")
    assert lines[0].startswith(
        "| a, soft, 25 | 0.50 (0.40 to 0.60) | 0.25 (0.15 to 0.35) | 0.75 (0.65 to 0.85) | -"
    )
    assert lines[1].startswith("| b, hard, 100 |")
    assert lines[0].endswith("| 1.0 | 0.5 | 1.5 |")
    unverified = search("c", "hard", 25, values) | {"trust": {}}
    assert comparison([search("b", "hard", 100, values), unverified]).count("\n") == 3
    of_60 = search("b", "hard", 100, values)
    of_60["trust"]["distilled"]["all"]["n"] = 60
    head, _, *lines = comparison([search("b", "hard", 100, values), of_60]).splitlines()
    assert head.startswith("| set, labels, steps, candidates | Spearman: distilled | random |")
    assert [line.partition(" | ")[0] for line in lines] == ["| b, hard, 100, 72", "| b, hard, 100, 60"]


def test_searches_that_ask_for_other_things_have_folders_of_their_own(here, set_folder, tmp_path):
    few = (set_folder, *AXES, *ONE, "--jobs", "1")
    for words in (("--candidates", "1"), ("--candidates", "1", "--seeds", "2"), ("--candidates", "2")):
        status, _, error = here("search_architectures.py", *few, *words, settings=QUICK)
        assert status == 0, error
    found = [content(folder) for folder in (tmp_path / "searches").iterdir()]
    assert sorted((len(f["candidates"]), f["networks"]) for f in found) == [(1, 1), (1, 2), (2, 1)]


def test_spaces_of_the_same_axes_share_a_study_only_if_they_build_the_same():
    def study(space):
        ways = {"distilled": SimpleNamespace(identity={})}
        return Campaign(space, [], ways, "never opened")._name("distilled")

    grid, axes = SPACES["convnet"], {"width": (1, 2)}
    assert study(Space(axes, grid.build)) == study(Space(axes, grid.build, "mine:grid"))
    others = [functools.partial(build_network, name) for name in ("vgg11", "alexnet")]
    assert len({study(Space(axes, build)) for build in (grid.build, *others)}) == 3
    assert study(Space(axes, others[0], "mine:one")) != study(Space(axes, others[0], "mine:other"))


FEW = Space({"a": tuple(range(7))}, SPACES["convnet"].build)


def search_of_few(tmp_path, **options):
    ways = {way: SimpleNamespace(identity={"way": way}) for way in (*PROXIES, FULL)}
    return Campaign(FEW, list(FEW), ways, f"sqlite:///{tmp_path / 'search.db'}", **options)


def record(campaign, way, a, value, state="COMPLETE", kept=True, machine=""):
    """What a process found of the candidate `a`."""
    scored = {"accuracies": [value], "losses": [abs((value or 0) - 44)] * kept, "seconds": 1.0}
    scored["machine"] = machine
    notes = {"scored": scored} if state == "COMPLETE" else {"reason": "?"}
    choice = {"a": CategoricalDistribution(FEW.axes["a"])}
    options = {"params": {"a": a}, "distributions": choice, "user_attrs": notes}
    campaign._studies[way].add_trial(create_trial(state=TrialState[state], value=value, **options))


def test_what_an_older_version_scored_is_not_ranked_by_its_loss(tmp_path):
    for a, kept in ((0, True), (1, False), (2, True)):
        record(search_of_few(tmp_path), "random", a, 50.0, kept=kept)
    search_of_few(tmp_path).check_ranking()
    with pytest.raises(UsageError, match=r"an older version scored 1 candidates.*another --storage"):
        search_of_few(tmp_path, ranked_by="loss").check_ranking()


def test_what_is_verified_is_what_each_way_would_pick_of_those_that_it_could_train(tmp_path):
    scores = {  # of the candidates 0 to 6
        "distilled": (50.0, None, 20.0, 60.0, 10.0, 40.0, 30.0),
        "random": (1.0, 2.0, 9.0, 3.0, 4.0, 5.0, 6.0),
        "early": (1.0, 9.0, 2.0, 3.0, 4.0, 5.0, 6.0),
    }
    campaign = search_of_few(tmp_path, verify=1)
    for way, values in scores.items():
        for a, value in enumerate(values):
            record(campaign, way, a, value, "FAIL" if value is None else "COMPLETE")
    groups = campaign.verified()
    drawn = groups.pop("random")
    # 3, 0, 5, 6, 2, 4 by the distilled images: one of the two in the middle is 5.
    # Losses are the distances from 44: 5, 0, 6, 3, 2, 4.
    picks = {"best by loss": [5], "best by random": [2], "best by early": [1]}
    assert groups == {"best": [3], "middle": [5]} | picks
    assert len(drawn) == 1
    assert not {1, 3, 5} & set(drawn)
    groups = search_of_few(tmp_path, verify=1, ranked_by="loss").verified()
    assert {name: groups[name] for name in groups if name != "random"} == {
        "best": [5],
        "middle": [6],
        "best by accuracy": [3],
        "best by random": [2],
        "best by early": [1],
    }

    assert list(search_of_few(tmp_path).results()) == ["distilled"]  # it asks for no truth, and there is none
    assert list(campaign.results()) == [*PROXIES, FULL]

    chosen = sorted({1, 2, 3, 5, *drawn})
    for a in chosen:
        assert not campaign.knows_truth()
        record(campaign, FULL, a, 70.0 + a)
    assert not campaign.knows_truth()  # of all seven
    assert [a for a, result in enumerate(campaign.results()[FULL]) if result] == chosen
    quick = search_of_few(tmp_path)  # now it finds that of the other one
    assert quick.verified() == {"by other searches": chosen}
    assert quick.results() == campaign.results()
    found = summary(HEAD, quick)
    assert found["trust"]["early"]["regret"] == 70.0 + max(chosen) - 71.0
    write(tmp_path, found)
    assert "equals" not in (tmp_path / "report.md").read_text()


def test_the_machine_of_each_training_is_known_where_there_are_several(tmp_path):
    campaign = search_of_few(tmp_path, verify=1)
    for way in (*PROXIES, FULL):
        for a in range(7):
            record(campaign, way, a, 50.0 + a, machine="b" if way == FULL and a % 2 else "a")
    write(tmp_path, summary(HEAD | {"axes": FEW.axes}, campaign))
    found = read(tmp_path)
    assert found["machines"] == ["a", "b"]
    assert {row["random"]["machine"] for row in found["candidates"]} == {0}
    assert [result.machine for result in full_trainings(found)] == ["a", "b", "a", "b", "a", "b", "a"]
    assert "to the end | 1.00 |" in markdown(found)
    found["candidates"][0][FULL]["machine"] = 2
    (tmp_path / "search.json").write_text(json.dumps(found))
    with pytest.raises(UsageError, match=r"search\.json is not what a search has found: IndexError"):
        read(tmp_path)


def test_what_was_pruned_is_not_verified(tmp_path):
    campaign = search_of_few(tmp_path, verify=1, strategy="halving")
    for way in PROXIES:
        record(campaign, way, 0, 90.0, "PRUNED")
        record(campaign, way, 1, 50.0)
        record(campaign, way, 2, 60.0)
    groups = campaign.verified()
    assert [groups[name] for name in ("best", "best by random", "best by early")] == [[2]] * 3
    assert {index for group in groups.values() for index in group} == {1, 2}


def test_scores_are_shared_by_strategies_that_end_nothing_early_and_the_truth_by_all(tmp_path):
    names = {}
    for strategy in STRATEGIES:
        campaign = search_of_few(tmp_path, strategy=strategy)
        names[strategy] = [campaign._name(way) for way in (*PROXIES, FULL)]
    assert names["random"] == names["exhaustive"]
    for place in range(3):
        assert len({of_strategy[place] for of_strategy in names.values()}) == 3
    assert len({of_strategy[3] for of_strategy in names.values()}) == 1
    chosen = search_of_few(tmp_path, strategy="halving", verify=1, compare="verified")
    assert chosen._name("distilled") == names["halving"][0]
    assert [chosen._name(way) for way in (*PROXIES[1:], FULL)] == names["exhaustive"][1:]  # too few to prune


@pytest.fixture(scope="module")
def tool():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT / "tools"))
        yield importlib.import_module("search_architectures")


def test_a_search_without_flags_is_of_all_candidates_and_a_random_one_of_100(tool):
    def candidates(*words):
        return tool.choice(tool.parser().parse_args(["x", *words]), {})[1]

    assert len(candidates()) == 720
    drawn = candidates("--strategy", "random")
    assert len(drawn) == 100
    assert candidates("--strategy", "random", "--candidates", "7") == drawn[:7]
    assert candidates("--candidates", "7") == drawn[:7]
    assert candidates("--candidates", "7", "--seed", "1") != drawn[:7]


def test_the_candidates_of_a_truth_are_those_that_were_trained_in_full_and_no_others(tool, tmp_path):
    every, failed = SPACES["convnet"].draw(3), {"state": "failed", "reason": "ValueError: no"}
    rows = [
        {"architecture": one, "full": found}
        for one, found in zip(every, [None, failed, {"value": 1, "state": "complete"}], strict=True)
    ]
    axes = {name: list(values) for name, values in SPACES["convnet"].axes.items()}
    known = {"space": "convnet", "axes": axes, "machines": [], "candidates": rows}

    def chosen(*words):
        return tool.choice(tool.parser().parse_args(["x", "--truth-of", str(tmp_path), *words]), known)[1]

    assert chosen() == every[2:]
    rows[2]["full"] = failed
    with pytest.raises(UsageError, match="trained nothing in full: it had no --verify, or all failed"):
        chosen()
    rows[2]["full"] = {"value": 1, "state": "complete"}
    refused = ("--axis width=4", "--candidates 1", "--verify 1", "--compare verified", "--space resnet")
    for words in refused:
        with pytest.raises(UsageError, match="that --space, and no --axis, --candidates, --verify or --comp"):
            chosen(*words.split())


def test_candidates_are_trained_as_the_recipe_says_but_for_300_epochs_at_most(tool):
    def training(epochs, *words):
        recipe = Recipe().replace({"evaluate.epochs": epochs, "evaluate.cutmix": 0.25})
        settings = {"settings": dataclasses.asdict(recipe)}
        dataset = DistilledDataset(make_artifact(recipe=settings))
        return tool.training_of(tool.parser().parse_args(["x", *words]), dataset, {})

    assert training(2000) == EvaluateConfig(epochs=300, cutmix=0.25, repeats=1)
    assert training(20).epochs == 20
    assert training(20, "--set", "evaluate.epochs=500", "--seeds", "3").epochs == 500
    assert training(20, "--seeds", "3").repeats == 3


def test_a_set_has_the_name_of_its_folder_or_repository(tool, tmp_path, monkeypatch):
    for name in ("x", "x@v1"):
        (tmp_path / name).mkdir()
    monkeypatch.chdir(tmp_path / "x")
    places = (".", "../x/", "org/x@v1", "../x@v1")
    assert [tool.name_of(place) for place in places] == ["x", "x", "x", "x@v1"]


SEARCHES = [
    ("--ipc", "1"),
    ("--labels", "hard"),
    ("--axis", "width=8"),
    ("--space", "resnet"),
    ("--strategy", "random"),
    ("--strategy", "halving"),
    ("--seed", "1"),
    ("--seeds", "2"),
    ("--set", "evaluate.epochs=7"),
    ("--set", "evaluate.learning_rate=0.1"),
]


def test_another_search_has_another_folder_and_does_not_replace_the_results_of_this_one(tool, tmp_path):
    def asked(*words, logits=True):
        arguments = tool.parser().parse_args(["sets/x", *words])
        dataset = DistilledDataset(make_artifact(logits=logits)).select(ipc=arguments.ipc)
        space, _ = tool.choice(arguments, {})
        what = tool.what_is_asked(arguments, dataset, space, tool.training_of(arguments, dataset, {}))
        return what, tool.folder_name(arguments, dataset)

    whole, name = asked()
    assert (whole["labels"], asked("--labels", "hard")[0]["labels"]) == ("soft", "hard")
    without = DistilledDataset(make_artifact(logits=False))
    assert tool.labels_of(tool.parser().parse_args(["x"]), without) == "hard"
    assert (whole.get("factor"), asked(logits=False)[0]["factor"]) == (None, 2)
    assert name == f"x-{whole['content_hash'][:6]}-convnet"
    (tmp_path / "search.json").write_text(json.dumps(whole))
    for words in ((), ("--verify", "3"), ("--candidates", "5"), ("--jobs", "3")):  # more of the same
        tool.check_folder(tmp_path, asked(*words)[0])
    names = {name, asked("--candidates", "5")[1]}
    truth = "--set", "evaluate.full_epochs=1"
    tool.check_folder(tmp_path, asked(*truth)[0])
    (tmp_path / "search.json").write_text(json.dumps(whole | {"verified": {"best": [0]}}))
    with pytest.raises(UsageError, match="full_epochs 40, not 1"):
        tool.check_folder(tmp_path, asked(*truth)[0])
    packed = whole | {"factor": 2}
    for other, its_name in [(packed, name), *(asked(*words) for words in SEARCHES)]:
        names.add(its_name)
        with pytest.raises(UsageError, match="holds the results of another search"):
            tool.check_folder(tmp_path, other)
    assert len(names) == len(SEARCHES) + 2
    assert asked(*AXES[:2], *AXES[2:4])[1] == asked(*AXES[2:4], *AXES[:2])[1]


@pytest.mark.parametrize("text", ['{"name": "mine"}', '{"settings": 3}'])
def test_a_file_of_something_else_is_not_replaced_by_results(tool, tmp_path, text):
    (tmp_path / "search.json").write_text(text)
    with pytest.raises(UsageError, match=r"search\.json is not what a search has found\. Choose another"):
        tool.check_folder(tmp_path, {})


def test_results_that_cannot_be_read_are_not_replaced(tool, tmp_path):
    (tmp_path / "search.json").mkdir()
    with pytest.raises(OutputError, match=r"search\.json cannot be read: Is a directory"):
        tool.check_folder(tmp_path, {})


def test_a_report_shows_the_ten_best_of_those_that_were_scored_to_the_end(tmp_path):
    def result(*accuracies):
        mean = sum(accuracies) / len(accuracies)
        return {"state": "complete", "value": mean, "accuracies": [*accuracies], "seconds": 1.26}

    rows = [{"architecture": {"a": a}, "distilled": result(a, a + 2.0), "full": None} for a in range(12)]
    rows[3]["full"] = result(90.0)
    rows.append({"architecture": {"a": 12}, "distilled": {"state": "pruned", "value": 99.0}, "full": None})
    for name in ("scatter.png", "regret.png"):
        (tmp_path / name).write_text("of an earlier report")
    write(tmp_path, HEAD | {"trust": {}, "verified": {}, "candidates": rows})
    lines = (tmp_path / "report.md").read_text().splitlines()
    assert [line for line in lines if line.startswith("|")] == [
        "| a | distilled images | all images | seconds |",
        "|---|---|---|---|",
        *(f"| {a} | {a + 1:.1f} ± 1.4 | {'90.0' if a == 3 else '-'} | 1.3 |" for a in range(11, 1, -1)),
    ]
    assert "The 10 best; the rest is in `search.json`." in lines
    assert "```python" not in lines  # it is not known for which images
    images = {"channels": 3, "size": [32, 32], "classes": 10}
    known = markdown(HEAD | {"trust": {}, "candidates": rows, "images": images})
    assert "The best of those trained in full, as a new module:" in known
    assert "architecture = {'a': 3}\nnetwork = load_space('s').network(architecture, channels=3, " in known
    rows[3]["full"] = None
    unknown = markdown(HEAD | {"trust": {}, "candidates": rows, "images": images})
    assert "The first of these, as a new module:" in unknown
    assert "architecture = {'a': 11}\n" in unknown
    rows[3]["full"] = result(90.0)
    assert "10 best" not in markdown(content(tmp_path) | {"candidates": rows[:10]})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["report.md", "search.json"]
    assert content(tmp_path) == HEAD | {"trust": {}, "verified": {}, "candidates": rows}
