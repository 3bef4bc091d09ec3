"""Saved progress: whole or not at all, of this run or refused, with the one before it to fall back on."""

import errno
import importlib
import itertools
import json
import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest
import safetensors.torch
import torch
from children import context, received, start
from interruptions import full_disk

from distilled_data import CheckpointError, OutputError
from ncfm_engine import checkpoint as module
from ncfm_engine.checkpoint import discard, identity_of, load_checkpoint, previous_of, save_checkpoint

IDENTITY = {"distill.alpha": 0.5, "dataset": "digits", "evaluate.labels": ("hard",)}


def save(path: Path, step: int) -> None:
    save_checkpoint(
        path, {"images": torch.full((3, 2), float(step))}, identity=IDENTITY, progress={"step": step}
    )


@pytest.fixture
def path(tmp_path) -> Path:
    path = tmp_path / "run" / "checkpoint.safetensors"
    save(path, 1)
    save(path, 2)
    return path


def test_what_was_saved_is_loaded(path):
    found = load_checkpoint(path, IDENTITY)
    assert found.progress == {"step": 2}
    assert torch.equal(found.tensors["images"], torch.full((3, 2), 2.0))
    assert load_checkpoint(path.with_name("none.safetensors"), IDENTITY) is None


def test_the_one_before_is_kept_and_nothing_else(path):
    assert sorted(path.parent.iterdir()) == sorted([path, previous_of(path)])
    assert load_checkpoint(previous_of(path), IDENTITY).progress == {"step": 1}


@pytest.mark.parametrize("damage", ["empty", "cut", "flipped", "a flipped bit of the header", "removed"])
def test_a_damaged_checkpoint_is_passed_over_and_the_one_used_is_named(path, damage):
    content = bytearray(path.read_bytes())
    if damage == "flipped":
        content[-3] ^= 1
    if damage == "a flipped bit of the header":
        at = content.index(b'\\"step\\": 2')
        content[at + 10 : at + 11] = b"3"
    path.write_bytes({"empty": b"", "cut": content[:-5]}.get(damage, bytes(content)))
    if damage == "removed":
        path.unlink()
        assert load_checkpoint(path, IDENTITY).progress == {"step": 1}
        return
    with pytest.warns(
        UserWarning, match="not a whole checkpoint .* going on from the one before it, .*previous"
    ):
        assert load_checkpoint(path, IDENTITY).progress == {"step": 1}


def test_one_that_another_process_discards_while_the_next_is_saved_ends_nothing(path, monkeypatch):
    keep = module._keep
    monkeypatch.setattr(module, "_keep", lambda path: discard(path) or keep(path))
    save(path, 3)
    assert load_checkpoint(path, IDENTITY).progress == {"step": 3}
    assert list(path.parent.iterdir()) == [path]


def test_a_damaged_checkpoint_never_replaces_the_one_before_it(path, monkeypatch):
    path.write_bytes(path.read_bytes()[:-5])

    def full(path, content):
        raise OutputError("no space")

    with monkeypatch.context() as patch:
        patch.setattr(module, "write_file", full)
        with pytest.raises(OutputError):
            save(path, 3)
    with pytest.warns(UserWarning, match="going on from the one before it"):
        assert load_checkpoint(path, IDENTITY).progress == {"step": 1}


def test_two_damaged_checkpoints_are_an_error_that_names_both(path):
    path.write_bytes(b"")
    previous_of(path).write_bytes(b"half")
    with pytest.raises(CheckpointError, match=rf"{path} .*; {previous_of(path)} .*Remove these files"):
        load_checkpoint(path, IDENTITY)


def test_one_that_cannot_be_read_is_not_taken_for_a_damaged_one(path):
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (0, limits[1]))
    try:
        with pytest.raises(OutputError, match=rf"{path} cannot be read: Too many open files\. Check it"):
            load_checkpoint(path, IDENTITY)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    assert load_checkpoint(path, IDENTITY).progress == {"step": 2}


def test_another_run_is_refused_with_the_differences_listed(path):
    other = IDENTITY | {"distill.alpha": 0.3, "dataset": "cifar10", "new": 1}
    with pytest.raises(CheckpointError) as error:
        load_checkpoint(path, other)
    assert (
        "belongs to another run: dataset is 'digits' there and 'cifar10' here, "
        "distill.alpha is 0.5 there and 0.3 here, new is not set there and 1 here. "
    ) in str(error.value)


def test_another_format_version_is_refused(path, monkeypatch):
    monkeypatch.setattr(module, "FORMAT", 2)
    with pytest.raises(CheckpointError, match="has checkpoint format 1; this version reads format 2"):
        load_checkpoint(path, IDENTITY)


def test_a_full_disk_leaves_the_last_checkpoint(path, monkeypatch):
    large = {"images": torch.zeros(100_000)}
    with full_disk(50_000), pytest.raises(OutputError, match="could not write"):
        save_checkpoint(path, large, identity=IDENTITY, progress={"step": 3})
    assert load_checkpoint(path, IDENTITY).progress == {"step": 2}
    assert sorted(path.parent.iterdir()) == sorted([path, previous_of(path)])


def test_what_is_imported_on_a_full_disk_is_not_kept_in_pieces(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "dont_write_bytecode", False)
    monkeypatch.syspath_prepend(str(tmp_path))
    for name in ("imported_here", "imported_there"):
        (tmp_path / f"{name}.py").write_text("x = 1\n" * 100)
    with full_disk(100):
        importlib.import_module("imported_here")
        subprocess.run([sys.executable, "-c", "import imported_there"], cwd=tmp_path, check=True)
    assert not (tmp_path / "__pycache__").exists()


def test_a_file_system_that_turns_read_only_is_told_as_one_and_nothing_is_left_behind(path, monkeypatch):
    def refuse(*_):
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(os, "replace", refuse)
    with pytest.raises(OutputError, match=r"could not write .*: Read-only file system"):
        save(path, 3)
    assert load_checkpoint(path, IDENTITY).progress == {"step": 2}
    assert sorted(path.parent.iterdir()) == sorted([path, previous_of(path)])


def test_a_file_system_without_links_serves_as_well(path, monkeypatch):
    def refuse(self, target):
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(Path, "hardlink_to", refuse)
    save(path, 3)
    assert [load_checkpoint(p, IDENTITY).progress["step"] for p in (path, previous_of(path))] == [3, 2]


def test_a_save_after_one_that_was_killed_halfway_leaves_nothing_behind(path):
    previous_of(path).unlink()
    previous_of(path).hardlink_to(path)  # killed before the new one was there
    save(path, 3)
    assert [load_checkpoint(p, IDENTITY).progress["step"] for p in (path, previous_of(path))] == [3, 2]
    assert sorted(path.parent.iterdir()) == sorted([path, previous_of(path)])


def save_again_and_again(path, saved):
    for step in itertools.count():
        x = torch.full((200_000,), float(step))
        save_checkpoint(path, {"x": x}, identity={}, progress={"step": step})
        saved.put(step)


def test_a_process_killed_while_it_saves_leaves_a_whole_checkpoint(tmp_path):
    path = tmp_path / "checkpoint.safetensors"
    for attempt in range(3):
        saved = context.SimpleQueue()
        process = start(save_again_and_again, path, saved)
        for _ in range(5 + 3 * attempt):
            received(saved, process)
        process.kill()
        process.join()
        found = load_checkpoint(path, {})
        assert found.tensors["x"].unique().tolist() == [found.progress["step"]]


@pytest.mark.parametrize(
    "content",
    [
        b"\x80\x04cos\nsystem\n(S'true'\ntR.",  # nothing is unpickled
        safetensors.torch.save({"weights": torch.ones(1)}),
        safetensors.torch.save({}, {"format": "pt"}),
        safetensors.torch.save({}, {"checkpoint": "{"}),
    ],
)
def test_what_is_no_checkpoint_is_passed_over(path, content):
    path.write_bytes(content)
    with pytest.warns(UserWarning, match="not a whole checkpoint"):
        assert load_checkpoint(path, IDENTITY).progress == {"step": 1}


def test_the_identity_is_that_of_the_newest_whole_checkpoint(path):
    previous = json.loads(json.dumps(IDENTITY))
    save_checkpoint(path, {}, identity={"seed": 1}, progress={})
    assert identity_of(path) == {"seed": 1}
    path.write_bytes(path.read_bytes()[:-5])
    assert identity_of(path) == previous
    previous_of(path).write_bytes(b"")
    assert identity_of(path) is None


def test_what_a_killed_save_of_a_process_with_this_id_left_is_removed(path):
    path.with_name(f".{path.name}.{os.getpid()}.tmp").write_bytes(b"half")  # in a container it is often 1
    save(path, 3)
    assert [load_checkpoint(p, IDENTITY).progress["step"] for p in (path, previous_of(path))] == [3, 2]
    assert sorted(path.parent.iterdir()) == sorted([path, previous_of(path)])


@pytest.mark.parametrize("change", [(b"[3,2]", b"[2,3]"), (b'"images"', b'"imagep"'), (b"F32", b"I32")])
def test_a_header_that_does_not_fit_its_tensors_any_more_is_damage(path, change):
    path.write_bytes(path.read_bytes().replace(*change))
    with pytest.warns(UserWarning, match="its content differs from its checksum"):
        assert load_checkpoint(path, IDENTITY).progress == {"step": 1}


def test_a_later_format_of_another_build_is_refused_and_not_taken_for_damage(path):
    path.write_bytes(safetensors.torch.save({}, {"checkpoint": json.dumps({"format": 2})}))
    with pytest.raises(CheckpointError, match="has checkpoint format 2; this version reads format 1"):
        load_checkpoint(path, IDENTITY)
    save(path, 3)  # by a run that begins anew
    assert load_checkpoint(path, IDENTITY).progress == {"step": 3}


def test_tensors_come_back_whatever_their_order_strides_and_gradients(path):
    tensors = {"z": torch.arange(6).view(2, 3).t(), "a": torch.ones(2, requires_grad=True)}
    save_checkpoint(path, tensors, identity={}, progress={})
    found = load_checkpoint(path, {}).tensors
    path.write_bytes(bytes(path.stat().st_size))  # what was verified is what they keep
    assert all(torch.equal(found[name], tensor) for name, tensor in tensors.items())
