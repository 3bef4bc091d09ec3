"""Publishing and downloading, killed by SIGKILL at every request and at random moments, in many processes."""

import os
import random
import time

import pytest
from children import context, start
from hub_server import LoopbackHub

from distilled_data import DistilledDataset
from distilled_data.format import ARTIFACT_FILE, CARD_FILE, FOLDER_FILES, MANIFEST_FILE
from hub import PushOptions, push_folder

REPO = "org/digits"
RANDOM_KILLS = int(os.environ.get("KILLS", "3"))


def publish_in_child(folder, url):
    push_folder(folder, REPO, PushOptions(revision="v1", endpoint=url, token="hf_alice"))


def load_in_child(url, cache, results=None):
    data = DistilledDataset.from_hub(REPO, endpoint=url, cache_dir=cache)
    if results is not None:
        results.put(data.content_hash)


def count_requests(hub, target, *arguments) -> tuple[int, float]:
    before, began = len(hub.requests), time.monotonic()
    process = start(target, *arguments)
    process.join(60)
    assert process.exitcode == 0
    return len(hub.requests) - before, time.monotonic() - began


@pytest.fixture
def hub(folders):
    with LoopbackHub() as hub:
        push_folder(folders[2], REPO, PushOptions(endpoint=hub.url, token="hf_alice"))
        yield hub


def moments(requests: int, seconds: float):
    """(what the kill waits for, its number or the seconds it takes)."""
    yield from (("request", number) for number in range(requests))
    chance = random.Random(int(os.environ.get("KILL_SEED", "0")))
    yield from (("time", chance.uniform(0, seconds)) for _ in range(RANDOM_KILLS))


def kill(hub, kind, value, target, *arguments) -> None:
    hub.faults.clear()
    process = start(target, *arguments)
    if kind == "time":
        time.sleep(value)
        process.kill()
    else:
        hub.fault("", "kill", process.pid, skip=int(value))
    process.join(60)
    assert process.exitcode in (-9, 0)
    hub.faults.clear()


def test_a_killed_push_leaves_the_old_state_or_the_new_and_the_next_one_completes_it(hub, folders):
    options = PushOptions(revision="v1", endpoint=hub.url, token="hf_alice")
    repository = hub.repositories[REPO]
    old = repository.refs["refs/heads/main"]
    count, seconds = count_requests(hub, publish_in_child, folders[1], hub.url)
    new, outcomes = hub.files(REPO), set()
    for kind, value in moments(count, seconds):
        repository.refs = {"refs/heads/main": old}
        hub.large = {blob.sha256: blob.content for blob in old.tree.values() if blob.large}
        kill(hub, kind, value, publish_in_child, folders[1], hub.url)
        state = hub.files(REPO)
        assert state in ({path: blob.content for path, blob in old.tree.items()}, new)
        outcomes.add("old" if state != new else "tagged" if "refs/tags/v1" in repository.refs else "untagged")
        push_folder(folders[1], REPO, options)
        assert hub.files(REPO) == hub.files(REPO, "v1") == new
        assert len(repository.history()) == 3  # the initial commit, the old state, the new one
    assert outcomes == {"old", "untagged", "tagged"}


def test_a_killed_download_leaves_a_cache_from_which_the_next_load_is_right(hub, folders, tmp_path):
    expected = DistilledDataset.from_folder(folders[2]).content_hash
    count, seconds = count_requests(hub, load_in_child, hub.url, tmp_path / "first")
    assert count == 4
    for number, (kind, value) in enumerate(moments(count, seconds)):
        cache = tmp_path / str(number)
        kill(hub, kind, value, load_in_child, hub.url, cache)
        data = DistilledDataset.from_hub(REPO, endpoint=hub.url, cache_dir=cache)
        assert data.content_hash == expected


def test_processes_that_load_at_once_share_a_cache(hub, folders, tmp_path):
    expected = DistilledDataset.from_folder(folders[2]).content_hash
    results = context.SimpleQueue()
    for damaged in (False, True):  # an empty cache, and one whose artifact all of them find damaged
        if damaged:
            [path] = tmp_path.rglob(f"snapshots/*/{ARTIFACT_FILE}")
            path.resolve().write_bytes(b"damaged")
        processes = [start(load_in_child, hub.url, tmp_path, results) for _ in range(4)]
        for process in processes:
            process.join(60)
        assert [process.exitcode for process in processes] == [0] * 4
        assert {results.get() for _ in range(4)} == {expected}


def test_four_publishers_in_processes_of_their_own_all_get_in(hub, folders):
    processes = [start(publish_in_child_untagged, folders[ipc], hub.url) for ipc in (1, 3, 1, 3)]
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0] * 4
    published = hub.files(REPO)
    assert set(published) == {".gitattributes", CARD_FILE, MANIFEST_FILE} | {
        f"ipc{ipc}/{name}" for ipc in (1, 2, 3) for name in FOLDER_FILES if name != CARD_FILE
    }
    assert len(hub.repositories[REPO].history()) == 4


def publish_in_child_untagged(folder, url):
    push_folder(folder, REPO, PushOptions(endpoint=url, token="hf_alice"))
