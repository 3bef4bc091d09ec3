"""Publishing: a plan, which is plain data that can be read before anything happens, and one commit of it.

A repository holds one set in its root, as a folder does. When a set of another size comes, both get a folder
of their own, `ipc10/` and `ipc50/`, with one card over them and an index of their manifests.
"""

import hashlib
import random
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from huggingface_hub import CommitOperationAdd, CommitOperationCopy, CommitOperationDelete, HfApi
from huggingface_hub.errors import RepositoryNotFoundError
from huggingface_hub.hf_api import RepoFile

from distilled_data import (
    AccessError,
    Artifact,
    ArtifactError,
    ConflictError,
    FormatError,
    IntegrityError,
    NewerFormatError,
    UsageError,
)
from distilled_data.client import LIBRARY, call, once
from distilled_data.format import ARTIFACT_FILE, CARD_FILE, FOLDER_FILES, MANIFEST_FILE, read_artifact
from distilled_data.manifest import Fingerprint, Index, configuration_name, verify_folder
from distilled_data.remote import RemoteSet, Repository

from .card import render_card

TRIES = 10  # of a push, each after somebody else's commit came before it


@dataclass(frozen=True)
class PushOptions:
    revision: str | None = None  # tag of the commit
    private: bool = False  # a repository that is created
    gated: Literal["auto", "manual"] | None = None  # a repository that is created
    create_pr: bool = False  # open a pull request instead of committing
    default: bool = False  # make this set the one that is loaded without `ipc`; else the first one stays it
    force: bool = False  # move a tag that exists; replace sets that cannot be read
    endpoint: str | None = None  # address of the Hub; None: HF_ENDPOINT, or huggingface.co
    token: str | None = field(default=None, repr=False)  # None: HF_TOKEN, or the stored login

    def __post_init__(self):
        if self.create_pr and self.revision:
            raise UsageError("a pull request cannot be tagged before it is merged; leave out one of the two")


@dataclass(frozen=True)
class PlannedFile:
    path: str  # in the repository
    change: str  # new, changed, unchanged, moved, removed
    size: int  # bytes
    sha256: str  # of a file that goes, of its git object
    content: Path | bytes | str | None = field(repr=False)  # file, bytes, or where in the repository it was


@dataclass(frozen=True)
class PushPlan:
    """What `push` is going to do; `str(plan)` describes it. Made by `plan_push`."""

    folder: Path
    repo_id: str
    url: str
    parent: str | None  # commit this is planned against; None: the repository is created
    tagged: str | None  # commit that has the tag now
    files: tuple[PlannedFile, ...]
    message: str  # of the commit
    options: PushOptions

    @property
    def changes(self) -> list[PlannedFile]:
        return [file for file in self.files if file.change != "unchanged"]

    @property
    def moves_tag(self) -> bool:
        return self.tagged is not None and (bool(self.changes) or self.tagged != self.parent)

    def __str__(self) -> str:
        options = self.options
        kind = f"{'private' if options.private else 'public'} repository"
        kind += f", gated ({options.gated})," if options.gated else ""
        change = f"{'pull request' if options.create_pr else 'commit'}: {self.message}"
        tag = f"{options.revision or 'none'}{f', moved from {self.tagged}' if self.moves_tag else ''}"
        lines = [
            f"push to {self.url}",
            f"  parent   {self.parent or f'none: a {kind} is created'}",
            f"  change   {change if self.changes else 'none, everything is there already'}",
            f"  tag      {tag}",
        ]
        width = max(len(file.path) for file in self.files)
        lines += [
            f"  {file.change:<9}  {file.path:<{width}}  {file.size:>11,} bytes  sha256 {file.sha256}"
            for file in self.files
        ]
        return "\n".join(lines)


@dataclass(frozen=True)
class Pushed:
    url: str  # of the commit or the pull request
    commit: str
    changed: bool  # False: everything was there already

    def __str__(self) -> str:
        return f"{'published' if self.changed else 'nothing to publish, it is there already'}: {self.url}"


def plan_push(folder: str | Path, repo_id: str, options: PushOptions | None = None) -> PushPlan:
    """Plan publishing a complete artifact folder to the dataset repository `repo_id` ("org/name").

    Reads the Hub and changes nothing. Where the repository has a card, it is that card which is brought up
    to date: the words of the folder's own card are used only where there is none.

    Raises `FormatError` and `IntegrityError` for an unfit folder, `UsageError` for a tag that exists and for
    a repository that holds something else, `AccessError`, `HubError`.
    """
    folder, options = Path(folder), options or PushOptions()
    verify_folder(folder)
    artifact = read_artifact(folder / ARTIFACT_FILE)
    api = _api(options)
    if "/" not in repo_id:
        repo_id = f"{call(repo_id, api.whoami)['name']}/{repo_id}"
    remote = _look(api, repo_id, options)
    if remote.head is None and options.create_pr:
        raise AccessError(f"{repo_id} does not exist, so there is nothing to open a pull request for")
    wanted, sets = _wanted(folder, artifact, remote, options.default)
    card = remote.card
    if card is None and (folder / CARD_FILE).exists():
        card = (folder / CARD_FILE).read_text(encoding="utf-8")
    wanted[CARD_FILE] = render_card(sets, card, repo_id=repo_id).encode()
    metadata = artifact.metadata
    plan = PushPlan(
        folder=folder,
        repo_id=repo_id,
        url=f"{api.endpoint}/datasets/{repo_id}",
        parent=remote.head,
        tagged=remote.tagged,
        files=_planned_files(wanted, remote),
        message=f"{metadata.dataset}: {metadata.ipc} images per class, content {artifact.content_hash[:12]}",
        options=options,
    )
    if plan.moves_tag and not options.force:
        raise UsageError(
            f"{repo_id} has a tag {options.revision!r} already, on {remote.tagged}, and whoever uses it "
            "relies on that. Choose another one, or move it with --force."
        )
    return plan


def push(plan: PushPlan) -> Pushed:
    """Publish in one commit on top of the planned parent, then tag it.

    Killed or failing at any moment it leaves the old state or the whole new one, which may lack its tag;
    the same push again does what is missing. Raises `ConflictError` when the repository or the folder
    changed since it was planned: nothing is published then.
    """
    api, options = _api(plan.options), plan.options
    if plan.parent is None:
        call(plan.repo_id, api.create_repo, plan.repo_id, repo_type="dataset", private=options.private)
        if options.gated:
            call(
                plan.repo_id, api.update_repo_settings, plan.repo_id, repo_type="dataset", gated=options.gated
            )
        # Somebody may have been there between; so look again, and plan against what is there now.
        plan = plan_push(plan.folder, plan.repo_id, options)
    assert plan.parent is not None
    for file in plan.changes:
        if isinstance(file.content, Path) and Fingerprint.of(file.content) != Fingerprint(
            file.sha256, file.size
        ):
            raise ConflictError(f"{file.content} changed after the push was planned. Nothing was pushed.")
    commit, url = plan.parent, f"{plan.url}/commit/{plan.parent}"
    if plan.changes:
        # A pull request is opened once: after a lost answer a second try would open another.
        made = (once if options.create_pr else call)(
            plan.repo_id,
            api.create_commit,
            plan.repo_id,
            [_operation(file, plan.parent) for file in plan.changes],
            commit_message=plan.message,
            repo_type="dataset",
            parent_commit=plan.parent,
            create_pr=options.create_pr,
        )
        commit, url = made.oid, made.pr_url or made.commit_url
    if options.revision and plan.tagged != commit:
        if plan.tagged is not None:
            call(plan.repo_id, api.delete_tag, plan.repo_id, tag=options.revision, repo_type="dataset")
        call(
            plan.repo_id,
            api.create_tag,
            plan.repo_id,
            tag=options.revision,
            revision=commit,
            repo_type="dataset",
        )
    return Pushed(url, commit, bool(plan.changes))


def publish(
    folder: str | Path,
    repo_id: str,
    options: PushOptions | None = None,
    report: Callable[[str], None] = print,
) -> Pushed:
    """Plan and push, and plan anew as long as others publish to the same repository at the same time."""
    for attempt in range(TRIES):
        try:
            return push(plan_push(folder, repo_id, options))
        except ConflictError as error:
            if attempt == TRIES - 1:
                raise
            report(f"{error} Planning it anew.")
        time.sleep(random.uniform(0, min(4.0, 0.2 * 2**attempt)))
    raise AssertionError("unreachable")


def check_access(repo_id: str, options: PushOptions | None = None) -> None:
    """Raise `AccessError` for what would fail a push after hours of work: no login, another's repository."""
    options = options or PushOptions()
    user = call(repo_id, _api(options).whoami)
    names = [user["name"], *(organisation["name"] for organisation in user.get("orgs", ()))]
    namespace = repo_id.split("/")[0] if "/" in repo_id else user["name"]
    if namespace not in names and not options.create_pr:
        raise AccessError(
            f"{user['name']} may not publish to {repo_id}: expected a name under {' or '.join(names)}. For a "
            "repository of somebody else open a pull request: --create-pr"
        )


@dataclass(frozen=True)
class _Remote:
    """What is on the Hub at one commit."""

    head: str | None = None  # None: there is no such repository
    tagged: str | None = None
    files: Mapping[str, RepoFile] = field(default_factory=dict)
    sets: Mapping[str, RemoteSet] = field(default_factory=dict)  # by folder; "" alone, or ipc1, ipc10, ...
    default: str | None = None
    card: str | None = None


def _api(options: PushOptions) -> HfApi:
    return HfApi(endpoint=options.endpoint, token=options.token, library_name=LIBRARY)


def _look(api: HfApi, repo_id: str, options: PushOptions) -> _Remote:
    try:
        head = call(repo_id, api.dataset_info, repo_id).sha
    except AccessError as error:
        if type(error.__cause__) is not RepositoryNotFoundError:
            raise
        return _Remote()
    assert head is not None
    refs = call(repo_id, api.list_repo_refs, repo_id, repo_type="dataset")
    tagged = {tag.name: tag.target_commit for tag in refs.tags}.get(options.revision or "")
    entries = call(
        repo_id, lambda: list(api.list_repo_tree(repo_id, recursive=True, revision=head, repo_type="dataset"))
    )
    files = {entry.path: entry for entry in entries if isinstance(entry, RepoFile)}
    source = Repository(repo_id, head, options.token, options.endpoint)
    sets, default = {}, None
    if MANIFEST_FILE in files:
        try:
            sets = {found.name: found for found in source.fetch_all()}
            default = source.fetch().name
        except NewerFormatError:
            raise
        except ArtifactError as error:
            if not options.force:
                raise IntegrityError(
                    f"{repo_id} holds something that is not a sound distilled set: {error} Publish "
                    "elsewhere, or over it with --force."
                ) from error
    card = _card(api, repo_id, head, files[CARD_FILE]) if CARD_FILE in files else None
    return _Remote(head, tagged, files, sets, default, card)


def _card(api: HfApi, repo_id: str, head: str, entry: RepoFile) -> str:
    """The card on the Hub, byte for byte: what people wrote in it is going to be published again."""
    for force in (False, True):
        path = call(
            repo_id,
            api.hf_hub_download,
            repo_id,
            CARD_FILE,
            repo_type="dataset",
            revision=head,
            force_download=force,
        )
        content = Path(path).read_bytes()
        if _git_hash(content) == entry.blob_id:
            return content.decode()
    raise IntegrityError(
        f"{CARD_FILE} of {repo_id}@{head} arrives altered: expected the git object {entry.blob_id}, got "
        f"{_git_hash(content)}. Nothing was pushed."
    )


def _wanted(
    folder: Path, artifact: Artifact, remote: _Remote, default: bool
) -> tuple[dict[str, Path | bytes | str], dict[str, Artifact]]:
    """Where the content of every file comes from, and the sets by their folders, the default first.

    The content is in a local file, in bytes, or at a path in the repository, from where it moves.
    """
    files = {name: folder / name for name in FOLDER_FILES if name != CARD_FILE}
    for path in files.values():
        if not path.is_file():
            raise FormatError(
                f"{folder} has no {path.name}. Write it with hub.complete_folder({str(folder)!r})."
            )
    name = configuration_name(artifact.metadata.ipc)
    others = {known: found for known, found in remote.sets.items() if known != name}
    sets = {known: read_artifact(found.folder / ARTIFACT_FILE) for known, found in others.items()}
    if set(sets) == {""} and configuration_name(sets[""].metadata.ipc) == name:
        others, sets = {}, {}  # the same size again: it takes the place
    for other in sets.values():
        if (other.metadata.dataset, other.metadata.classes) != (
            artifact.metadata.dataset,
            artifact.metadata.classes,
        ):
            raise UsageError(
                f"the repository holds {other.metadata.dataset} with {len(other.metadata.classes)} classes, "
                f"this is {artifact.metadata.dataset} with {len(artifact.metadata.classes)}. Publish it "
                "elsewhere."
            )
    if not others and name not in remote.sets:
        return dict(files), {"": artifact}
    wanted: dict[str, Path | bytes | str] = {f"{name}/{path}": local for path, local in files.items()}
    manifests = {name: (folder / MANIFEST_FILE).read_bytes()}
    first = name if remote.default is None else remote.default
    for known, found in others.items():
        place = known or configuration_name(sets[known].metadata.ipc)
        manifests[place] = (found.folder / MANIFEST_FILE).read_bytes()
        wanted |= {f"{place}/{path}": f"{known}/{path}" if known else path for path in found.manifest.files}
        wanted[f"{place}/{MANIFEST_FILE}"] = manifests[place]
        sets[place] = sets.pop(known)
        first = place if known == first else first
    sets[name] = artifact
    first = name if default else first
    order = sorted(sets, key=lambda place: (place != first, sets[place].metadata.ipc))
    prints = {place: Fingerprint.of_bytes(manifests[place]) for place in sorted(order)}
    wanted[MANIFEST_FILE] = Index(first, prints).to_bytes()
    return wanted, {place: sets[place] for place in order}


def _planned_files(wanted: Mapping[str, Path | bytes | str], remote: _Remote) -> tuple[PlannedFile, ...]:
    planned = []
    for path, content in wanted.items():
        there = remote.files.get(path)
        if isinstance(content, str):
            source = remote.files[content]
            change = "unchanged" if content == path else "moved"
            planned.append(PlannedFile(path, change, source.size, _hash(source), content))
            continue
        data = content if isinstance(content, bytes) else content.read_bytes()
        found = Fingerprint.of_bytes(data)
        if there is None:
            change = "new"
        else:
            local = found.sha256 if there.lfs else _git_hash(data)
            change = "unchanged" if local == _hash(there) else "changed"
        planned.append(PlannedFile(path, change, found.size, found.sha256, content))
    moved = {content for content in wanted.values() if isinstance(content, str)}
    for path in sorted(moved - set(wanted)):
        entry = remote.files[path]
        planned.append(PlannedFile(path, "removed", entry.size, _hash(entry), None))
    return tuple(planned)


def _operation(
    file: PlannedFile, parent: str
) -> CommitOperationAdd | CommitOperationCopy | CommitOperationDelete:
    if file.content is None:
        return CommitOperationDelete(file.path)
    if isinstance(file.content, str):
        return CommitOperationCopy(file.content, file.path, src_revision=parent)
    return CommitOperationAdd(file.path, file.content)


def _hash(entry: RepoFile) -> str:
    """What the Hub knows a file by: the sha256 of a large one, the git object of a small one."""
    return entry.lfs.sha256 if entry.lfs else entry.blob_id


def _git_hash(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
