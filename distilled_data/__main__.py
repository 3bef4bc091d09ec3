"""Lock the sets that a project uses to their bytes, fetch them, check them.

python -m distilled_data lock org/cifar100-ncfm@v1   # add or move a set
python -m distilled_data lock      # look again what all revisions are now
python -m distilled_data sync      # fetch what the lock file says; verified
python -m distilled_data verify    # compare the cache with that; no network

Exit codes: 0 done, 2 wrong usage or input (a set that is not there, not in the
cache or damaged too), or an output that cannot be written, 1 anything else,
such as a Hub that cannot be reached.
"""

import argparse
import sys
from pathlib import Path

from .errors import DistilledDataError, HubError, IntegrityError, LockError, UsageError
from .files import told
from .lock import LOCK_FILE, LockedRepository, add_locked, read_lock
from .remote import Repository
from .terminal import leave, printable


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m distilled_data",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest="command", required=True)
    shared = argparse.ArgumentParser(add_help=False)
    shared.add_argument("--lock", type=Path, default=LOCK_FILE, help=f"the lock file (default: {LOCK_FILE})")
    shared.add_argument("--endpoint", help="the Hub's address (default: HF_ENDPOINT, or huggingface.co)")
    lock = commands.add_parser("lock", parents=[shared], help="write which bytes the sets are")
    lock.add_argument(
        "repositories", nargs="*", metavar="ORG/NAME[@REVISION]", help="default: all in the file"
    )
    commands.add_parser("sync", parents=[shared], help="fetch what is locked")
    commands.add_parser("verify", parents=[shared], help="compare the cache with the lock; no network")
    return parser


def main(arguments: argparse.Namespace) -> None:
    path, endpoint = arguments.lock, arguments.endpoint
    if arguments.command == "lock":
        entries = read_lock(path, missing_ok=bool(arguments.repositories))
        wanted = [Repository(name, endpoint=endpoint) for name in arguments.repositories] or [
            Repository(entry.id, entry.revision, endpoint=endpoint) for entry in entries.values()
        ]
        names = [repository.repo_id for repository in wanted]
        if twice := [name for name in dict.fromkeys(names) if names.count(name) > 1]:
            raise UsageError(f"{twice[0]} is there twice; a lock file holds one revision of each")
        found = {repository.repo_id: repository.locked() for repository in wanted}
        lines = [
            f"{'unchanged' if entries.get(name) == entry else 'locked'}  {describe(entry)}"
            for name, entry in found.items()
        ]
        add_locked(path, found)
        for line in lines:
            print(line)
        return
    entries = read_lock(path)
    if not entries:
        raise LockError(f"{path} holds no repository. Add one: python -m distilled_data lock org/name@v1")
    for entry in entries.values():
        offline = arguments.command == "verify"
        try:
            Repository(entry.id, endpoint=endpoint, local_files_only=offline, lock=entry).fetch_all()
        except (HubError, IntegrityError) as error:
            if not offline:
                raise
            raise type(error)(
                f"{error} To fetch what is locked: python -m distilled_data sync --lock {path}"
            ) from error
        print(f"verified  {describe(entry)}")


def describe(entry: LockedRepository) -> str:
    size = sum(file.size for file in entry.files.values())
    revision = f"@{printable(entry.revision)}" if entry.revision else ""
    return f"{entry.id}{revision}  commit {entry.commit[:12]}  {len(entry.files)} files, {size:,} bytes"


if __name__ == "__main__":
    try:
        main(parser().parse_args())
        print(end="", flush=True)
    except DistilledDataError as error:
        leave(error.exit_code, printable(f"error: {error}"), sys.stderr)
    except OSError as error:
        if not (text := told(error)):
            raise
        leave(2, printable(f"error: {text}"), sys.stderr)
    except KeyboardInterrupt:
        sys.exit("\ninterrupted")
