"""Making the tables: in pieces, in order of worth, with every figure from a saved artifact."""

import dataclasses
import itertools
import json
import math
import re
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
from artifacts import flip
from commands import ROOT, TINY
from interruptions import full_disk

from distilled_data import CheckpointError, DistilledDataset, OutputError, UsageError
from distilled_data.format import ARTIFACT_FILE
from ncfm_engine import pipeline
from ncfm_engine.config import Recipe
from ncfm_engine.plan import make_plan
from ncfm_engine.presets import PRESETS
from ncfm_engine.report import silent
from ncfm_engine.stop import Stopped, StopRequest
from tools.command_line import lock_of
from tools.reproduction import campaign, readme
from tools.reproduction.findings import Finding, curve, difference, is_kept, markdown, read, write
from tools.reproduction.ranking import augmentation_robust_score, label_robust_score
from tools.reproduction.summary import headline, scores
from tools.reproduction.summary import markdown as table_of
from tools.reproduction.summary import summary as summarise
from tools.reproduction.tables import ARCHITECTURES, FINGERPRINTS, PAPER, TABLES, Row

SMALL = dict(setting.split("=") for setting in [*TINY, "distill.iterations=6", "evaluate.epochs=2"])
ARCHITECTURE = "alexnet"  # the fastest of them on a CPU


def make(
    folder,
    changes=SMALL,
    stages=(campaign.DISTIL, campaign.PLAIN),
    budget=None,
    rows=TABLES["digits"],
    work="work",
    chosen="digits-ipc1",
) -> campaign.Campaign:
    """The set of one digit of each class in `folder`; the same again goes on there."""
    options = {"cache": folder.parent / "cache", "device": "cpu"}
    made = campaign.Campaign(
        rows,
        [chosen],
        folder / work,
        folder / "results" / "digits",
        sources={},
        data=None,
        changes=changes,
        options=options,
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(campaign, "STAGES", stages)
        made.run(StopRequest(budget), silent)
    return made


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("campaign") / "whole"
    make(folder, stages=(campaign.DISTIL, campaign.PLAIN, ARCHITECTURE))
    return folder


@pytest.fixture
def copied(finished, tmp_path):
    """A copy that may be changed."""
    shutil.copytree(finished.parent, tmp_path / "copy")
    return tmp_path / "copy" / "whole"


def summary(folder) -> dict:
    [row] = json.loads((folder / "results" / "digits" / "results.json").read_text())["sets"]
    return row


def untimed(row: dict) -> dict:
    timed = ("seconds", "stages", "command")
    rows = [{k: v for k, v in result.items() if k not in timed} for result in row["rows"]]
    return row | {"rows": rows, "stages": list(row["stages"])}


def test_a_campaign_in_many_pieces_comes_to_what_one_piece_comes_to(tmp_path, monkeypatch):
    make(tmp_path / "whole")
    monkeypatch.setattr("ncfm_engine.stop.time", SimpleNamespace(monotonic=itertools.count().__next__))
    stops = 0
    while stops < 30:  # pieces of as many steps each; 13 are enough
        try:
            make(tmp_path / "parts", budget=9)
            break
        except Stopped:
            stops += 1
    assert 3 < stops < 30
    assert untimed(summary(tmp_path / "parts")) == untimed(summary(tmp_path / "whole"))


def test_real_images_that_are_missing_are_told_before_the_first_set_is_made(here, tmp_path, monkeypatch):
    monkeypatch.setitem(TABLES, "digits", (*TABLES["digits"], Row("photos-ipc1", "tinyimagenet-ipc1")))
    settings = [f"{name}={value}" for name, value in SMALL.items()]
    status, _, error = here("reproduce.py", "digits", "--source", "folder=folder:absent", settings=settings)
    assert (status, "absent" in error) == (2, True)
    assert not (tmp_path / "reproduced" / "digits" / "digits-ipc10").exists()


def test_the_command_says_how_to_go_on_and_shows_the_table_in_the_end(here, tmp_path, monkeypatch):
    monkeypatch.setattr(campaign, "STAGES", (campaign.DISTIL,))
    words = ("reproduce.py", "digits", "--row", "digits-ipc1", "--results", "results")
    settings = [f"{name}={value}" for name, value in SMALL.items()]
    status, output, _ = here(*words, "--time-budget", "0.01s", settings=settings)
    assert status == 75
    assert "go on with the same command" in output
    status, output, _ = here(*words, settings=settings)
    assert status == 0
    assert output.strip() == (tmp_path / "results" / "digits" / "table.md").read_text().strip()


def test_a_set_that_is_large_with_its_mirror_stays_where_it_was_made(copied, monkeypatch):
    kept = copied / "results" / "digits" / "digits-ipc1"
    size = (kept / ARTIFACT_FILE).stat().st_size
    shutil.rmtree(copied / "results")
    monkeypatch.setattr(campaign, "KEPT_BYTES", size + 1)
    make(copied)
    assert (kept / "metrics.jsonl").exists()
    assert not (kept / ARTIFACT_FILE).exists()


def test_results_stay_whole_where_there_is_no_space_for_new_ones(copied):
    kept = copied / "results" / "digits" / "digits-ipc1"
    (copied / "work" / "digits-ipc1.run" / "losses.png").unlink()  # as of a run that found no space for it
    with (copied / "work" / "digits-ipc1" / "README.md").open("a") as card:
        card.write("more words" * 1000)
    before = {path: path.read_bytes() for path in kept.rglob("*") if path.is_file()}
    with full_disk(10_000), pytest.raises(OutputError, match=r"could not write .*README\.md"):
        make(copied)
    assert {path: path.read_bytes() for path in kept.rglob("*") if path.is_file()} == before
    make(copied)
    assert (kept / "README.md").read_text().endswith("more words")


def test_a_row_has_every_figure_and_an_artifact_that_loads(finished):
    folder = finished / "results" / "digits" / "digits-ipc1"
    dataset = DistilledDataset.from_folder(folder)
    dataset.verify()
    assert f"| {ARCHITECTURE} |" in (folder / "README.md").read_text()
    row = summary(finished)
    kinds = {(r["network"], r["labels"], r["protocol"]) for r in row["rows"]}
    assert kinds == {
        ("convnet", "hard", "ncfm"),
        ("convnet", "soft", "ncfm"),
        ("convnet", "hard", "ncfm without augmentation"),
        ("convnet", "soft", "ncfm without augmentation"),
        (ARCHITECTURE, "hard", "ncfm"),
    }
    names = (
        "dataset ipc network protocol labels n last_mean last_std best_mean best_std random_mean random_std "
        "full_mean full_std seconds device versions seed content_hash command"
    )
    for result in row["rows"]:
        assert set(names.split()) <= set(result)
        assert result["content_hash"] == dataset.content_hash
    assert row["bytes"] == (folder / "distilled.safetensors").stat().st_size
    stages = {"pretraining", "distilling", "labelling", "evaluating", f"evaluating, {ARCHITECTURE}"}
    assert stages <= set(row["stages"])
    assert row["lrs"] is not None
    assert row["ars"] is not None
    assert (finished / "results" / "digits" / "curves.png").read_bytes().startswith(b"\x89PNG")
    text = (finished / "results" / "digits" / "table.md").read_text()
    for title in ("hard labels, last", "random real images, soft", "AlexNet", "(LRS)", "(ARS)", "bytes"):
        assert title in text


def test_processes_with_folders_of_their_own_share_one_table(copied):
    results = copied / "results" / "digits"
    one = (results / "table.md").read_text()
    make(copied, stages=(campaign.DISTIL,), work="other", chosen="digits-ipc10")
    sets = json.loads((results / "results.json").read_text())["sets"]
    assert [entry["row"] for entry in sets] == [row.name for row in TABLES["digits"]]
    assert (results / "table.md").read_text() != one
    make(copied, stages=(campaign.DISTIL, campaign.PLAIN, ARCHITECTURE))  # done: it only writes what it knows
    again = json.loads((results / "results.json").read_text())["sets"]
    assert [entry["row"] for entry in again] == [entry["row"] for entry in sets]
    (copied / "work" / "digits-ipc1.run" / campaign.STAGES_FILE).unlink()  # as on other real images
    make(copied, stages=(), work="work")
    left = json.loads((results / "results.json").read_text())["sets"]
    assert [entry["row"] for entry in left] == ["digits-ipc10"]


def test_what_is_done_is_not_done_again(copied, monkeypatch):
    def forbidden(*arguments, **options):
        raise AssertionError("it was all there")

    before = summary(copied)
    for name in ("run", "evaluate_folder"):
        monkeypatch.setattr(campaign, name, forbidden)
    shutil.rmtree(copied / "results")  # as if it had been killed before they were written
    make(copied, stages=(campaign.DISTIL, campaign.PLAIN, ARCHITECTURE))
    assert summary(copied) == before


@pytest.mark.parametrize(
    "changes",
    [
        {"evaluate.at_once": "1", "pretrain.at_once": "1"},
        {"distill.checkpoint_every": "7"},
        {"evaluate.labels": "hard"},
    ],
)
def test_what_changes_no_result_makes_nothing_again(copied, monkeypatch, changes):
    monkeypatch.setattr(campaign, "run", None)
    monkeypatch.setattr(campaign, "evaluate_folder", None)
    make(copied, SMALL | changes, stages=(campaign.DISTIL, campaign.PLAIN, ARCHITECTURE))


def test_other_architectures_are_trained_as_few_at_once_as_was_asked_for(copied, monkeypatch):
    (copied / "work" / "digits-ipc1.run" / campaign.STAGES_FILE).unlink()
    asked = []

    def stopped(*_, changes, **__):
        asked.append(changes["evaluate.at_once"])
        raise Stopped("here")

    monkeypatch.setattr(campaign, "evaluate_folder", stopped)
    with pytest.raises(Stopped, match="here"):
        make(copied, SMALL | {"evaluate.at_once": "1"}, stages=(ARCHITECTURE,))
    assert asked == [1]


def test_a_stage_like_the_first_one_is_left_out(copied, monkeypatch):
    plain = SMALL | {"evaluate.augment": "none", "evaluate.cutmix": "0", "evaluate.epochs": "3"}
    make(copied, plain, stages=(campaign.DISTIL, campaign.PLAIN))
    assert {row["epochs"] for row in summary(copied)["rows"] if row["network"] == "convnet"} == {3}
    rows = [row for row in summary(copied)["rows"] if row["network"] == "convnet"]
    assert all(row["full_mean"] is not None for row in rows)
    monkeypatch.setattr(campaign, "run", None)
    make(copied, plain, stages=(campaign.DISTIL, campaign.PLAIN))


@pytest.mark.parametrize(("labels", "repeats"), [("hard", True), ("hard,soft", True), ("soft", False)])
def test_a_stage_like_the_first_one_is_left_out_where_it_would_say_no_more(tmp_path, labels, repeats):
    made = make(tmp_path, stages=())
    [row] = [row for row in made.rows if row.name == "digits-ipc1"]
    alike = {"network.name": ARCHITECTURE + row.scale, "evaluate.labels": labels, **row.architectures}
    made = dataclasses.replace(made, changes=SMALL | alike)
    assert made._repeats_first(row, ARCHITECTURE, made.plan(row)) == repeats


def test_more_kinds_of_labels_are_made_in_every_stage(tmp_path):
    for labels in ("hard", "hard,soft"):
        make(tmp_path / "work", SMALL | {"evaluate.labels": labels})
    rows = {(row["protocol"], row["labels"]) for row in summary(tmp_path / "work")["rows"]}
    assert rows == {
        (name, kind) for name in ("ncfm", "ncfm without augmentation") for kind in ("hard", "soft")
    }


def test_another_recipe_is_not_taken_for_the_one_that_is_there(copied):
    with pytest.raises(CheckpointError, match=r"distill\.alpha is 0\.5 there and 0\.4 here"):
        make(copied, SMALL | {"distill.alpha": "0.4"})


def test_more_networks_are_another_evaluation(copied):
    before = summary(copied)
    make(copied, SMALL | {"evaluate.repeats": "3"}, stages=(campaign.DISTIL,))
    after = summary(copied)
    assert [row["n"] for row in before["rows"][:2]] == [2, 2]
    assert [row["n"] for row in after["rows"][:2]] == [3, 3]
    assert after["rows"][0]["content_hash"] == before["rows"][0]["content_hash"]


def test_the_table_shows_the_last_evaluation_of_each_kind_and_what_lies_there(copied):
    (before,) = (row for row in summary(copied)["rows"] if row["network"] == ARCHITECTURE)
    rows = tuple(
        dataclasses.replace(row, architectures={"evaluate.repeats": "1", "evaluate.epochs": "3"})
        for row in TABLES["digits"]
    )
    changes = {
        name: value for name, value in SMALL.items() if name not in ("evaluate.repeats", "evaluate.epochs")
    }
    kept = {"evaluate.epochs": SMALL["evaluate.epochs"], "evaluate.repeats": SMALL["evaluate.repeats"]}
    rows = tuple(dataclasses.replace(row, changes=dict(row.changes) | kept) for row in rows)
    make(copied, changes, (campaign.DISTIL, ARCHITECTURE), rows=rows)
    (after,) = (row for row in summary(copied)["rows"] if row["network"] == ARCHITECTURE)
    assert (before["epochs"], after["epochs"], after["n"]) == (2, 3, 1)
    # Another command, which chooses no set, does not change what is said of those that are there.
    there = summary(copied)
    make(copied, SMALL | {"distill.iterations": "999"}, stages=())
    assert summary(copied) == there


def test_results_survive_a_kill_between_the_artifact_and_its_manifest(copied, monkeypatch):
    before = untimed(summary(copied))
    path = copied / "work" / "digits-ipc1" / "manifest.json"
    path.write_text(path.read_text().replace('"size": ', '"size": 1'))
    trained = []
    evaluate = campaign.evaluate_folder
    monkeypatch.setattr(campaign, "evaluate_folder", lambda *a, **o: trained.append(a) or evaluate(*a, **o))
    make(copied, stages=(campaign.DISTIL, campaign.PLAIN, ARCHITECTURE))
    assert not trained
    assert untimed(summary(copied)) == before


def test_sets_of_other_real_images_are_not_taken_for_these(copied, tmp_path):
    made = make(copied, stages=())
    other = dataclasses.replace(made, sources={"digits": "store:" + str(tmp_path)})
    assert made._is_done(made.rows[1], campaign.DISTIL, made.plan(made.rows[1]))
    assert not other._is_done(made.rows[1], campaign.DISTIL, other.plan(made.rows[1]))


def test_a_damaged_artifact_is_made_again_from_its_checkpoint(copied):
    path = copied / "work" / "digits-ipc1" / "distilled.safetensors"
    flip(path)
    make(copied, stages=(campaign.DISTIL,))
    assert (
        DistilledDataset.from_folder(path.parent).content_hash == summary(copied)["rows"][0]["content_hash"]
    )


@pytest.mark.parametrize(
    "name",
    [
        "work/digits-ipc1.run/costs.json",
        "work/digits-ipc1.run/results.json",
        "work/digits-ipc1.run/stages.json",
        "results/digits/results.json",
    ],
)
def test_a_damaged_file_of_results_is_named_and_left_as_it_is_until_it_is_removed(copied, name):
    path = copied / name
    for damaged in (path.read_text()[:-20], "[]\n", "[" * 100_000):
        path.write_text(damaged)
        with pytest.raises(CheckpointError, match=rf"{path.name} is damaged: .* Remove it and run again"):
            make(copied, stages=(campaign.DISTIL,))
        assert path.read_text() == damaged
    path.unlink()  # as it says
    make(copied, stages=(campaign.DISTIL,))
    assert [result["labels"] for result in summary(copied)["rows"][:2]] == ["hard", "soft"]
    assert path.exists()


def test_the_most_telling_rows_come_first():
    names = [row.name for row in TABLES["published"]]
    assert names[:4] == ["cifar10-ipc10", "cifar100-ipc10", "cifar10-ipc50", "cifar100-ipc50"]
    assert set(names[4:]) == {"cifar10-ipc1", "cifar100-ipc1"}
    made = campaign.Campaign(TABLES["published"], names, None, None, {}, None, {})  # type: ignore[arg-type]
    assert [stage for _, stage in made.tasks()][:6] == [campaign.DISTIL] * 6


def test_every_row_is_a_recipe_and_the_published_ones_have_published_figures():
    for table in TABLES.values():
        for row in table:
            recipe = PRESETS[row.preset].recipe().replace(dict(row.changes))
            recipe.replace(dict(row.architectures))
            assert row.name.endswith(f"-ipc{recipe.ipc}")
    assert {row.name for row in TABLES["published"]} == {f"{name}-ipc{ipc}" for name, ipc in PAPER}
    assert ARCHITECTURES == ("resnet18", "vgg11", "alexnet")


@pytest.mark.parametrize(("table", "name"), [("small", "vgg11_x0_25"), ("published", "vgg11")])
def test_other_architectures_are_as_narrow_as_the_table(table, name):
    made = campaign.Campaign(TABLES[table], [], None, None, {}, None, {})  # type: ignore[arg-type]
    for row in TABLES[table]:
        recipe = PRESETS[row.preset].recipe()
        assert recipe.replace(made.evaluation(row, "vgg11")).network.name == name


def test_nobody_else_records_results_in_a_set_while_a_campaign_does(tmp_path, monkeypatch):
    recorded, folders = campaign.record_results, []

    def record(folder, *rest):
        with pytest.raises(UsageError, match="another process is at work on"), lock_of(folder):
            pass
        folders.append(folder)
        recorded(folder, *rest)

    for module in (campaign, pipeline):
        monkeypatch.setattr(module, "record_results", record)
    make(tmp_path)
    assert len(folders) == 2  # the set itself, and its evaluation without augmentation


def test_a_dry_run_counts_and_makes_nothing(here, tmp_path):
    status, output, _ = here("reproduce.py", "digits", "--results", "results", "--dry-run", "--rate", "1e-4")
    assert status == 0
    assert not (tmp_path / "results").exists()
    assert not (tmp_path / "reproduced").exists()
    rows = [[float(cell) for cell in line.split()[1:]] for line in output.splitlines()[1:]]
    assert len(rows) == 3
    for *petaflop, most, all_of_it in rows:
        assert len(petaflop) == 4
        assert petaflop[3] > petaflop[2]  # the other architectures take more than the first one
        assert most == pytest.approx(sum(petaflop[:3]) * 1e7 / 3600, rel=0.02)
        assert all_of_it == pytest.approx(sum(petaflop) * 1e7 / 3600, rel=0.02)
    for column in zip(*rows, strict=True):
        assert column[2] == pytest.approx(column[0] + column[1], rel=0.02)
    status, _, error = here("reproduce.py", "digits", "--dry-run", "--rate", "0")
    assert (status, "--rate must be positive, got 0.0" in error) == (2, True)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ((), "name a table: published, half-hour, small, digits"),
        (("digit",), "digits"),
        (("digits", "--row", "digits-ipc2"), "digits-ipc1"),
        (("digits", "--source", "digits"), "--source digits: expected dataset=place"),
        (("digits", "--source", "digit=folder:x"), "Did you mean 'digits'"),
    ],
)
def test_a_name_that_does_not_exist_is_refused(here, words, message):
    status, _, error = here("reproduce.py", *words)
    assert status == 2
    assert message in " ".join(error.split())


def test_scores_are_those_of_their_definition():
    # a = IOR / 2 - HLR / 2; the normalisation maps -1 to 0 and 1 to 1
    assert label_robust_score(full=1.0, hard=0.0, own=0.0, random=1.0) == pytest.approx(0)
    assert label_robust_score(full=0.0, hard=1.0, own=1.0, random=0.0) == pytest.approx(1)
    middle = (1 - math.exp(-1)) / (math.exp(1) - math.exp(-1))
    assert label_robust_score(full=0.8, hard=0.6, own=0.7, random=0.5) == pytest.approx(middle)
    assert augmentation_robust_score(-1, -1) == pytest.approx(0)
    assert augmentation_robust_score(1, 1) == pytest.approx(1)
    assert augmentation_robust_score(0.2, -0.2) == pytest.approx(middle)


def test_scores_compare_soft_labels_with_random_images_under_the_same():
    def row(labels, last, random, protocol="ncfm", full=None):
        names = {"network": "convnet", "labels": labels, "protocol": protocol}
        return names | {"last_mean": last, "random_mean": random, "full_mean": full}

    rows = [
        row("hard", 60, 30, full=80),
        row("soft", 70, 50),
        row("soft", 40, 30, "ncfm without augmentation"),
    ]
    expected = {"lrs": label_robust_score(0.8, 0.6, 0.7, 0.5), "ars": augmentation_robust_score(0.2, 0.1)}
    found = scores(rows, "convnet")
    assert found == {name: pytest.approx(value, abs=1e-3) for name, value in expected.items()}
    # the labels that a set comes with are soft; hard ones alone tell neither
    assert scores(rows[:1], "convnet") == {"lrs": None, "ars": None}


def test_data_are_the_same_however_their_folder_is_spelt(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    options = {"dataset": "digits", "cache": tmp_path, "device": "cpu"}
    here, there, other = (
        campaign._source(make_plan(**options, reading={"data": Path(data)}))
        for data in ("images", tmp_path / "images", "other")
    )
    assert here == there != other


def test_figures_of_the_paper_stand_beside_sets_of_its_own_images_only(finished):
    info = DistilledDataset.from_folder(finished / "work" / "digits-ipc1").info
    row = summary(finished)
    [cifar] = [key for key, name in FINGERPRINTS.items() if name == "cifar10"]
    for fingerprint, expected in ((info.source["fingerprint"], None), (cifar, PAPER["cifar10", 1])):
        source = dict(info.source) | {"fingerprint": fingerprint}
        made = summarise("x", dataclasses.replace(info, source=source), row["rows"], row["stages"], 1)
        assert made["paper"] == expected


def finding(name: str, values: list[float], changes=None) -> Finding:
    return Finding(
        name, changes or {}, [{"accuracy": value, "seconds": 1.0, "curve": {}} for value in values]
    )


def test_a_difference_has_the_standard_error_of_both_means():
    gain, error = difference(finding("a", [12.0, 14.0, 16.0]), finding("b", [9.0, 10.0, 11.0]))
    assert gain == 4
    assert error == pytest.approx(math.sqrt(4 / 3 + 1 / 3))
    assert difference(finding("a", [12.0]), finding("b", [9.0, 10.0]))[1] is None


def test_findings_are_taken_from_older_versions_and_not_from_elsewhere(tmp_path):
    path, head = tmp_path / "rows.json", {"torch": "2.11", "settings": dataclasses.asdict(Recipe())}
    write(path, head, [finding("a", [12.0, 14.5], {"distill.alpha": "1"})])
    old = json.loads(path.read_text())
    [row] = old["findings"]
    assert {name: value for name, value in row.items() if name != "runs"} == {
        "variant": "a",
        "changes": {"distill.alpha": "1"},
        "n": 2,
        "mean": 13.25,
        "std": 1.77,
        "seconds": 1.0,
    }
    del old["settings"]["distill"]["ema"]  # as if it was new
    path.write_text(json.dumps(old))
    assert read(path, head)["a"].values == [12.0, 14.5]
    with pytest.raises(UsageError, match=r"another study: torch is '2\.11' there and '2\.12' here"):
        read(path, head | {"torch": "2.12"})


def test_points_of_a_curve_have_four_digits():
    losses = {"discrepancy": 0.000123456, "calibration": 0, "amplitude": 123456.0, "phase": 2 / 3}
    assert curve([{"step": 10, **losses, "seconds": 1.0}]) == {
        "step": [10.0],
        "discrepancy": [0.0001235],
        "calibration": [0.0],
        "amplitude": [123500.0],
        "phase": [0.6667],
    }


def test_a_finding_is_kept_if_the_set_of_the_table_is_made_so():
    row = TABLES["small"][0]
    name, value = next(iter(row.changes.items()))
    assert is_kept({name: value}, row.preset)
    assert not is_kept({"distill.alpha": "0.123"}, row.preset)
    assert is_kept({"distill.factor": "1"}, "digits")


def test_a_study_of_several_sizes_is_one_table(tmp_path):
    def written(ipc: int, *rows: Finding) -> Path:
        content = {"study": "claims", "preset": "digits", "dataset": "digits", "ipc": ipc}
        path = tmp_path / f"study-claims-digits-ipc{ipc}.json"
        path.write_text(json.dumps(content | {"findings": [row.row() for row in rows]}))
        return path

    alpha = {"distill.alpha": "1"}
    large, small = (
        written(ipc, finding("the preset", [mean, mean + 2]), finding("alpha 1", [mean + 3, mean + 5], alpha))
        for ipc, mean in ((10, 50.0), (2, 30.0))
    )
    lines = markdown([large, small]).splitlines()
    head = "| {} per class | n | against the preset | kept "
    assert lines[0] == "| change " + head.format(2) + head.format(10) + "|"
    assert lines[2] == "| the preset | 31.0 ± 1.4 | 2 |  |  | 51.0 ± 1.4 | 2 |  |  |"
    assert lines[3] == "| alpha 1 | 34.0 ± 1.4 | 2 | +3.0 ± 1.4 | no | 54.0 ± 1.4 | 2 | +3.0 ± 1.4 | no |"
    alone = written(5, finding("alpha 1", [34.0], alpha))  # of --only
    assert markdown([alone]).splitlines()[2] == "| alpha 1 | 34.0 | 1 |  | no |"
    base = written(5, finding("the preset", [31.0]), finding("alpha 1", [34.0, 35.0], alpha))
    assert markdown([base]).splitlines()[3] == "| alpha 1 | 34.5 ± 0.7 | 2 | +3.5 | no |"


def test_labels_by_the_teacher_have_lines_of_their_own_in_a_table():
    content = json.loads((ROOT / "tools" / "results" / "small" / "results.json").read_text())
    assert "every batch" not in table_of(content)
    first = content["sets"][0]
    first["rows"].append(first["rows"][0] | {"labels": "teacher", "last_mean": 61.0, "random_mean": 51.0})
    lines = table_of(content).splitlines()
    assert any(
        line.startswith("| **its teacher's labels for every batch, last epoch** | 61.0") for line in lines
    )
    assert any(line.startswith("| random real images, its labels for every batch | 51.0") for line in lines)


def test_a_part_of_the_readme_is_the_file_it_names(tmp_path):
    (tmp_path / "table.md").write_text("| new |\n")
    text = "before\n<!-- begin: table.md -->\n| old |\n<!-- end -->\nafter\n"
    assert readme.fill(text, tmp_path) == text.replace("old", "new")
    with pytest.raises(Exception, match=r"part for absent\.md, which does not exist"):
        readme.fill(text.replace("table.md", "absent.md"), tmp_path)


def test_every_page_of_results_is_made_from_the_results_alone(tmp_path):
    results = ROOT / "tools" / "results"
    names = ("headline.md", "table.md", "searches.md", "report.md")
    there = [path for path in results.rglob("*.md") if path.name in names or path.name.startswith("study-")]
    for path in results.rglob("*.json"):
        copy = tmp_path / path.relative_to(ROOT)
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, copy)
    for page in readme.PAGES:
        there.append(ROOT / page)
        text, count = readme.PART.subn(r"<!-- begin: \1 -->\nold\n<!-- end -->", there[-1].read_text())
        assert count
        (tmp_path / page).write_text(text)
    made = {ROOT / path.relative_to(tmp_path): path.read_text() for path in readme.update(tmp_path)}
    assert set(made) == set(there)
    for path, text in made.items():
        assert path.read_text() == text, (
            f"{path.name} is not what its results say: tools/reproduce.py --readme"
        )
    assert readme.update(tmp_path) == []
    (tmp_path / "tools" / "results" / "headline.md").write_text("old")
    assert readme.update(tmp_path) == [tmp_path / "tools" / "results" / "headline.md"]


def test_the_headline_says_what_the_tables_say():
    results = ROOT / "tools" / "results"
    shown = cells((results / "headline.md").read_text())
    of_tables = [cells((results / name / "table.md").read_text()) for name in ("small", "digits")]
    whole = of_tables[0] | of_tables[1]
    assert {column for _, column in shown} == {column for _, column in whole}
    assert len(shown) == 7 * 5
    for place, value in shown.items():
        assert value == whole.get(place, "-")


def test_sets_that_look_alike_are_told_apart_by_their_table_or_row():
    content = json.loads((ROOT / "tools" / "results" / "digits" / "results.json").read_text())
    head = headline({"small": content, "half-hour": content}).splitlines()[0]
    assert head.count("digits, 10 per class (small) | digits, 10 per class (half-hour)") == 1
    first = content["sets"][0]
    head = table_of({"sets": [first | {"row": "a"}, first | {"row": "b"}]}).splitlines()[0]
    assert "digits, 10 per class (a) | digits, 10 per class (b)" in head


def cells(table: str) -> dict[tuple[str, str], str]:
    """What stands in a Markdown table by line and column."""
    head, _, *lines = [line.strip("| ").split(" | ") for line in table.splitlines() if line.startswith("|")]
    return {
        (line[0], column): value for line in lines for column, value in zip(head[1:], line[1:], strict=True)
    }


def test_pages_are_not_made_of_one_table(here):
    status, _, error = here("reproduce.py", "small", "--readme")
    assert (status, "expected no table, got small" in " ".join(error.split())) == (2, True)


@pytest.mark.parametrize("name", readme.PAGES)
def test_a_page_has_no_gaps_and_its_links_lead_somewhere(name):
    page = ROOT / name
    text = page.read_text()
    assert "@@" not in text
    for link, anchor in re.findall(r"\]\((?!https?:)([^)#]*)#?([^)]*)\)", text):
        target = page.parent / link if link else page
        assert target.exists(), link
        if anchor:
            titles = re.findall(r"(?m)^#+ (.*)$", target.read_text())
            assert anchor in [re.sub(r"[^\w -]", "", title).lower().replace(" ", "-") for title in titles]
