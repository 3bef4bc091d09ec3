"""Sets in dataset repositories of the Hugging Face Hub: pinned to a commit, cached, verified on every load.

The Hub's client alone compares no hashes: it hands out what a server, a wire or a disk has altered. Here
every file is compared with the manifest of its commit, and with the lock file where there is one. What
differs is fetched once more, and else refused.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

from .client import LIBRARY, call, check_arguments
from .errors import (
    ArtifactError,
    FormatError,
    HubError,
    IntegrityError,
    LockError,
    NewerFormatError,
    UsageError,
)
from .format import ARTIFACT_FILE, MANIFEST_FILE, Artifact
from .lock import LockedRepository
from .manifest import Fingerprint, Index, Manifest, parse_manifest, read_manifest, read_verified

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
        name, at, revision = self.repo_id.partition("@")
        if at and self.revision not in (None, revision):
            raise UsageError(f"{self.repo_id} names a revision, and revision={self.revision!r} another")
        self.repo_id, self.revision = name, revision if at else self.revision
        check_arguments(self.repo_id, self.token, self.endpoint)
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
                    f"python -m distilled_data lock {name}@{self.revision}"
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

        def fetch() -> RemoteSet:
            found = self._set(self._root(), name)
            expected, content_hash = found.manifest.content_hash, found.artifact.content_hash
            locked = {} if self.lock is None else self.lock.content_hashes
            if {content_hash, locked.get(_inside(name, ARTIFACT_FILE), expected)} != {expected}:
                raise IntegrityError(
                    f"{found.folder / ARTIFACT_FILE}: expected the content hash {expected} by the manifest, "
                    f"and by the lock file, if there is one; got {content_hash}."
                )
            return found

        return self._repaired(fetch)

    def fetch_all(self) -> list[RemoteSet]:
        """Every set, as `fetch_whole` does it."""
        return [self.fetch_whole(name) for name in self.names()]

    def locked(self) -> LockedRepository:
        """What a lock file has to say about this repository; fetches all its sets."""
        sets, manifests = self.fetch_all(), {MANIFEST_FILE: self._repaired(self._root)}
        manifests |= {_inside(found.name, MANIFEST_FILE): found.manifest for found in sets}
        files = {_inside(found.name, ARTIFACT_FILE): found.manifest.files[ARTIFACT_FILE] for found in sets}
        for path, manifest in manifests.items():
            content = self._get(path).read_bytes()
            if parse_manifest(content, path) != manifest:
                raise IntegrityError(f"{path} of {self.repo_id} changed while it was read. Lock it again.")
            files[path] = Fingerprint.of_bytes(content)
        hashes = {_inside(found.name, ARTIFACT_FILE): found.manifest.content_hash for found in sets}
        return LockedRepository(self.repo_id, self.revision, sets[0].commit, files, hashes)

    def _root(self) -> Manifest | Index:
        folder = self._get(MANIFEST_FILE).parent
        self.commit = folder.name  # .../snapshots/COMMIT/manifest.json; everything else is of this commit
        return read_manifest(folder, self._expected(MANIFEST_FILE), self._advice(MANIFEST_FILE))

    def _set(
        self,
        root: Manifest | Index,
        name: str,
        ipc: int | None = None,
        classes: Sequence[str | int] | None = None,
    ) -> RemoteSet:
        assert self.commit is not None
        manifest, path = root, _inside(name, MANIFEST_FILE)
        if isinstance(root, Index):
            expected = self._expected(path, root.configurations[name])
            manifest = read_manifest(self._get(path).parent, expected, self._advice(path))
        if isinstance(manifest, Index):
            raise FormatError(
                f"{self.repo_id}: {path} is an index inside an index; expected the manifest of a set"
            )
        path = _inside(name, ARTIFACT_FILE)
        local = self._get(path)
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

    def _get(self, path: str) -> Path:
        """`path` of the commit in the cache, as the client has it."""
        from huggingface_hub import hf_hub_download

        revision = self.commit or self.revision
        return Path(
            call(
                self.repo_id if revision is None else f"{self.repo_id}@{revision}",
                hf_hub_download,
                self.repo_id,
                path,
                repo_type="dataset",
                revision=revision,
                token=self.token,
                endpoint=self.endpoint,
                cache_dir=self.cache_dir,
                local_files_only=self.local_files_only,
                force_download=self.force_download,
                library_name=LIBRARY,
            )
        )

    def _repaired(self, fetch: Callable[[], T]) -> T:
        """`fetch()`, and once more past the cache if what it gave is damaged."""
        from huggingface_hub import constants

        try:
            return fetch()
        except NewerFormatError:
            raise
        except ArtifactError as error:
            if self.local_files_only or constants.HF_HUB_OFFLINE:
                raise
            damage = error
        force_download, self.force_download = self.force_download, True
        try:
            return fetch()
        except HubError as error:
            raise type(damage)(f"{damage} It could not be fetched again: {error}") from error
        finally:
            self.force_download = force_download


def _inside(folder: str, name: str) -> str:
    return f"{folder}/{name}" if folder else name
