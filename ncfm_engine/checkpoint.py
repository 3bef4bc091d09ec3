"""Saved progress of any stage: one safetensors file with a JSON header, and the one before it.

    the current one is also the previous one ─► a new one is written beside it ─► it becomes the current one

So at every moment at least one whole checkpoint exists, whatever kills the process or fills the disk.
"""

import contextlib
import hashlib
import json
import os
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from distilled_data import CheckpointError, OutputError
from distilled_data.files import write_file

FORMAT = 1


@dataclass(frozen=True)
class Checkpoint:
    """`progress` is what the stage put there; `tensors` lie on the CPU."""

    path: Path
    progress: dict[str, Any]
    tensors: dict[str, Tensor]


class _DamagedError(Exception):
    """A file that is not a whole checkpoint."""


def previous_of(path: Path) -> Path:
    """Where the checkpoint before the one at `path` lies."""
    return path.with_suffix(".previous.safetensors")


def save_checkpoint(
    path: Path, tensors: Mapping[str, Tensor], *, identity: Mapping[str, Any], progress: Mapping[str, Any]
) -> None:
    """Replace the checkpoint at `path`, keeping the last one beside it.

    `identity` (flat, JSON) is everything that the progress depends on. Raises `OutputError` when the disk is
    full; the last checkpoint is then still there.
    """
    stored = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    head = {"format": FORMAT, "identity": dict(identity), "progress": dict(progress)}
    head["sha256"] = _digest(head, stored)
    content = save(stored, {"checkpoint": json.dumps(head)})
    with contextlib.suppress(_DamagedError, CheckpointError, OutputError, FileNotFoundError):
        _read(path)  # a damaged one must not replace the one before it
        _keep(path)  # unless another process, which did the same, is done and discards both
    write_file(path, content)


def discard(path: Path) -> None:
    """Remove the checkpoint at `path` and the one before it, where they are."""
    for generation in (path, previous_of(path)):
        generation.unlink(missing_ok=True)


def _keep(path: Path) -> None:
    """Let the previous checkpoint be the current one, which stays where it is."""
    link = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        link.unlink(missing_ok=True)
        link.hardlink_to(path)
        link.replace(previous_of(path))
    except OSError:  # a file system without links, or that takes no more: writing says so
        write_file(previous_of(path), path.read_bytes())
    finally:
        with contextlib.suppress(OSError):
            link.unlink()  # POSIX leaves it where the two were one file already, after a kill


def load_checkpoint(path: Path, identity: Mapping[str, Any]) -> Checkpoint | None:
    """The newest whole checkpoint, or None where there is none.

    A damaged one is passed over with a warning that names the one used instead. Raises `CheckpointError`
    when all are damaged, or when the newest was made under another `identity`; the differences are listed;
    and `OutputError` for one that cannot be read.
    """
    found = [candidate for candidate in (path, previous_of(path)) if candidate.exists()]
    damages = []
    for candidate in found:
        try:
            checkpoint, recorded = _read(candidate)
        except _DamagedError as error:
            damages.append(f"{candidate} is not a whole checkpoint ({error})")
            continue
        wanted = json.loads(json.dumps(dict(identity)))
        if recorded != wanted:
            raise CheckpointError(
                f"{candidate} belongs to another run: {_differences(recorded, wanted)}. Use the settings "
                "that it was made with, or start again: in another folder, with --overwrite where a command "
                "has that, or after removing this file."
            )
        if damages:
            warnings.warn(f"{damages[0]}; going on from the one before it, {candidate}", stacklevel=2)
        return checkpoint
    if damages:
        raise CheckpointError(f"{'; '.join(damages)}. Remove these files; what they are of then begins anew.")
    return None


def identity_of(path: Path) -> dict[str, Any] | None:
    """What the newest whole checkpoint was made under, or None where there is none."""
    for candidate in (path, previous_of(path)):
        with contextlib.suppress(_DamagedError, CheckpointError, OutputError):
            return _read(candidate)[1]
    return None


def _read(path: Path) -> tuple[Checkpoint, dict[str, Any]]:
    """What lies at `path`, and the identity it was made under."""
    try:
        path.open("rb").close()
    except FileNotFoundError as error:
        raise _DamagedError(error) from error
    except OSError as error:  # a right, a limit, a disk: no damage that is mended by removing the file
        raise OutputError(f"{path} cannot be read: {error.strerror}. Check it, and run again.") from error
    try:
        with safe_open(path, framework="pt") as file:
            head = json.loads(file.metadata()["checkpoint"])
            version, recorded = head["format"], head.get("identity")
            if version == FORMAT:
                tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
                digest = head.pop("sha256")
    except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
        raise _DamagedError(error) from error
    if version != FORMAT:
        raise CheckpointError(
            f"{path} has checkpoint format {version}; this version reads format {FORMAT}. Finish the run "
            "with the version that began it, or start again with --overwrite."
        )
    if digest != _digest(head, tensors):
        raise _DamagedError("its content differs from its checksum")
    return Checkpoint(path, head["progress"], tensors), recorded


def under(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors whose names begin with `prefix`, by the rest of their names."""
    return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}


def _digest(head: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256(json.dumps(head, sort_keys=True).encode())
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name}:{tensor.dtype}:{list(tensor.shape)}:".encode())
        digest.update(tensor.numpy().tobytes())
    return digest.hexdigest()


def _differences(recorded: dict[str, Any], wanted: dict[str, Any]) -> str:
    names = sorted(name for name in {*recorded, *wanted} if recorded.get(name) != wanted.get(name))
    return ", ".join(
        f"{name} is {_shown(recorded, name)} there and {_shown(wanted, name)} here" for name in names
    )


def _shown(identity: Mapping[str, Any], name: str) -> str:
    return repr(identity[name]) if name in identity else "not set"
