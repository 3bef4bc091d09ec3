"""`distilled.lock`: which bytes a project's sets are, to be committed beside its code.

TOML, one table for each repository. The commit says where the files are, size and sha256 what they are:

    version = 1

    [[repository]]
    id = "org/cifar100-ncfm"
    revision = "v1"
    commit = "…"
    files = [
      { path = "distilled.safetensors", size = 1, sha256 = "…", content_hash = "…" },
      { path = "manifest.json", size = 1, sha256 = "…" },
    ]
"""

import contextlib
import json
import os
import re
import tomllib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .errors import LockError
from .files import make_folder, write_file
from .manifest import Fingerprint, fingerprints, hexadecimal

LOCK_FILE = "distilled.lock"
LOCK_VERSION = 1

_HEADER = "# Which bytes the distilled sets of this project are. Written by: python -m distilled_data lock\n"


@dataclass(frozen=True)
class LockedRepository:
    id: str
    revision: str | None  # as it was asked for; None: the default branch
    commit: str
    files: Mapping[str, Fingerprint]  # by their paths in the repository
    content_hashes: Mapping[str, str]  # of the artifacts among them, see `Artifact.content_hash`

    def fingerprint(self, path: str) -> Fingerprint:
        if path not in self.files:
            raise LockError(f"the lock of {self.id} does not hold {path}. Lock it again.")
        return self.files[path]


def read_lock(path: str | Path, missing_ok: bool = False) -> dict[str, LockedRepository]:
    """The locked repositories by their names; none of a file that may be missing. Raises `LockError`."""
    path = Path(path)
    try:
        content = tomllib.loads(path.read_text(encoding="utf-8-sig"))
        if type(content["version"]) is not int or content["version"] != LOCK_VERSION:
            raise ValueError(f"version {content['version']!r}, this package reads {LOCK_VERSION}")
        found = [_repository(table) for table in content.get("repository", [])]
        if len({repository.id for repository in found}) < len(found):
            raise ValueError("a repository is there twice")
    except FileNotFoundError as error:
        if missing_ok:
            return {}
        raise LockError(
            f"{path} does not exist. Write it: python -m distilled_data lock org/name@v1"
        ) from error
    except OSError as error:
        raise LockError(f"{path} cannot be read: {error.strerror}") from error
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise LockError(
            f"{path} is not a lock file of version {LOCK_VERSION}: {error!r:.200}. Restore it from version "
            "control, or delete it and lock again."
        ) from error
    return {repository.id: repository for repository in found}


def find_locked(path: str | Path, repo_id: str) -> LockedRepository:
    """The entry of `repo_id` in the lock file `path`. Raises `LockError`."""
    locked = read_lock(path)
    if repo_id not in locked:
        raise LockError(
            f"{path} does not hold {repo_id}; it holds {', '.join(locked) or 'nothing'}. "
            f"Add it: python -m distilled_data lock {repo_id} --lock {path}"
        )
    return locked[repo_id]


def write_lock(path: str | Path, repositories: Iterable[LockedRepository]) -> None:
    """Replace `path` atomically. Equal content gives equal bytes. Raises `OutputError`."""
    tables = [_table(repository) for repository in sorted(repositories, key=lambda r: r.id)]
    write_file(path, "\n".join([f"{_HEADER}version = {LOCK_VERSION}\n", *tables]).encode())


def add_locked(path: str | Path, found: Mapping[str, LockedRepository]) -> None:
    """Put entries into the lock file `path`, beside those that others put there, be it at the same time.

    Raises `LockError` and `OutputError`.
    """
    make_folder(Path(path).parent)
    with _alone_in(Path(path).parent):
        write_lock(path, {**read_lock(path, missing_ok=True), **found}.values())


@contextlib.contextmanager
def _alone_in(folder: Path) -> Iterator[None]:
    """Who enters it too waits, but on Windows, and where a mount cannot lock a folder."""
    with contextlib.ExitStack() as held:
        with contextlib.suppress(ImportError, OSError):
            import fcntl

            descriptor = os.open(folder, os.O_RDONLY)
            held.callback(os.close, descriptor)
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield


def _repository(table: dict[str, Any]) -> LockedRepository:
    rows = table["files"]
    if len({row["path"] for row in rows}) < len(rows):  # as a merge may leave it
        raise ValueError(f"a file of {table['id']} is there twice")
    repository = LockedRepository(
        id=table["id"],
        revision=table.get("revision"),
        commit=table["commit"],
        files=fingerprints({row["path"]: row for row in rows}),
        content_hashes={
            row["path"]: hexadecimal(row["content_hash"]) for row in rows if "content_hash" in row
        },
    )
    if not isinstance(repository.id, str) or not isinstance(repository.revision, str | None):
        raise ValueError(f"the repository {repository.id!r}@{repository.revision!r}")
    if not re.fullmatch("[0-9a-f]{40}", repository.commit):
        raise ValueError(f"the commit {repository.commit!r}")
    return repository


def _table(repository: LockedRepository) -> str:
    lines = ["[[repository]]", f"id = {_string(repository.id)}"]
    if repository.revision is not None:
        lines.append(f"revision = {_string(repository.revision)}")
    lines += [f"commit = {_string(repository.commit)}", "files = ["]
    for path, file in sorted(repository.files.items()):
        row = f"path = {_string(path)}, size = {file.size}, sha256 = {_string(file.sha256)}"
        if path in repository.content_hashes:
            row += f", content_hash = {_string(repository.content_hashes[path])}"
        lines.append(f"  {{ {row} }},")
    return "\n".join([*lines, "]", ""])


def _string(text: str) -> str:
    """A basic string of TOML, which escapes as JSON does, and DEL besides."""
    return json.dumps(text, ensure_ascii=False).replace("\x7f", "\\u007f")
