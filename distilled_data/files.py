"""Files and folders that are there whole or not at all."""

import contextlib
import errno
import json
import os
import shutil
import stat
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from .errors import CheckpointError, OutputError, UsageError

TRIES = 20 if os.name == "nt" else 1  # to replace a file that others read
PAUSE = 0.05  # seconds between them

_OF_DISKS = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO, errno.EMFILE}


def write_file(path: str | Path, content: bytes) -> None:
    """Replace `path` by `content` atomically and durably, mode 0644. Raises `OutputError`."""
    write_files({Path(path): content})


def write_files(contents: Mapping[Path, bytes]) -> None:
    """`write_file` of files that belong together: all are on the disk before the first takes its place."""
    path, temporaries = Path(), dict[Path, str]()
    state = "The old file, if there was one, is untouched."
    try:
        for path, content in contents.items():
            path.parent.mkdir(parents=True, exist_ok=True)
            descriptor, temporaries[path] = tempfile.mkstemp(
                prefix=f".{path.name}.", suffix=".tmp", dir=path.parent
            )
            with os.fdopen(descriptor, "wb") as file:
                file.write(content)
                file.flush()
                with contextlib.suppress(OSError):  # mounts without modes
                    os.chmod(temporaries[path], 0o644)
                os.fsync(file.fileno())
        for path in contents:
            move(temporaries[path], path)
            del temporaries[path]
        state = "The new file is in its place, but a power cut may undo that."
        for folder in {path.parent for path in contents}:
            _sync(folder)  # the renames themselves must survive a power cut
    except OSError as error:
        raise OutputError(
            f"could not write {path} ({len(contents[path])} bytes): {error.strerror}. {state} {advice(error)}"
        ) from error
    finally:  # after Ctrl-C too
        for temporary in temporaries.values():
            with contextlib.suppress(OSError):
                os.unlink(temporary)


def move(source: str | Path, target: Path) -> None:
    """Put a file in the place of another. Windows refuses that while anybody reads the other one, so there it
    is tried again for a second.
    """
    for _ in range(TRIES - 1):
        with contextlib.suppress(PermissionError):
            return os.replace(source, target)
        time.sleep(PAUSE)
    os.replace(source, target)


def advice(error: OSError) -> str:
    """What there is to do about an output that cannot be written."""
    ways = {errno.EMFILE: "Allow more open files (ulimit -n)"}
    ways |= dict.fromkeys((errno.ENOSPC, errno.EDQUOT), "Free some space")
    return f"{ways.get(error.errno or 0, 'Check the folder')} and run again."


def told(error: OSError) -> str | None:
    """Words for an error of a file, or of what is printed, that nobody told as ours; None for another one, as
    of a connection.
    """
    if not error.strerror or (error.filename is None and error.errno not in _OF_DISKS):
        return None
    place = error.filename or "a file, or what is printed"
    return f"could not read or write {place}: {error.strerror}. {advice(error)}"


def _sync(folder: Path) -> None:
    try:
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    except OSError as error:
        if error.errno not in (errno.EACCES, errno.EPERM, errno.EINVAL, errno.ENOTSUP):
            raise  # those are of Windows, and of mounts whose folders cannot be synced


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A file to fill, which takes the place of `path` at the end; on any error it is removed."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.{threading.get_ident()}.tmp")
    try:
        yield temporary
        move(temporary, path)
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()


def regular(path: Path) -> Path:
    """`path`. Raises `OSError` for a pipe, which keeps who opens it waiting, and a device, which may have no
    end: a folder of somebody else's may hold them, or links to them.
    """
    if not (stat.S_ISREG(mode := path.stat().st_mode) or stat.S_ISDIR(mode)):
        raise OSError(errno.EINVAL, "it is a pipe or a device, not a file", str(path))
    return path


def write_json(path: Path, content: Any) -> None:
    """`write_file` of JSON that a person can read."""
    write_file(path, json.dumps(content, indent=1).encode() + b"\n")


def read_json(path: Path) -> dict[str, Any]:
    """The object that `write_json` wrote. Raises `CheckpointError` for a damaged file, `OutputError` for one
    that cannot be read, and `FileNotFoundError`.
    """
    try:
        content = json.loads(regular(path).read_bytes())
        if not isinstance(content, dict):
            raise ValueError(f"expected an object, got {content!r:.40}")
        return content
    except (ValueError, RecursionError) as error:  # of JSON or UTF-8
        raise CheckpointError(f"{path} is damaged: {error}. Remove it and run again.") from error
    except FileNotFoundError:
        raise
    except OSError as error:
        raise OutputError(f"{path} cannot be read: {error.strerror}. Check it, and run again.") from error


def make_folder(path: Path) -> None:
    """The folder `path` and those it lies in, where they are missing. Raises `OutputError`."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(f"could not make the folder {path}: {error.strerror}. Choose another.") from error


def check_new(path: Path) -> None:
    """Raise `UsageError` if something is there that is not an empty folder, `OutputError` if none can be."""
    try:
        taken = path.exists() and (not path.is_dir() or any(path.iterdir()))
    except OSError as error:
        raise OutputError(f"could not write {path}: {error.strerror or error}. {advice(error)}") from error
    if taken:
        raise UsageError(f"{path} is not an empty folder; choose another one")


@contextlib.contextmanager
def new_folder(path: str | Path) -> Iterator[Path]:
    """A folder to fill, which becomes `path` at the end: all of it or, on any error or kill, none of it.

    Raises `UsageError` if something is there that is not an empty folder, and `OutputError`.
    """
    path, temporary = Path(path).resolve(), None
    check_new(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
        yield temporary
        with contextlib.suppress(OSError):  # mounts without modes
            temporary.chmod(0o755)
        with contextlib.suppress(FileNotFoundError):
            path.rmdir()  # Windows puts no folder in the place of another, be it empty
        os.replace(temporary, path)
    except OutputError:
        raise
    except OSError as error:
        raise OutputError(f"could not write {path}: {error.strerror or error}. {advice(error)}") from error
    finally:
        if temporary is not None:
            shutil.rmtree(temporary, ignore_errors=True)
