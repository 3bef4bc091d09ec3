"""Manifests: what is altered, missing or not a manifest is refused; the index chooses a set by its size."""

import dataclasses
import json

import numpy as np
import pytest

from distilled_data import FormatError, IntegrityError, NewerFormatError, UsageError
from distilled_data import format as f
from distilled_data import manifest as m
from distilled_data.manifest import (
    MAX_BYTES,
    Fingerprint,
    Index,
    parse_manifest,
    read_manifest,
    replace_artifact,
    verify_folder,
    write_manifest,
)

SHA = "0" * 64


@pytest.fixture
def folder(tmp_path, artifact):
    f.write_artifact(tmp_path / f.ARTIFACT_FILE, artifact)
    return tmp_path


def index(*sizes, default):
    return Index(f"ipc{default}", {f"ipc{size}": Fingerprint(SHA, 1) for size in sizes})


def test_a_content_hash_that_is_not_the_artifacts_fails_verification(folder):
    manifest = json.loads(write_manifest(folder).to_bytes())
    (folder / f.MANIFEST_FILE).write_text(json.dumps(manifest | {"content_hash": SHA}))
    with pytest.raises(IntegrityError, match=r"the artifact is \w+\. Get the folder again\.$"):
        verify_folder(folder)


def test_a_set_verifies_whose_artifact_is_new_already_and_whose_manifest_is_not(
    folder, artifact, monkeypatch
):
    old = write_manifest(folder).to_bytes()
    measured = dataclasses.replace(artifact.metadata, results=({"ipc": 1},))
    replace_artifact(folder, dataclasses.replace(artifact, metadata=measured))
    new = (folder / f.MANIFEST_FILE).read_bytes()
    for others in (None, []):
        (folder / f.MANIFEST_FILE).write_bytes(old)
        monkeypatch.setattr(m.time, "sleep", lambda seconds: (folder / f.MANIFEST_FILE).write_bytes(new))
        verify_folder(folder, others)
        (folder / f.MANIFEST_FILE).write_bytes(old)
        monkeypatch.setattr(m.time, "sleep", lambda seconds: None)
        with pytest.raises(IntegrityError, match="not the file that was published"):
            verify_folder(folder, others)


@pytest.mark.parametrize(
    "changes",
    [
        {"files": {"../x": {"sha256": SHA, "size": 0}}},
        {"files": {f.PREVIEW_FILE: {"sha256": SHA, "size": 0}}},  # no artifact
        {"files": {f.ARTIFACT_FILE: {"sha256": "ABC", "size": 0}}},
        {"files": {f.ARTIFACT_FILE: {"sha256": SHA, "size": -1}}},
        {"files": {f.ARTIFACT_FILE: {"sha256": SHA, "size": float("inf")}}},
        {"files": []},
        {"content_hash": None},
        {"format_version": True},
        {"format_version": "1"},
        {"configurations": {}, "default": "ipc1"},
        {"configurations": {"ipc1": {"sha256": SHA, "size": 0}}, "default": "ipc2"},
        {"configurations": {"../x": {"sha256": SHA, "size": 0}}, "default": "../x"},
        {"configurations": {"ipc01": {"sha256": SHA, "size": 0}}, "default": "ipc01"},
    ],
)
def test_a_manifest_that_makes_no_sense_is_refused(folder, changes):
    manifest = json.loads(write_manifest(folder).to_bytes()) | changes
    with pytest.raises(FormatError, match="not a manifest"):
        parse_manifest(json.dumps(manifest).encode(), "here")


@pytest.mark.parametrize("text", [b"", b"[]", b"{}", b"\xff", b"[" * 10_000, b" " * (MAX_BYTES + 1)])
def test_what_is_no_manifest_at_all_is_refused(text):
    with pytest.raises(FormatError, match=r"here is not a manifest .*\. Get the folder again\.$"):
        parse_manifest(text, "here")


def test_a_manifest_with_a_key_that_is_there_twice_is_refused(folder):
    text = write_manifest(folder).to_bytes().decode()
    twice = text.replace('"format_version"', f'"content_hash": "{SHA}", "format_version"')
    with pytest.raises(FormatError, match="twice"):
        parse_manifest(twice.encode(), "here")


@pytest.mark.parametrize(
    ("default", "name"),
    [(name, name) for name in ("../x", "ipc01", "ipc0", "ipc1/../..", "ipc1234567")] + [("ipc2", "ipc1")],
)
def test_an_index_of_other_folders_is_refused_though_its_checksum_is_right(default, name):
    with pytest.raises(FormatError, match="not ipc1, ipc2"):
        parse_manifest(Index(default, {name: Fingerprint(SHA, 1)}).to_bytes(), "here")


def test_the_checksum_of_an_index_is_that_of_published_ones():
    content = json.loads(Index("ipc1", {"ipc1": Fingerprint(SHA, 1)}).to_bytes())
    assert content["checksum"] == "08562effe82f072f6e7f484535f0eac52dd16b35c6a78d43d11bef59c4fa4670"


def test_a_manifest_larger_than_any_is_not_parsed(folder):
    content = write_manifest(folder).to_bytes()
    parse_manifest(content.ljust(MAX_BYTES), "here")
    with pytest.raises(FormatError, match="more than 1000000 bytes"):
        parse_manifest(content.ljust(MAX_BYTES + 1), "here")


def test_a_missing_manifest_and_a_folder_in_its_place_are_refused(tmp_path):
    with pytest.raises(FormatError, match="missing"):
        read_manifest(tmp_path)
    (tmp_path / f.MANIFEST_FILE).mkdir()
    with pytest.raises(FormatError, match=r"cannot be read: Is a directory\. Get the folder again\.$"):
        read_manifest(tmp_path)


def test_a_newer_manifest_says_to_upgrade(folder):
    manifest = json.loads(write_manifest(folder).to_bytes())
    (folder / f.MANIFEST_FILE).write_text(json.dumps(manifest | {"format_version": 2}))
    with pytest.raises(NewerFormatError, match="Upgrade"):
        read_manifest(folder)


def test_manifests_come_back_as_they_were_written(folder):
    manifest = write_manifest(folder)
    assert read_manifest(folder) == manifest
    assert parse_manifest(index(1, 10, default=10).to_bytes(), "here") == index(1, 10, default=10)
    assert index(1, 10, default=10).to_bytes() == index(10, 1, default=10).to_bytes()


@pytest.mark.parametrize(
    ("ipc", "name"),
    [
        (None, "ipc10"),
        (1, "ipc1"),
        (2, "ipc10"),
        (10, "ipc10"),
        (11, "ipc50"),
        (np.int64(2), "ipc10"),
        (50, "ipc50"),
    ],
)
def test_the_index_chooses_the_set_made_for_the_size_else_the_next_larger_one(ipc, name):
    assert index(50, 1, 10, default=10).choose(ipc) == name


@pytest.mark.parametrize("ipc", [0, -1, 51])
def test_a_size_that_no_set_of_the_index_has_is_refused_with_those_that_exist(ipc):
    with pytest.raises(UsageError, match="sets of 1, 10, 50 images per class"):
        index(50, 1, 10, default=10).choose(ipc)


@pytest.mark.parametrize("ipc", ["10", True, 1.0])
def test_a_size_that_is_no_number_is_refused(ipc):
    with pytest.raises(UsageError, match="ipc must be a whole number, got"):
        index(50, 1, 10, default=10).choose(ipc)


def test_a_folder_with_several_sets_is_not_verified_as_one(tmp_path):
    (tmp_path / f.MANIFEST_FILE).write_bytes(index(1, 10, default=10).to_bytes())
    with pytest.raises(FormatError, match="ipc1, ipc10"):
        verify_folder(tmp_path)
