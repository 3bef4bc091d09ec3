"""Every error this project raises on purpose.

    DistilledDataError
    ├── UsageError (ValueError)        an argument, flag or setting is wrong
    │   └── UnknownNameError           a name that is not in a fixed list; the close ones are named
    ├── MissingExtraError (ImportError)  an optional package is needed for this and is not installed
    ├── SourceError                    the real data is missing, damaged or unfit
    ├── OutputError (OSError)          the output cannot be written, or read again: occupied, no space
    ├── ArtifactError                  a distilled artifact cannot be used
    │   ├── FormatError                the file is not a distilled artifact, or breaks the format
    │   │   └── NewerFormatError       it was written by a later version of this package
    │   └── IntegrityError             the bytes are not the ones that were published
    ├── HubError                       the Hub cannot be reached, fails, or answers what nobody expects
    │   ├── AccessError                repository, revision or file is not there, or not for this token, or
    │   │                              not in the cache where the Hub may not be asked
    │   └── ConflictError              somebody else published at the same time; nothing was changed
    ├── LockError                      the lock file cannot be read, or does not hold what is asked for
    ├── CheckpointError                saved progress cannot be continued
    ├── DivergenceError                training produced a loss that is not finite
    ├── DeviceMemoryError              the work does not fit into the memory of the device
    └── RankError                      another process of a distributed run failed or never came

A message says what happened, where, what was expected, what was found, and what to do next. An error is made
of its message alone, so that it comes out of a worker process as what it is.
"""

import difflib
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Self


class DistilledDataError(Exception):
    """Base of all errors raised on purpose. `exit_code` is what a command line ends with."""

    exit_code = 1


class UsageError(DistilledDataError, ValueError):
    exit_code = 2


class UnknownNameError(UsageError):
    @classmethod
    def of(cls, kind: str, name: str, known: Iterable[str], close: Sequence[str] = ()) -> Self:
        """`kind` is what was looked up ("dataset"), `known` all names that exist, `close` the likely ones."""
        known = sorted(known)
        close = close or difflib.get_close_matches(name, known, n=3)
        hint = f"Did you mean {' or '.join(map(repr, close))}? " if close else ""
        return cls(f"unknown {kind} {name!r}. {hint}Known: {', '.join(known)}.")


class MissingExtraError(DistilledDataError, ImportError):
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
    exit_code = 2


class OutputError(DistilledDataError, OSError):
    exit_code = 2


class ArtifactError(DistilledDataError):
    exit_code = 2


class FormatError(ArtifactError):
    pass


class NewerFormatError(FormatError):
    pass


class IntegrityError(ArtifactError):
    pass


class HubError(DistilledDataError):
    pass


class AccessError(HubError):
    exit_code = 2


class ConflictError(HubError):
    pass


class LockError(DistilledDataError):
    exit_code = 2


class CheckpointError(DistilledDataError):
    exit_code = 2


class DivergenceError(DistilledDataError):
    pass


class DeviceMemoryError(DistilledDataError):
    pass


class RankError(DistilledDataError):
    pass
