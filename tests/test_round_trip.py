"""Distil, publish, load, as a user does: the commands, the code of the card, `datasets`, all over HTTP."""

import contextlib
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from artifacts import make_artifact, make_folder
from commands import ROOT, called, command
from hub_server import LoopbackHub

from distilled_data import DistilledDataset
from distilled_data.format import CARD_FILE
from hub import PushOptions, push_folder

REPO = "org/digits-ncfm"

CONSUMER = """
import json, re, sys
import datasets
import pyarrow.parquet as pq
from huggingface_hub import HfFileSystem, hf_hub_download

repo, default, other = sys.argv[1:]
card = open(hf_hub_download(repo, "README.md", repo_type="dataset"), encoding="utf-8").read()
[code] = re.findall(r"```python\\n(.*?)```", card, re.DOTALL)
names = {}
exec(code, names)
rows = datasets.load_dataset(repo, split="train")
table = pq.read_table(f"datasets/{repo}/{default}/data/train.parquet", filesystem=HfFileSystem())
print(json.dumps({
    "card": list(names["images"].shape),
    "rows": [len(rows), len(datasets.load_dataset(repo, other, split="train"))],
    "names": rows.features["label"].names,
    "labels": rows["label"][:], "soft": rows["soft_label"][:],
    "pixels": [list(image.getdata()) for image in rows["image"]],
    "parquet": [table.num_rows, table.column_names],
}))
"""


def consume(hub, tmp_path, *arguments):
    online = {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "home"), "HF_DATASETS_OFFLINE": "0"}
    words = [sys.executable, "-c", CONSUMER, *arguments]
    return called(words, tmp_path, **online, PYTHONPATH=str(ROOT), PYTHONWARNINGS="")


def test_digits_are_distilled_pushed_tagged_and_loaded_in_every_way(tmp_path, loopback):
    words = ("--dataset", "digits", "--ipc", "3", "--output", "out", "--repo", REPO, "--revision", "v1")
    variables = {"HF_ENDPOINT": loopback.url, "HF_TOKEN": "hf_alice", "PYTHONWARNINGS": ""}
    done = called(command(*words), tmp_path, **variables)
    assert done.returncode == 0, done.stderr
    commit = loopback.head(REPO).oid
    hint, published = done.stdout.splitlines()[-2:]
    assert hint.endswith(f"go on with: python tools/push.py out {REPO} --revision v1")
    assert published == f"published: {loopback.url}/datasets/{REPO}/commit/{commit}"
    made, cache = DistilledDataset.from_folder(tmp_path / "out"), tmp_path / "hub"

    def load(**arguments):
        return DistilledDataset.from_hub(REPO, endpoint=loopback.url, cache_dir=cache, **arguments)

    for revision in ("main", "v1", commit):
        data = load(revision=revision)
        assert (data.content_hash, data.revision) == (made.content_hash, commit)
        assert data.info == made.info
    part = load(ipc=1, classes=["7", "1"])
    assert torch.equal(part.artifact.images, made.artifact.images[:1, [7, 1]])
    log = len(loopback.requests)
    assert load(local_files_only=True, revision="v1").content_hash == made.content_hash
    assert len(loopback.requests) == log
    shutil.rmtree(cache)
    assert load(revision="v1").content_hash == made.content_hash
    assert len(loopback.requests) > log


def test_the_card_load_dataset_and_parquet_work_on_a_repository_with_two_sets(tmp_path, loopback, folders):
    options = PushOptions(endpoint=loopback.url, token="hf_alice")
    push_folder(folders[2], REPO, options)
    push_folder(folders[1], REPO, options)
    done = consume(loopback, tmp_path, REPO, "ipc2", "ipc1")
    assert done.returncode == 0, done.stderr
    found, data = json.loads(done.stdout.splitlines()[-1]), DistilledDataset.from_folder(folders[2])
    assert found["card"] == [80, 1, 8, 8]
    assert found["rows"] == [80, 40]
    assert found["names"] == list(data.classes)
    assert found["labels"] == data.targets.tolist()
    assert torch.allclose(torch.tensor(found["soft"]), data.soft_targets)
    assert torch.equal(torch.tensor(found["pixels"]).view(80, 1, 8, 8), data.images.int())
    assert found["parquet"] == [80, ["image", "label", "soft_label"]]


def test_push_prints_its_plan_does_it_and_finds_nothing_to_do_the_second_time(
    here, loopback, folders, monkeypatch
):
    monkeypatch.setenv("HF_TOKEN", "hf_alice")
    arguments = (str(folders[1]), REPO, "--revision", "v1", "--endpoint", loopback.url)
    status, plan, _ = here("push.py", *arguments, "--dry-run")
    assert (status, loopback.repositories) == (0, {})
    assert plan.startswith(
        f"push to {loopback.url}/datasets/{REPO}\n  parent   none: the repository is created"
    )
    assert here("push.py", *arguments)[1].startswith("published: ")
    assert here("push.py", *arguments)[1].startswith("nothing to publish, it is there already: ")


def test_push_flags_reach_the_repository(here, loopback, folders, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_alice")
    hub = ("--endpoint", loopback.url)
    assert here("push.py", str(folders[1]), "mine", "--private", "--gated", "auto", *hub)[0] == 0
    repository = loopback.repositories["alice/mine"]
    assert (repository.private, repository.gated) == (True, "auto")
    status, out, _ = here("push.py", str(folders[2]), "mine", "--create-pr", *hub)
    assert (status, "/discussions/1" in out) == (0, True)
    assert here("push.py", str(folders[2]), "mine", "--default", "--revision", "v1", *hub)[0] == 0
    assert '"default": "ipc2"' in loopback.files("alice/mine")["manifest.json"].decode()
    status, _, errors = here("push.py", str(folders[1]), "mine", "--default", "--revision", "v1", *hub)
    assert (status, "--force" in errors) == (2, True)
    assert here("push.py", str(folders[1]), "mine", "--default", "--revision", "v1", "--force", *hub)[0] == 0


def test_without_the_right_to_publish_nothing_is_distilled(here, loopback, monkeypatch, tmp_path):
    monkeypatch.setenv("HF_TOKEN", "hf_bob")
    arguments = ("--dataset", "digits", "--repo", REPO, "--endpoint", loopback.url)
    status, _, errors = here("distill_and_push.py", *arguments)
    assert (status, "bob may not publish to org/digits-ncfm" in errors) == (2, True)
    assert not (tmp_path / "distilled").exists()


def test_the_loopback_hub_runs_as_a_command_and_says_how_to_use_it(folders):
    server = [sys.executable, "-m", "tests.hub_server", "--port"]
    with subprocess.Popen([*server, "0"], cwd=ROOT, text=True, stdout=subprocess.PIPE) as process:
        try:
            settings = dict(re.findall(r"(\w+)=(\S+)", process.stdout.readline()))
            options = PushOptions(endpoint=settings["HF_ENDPOINT"], token=settings["HF_TOKEN"])
            assert push_folder(folders[1], "alice/try", options).changed
            assert list(Path(settings["HF_HOME"]).iterdir()) == []  # a cache of its own
            port = settings["HF_ENDPOINT"].rpartition(":")[2]
            second = subprocess.run([*server, port], cwd=ROOT, text=True, capture_output=True)
            assert (second.returncode, second.stderr.count("\n")) == (1, 1)
            assert f"error: port {port}: Address already in use. Choose another with --port." in second.stderr
        finally:
            process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(20)
            process.kill()
    assert not Path(settings["HF_HOME"]).exists()


def test_the_benchmark_of_loading_times_every_contender(here, tmp_path):
    status, out, errors = here(
        "benchmark_loading.py", "--megabytes", "0.1", "--rounds", "2", "--output", "rows.json"
    )
    assert status == 0, errors
    rows = json.loads((tmp_path / "rows.json").read_text())["rows"]
    assert [len(row["seconds"]) for row in rows] == [2] * 4
    assert all(row["contender"] in out and min(row["seconds"]) > 0 for row in rows)


@pytest.mark.parametrize("size", ["-1", "0", "nan", "1e30"])
def test_sizes_that_no_set_has_are_not_measured(here, size):
    status, _, error = here("benchmark_loading.py", "--megabytes", size)
    assert (status, f"{size!r} is not a number from 0.001 to 100,000" in error) == (2, True)


@pytest.fixture(scope="module")
def card(tmp_path_factory):
    folder = make_folder(tmp_path_factory.mktemp("one"), make_artifact(1))
    with LoopbackHub() as hub:
        push_folder(folder, REPO, PushOptions(endpoint=hub.url, token="hf_alice"))
        return hub.files(REPO)[CARD_FILE].decode()


def test_the_published_card_names_its_own_repository(card):
    assert f'DistilledDataset.from_hub("{REPO}")' in card
    assert f'load_dataset("{REPO}")' in card
