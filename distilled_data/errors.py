"""Every error this project raises on purpose.

    DistilledDataError
    ├── UsageError (ValueError)
    │   └── UnknownNameError
    ├── MissingExtraError (ImportError)
    ├── SourceError
    ├── OutputError (OSError)
    ├── ArtifactError
    │   ├── FormatError
    │   │   └── NewerFormatError
    │   └── IntegrityError
    ├── HubError
    │   ├── AccessError
    │   └── ConflictError
    ├── LockError
    ├── CheckpointError
    ├── DivergenceError
    ├── DeviceMemoryError
    └── RankError

A message says what happened, where, what was expected, what was found, and what to do next. An error is made
of its message alone, so that it comes out of a worker process as what it is.
"""

import difflib
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Self

from .terminal import shortened

FEW = 100  # names that an error lists: all settings, but not the classes of ImageNet


class DistilledDataError(Exception):
    """Base of all errors raised on purpose. `exit_code` is what a command line ends with."""

    exit_code = 1


class UsageError(DistilledDataError, ValueError):
    """An argument, flag or setting is wrong."""

    exit_code = 2


class UnknownNameError(UsageError):
    """A name is not in a fixed list; the message has the close ones, and all if they are few."""

    @classmethod
    def of(cls, kind: str, name: str, known: Iterable[str], close: Sequence[str] = ()) -> Self:
        """`kind` is what was looked up ("dataset"), `known` all names that exist, `close` the likely ones."""
        known = sorted(known)
        close = close or difflib.get_close_matches(name, known, n=3)
        hint = f"Did you mean {' or '.join(map(repr, close))}? " if close else ""
        listed = shortened(known, FEW if len(known) <= FEW else 5)
        return cls(f"unknown {kind} {name!r}. {hint}Known: {listed}.")


class MissingExtraError(DistilledDataError, ImportError):
    """An optional package is needed for this and is not installed."""

    exit_code = 2

    @classmethod
    def of(cls, package: str, extra: str, purpose: str, reason: str = "is not installed") -> Self:
        """`package` could not be imported, which `purpose` needs; installing `extra` brings it."""
        return cls(
            f"{purpose} needs the package {package!r}, which {reason}. "
            f'Install it with: pip install "distilled-data[{extra}]", in a checkout with: pip install -e '
            f'".[{extra}]"'
        )

    @classmethod
    @contextmanager
    def unless(cls, package: str, extra: str, purpose: str) -> Iterator[None]:
        """An import that fails within it raises this error instead."""
        try:
            yield
        except ModuleNotFoundError as error:
            raise cls.of(package, extra, purpose) from error
        except ImportError as error:  # it is there, and does not fit another package
            raise cls.of(package, extra, purpose, f"cannot be imported ({error})") from error


class SourceError(DistilledDataError):
    """The real data is missing, damaged or unfit."""

    exit_code = 2


class OutputError(DistilledDataError, OSError):
    """The output cannot be written, or read again: occupied, no space."""

    exit_code = 2


class ArtifactError(DistilledDataError):
    """A distilled artifact cannot be used."""

    exit_code = 2


class FormatError(ArtifactError):
    """The file is not a distilled artifact, or breaks the format."""


class NewerFormatError(FormatError):
    """The file was written by a later version of this package."""


class IntegrityError(ArtifactError):
    """The bytes are not the ones that were published."""


class HubError(DistilledDataError):
    """The Hub cannot be reached, fails, or answers what nobody expects."""


class AccessError(HubError):
    """Repository, revision or file is not there, or not for this token, or not in the cache where the Hub
    may not be asked.
    """

    exit_code = 2


class ConflictError(HubError):
    """Somebody else published at the same time; nothing was changed unless the message says so."""


class LockError(DistilledDataError):
    """The lock file cannot be read, or does not hold what is asked for."""

    exit_code = 2


class CheckpointError(DistilledDataError):
    """Saved progress cannot be continued."""

    exit_code = 2


class DivergenceError(DistilledDataError):
    """Training produced a loss or weights that are not finite."""


class DeviceMemoryError(DistilledDataError):
    """The work does not fit into the memory of the device."""


class RankError(DistilledDataError):
    """Another process of a distributed run failed or never came."""
