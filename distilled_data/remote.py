"""Sets in dataset repositories of the Hugging Face Hub: pinned to a commit, cached, verified on every load.

The Hub's client alone compares no hashes: it hands out what a server, a wire or a disk has altered. Here
every file is compared with the manifest of its commit, and with the lock file where there is one. What
differs is fetched once more, and else refused.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

from .client import LIBRARY, call
from .errors import ArtifactError, FormatError, IntegrityError, LockError, UsageError
from .format import ARTIFACT_FILE, MANIFEST_FILE, read_artifact
from .lock import LockedRepository
from .manifest import Fingerprint, Index, Manifest, read_manifest

T = TypeVar("T")


@dataclass(frozen=True)
class RemoteSet:
    """One set of a repository, in the cache and verified."""

    name: str  # its folder in the repository: "" or "ipc10"
    folder: Path  # in the cache; holds the artifact and its manifest
    commit: str
    manifest: Manifest


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

    def __post_init__(self):
        name, at, revision = self.repo_id.partition("@")
        if at and self.revision not in (None, revision):
            raise UsageError(f"{self.repo_id} names a revision, and revision={self.revision!r} another")
        self.repo_id, self.revision = name, revision if at else self.revision
        if self.lock is not None:
            self.commit = self.lock.commit
            if self.revision not in (None, self.lock.revision, self.lock.commit):
                raise LockError(
                    f"{name} is locked at {self.lock.revision or 'its default branch'}, revision "
                    f"{self.revision!r} was asked for. To lock that: "
                    f"python -m distilled_data lock {name}@{self.revision}"
                )

    def fetch(self, ipc: int | None = None) -> RemoteSet:
        """The set with `ipc` images per class or more, see `Index.choose`; None: the default one."""

        def fetch() -> RemoteSet:
            root = self._root()
            return self._set(root, root.choose(ipc) if isinstance(root, Index) else "")

        return self._repaired(fetch)

    def fetch_all(self) -> list[RemoteSet]:
        """Every set of the repository, down to the content hash of its tensors."""

        def fetch() -> list[RemoteSet]:
            root = self._root()
            names = root.configurations if isinstance(root, Index) else [""]
            sets = [self._set(root, name) for name in names]
            for found in sets:
                content_hash = read_artifact(found.folder / ARTIFACT_FILE).content_hash
                if content_hash != found.manifest.content_hash:
                    raise IntegrityError(
                        f"{found.folder / MANIFEST_FILE} says that the content hash is "
                        f"{found.manifest.content_hash}, the artifact beside it has {content_hash}."
                    )
            return sets

        return self._repaired(fetch)

    def locked(self) -> LockedRepository:
        """What a lock file has to say about this repository; fetches all its sets."""
        sets = self.fetch_all()
        artifacts = {_inside(found.name, ARTIFACT_FILE): found.manifest for found in sets}
        paths = {MANIFEST_FILE, *artifacts, *(_inside(found.name, MANIFEST_FILE) for found in sets)}
        return LockedRepository(
            self.repo_id,
            self.revision,
            sets[0].commit,
            files={path: Fingerprint.of(self._get(path)) for path in sorted(paths)},
            content_hashes={path: manifest.content_hash for path, manifest in artifacts.items()},
        )

    def _root(self) -> Manifest | Index:
        path = self._get(MANIFEST_FILE)
        self.commit = (
            path.parent.name
        )  # .../snapshots/COMMIT/manifest.json; everything else is of this commit
        return read_manifest(path.parent)

    def _set(self, root: Manifest | Index, name: str) -> RemoteSet:
        assert self.commit is not None
        if isinstance(root, Manifest):
            manifest = root
        else:
            path = self._get(_inside(name, MANIFEST_FILE), root.configurations[name])
            manifest = read_manifest(path.parent)
            if isinstance(manifest, Index):
                raise FormatError(f"{path} is an index inside an index; expected the manifest of one set")
        path = self._get(_inside(name, ARTIFACT_FILE), manifest.files[ARTIFACT_FILE])
        return RemoteSet(name, path.parent, self.commit, manifest)

    def _get(self, path: str, expected: Fingerprint | None = None) -> Path:
        """`path` of the commit in the cache, with the bytes that are `expected` and locked."""
        from huggingface_hub import hf_hub_download

        revision = self.commit or self.revision
        local = Path(
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
        advice = f"It is {path} of {self.repo_id}, in the cache of the Hub."
        if expected is not None:
            expected.check(local, advice)
        if self.lock is not None:
            self.lock.fingerprint(path).check(local, f"{advice} The lock file expects it.")
        return local

    def _repaired(self, fetch: Callable[[], T]) -> T:
        """`fetch()`, and once more past the cache if what it gave is damaged."""
        from huggingface_hub import constants

        try:
            return fetch()
        except ArtifactError:
            if self.local_files_only or constants.HF_HUB_OFFLINE:
                raise
        force_download, self.force_download = self.force_download, True
        try:
            return fetch()
        finally:
            self.force_download = force_download


def _inside(folder: str, name: str) -> str:
    return f"{folder}/{name}" if folder else name
