"""The lock file: what it holds, that loads obey it, and the commands that write, fetch and check it."""

import dataclasses
import os
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from artifacts import flip, make_artifact, make_folder
from children import finish, start
from huggingface_hub import constants

from distilled_data import (
    AccessError,
    DistilledDataset,
    HubError,
    IntegrityError,
    LockError,
    UsageError,
    __main__,
)
from distilled_data.__main__ import describe
from distilled_data.format import ARTIFACT_FILE, MANIFEST_FILE
from distilled_data.lock import LockedRepository, add_locked, read_lock, write_lock
from distilled_data.manifest import Fingerprint
from distilled_data.remote import Repository
from hub import PushOptions, push_folder

REPO = "org/digits"
OTHER = LockedRepository("org/other", "v1", "b" * 40, {}, {})
ENTRY_TEXT = f'[[repository]]\nid = "a/b"\ncommit = "{"a" * 40}"\nfiles = [{{}}]\n'
ENTRY = LockedRepository(
    REPO, "v1", "a" * 40, {'odd "name"\x7f\n': Fingerprint("0" * 64, 1)}, {'odd "name"\x7f\n': "1" * 64}
)


@pytest.fixture
def push(loopback, folders):
    def push(folder, revision=None):
        options = PushOptions(revision=revision, endpoint=loopback.url, token="hf_alice")
        return push_folder(folders.get(folder, folder), REPO, options)

    push(2, "v1")
    return push


@pytest.fixture
def run(loopback, tmp_path, monkeypatch, capsys):
    """`python -m distilled_data` in tmp_path and this process: its output."""

    def run(*arguments: str) -> str:
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
        __main__.main(__main__.parser().parse_args([*arguments, "--endpoint", loopback.url]))
        return capsys.readouterr().out

    return run


def load(loopback, tmp_path, **arguments):
    arguments = {"endpoint": loopback.url, "cache_dir": tmp_path / "hub"} | arguments
    return DistilledDataset.from_hub(REPO, **arguments)


def test_locks_come_back_as_they_were_written_and_equal_ones_are_equal_bytes(tmp_path):
    other = LockedRepository("a/b", None, "b" * 40, {}, {})
    write_lock(tmp_path / "one", [ENTRY, other])
    write_lock(tmp_path / "two", [other, ENTRY])
    assert read_lock(tmp_path / "one") == {REPO: ENTRY, "a/b": other}
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()


@pytest.mark.parametrize(
    "text",
    [
        "", "version = 2", "<<<<<<< HEAD\nversion = 1", "version = 1\nrepository = 3",
        'version = 1\n[[repository]]\nid = "a/b"\ncommit = "main"\nfiles = []',
        "version = true",
        "version = 1\n" + 2 * ENTRY_TEXT.format(""),
        "version = 1\n" + ENTRY_TEXT.format('{path="x", size="1", sha256="SHA"}').replace("SHA", "0" * 64),
        "version = 1\n" + ENTRY_TEXT.format('{path="x", size=1, sha256="ABC"}'),
        "version = 1\n" + ENTRY_TEXT.format(2 * '{path="x", size=1, sha256="SHA"},').replace("SHA", "0" * 64),
        "version = " + "[" * 10_000,
        'version = 1\n[[repository]]\nid = 3\ncommit = "' + "a" * 40 + '"\nfiles = []',
        "version = 1\n" + ENTRY_TEXT.format("").replace("id", "revision = 3\nid"),
    ],
)  # fmt: skip
def test_what_is_no_lock_file_is_refused_and_a_merge_conflict_too(tmp_path, text):
    (tmp_path / "lock").write_text(text)
    with pytest.raises(LockError, match="not a lock file"):
        read_lock(tmp_path / "lock")


def test_the_bytes_of_a_lock_do_not_depend_on_an_order_and_hold_any_text(tmp_path):
    files = {"b": Fingerprint("0" * 64, 1), "a": Fingerprint("1" * 64, 2)}
    for name, order in (("one", "ab"), ("two", "ba")):
        chosen = {path: files[path] for path in order}
        entry = LockedRepository("a/b", "v\N{GRINNING FACE}", "b" * 40, chosen, {})
        write_lock(tmp_path / name, [entry])
        assert read_lock(tmp_path / name) == {"a/b": entry}
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()


def test_a_folder_in_the_place_of_a_lock_file_is_named(tmp_path):
    with pytest.raises(LockError, match="cannot be read"):
        read_lock(tmp_path)


def test_a_lock_file_whose_name_cannot_be_is_told_in_words(run):
    with pytest.raises(LockError, match="cannot be read: File name too long"):
        run("lock", REPO, "--lock", "x" * 300)


def test_a_missing_lock_file_names_the_command_that_writes_it(tmp_path):
    with pytest.raises(LockError, match="python -m distilled_data lock"):
        read_lock(tmp_path / "lock")


@pytest.mark.parametrize("command", ["sync", "verify"])
def test_an_empty_lock_file_is_not_said_to_be_verified(run, tmp_path, command):
    write_lock(tmp_path / "distilled.lock", [])
    with pytest.raises(LockError, match="holds no repository"):
        run(command)


def test_the_lock_holds_commit_sizes_and_hashes_of_what_is_loaded(loopback, push, run, tmp_path, folders):
    run("lock", f"{REPO}@v1")
    [entry] = tomllib.loads((tmp_path / "distilled.lock").read_text())["repository"]
    content = (folders[2] / ARTIFACT_FILE).read_bytes()
    artifact, manifest = entry["files"]
    assert (entry["id"], entry["revision"], entry["commit"]) == (REPO, "v1", loopback.head(REPO).oid)
    assert (artifact["path"], manifest["path"]) == (ARTIFACT_FILE, MANIFEST_FILE)
    assert artifact["sha256"] == Fingerprint.of_bytes(content).sha256
    assert artifact["size"] == len(content)
    assert artifact["content_hash"] == DistilledDataset.from_folder(folders[2]).content_hash


def test_a_locked_load_gives_the_locked_set_whatever_is_published_since(loopback, push, run, tmp_path):
    run("lock", REPO)
    push(1)
    locked = load(loopback, tmp_path, lock=str(tmp_path / "distilled.lock"))
    assert (locked.ipc, load(loopback, tmp_path, ipc=1).ipc) == (2, 1)
    assert locked.revision != loopback.head(REPO).oid
    loopback.requests.clear()
    load(loopback, tmp_path, lock=tmp_path / "distilled.lock")
    assert loopback.requests == []


def test_every_set_of_a_repository_is_locked(loopback, push, run, tmp_path):
    push(1)
    run("lock", REPO)
    paths = set(read_lock(tmp_path / "distilled.lock")[REPO].files)
    inside = {f"ipc{ipc}/{name}" for ipc in (1, 2) for name in (ARTIFACT_FILE, MANIFEST_FILE)}
    assert paths == {MANIFEST_FILE} | inside
    assert load(loopback, tmp_path, lock=tmp_path / "distilled.lock", ipc=1).ipc == 1


def test_a_set_that_agrees_with_its_manifest_and_not_with_the_lock_is_refused(loopback, push, run, tmp_path):
    run("lock", REPO)
    other = make_folder(tmp_path / "other", make_artifact(2, logits=False))
    head = loopback.head(REPO)
    for name in (ARTIFACT_FILE, MANIFEST_FILE):  # a Hub that rewrites history
        loopback.put(REPO, name, (other / name).read_bytes())
    forged = loopback.head(REPO)
    object.__setattr__(forged, "oid", head.oid)
    loopback.repositories[REPO].refs = {"refs/heads/main": forged}
    shutil.rmtree(tmp_path / "hub")
    assert load(loopback, tmp_path).artifact.logits is None
    with pytest.raises(IntegrityError, match="its manifest and the lock file must agree"):
        load(loopback, tmp_path, lock=tmp_path / "distilled.lock")


def test_a_file_that_the_lock_does_not_hold_is_not_loaded(loopback, push, run, tmp_path):
    run("lock", REPO)
    path = tmp_path / "distilled.lock"
    [entry] = read_lock(path).values()
    write_lock(path, [dataclasses.replace(entry, files={MANIFEST_FILE: entry.files[MANIFEST_FILE]})])
    with pytest.raises(LockError, match=r"does not hold distilled\.safetensors\. Lock it again"):
        load(loopback, tmp_path, lock=path)


def test_a_repository_or_revision_that_is_not_locked_is_refused(loopback, push, run, tmp_path):
    run("lock", f"{REPO}@v1")
    lock = tmp_path / "distilled.lock"
    with pytest.raises(LockError, match=r"does not hold org/other; it holds org/digits.*lock org/other"):
        DistilledDataset.from_hub("org/other", lock=lock)
    with pytest.raises(LockError, match="locked at v1, revision 'main' was asked for"):
        load(loopback, tmp_path, lock=lock, revision="main")
    for revision in ("v1", loopback.head(REPO).oid):
        assert load(loopback, tmp_path, lock=lock, revision=revision).ipc == 2


def test_lock_without_names_follows_branches_and_says_what_changed(loopback, push, run, tmp_path):
    assert run("lock", REPO).startswith("locked")
    assert run("lock").startswith("unchanged")
    push(1)
    assert run("lock").startswith("locked")
    assert read_lock(tmp_path / "distilled.lock")[REPO].commit == loopback.head(REPO).oid


@pytest.mark.parametrize("offline", [False, True])
def test_without_the_hub_nothing_is_said_to_be_what_a_revision_is_now(
    loopback, push, run, tmp_path, monkeypatch, offline
):
    run("lock", REPO)
    before = (tmp_path / "distilled.lock").read_bytes()
    if offline:
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    else:
        loopback.fault("HEAD ", "status", 503, times=99)
    for arguments in (["lock"], ["lock", REPO], ["lock", f"{REPO}@v1"]):
        with pytest.raises(HubError, match="HF_HUB_OFFLINE" if offline else "the Hub failed") as refused:
            run(*arguments)
        assert refused.value.exit_code == (2 if offline else 1)  # the second may pass
    assert (tmp_path / "distilled.lock").read_bytes() == before


def test_sync_fills_an_empty_cache_and_verify_needs_no_hub(loopback, push, run, tmp_path):
    run("lock", REPO)
    shutil.rmtree(tmp_path / "hub")
    with pytest.raises(AccessError, match=r"python -m distilled_data sync --lock distilled\.lock") as missing:
        run("verify")
    assert missing.value.exit_code == IntegrityError.exit_code == 2  # as of a set that is damaged
    assert run("sync").startswith(f"verified  {REPO}  commit {loopback.head(REPO).oid[:12]}  2 files")
    loopback.requests.clear()
    assert run("verify").startswith("verified")
    assert loopback.requests == []


def test_verify_finds_damage_and_sync_repairs_it(loopback, push, run, tmp_path):
    run("lock", REPO)
    [path] = (tmp_path / "hub").rglob(f"snapshots/*/{ARTIFACT_FILE}")
    content = path.read_bytes()
    flip(path.resolve())
    with pytest.raises(IntegrityError, match=r"python -m distilled_data sync --lock distilled\.lock"):
        run("verify")
    run("sync")
    assert path.read_bytes() == content


def test_nothing_is_locked_that_does_not_verify(loopback, push, run, tmp_path):
    sha256 = loopback.head(REPO).tree[ARTIFACT_FILE].sha256
    loopback.large[sha256] = loopback.large[sha256][:-1] + b"\x01"
    with pytest.raises(IntegrityError):
        run("lock", REPO)
    assert not (tmp_path / "distilled.lock").exists()


def test_a_manifest_that_changes_while_it_is_locked_is_refused(loopback, push, run, tmp_path, monkeypatch):
    fetch_all = Repository.fetch_all

    def then_altered(self):
        sets = fetch_all(self)
        path = sets[0].folder / MANIFEST_FILE
        path.write_bytes(path.read_bytes().replace(sets[0].manifest.content_hash.encode(), b"0" * 64))
        return sets

    monkeypatch.setattr(Repository, "fetch_all", then_altered)
    with pytest.raises(IntegrityError, match="changed while it was read"):
        run("lock", REPO)
    assert not (tmp_path / "distilled.lock").exists()


def test_what_another_command_locks_meanwhile_stays_locked(loopback, push, run, tmp_path, monkeypatch):
    path, locked = tmp_path / "distilled.lock", Repository.locked
    monkeypatch.setattr(Repository, "locked", lambda self: write_lock(path, [OTHER]) or locked(self))
    run("lock", REPO)
    assert set(read_lock(path)) == {OTHER.id, REPO}


def lock_one_by_one(path, ids):
    for name in ids:
        add_locked(path, {name: dataclasses.replace(OTHER, id=name)})


@pytest.mark.skipif(os.name == "nt", reason="nothing is locked there")
def test_processes_that_lock_sets_at_once_lose_none(tmp_path):
    path = tmp_path / "new" / "distilled.lock"
    ids = [[f"org/{process}-{number}" for number in range(20)] for process in range(3)]
    processes = [start(lock_one_by_one, path, some) for some in ids]
    assert [finish(process) for process in processes] == [0, 0, 0]
    assert set(read_lock(path)) == {name for some in ids for name in some}
    assert [file.name for file in path.parent.iterdir()] == [path.name]


def test_two_revisions_of_one_repository_are_not_locked_at_once(loopback, push, run, tmp_path):
    with pytest.raises(UsageError, match=f"{REPO} is there twice"):
        run("lock", f"{REPO}@v1", REPO)
    assert not (tmp_path / "distilled.lock").exists()


def test_a_content_hash_that_only_the_lock_file_has_is_said_to_be_its(loopback, push, run, tmp_path):
    run("lock", f"{REPO}@v1")
    path = tmp_path / "distilled.lock"
    [entry] = read_lock(path).values()
    write_lock(path, [dataclasses.replace(entry, content_hashes={ARTIFACT_FILE: "0" * 64})])
    with pytest.raises(IntegrityError, match=r"expected the content hash 0{64} by the lock file"):
        run("sync")


def test_nothing_is_said_to_be_locked_when_one_of_several_is_not_there(loopback, push, run, tmp_path, capsys):
    with pytest.raises(AccessError):
        run("lock", f"{REPO}@v1", "nobody/nothing")
    assert capsys.readouterr().out == ""
    assert not (tmp_path / "distilled.lock").exists()


def test_a_lock_file_may_begin_with_a_byte_order_mark(tmp_path):
    write_lock(tmp_path / "lock", [ENTRY])
    (tmp_path / "lock").write_bytes(b"\xef\xbb\xbf" + (tmp_path / "lock").read_bytes())
    assert read_lock(tmp_path / "lock") == {REPO: ENTRY}


def test_the_command_ends_with_a_status_and_an_error_in_words(tmp_path):
    command = [sys.executable, "-m", "distilled_data", "verify"]
    environment = os.environ | {"PYTHONPATH": os.getcwd()}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2
    assert done.stderr.startswith("error: distilled.lock does not exist")


def test_no_command_is_none(capsys):
    with pytest.raises(SystemExit):
        __main__.parser().parse_args([])
    assert "required: command" in capsys.readouterr().err


def test_help_says_what_exit_codes_mean(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    with pytest.raises(SystemExit):
        __main__.parser().parse_args(["--help"])
    shown = capsys.readouterr().out
    assert "2 wrong usage or input" in shown
    assert max(map(len, shown.splitlines())) <= 80


def test_the_revision_of_a_lock_file_does_not_reach_the_terminal_as_it_is():
    entry = LockedRepository("org/name", "\x1b[2Jv1", "0" * 40, {}, {})
    assert describe(entry) == r"org/name@\x1b[2Jv1  commit 000000000000  0 files, 0 bytes"


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no device that is always full")
def test_an_error_that_cannot_be_printed_has_its_exit_code(tmp_path):
    for logs in ("2>/dev/full", ">/dev/full 2>&1"):
        environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])}
        command = ["sh", "-c", f"{sys.executable} -m distilled_data verify --lock none.lock {logs}"]
        assert subprocess.run(command, cwd=tmp_path, env=environment, timeout=60).returncode == 2
