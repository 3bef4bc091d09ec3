"""Sets in dataset repositories of the Hugging Face Hub: pinned to a commit, cached, verified on every load.

The Hub's client alone compares no hashes: it hands out what a server, a wire or a disk has altered. Here
every file is compared with the manifest of its commit, and with the lock file where there is one. What
differs is fetched once more, and else refused.
"""

import re
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TypeVar

from .client import LIBRARY, call, check_arguments, refused
from .errors import (
    ArtifactError,
    FormatError,
    HubError,
    IntegrityError,
    LockError,
    NewerFormatError,
    OutputError,
    UsageError,
)
from .files import move
from .format import ARTIFACT_FILE, MANIFEST_FILE, Artifact
from .lock import LockedRepository
from .manifest import (
    Fingerprint,
    Index,
    Manifest,
    configuration_name,
    inside,
    parse_manifest,
    read_manifest,
    read_verified,
)

T = TypeVar("T")


@dataclass(frozen=True)
class RemoteSet:
    """One set of a repository, verified."""

    name: str  # its folder in the repository: "" or "ipc10"
    folder: Path  # in the cache; holds the artifact file and its manifest
    commit: str
    manifest: Manifest
    artifact: Artifact


@dataclass
class Repository:
    """A dataset repository at one commit: that of `lock`, else the one `revision` is when first asked.

    `repo_id` may be "org/name@revision"; the fields that are not explained are those of
    `huggingface_hub.hf_hub_download`. Methods raise `AccessError`, `HubError`, `ArtifactError`, `LockError`
    for a file that the lock does not hold, and `OutputError` for a cache that cannot be written.
    """

    repo_id: str
    revision: str | None = None  # branch, tag or commit
    token: str | bool | None = field(default=None, repr=False)
    endpoint: str | None = None
    cache_dir: str | Path | None = None
    local_files_only: bool = False
    force_download: bool = False
    lock: LockedRepository | None = None
    commit: str | None = field(default=None, init=False)

    def __post_init__(self) -> None:
        if not isinstance(self.repo_id, str):
            raise UsageError(f"{self.repo_id!r} is not a repository name like org/cifar100-ncfm")
        name, at, revision = self.repo_id.partition("@")
        if at and self.revision not in (None, revision):
            raise UsageError(f"{self.repo_id} names a revision, and revision={self.revision!r} another")
        self.repo_id, self.revision = name, revision if at else self.revision
        check_arguments(self.repo_id, self.token, self.endpoint)
        if not isinstance(self.revision, str | None):
            raise UsageError(f"the revision of {name} must be a text such as 'v1', got {self.revision!r}")
        if self.revision == "":
            raise UsageError(f"the revision of {name} is empty; leave it out for the default branch")
        if self.force_download and self.local_files_only:
            raise UsageError(
                "force_download=True fetches anew and local_files_only=True forbids it; choose one"
            )
        if self.lock is not None:
            self.commit = self.lock.commit
            if self.revision not in (None, self.lock.revision, self.lock.commit):
                raise LockError(
                    f"{name} is locked at {self.lock.revision or 'its default branch'}, revision "
                    f"{self.revision!r} was asked for. To lock that: "
                    f"python -m distilled_data lock {name}@{self.revision} (--lock names another file)"
                )

    def names(self) -> list[str]:
        """The folders of the sets, the default first; [""] for one set in the root."""
        root = self._repaired(self._root)
        if isinstance(root, Manifest):
            return [""]
        return sorted(root.configurations, key=lambda name: (name != root.default, len(name), name))

    def fetch(self, ipc: int | None = None, classes: Sequence[str | int] | None = None) -> RemoteSet:
        """The first `ipc` ranks of `classes`, of the set that `Index.choose` finds; None: all there is."""

        def fetch() -> RemoteSet:
            root = self._root()
            return self._set(root, root.choose(ipc) if isinstance(root, Index) else "", ipc, classes)

        return self._repaired(fetch)

    def fetch_whole(self, name: str) -> RemoteSet:
        """The set in the folder `name`, compared down to the content hash of its tensors."""

        return self._repaired(lambda: self._checked(self._set(self._root(), name)))

    def fetch_alone(self, name: str) -> RemoteSet:
        """The set in the folder `name`, by its own manifest: whatever the index says, or if there is none."""

        def fetch() -> RemoteSet:
            folder = self.file(inside(name, MANIFEST_FILE)).parent
            manifest = read_manifest(folder)
            if isinstance(manifest, Index):
                raise FormatError(f"{folder / MANIFEST_FILE} is an index; expected the manifest of a set.")
            found = self._checked(self._set(manifest, name))
            if configuration_name(found.artifact.metadata.ipc) != name:
                ipc = found.artifact.metadata.ipc
                raise FormatError(f"{folder} holds {ipc} images per class; expected those of its name.")
            return found

        return self._repaired(fetch)

    def fetch_all(self) -> list[RemoteSet]:
        """Every set, as `fetch_whole` does it."""
        return [self.fetch_whole(name) for name in self.names()]

    def locked(self) -> LockedRepository:
        """What a lock file has to say about this repository; fetches all its sets.

        The revision is looked up on the Hub: what a cache takes it for may be an older commit.
        """
        if not re.fullmatch("[0-9a-f]{40}", self.revision or ""):
            where = f"{self.repo_id}@{self.revision}" if self.revision else self.repo_id
            self.commit = call(where, self._commit_now)
        sets, manifests = self.fetch_all(), {MANIFEST_FILE: self._repaired(self._root)}
        manifests |= {inside(found.name, MANIFEST_FILE): found.manifest for found in sets}
        files = {inside(found.name, ARTIFACT_FILE): found.manifest.files[ARTIFACT_FILE] for found in sets}
        for path, manifest in manifests.items():
            content = self.file(path).read_bytes()
            if parse_manifest(content, path) != manifest:
                raise IntegrityError(f"{path} of {self.repo_id} changed while it was read. Lock it again.")
            files[path] = Fingerprint.of_bytes(content)
        hashes = {inside(found.name, ARTIFACT_FILE): found.manifest.content_hash for found in sets}
        return LockedRepository(self.repo_id, self.revision, sets[0].commit, files, hashes)

    def _commit_now(self) -> str | None:
        from huggingface_hub import get_hf_file_metadata, hf_hub_url

        place = {"repo_type": "dataset", "revision": self.revision, "endpoint": self.endpoint}
        url = hf_hub_url(self.repo_id, MANIFEST_FILE, **place)
        return get_hf_file_metadata(url, token=self.token, library_name=LIBRARY).commit_hash

    def _checked(self, found: RemoteSet) -> RemoteSet:
        expected, content_hash = found.manifest.content_hash, found.artifact.content_hash
        locked = {} if self.lock is None else self.lock.content_hashes
        wanted = {"manifest": expected, "lock file": locked.get(inside(found.name, ARTIFACT_FILE), expected)}
        for by, expected in wanted.items():
            if content_hash != expected:
                raise IntegrityError(
                    f"{found.folder / ARTIFACT_FILE}: expected the content hash {expected} by the {by}, "
                    f"got {content_hash}."
                )
        return found

    def _root(self) -> Manifest | Index:
        folder = self.file(MANIFEST_FILE).parent
        return read_manifest(folder, self._expected(MANIFEST_FILE), self._advice(MANIFEST_FILE))

    def _set(
        self,
        root: Manifest | Index,
        name: str,
        ipc: int | None = None,
        classes: Sequence[str | int] | None = None,
    ) -> RemoteSet:
        assert self.commit is not None
        manifest, path = root, inside(name, MANIFEST_FILE)
        if isinstance(root, Index):
            expected = self._expected(path, root.configurations[name])
            manifest = read_manifest(self.file(path).parent, expected, self._advice(path))
        if isinstance(manifest, Index):
            raise FormatError(
                f"{self.repo_id}: {path} is an index inside an index; expected the manifest of a set."
            )
        path = inside(name, ARTIFACT_FILE)
        local = self.file(path)
        artifact = read_verified(
            local,
            self._expected(path, manifest.files[ARTIFACT_FILE]),
            ipc=ipc,
            classes=classes,
            advice=self._advice(path),
        )
        return RemoteSet(name, local.parent, self.commit, manifest, artifact)

    def _expected(self, path: str, *published: Fingerprint) -> list[Fingerprint]:
        return [*published, *([] if self.lock is None else [self.lock.fingerprint(path)])]

    def _advice(self, path: str) -> str:
        by = "its manifest" if self.lock is None else "its manifest and the lock file"
        return f"It is {path} of {self.repo_id}@{self.commit}; {by} must agree with it."

    def file(self, path: str) -> Path:
        """`path` of the commit in the cache, as the client has it."""
        revision = self.commit or self.revision
        where = self.repo_id if revision is None else f"{self.repo_id}@{revision}"
        local = Path(call(where, self._download, path, revision))
        if self.commit is None and refused():
            warnings.warn(
                f"the Hub refuses {where}: it is not there any more, or not for this token. What the "
                "cache holds is used, as it was when it was loaded last",
                stacklevel=7,  # the call of from_hub
            )
        self.commit = local.parents[path.count("/")].name  # .../snapshots/COMMIT/; all else is of this one
        return local

    def _download(self, path: str, revision: str | None) -> str:
        from huggingface_hub import hf_hub_download, try_to_load_from_cache

        place = {"repo_type": "dataset", "revision": revision, "cache_dir": self.cache_dir}
        known = self.force_download and self.commit  # else the cache may be of an older commit than the Hub
        there = try_to_load_from_cache(self.repo_id, path, **place) if known else None
        options = {
            "token": self.token,
            "endpoint": self.endpoint,
            "local_files_only": self.local_files_only,
            "force_download": self.force_download,
            "library_name": LIBRARY,
        }
        if not isinstance(there, str) or Path(there).is_symlink():
            return hf_hub_download(self.repo_id, path, **place, **options)
        # What the client fetches anew becomes a blob, and a snapshot that is no link to it stays as it is.
        repository = Path(there).parents[path.count("/") + 2]  # its folder in the cache
        with TemporaryDirectory(prefix=".fetched-", dir=repository) as fresh:
            move(hf_hub_download(self.repo_id, path, **place, **options, local_dir=fresh), Path(there))
        return there

    def _repaired(self, fetch: Callable[[], T]) -> T:
        """`fetch()`, and once more past the cache if what it gave is damaged."""
        from huggingface_hub import constants

        try:
            return fetch()
        except NewerFormatError:
            raise
        except ArtifactError as error:
            if self.local_files_only or constants.HF_HUB_OFFLINE:
                raise type(error)(f"{error} Loaded with a connection, it is fetched again.") from error
            damage = error
        force_download, self.force_download = self.force_download, True
        try:
            return fetch()
        except (HubError, OutputError) as error:
            raise type(damage)(f"{damage} It could not be fetched again: {error}") from error
        finally:
            self.force_download = force_download
