"""Publishing with the genuine client, over HTTP, to the loopback Hub: one commit or none, and a tag."""

import dataclasses
import json
import threading
from pathlib import Path

import pytest
import yaml
from artifacts import make_artifact, make_folder
from hub_server import LARGE, TOKENS, Commit, Repository
from huggingface_hub import HfApi, constants

from distilled_data import (
    AccessError,
    ConflictError,
    DistilledDataset,
    FormatError,
    HubError,
    IntegrityError,
    NewerFormatError,
    UsageError,
)
from distilled_data.format import (
    ARTIFACT_FILE,
    CARD_FILE,
    FOLDER_FILES,
    MANIFEST_FILE,
    PARQUET_FILE,
    PREVIEW_FILE,
    read_artifact,
)
from distilled_data.manifest import Fingerprint, parse_manifest, write_manifest
from hub import PushOptions, check_access, plan_push, push, push_folder

ROW = {
    "dataset": "digits", "ipc": 2, "network": "convnet", "protocol": "ncfm", "labels": "hard", "n": 5,
    "last_mean": 91.26, "last_std": 0.42, "best_mean": 92.5, "best_std": 0.31, "random_mean": 80.0,
    "random_std": 2.04, "full_mean": 98.7, "full_std": None, "device": "2 cores",
}  # fmt: skip
WRITES = ("POST /api/repos", "PUT ", "DELETE ", "/commit/", "/tag/", "/settings")


@pytest.fixture
def options(loopback):
    def make(token="hf_alice", **changes):
        return PushOptions(endpoint=loopback.url, token=token, **changes)

    return make


def writes(loopback):
    log = [f"{method} {path}" for method, path, _ in loopback.requests]
    return [entry for entry in log if any(part in entry for part in WRITES)]


def commits(loopback, repo="org/digits"):
    return [commit.title for commit in loopback.repositories[repo].history()][:-1]  # but the initial one


def empty():
    return {"refs/heads/main": Commit.of("", {}, None)}


# The plan


def test_a_plan_says_what_it_creates_and_changes_nothing(loopback, options, folders):
    plan = plan_push(folders[2], "org/digits", options(revision="v1", private=True, gated="auto"))
    assert (plan.parent, {file.change for file in plan.files}) == (None, {"new"})
    assert {file.path for file in plan.files} == set(FOLDER_FILES)
    artifact = next(file for file in plan.files if file.path == ARTIFACT_FILE)
    for shown in ("org/digits", "private True, gated auto", "v1", artifact.hash):
        assert shown in str(plan)
    assert writes(loopback) == []
    assert "hf_alice" not in str(plan) + repr(plan)


def test_a_plan_tells_new_changed_and_unchanged_files_apart(loopback, options, folders, tmp_path):
    push_folder(folders[2], "org/digits", options())
    other = make_folder(tmp_path, make_artifact(2, source={"license": "MIT"}))
    changes = {file.path: file.change for file in plan_push(other, "org/digits", options()).files}
    same = {PREVIEW_FILE, "data/train.parquet"}
    assert changes == {path: "unchanged" if path in same else "changed" for path in FOLDER_FILES}


def test_a_damaged_or_incomplete_folder_is_not_planned(options, tmp_path):
    folder = make_folder(tmp_path, make_artifact())
    preview = (folder / PREVIEW_FILE).read_bytes()
    (folder / PREVIEW_FILE).write_bytes(b"")
    with pytest.raises(IntegrityError):
        plan_push(folder, "org/digits", options())
    (folder / PREVIEW_FILE).write_bytes(preview)
    manifest = json.loads((folder / MANIFEST_FILE).read_bytes())
    (folder / MANIFEST_FILE).write_text(json.dumps(manifest | {"content_hash": "0" * 64}))
    with pytest.raises(IntegrityError, match="the artifact is"):
        plan_push(folder, "org/digits", options())
    (folder / MANIFEST_FILE).unlink()
    with pytest.raises(FormatError, match="missing"):
        plan_push(folder, "org/digits", options())


def test_a_login_in_the_address_of_the_hub_is_not_shown(loopback, options, folders, monkeypatch):
    monkeypatch.setitem(TOKENS, "Basic bWU6c2VjcmV0", "alice")  # of me:secret
    asked = dataclasses.replace(options(), endpoint=loopback.url.replace("//", "//me:secret@"))
    plan = plan_push(folders[2], "org/digits", asked)
    assert str(plan).startswith(f"push to {loopback.url}/datasets/org/digits\n")
    push(plan)
    assert str(push_folder(folders[2], "org/digits", asked)).startswith(
        f"nothing to publish, it is there already: {loopback.url}/datasets/org/digits/commit/"
    )


# One commit


def test_a_push_is_one_commit_with_the_files_of_the_folder_and_a_tag_on_it(loopback, options, folders):
    done = push_folder(folders[2], "org/digits", options(revision="v1"))
    assert len(commits(loopback)) == 1
    assert done.changed
    assert done.commit == loopback.head("org/digits").oid == loopback.head("org/digits", "v1").oid
    assert done.url == f"{loopback.url}/datasets/org/digits/commit/{done.commit}"
    published = loopback.files("org/digits")
    for name in FOLDER_FILES:
        assert name == CARD_FILE or published[name] == (folders[2] / name).read_bytes()


def test_the_same_push_again_makes_no_commit(loopback, options, folders):
    first = push_folder(folders[2], "org/digits", options(revision="v1"))
    log = len(writes(loopback))
    again = push_folder(folders[2], "org/digits", options(revision="v1"))
    assert (again.commit, again.changed) == (first.commit, False)
    assert writes(loopback)[log:] == []
    assert str(again).startswith("nothing to publish")


def test_a_tag_that_a_killed_push_did_not_set_is_set_by_the_next_one(loopback, options, folders):
    done = push_folder(folders[2], "org/digits", options())
    push_folder(folders[2], "org/digits", options(revision="v1"))
    assert loopback.head("org/digits", "v1").oid == done.commit
    assert len(commits(loopback)) == 1


def test_a_tag_is_moved_only_by_force(loopback, options, folders, tmp_path):
    push_folder(folders[2], "org/digits", options(revision="v1"))
    other = make_folder(tmp_path, make_artifact(2, source={"license": "MIT"}))
    with pytest.raises(UsageError, match=r"has a tag 'v1' already.*--force"):
        push_folder(other, "org/digits", options(revision="v1"))
    assert len(commits(loopback)) == 1
    done = push_folder(other, "org/digits", options(revision="v1", force=True))
    assert loopback.head("org/digits", "v1").oid == done.commit


def test_a_repository_is_created_private_and_gated_before_anything_is_in_it(loopback, options, folders):
    push_folder(folders[1], "digits", options(private=True, gated="manual"))
    repository = loopback.repositories["alice/digits"]
    assert (repository.private, repository.gated) == (True, "manual")
    log = writes(loopback)
    assert [i for i, entry in enumerate(log) if "/settings" in entry] < [
        i for i, entry in enumerate(log) if "/commit/" in entry
    ]


@pytest.mark.parametrize(("wish", "sent"), [(False, None), (True, True)])
def test_a_dataset_is_created_private_if_asked_for_and_else_as_the_account_has_it(
    loopback, options, folders, monkeypatch, wish, sent
):
    asked, create = [], HfApi.create_repo
    monkeypatch.setattr(HfApi, "create_repo", lambda *a, **k: asked.append(k) or create(*a, **k))
    push_folder(folders[1], "org/digits", options(private=wish))
    assert [(call["repo_type"], call["private"]) for call in asked] == [("dataset", sent)]


def test_a_repository_that_is_private_and_gated_already_is_left_so(loopback, options, folders):
    wish = options(private=True, gated="auto")
    push_folder(folders[2], "org/digits", wish)
    push_folder(folders[1], "org/digits", wish)
    assert len(commits(loopback)) == 2
    assert sum("/settings" in entry for entry in writes(loopback)) == 1


def test_a_pull_momentleaves_the_branch_alone_and_needs_no_right_to_write(loopback, options, folders):
    push_folder(folders[2], "org/digits", options())
    head = loopback.head("org/digits").oid
    done = push_folder(folders[1], "org/digits", options("hf_bob", create_pr=True))
    assert done.url == f"{loopback.url}/datasets/org/digits/discussions/1"
    assert loopback.head("org/digits").oid == head
    assert "ipc1/manifest.json" in loopback.files("org/digits", "refs/pr/1")


def test_a_pull_momentis_not_opened_twice_when_the_answer_is_lost(loopback, options, folders):
    push_folder(folders[2], "org/digits", options())
    loopback.fault("POST .*/commit/", "cut", 5)
    with pytest.raises(HubError):
        push_folder(folders[1], "org/digits", options(create_pr=True))
    assert [name for name in loopback.repositories["org/digits"].refs if "/pr/" in name] == ["refs/pr/1"]


def test_a_pull_momentfor_nothing_and_one_with_a_tag_are_refused(options, folders):
    with pytest.raises(AccessError, match="nothing to open a pull request for"):
        plan_push(folders[1], "org/digits", options(create_pr=True))
    with pytest.raises(UsageError, match="before it is merged"):
        options(create_pr=True, revision="v1")


# Several sets in one repository


def test_a_second_size_moves_the_first_into_a_folder_and_both_load(loopback, options, folders, tmp_path):
    push_folder(folders[2], "org/digits", options(revision="v1"))
    push_folder(folders[1], "org/digits", options())
    push_folder(folders[3], "org/digits", options())
    assert len(commits(loopback)) == 3
    published = loopback.files("org/digits")
    assert set(published) == {".gitattributes", CARD_FILE, MANIFEST_FILE} | {
        f"ipc{ipc}/{name}" for ipc in (1, 2, 3) for name in FOLDER_FILES if name != CARD_FILE
    }
    for ipc in (1, 2, 3):
        assert published[f"ipc{ipc}/{ARTIFACT_FILE}"] == (folders[ipc] / ARTIFACT_FILE).read_bytes()
    loaded = {
        ipc: DistilledDataset.from_hub("org/digits", ipc=ipc, endpoint=loopback.url, cache_dir=tmp_path)
        for ipc in (None, 1, 2, 3)
    }
    hashes = {ipc: DistilledDataset.from_folder(folders[ipc]).content_hash for ipc in (1, 2, 3)}
    assert {ipc: data.content_hash for ipc, data in loaded.items()} == {None: hashes[2]} | hashes
    old = DistilledDataset.from_hub("org/digits@v1", endpoint=loopback.url, cache_dir=tmp_path)
    assert old.content_hash == hashes[2]


def test_the_card_marks_the_default_and_has_the_others_in_the_order_of_their_sizes(
    loopback, options, folders
):
    for ipc in (2, 1, 3):
        push_folder(folders[ipc], "org/digits", options())
    front = yaml.safe_load(loopback.files("org/digits")[CARD_FILE].decode().split("---\n")[1])
    found = [(config["config_name"], config.get("default")) for config in front["configs"]]
    assert found == [("ipc2", True), ("ipc1", None), ("ipc3", None)]


def test_what_a_person_wrote_in_the_folder_is_published_with_its_first_set(loopback, options, tmp_path):
    folder = make_folder(tmp_path, make_artifact(1))
    card = (folder / CARD_FILE).read_text() + "\n## Thanks\n\nTo all.\n"
    for text in (card, card + "More.\n"):  # from then on, what is on the Hub counts
        (folder / CARD_FILE).write_text(text)
        push_folder(folder, "org/digits", options())
        assert loopback.files("org/digits")[CARD_FILE].decode().endswith("\n## Thanks\n\nTo all.\n")


def test_a_set_of_a_size_that_is_there_replaces_it_and_leaves_the_others(
    loopback, options, folders, tmp_path
):
    push_folder(folders[2], "org/digits", options())
    push_folder(folders[1], "org/digits", options())
    other = make_folder(tmp_path, make_artifact(1, logits=False))
    plan = plan_push(other, "org/digits", options())
    inside = (ARTIFACT_FILE, MANIFEST_FILE, "data/train.parquet")
    assert {file.path for file in plan.changes} == {MANIFEST_FILE, CARD_FILE, *(f"ipc1/{n}" for n in inside)}
    push(plan)
    assert loopback.files("org/digits")[f"ipc1/{ARTIFACT_FILE}"] == (other / ARTIFACT_FILE).read_bytes()


def test_the_first_set_is_the_default_until_another_is_made_it(loopback, options, folders):
    def default():
        return json.loads(loopback.files("org/digits")[MANIFEST_FILE])["default"]

    push_folder(folders[2], "org/digits", options())
    push_folder(folders[1], "org/digits", options())
    assert default() == "ipc2"
    push_folder(folders[3], "org/digits", options(default=True))
    assert default() == "ipc3"
    push_folder(folders[1], "org/digits", options())
    assert default() == "ipc3"


def test_sets_of_different_classes_do_not_share_a_repository(loopback, options, folders, tmp_path):
    push_folder(folders[2], "org/digits", options())
    other = make_folder(tmp_path, make_artifact(1, classes=[f"class {i}" for i in range(10)]))
    with pytest.raises(UsageError, match="holds digits with 10 classes"):
        push_folder(other, "org/digits", options())
    assert len(commits(loopback)) == 1


def test_a_repository_with_a_broken_set_is_published_over_only_by_force(loopback, options, folders):
    push_folder(folders[2], "org/digits", options())
    loopback.put("org/digits", ARTIFACT_FILE, b"something else")
    with pytest.raises(IntegrityError, match="--force"):
        push_folder(folders[1], "org/digits", options())
    push_folder(folders[1], "org/digits", options(force=True))
    assert loopback.files("org/digits")[ARTIFACT_FILE] == (folders[1] / ARTIFACT_FILE).read_bytes()


def test_a_repository_of_a_later_format_is_not_published_over_even_by_force(loopback, options, folders):
    push_folder(folders[2], "org/digits", options())
    manifest = json.loads(loopback.files("org/digits")[MANIFEST_FILE])
    loopback.put("org/digits", MANIFEST_FILE, json.dumps(manifest | {"format_version": 2}).encode())
    with pytest.raises(NewerFormatError, match="Upgrade"):
        push_folder(folders[1], "org/digits", options(force=True))


# The card


def test_what_a_person_wrote_on_the_hub_survives_pushes_of_other_sizes(loopback, options, folders):
    push_folder(folders[2], "org/digits", options())
    card = loopback.files("org/digits")[CARD_FILE].decode()
    loopback.put("org/digits", CARD_FILE, (card + "\n## Thanks\n\nTo all — ümläut.\n").encode())
    push_folder(folders[1], "org/digits", options())
    push_folder(folders[3], "org/digits", options())
    assert loopback.files("org/digits")[CARD_FILE].decode().endswith("\n## Thanks\n\nTo all — ümläut.\n")


def test_a_card_that_arrives_altered_is_fetched_again_and_never_published(loopback, options, folders):
    push_folder(folders[2], "org/digits", options())
    card = loopback.files("org/digits")[CARD_FILE] + b"\nOurs.\n"
    loopback.put("org/digits", CARD_FILE, card)
    loopback.fault(f"GET .*/{CARD_FILE}", "flip", len(card) - 3)
    push_folder(folders[1], "org/digits", options())
    assert loopback.files("org/digits")[CARD_FILE].endswith(b"\nOurs.\n")
    loopback.put("org/digits", CARD_FILE, card + b"And more.\n")
    loopback.fault(f"GET .*/{CARD_FILE}", "flip", len(card) - 3, times=99)
    with pytest.raises(IntegrityError, match="arrives altered"):
        push_folder(folders[3], "org/digits", options())


# Failures


@pytest.mark.parametrize(
    "call", ["GET .*org/digits$", "/create", "/settings", "/preupload/", "PUT /lfs/", "/commit/", "/tag/"]
)
@pytest.mark.parametrize(("kind", "value"), [("status", 503), ("status", 429), ("cut", 3)])
def test_one_failure_of_any_call_is_got_over(loopback, options, folders, call, kind, value):
    loopback.fault(call, kind, value)
    assert push_folder(folders[2], "org/digits", options(revision="v1", gated="auto")).changed
    assert len(commits(loopback)) == 1
    assert loopback.head("org/digits", "v1") is loopback.head("org/digits")
    assert loopback.repositories["org/digits"].gated == "auto"


def test_a_hub_that_keeps_failing_is_said_to_and_nothing_is_published(loopback, options, folders):
    push_folder(folders[2], "org/digits", options())
    loopback.fault("/commit/", "status", 503, times=99)
    with pytest.raises(HubError, match=r"the Hub failed for org/digits: .*503.*Try again later"):
        push_folder(folders[1], "org/digits", options())
    assert len(commits(loopback)) == 1


def test_who_is_overtaken_ten_times_gives_up_and_says_so(loopback, options, folders, monkeypatch):
    monkeypatch.setattr("hub.publish.time.sleep", lambda seconds: None)
    push_folder(folders[2], "org/digits", options())
    loopback.fault("POST .*/commit/", "status", 412, times=99)
    told = []
    with pytest.raises(ConflictError, match="somebody else changed org/digits"):
        push_folder(folders[1], "org/digits", options(), report=told.append)
    assert len(told) == 9
    assert len(commits(loopback)) == 1


def test_a_new_tag_that_was_refused_is_not_set_by_going_back(loopback, options, folders):
    loopback.fault("POST .*/tag/", "status", 403)
    with pytest.raises(AccessError, match="its tag 'v1' is not set"):
        push_folder(folders[1], "org/digits", options(revision="v1"))
    assert list(loopback.repositories["org/digits"].refs) == ["refs/heads/main"]


def test_a_repository_that_may_not_be_seen_is_not_planned_as_a_new_one(loopback, options, folders):
    loopback.fault("GET /api/datasets/org/digits$", "status", 403, times=99)
    with pytest.raises(AccessError, match="may not do this with org/digits"):
        plan_push(folders[1], "org/digits", options())


def test_a_refusal_is_told_in_the_words_of_the_hub_and_not_tried_again(loopback, options, folders):
    loopback.fault("POST .*/preupload/", "status", 400, times=99)
    with pytest.raises(HubError, match="HTTP 400: a fault of the test"):
        push_folder(folders[2], "org/digits", options())
    assert sum("/preupload/" in path for _, path, _ in loopback.requests) == 1
    loopback.faults.clear()
    loopback.fault("PUT ", "status", 403, times=99)
    with pytest.raises(AccessError, match="may not do this with org/digits: HTTP 403"):
        push_folder(folders[2], "org/digits", options())


@pytest.mark.parametrize(
    ("token", "repo", "message"),
    [
        ("hf_bob", "org/digits", "may not do this with org/digits"),
        ("hf_wrong", "org/digits", "does not accept the token"),
        (None, "org/digits", "nobody is logged in"),
        ("hf_alice", "a b/c d", "not a repository name"),
        ("hf_alice", "bob/digits", "may not do this with bob/digits"),
    ],
)
def test_what_a_token_may_not_do_is_said_and_the_token_is_not(
    loopback, options, folders, token, repo, message
):
    with pytest.raises((AccessError, UsageError), match=message) as caught:
        push_folder(folders[1], repo, options(token))
    assert token is None or token not in str(caught.value)


def test_access_is_checked_before_a_long_run(loopback, options):
    check_access("org/digits", options())
    check_access("digits", options())
    with pytest.raises(AccessError, match="nothing to open a pull request for"):
        check_access("bob/digits", options(create_pr=True))
    loopback.repositories["bob/digits"] = Repository("bob/digits", refs=empty())
    check_access("bob/digits", options(create_pr=True))
    with pytest.raises(UsageError, match="has a branch 'main'"):
        check_access("bob/digits", options("hf_bob", revision="main"))
    with pytest.raises(AccessError, match="expected a name under alice or org"):
        check_access("bob/digits", options())
    with pytest.raises(AccessError, match="does not accept the token"):
        check_access("org/digits", options("hf_wrong"))
    with pytest.raises(AccessError, match="nobody is logged in"):
        check_access("org/digits", options(token=None))


def test_without_a_token_the_stored_login_is_used_and_before_it_the_environment(options, monkeypatch):
    stored = Path(constants.HF_TOKEN_PATH)
    stored.write_text("hf_alice")
    try:
        check_access("org/digits", options(token=None))
        monkeypatch.setenv("HF_TOKEN", "hf_bob")
        with pytest.raises(AccessError, match="bob may not publish"):
            check_access("org/digits", options(token=None))
    finally:
        stored.unlink()


def test_a_commit_of_somebody_else_in_between_is_a_conflict_that_changes_nothing(loopback, options, folders):
    push_folder(folders[2], "org/digits", options())
    plan = plan_push(folders[1], "org/digits", options())
    loopback.put("org/digits", "notes.txt", b"mine")
    with pytest.raises(ConflictError, match="somebody else changed org/digits"):
        push(plan)
    assert "ipc1/manifest.json" not in loopback.files("org/digits")


def test_a_plan_is_of_one_commit_while_somebody_else_commits(loopback, options, folders):
    push_folder(folders[2], "org/digits", options())
    head = loopback.head("org/digits").oid
    loopback.fault("GET .*/tree/", "do", lambda: loopback.put("org/digits", PREVIEW_FILE, b"mine"))
    assert plan_push(folders[1], "org/digits", options()).parent == head != loopback.head("org/digits").oid


def test_a_folder_that_changed_after_planning_is_not_pushed(loopback, options, tmp_path):
    folder = make_folder(tmp_path, make_artifact(2))
    push_folder(folder, "org/digits", options())
    make_folder(tmp_path, make_artifact(2, logits=False))
    plan = plan_push(folder, "org/digits", options())
    make_folder(tmp_path, make_artifact(2, channels=3))
    with pytest.raises(ConflictError, match="changed after the push was planned"):
        push(plan)
    (folder / ARTIFACT_FILE).unlink()
    with pytest.raises(ConflictError, match=f"{ARTIFACT_FILE} changed after the push was planned"):
        push(dataclasses.replace(plan, files=[file for file in plan.files if file.path == ARTIFACT_FILE]))
    assert len(commits(loopback)) == 1


@pytest.mark.parametrize(
    "moment", ["GET .*/tree/", "POST .*/preupload/", "POST .*/objects/batch", "PUT /lfs/"]
)
def test_a_folder_that_gets_results_while_it_is_published_is_published_whole(
    loopback, options, folders, tmp_path, moment
):
    push_folder(folders[1], "org/digits", options())
    folder = make_folder(tmp_path, make_artifact(2))
    loopback.fault(moment, "do", lambda: make_folder(tmp_path, make_artifact(2, results=(ROW,))))
    push_folder(folder, "org/digits", options(), report=lambda text: None)
    published = loopback.files("org/digits")
    manifest = parse_manifest(published[f"ipc2/{MANIFEST_FILE}"], "it")
    found = {name: Fingerprint.of_bytes(published[f"ipc2/{name}"]) for name in manifest.files}
    assert found == manifest.files
    (tmp_path / "published").mkdir()
    (tmp_path / "published" / ARTIFACT_FILE).write_bytes(published[f"ipc2/{ARTIFACT_FILE}"])
    recorded = read_artifact(tmp_path / "published" / ARTIFACT_FILE).metadata.results
    assert ("91.3" in published[CARD_FILE].decode()) == bool(recorded)


def test_four_publishers_at_once_all_get_their_set_in_whole(loopback, options, folders, tmp_path):
    sizes = (1, 2, 3, 4)
    made = folders | {4: make_folder(tmp_path, make_artifact(4))}
    failures = []

    def work(ipc):
        try:
            push_folder(made[ipc], "org/digits", options(), report=lambda text: None)
        except Exception as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(ipc,)) for ipc in sizes]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert failures == []
    assert len(commits(loopback)) == 4
    published = loopback.files("org/digits")
    for ipc in sizes:
        for name in FOLDER_FILES:
            assert name == CARD_FILE or published[f"ipc{ipc}/{name}"] == (made[ipc] / name).read_bytes()


def test_the_loopback_hub_takes_the_same_files_for_large_as_the_hub(loopback, options, folders):
    """What `git lfs` tracks by default there: arrow, parquet, safetensors, images."""
    push_folder(folders[1], "org/digits", options())
    tree = loopback.head("org/digits").tree
    assert {path for path, blob in tree.items() if blob.large} == {p for p in tree if p.endswith(LARGE)}


# What must never happen without being asked for


@pytest.mark.parametrize("cut", ["/create", "/settings"])
def test_what_was_to_be_gated_is_never_published_open(loopback, options, folders, cut):
    loopback.fault(cut, "cut", 1, times=99)
    with pytest.raises((HubError, ConflictError)):
        push_folder(folders[1], "org/digits", options(gated="auto", private=True))
    loopback.faults.clear()
    assert "org/digits" not in loopback.repositories or commits(loopback) == []
    push_folder(folders[1], "org/digits", options(gated="auto", private=True))
    repository = loopback.repositories["org/digits"]
    assert (repository.private, repository.gated) == (True, "auto")


def test_a_public_repository_does_not_become_private_by_a_push_and_the_push_is_refused(
    loopback, options, folders
):
    push_folder(folders[1], "org/digits", options())
    for wish in ({"private": True}, {"gated": "manual"}):
        with pytest.raises(UsageError, match="exists and is not"):
            push_folder(folders[2], "org/digits", options(**wish))
        with pytest.raises(UsageError, match="exists and is not"):
            check_access("org/digits", options(**wish))  # before hours of work
    assert len(commits(loopback)) == 1


def test_a_pull_momentchanges_no_settings_even_where_nothing_is_published_yet(loopback, options, folders):
    loopback.repositories["org/digits"] = Repository("org/digits", refs=empty())
    with pytest.raises(UsageError, match="exists and is not private"):
        plan_push(folders[1], "org/digits", options(create_pr=True, private=True))


def test_another_dataset_of_the_same_size_takes_the_place_only_by_force(loopback, options, folders, tmp_path):
    push_folder(folders[2], "org/digits", options())
    other = make_folder(tmp_path, make_artifact(2, classes=[f"class {i}" for i in range(10)]))
    with pytest.raises(UsageError, match="with other names"):
        push_folder(other, "org/digits", options())
    push_folder(other, "org/digits", options(force=True))
    assert loopback.files("org/digits")[ARTIFACT_FILE] == (other / ARTIFACT_FILE).read_bytes()


def test_files_of_somebody_else_are_overwritten_only_by_force(loopback, options, folders):
    loopback.repositories["org/digits"] = Repository("org/digits", refs=empty())
    loopback.put("org/digits", "data/train.parquet", b"my years of work")
    with pytest.raises(UsageError, match=r"has a data/train\.parquet of something else"):
        push_folder(folders[2], "org/digits", options())
    assert loopback.files("org/digits") == {"data/train.parquet": b"my years of work"}
    push_folder(folders[2], "org/digits", options(force=True))


def test_force_replaces_what_is_broken_and_keeps_what_is_sound(loopback, options, folders, tmp_path):
    push_folder(folders[2], "org/digits", options())
    push_folder(folders[1], "org/digits", options())
    loopback.put("org/digits", f"ipc1/{ARTIFACT_FILE}", b"broken")
    push_folder(folders[3], "org/digits", options(force=True))
    paths = set(loopback.files("org/digits"))
    assert not any(path.startswith("ipc1/") for path in paths)
    for ipc in (2, 3):
        data = DistilledDataset.from_hub("org/digits", ipc=ipc, endpoint=loopback.url, cache_dir=tmp_path)
        assert data.content_hash == DistilledDataset.from_folder(folders[ipc]).content_hash


def test_a_set_that_replaces_the_sound_one_beside_a_broken_one_stays_in_its_folder(
    loopback, options, folders, tmp_path
):
    for ipc in (2, 1):
        push_folder(folders[ipc], "org/digits", options())
    loopback.put("org/digits", f"ipc1/{ARTIFACT_FILE}", b"broken")
    other = make_folder(tmp_path / "other", make_artifact(2, logits=False))
    push_folder(other, "org/digits", options(force=True))
    inside = {f"ipc2/{name}" for name in FOLDER_FILES if name != CARD_FILE}
    assert set(loopback.files("org/digits")) == {".gitattributes", CARD_FILE, MANIFEST_FILE} | inside
    data = DistilledDataset.from_hub("org/digits", ipc=2, endpoint=loopback.url, cache_dir=tmp_path / "hub")
    assert data.content_hash == DistilledDataset.from_folder(other).content_hash


def test_force_where_the_default_is_broken_makes_the_smallest_sound_set_the_default(
    loopback, options, folders
):
    for ipc in (2, 1):
        push_folder(folders[ipc], "org/digits", options())
    loopback.put("org/digits", f"ipc2/{ARTIFACT_FILE}", b"broken")
    push_folder(folders[3], "org/digits", options(force=True))
    index = json.loads(loopback.files("org/digits")[MANIFEST_FILE])
    assert (index["default"], set(index["configurations"])) == ("ipc1", {"ipc1", "ipc3"})


@pytest.mark.parametrize("harm", ["altered", "gone"])
def test_force_over_a_damaged_index_keeps_the_sets_and_what_is_no_set(
    loopback, options, folders, tmp_path, harm
):
    push_folder(folders[2], "org/digits", options())
    push_folder(folders[1], "org/digits", options())
    for name in (ARTIFACT_FILE, MANIFEST_FILE):
        loopback.put("org/digits", f"experiments/a/{name}", b"mine")
    if harm == "altered":
        loopback.put("org/digits", MANIFEST_FILE, b"{}")
    else:
        loopback.remove("org/digits", MANIFEST_FILE)
    with pytest.raises(IntegrityError, match="over it with --force, which keeps the sets that are sound"):
        push_folder(folders[3], "org/digits", options())
    push_folder(folders[3], "org/digits", options(force=True))
    for ipc in (1, 2, 3):
        data = DistilledDataset.from_hub("org/digits", ipc=ipc, endpoint=loopback.url, cache_dir=tmp_path)
        assert data.content_hash == DistilledDataset.from_folder(folders[ipc]).content_hash
        assert str(data.folder).endswith(f"ipc{ipc}")
    assert loopback.files("org/digits")[f"experiments/a/{ARTIFACT_FILE}"] == b"mine"


@pytest.mark.parametrize("gone", [(ARTIFACT_FILE,), (MANIFEST_FILE,), FOLDER_FILES])
def test_a_set_that_somebody_removed_is_forgotten_by_force(loopback, options, folders, tmp_path, gone):
    for ipc in (2, 1, 3):
        push_folder(folders[ipc], "org/digits", options())
    for name in gone:
        loopback.remove("org/digits", f"ipc2/{name}")
    with pytest.raises(IntegrityError, match=r"ipc2/\S+, which the manifest\.json names, .* with --force"):
        push_folder(folders[1], "org/digits", options())
    push_folder(folders[1], "org/digits", options(force=True))
    files = loopback.files("org/digits")
    assert {path.partition("/")[0] for path in files if "/" in path} == {"ipc1", "ipc3"}
    assert "ipc2" not in files[CARD_FILE].decode() + files[MANIFEST_FILE].decode()
    data = DistilledDataset.from_hub("org/digits", endpoint=loopback.url, cache_dir=tmp_path)
    assert data.content_hash == DistilledDataset.from_folder(folders[1]).content_hash


def test_folders_that_are_only_named_like_sets_are_kept(loopback, options, folders):
    loopback.repositories["org/digits"] = Repository("org/digits", refs=empty())
    theirs = {
        "ipc5/manifest.json": b'{"web": "app"}',
        "ipc5/preview.png": b"mine",
        "ipc01/manifest.json": b"{}",
        f"ipc01/{ARTIFACT_FILE}": b"mine too",
    }
    for path, content in theirs.items():
        loopback.put("org/digits", path, content)
    push_folder(folders[1], "org/digits", options())
    assert theirs.items() <= loopback.files("org/digits").items()


def test_over_a_lost_index_the_smallest_set_is_the_default_and_unsound_ones_go(loopback, options, tmp_path):
    made = {ipc: make_folder(tmp_path / str(ipc), make_artifact(ipc)) for ipc in (1, 2, 3, 10)}
    for ipc in (2, 10, 1):
        push_folder(made[ipc], "org/digits", options())
    loopback.remove("org/digits", MANIFEST_FILE)
    loopback.put("org/digits", PREVIEW_FILE, b"mine")
    manifest = json.loads(loopback.files("org/digits")["ipc1/manifest.json"])
    altered = json.dumps(manifest | {"content_hash": "0" * 64}).encode()
    loopback.put("org/digits", "ipc1/manifest.json", altered)
    for path, content in loopback.files("org/digits").items():
        if path.startswith("ipc2/"):
            loopback.put("org/digits", path.replace("ipc2", "ipc7"), content)
    push_folder(made[3], "org/digits", options(force=True))
    index = json.loads(loopback.files("org/digits")[MANIFEST_FILE])
    assert (index["default"], set(index["configurations"])) == ("ipc2", {"ipc2", "ipc3", "ipc10"})
    assert loopback.files("org/digits")[PREVIEW_FILE] == b"mine"


def test_a_copy_of_a_file_where_it_is_to_lie_is_no_other_file(loopback, options, folders):
    push_folder(folders[2], "org/digits", options())
    loopback.put("org/digits", f"ipc2/{PARQUET_FILE}", (folders[2] / PARQUET_FILE).read_bytes())
    push_folder(folders[1], "org/digits", options())
    assert f"ipc2/{ARTIFACT_FILE}" in loopback.files("org/digits")


@pytest.mark.parametrize("path", ["ipc1/preview.png", f"ipc2/{ARTIFACT_FILE}"])
def test_files_of_somebody_else_where_a_set_is_to_lie_are_kept(loopback, options, folders, path):
    push_folder(folders[2], "org/digits", options())
    loopback.put("org/digits", path, b"mine")
    with pytest.raises(UsageError, match=f"has a {path} of something else"):
        push_folder(folders[1], "org/digits", options())
    assert loopback.files("org/digits")[path] == b"mine"
    push_folder(folders[1], "org/digits", options(force=True))
    assert loopback.files("org/digits")[path] != b"mine"


@pytest.mark.parametrize("large", [LARGE, ()])  # what the Hub keeps by git it has no sha256 of
def test_a_file_of_a_set_that_was_altered_is_not_moved_with_it(
    loopback, options, folders, monkeypatch, large
):
    monkeypatch.setattr("hub_server.LARGE", large)
    push_folder(folders[2], "org/digits", options())
    size = len(loopback.files("org/digits")[PARQUET_FILE])
    loopback.put("org/digits", PARQUET_FILE, b"x" * size)
    with pytest.raises(IntegrityError, match=f"has altered {PARQUET_FILE}, which its manifest names"):
        push_folder(folders[1], "org/digits", options())
    push_folder(folders[2], "org/digits", options())  # as it advises
    push_folder(folders[1], "org/digits", options())
    assert loopback.files("org/digits")[f"ipc2/{PARQUET_FILE}"] == (folders[2] / PARQUET_FILE).read_bytes()


def test_a_repository_that_has_files_ignored_is_not_published_to(loopback, options, folders):
    loopback.repositories["org/digits"] = Repository("org/digits", refs=empty())
    loopback.put("org/digits", ".gitignore", b"*.safetensors\n")
    with pytest.raises(UsageError, match=r"has a \.gitignore"):
        push_folder(folders[1], "org/digits", options(force=True))


def test_a_push_without_a_connection_says_what_forbids_it(options, folders, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(HubError, match="HF_HUB_OFFLINE forbids to ask the Hub about org/digits"):
        push_folder(folders[1], "org/digits", options())


def test_a_card_that_the_hub_refuses_is_named_and_not_tried_again(loopback, options, folders):
    loopback.fault("POST .*/validate-yaml", "status", 400, times=99)
    with pytest.raises(HubError, match=r"does not take what was sent for org/digits: .*README\.md"):
        push_folder(folders[1], "org/digits", options())


def test_a_folder_that_changes_while_it_is_planned_is_not_published(loopback, options, tmp_path):
    folder = make_folder(tmp_path, make_artifact(2))
    push_folder(folder, "org/digits", options())
    loopback.fault("/refs", "do", lambda: (folder / ARTIFACT_FILE).write_bytes(b"half written"))
    with pytest.raises(IntegrityError, match="Write the folder anew"):
        push_folder(folder, "org/digits", options())


def test_a_manifest_without_all_files_of_the_format_is_not_published(options, tmp_path):
    folder = make_folder(tmp_path, make_artifact(2))
    preview = (folder / PREVIEW_FILE).read_bytes()
    (folder / PREVIEW_FILE).unlink()
    write_manifest(folder)
    (folder / PREVIEW_FILE).write_bytes(preview)
    with pytest.raises(FormatError, match=r"lacks preview\.png"):
        plan_push(folder, "org/digits", options())


@pytest.mark.parametrize("tag", ["v 1", "", "a..b", "v1.lock", "-x", "v1/", "0" * 40, "a~b", "v1\n"])
def test_what_cannot_be_a_tag_is_refused_before_anything_is_sent(options, tag):
    with pytest.raises(UsageError, match="cannot be a tag"):
        options(revision=tag)


def test_a_tag_named_like_a_branch_is_refused(loopback, options, folders):
    push_folder(folders[1], "org/digits", options())
    with pytest.raises(UsageError, match="has a branch 'main'"):
        push_folder(folders[1], "org/digits", options(revision="main"))
    with pytest.raises(UsageError, match="would have a branch 'main'"):
        push_folder(folders[1], "org/new", options(revision="main"))
    assert "org/new" not in loopback.repositories


# Answers that are lost, and other publishers


def test_a_commit_whose_answer_was_lost_counts_as_published(loopback, options, folders):
    loopback.fault("POST .*/commit/", "cut", 5)
    assert push_folder(folders[1], "org/digits", options()).changed
    assert len(commits(loopback)) == 1


def test_a_tag_is_moved_though_the_answer_to_its_deletion_is_lost(loopback, options, folders, tmp_path):
    push_folder(folders[2], "org/digits", options(revision="v1"))
    other = make_folder(tmp_path, make_artifact(2, logits=False))
    loopback.fault("DELETE .*/tag/", "status-after", 503)
    done = push_folder(other, "org/digits", options(revision="v1", force=True))
    assert loopback.head("org/digits", "v1").oid == done.commit


def test_a_tag_that_cannot_be_moved_stays_where_it_was(loopback, options, folders, tmp_path):
    first = push_folder(folders[2], "org/digits", options(revision="v1"))
    other = make_folder(tmp_path, make_artifact(2, logits=False))
    loopback.fault("POST .*/tag/", "status", 403)
    with pytest.raises(AccessError, match=r"is published; its tag 'v1' is not set: .* The same command"):
        push_folder(other, "org/digits", options(revision="v1", force=True))
    assert loopback.head("org/digits", "v1").oid == first.commit


def test_a_tag_that_somebody_sets_meanwhile_is_left_alone_and_named(loopback, options, folders):
    push_folder(folders[2], "org/digits", options())
    old = loopback.head("org/digits")

    def tag():
        loopback.repositories["org/digits"].refs["refs/tags/v1"] = old

    loopback.fault("POST .*/commit/", "do", tag)
    with pytest.raises(UsageError, match="has a tag 'v1' already"):
        push_folder(folders[1], "org/digits", options(revision="v1"))
    assert loopback.head("org/digits", "v1") is old
    assert "ipc1/manifest.json" in loopback.files("org/digits")


def test_a_name_that_is_taken_by_what_the_token_may_not_see_is_said_at_once(loopback, options, folders):
    push_folder(folders[1], "org/digits", options())
    loopback.fault("GET /api/datasets/org/digits$", "hide", times=99)
    with pytest.raises(AccessError, match="this token may not see it"):
        push_folder(folders[1], "org/digits", options())


def test_a_token_that_may_only_read_is_found_out_before_a_long_run(options):
    with pytest.raises(AccessError, match="may only read"):
        check_access("org/digits", options("hf_reader"))
    with pytest.raises(UsageError, match="not a repository name"):
        check_access("org/a b", options())


# What a repository can hold that a set does not


def test_a_file_that_the_hub_has_lost_is_named_and_the_others_stay(loopback, options, folders):
    push_folder(folders[2], "org/digits", options())
    del loopback.head("org/digits").tree[PREVIEW_FILE]
    with pytest.raises(IntegrityError, match=r"lacks preview\.png"):
        push_folder(folders[1], "org/digits", options())
    assert len(commits(loopback)) == 1


def test_a_card_that_is_no_text_is_not_published_over(loopback, options, folders):
    push_folder(folders[2], "org/digits", options())
    loopback.put("org/digits", CARD_FILE, "Schöne Bilder".encode("latin-1"))
    with pytest.raises(UsageError, match=r"README\.md of org/digits is not UTF-8"):
        push_folder(folders[1], "org/digits", options())


def test_a_tag_whose_answer_was_lost_counts_as_set(loopback, options, folders):
    loopback.fault("POST .*/tag/", "status-after", 503)
    told = []
    done = push_folder(folders[1], "org/digits", options(revision="v1"), report=told.append)
    assert (done.changed, told) == (True, [])
    assert loopback.head("org/digits", "v1").oid == done.commit


def test_a_repository_that_somebody_creates_after_planning_is_a_conflict(loopback, options, folders):
    plan = plan_push(folders[1], "org/digits", options())
    push_folder(folders[2], "org/digits", options())
    with pytest.raises(ConflictError, match="somebody else changed org/digits"):
        push(plan)
    assert len(commits(loopback)) == 1


@pytest.mark.parametrize(
    "wrong",
    [
        {"token": "hf_secret\n"},
        {"endpoint": "huggingface.co"},
        {"endpoint": "htp://me:hf_secret@host"},
        {"repo": "a b"},
    ],
)
def test_arguments_that_can_never_work_are_refused_before_anything_is_sent(loopback, folders, wrong):
    arguments = {"repo": "org/digits", "endpoint": loopback.url, "token": "hf_alice"} | wrong
    repo = arguments.pop("repo")
    for refuse in (check_access, lambda *where: plan_push(folders[1], *where)):
        with pytest.raises(UsageError, match=r"token holds|is no address|not a repository name") as caught:
            refuse(repo, PushOptions(**arguments))
        assert "hf_secret" not in str(caught.value)
    assert loopback.requests == []


def test_another_tag_on_the_commit_is_not_taken_for_the_one_asked_for(loopback, options, folders):
    push_folder(folders[2], "org/digits", options())
    old = loopback.head("org/digits")
    push_folder(folders[1], "org/digits", options(revision="v0"))
    refs = loopback.repositories["org/digits"].refs
    loopback.fault("POST .*/tag/", "do", lambda: refs.update({"refs/tags/v1": old}))
    with pytest.raises(ConflictError, match="is published; its tag is not, somebody else has set 'v1'"):
        push(plan_push(folders[1], "org/digits", options(revision="v1")))
    assert refs["refs/tags/v1"] is old


def test_without_options_the_hub_and_the_login_of_the_environment_are_used(loopback, folders):
    with pytest.raises(AccessError, match="nobody is logged in"):
        check_access("org/digits")
    with pytest.raises(HubError, match="the Hub failed for org/digits"):  # where nobody listens
        push_folder(folders[1], "org/digits")
