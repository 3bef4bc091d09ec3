"""What a dataset repository of the Hub holds at one commit."""

import dataclasses
import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TypeVar

from huggingface_hub import HfApi
from huggingface_hub.errors import RepositoryNotFoundError
from huggingface_hub.hf_api import RepoFile

from distilled_data import AccessError, ArtifactError, IntegrityError, NewerFormatError, UsageError
from distilled_data.client import call
from distilled_data.format import ARTIFACT_FILE, CARD_FILE, MANIFEST_FILE
from distilled_data.manifest import CONFIGURATION, Fingerprint, inside
from distilled_data.remote import RemoteSet, Repository

from .card import text_of

T = TypeVar("T")


@dataclass(frozen=True)
class Contents:
    """What is on the Hub at one commit."""

    head: str | None = None  # None: there is no such repository
    tagged: str | None = None
    private: bool | None = None
    gated: str | bool | None = None
    files: Mapping[str, RepoFile] = field(default_factory=dict)
    sets: Mapping[str, RemoteSet] = field(default_factory=dict)  # by folder ("", ipc1), the default first
    broken: tuple[str, ...] = ()  # folders of sets that cannot be read, "" for the root
    card: str | None = None
    source: Repository | None = None  # from which files are fetched

    def sha256(self, path: str) -> str:
        """Of a file; the Hub knows it of a large one, a small one is fetched for it."""
        entry = self.files[path]
        if entry.lfs:
            return entry.lfs.sha256
        assert self.source is not None
        return Fingerprint.of(self.source.file(path)).sha256


def look(api: HfApi, repo_id: str, *, tag: str | None, force: bool) -> Contents:
    """Read the head of `repo_id`. With `force`, sets that are damaged are noted and not refused.

    Raises `AccessError`, `HubError`, `IntegrityError`, and `UsageError` where `tag` is a branch.
    """
    try:
        info = call(repo_id, api.dataset_info, repo_id)
    except AccessError as error:
        if type(error.__cause__) is not RepositoryNotFoundError:
            raise
        return Contents()
    head = info.sha
    assert head is not None
    refs = call(repo_id, api.list_repo_refs, repo_id, repo_type="dataset")
    if tag in {branch.name for branch in refs.branches}:
        raise UsageError(f"{repo_id} has a branch {tag!r}; a tag of the same name would hide it")
    tagged = {tag.name: tag.target_commit for tag in refs.tags}.get(tag or "")
    entries = call(
        repo_id, lambda: list(api.list_repo_tree(repo_id, recursive=True, revision=head, repo_type="dataset"))
    )
    files = {entry.path: entry for entry in entries if isinstance(entry, RepoFile)}
    source = Repository(repo_id, head, api.token, api.endpoint)
    held = [path.removesuffix(f"/{ARTIFACT_FILE}") for path in files if path.endswith(f"/{ARTIFACT_FILE}")]
    held = [name for name in held if CONFIGURATION.fullmatch(name) and inside(name, MANIFEST_FILE) in files]
    folders = sorted(held, key=lambda name: (len(name), name))

    def names() -> list[str]:
        if MANIFEST_FILE not in files and folders:
            raise IntegrityError(
                f"there are {' and '.join(folders)}, and no {MANIFEST_FILE} that lists them."
            )
        return source.names() if MANIFEST_FILE in files else []

    sets: dict[str, RemoteSet] = {}
    broken: list[str] = []
    known, fetch = _sound(names, repo_id, force), source.fetch_whole
    if known is None:  # each folder of a set has a manifest of its own to go by
        known, fetch = folders, source.fetch_alone

    def fetched(name: str) -> RemoteSet:
        for path in (inside(name, MANIFEST_FILE), inside(name, ARTIFACT_FILE)):
            if path not in files:  # as where a person removed a set
                raise IntegrityError(f"{path}, which the {MANIFEST_FILE} names, is not there.")
        return fetch(name)

    for name in known:
        if found := _sound(lambda name=name: fetched(name), repo_id, force):
            sets[name] = found
        else:
            broken.append(name)
    card = _card(source, files[CARD_FILE]) if CARD_FILE in files else None
    return Contents(head, tagged, info.private, info.gated, files, sets, tuple(broken), card, source)


def hub_hash(entry: RepoFile) -> str:
    """What the Hub knows a file by: the sha256 of a large one, the git object of a small one."""
    return entry.lfs.sha256 if entry.lfs else entry.blob_id


def git_hash(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def _sound(read: Callable[[], T], repo_id: str, force: bool) -> T | None:
    """What is read from the repository; where it is damaged an error or, with `force`, None."""
    try:
        return read()
    except NewerFormatError:
        raise
    except ArtifactError as error:
        if force:
            return None
        raise IntegrityError(
            f"{repo_id} holds something that is not a sound distilled set: {error} Publish elsewhere, or "
            "over it with --force, which keeps the sets that are sound."
        ) from error


def _card(source: Repository, entry: RepoFile) -> str:
    """The card on the Hub, byte for byte: what people wrote in it is going to be published again."""
    content, repo_id = b"", source.repo_id
    for force in (False, True):
        content = dataclasses.replace(source, force_download=force).file(CARD_FILE).read_bytes()
        if git_hash(content) == entry.blob_id:
            return text_of(content, f"{CARD_FILE} of {repo_id}")
    raise IntegrityError(
        f"{CARD_FILE} of {repo_id}@{source.revision} arrives altered: expected the git object "
        f"{entry.blob_id}, got {git_hash(content)}. Nothing was pushed."
    )
