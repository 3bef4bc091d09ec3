"""Publishing: one commit of a plan, then a tag.

Killed or failing at any moment, it leaves what was there or the whole new state; the same push again does
what is missing. Only a tag that is moved is away for a moment, since the Hub deletes and creates it.
"""

import contextlib
import dataclasses
import random
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import CommitOperationAdd, CommitOperationCopy, CommitOperationDelete, HfApi

from distilled_data import AccessError, ConflictError, HubError
from distilled_data.client import call, check_arguments, once
from distilled_data.manifest import Fingerprint

from .plan import PlannedFile, PushOptions, PushPlan, contents_for, hub_api, plan_push

Operation = CommitOperationAdd | CommitOperationCopy | CommitOperationDelete
TRIES = 10  # of a push, each after somebody else's commit came before it


@dataclass(frozen=True)
class Pushed:
    url: str  # of the commit or the pull request
    commit: str
    changed: bool  # False: everything was there already

    def __str__(self) -> str:
        return f"{'published' if self.changed else 'nothing to publish, it is there already'}: {self.url}"


def push(plan: PushPlan) -> Pushed:
    """Publish in one commit on top of the planned parent, then tag it.

    Raises `ConflictError` when the repository or the folder changed since it was planned: nothing is
    published then.
    """
    api, options = hub_api(plan.options), plan.options
    if plan.parent is None:
        _create(api, plan)
        # Somebody may have been there between; so look again, and plan against what is there now.
        plan = plan_push(plan.folder, plan.repo_id, options)
    assert plan.parent is not None
    operations = [_operation(file, plan.parent) for file in plan.changes]
    if plan.settings:
        call(plan.repo_id, api.update_repo_settings, plan.repo_id, repo_type="dataset", **plan.settings)
    done = Pushed(f"{plan.url}/commit/{plan.parent}", plan.parent, changed=False)
    if plan.changes:
        done = _commit(api, plan, operations)
    if options.revision and plan.tagged != done.commit:
        _set_tag(api, plan, options.revision, done.commit)
    return done


def push_folder(
    folder: str | Path,
    repo_id: str,
    options: PushOptions | None = None,
    report: Callable[[str], None] = print,
) -> Pushed:
    """Plan and push, and plan anew as long as others publish to the same repository at the same time.

    Raises `AccessError` for what this token may not do, `HubError` when the Hub fails, `ConflictError` if
    others always were faster, `UsageError`, and the `ArtifactError` of what is wrong with the folder.
    """
    for attempt in range(TRIES - 1):
        try:
            return push(plan_push(folder, repo_id, options))
        except ConflictError as error:
            report(f"{error} Planning it anew.")
        time.sleep(random.uniform(0, min(4.0, 0.2 * 2**attempt)))
    return push(plan_push(folder, repo_id, options))


def check_access(repo_id: str, options: PushOptions | None = None) -> None:
    """Raise for what would fail a push after hours of work: no login, another's repository, damage in it.

    `AccessError`, `HubError`, `UsageError` or, of damage without `force`, `IntegrityError`.
    """
    options = options or PushOptions()
    check_arguments(repo_id, options.token, options.endpoint)
    api = hub_api(options)
    user = call(repo_id, api.whoami)
    names = [user["name"], *(organisation["name"] for organisation in user.get("orgs", ()))]
    namespace = repo_id.split("/")[0] if "/" in repo_id else user["name"]
    if namespace not in names and not options.create_pr:
        raise AccessError(
            f"{user['name']} may not publish to {repo_id}: expected a name under {' or '.join(names)}. For a "
            "repository of somebody else open a pull request: --create-pr"
        )
    if user.get("auth", {}).get("accessToken", {}).get("role") == "read":
        raise AccessError(
            f"the token of {user['name']} may only read; publishing to {repo_id} needs one that writes"
        )
    contents_for(api, repo_id if "/" in repo_id else f"{namespace}/{repo_id}", options)


def _create(api: HfApi, plan: PushPlan) -> None:
    # None: the organisation's own choice, which --private can only narrow.
    private = plan.options.private or None
    try:
        call(plan.repo_id, api.create_repo, plan.repo_id, repo_type="dataset", private=private)
    except ConflictError as error:
        try:
            call(plan.repo_id, api.dataset_info, plan.repo_id)
        except AccessError:
            raise AccessError(f"{plan.repo_id} exists already, and this token may not see it") from error
        raise


def _commit(api: HfApi, plan: PushPlan, operations: list[Operation]) -> Pushed:
    pull_request = plan.options.create_pr
    try:
        # A pull request is opened once: after a lost answer a second try would open another.
        made = (once if pull_request else call)(
            plan.repo_id,
            api.create_commit,
            plan.repo_id,
            operations,
            commit_message=plan.message,
            repo_type="dataset",
            parent_commit=plan.parent,
            create_pr=pull_request,
        )
        return Pushed(made.pr_url or made.commit_url, made.oid, changed=True)
    except ConflictError:
        # Perhaps it is our own commit, the answer to which was lost.
        now = plan_push(plan.folder, plan.repo_id, dataclasses.replace(plan.options, revision=None))
        if pull_request or now.changes or now.parent is None:
            raise
        return Pushed(f"{plan.url}/commit/{now.parent}", now.parent, changed=True)


def _set_tag(api: HfApi, plan: PushPlan, tag: str, commit: str) -> None:
    def create(target: str) -> None:
        call(plan.repo_id, api.create_tag, plan.repo_id, tag=tag, revision=target, repo_type="dataset")

    try:
        if plan.tagged is not None:  # the Hub has no other way to move a tag
            with contextlib.suppress(AccessError):  # it is gone: an answer that was lost, or somebody else
                call(plan.repo_id, api.delete_tag, plan.repo_id, tag=tag, repo_type="dataset")
        create(commit)
    except ConflictError as error:
        refs = call(plan.repo_id, api.list_repo_refs, plan.repo_id, repo_type="dataset")
        if commit not in [known.target_commit for known in refs.tags if known.name == tag]:
            raise ConflictError(
                f"the commit {commit} is published; its tag is not, somebody else has set {tag!r} meanwhile."
            ) from error
    except HubError as error:
        if plan.tagged is not None:
            with contextlib.suppress(HubError):
                create(plan.tagged)
        raise type(error)(
            f"the commit {commit} is published; its tag {tag!r} is not set: {error} The same command sets it."
        ) from error


def _operation(file: PlannedFile, parent: str) -> Operation:
    if file.content is None:
        return CommitOperationDelete(file.path)
    if isinstance(file.content, str):
        return CommitOperationCopy(file.content, file.path, src_revision=parent)
    content = file.content if isinstance(file.content, bytes) else _as_planned(file.content, file)
    return CommitOperationAdd(file.path, content)


def _as_planned(path: Path, file: PlannedFile) -> bytes:
    """The content itself: the client reads a file when it sends it, and it may be another one by then."""
    with contextlib.suppress(OSError):  # it is gone
        content = path.read_bytes()
        if Fingerprint.of_bytes(content) == Fingerprint(file.hash, file.size):
            return content
    raise ConflictError(f"{path} changed after the push was planned. Nothing was pushed.")
