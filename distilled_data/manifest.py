"""`manifest.json`: size and sha256 of the files of a set, or of the sets that share a repository.

In the folder of a set, over every file but the card, which people edit:

    {"format_version": 1, "content_hash": "…",
     "files": {"distilled.safetensors": {"sha256": "…", "size": 1}, "preview.png": …}}

A repository with one set is such a folder. One with several has each in a folder of its own, named by its
images per class, and in its root an index over their manifests:

    {"format_version": 1, "default": "ipc10", "checksum": "…",
     "configurations": {"ipc1": {"sha256": "…", "size": 1}, "ipc10": …}}

Damage to an artifact or to its manifest shows when the two are compared. An index that names another default
would still fit all sets, so it has a checksum of its own: sha256 of the other entries, as sorted JSON without
spaces.
"""

import hashlib
import json
import os
import re
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from queue import SimpleQueue
from threading import Thread
from typing import Any

import torch
from torch import Tensor

from .errors import FormatError, IntegrityError, UsageError
from .files import regular, write_file, write_files
from .format import (
    ARTIFACT_FILE,
    CARD_FILE,
    FOLDER_FILES,
    FORMAT_VERSION,
    MANIFEST_FILE,
    Artifact,
    artifact_bytes,
    read_artifact,
    refuse_newer,
    unique_keys,
)
from .indexing import as_int

MAX_BYTES = 1_000_000  # of a manifest; what is larger is something else
CHUNK = 2**19  # bytes that are read before they are hashed
TRIES = 10  # to read a file that others replace
BETWEEN = 0.1  # seconds from a new artifact to its manifest, more than enough where nobody was killed

CONFIGURATION = re.compile("ipc[1-9][0-9]{0,5}")  # see `configuration_name`


@dataclass(frozen=True)
class Fingerprint:
    """Of the bytes of one file."""

    sha256: str  # lower-case hexadecimal
    size: int  # bytes

    @classmethod
    def of(cls, path: Path) -> "Fingerprint":
        with regular(path).open("rb") as file:
            return cls(hashlib.file_digest(file, "sha256").hexdigest(), file.tell())

    @classmethod
    def of_bytes(cls, content: bytes) -> "Fingerprint":
        return cls(hashlib.sha256(content).hexdigest(), len(content))

    def check(self, path: Path, advice: str, content: bytes | None = None) -> None:
        """Raise `IntegrityError` unless `path`, or the `content` read from it, has these bytes."""
        try:
            found = Fingerprint.of(path) if content is None else Fingerprint.of_bytes(content)
        except OSError as error:
            raise IntegrityError(f"{path} cannot be read: {error.strerror}. {advice}") from error
        self.compare(found, path, advice)

    def compare(self, found: "Fingerprint", path: Path, advice: str) -> None:
        """Raise `IntegrityError` unless `found`, that of `path`, is this one."""
        if found != self:
            raise IntegrityError(
                f"{path} is not the file that was published: expected sha256 {self.sha256} "
                f"({self.size} bytes), got {found.sha256} ({found.size} bytes). {advice}"
            )


@dataclass(frozen=True)
class Manifest:
    """Of the folder of one set."""

    content_hash: str  # of the tensors, see `Artifact.content_hash`
    files: Mapping[str, Fingerprint]

    def to_bytes(self) -> bytes:
        return _json(content_hash=self.content_hash, files=_plain(self.files))


@dataclass(frozen=True)
class Index:
    """Of a repository with several sets: the fingerprints of their manifests."""

    default: str
    configurations: Mapping[str, Fingerprint]  # by folder: ipc1, ipc10, ...

    def to_bytes(self) -> bytes:
        content = {"default": self.default, "configurations": _plain(self.configurations)}
        checked = json.dumps(content, sort_keys=True, separators=(",", ":")).encode()
        return _json(**content, checksum=Fingerprint.of_bytes(checked).sha256)

    def choose(self, ipc: int | None) -> str:
        """The folder to read `ipc` images per class from.

        That is the set distilled for so many, else the smallest one with more; for None the default. Raises
        `UsageError` where none has as many.
        """
        if ipc is None:
            return self.default
        sizes = {int(name.removeprefix("ipc")): name for name in self.configurations}
        wanted = as_int("ipc", ipc, None)
        for size in sorted(sizes):
            if size >= wanted > 0:
                return sizes[size]
        raise UsageError(
            f"ipc={ipc!r} was asked for; the repository holds sets of {', '.join(map(str, sorted(sizes)))} "
            "images per class, and any smaller number as the first of those"
        )


def configuration_name(ipc: int) -> str:
    return f"ipc{ipc}"


def inside(folder: str, name: str) -> str:
    """The path in a repository of the file `name` of the set in `folder`, "" for the root."""
    return f"{folder}/{name}" if folder else name


def parse_manifest(
    content: bytes, where: str | Path, advice: str = "Get the folder again."
) -> Manifest | Index:
    """Raises `FormatError` for anything else, naming `where` it was found."""
    try:
        if len(content) > MAX_BYTES:
            raise ValueError(f"more than {MAX_BYTES} bytes")
        manifest = json.loads(content, object_pairs_hook=unique_keys)
        version = manifest["format_version"]
        refuse_newer(version, where)
        if type(version) is not int or version != FORMAT_VERSION:
            raise ValueError(f"format version {version!r}")
        if "configurations" in manifest:
            names = fingerprints(manifest["configurations"])
            if not all(map(CONFIGURATION.fullmatch, names)) or manifest["default"] not in names:
                raise ValueError("configurations that are not ipc1, ipc2, ...")
            index = Index(manifest["default"], names)
            if json.loads(index.to_bytes()) != manifest:
                raise ValueError("its checksum or an entry is another one")
            return index
        files = fingerprints(manifest["files"])
        if ARTIFACT_FILE not in files or set(files) - set(FOLDER_FILES):
            raise ValueError(f"the files {sorted(files)}")
        return Manifest(hexadecimal(manifest["content_hash"]), files)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise FormatError(
            f"{where} is not a manifest of format version {FORMAT_VERSION}: {error!r:.200}. {advice}"
        ) from error


def read_manifest(
    folder: str | Path, expected: Sequence[Fingerprint] = (), advice: str = "Get the folder again."
) -> Manifest | Index:
    """Raises `FormatError`, and `IntegrityError` unless its bytes are all that is `expected`."""
    path = Path(folder) / MANIFEST_FILE
    try:
        with regular(path).open("rb") as file:
            content = file.read(MAX_BYTES + 1)
    except (FileNotFoundError, NotADirectoryError) as error:
        if not Path(folder).is_dir():
            what = "is a file" if Path(folder).exists() else "does not exist"
            raise FormatError(f"{folder} {what}; expected the folder of a set") from error
        raise FormatError(
            f"{path} is missing, so nothing in this folder can be verified. Expected a folder written by "
            "distill_and_push.py or downloaded whole; what other projects publish is read by convert.py."
        ) from error
    except OSError as error:
        raise FormatError(f"{path} cannot be read: {error.strerror}. {advice}") from error
    for fingerprint in expected:
        fingerprint.check(path, advice, content)
    return parse_manifest(content, path, advice)


def read_verified(
    path: Path,
    expected: Sequence[Fingerprint],
    *,
    ipc: int | None = None,
    classes: Sequence[str | int] | None = None,
    advice: str = "Get the folder again.",
) -> Artifact:
    """`read_artifact` of a file whose bytes are `expected`, and were so while it was read.

    Of a whole artifact every byte is read once: the tensors are the memory that was hashed. A file that is
    replaced meanwhile, as by processes that repair one cache at once, is read again.
    """
    for _ in range(TRIES):
        before = size, inode, _ = _identity(path, advice)
        for fingerprint in expected:
            if path.is_file() and size != fingerprint.size:  # told before so many bytes are read
                raise IntegrityError(
                    f"{path} is not the file that was published: expected sha256 {fingerprint.sha256} "
                    f"({fingerprint.size} bytes), got {size} bytes. {advice}"
                )
        try:
            artifact = _read_compared(path, expected, ipc, classes, advice)
            if (after := _identity(path, advice)) == before:
                return artifact
        except Exception:  # of two files, as the reader opens it more than once
            if (after := _identity(path, advice)) == before:
                raise
        if after[1] == inode:  # the same file, altered
            break
    raise IntegrityError(f"{path} changed while it was read. Load it again.")


def _identity(path: Path, advice: str) -> tuple[int, int, int]:
    try:
        status = path.stat()
    except FileNotFoundError as error:
        raise IntegrityError(f"{path} is missing; the manifest names it. {advice}") from error
    except OSError as error:
        raise IntegrityError(f"{path} cannot be read: {error.strerror}. {advice}") from error
    return status.st_size, status.st_ino, status.st_mtime_ns


def _read_compared(
    path: Path,
    expected: Sequence[Fingerprint],
    ipc: int | None,
    classes: Sequence[str | int] | None,
    advice: str,
) -> Artifact:
    content, fingerprint_of = None, Fingerprint.of
    try:
        if ipc is None and classes is None:
            content, fingerprint_of = read_hashed(path)
        try:
            return read_artifact(path, ipc=ipc, classes=classes, content=content)
        finally:  # that the bytes were altered says more than what it broke
            found = fingerprint_of(path)
            for fingerprint in expected:
                fingerprint.compare(found, path, advice)
    except OSError as error:
        raise IntegrityError(f"{path} cannot be read: {error.strerror}. {advice}") from error


def read_hashed(path: Path) -> tuple[Tensor, Callable[[Path], Fingerprint]]:
    """The bytes of a file, uint8 [size], and what waits for their fingerprint, made while they are read."""
    with regular(path).open("rb", buffering=0) as file:
        content = torch.empty(os.fstat(file.fileno()).st_size, dtype=torch.uint8, device="cpu")
        memory, digest, ends, size = content.numpy().data, hashlib.sha256(), SimpleQueue[int](), 0

        def follow() -> None:
            done = 0
            while end := ends.get():
                digest.update(memory[done:end])
                done = end

        thread = Thread(target=follow, daemon=True)
        try:
            thread.start()
            while count := file.readinto(memory[size : size + CHUNK]):
                size += count
                ends.put(size)
        finally:
            ends.put(0)

    def fingerprint_of(_: Path) -> Fingerprint:
        thread.join()
        return Fingerprint(digest.hexdigest(), size)

    return content[:size], fingerprint_of


def write_manifest(folder: str | Path) -> Manifest:
    """Write `manifest.json` over every file of the format that is in `folder`, and return it."""
    folder = Path(folder)
    names = [name for name in FOLDER_FILES if name not in (CARD_FILE, MANIFEST_FILE)]
    files = {name: Fingerprint.of(folder / name) for name in names if (folder / name).exists()}
    manifest = Manifest(read_artifact(folder / ARTIFACT_FILE).content_hash, files)
    write_file(folder / MANIFEST_FILE, manifest.to_bytes())
    return manifest


def replace_artifact(folder: Path, artifact: Artifact) -> None:
    """Write another artifact into a folder, and its manifest: of a kill at any time but between their renames
    both are old, or both new.
    """
    content, manifest = artifact_bytes(artifact), read_manifest(folder)
    assert isinstance(manifest, Manifest)
    files = {**manifest.files, ARTIFACT_FILE: Fingerprint.of_bytes(content)}
    changed = Manifest(artifact.content_hash, files)
    write_files({folder / ARTIFACT_FILE: content, folder / MANIFEST_FILE: changed.to_bytes()})


def verify_folder(folder: str | Path, others: Sequence[str] | None = None) -> Artifact:
    """Compare the artifact, and the files `others` (default: all in the manifest), with `manifest.json`.

    Returns the artifact of those bytes. Raises `IntegrityError` for a file that is missing or differs,
    `FormatError` for no folder of one set.
    """
    folder = Path(folder)
    manifest = read_manifest(folder)
    if isinstance(manifest, Index):
        raise FormatError(
            f"{folder} holds several sets; expected the folder of one: {', '.join(manifest.configurations)}"
        )
    try:
        for name in manifest.files if others is None else others:
            if name == ARTIFACT_FILE:  # hashed as it is read
                continue
            path = folder / name
            if not path.is_file():
                raise IntegrityError(f"{path} is missing; the manifest names it. Get the folder again.")
            manifest.files[name].check(path, "Get the folder again.")
        artifact = read_verified(folder / ARTIFACT_FILE, [manifest.files[ARTIFACT_FILE]])
        if artifact.content_hash != manifest.content_hash:
            raise IntegrityError(
                f"{folder}: the manifest says {manifest.content_hash}, the artifact is "
                f"{artifact.content_hash}. Get the folder again."
            )
        return artifact
    except IntegrityError:
        if not replaced(folder, manifest):
            raise
        return verify_folder(folder, others)


def replaced(folder: Path, manifest: Manifest) -> bool:
    """Whether others wrote another manifest, or do so in a moment, as where results are recorded."""
    if read_manifest(folder) == manifest:
        time.sleep(BETWEEN)
    return read_manifest(folder) != manifest


def fingerprints(rows: Mapping[str, Any]) -> dict[str, Fingerprint]:
    """From their form in JSON or TOML. Raises `ValueError`, `TypeError`, `KeyError`."""
    found = {name: Fingerprint(hexadecimal(row["sha256"]), row["size"]) for name, row in rows.items()}
    if not all(type(entry.size) is int and entry.size >= 0 for entry in found.values()):
        raise ValueError("a size that is not a number of bytes")
    return found


def hexadecimal(text: str) -> str:
    if not re.fullmatch("[0-9a-f]{64}", text):
        raise ValueError(f"{text!r:.80} is not a sha256")
    return text


def _plain(entries: Mapping[str, Fingerprint]) -> dict[str, dict[str, Any]]:
    return {name: asdict(entry) for name, entry in entries.items()}


def _json(**content: object) -> bytes:
    return json.dumps({"format_version": FORMAT_VERSION} | content, indent=1, sort_keys=True).encode() + b"\n"
