"""Publishing with the genuine client, over HTTP, to the loopback Hub: one commit or none, and a tag."""

import json
import threading

import pytest
from artifacts import make_artifact, make_folder
from hub_server import LARGE

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
from distilled_data.format import ARTIFACT_FILE, CARD_FILE, FOLDER_FILES, MANIFEST_FILE, PREVIEW_FILE
from hub import PushOptions, check_access, plan_push, publish, push

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


# The plan


def test_a_plan_says_what_it_creates_and_changes_nothing(loopback, options, folders):
    plan = plan_push(folders[2], "org/digits", options(revision="v1", private=True, gated="auto"))
    assert (plan.parent, {file.change for file in plan.files}) == (None, {"new"})
    assert {file.path for file in plan.files} == set(FOLDER_FILES)
    artifact = next(file for file in plan.files if file.path == ARTIFACT_FILE)
    for shown in (
        "org/digits",
        "private repository, gated (auto), is created",
        "v1",
        artifact.sha256,
    ):
        assert shown in str(plan)
    assert writes(loopback) == []
    assert "hf_alice" not in str(plan) + repr(plan)


def test_a_plan_tells_new_changed_and_unchanged_files_apart(loopback, options, folders, tmp_path):
    publish(folders[2], "org/digits", options())
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
    (folder / MANIFEST_FILE).unlink()
    with pytest.raises(FormatError, match="missing"):
        plan_push(folder, "org/digits", options())


# One commit


def test_a_push_is_one_commit_with_the_files_of_the_folder_and_a_tag_on_it(loopback, options, folders):
    done = publish(folders[2], "org/digits", options(revision="v1"))
    assert commits(loopback) == [next(iter(commits(loopback)))]
    assert done.changed
    assert done.commit == loopback.head("org/digits").oid == loopback.head("org/digits", "v1").oid
    assert done.url == f"{loopback.url}/datasets/org/digits/commit/{done.commit}"
    published = loopback.files("org/digits")
    for name in FOLDER_FILES:
        assert name == CARD_FILE or published[name] == (folders[2] / name).read_bytes()


def test_the_same_push_again_makes_no_commit(loopback, options, folders):
    first = publish(folders[2], "org/digits", options(revision="v1"))
    log = len(writes(loopback))
    again = publish(folders[2], "org/digits", options(revision="v1"))
    assert (again.commit, again.changed) == (first.commit, False)
    assert writes(loopback)[log:] == []
    assert str(again).startswith("nothing to publish")


def test_a_tag_that_a_killed_push_did_not_set_is_set_by_the_next_one(loopback, options, folders):
    done = publish(folders[2], "org/digits", options())
    publish(folders[2], "org/digits", options(revision="v1"))
    assert loopback.head("org/digits", "v1").oid == done.commit
    assert len(commits(loopback)) == 1


def test_a_tag_is_moved_only_by_force(loopback, options, folders, tmp_path):
    publish(folders[2], "org/digits", options(revision="v1"))
    other = make_folder(tmp_path, make_artifact(2, source={"license": "MIT"}))
    with pytest.raises(UsageError, match=r"has a tag 'v1' already.*--force"):
        publish(other, "org/digits", options(revision="v1"))
    assert len(commits(loopback)) == 1
    done = publish(other, "org/digits", options(revision="v1", force=True))
    assert loopback.head("org/digits", "v1").oid == done.commit


def test_a_repository_is_created_private_and_gated_before_anything_is_in_it(loopback, options, folders):
    publish(folders[1], "digits", options(private=True, gated="manual"))
    repository = loopback.repositories["alice/digits"]
    assert (repository.private, repository.gated) == (True, "manual")
    log = writes(loopback)
    assert [i for i, entry in enumerate(log) if "/settings" in entry] < [
        i for i, entry in enumerate(log) if "/commit/" in entry
    ]


def test_a_pull_request_leaves_the_branch_alone_and_needs_no_right_to_write(loopback, options, folders):
    publish(folders[2], "org/digits", options())
    head = loopback.head("org/digits").oid
    done = publish(folders[1], "org/digits", options("hf_bob", create_pr=True))
    assert done.url == f"{loopback.url}/datasets/org/digits/discussions/1"
    assert loopback.head("org/digits").oid == head
    assert "ipc1/manifest.json" in loopback.files("org/digits", "refs/pr/1")


def test_a_pull_request_is_not_opened_twice_when_the_answer_is_lost(loopback, options, folders):
    publish(folders[2], "org/digits", options())
    loopback.fault("POST .*/commit/", "cut", 5)
    with pytest.raises(HubError):
        publish(folders[1], "org/digits", options(create_pr=True))
    assert [name for name in loopback.repositories["org/digits"].refs if "/pr/" in name] == ["refs/pr/1"]


def test_a_pull_request_for_nothing_and_one_with_a_tag_are_refused(options, folders):
    with pytest.raises(AccessError, match="nothing to open a pull request for"):
        plan_push(folders[1], "org/digits", options(create_pr=True))
    with pytest.raises(UsageError, match="before it is merged"):
        options(create_pr=True, revision="v1")


# Several sets in one repository


def test_a_second_size_moves_the_first_into_a_folder_and_both_load(loopback, options, folders, tmp_path):
    publish(folders[2], "org/digits", options(revision="v1"))
    publish(folders[1], "org/digits", options())
    publish(folders[3], "org/digits", options())
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


def test_a_set_of_a_size_that_is_there_replaces_it_and_leaves_the_others(
    loopback, options, folders, tmp_path
):
    publish(folders[2], "org/digits", options())
    publish(folders[1], "org/digits", options())
    other = make_folder(tmp_path, make_artifact(1, logits=False))
    plan = plan_push(other, "org/digits", options())
    inside = (ARTIFACT_FILE, MANIFEST_FILE, "data/train.parquet")
    assert {file.path for file in plan.changes} == {MANIFEST_FILE, CARD_FILE, *(f"ipc1/{n}" for n in inside)}
    push(plan)
    assert loopback.files("org/digits")[f"ipc1/{ARTIFACT_FILE}"] == (other / ARTIFACT_FILE).read_bytes()


def test_the_first_set_is_the_default_until_another_is_made_it(loopback, options, folders):
    def default():
        return json.loads(loopback.files("org/digits")[MANIFEST_FILE])["default"]

    publish(folders[2], "org/digits", options())
    publish(folders[1], "org/digits", options())
    assert default() == "ipc2"
    publish(folders[3], "org/digits", options(default=True))
    assert default() == "ipc3"
    publish(folders[1], "org/digits", options())
    assert default() == "ipc3"


def test_sets_of_different_classes_do_not_share_a_repository(loopback, options, folders, tmp_path):
    publish(folders[2], "org/digits", options())
    other = make_folder(tmp_path, make_artifact(1, classes=[f"class {i}" for i in range(10)]))
    with pytest.raises(UsageError, match="holds digits with 10 classes"):
        publish(other, "org/digits", options())
    assert len(commits(loopback)) == 1


def test_a_repository_with_a_broken_set_is_published_over_only_by_force(loopback, options, folders):
    publish(folders[2], "org/digits", options())
    loopback.put("org/digits", ARTIFACT_FILE, b"something else")
    with pytest.raises(IntegrityError, match="--force"):
        publish(folders[1], "org/digits", options())
    publish(folders[1], "org/digits", options(force=True))
    assert loopback.files("org/digits")[ARTIFACT_FILE] == (folders[1] / ARTIFACT_FILE).read_bytes()


def test_a_repository_of_a_later_format_is_not_published_over_even_by_force(loopback, options, folders):
    publish(folders[2], "org/digits", options())
    manifest = json.loads(loopback.files("org/digits")[MANIFEST_FILE])
    loopback.put("org/digits", MANIFEST_FILE, json.dumps(manifest | {"format_version": 2}).encode())
    with pytest.raises(NewerFormatError, match="Upgrade"):
        publish(folders[1], "org/digits", options(force=True))


# The card


def test_what_a_person_wrote_on_the_hub_survives_pushes_of_other_sizes(loopback, options, folders):
    publish(folders[2], "org/digits", options())
    card = loopback.files("org/digits")[CARD_FILE].decode()
    loopback.put("org/digits", CARD_FILE, (card + "\n## Thanks\n\nTo all — ümläut.\n").encode())
    publish(folders[1], "org/digits", options())
    publish(folders[3], "org/digits", options())
    assert loopback.files("org/digits")[CARD_FILE].decode().endswith("\n## Thanks\n\nTo all — ümläut.\n")


def test_a_card_that_arrives_altered_is_fetched_again_and_never_published(loopback, options, folders):
    publish(folders[2], "org/digits", options())
    card = loopback.files("org/digits")[CARD_FILE] + b"\nOurs.\n"
    loopback.put("org/digits", CARD_FILE, card)
    loopback.fault(f"GET .*/{CARD_FILE}", "flip", len(card) - 3)
    publish(folders[1], "org/digits", options())
    assert loopback.files("org/digits")[CARD_FILE].endswith(b"\nOurs.\n")
    loopback.put("org/digits", CARD_FILE, card + b"And more.\n")
    loopback.fault(f"GET .*/{CARD_FILE}", "flip", len(card) - 3, times=99)
    with pytest.raises(IntegrityError, match="arrives altered"):
        publish(folders[3], "org/digits", options())


# Failures


@pytest.mark.parametrize(
    "call", ["GET /api/datasets/org/digits$", "/preupload/", "PUT /lfs/", "/commit/", "/tag/"]
)
@pytest.mark.parametrize("kind", ["status", "cut"])
def test_one_failure_of_any_call_is_got_over(loopback, options, folders, call, kind):
    loopback.fault(call, kind, 503 if kind == "status" else 3)
    publish(folders[2], "org/digits", options(revision="v1"))
    assert len(commits(loopback)) == 1
    assert loopback.head("org/digits", "v1") is loopback.head("org/digits")


def test_a_hub_that_keeps_failing_is_said_to_and_nothing_is_published(loopback, options, folders):
    publish(folders[2], "org/digits", options())
    loopback.fault("/commit/", "status", 503, times=99)
    with pytest.raises(HubError, match=r"the Hub failed for org/digits: .*503.*Try again later"):
        publish(folders[1], "org/digits", options())
    assert len(commits(loopback)) == 1


def test_a_refusal_is_not_tried_again(loopback, options, folders):
    loopback.fault("POST .*/preupload/", "status", 400, times=99)
    with pytest.raises(HubError):
        publish(folders[2], "org/digits", options())
    assert sum("/preupload/" in path for _, path, _ in loopback.requests) == 1


@pytest.mark.parametrize(
    ("token", "repo", "message"),
    [
        ("hf_bob", "org/digits", "may not do this with org/digits"),
        ("hf_wrong", "org/digits", "does not accept the token"),
        ("hf_alice", "a b/c d", "not a repository name"),
        ("hf_alice", "bob/digits", "may not do this with bob/digits"),
    ],
)
def test_what_a_token_may_not_do_is_said_and_the_token_is_not(
    loopback, options, folders, token, repo, message
):
    with pytest.raises((AccessError, UsageError), match=message) as caught:
        publish(folders[1], repo, options(token))
    assert token not in str(caught.value)


def test_access_is_checked_before_a_long_run(loopback, options):
    check_access("org/digits", options())
    check_access("digits", options())
    check_access("bob/digits", options(create_pr=True))
    with pytest.raises(AccessError, match="expected a name under alice or org"):
        check_access("bob/digits", options())
    with pytest.raises(AccessError, match="does not accept the token"):
        check_access("org/digits", options("hf_wrong"))
    with pytest.raises(AccessError, match="nobody is logged in"):
        check_access("org/digits", options(token=None))


def test_a_commit_of_somebody_else_in_between_is_a_conflict_that_changes_nothing(loopback, options, folders):
    publish(folders[2], "org/digits", options())
    plan = plan_push(folders[1], "org/digits", options())
    loopback.put("org/digits", "notes.txt", b"mine")
    with pytest.raises(ConflictError, match="somebody else changed org/digits"):
        push(plan)
    assert "ipc1/manifest.json" not in loopback.files("org/digits")


def test_a_folder_that_changed_after_planning_is_not_pushed(loopback, options, tmp_path):
    folder = make_folder(tmp_path, make_artifact(2))
    publish(folder, "org/digits", options())
    make_folder(tmp_path, make_artifact(2, logits=False))
    plan = plan_push(folder, "org/digits", options())
    make_folder(tmp_path, make_artifact(2, channels=3))
    with pytest.raises(ConflictError, match="changed after the push was planned"):
        push(plan)
    assert len(commits(loopback)) == 1


def test_four_publishers_at_once_all_get_their_set_in_whole(loopback, options, folders, tmp_path):
    sizes = (1, 2, 3, 4)
    made = folders | {4: make_folder(tmp_path, make_artifact(4))}
    reports, failures = [], []

    def work(ipc):
        try:
            publish(made[ipc], "org/digits", options(), report=reports.append)
        except Exception as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(ipc,)) for ipc in sizes]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert failures == []
    assert len(commits(loopback)) == 4
    assert all("Planning it anew" in text for text in reports)
    published = loopback.files("org/digits")
    for ipc in sizes:
        for name in FOLDER_FILES:
            assert name == CARD_FILE or published[f"ipc{ipc}/{name}"] == (made[ipc] / name).read_bytes()


def test_the_loopback_hub_takes_the_same_files_for_large_as_the_hub(loopback, options, folders):
    """What `git lfs` tracks by default there: arrow, parquet, safetensors, images."""
    publish(folders[1], "org/digits", options())
    tree = loopback.head("org/digits").tree
    assert {path for path, blob in tree.items() if blob.large} == {p for p in tree if p.endswith(LARGE)}
