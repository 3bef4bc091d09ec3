"""Files and folders: whole or not at all, whatever happens meanwhile."""

import errno
import functools
import itertools
import os
import stat
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from pathlib import Path

import pytest
from artifacts import make_artifact, make_folder
from children import context, received, start

from distilled_data import DistilledDataError, DistilledDataset
from distilled_data.errors import OutputError
from distilled_data.files import new_folder, read_json, replacing, write_file
from distilled_data.format import ARTIFACT_FILE, CARD_FILE, MANIFEST_FILE, read_artifact
from distilled_data.interchange import read_set
from hub import complete_folder
from ncfm_engine.sources.store import INDEX_FILE, open_store


def test_files_are_readable_by_everyone_whatever_the_umask(tmp_path):
    old = os.umask(0o077)
    try:
        write_file(tmp_path / "a", b"x")
    finally:
        os.umask(old)
    assert (tmp_path / "a").stat().st_mode & 0o777 == 0o644


def test_a_write_that_is_interrupted_leaves_nothing_behind(tmp_path, monkeypatch):
    def interrupted(descriptor):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", interrupted)
    with pytest.raises(KeyboardInterrupt):
        write_file(tmp_path / "a", b"x")
    assert not list(tmp_path.iterdir())


def test_a_file_is_on_the_disk_before_it_takes_the_place_of_another(tmp_path, monkeypatch):
    steps, sync, replace = [], os.fsync, os.replace

    def synced(file):
        status = os.fstat(file)
        steps.append("folder" if stat.S_ISDIR(status.st_mode) else status.st_size)
        sync(file)

    def renamed(source, target):
        steps.append("rename")
        assert Path(source).parent == tmp_path  # a rename to another disk would be a copy
        replace(source, target)

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(os, "replace", renamed)
    write_file(tmp_path / "a", b"xyz")
    assert steps == [3, "rename", "folder"]


def test_a_new_folder_may_lie_in_others_that_are_not_there_yet(tmp_path):
    with new_folder(tmp_path / "deep" / "er" / "est") as folder:
        assert folder.parent == tmp_path / "deep" / "er"  # a rename to another disk would be a copy
        (folder / "a").write_bytes(b"x")
    assert (tmp_path / "deep" / "er" / "est" / "a").read_bytes() == b"x"


def test_a_new_folder_takes_the_place_of_an_empty_one_where_that_has_to_be_removed(tmp_path, monkeypatch):
    replace = os.replace

    def as_on_windows(source, target):
        if os.path.isdir(target):
            raise PermissionError(errno.EACCES, "Access is denied", str(source), None, str(target))
        replace(source, target)

    monkeypatch.setattr(os, "replace", as_on_windows)
    (tmp_path / "out").mkdir()
    with new_folder(tmp_path / "out") as folder:
        (folder / "a").touch()
    assert list(tmp_path.rglob("*")) == [tmp_path / "out", tmp_path / "out" / "a"]


def test_a_folder_that_cannot_be_made_is_an_output_error(tmp_path):
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(OutputError, match="could not write"):
        write_file(tmp_path / "file" / "a", b"x")
    with pytest.raises(OutputError, match=r"too long\. Check the folder"), new_folder(tmp_path / ("a" * 300)):
        raise AssertionError


def test_a_disk_that_is_full_while_a_folder_is_filled_is_told_once(tmp_path):
    full = OSError(errno.ENOSPC, "No space left on device")
    with (
        pytest.raises(OutputError, match=r"/out: No space .*\. Free some space"),
        new_folder(tmp_path / "out"),
    ):
        raise full
    told = OutputError("told by what writes a file")
    with pytest.raises(OutputError, match=r"^told by what writes a file$"), new_folder(tmp_path / "out"):
        raise told


def test_a_mount_without_modes_and_syncs_of_folders_is_written_to(tmp_path, monkeypatch):
    def refuse(*_, **__):
        raise PermissionError(errno.EPERM, "Operation not permitted")

    sync = os.fsync
    monkeypatch.setattr(os, "chmod", refuse)
    monkeypatch.setattr(
        os, "fsync", lambda file: refuse() if stat.S_ISDIR(os.fstat(file).st_mode) else sync(file)
    )
    write_file(tmp_path / "a", b"x")
    with new_folder(tmp_path / "folder") as folder:
        (folder / "b").write_bytes(b"y")
    assert (tmp_path / "a").read_bytes() + (tmp_path / "folder" / "b").read_bytes() == b"xy"


def test_of_a_file_in_its_place_whose_folder_cannot_be_synced_nobody_says_that_the_old_one_is_there(
    tmp_path, monkeypatch
):
    def refuse(folder):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr("distilled_data.files._sync", refuse)
    (tmp_path / "a").write_bytes(b"old")
    with pytest.raises(OutputError, match=r"error\. The new file is in its place, but a power cut may undo"):
        write_file(tmp_path / "a", b"new")
    assert (tmp_path / "a").read_bytes() == b"new"


@pytest.mark.parametrize(("tries", "written"), [(3, b"new"), (2, b"old")])
def test_a_file_that_others_read_is_replaced_when_they_have_read_it(tries, written, tmp_path, monkeypatch):
    replace, refusals = os.replace, iter([PermissionError(errno.EACCES, "Access is denied")] * 2)

    def as_on_windows(source, target):
        for refusal in refusals:
            raise refusal
        replace(source, target)

    (tmp_path / "a").write_bytes(b"old")
    monkeypatch.setattr("distilled_data.files.TRIES", tries)
    monkeypatch.setattr("distilled_data.files.PAUSE", 0)
    monkeypatch.setattr(os, "replace", as_on_windows)
    with nullcontext() if tries == 3 else pytest.raises(OutputError, match="Access is denied"):
        write_file(tmp_path / "a", b"new")
    assert [path.read_bytes() for path in tmp_path.iterdir()] == [written]


def test_threads_that_replace_one_file_at_once_do_not_write_into_each_others(tmp_path):
    def replace(content):
        with replacing(tmp_path / "a") as temporary:
            temporary.write_bytes(content)
            both.wait()

    both = threading.Barrier(2, timeout=60)
    with ThreadPoolExecutor(2) as threads:
        assert list(threads.map(replace, [b"x", b"yy"])) == [None, None]
    assert (tmp_path / "a").read_bytes() in (b"x", b"yy")


def write_again_and_again(path, written):
    for number in itertools.count():
        write_file(path, bytes([number % 256]) * 3_000_000)
        written.put(number)


def test_a_writer_killed_at_any_moment_leaves_a_whole_file(tmp_path):
    path = tmp_path / "a"
    for delay in (0.0, 0.003, 0.007, 0.011, 0.02):
        written = context.SimpleQueue()
        process = start(write_again_and_again, path, written)
        received(written, process)
        time.sleep(delay)
        process.kill()
        process.join()
        content = path.read_bytes()
        assert len(content) == 3_000_000
        assert len(set(content)) == 1


@pytest.mark.parametrize(
    ("name", "read"),
    [
        (MANIFEST_FILE, DistilledDataset.from_folder),
        (ARTIFACT_FILE, DistilledDataset.from_folder),
        (ARTIFACT_FILE, functools.partial(DistilledDataset.from_folder, ipc=1)),
        (ARTIFACT_FILE, lambda folder: read_artifact(folder / ARTIFACT_FILE)),
        (CARD_FILE, complete_folder),
        (INDEX_FILE, open_store),
        ("results.json", lambda folder: read_json(folder / "results.json")),
        ("class/1.png", read_set),
    ],
)
def test_pipes_and_devices_in_a_folder_of_somebody_elses_are_not_read(tmp_path, name, read):
    path = make_folder(tmp_path, make_artifact(ipc=1)) / name
    path.parent.mkdir(exist_ok=True)
    path.unlink(missing_ok=True)
    path.symlink_to(os.devnull)  # a pipe would let this test wait, and /dev/zero fill the memory
    with pytest.raises(DistilledDataError, match=r"a pipe or a device, not a file"):
        read(tmp_path)
