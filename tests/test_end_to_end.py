"""The commands as a user types them, in processes of their own, on the real digits at small size."""

import dataclasses
import errno
import itertools
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import threading
import warnings
from argparse import ArgumentParser, ArgumentTypeError
from pathlib import Path, PureWindowsPath
from types import SimpleNamespace

import pytest
import torch
from artifacts import make_artifact, make_folder
from commands import ROOT, TINY, called
from interruptions import full_disk
from PIL import Image

from distilled_data import DistilledDataset, DivergenceError, UsageError
from distilled_data.files import check_new, write_file
from distilled_data.format import ARTIFACT_FILE, FOLDER_FILES, MANIFEST_FILE, read_artifact, write_artifact
from distilled_data.manifest import Fingerprint, Index, verify_folder, write_manifest
from hub import PushOptions, push_folder
from ncfm_engine import pipeline
from ncfm_engine.config import EvaluateConfig, Recipe, flatten
from ncfm_engine.evaluate import settings_hash
from ncfm_engine.origin import real_images, recipe_of
from ncfm_engine.pipeline import (
    _kept,
    _recorded,
    describe_set,
    evaluate_folder,
    evaluate_set,
    record_results,
    write_results,
)
from ncfm_engine.presets import PRESETS
from ncfm_engine.pretrain import pretrain
from ncfm_engine.proxies import proxies, splits
from ncfm_engine.report import OwnWarning
from ncfm_engine.stop import Stopped
from tools.command_line import (
    add_push_flags,
    add_source_flags,
    command_parser,
    duration,
    is_repository,
    json_file,
    lock_of,
    notes,
    paragraph,
    push_command,
    reading,
    run_command,
    size,
    table,
)
from tools.command_line import settings as settings_of


def test_the_main_job_writes_the_whole_folder_and_a_table(finished):
    folder, said = finished
    assert sorted(
        str(p.relative_to(folder / "out")) for p in (folder / "out").rglob("*") if p.is_file()
    ) == sorted(FOLDER_FILES)
    assert {p.name for p in (folder / "out.run").iterdir()} == {
        "checkpoint.previous.safetensors",
        "checkpoint.safetensors",
        "costs.json",
        "losses.png",
        "metrics.jsonl",
        "results.json",
    }
    assert "distilled" in said
    assert "random images" in said


def test_the_artifact_loads_verifies_and_names_its_recipe(finished):
    dataset = DistilledDataset.from_folder(finished[0] / "out")
    dataset.verify()
    assert len(dataset) == 30 * dataset.info.factor**2
    assert [row["labels"] for row in dataset.info.results] == ["hard", "soft"]


def test_the_artifact_says_what_it_was_made_of_and_how(finished, digits):
    info = DistilledDataset.from_folder(finished[0] / "out").info
    assert (info.dataset, info.ipc, info.factor) == ("digits", 3, 1)
    assert (info.channels, info.height, info.width) == (1, 8, 8)
    assert info.classes == tuple("0123456789")
    images = digits.train.images[:].double() / 255
    assert (*info.mean, *info.std) == pytest.approx((images.mean().item(), images.std().item()), abs=1e-3)
    origin = {"id": "uci:optdigits", "revision": "doi:10.24432/C50P49", "license": "CC-BY-4.0"}
    made_of = {**origin, "citation": digits.origin.citation, "fingerprint": digits.fingerprint}
    assert info.source == {**made_of, "images": 1438}
    assert (info.recipe["preset"], info.recipe["seed"], info.recipe["iterations"]) == ("digits", 0, 30)
    settings = info.recipe["settings"]
    assert info.recipe["augment"] == settings["evaluate"]["augment"]
    for word in TINY:
        (section, name), value = word.split("=")[0].split("."), int(word.split("=")[1])
        assert settings[section][name] == value
    assert {"device", "versions"} <= set(info.recipe)


def test_a_plot_that_cannot_be_written_does_not_end_a_run(here, tmp_path, finished):
    shutil.copytree(finished[0] / "cache", tmp_path / "cache")
    (tmp_path / "out.run" / "losses.png").mkdir(parents=True)
    with pytest.warns(UserWarning, match=r"could not write .*losses\.png .*This run goes on without it\."):
        code, _, _ = here(
            "distill_and_push.py", "--dataset", "digits", "--ipc", "3", "--output", "out", settings=TINY
        )
    assert code == 0
    ours, theirs = (folder / "out" / MANIFEST_FILE for folder in (tmp_path, finished[0]))
    assert ours.read_bytes() == theirs.read_bytes()


def test_a_network_trains_on_the_artifact_in_a_plain_loop(finished):
    dataset = DistilledDataset.from_folder(finished[0] / "out", labels="hard")
    network = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 10))
    optimiser = torch.optim.Adam(network.parameters(), 0.03)
    losses = []
    for _ in range(20):
        for images, targets in dataset.loader(batch_size=16):
            loss = torch.nn.functional.cross_entropy(network(images), targets)
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            losses.append(loss.item())
    assert losses[-1] < losses[0] / 2


def test_the_table_says_what_was_not_tested_on_the_test_set(finished):
    rows = json.loads((finished[0] / "out.run" / "results.json").read_text())["rows"]
    assert "tested on" not in table(rows)
    assert len(set(map(len, table(rows).splitlines()))) == 1  # columns stand below each other
    assert table([rows[0] | {"split": "validation 0.1"}, *rows]).endswith(
        "\ntested on validation 0.1 of the training images"
    )


def test_sizes_and_times_are_read_as_people_write_them():
    sizes = {"2GiB": 2 * 1024**3, "1.5 KiB": 1536, "3MiB": 3 * 1024**2, "500MB": 500_000_000}
    sizes |= {"2GB": 2_000_000_000, "7KB": 7000, "64": 64, "64B": 64}
    assert {text: size(text) for text in sizes} == sizes
    times = {"90": 90, "90s": 90, "10m": 600, "1.5h": 5400}
    assert {text: duration(text) for text in times} == times
    for text in ("", "-1s", "10 minutes", "s", "1e3", "2GiB"):
        with pytest.raises(ArgumentTypeError, match="is not a quantity like 10m; units: s, m, h"):
            duration(text)


def test_results_are_written_to_a_json_file(tmp_path):
    (tmp_path / "folder.json").mkdir()
    assert json_file("somewhere/rows.json") == Path("somewhere/rows.json")
    for text in (".", "rows.png", "rows", str(tmp_path / "folder.json")):
        with pytest.raises(ArgumentTypeError, match=re.escape(f"{text!r} is not the name of a JSON")):
            json_file(text)
    with pytest.raises(ArgumentTypeError, match="' cannot be written: File name too long"):
        json_file("a" * 300 + ".json")
    assert not is_repository("a" * 300)
    assert is_repository("org/" + "a" * 300)


@pytest.mark.parametrize(
    ("error", "status", "words"),
    [
        (UsageError("one\ntwo"), 2, "error: one two\n"),
        (UsageError("\x1b]0;title\x07 \x9b2J é"), 2, "error: \\x1b]0;title\\x07 \\x9b2J é\n"),
        (DivergenceError("too fast"), 1, "error: too fast\n"),
        (ValueError("odd"), 1, "error: ValueError: odd. Run with --debug for the traceback.\n"),
        (
            OSError(errno.EROFS, "Read-only file system", "a/b"),
            2,
            "error: could not read or write a/b: Read-only file system. Check the folder and run again.\n",
        ),
        (
            ConnectionResetError(errno.ECONNRESET, "reset by peer"),
            1,
            f"error: ConnectionResetError: [Errno {errno.ECONNRESET}] reset by peer. "
            "Run with --debug for the traceback.\n",
        ),
        (KeyboardInterrupt(), "\ninterrupted", ""),  # Python shows it, and ends with 1
    ],
)
def test_a_command_ends_with_the_status_of_its_error(monkeypatch, capsys, error, status, words):
    def main(_):
        raise error

    for flags in ([], ["--debug"]):
        monkeypatch.setattr(sys, "argv", ["tool", *flags])
        with pytest.raises((SystemExit, type(error))) as end:
            run_command(main, ArgumentParser())
        if flags and isinstance(error, Exception):
            assert end.value is error
        else:
            assert (end.value.code, capsys.readouterr().err) == (status, words)


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no device that is always full")
@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_a_log_on_a_full_disk_changes_no_exit_code(tmp_path, unbuffered):
    program = f"""
import argparse, os, sys
sys.path.insert(0, {str(ROOT / "tools")!r})
from command_line import run_command
from distilled_data import DivergenceError, UsageError
from ncfm_engine.stop import Stopped

def main(_):
    if ending:
        raise ending
    print("done")

for ending in (Stopped("step 4"), UsageError("wrong"), DivergenceError("too fast"), None):
    for errors in ("errors", "/dev/full"):
        if not os.fork():  # each of them is a command that has imported all this
            os.dup2(os.open("/dev/full", os.O_WRONLY), 1)
            os.dup2(os.open(errors, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), 2)
            run_command(main, argparse.ArgumentParser())
            sys.exit()
        code = os.waitstatus_to_exitcode(os.wait()[1])
        print(code, " ".join(open("errors").read().split()), flush=True)
"""
    done = called([sys.executable, "-c", program], tmp_path, PYTHONUNBUFFERED=unbuffered)
    assert done.returncode == 0, done.stderr
    told = [line.split(" ", 1) for line in done.stdout.splitlines()]
    words = [
        "",
        "error: wrong",
        "error: too fast",
        "error: could not read or write a file, or what is printed: No space left on device. ",
    ]
    assert [code for code, _ in told] == [str(code) for code in (75, 75, 2, 2, 1, 1, 2, 2)]
    assert all(said.startswith(start) for (_, said), start in zip(told[::2], words, strict=True))


def test_an_output_that_cannot_be_written_is_told_with_what_goes_on(monkeypatch, tmp_path, capsys):
    (tmp_path / "file").touch()
    monkeypatch.setattr(sys, "argv", ["tool"])
    occupied, told = tmp_path / "file", []
    for function in (lambda _: write_file(occupied / "a", b"x"), lambda _: check_new(occupied)):
        parser = ArgumentParser()
        parser.add_argument("--resume", action="store_true")
        with pytest.raises(SystemExit):
            run_command(function, parser)
        told.append(" ".join(capsys.readouterr().err.split()))
    assert told[0].endswith("run again. What was saved before is kept: --resume goes on with it.")
    assert told[1].endswith("is not an empty folder; choose another one")


def test_help_is_as_wide_as_the_terminal_but_for_commands(monkeypatch):
    monkeypatch.setenv("COLUMNS", "60")
    commands = [f"  python tools/{name}.py {'--flag ' * 20}end" for name in ("a", "b")]
    lines = command_parser("\n\n".join(["word " * 40, "\n".join(commands), "more " * 40])).format_help()
    wide = [line for line in lines.splitlines() if len(line) > 60]
    assert wide == commands


# A command up to its first import of torch, which would load this OpenMP; importing all of it takes seconds.
UNTIL_TORCH = """
import ctypes, runpy, sys

class UntilTorch:
    def find_spec(name, *_):
        if name == "torch":
            ctypes.CDLL(openmp)
            sys.exit()

_, openmp, *sys.argv = sys.argv
sys.meta_path.insert(0, UntilTorch)
sys.path.insert(0, sys.argv[0].rpartition("/")[0])
runpy.run_path(sys.argv[0], run_name="__main__")
"""
OPENMP = [str(path) for path in (Path(torch.__file__).parent / "lib").glob("libgomp*")]


@pytest.mark.skipif(sys.platform != "linux", reason="torch has another OpenMP elsewhere")
@pytest.mark.parametrize(
    ("tool", "asked", "count", "whole"),
    [
        ("evaluate", {}, "1000", True),
        ("ablate", {}, "1000", False),
        ("evaluate", {"GOMP_SPINCOUNT": "7"}, "7", False),
        ("ablate", {"OMP_WAIT_POLICY": "active"}, "30000000000", False),
    ],
)
def test_threads_that_wait_soon_leave_their_core_to_others(tool, asked, count, whole):
    until_torch = [] if whole or not OPENMP else ["-c", UNTIL_TORCH, OPENMP[0]]
    words = [sys.executable, *until_torch, str(ROOT / "tools" / f"{tool}.py"), "--help"]
    variables = {name: value for name, value in os.environ.items() if name != "GOMP_SPINCOUNT"}
    variables |= asked | {"OMP_DISPLAY_ENV": "verbose"}
    told = subprocess.run(words, env=variables, capture_output=True, text=True, timeout=120).stderr
    assert f"GOMP_SPINCOUNT = '{count}'" in told


@pytest.mark.parametrize(
    "flags",
    ["", "--revision v1 --private --default --force --endpoint http://hub", "--gated manual --create-pr"],
)
def test_the_command_that_publishes_asks_for_what_was_asked_for(flags):
    parser = ArgumentParser()
    parser.add_argument("repo")
    add_push_flags(parser)
    asked = parser.parse_args(["org/a", *flags.split()])
    words = shlex.split(push_command(Path("my sets/a"), asked))
    assert words[:4] == ["python", "tools/push.py", "my sets/a", "org/a"]
    assert sorted(words[4:]) == sorted(flags.split())
    asked.endpoint = "http://me:secret@hub"
    assert push_command(Path("a"), asked).split(" --endpoint ")[1].split()[0] == "http://hub"
    # Backslashes would be quoted, which not every shell of Windows understands.
    assert push_command(PureWindowsPath(r"sets\a"), asked).startswith("python tools/push.py sets/a org/a")


def test_another_process_is_waited_for_as_long_as_is_said(tmp_path):
    taken, done = threading.Event(), threading.Event()

    def work():
        with lock_of(tmp_path / "out"):
            taken.set()
            done.wait()

    other = threading.Thread(target=work)
    other.start()
    taken.wait()
    with pytest.raises(UsageError, match="another process is at work on"), lock_of(tmp_path / "out"):
        pass
    with pytest.raises(UsageError, match=r"is kept; .*--resume"), lock_of(tmp_path / "out", 0.1):
        pass
    threading.Timer(0.1, done.set).start()
    with lock_of(tmp_path / "out", 60):
        other.join()


def test_real_images_are_read_as_the_flags_say():
    parser = ArgumentParser()
    add_source_flags(parser)
    flags = (
        "--data d --size 8 --fit squash --channels 1 --classes c --label-column l --skip-damaged --workers 0"
    )
    assert reading(parser.parse_args(flags.split())) == {
        "data": Path("d"),
        "size": 8,
        "fit": "squash",
        "channels": 1,
        "classes": Path("c"),
        "label_column": "l",
        "skip_damaged": True,
        "workers": 0,
    }
    assert reading(parser.parse_args([])) == {}


def test_of_a_setting_that_is_given_twice_the_last_one_counts():
    chosen = settings_of(["evaluate.epochs=3", "a=b=c", "evaluate.epochs=4"])
    assert chosen == {"evaluate.epochs": "4", "a": "b=c"}


def test_rows_of_a_finished_run_are_those_of_its_settings_and_of_as_many_networks(finished, tmp_path):
    shutil.copytree(finished[0] / "out", tmp_path / "out")
    artifact, run_folder = read_artifact(tmp_path / "out" / ARTIFACT_FILE), finished[0] / "out.run"
    recipe = Recipe.from_dict(artifact.metadata.recipe["settings"])

    def labels(artifact=artifact, **changes):
        changed = recipe.replace({name.replace("_", ".", 1): value for name, value in changes.items()})
        plan = SimpleNamespace(output=tmp_path / "out", run_folder=run_folder, recipe=changed)
        rows = _recorded(plan, artifact)
        return rows and [row["labels"] for row in rows]

    assert labels() == ["hard", "soft"]
    assert labels(evaluate_labels=("soft",)) == ["soft"]
    assert labels(evaluate_labels=("hard", "teacher")) is None
    others = {"evaluate_repeats": 3, "evaluate_full_repeats": 2, "evaluate_epochs": 4, "seed": 1}
    for name, value in others.items():
        assert labels(**{name: value}) is None
    assert labels(dataclasses.replace(artifact, images=255 - artifact.images)) is None
    warmer = dataclasses.replace(artifact.metadata, labels=artifact.metadata.labels | {"temperature": 9.0})
    assert labels(dataclasses.replace(artifact, metadata=warmer)) is None
    (tmp_path / "out" / "preview.png").write_bytes(b"")
    assert labels() is None


def test_results_stay_with_the_same_images_where_a_run_goes_on_alone(finished):
    there = read_artifact(finished[0] / "out" / ARTIFACT_FILE)
    made = dataclasses.replace(there, metadata=dataclasses.replace(there.metadata, results=()))
    recipe = Recipe.from_dict(there.metadata.recipe["settings"])
    for resume in (True, False):
        kept = _kept(SimpleNamespace(output=finished[0] / "out", resume=resume, recipe=recipe), made)
        assert (kept and kept.metadata) == (there.metadata if resume else None)


def test_a_run_resumed_without_augmentation_leaves_the_recipe_that_results_are_of(finished):
    there = read_artifact(finished[0] / "out" / ARTIFACT_FILE)
    recipe = Recipe.from_dict(there.metadata.recipe["settings"])
    recipe = recipe.replace({"evaluate.augment": "none", "evaluate.cutmix": 0})
    changed = there.metadata.recipe | {"settings": dataclasses.asdict(recipe)}
    made = dataclasses.replace(there, metadata=dataclasses.replace(there.metadata, recipe=changed))
    kept = _kept(SimpleNamespace(output=finished[0] / "out", resume=True, recipe=recipe), made)
    assert kept
    assert kept.metadata.recipe == there.metadata.recipe


def test_a_run_resumed_with_another_evaluation_tells_its_rows_from_those_of_the_recipe(
    finished, here, tmp_path
):
    for name in ("out", "out.run"):
        shutil.copytree(finished[0] / name, tmp_path / name)
    recipe = read_artifact(tmp_path / "out" / ARTIFACT_FILE).metadata.recipe
    words = ["--dataset", "digits", "--ipc", "3", "--output", "out", "--resume"]
    changes = ["evaluate.learning_rate=0.01", "evaluate.labels=hard", "distill.checkpoint_every=7"]
    status, _, error = here("distill_and_push.py", *words, settings=[*TINY, *changes])
    assert status == 0, error
    after = read_artifact(tmp_path / "out" / ARTIFACT_FILE).metadata
    assert after.recipe == recipe
    assert [(row["labels"], row.get("changes")) for row in after.results] == [
        ("hard", None),
        ("soft", None),
        ("hard", "evaluate.learning_rate = 0.01"),
    ]


def test_the_code_of_the_readme_runs_as_printed(finished):
    [code] = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    network = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 10))
    names = {"torch": torch, "network": network}
    exec(code.replace("distilled/digits-ipc10", str(finished[0] / "out")), names)
    assert names["loss"].isfinite()


def test_load_dataset_opens_the_folder_with_class_names(finished, tmp_path):
    datasets = pytest.importorskip("datasets")
    opened = datasets.load_dataset(str(finished[0] / "out"), split="train", cache_dir=str(tmp_path))
    dataset = DistilledDataset.from_folder(finished[0] / "out")
    assert opened.features["label"].names == [str(digit) for digit in range(10)]
    assert opened["label"] == dataset.targets.tolist()


def test_results_json_says_where_and_how_each_row_was_measured(finished):
    rows = json.loads((finished[0] / "out.run" / "results.json").read_text())["rows"]
    names = "device versions command seconds seed content_hash last_mean random_mean"
    assert all(set(names.split()) <= set(row) for row in rows)
    for name, count in {"last": 2, "best": 2, "random": 2, "full": 1}.items():
        for row in rows:
            values = row[f"{name}_accuracies"]
            assert len(values) == count
            assert row[f"{name}_mean"] == pytest.approx(sum(values) / count, abs=0.011)
    told = DistilledDataset.from_folder(finished[0] / "out").info.results
    assert not any(name.endswith("_accuracies") for row in told for name in row)
    assert rows[0]["content_hash"] == DistilledDataset.from_folder(finished[0] / "out").content_hash
    stages = ["loading", "pretraining", "distilling", "labelling", "evaluating"]
    assert list(rows[0]["stages"]) == stages
    assert all(cost["peak_memory_mib"] > 50 for cost in rows[0]["stages"].values())


def test_another_seed_gives_another_file_on_another_drive_too(finished, here, tmp_path, monkeypatch):
    def refuse(path, start=None):
        raise ValueError("path is on mount 'D:', start on mount 'C:'")  # as on Windows

    monkeypatch.setattr(os.path, "relpath", refuse)
    words = ("--dataset", "digits", "--ipc", "3", "--seed", "1", "--output", str(tmp_path / "other"))
    status, output, error = here("distill_and_push.py", *words, settings=TINY)
    assert status == 0, error
    assert f"metrics and plots in {tmp_path / 'other'}.run\n" in output
    other = DistilledDataset.from_folder("other")
    assert other.content_hash != DistilledDataset.from_folder(finished[0] / "out").content_hash


def test_evaluating_again_adds_a_row_and_keeps_the_images(finished, here, tmp_path):
    shutil.copytree(finished[0] / "out", tmp_path / "copy")
    before = read_artifact(tmp_path / "copy" / ARTIFACT_FILE)
    settings = ["evaluate.epochs=2", "evaluate.labels=hard,teacher"]
    status, _, error = here("evaluate.py", "copy", "--ipc", "1", "--seeds", "2", settings=settings)
    assert status == 0, error
    after = read_artifact(tmp_path / "copy" / ARTIFACT_FILE)
    assert after.content_hash == before.content_hash
    assert [(row["ipc"], row["labels"]) for row in after.metadata.results] == [
        (3, "hard"),
        (3, "soft"),
        (1, "hard"),
        (1, "teacher"),
    ]
    rows = json.loads(Path("copy.run/results.json").read_text())["rows"]
    assert [(row["labels"], list(row["stages"])) for row in rows] == [
        ("hard", ["evaluating"]),
        ("teacher", ["evaluating"]),
    ]
    DistilledDataset.from_folder(tmp_path / "copy").verify()


@pytest.mark.parametrize("flags", [(), ("--ipc", "2")])
def test_a_set_that_was_replaced_while_another_one_was_evaluated_gets_no_row(
    finished, here, tmp_path, monkeypatch, flags
):
    folder = shutil.copytree(finished[0] / "out", tmp_path / "copy")
    evaluated = pipeline.evaluate_set

    def replaced(*arguments, **options):
        rows = evaluated(*arguments, **options)
        shutil.rmtree(folder)
        make_folder(folder, make_artifact(ipc=1))
        return rows

    monkeypatch.setattr(pipeline, "evaluate_set", replaced)
    status, _, error = here("evaluate.py", "copy", *flags, "--no-random", settings=["evaluate.epochs=1"])
    assert (status, "which was replaced meanwhile" in " ".join(error.split())) == (2, True)
    assert DistilledDataset.from_folder(folder).info.results == make_artifact(ipc=1).metadata.results
    assert not (tmp_path / "copy.run" / "results.json").exists()


def test_a_set_can_be_loaded_whenever_its_evaluation_is_killed(finished, tmp_path, monkeypatch):
    folder = shutil.copytree(finished[0] / "out", tmp_path / "copy")
    rows, sync, states = read_artifact(folder / ARTIFACT_FILE).metadata.results, os.fsync, []

    def synced(file):
        states.append(DistilledDataset.from_folder(folder).info.results)
        sync(file)

    monkeypatch.setattr(os, "fsync", synced)  # to write, hash and sync a large file takes its time
    first = read_artifact(folder / ARTIFACT_FILE, ipc=1)
    record_results(folder, [rows[0] | {"ipc": 1, "content_hash": first.content_hash}], "cpu")
    assert list(map(len, states)) == [len(rows), len(rows), len(rows) + 1]
    DistilledDataset.from_folder(folder).verify()


def test_a_set_can_be_loaded_whenever_a_run_that_goes_on_with_it_is_killed(
    finished, here, tmp_path, monkeypatch
):
    for name in ("out", "out.run", "cache"):
        shutil.copytree(finished[0] / name, tmp_path / name, dirs_exist_ok=True)
    folder, sync, states = tmp_path / "out", os.fsync, []

    def synced(file):
        states.append(len(DistilledDataset.from_folder(folder).info.results))
        sync(file)

    monkeypatch.setattr(os, "fsync", synced)
    words = ["--dataset", "digits", "--ipc", "3", "--output", "out", "--resume"]
    settings = [*TINY, "evaluate.epochs=1", "evaluate.labels=hard"]
    status, _, error = here("distill_and_push.py", *words, settings=settings)
    assert (status, set(states)) == (0, {2, 3}), error


def test_a_run_that_was_killed_before_its_manifest_was_there_goes_on(finished, here, tmp_path):
    for name in ("out", "out.run", "cache"):
        shutil.copytree(finished[0] / name, tmp_path / name, dirs_exist_ok=True)
    (tmp_path / "out" / MANIFEST_FILE).unlink()
    words = ["--dataset", "digits", "--ipc", "3", "--output", "out", "--resume"]
    status, _, error = here("distill_and_push.py", *words, settings=[*TINY, "evaluate.labels=hard"])
    assert status == 0, error
    DistilledDataset.from_folder(tmp_path / "out").verify()


@pytest.mark.parametrize(
    ("settings", "changes"),
    [
        (["epochs=2", "repeats=1", "full_repeats=0", "at_once=1", "augment=none", "cutmix=0"], None),
        (
            ["epochs=2", "learning_rate=0.01", "cutmix=0"],
            "evaluate.learning_rate = 0.01, evaluate.cutmix = 0.0",
        ),
    ],
)
def test_a_row_says_what_was_changed_unless_it_is_told_elsewhere(finished, here, tmp_path, settings, changes):
    shutil.copytree(finished[0] / "out", tmp_path / "copy")
    words = [*(f"evaluate.{setting}" for setting in settings), "evaluate.labels=hard"]
    status, _, error = here("evaluate.py", "copy", "--network", "vgg11_x0_25", settings=words)
    assert status == 0, error
    *_, row = read_artifact(tmp_path / "copy" / ARTIFACT_FILE).metadata.results
    assert (row["epochs"], row.get("changes")) == (2, changes)


@pytest.mark.parametrize("change", ["validation=0.2", "label.temperature=4", "distill.factor=2"])
def test_an_evaluation_ignores_no_setting(finished, here, tmp_path, change):
    shutil.copytree(finished[0] / "out", tmp_path / "copy")
    status, _, error = here("evaluate.py", "copy", settings=[change])
    assert status == 2
    assert f"{change.partition('=')[0]} does not change an evaluation" in " ".join(error.split())


def test_a_misspelt_setting_of_an_evaluation_is_named(finished, here, tmp_path):
    shutil.copytree(finished[0] / "out", tmp_path / "copy")
    status, _, error = here("evaluate.py", "copy", settings=["epochs=3"])
    assert status == 2
    assert "unknown setting 'epochs'. Did you mean 'pretrain.epochs' or 'evaluate.epochs'" in " ".join(
        error.split()
    )


def test_images_that_are_read_in_another_size_say_so(finished, here, tmp_path):
    shutil.copytree(finished[0] / "out", tmp_path / "copy")
    status, _, error = here("evaluate.py", "copy", "--size", "16")
    assert status == 2
    assert "It was read with no --size." in " ".join(error.split())


@pytest.fixture
def foreign(finished, here):
    """Convert the finished set into one that does not record where it is from, and say how it is read."""

    def convert(*words: str) -> None:
        for source, target in ((finished[0] / "out", "theirs.pt"), ("theirs.pt", "theirs")):
            more = ["--values", "unit", *words] if target == "theirs" else []
            with warnings.catch_warnings(action="ignore", category=UserWarning):  # its notes
                status, _, error = here("convert.py", str(source), target, *more)
            assert status == 0, error

    return convert


def test_a_set_of_another_project_is_evaluated_and_searched_on_as_ours_are(finished, foreign, here, tmp_path):
    foreign("--factor", str(DistilledDataset.from_folder(finished[0] / "out").info.factor))
    status, _, error = here("evaluate.py", "theirs", settings=["evaluate.epochs=3"])
    assert (status, "--dataset: digits, cifar10" in " ".join(error.split())) == (2, True)
    words = ["evaluate.epochs=60", "evaluate.repeats=2", "evaluate.full_repeats=0"]
    status, _, error = here("evaluate.py", "theirs", "--dataset", "digits", settings=words)
    assert status == 0, error
    [row] = DistilledDataset.from_folder("theirs").info.results
    assert row["labels"] == "hard"
    assert row["last_mean"] > 50  # of chance it would be 10
    like_ours = PRESETS["digits"].recipe().replace({"evaluate.epochs": 60})  # whatever the file was called
    assert row["settings"] == settings_hash(like_ours.evaluate, like_ours.network, like_ours.seed)
    axes = ["width=4,8", "depth=1", "norm=batch", "activation=relu", "pooling=avg"]
    flags = [word for axis in axes for word in ("--axis", axis)]
    words = ["evaluate.epochs=3"]
    command = ("search_architectures.py", "theirs", "--dataset", "digits", "--jobs", "1", *flags)
    status, output, error = here(*command, settings=words)
    assert (status, "2 candidates" in output) == (0, True), error
    [results] = Path("searches").glob("*/search.json")
    assert json.loads(results.read_text())["settings"]["augment"] == like_ours.evaluate.augment


def test_a_foreign_set_is_normalised_as_its_real_images_are(finished, tmp_path):
    ours = DistilledDataset.from_folder(finished[0] / "out")
    known = {"logits": ours.artifact.logits, "factor": ours.info.factor}
    changes = {"evaluate.epochs": 60, "evaluate.repeats": 1, "evaluate.full_repeats": 0, "network.width": 32}
    changes |= {"evaluate.labels": ["hard"], "network.norm": "batch"}  # per image it would not matter
    scores, batches = [], []
    for mean, std in ((0.2, 0.6), (0.9, 0.1)):
        foreign = DistilledDataset.from_tensors(ours.artifact.images, mean=[mean], std=[std], **known)
        assert recipe_of(foreign).evaluate.labels == ("hard", "soft")
        folder = tmp_path / str(mean)
        options = {"changes": changes, "cache": tmp_path, "device": "cpu", "dataset": "digits"}
        scores.append([row["last_mean"] for row in evaluate_set(foreign, folder, **options)])
        real, seen = real_images(foreign, "digits", None)
        held, test = splits(real, seen, 0.0)
        ways = proxies(foreign, held, test, EvaluateConfig(), labels="hard", seed=0, device="cpu")
        batches.append(next(iter(ways["distilled"].loaders([0])[0]))[0])
    assert scores[0] == scores[1] != [10.03]  # of one class for all
    assert torch.equal(*batches)


def test_the_teacher_beside_a_foreign_set_may_be_made_in_less_time_which_rows_of_its_labels_say(
    finished, tmp_path
):
    ours = DistilledDataset.from_folder(finished[0] / "out")
    known = {"logits": ours.artifact.logits, "factor": ours.info.factor}
    foreign = DistilledDataset.from_tensors(ours.artifact.images, **known)
    few = {"evaluate.epochs": 1, "evaluate.repeats": 1, "evaluate.full_repeats": 0, "pretrain.networks": 1}

    def rows_of(**changes):
        changes = few | {name.replace("_", ".", 1): value for name, value in changes.items()}
        options = {"changes": changes, "cache": tmp_path, "device": "cpu", "dataset": "digits"}
        return evaluate_set(foreign, tmp_path / "run", **options)

    for epochs in (1, 2):
        with pytest.warns(UserWarning, match=f"labels of 1 of our own, trained for {epochs} epochs"):
            rows = rows_of(pretrain_epochs=epochs)
        write_results(tmp_path / "results.json", rows, "cpu", {})
    options = {
        "changes": few | {"pretrain.epochs": 2},
        "cache": tmp_path,
        "device": "cpu",
        "dataset": "digits",
    }
    assert "teacher      1 network, 2 epochs; 1 in the cache\n" in describe_set(foreign, **options)
    rows = json.loads((tmp_path / "results.json").read_text())["rows"]
    assert [(row["labels"], row.get("changes")) for row in rows] == [
        ("hard", None),
        ("soft", "pretrain.networks = 1, pretrain.epochs = 1"),
        ("soft", "pretrain.networks = 1, pretrain.epochs = 2"),
    ]
    assert rows[1]["teacher"] != rows[2]["teacher"]
    with pytest.raises(UsageError, match=r"pretrain\.networks does not change an evaluation"):
        rows_of(evaluate_labels=["hard"])
    alone = {"changes": {name: few[name] for name in few if "pretrain" not in name}, "random": False}
    rows = evaluate_set(foreign, tmp_path / "run", **options | alone)  # and no warning of a teacher
    assert [(row["labels"], row["random_n"], "teacher" in row["recipe"]) for row in rows] == [
        ("hard", 0, False),
        ("soft", 0, False),
    ]
    with pytest.raises(UsageError, match=r"pretrain\.networks does not change an evaluation"):
        evaluate_set(foreign, tmp_path / "run", **options | {"random": False})


def test_by_the_results_of_a_foreign_set_its_evaluation_can_be_repeated(finished, digits, tmp_path):
    ours = DistilledDataset.from_folder(finished[0] / "out")
    known = {"logits": ours.artifact.logits, "factor": ours.info.factor}
    DistilledDataset.from_tensors(ours.artifact.images, **known).to_folder(tmp_path / "set")
    changes = {"evaluate.epochs": 1, "evaluate.repeats": 1, "evaluate.full_repeats": 0, "network.width": 8}
    changes |= {"seed": 3, "pretrain.networks": 1, "pretrain.epochs": 1}
    options = {"changes": changes, "cache": tmp_path / "cache", "device": "cpu", "dataset": "digits"}
    with pytest.warns(UserWarning, match="are not known"):
        rows = evaluate_folder(tmp_path / "set", **options)
    record_results(tmp_path / "set", rows, "cpu")
    assert not any("recipe" in row for row in DistilledDataset.from_folder(tmp_path / "set").info.results)
    write_results(tmp_path / "results.json", rows, "cpu", {})
    hard, soft = json.loads((tmp_path / "results.json").read_text())["rows"]
    teacher = soft["recipe"].pop("teacher")
    assert soft["recipe"] == hard["recipe"]
    told = Recipe().replace(flatten(hard["recipe"]))
    assert settings_hash(told.evaluate, told.network, told.seed) == hard["settings"] == soft["settings"]
    made = Recipe().replace(flatten(teacher))
    where = {"seed": made.seed, "device": "cpu", "cache": tmp_path / "another cache"}
    assert soft["teacher"] == pretrain(made.pretrain, made.network, digits, **where).weights_hash[:16]


def test_real_images_that_a_foreign_set_cannot_be_of_are_refused(finished, foreign, here, tmp_path):
    factor = str(DistilledDataset.from_folder(finished[0] / "out").info.factor)
    foreign("--factor", factor, "--classes", "1,0,2,3,4,5,6,7,8,9")
    status, _, error = here("evaluate.py", "theirs", "--dataset", "digits")
    assert (status, "in another order" in " ".join(error.split())) == (2, True)
    for colour, place in enumerate(("train/a", "train/b", "test/a", "test/b")):
        (tmp_path / "other" / place).mkdir(parents=True)
        for number in range(10):
            Image.new("L", (8, 8), number + 60 * colour).save(tmp_path / "other" / place / f"{number}.png")
    status, _, error = here("evaluate.py", "theirs", "--dataset", "folder:other")
    assert (
        status,
        "expected classes, channels, height and width [10, 1, 8, 8]" in " ".join(error.split()),
    ) == (2, True)


def test_a_run_resumed_at_another_temperature_puts_it_into_the_artifact(here):
    arguments = ("distill_and_push.py", "--dataset", "digits", "--ipc", "1", "--output", "out", "--resume")
    for temperature in (1, 4):
        settings = [*TINY, f"label.temperature={temperature}", "evaluate.labels=soft"]
        status, _, error = here(*arguments, settings=settings)
        assert status == 0, error
        assert DistilledDataset.from_folder("out").info.labels["temperature"] == temperature


def test_a_dry_run_of_an_evaluation_says_what_it_would_train_and_writes_nothing(
    finished, here, tmp_path, monkeypatch
):
    shutil.copytree(finished[0] / "out", tmp_path / "set")
    before = {path: path.read_bytes() for path in (tmp_path / "set").rglob("*") if path.is_file()}
    status, planned, error = here("evaluate.py", "set", "--seeds", "3", "--ipc", "2", "--dry-run")
    assert status == 0, error
    for line in (
        "dataset      digits: tested on 359 images",
        "distilled    6 networks, hard and soft labels, 3 epochs of 20 images",
        "random       as many, in as many steps, of 20 images",
        "all images   1 network, 1 epoch of 1438",
        "teacher      2 networks, 2 epochs; 0 in the cache",
        "writes       set/distilled.safetensors",
        "             set.run/results.json",
    ):
        assert line in planned.splitlines()
    assert re.search(r"\ntime         about pretraining \d+s, evaluating \d+s\n", planned)
    monkeypatch.setattr("ncfm_engine.plan.seconds_of", lambda *_: (0.1, 0.2))  # measured above
    shutil.copytree(finished[0] / "cache", tmp_path / "cache", dirs_exist_ok=True)
    assert "teacher      2 networks, 2 epochs; 2 in the cache\n" in here("evaluate.py", "set", "--dry-run")[1]
    other = here("evaluate.py", "set", "--network", "vgg11", "--dry-run", settings=["seed=5"])[1]
    assert "; 2 in the cache\n" in other  # of the set's own network and seed
    assert "about pretraining 0s" in other
    alone = here("evaluate.py", "set", "--no-random", "--dry-run")[1]
    assert "\nrandom       left out\n" in alone
    assert "teacher" not in alone
    assert "pretraining" not in alone
    hard = here("evaluate.py", "set", "--network", "vgg11", "--dry-run", settings=["evaluate.labels=hard"])[1]
    assert "\nnetwork      vgg11\n" in hard
    assert "teacher" not in hard
    assert "pretraining" not in hard
    assert {path: path.read_bytes() for path in (tmp_path / "set").rglob("*") if path.is_file()} == before
    assert {path.name for path in tmp_path.iterdir()} == {"cache", "set"}


def test_a_flag_of_an_evaluation_that_takes_the_place_of_a_setting_says_so(here):
    words = [str(ROOT / "tools/results/digits/digits-ipc10"), "--seeds", "3", "--no-random", "--dry-run"]
    with pytest.warns(UserWarning, match=r"--seeds 3 takes the place of --set evaluate.repeats=2"):
        planned = here("evaluate.py", *words, settings=["evaluate.repeats=2", "evaluate.labels=hard"])[1]
    assert "\ndistilled    3 networks, hard labels" in planned


def test_a_set_of_the_hub_is_evaluated_by_its_name(finished, tmp_path, loopback):
    options = PushOptions(revision="made/today", endpoint=loopback.url, token="hf_alice")
    push_folder(finished[0] / "out", "org/digits-tiny", options)
    hub = {"HF_ENDPOINT": loopback.url, "HF_TOKEN": "hf_alice", "HF_HOME": str(tmp_path / "hf")}
    words = [sys.executable, str(ROOT / "tools" / "evaluate.py"), "org/digits-tiny@made/today", "--ipc", "1"]
    words += ["--seeds", "1", "--set", "evaluate.labels=hard"]
    planned = called([*words, "--dry-run"], tmp_path, **hub).stdout
    assert planned.endswith("\nwrites       evaluations/digits-tiny.run/results.json\n")
    assert not (tmp_path / "evaluations").exists()
    result = called(words, tmp_path, **hub)
    assert result.returncode == 0, result.stderr
    assert "random images" in result.stdout
    [row] = json.loads((tmp_path / "evaluations" / "digits-tiny.run" / "results.json").read_text())["rows"]
    assert (row["ipc"], row["labels"], row["n"]) == (1, "hard", 1)


def test_a_folder_of_several_sets_is_refused_before_anything_is_trained(finished, here, tmp_path):
    shutil.copytree(finished[0] / "out", tmp_path / "sets" / "ipc3")
    index = Index("ipc3", {"ipc3": Fingerprint.of(tmp_path / "sets" / "ipc3" / MANIFEST_FILE)})
    (tmp_path / "sets" / MANIFEST_FILE).write_bytes(index.to_bytes())
    status, output, error = here("evaluate.py", "sets", settings=TINY)
    assert (status, output) == (2, "")
    assert "name the folder of one, such as sets/ipc3" in " ".join(error.split())
    assert not (tmp_path / "sets.run").exists()


def test_a_row_of_other_settings_does_not_replace_the_recipes_own(finished, here, tmp_path):
    shutil.copytree(finished[0] / "out", tmp_path / "copy")
    settings = ["evaluate.epochs=1", "evaluate.labels=hard"]
    status, _, error = here("evaluate.py", "copy", "--seeds", "1", settings=settings)
    assert status == 0, error
    rows = read_artifact(tmp_path / "copy" / ARTIFACT_FILE).metadata.results
    assert [(row["labels"], row["epochs"]) for row in rows] == [("hard", 3), ("soft", 3), ("hard", 1)]


def test_a_memory_budget_changes_how_the_work_is_cut_and_not_what_is_done(finished, here):
    arguments = ("--dataset", "digits", "--ipc", "3", "--output", "tight", "--memory", "700KiB")
    status, output, error = here("distill_and_push.py", *arguments, "--dry-run", settings=TINY)
    assert status == 0, error
    assert "10 classes at once" not in output
    status, _, error = here("distill_and_push.py", *arguments, settings=TINY)
    assert status == 0, error
    tight, whole = (DistilledDataset.from_folder(path) for path in ("tight", finished[0] / "out"))
    difference = (tight.images.float() - whole.images.float()).abs()
    assert (difference > 2).float().mean() < 0.02  # sums in another order, now and then another byte


def test_every_flag_of_a_run_reaches_its_plan(here, monkeypatch):
    seen = {}

    def see(**options):
        seen.update(options)
        raise Stopped("seen")

    monkeypatch.setattr("ncfm_engine.plan.make_plan", see)
    words = (
        "--dataset digits --ipc 3 --preset cpu --iterations 7 --discrepancy mmd --seed 5 --output out "
        "--device cpu --memory 1KiB --time-budget 1m --compile off --resume --overwrite --size 8 --set a=b"
    )
    assert here("distill_and_push.py", *words.split())[0] == 75
    del seen["cache"]
    assert seen == {
        "dataset": "digits",
        "ipc": 3,
        "preset": "cpu",
        "iterations": 7,
        "discrepancy": "mmd",
        "seed": 5,
        "output": Path("out"),
        "device": "cpu",
        "memory": 1024,
        "time_budget": 60,
        "compile": "off",
        "resume": True,
        "overwrite": True,
        "reading": {"size": 8},
        "changes": {"a": "b"},
    }


def test_a_dry_run_prints_the_plan_and_writes_only_the_prepared_images(here, tmp_path):
    status, output, error = here(
        "distill_and_push.py",
        *("--dataset", "digits", "--ipc", "3", "--discrepancy", "mmd", "--dry-run"),
        *("--repo", "org/digits", "--revision", "v1"),
        settings=TINY,
    )
    assert status == 0, error
    for words in (
        "1438 images of 1x8x8",
        "distill.iterations = 30",
        "features     2 networks, 2 epochs; 0 in the cache",
        "distill.discrepancy = mmd",
        "[3, 10, 1, 8, 8]",
        "MiB",
        "manifest.json",
    ):
        assert words in output
    for name in ("digits-ipc3/manifest.json", "digits-ipc3.run/results.json"):
        assert f" distilled/{name}\n" in output
    elsewhere = ("--dataset", "digits", "--dry-run", "--output", str(tmp_path / "whole"))
    planned = here("distill_and_push.py", *elsewhere, settings=TINY)[1]
    for name in ("whole/manifest.json", "whole.run/results.json"):
        assert f" {tmp_path}/{name}\n" in planned
    assert "publishes    python tools/push.py distilled/digits-ipc3 org/digits --revision v1" in output
    assert {path.parts[0] for path in (p.relative_to(tmp_path) for p in tmp_path.rglob("*"))} == {"cache"}
    assert [path.name for path in (tmp_path / "cache" / "distilled-data").iterdir()] == ["stores"]


def test_one_of_several_processes_plans_and_tells(here, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    arguments = ("distill_and_push.py", "--dataset", "digits", "--ipc", "3")
    for count, speaks in (("2", False), ("1", True), (None, True)):  # the last two are no ranks of ours
        monkeypatch.setenv("WORLD_SIZE", count) if count else monkeypatch.delenv("WORLD_SIZE")
        status, output, _ = here(*arguments, "--dry-run", settings=TINY)
        assert (status, "dataset      digits" in output) == (0, speaks)
        with notes():
            told = [warnings.formatwarning("so", kind, "x.py", 1) for kind in (UserWarning, OwnWarning)]
        assert told == ["note: so\n" if speaks else "", "note: so\n"]


def test_a_note_is_told_once_where_a_library_changes_the_filters_in_between(capsys):
    with notes(), warnings.catch_warnings(action="default"):
        warnings.showwarning = lambda *place: sys.stderr.write(warnings.formatwarning(*place[:4]))
        for text in ("so", "so", "else"):
            with warnings.catch_warnings():
                warnings.warn(text, stacklevel=1)
    assert capsys.readouterr().err == "note: so\nnote: else\n"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--dataset", "digit"], "Did you mean 'digits'"),
        (["--dataset", "digits", "--preset", "cpuu"], "Did you mean 'cpu'"),
        (["--dataset", "digits", "--ipc", "5000"], "smallest class"),
        (["--dataset", "digits", "--ipc", "5000", "--dry-run"], "smallest class"),
        (["--dataset", "digits", "--dry-run", "--repo", "a/b/c"], "'a/b/c' is not a repository name"),
        (["--dataset", "digits", "--dry-run", "--revision", "v1"], "needs a --repo to publish to"),
        (["--dataset", "cifar10", "--data", "nowhere"], "nowhere"),
        (["--dataset", "digits", "--set", "distill.alhpa=1"], "Did you mean 'distill.alpha'"),
        (["--dataset", "digits", "--set", "distill.alpha"], "expected field=value"),
        (["--dataset", "digits", "--discrepancy", "ncdf"], "Did you mean 'ncfd'"),
        (["--dataset", "digits", "--set", "distill.alpha=2"], "0..1"),
        (["--dataset", "digits", "--resume", "--overwrite"], "--overwrite replaces it; choose one"),
        (["--dataset", "digits", "--dry-run", "--set", "network.norm=batch"], "keeps running statistics"),
        (["--dataset", "digits", "--seed", str(2**64)], "seed must have 64 bits or fewer"),
        (["--dataset", "digits", "--memory", "1KiB"], "below the minimum"),
        (["--dataset", "digits", "--memory", "lots"], "not a quantity"),
        (["--dataset", "digits", "--memory", "2"], "--memory 2 bytes is below"),
        (["--dataset", "digits", "--workers", "-2"], "'-2' is not a number, 0 or more"),
        (["--dataset", "/"], "/ is a folder; if it holds class folders, its dataset is folder:/"),
        (["--dataset", "digits", "--device", "cuda:99"], "cannot be used here"),
        (["--dataset", "digits", "--device", "mps"], "the engine runs on cpu and cuda"),
        ([], "--dataset"),
    ],
)
def test_wrong_usage_ends_with_2_and_one_paragraph(here, arguments, message):
    status, _, error = here("distill_and_push.py", *arguments)
    assert status == 2
    assert message in " ".join(error.split())
    assert "\n\n" not in error.strip()
    assert not Path("distilled").exists()


@pytest.mark.parametrize(("columns", "longest"), [("60", 60), ("300", 100)])
def test_a_paragraph_is_as_wide_as_the_terminal_but_not_wider_than_reads_well(monkeypatch, columns, longest):
    monkeypatch.setenv("COLUMNS", columns)
    assert max(map(len, paragraph("a word " * 80).splitlines())) in range(longest - 6, longest + 1)


def test_an_output_within_a_file_is_refused(here, tmp_path, finished):
    (tmp_path / "file").write_text("no folder")
    searched = ("search_architectures.py", str(finished[0] / "out"))
    for words in (("distill_and_push.py", "--dataset", "digits"), searched):
        status, _, error = here(*words, "--output", "file/x")
        assert status == 2
        assert "could not make the folder" in " ".join(error.split())


def test_a_folder_that_holds_something_else_is_left_alone(here, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").write_text("years of work")
    status, _, error = here("distill_and_push.py", "--dataset", "digits", "--output", "out")
    assert status == 2
    assert "thesis.txt" in error
    assert (tmp_path / "out" / "thesis.txt").read_text() == "years of work"


def test_a_finished_run_is_not_replaced_unasked(finished, here):
    folder, _ = finished
    before = (folder / "out" / ARTIFACT_FILE).read_bytes()
    status, _, error = here("distill_and_push.py", "--dataset", "digits", "--output", str(folder / "out"))
    assert status == 2
    assert "--resume" in error
    assert "--overwrite" in error
    assert (folder / "out" / ARTIFACT_FILE).read_bytes() == before
    words = ("--dataset", "digits", "--output", str(folder / "out"), "--dry-run")
    status, output, error = here(
        "distill_and_push.py", *words
    )  # says what it would do, and what is in the way
    assert status == 2
    assert "1438 images of 1x8x8" in output
    assert "--overwrite" in error


def test_two_processes_do_not_distil_into_one_folder(here, tmp_path, monkeypatch):
    words = ("--dataset", "digits", "--output", str(tmp_path / "out"))

    def run(*_):
        for _ in range(2):
            status, _, error = here("distill_and_push.py", *words)
            assert (status, "another process is at work on" in error) == (2, True)
            (tmp_path / "out").mkdir(exist_ok=True)
            (tmp_path / "out" / ARTIFACT_FILE).touch()  # as the first one does sooner or later
        raise Stopped("seen")

    monkeypatch.setattr("ncfm_engine.pipeline.run", run)
    monkeypatch.setattr(sys, "path", [*sys.path])
    status, output, _ = here("distill_and_push.py", "--dataset", "digits", "--output", "out")
    assert (status, "seen" in output) == (75, True)


def test_a_cache_that_cannot_be_written_is_named(here, tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    status, _, error = here("distill_and_push.py", "--dataset", "digits", "--output", "out")
    assert status == 2
    assert re.search(
        r"file/distilled-data/locks/\w+ could not be written: Not a directory. Choose another cache by XDG",
        " ".join(error.split()),
    )


def test_what_pretraining_cost_is_kept_when_it_is_stopped_and_hinders_nobody(here, tmp_path, monkeypatch):
    monkeypatch.setattr("ncfm_engine.stop.time", SimpleNamespace(monotonic=itertools.count().__next__))
    flags = ("distill_and_push.py", "--dataset", "digits", "--output", "out", "--time-budget", "9s")
    for more in ((), ("--resume",), ()):
        status, output, error = here(*flags, *more, settings=TINY)
        assert status == 75, error
        assert "pretrain" in output
        assert list(json.loads((tmp_path / "out.run" / "costs.json").read_text())) == [
            "loading",
            "pretraining",
        ]


def test_overwrite_replaces_the_set_and_keeps_other_files_and_peoples_words(here):
    arguments = ("--dataset", "digits", "--output", "again", "--ipc")
    assert here("distill_and_push.py", *arguments, "1", settings=TINY)[0] == 0
    Path("again/notes.txt").write_text("mine")
    card = Path("again/README.md")
    card.write_text(card.read_text() + "\nWritten by hand.\n")
    status, _, error = here("distill_and_push.py", *arguments, "2", "--overwrite", settings=TINY)
    assert status == 0, error
    dataset = DistilledDataset.from_folder("again")
    dataset.verify()
    assert dataset.ipc == 2
    assert Path("again/notes.txt").read_text() == "mine"
    assert "Written by hand." in card.read_text()
    rows = json.loads(Path("again.run/results.json").read_text())["rows"]
    assert {row["ipc"] for row in rows} == {2}


def test_a_set_stays_whole_where_there_is_no_space_for_the_one_that_replaces_it(here, monkeypatch):
    command = ("distill_and_push.py", "--dataset", "digits", "--ipc", "1", "--output", "out", "--seed")
    assert here(*command, "0", settings=TINY)[0] == 0
    before = verify_folder("out")

    def made(*arguments, make=pipeline.make_artifact):
        limit(2000)
        return make(*arguments)

    with full_disk() as limit, monkeypatch.context() as patch:
        patch.setattr(pipeline, "make_artifact", made)
        status, _, error = here(*command, "1", "--overwrite", settings=TINY)
    assert (status, "distilled.safetensors" in error) == (2, True)
    assert verify_folder("out").content_hash == before.content_hash
    assert here(*command, "1", "--resume", settings=TINY)[0] == 0
    assert verify_folder("out").content_hash != before.content_hash


def test_a_replacement_that_is_refused_leaves_the_run_as_it_was(here):
    command = ("distill_and_push.py", "--dataset", "digits", "--ipc", "1", "--output", "out")
    assert here(*command, settings=TINY)[0] == 0
    status, _, error = here(*command, "--overwrite", settings=[*TINY, "network.norm=batch"])
    assert (status, "keeps running statistics" in " ".join(error.split())) == (2, True)
    assert here(*command, "--resume", settings=TINY)[0] == 0


def test_a_run_that_replaces_another_goes_on_with_itself(here, tmp_path, monkeypatch):
    command = ("distill_and_push.py", "--dataset", "digits", "--ipc", "1", "--output", "out")
    assert here(*command, settings=TINY)[0] == 0
    with monkeypatch.context() as patch:
        patch.setattr("ncfm_engine.stop.time", SimpleNamespace(monotonic=itertools.count().__next__))
        replacing = (*command, "--seed", "7")
        status, output, error = here(*replacing, "--overwrite", "--time-budget", "9s", settings=TINY)
        assert (status, "(pretrain" in output) == (75, True), error
    assert here(*replacing, "--resume", settings=TINY)[0] == 0
    steps = [json.loads(line)["step"] for line in Path("out.run/metrics.jsonl").read_text().splitlines()]
    assert steps == sorted(steps)
    assert steps[-1] == 30
    assert DistilledDataset.from_folder("out").info.recipe["settings"]["seed"] == 7


def test_a_run_of_no_steps_goes_on_with_its_evaluation(here, tmp_path, monkeypatch):
    settings = [*TINY, "distill.iterations=0"]
    command = ("distill_and_push.py", "--dataset", "digits", "--ipc", "1", "--output", "out")
    with monkeypatch.context() as patch:
        patch.setattr("ncfm_engine.stop.time", SimpleNamespace(monotonic=itertools.count().__next__))
        status, output, error = here(*command, "--time-budget", "66s", settings=settings)
        assert (status, "(evaluate" in output) == (75, True), error
    status, _, error = here(*command, "--resume", "--seed", "7", settings=settings)
    assert (status, "seed is 0 there and 7 here" in " ".join(error.split())) == (2, True)
    assert "pretrain" not in error  # which may take hours
    assert here(*command, "--resume", settings=settings)[0] == 0


def test_networks_that_diverge_while_they_are_evaluated_are_an_error(here):
    settings = [*TINY, "evaluate.learning_rate=1e30"]
    status, _, error = here(
        "distill_and_push.py", "--dataset", "digits", "--ipc", "1", "--output", "out", settings=settings
    )
    assert status == 1
    assert "the weights or the logits are not finite after" in error
    assert "Lower evaluate.learning_rate" in " ".join(error.split())


def test_an_evaluation_takes_one_process_and_nobody_elses_folder(finished, here, monkeypatch):
    folder = str(finished[0] / "out")
    with lock_of(Path(folder)):
        status, _, error = here("evaluate.py", folder)
    assert (status, "another process is at work on" in error) == (2, True)
    monkeypatch.setenv("WORLD_SIZE", "2")
    status, _, error = here("evaluate.py", folder)
    assert (status, "this command is for one process" in " ".join(error.split())) == (2, True)


def test_a_folder_of_images_is_distilled_and_evaluated_like_any_dataset(here, digits, tmp_path):

    for label in (0, 1, 2):
        (tmp_path / "photos" / f"digit {label}").mkdir(parents=True)
        for index, image in enumerate(digits.train.images[digits.train.targets == label][:12]):
            Image.fromarray(image[0].numpy()).save(tmp_path / "photos" / f"digit {label}" / f"{index}.png")
    (tmp_path / "photos" / "digit 1" / "broken.png").write_bytes(b"\x89PNG but not really")
    small = [*TINY, "network.depth=2"]
    spec = ("--dataset", "folder:photos")
    status, _, error = here("distill_and_push.py", *spec, "--ipc", "1", settings=small)
    assert status == 2
    assert "broken.png" in error
    with pytest.warns(UserWarning, match=r"broken\.png"):
        status, _, error = here("distill_and_push.py", *spec, "--ipc", "1", "--skip-damaged", settings=small)
    assert status == 0, error
    assert DistilledDataset.from_folder("distilled/photos-ipc1").info.dataset == "photos"
    status, _, error = here("evaluate.py", "distilled/photos-ipc1")
    assert status == 2
    assert "--dataset folder:PATH" in " ".join(error.split())
    with pytest.warns(UserWarning, match=r"broken\.png"):
        status, output, error = here("evaluate.py", "distilled/photos-ipc1", *spec, "--skip-damaged")
    assert status == 0, error
    assert "random images" in output


def test_what_was_left_out_is_told_in_a_paragraph(tmp_path, digits):
    for label, name in enumerate(("猫", "1")):
        (tmp_path / "photos" / name).mkdir(parents=True)
        for index, image in enumerate(digits.train.images[digits.train.targets == label][:4]):
            Image.fromarray(image[0].numpy()).save(tmp_path / "photos" / name / f"{index}.png")
    (tmp_path / "photos" / "1" / "broken.png").write_bytes(b"\x89PNG but not really")
    words = [sys.executable, str(ROOT / "tools" / "prepare.py"), "folder:photos", "store", "--skip-damaged"]
    done = called(words, tmp_path, PYTHONWARNINGS="default", PYTHONIOENCODING="cp1252")
    assert done.returncode == 0, done.stderr
    note = done.stderr[done.stderr.index("note: ") :]
    assert "broken.png" in note
    assert "warn(" not in done.stderr
    assert r"\u732b" in done.stdout  # what a console cannot show ends nothing
    assert max(map(len, note.splitlines())) <= 100


def altered(folder, tmp_path, dataset=None, **source):
    """A copy of an artifact folder whose metadata says something else of its source."""
    shutil.copytree(folder, tmp_path / "copy")
    artifact = read_artifact(tmp_path / "copy" / ARTIFACT_FILE)
    metadata = artifact.metadata
    changed = {"source": metadata.source | source, "dataset": dataset or metadata.dataset}
    artifact = dataclasses.replace(artifact, metadata=dataclasses.replace(metadata, **changed))
    write_artifact(tmp_path / "copy" / ARTIFACT_FILE, artifact)
    write_manifest(tmp_path / "copy")


def test_an_artifact_is_not_evaluated_against_other_data(finished, here, tmp_path):
    altered(finished[0] / "out", tmp_path, fingerprint="0" * 64)
    status, _, error = here("evaluate.py", "copy")
    assert status == 2
    assert "not the data" in " ".join(error.split())


@pytest.mark.parametrize("source", [{}, {"id": "torchvision:CIFAR10"}, {"id": ["wds"]}])
def test_an_artifact_does_not_say_which_place_is_evaluated_against(finished, here, tmp_path, source):
    altered(finished[0] / "out", tmp_path, dataset=f"wds:pipe:touch {tmp_path}/done", **source)
    status, _, error = here("evaluate.py", "copy")
    assert status == 2
    assert "name it with --dataset" in " ".join(error.split())
    assert not (tmp_path / "done").exists()


def test_an_artifact_does_not_say_where_its_source_is_prepared(finished, here, tmp_path):
    altered(finished[0] / "out", tmp_path, reading={"store": str(tmp_path / "there"), "overwrite": True})
    status, _, error = here("evaluate.py", "copy", "--seeds", "1", settings=["evaluate.epochs=1"])
    assert status == 0, error
    assert not (tmp_path / "there").exists()


@pytest.mark.parametrize("tool", ["distill_and_push.py", "push.py", "evaluate.py", "ablate.py", "prepare.py"])
def test_help_runs_and_shows_commands_and_exit_codes(here, tool):
    status, output, _ = here(tool, "--help")
    assert status == 0
    assert f"python tools/{tool}" in output
    assert "75 stopped on request" in " ".join(output.split())
