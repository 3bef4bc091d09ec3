"""The commands as a user types them, in processes of their own, on the real digits at small size."""

import json
import os
import re
import runpy
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from distilled_data import DistilledDataset
from distilled_data.format import ARTIFACT_FILE, FOLDER_FILES, read_artifact

ROOT = Path(__file__).parents[1]
TINY = [
    "network.width=8",
    "pretrain.networks=2",
    "pretrain.epochs=2",
    "distill.iterations=30",
    "distill.real_batch=20",
    "distill.frequencies=32",
    "distill.checkpoint_every=5",
    "evaluate.epochs=3",
    "evaluate.repeats=2",
    "evaluate.full_epochs=1",
    "evaluate.full_repeats=1",
]


def command(tool: str, *arguments: str, settings=TINY) -> list[str]:
    changes = [word for setting in settings for word in ("--set", setting)]
    return [sys.executable, str(ROOT / "tools" / tool), *arguments, *changes]


def distil(folder: Path, *arguments: str, tool="distill_and_push.py", settings=TINY, cache="cache"):
    return subprocess.run(
        command(tool, *arguments, settings=settings),
        cwd=folder,
        env=environment(folder / cache),
        capture_output=True,
        text=True,
        timeout=120,
    )


def environment(cache: Path) -> dict[str, str]:
    return os.environ | {"XDG_CACHE_HOME": str(cache), "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "error"}


@pytest.fixture
def here(tmp_path, monkeypatch, capsys):
    """Run a tool in this process and in tmp_path: (exit status, output, errors)."""

    def run(tool: str, *arguments: str) -> tuple[int, str, str]:
        path = ROOT / "tools" / tool
        monkeypatch.chdir(tmp_path)
        monkeypatch.syspath_prepend(str(path.parent))
        monkeypatch.setattr(sys, "argv", [str(path), *arguments])
        try:
            runpy.run_path(str(path), run_name="__main__")
        except SystemExit as stop:
            return int(stop.code or 0), *capsys.readouterr()
        return 0, *capsys.readouterr()

    return run


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A folder in which the main job ran once."""
    folder = tmp_path_factory.mktemp("work")
    result = distil(folder, "--dataset", "digits", "--ipc", "3", "--output", "out")
    assert result.returncode == 0, result.stderr
    return folder, result


def test_the_main_job_writes_the_whole_folder_and_a_table(finished):
    folder, result = finished
    assert sorted(
        str(p.relative_to(folder / "out")) for p in (folder / "out").rglob("*") if p.is_file()
    ) == sorted(FOLDER_FILES)
    assert {p.name for p in (folder / "out.run").iterdir()} == {
        "checkpoint.safetensors",
        "losses.png",
        "metrics.jsonl",
        "results.json",
    }
    assert "distilled" in result.stdout
    assert "random images" in result.stdout


def test_the_artifact_loads_verifies_and_names_its_recipe(finished):
    dataset = DistilledDataset.from_folder(finished[0] / "out")
    dataset.verify()
    assert len(dataset) == 30 * dataset.info.factor**2
    assert dataset.info.recipe["settings"]["distill"]["iterations"] == 30
    assert dataset.info.source["images"] == 1438
    assert [row["labels"] for row in dataset.info.results] == ["hard", "soft"]


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
    for name in (
        "device",
        "versions",
        "command",
        "seconds",
        "seed",
        "content_hash",
        "last_mean",
        "random_mean",
    ):
        assert all(name in row for row in rows)
    assert rows[0]["content_hash"] == DistilledDataset.from_folder(finished[0] / "out").content_hash


def test_the_same_command_gives_the_same_file_and_another_seed_another(finished):
    folder, _ = finished
    for name, seed in (("same", "0"), ("other", "1")):
        result = distil(folder, "--dataset", "digits", "--ipc", "3", "--output", name, "--seed", seed)
        assert result.returncode == 0, result.stderr
    same, other = ((folder / name / ARTIFACT_FILE).read_bytes() for name in ("same", "other"))
    assert same == (folder / "out" / ARTIFACT_FILE).read_bytes()
    assert (
        read_artifact(folder / "other" / ARTIFACT_FILE).content_hash
        != read_artifact(folder / "out" / ARTIFACT_FILE).content_hash
    )
    assert same != other


def test_a_run_killed_in_the_middle_and_resumed_gives_the_same_file(finished):
    folder, _ = finished
    arguments = ("--dataset", "digits", "--ipc", "3", "--output", "killed")
    process = subprocess.Popen(
        command("distill_and_push.py", *arguments),
        cwd=folder,
        env=environment(folder / "cache"),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    deadline = time.monotonic() + 60
    while not (folder / "killed.run" / "checkpoint.safetensors").exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (folder / "killed").exists()
    result = distil(folder, *arguments, "--resume")
    assert result.returncode == 0, result.stderr
    assert (folder / "killed" / ARTIFACT_FILE).read_bytes() == (folder / "out" / ARTIFACT_FILE).read_bytes()


def test_evaluating_again_adds_a_row_and_keeps_the_images(finished):
    folder, _ = finished
    before = read_artifact(folder / "out" / ARTIFACT_FILE)
    result = distil(
        folder,
        "out",
        "--ipc",
        "1",
        "--seeds",
        "2",
        tool="evaluate.py",
        settings=["evaluate.epochs=2", "evaluate.labels=hard"],
    )
    assert result.returncode == 0, result.stderr
    after = read_artifact(folder / "out" / ARTIFACT_FILE)
    assert after.content_hash == before.content_hash
    assert [(row["ipc"], row["labels"]) for row in after.metadata.results] == [
        (3, "hard"),
        (3, "soft"),
        (1, "hard"),
    ]
    DistilledDataset.from_folder(folder / "out").verify()


def test_a_time_budget_leaves_a_checkpoint_and_no_artifact(finished):
    folder, _ = finished
    result = distil(folder, "--dataset", "digits", "--output", "short", "--time-budget", "0s")
    assert result.returncode == 0, result.stderr
    assert "go on with --resume" in result.stdout
    assert not (folder / "short").exists()
    assert (folder / "short.run" / "checkpoint.safetensors").exists()


def test_a_dry_run_prints_the_plan_and_writes_nothing(here, tmp_path):
    changes = [word for setting in TINY for word in ("--set", setting)]
    status, output, error = here(
        "distill_and_push.py", "--dataset", "digits", "--ipc", "3", "--dry-run", *changes
    )
    assert status == 0, error
    for words in (
        "1438 images of 1x8x8",
        "distill.iterations = 30",
        "[3, 10, 1, 8, 8]",
        "MiB",
        "manifest.json",
    ):
        assert words in output
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--dataset", "digit"], "Did you mean 'digits'"),
        (["--dataset", "digits", "--preset", "cpuu"], "Did you mean 'cpu'"),
        (["--dataset", "digits", "--ipc", "5000"], "smallest class"),
        (["--dataset", "cifar10", "--data", "nowhere"], "nowhere"),
        (["--dataset", "digits", "--set", "distill.alhpa=1"], "Did you mean 'distill.alpha'"),
        (["--dataset", "digits", "--set", "distill.alpha"], "expected field=value"),
        (["--dataset", "digits", "--set", "distill.alpha=2"], "0..1"),
        (["--dataset", "digits", "--memory", "1KiB"], "below the minimum"),
        (["--dataset", "digits", "--memory", "lots"], "not a quantity"),
        (["--dataset", "digits", "--device", "cuda:99"], "cannot be used here"),
        ([], "--dataset"),
    ],
)
def test_wrong_usage_ends_with_2_and_one_paragraph(here, arguments, message):
    status, _, error = here("distill_and_push.py", *arguments)
    assert status == 2
    assert message in " ".join(error.split())
    assert "\n\n" not in error.strip()
    assert not Path("distilled").exists()


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


@pytest.mark.parametrize("tool", ["distill_and_push.py", "evaluate.py"])
def test_help_runs_and_shows_commands(here, tool):
    status, output, _ = here(tool, "--help")
    assert status == 0
    assert f"python tools/{tool}" in output
