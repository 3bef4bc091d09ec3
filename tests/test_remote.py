"""`from_hub`: pinned, verified, cached, by the genuine client over HTTP from the loopback Hub."""

import contextlib
import copy
import json
import os
import shutil
import tempfile
import threading
import time
from pathlib import Path

import pytest
import torch
from artifacts import flip, make_artifact, make_folder
from hub_server import Blob, LoopbackHub
from huggingface_hub import HfApi, constants, get_session
from interruptions import full_disk

from distilled_data import (
    AccessError,
    ArtifactError,
    DistilledDataError,
    DistilledDataset,
    FormatError,
    HubError,
    IntegrityError,
    OutputError,
    UsageError,
    client,
    manifest,
)
from distilled_data.format import ARTIFACT_FILE, MANIFEST_FILE
from distilled_data.manifest import Fingerprint, Index
from distilled_data.remote import Repository
from hub import PushOptions, push_folder
from hub.plan import hub_api

REPO = "org/digits"


@pytest.fixture(scope="module")
def published(folders):
    with LoopbackHub() as hub:
        push_folder(folders[2], REPO, PushOptions(revision="v1", endpoint=hub.url, token="hf_alice"))
        yield hub


@pytest.fixture
def hub(loopback, published):
    """A Hub with the set of two images per class, tagged v1."""
    loopback.repositories = copy.deepcopy(published.repositories)
    loopback.large = dict(published.large)
    return loopback


@pytest.fixture
def load(hub, tmp_path):
    def load(repo_id=REPO, **arguments):
        return DistilledDataset.from_hub(
            repo_id, **{"endpoint": hub.url, "cache_dir": tmp_path / "hub"} | arguments
        )

    return load


def cached(name, tmp_path) -> Path:
    [path] = (tmp_path / "hub").rglob(f"snapshots/*/{name}")
    return path.resolve()


def equal(one, two) -> bool:
    return torch.equal(one.artifact.images, two.artifact.images) and one.info == two.info


def in_hash(manifest: bytes) -> int:
    """Offset of a digit of the artifact's sha256."""
    return manifest.index(b'"sha256"', manifest.index(ARTIFACT_FILE.encode())) + 20


# What is loaded


def test_a_branch_a_tag_and_a_commit_give_the_set_that_was_published_pinned_to_its_commit(hub, load, folders):
    commit, published = hub.head(REPO).oid, DistilledDataset.from_folder(folders[2])
    for data in (
        load(), load(revision="main"), load(revision="v1"), load(f"{REPO}@v1"), load(f"{REPO}@{commit}"),
    ):  # fmt: skip
        assert equal(data, published)
        assert (data.revision, data.content_hash) == (commit, published.content_hash)
    assert published.revision is None
    data.verify()


@pytest.mark.parametrize("form", ["{}", "../../../../{0.name}"])
def test_a_server_does_not_choose_where_files_are_written(load, tmp_path, monkeypatch, form):
    outside = tmp_path / "outside"
    monkeypatch.setattr(Blob, "oid", property(lambda _: form.format(outside)))
    with pytest.raises(HubError, match="names a file by a path, which may lead out of the cache"):
        load()
    assert not list(tmp_path.rglob("outside*"))


def test_a_subset_is_what_a_selection_from_the_whole_is(load):
    part = load(ipc=1, classes=["seven", "one"], labels="hard")
    whole = load().select(1, ["seven", "one"]).with_labels("hard")
    assert equal(part, whole)
    assert part[5][1] == whole[5][1] == 1
    assert part.revision == whole.revision


def test_only_the_manifest_and_the_artifact_are_fetched(hub, load):
    load()
    manifest, artifact = [path for method, path, _ in hub.requests if method == "GET"]
    assert manifest.endswith(f"/{MANIFEST_FILE}")
    assert artifact == f"/cdn/{hub.head(REPO).tree[ARTIFACT_FILE].sha256}"


def test_a_warm_cache_asks_once_for_a_branch_and_never_for_a_commit_but_verifies(hub, load, tmp_path):
    data = load()
    hub.requests.clear()
    load()
    assert [method for method, *_ in hub.requests] == ["HEAD"]
    hub.requests.clear()
    load(revision=data.revision)
    assert hub.requests == []
    flip(cached(ARTIFACT_FILE, tmp_path))
    assert equal(load(revision=data.revision), data)  # fetched anew


def test_a_load_stays_on_one_commit_while_somebody_publishes(hub, load, folders):
    first = hub.head(REPO).oid

    def publish():
        hub.put(REPO, MANIFEST_FILE, (folders[1] / MANIFEST_FILE).read_bytes())
        hub.put(REPO, ARTIFACT_FILE, (folders[1] / ARTIFACT_FILE).read_bytes())

    hub.fault("HEAD .*safetensors", "do", publish)  # between the manifest and the artifact
    assert (load().ipc, load(revision=first).ipc, load().ipc) == (2, 2, 1)


def test_a_default_that_is_altered_in_the_index_is_refused(hub, load, folders):
    push_folder(folders[3], REPO, PushOptions(endpoint=hub.url, token="hf_alice"))
    index = hub.files(REPO)[MANIFEST_FILE]
    hub.put(REPO, MANIFEST_FILE, index.replace(b'"default": "ipc2"', b'"default": "ipc3"'))
    with pytest.raises(FormatError, match="checksum"):
        load()


def test_a_file_that_changes_between_its_verification_and_its_reading_is_refused(load, tmp_path, monkeypatch):
    data = load()
    read = manifest.read_artifact

    def damaged(path, **arguments):
        flip(path)
        return read(path, **arguments)

    monkeypatch.setattr(manifest, "read_artifact", damaged)
    with pytest.raises(IntegrityError, match="changed while it was read"):
        load(revision=data.revision, local_files_only=True)


@pytest.mark.parametrize("ipc", [None, 1])
def test_a_file_that_is_replaced_by_its_like_while_it_is_read_is_read_again(load, monkeypatch, ipc):
    data = load(ipc=ipc)
    read, replaced = manifest.read_artifact, []

    def replace_first(path, **arguments):
        if len(replaced) < 3:  # as other processes do that repair the same cache
            fresh = path.with_name("fresh")
            shutil.copyfile(path, fresh)
            os.replace(fresh, path.resolve())
            replaced.append(path)
        return read(path, **arguments)

    monkeypatch.setattr(manifest, "read_artifact", replace_first)
    assert equal(load(revision=data.revision, ipc=ipc, local_files_only=True), data)
    assert len(replaced) == 3


@pytest.mark.parametrize("replaced", [True, False])
def test_what_the_reader_makes_of_two_files_is_read_again_and_an_error_of_one_is_told(
    load, monkeypatch, replaced
):
    data, read = load(), manifest.read_artifact

    def torn(path, **arguments):
        monkeypatch.setattr(manifest, "read_artifact", read)
        if replaced:
            shutil.copyfile(path, path.with_name("fresh"))
            os.replace(path.with_name("fresh"), path.resolve())
        raise RuntimeError("the file is smaller than the required mapping size")

    monkeypatch.setattr(manifest, "read_artifact", torn)
    with contextlib.nullcontext() if replaced else pytest.raises(RuntimeError, match="mapping size"):
        assert equal(load(revision=data.revision, local_files_only=True), data)


@pytest.mark.parametrize("arguments", [{"local_files_only": True}, {}])
def test_a_set_in_the_cache_loads_without_the_hub(hub, load, monkeypatch, arguments):
    data = load(revision="v1")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", not arguments)
    hub.requests.clear()
    assert equal(load(revision="v1", **arguments), data)
    assert hub.requests == []
    with pytest.raises(AccessError, match="not in the cache"):
        load("org/other", **arguments)
    with pytest.raises(AccessError, match="by the name that it was loaded by"):
        load(**arguments)  # the same commit, as it happens, of the default branch


@pytest.mark.parametrize("arguments", [{"local_files_only": True}, {}])
def test_what_is_damaged_in_the_cache_is_refused_without_the_hub_with_advice(load, monkeypatch, arguments):
    data = load(revision="v1")
    flip((data.folder / ARTIFACT_FILE).resolve())
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", not arguments)
    with pytest.raises(IntegrityError, match="Loaded with a connection, it is fetched again"):
        load(revision="v1", **arguments)


def test_a_hub_that_cannot_be_reached_leaves_the_cache_usable(load):
    data = load()
    assert equal(load(endpoint="http://127.0.0.1:9"), data)


def test_what_the_hub_refuses_by_now_comes_from_the_cache_with_a_warning(hub, load):
    data = load(revision="v1")
    hub.repositories[REPO].private = True
    for token in (None, "hf_bob", "hf_wrong", "hf_alice"):
        if token == "hf_alice":
            hub.fault("HEAD ", "status", 403)
        with pytest.warns(UserWarning, match=f"refuses {REPO}@v1") as caught:
            assert equal(load(revision="v1", token=token), data)
        assert [warning.filename for warning in caught] == [__file__]  # that of the call
    assert equal(load(revision="v1", token="hf_alice"), data)
    assert equal(load(revision=data.revision), data)  # a commit is what it was


def test_two_revisions_at_once_are_refused(load):
    with pytest.raises(UsageError, match="another"):
        load(f"{REPO}@v1", revision="v2")


# Faults: never a wrong image, never a lost file, an error of this project that says what to do


@pytest.mark.parametrize("name", [ARTIFACT_FILE, MANIFEST_FILE])
@pytest.mark.parametrize("harm", ["flip", "truncate", "empty"])
def test_a_damaged_file_in_the_cache_is_fetched_again(load, tmp_path, name, harm):
    data = load()
    path = cached(name, tmp_path)
    content = path.read_bytes()
    if harm == "flip":
        flip(path, in_hash(content) if name == MANIFEST_FILE else -1)
    else:
        path.write_bytes(content[: len(content) // 2] if harm == "truncate" else b"")
    assert equal(load(revision=data.revision), data)
    assert cached(name, tmp_path).read_bytes() == content


@pytest.mark.parametrize("name", [ARTIFACT_FILE, MANIFEST_FILE])
def test_a_damaged_file_in_a_cache_without_links_is_fetched_again(hub, load, tmp_path, monkeypatch, name):
    data = load()
    copied = tmp_path / "copied"
    shutil.copytree(tmp_path / "hub", copied)  # as from a file system that has no links
    [path] = copied.rglob(f"snapshots/*/{name}")
    content = path.read_bytes()
    assert not path.is_symlink()
    flip(path, in_hash(content) if name == MANIFEST_FILE else -1)
    shutil.rmtree(copied / "datasets--org--digits" / "blobs")
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_SYMLINKS", True)
    hub.fault("HEAD ", "status", 403, times=1)
    with pytest.raises(ArtifactError, match="could not be fetched again"):
        load(revision=data.revision, cache_dir=copied)
    assert path.exists()
    assert equal(load(revision=data.revision, cache_dir=copied), data)
    hub.requests.clear()
    assert equal(load(revision=data.revision, cache_dir=copied), data)
    assert hub.requests == []
    assert {entry.name for entry in path.parent.iterdir()} == {ARTIFACT_FILE, MANIFEST_FILE}
    assert not list(copied.rglob(".fetched-*"))
    failed = []

    def read():
        while forcing.is_alive():
            try:
                load(revision=data.revision, cache_dir=copied, local_files_only=True)
            except DistilledDataError as error:
                failed.append(error)

    def force():
        for _ in range(10):
            load(revision=data.revision, cache_dir=copied, force_download=True)

    forcing = threading.Thread(target=force)
    forcing.start()
    read()
    assert failed == []


def test_a_set_that_is_swapped_with_its_manifest_is_not_the_one_of_the_index(hub, load, folders, tmp_path):
    push_folder(folders[1], REPO, PushOptions(endpoint=hub.url, token="hf_alice"))
    other = make_folder(tmp_path / "other", make_artifact(1, logits=False))
    for name in (ARTIFACT_FILE, MANIFEST_FILE):
        hub.put(REPO, f"ipc1/{name}", (other / name).read_bytes())
    with pytest.raises(IntegrityError, match=r"It is ipc1/manifest\.json of org/digits"):
        load(ipc=1)


def test_a_branch_that_is_fetched_again_leaves_older_commits_as_they_are(hub, load, folders, tmp_path):
    old, copied = load(), tmp_path / "copied"
    shutil.copytree(tmp_path / "hub", copied)  # as from a file system that has no links
    push_folder(folders[3], REPO, PushOptions(endpoint=hub.url, token="hf_alice", default=True))
    assert load(cache_dir=copied, force_download=True).ipc == 3
    assert equal(load(revision=old.revision, cache_dir=copied, local_files_only=True), old)


def test_after_a_repair_nothing_else_is_downloaded_again(hub, load, tmp_path):
    load()
    flip(cached(MANIFEST_FILE, tmp_path))
    repository = Repository(REPO, endpoint=hub.url, cache_dir=tmp_path / "hub")
    assert repository.names() == [""]
    hub.requests.clear()
    repository.fetch_whole("")
    assert hub.requests == []


def test_damage_in_a_cache_that_cannot_be_written_is_named(load, tmp_path):
    data = load()
    flip(cached(ARTIFACT_FILE, tmp_path))
    shutil.rmtree(tmp_path / "hub" / ".locks")
    (tmp_path / "hub" / ".locks").write_text("in the way")
    with pytest.raises(IntegrityError, match=r"not the file that was published.*could not be fetched again"):
        load(revision=data.revision)


def test_a_damaged_cache_is_refused_offline_and_left_for_later(load, tmp_path):
    data = load()
    flip(cached(ARTIFACT_FILE, tmp_path))
    with pytest.raises(IntegrityError, match="not the file that was published"):
        load(local_files_only=True)
    assert equal(load(), data)


@pytest.mark.parametrize("route", ["GET /cdn/", f"GET .*/{MANIFEST_FILE}"])
def test_a_byte_flipped_on_its_way_is_fetched_again_once(hub, load, route):
    hub.fault(route, "flip", in_hash(hub.files(REPO)[MANIFEST_FILE]))
    assert load().ipc == 2


def test_a_byte_that_is_always_flipped_on_its_way_is_refused(hub, load):
    hub.fault("GET /cdn/", "flip", 70, times=99)
    with pytest.raises(IntegrityError):
        load()
    assert sum(path.startswith("/cdn/") for _, path, _ in hub.requests) == 2  # once more, not for ever


def test_a_byte_flipped_on_the_server_is_refused(hub, load):
    sha256 = hub.head(REPO).tree[ARTIFACT_FILE].sha256
    hub.large[sha256] = hub.large[sha256][:-1] + b"\x01"
    with pytest.raises(IntegrityError, match="expected sha256"):
        load()


def test_a_file_that_is_shorter_on_the_server_is_refused(hub, load):
    sha256 = hub.head(REPO).tree[ARTIFACT_FILE].sha256
    hub.large[sha256] = hub.large[sha256][:100]
    with pytest.raises((HubError, IntegrityError)):
        load()


def test_an_artifact_of_another_commit_than_its_manifest_is_refused(hub, load, folders):
    hub.put(REPO, ARTIFACT_FILE, (folders[1] / ARTIFACT_FILE).read_bytes())
    with pytest.raises(IntegrityError):
        load()
    assert load(revision="v1").ipc == 2


@pytest.mark.parametrize("times", [1, 99])
@pytest.mark.parametrize(
    ("route", "kind", "value"),
    [("GET /cdn/", "cut", 50)]
    + [(route, "status", code) for route in ("GET /cdn/", "HEAD .*safetensors") for code in (429, 500, 503)],
)
def test_a_failing_hub_is_tried_again_and_then_named(hub, load, route, kind, value, times):
    hub.fault(route, kind, value, times=times)
    if times == 1:
        assert load().ipc == 2
    else:
        with pytest.raises(HubError, match="Try again later"):
            load()


def test_a_hub_that_fails_while_a_damaged_file_is_repaired_leaves_the_damage_named(hub, load, tmp_path):
    data = load()
    flip(cached(ARTIFACT_FILE, tmp_path))
    hub.fault("HEAD ", "status", 503)  # once: tried again
    assert equal(load(revision=data.revision), data)
    flip(cached(ARTIFACT_FILE, tmp_path))
    hub.fault("HEAD ", "status", 503, times=99)
    with pytest.raises(IntegrityError, match=r"not the file that was published.*could not be fetched again"):
        load(revision=data.revision)


def test_a_hub_that_asks_for_a_long_pause_is_named_at_once(hub, load):
    hub.fault("GET /cdn/", "pause", 60)
    with pytest.raises(HubError, match="takes no more requests for 60 seconds"):
        load()


def test_a_slow_hub_is_waited_for(hub, load):
    hub.fault("GET /cdn/", "slow", 1000)
    assert load().ipc == 2


@pytest.mark.parametrize(
    ("change", "repo_id", "token", "message"),
    [
        (None, "org/nothing", None, "does not exist, or it is private"),
        (None, "org/nothing", "hf_bob", "does not exist, or it is private"),
        ({"private": True}, REPO, "hf_bob", "does not exist, or it is private"),
        ({"gated": "auto"}, REPO, "hf_bob", "is gated"),
        ({"gated": "auto"}, REPO, None, "is gated"),
        (None, REPO, "hf_wrong", "does not accept the token"),
        (None, f"{REPO}@v2", None, "no such revision"),
        (None, f"{REPO}@0123abc", None, "all 40 digits"),
        (None, "a b/c", None, "not a repository name"),
    ],
)
def test_what_is_missing_or_not_allowed_is_said_without_the_token(hub, load, change, repo_id, token, message):
    for name, value in (change or {}).items():
        setattr(hub.repositories[REPO], name, value)
    with pytest.raises((AccessError, UsageError), match=message) as caught:
        load(repo_id, token=token)
    assert repo_id.partition("@")[0] in str(caught.value)
    assert "hf_" not in str(caught.value)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"token": "hf_secret\n"}, "token holds characters"),
        ({"token": "hf_\xc9"}, "token holds characters"),
        ({"endpoint": "huggingface.co"}, "is no address"),
        ({"repo_id": f"{REPO}@"}, "is empty"),
        ({"revision": ""}, "is empty"),
        ({"revision": 1.0}, "must be a text"),
        ({"local_files_only": True, "force_download": True}, "choose one"),
    ],
)
def test_arguments_that_can_never_work_are_refused_before_anything_is_sent(hub, load, arguments, message):
    with pytest.raises(UsageError, match=message) as caught:
        load(**arguments)
    assert "hf_secret" not in str(caught.value)
    assert hub.requests == []


def test_a_private_and_gated_repository_opens_for_its_owner(hub, load):
    hub.repositories[REPO].private, hub.repositories[REPO].gated = True, "manual"
    assert load(token="hf_alice").ipc == 2


def test_a_tag_that_was_deleted_is_said_to_be_and_its_commit_still_loads(hub, load):
    commit = load(revision="v1").revision
    del hub.repositories[REPO].refs["refs/tags/v1"]
    with pytest.raises(AccessError, match="no such revision"):
        load(revision="v1")
    assert load(revision=commit).ipc == 2


def test_a_repository_of_something_else_is_named_as_one(hub, load):
    del hub.head(REPO).tree[MANIFEST_FILE]
    with pytest.raises(AccessError, match="lacks a file that a distilled set has"):
        load()


def test_the_token_goes_to_the_hub_alone_and_is_written_nowhere(hub, load, tmp_path):
    data = load(token="hf_alice")
    assert {token for _, path, token in hub.requests if path.startswith("/cdn/")} == {None}
    assert {token for _, path, token in hub.requests if not path.startswith("/cdn/")} == {"hf_alice"}
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert files
    assert not any(b"hf_alice" in path.read_bytes() for path in files)
    assert "hf_alice" not in repr(data)


def test_a_full_disk_is_said_to_be_and_the_next_load_is_whole(load):
    with full_disk(2000), pytest.raises(OutputError, match="cannot be read or written"):
        load()
    assert load().ipc == 2


def test_a_cache_with_a_file_in_the_place_of_a_folder_is_named(load, tmp_path):
    blobs = tmp_path / "hub" / "datasets--org--digits" / "blobs"
    blobs.parent.mkdir(parents=True)
    blobs.touch()
    with pytest.raises(OutputError, match=rf"{blobs} cannot be read or written: File exists\..* HF_HOME"):
        load()


def test_a_cache_that_cannot_be_written_serves_what_it_holds_and_says_so_else(hub, load, folders):
    user = os.geteuid()
    with tempfile.TemporaryDirectory() as cache:
        data = load(cache_dir=cache)
        push_folder(folders[1], REPO, PushOptions(endpoint=hub.url, token="hf_alice"))
        paths = [path for path in (Path(cache), *Path(cache).rglob("*")) if not path.is_symlink()]
        try:
            for path in paths:
                path.chmod(0o555 if path.is_dir() else 0o444)
            if user == 0:
                os.seteuid(65534)  # root may write anything
            assert equal(load(revision=data.revision, cache_dir=cache), data)
            with pytest.raises(OutputError, match="cannot be read or written"):
                load(cache_dir=cache)
        finally:
            os.seteuid(user)
            for path in paths:
                path.chmod(0o755)


# Malicious publishers: everything matches its manifest


def poisoned(hub, artifact: bytes = b"", **changes):
    """Publish `artifact` with a manifest that agrees, but for `changes`."""
    manifest = json.loads(hub.files(REPO)[MANIFEST_FILE])
    if artifact:
        found = Fingerprint.of_bytes(artifact)
        manifest["files"][ARTIFACT_FILE] = {"sha256": found.sha256, "size": found.size}
        hub.put(REPO, ARTIFACT_FILE, artifact)
    hub.put(REPO, MANIFEST_FILE, json.dumps(manifest | changes).encode())


def header(content: bytes, change) -> bytes:
    """A safetensors file with its JSON header put through `change`."""
    size = int.from_bytes(content[:8], "little")
    text = change(content[8 : 8 + size])
    return len(text).to_bytes(8, "little") + text + content[8 + size :]


@pytest.mark.parametrize(
    "change",
    [
        lambda text: text.replace(b'"shape":[2,', b'"shape":[4611686018427387904,'),  # times 4 is 2**64
        lambda text: text.replace(b'"images"', b'"../../images"'),
        lambda text: text.replace(
            b'{"__metadata__"', b'{"__metadata__":{"distilled_data":"{}"},"__metadata__"'
        ),
        lambda text: text.replace(b"U8", b"I8"),
        lambda text: b"[" * 1000,
    ],
)
def test_a_header_with_tricks_is_refused_with_an_error_of_ours(hub, load, change):
    poisoned(hub, header(hub.files(REPO)[ARTIFACT_FILE], change))
    with pytest.raises(FormatError):
        load()


def test_a_header_of_100_megabytes_is_refused_before_it_is_read(hub, load):
    text = b'{"__metadata__":{"distilled_data":"' + b"x" * 100_000_000 + b'"}}'
    poisoned(hub, len(text).to_bytes(8, "little") + text + bytes(8))
    start = time.monotonic()
    with pytest.raises(FormatError, match="header of 1000000"):
        load()
    assert time.monotonic() - start < 30


@pytest.mark.parametrize(
    "changes",
    [
        {"files": {"../../../tmp/x": {"sha256": "0" * 64, "size": 1}}},
        {"configurations": {"../ipc1": {"sha256": "0" * 64, "size": 1}}, "default": "../ipc1"},
    ],
)
def test_a_manifest_with_paths_that_lead_elsewhere_is_refused(hub, load, changes):
    poisoned(hub, **changes)
    with pytest.raises(FormatError, match="not a manifest"):
        load()


def test_an_index_that_points_at_an_index_is_refused(hub, load, tmp_path):
    inner = Index("ipc2", {"ipc2": Fingerprint("0" * 64, 1)}).to_bytes()
    outer = Index("ipc1", {"ipc1": Fingerprint.of_bytes(inner)}).to_bytes()
    hub.put(REPO, f"ipc1/{MANIFEST_FILE}", inner)
    hub.put(REPO, MANIFEST_FILE, outer)
    with pytest.raises(FormatError, match=r"index inside an index; expected the manifest of a set\.$"):
        load()
    with pytest.raises(FormatError, match="is an index; expected the manifest of a set"):
        Repository(REPO, endpoint=hub.url, cache_dir=tmp_path / "hub").fetch_alone("ipc1")


def test_a_folder_in_the_place_of_a_cached_file_is_damage(load, tmp_path):
    data = load()
    path = cached(ARTIFACT_FILE, tmp_path)
    path.unlink()
    path.mkdir()
    with pytest.raises(IntegrityError, match="cannot be read"):
        load(revision=data.revision, local_files_only=True)


@pytest.mark.parametrize(
    "secret", ["https://cdn/x?signature=abc", "ba84?signature=abc", "Bearer abc", "hf_abc"]
)
def test_what_the_client_says_is_told_without_addresses_and_tokens(secret):
    def fails():
        raise ValueError(f"it is {secret} that failed")

    with pytest.raises(HubError, match=r"it is .*that failed") as caught:
        client.once(REPO, fails)
    assert "abc" not in str(caught.value)


# Patience


def test_our_requests_get_a_time_limit_and_those_of_others_keep_theirs(hub, load, monkeypatch):
    limits = []

    def look(request):
        limits.append(request.extensions["timeout"]["read"])

    load()
    monkeypatch.setattr(client, "LIMIT", 5.0)  # the client's own for what it asks of a file is 10
    session = get_session()
    session.event_hooks["request"].append(look)
    try:
        client.call(REPO, Repository(REPO, endpoint=hub.url)._commit_now)
        client.call(REPO, HfApi(endpoint=hub.url, library_name=client.LIBRARY).dataset_info, REPO)
        client.call(REPO, HfApi(endpoint=hub.url, library_name="another").dataset_info, REPO)
        with contextlib.suppress(AccessError):
            options = PushOptions(endpoint=hub.url, token="hf_bob")
            client.call(REPO, hub_api(options).create_tag, REPO, tag="v2", repo_type="dataset")
    finally:
        session.event_hooks["request"].remove(look)
    theirs = session.timeout.read or client.WRITE_LIMIT  # huggingface_hub 1.4 waits for 10 seconds
    assert limits == [client.LIMIT, client.LIMIT, None, min(client.WRITE_LIMIT, theirs)]


def test_requests_of_others_go_out_however_long_ours_have_failed(hub, load, monkeypatch):
    monkeypatch.setattr(client, "PATIENCE", 0.2)
    hub.fault("", "status", 503, times=99)
    with pytest.raises(HubError, match="Try again later"):
        load()
    hub.faults.clear()
    time.sleep(0.3)

    def upload(name):
        api, content = HfApi(endpoint=hub.url, token="hf_alice"), name.encode()
        api.upload_file(path_or_fileobj=content, path_in_repo=name, repo_id=REPO, repo_type="dataset")

    hub.fault("PUT ", "do", lambda: time.sleep(1))
    slow = threading.Thread(target=upload, args=["one.safetensors"])
    slow.start()
    time.sleep(0.5)
    upload("two.safetensors")
    slow.join()
    assert {"one.safetensors", "two.safetensors"} <= set(hub.files(REPO))


def test_a_hub_that_never_answers_is_given_up(hub, load, monkeypatch):
    monkeypatch.setattr(client, "LIMIT", 0.2)
    monkeypatch.setattr(client, "PATIENCE", 0.5)
    hub.fault("", "hang", 5, times=99)
    start = time.monotonic()
    with pytest.raises(HubError, match="gave no answer for 1 seconds"):
        load()
    assert time.monotonic() - start < 4


def test_the_tensors_of_a_whole_set_are_the_memory_that_was_hashed(load, monkeypatch):
    data = load()
    read = manifest.read_artifact

    def damaged(path, **arguments):
        before = path.stat()
        flip(path)
        os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))  # nothing shows it but the bytes
        return read(path, **arguments)

    monkeypatch.setattr(manifest, "read_artifact", damaged)
    assert equal(load(revision=data.revision, local_files_only=True), data)


def test_a_file_of_another_size_is_refused_before_it_is_read(load, tmp_path):
    data = load()
    os.truncate(cached(ARTIFACT_FILE, tmp_path), 2**40)  # more than there is memory
    with pytest.raises(IntegrityError, match="got 1099511627776 bytes"):
        load(revision=data.revision, local_files_only=True)


@pytest.mark.parametrize("part", [{"ipc": 1}, {"classes": ["one", "two"]}])
def test_a_part_of_a_set_is_not_read_into_memory_whole(load, monkeypatch, part):
    monkeypatch.setattr(manifest, "read_hashed", None)
    assert load(**part).artifact.images.shape[:2] in [(1, 10), (2, 2)]


def test_an_answer_that_asks_to_wait_does_not_renew_the_patience(hub, load, monkeypatch):
    monkeypatch.setattr(client, "PATIENCE", 0.02)
    hub.fault("GET /cdn/", "status", 429, times=99)
    with pytest.raises(HubError, match="gave no answer"):
        load()


def test_a_file_that_arrives_too_short_is_fetched_again(hub, load):
    hub.fault("GET /cdn/", "truncate", 100)
    assert load().ipc == 2


def test_a_shorter_time_limit_than_ours_stays(hub):
    limits = []

    def look(request):
        limits.append(request.extensions["timeout"]["read"])

    api, session = HfApi(endpoint=hub.url, library_name=client.LIBRARY), get_session()
    client.call(REPO, api.dataset_info, REPO)  # our own hook is there from now on
    session.event_hooks["request"].append(look)
    try:
        client.call(REPO, api.dataset_info, REPO, timeout=3)
    finally:
        session.event_hooks["request"].remove(look)
    assert limits == [3]


def test_an_error_without_words_is_told_by_its_name():
    def fails():
        raise ValueError

    with pytest.raises(HubError, match="client failed for org/digits: ValueError: ValueError"):
        client.once(REPO, fails)


def test_a_session_that_the_client_closed_is_a_connection_that_failed(monkeypatch):
    """As huggingface_hub 1 does it where a connection is refused."""
    monkeypatch.setattr(client, "PAUSES", (0.0,))
    asked = []

    def request(tries: int) -> str:
        asked.append(tries)
        if len(asked) < tries:
            raise RuntimeError("Cannot send a request, as the client has been closed.")
        return "answer"

    assert client.call(REPO, request, 2) == "answer"
    asked.clear()
    with pytest.raises(HubError, match=r"the Hub failed for org/digits: .*closed\. Try again later\.$"):
        client.call(REPO, request, 3)


def test_without_an_endpoint_it_is_the_one_of_the_environment(load):
    with pytest.raises(HubError, match="the Hub failed for org/digits"):  # where nobody listens
        load(endpoint=None)


def test_a_hub_that_asks_for_a_short_pause_gets_it(hub, load):
    hub.fault("GET /cdn/", "pause", 1)
    assert load().ipc == 2


def test_calls_leave_one_hook_on_the_session_however_many_they_are(load):
    load()
    load()
    hooks = get_session().event_hooks
    assert hooks["request"].count(client._watch.sent) == 1
    assert hooks["response"].count(client._watch.answered) == 1


@pytest.mark.parametrize("bug", [TypeError, AssertionError])
def test_a_mistake_in_a_program_is_not_told_as_a_failure_of_the_hub(bug):
    def fails():
        raise bug("ours")

    with pytest.raises(bug, match="ours"):
        client.once(REPO, fails)
