"""What all commands share: exit codes, errors in one paragraph, sizes and times as people write them."""

import argparse
import atexit
import dataclasses
import difflib
import gc
import hashlib
import io
import os
import re
import shlex
import shutil
import sys
import textwrap
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path, PurePath
from typing import Any

# A thread of OpenMP that waits for the others looks 300,000 times before it sleeps. Where other programs use
# the cores too, it keeps off the very threads that it waits for. Read when torch is imported.
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")

# so that a checkout runs without being installed
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from filelock import FileLock, Timeout

from distilled_data import DistilledDataError, DistilledDataset, HubError, OutputError, UsageError
from distilled_data.files import told
from distilled_data.terminal import leave, printable, without_login
from hub import PushOptions
from ncfm_engine.cache import cache_folder
from ncfm_engine.report import OwnWarning
from ncfm_engine.stop import Stopped
from tools.markdown import score

SIZES = {"": 1, "B": 1, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "KB": 10**3, "MB": 10**6, "GB": 10**9}
TIMES = {"": 1, "s": 1, "m": 60, "h": 3600}
EXIT_CODES = (
    "Exit codes: 0 done, 2 wrong usage or input, or an output that cannot be written, "
    "75 stopped on request, 1 anything else."
)
RECORDING = 30.0  # seconds that others may take to record their results
DATA = "folder with the files of a named dataset; without it they are downloaded"


class Paragraphs(argparse.HelpFormatter):
    """Paragraphs as wide as the terminal; those that are indented hold commands, and stay as written."""

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        parts = text.strip("\n").split("\n\n")
        return "\n\n".join(part if part.startswith(" ") else paragraph(part, width) for part in parts)


def command_parser(description: str | None) -> argparse.ArgumentParser:
    """Its help begins with `description`, the docstring of a command."""
    return argparse.ArgumentParser(description=description, epilog=EXIT_CODES, formatter_class=Paragraphs)


def run_command(main: Callable[[argparse.Namespace], None], parser: argparse.ArgumentParser) -> None:
    """Parse, call `main`, and exit, see `EXIT_CODES`.

    75 is EX_TEMPFAIL of sysexits.h: run the command again, here with --resume.
    """
    atexit.register(gc.freeze)  # or Python looks through all that torch has imported before it ends
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a console or log that lacks a character must not end a run
            stream.reconfigure(errors="backslashreplace")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    arguments = parser.parse_args()
    try:
        with notes():
            main(arguments)
        print(end="", flush=True)
    except Stopped as place:
        way = "--resume" if "resume" in arguments else "the same command"
        if not speaks():
            sys.exit(75)
        leave(75, f"stopped in good order ({place}); go on with {way}", sys.stdout)
    except KeyboardInterrupt:
        sys.exit("\ninterrupted")
    except Exception as error:
        if arguments.debug:
            raise
        text, code = f"{type(error).__name__}: {error}. Run with --debug for the traceback.", 1
        if isinstance(error, DistilledDataError):
            text, code = str(error), error.exit_code
        elif isinstance(error, OSError) and (words := told(error)):
            text, code = words, OutputError.exit_code
        full = isinstance(error, OSError) and getattr(error.__cause__ or error, "errno", None)
        if full and "resume" in arguments:
            text += " What was saved before is kept: --resume goes on with it."
        leave(code, paragraph(f"error: {text}"), sys.stderr)


def speaks() -> bool:
    """Whether this process is the one that speaks and publishes for all that torchrun started."""
    return os.environ.get("RANK", "0") == "0" or not _has_others()


def _has_others() -> bool:
    return int(os.environ.get("WORLD_SIZE", "1")) > 1


@contextmanager
def notes() -> Iterator[None]:
    """Warnings meant for the user are shown as errors are: one paragraph, without a line of our code. Of
    several processes, which have the same to say, one tells them, once: Python forgets what it has shown
    where a library changes the filters for a moment.
    """
    before, told = warnings.formatwarning, set[str]()

    def show(message: Warning | str, category: type[Warning], *place: Any) -> str:
        if category not in (UserWarning, OwnWarning):
            return before(message, category, *place)
        text = paragraph(f"note: {message}") + "\n"
        if category is UserWarning and (text in told or not speaks()):
            return ""
        told.add(text)
        return text

    warnings.formatwarning = show
    try:
        yield
    finally:
        warnings.formatwarning = before


def paragraph(text: str, width: int | None = None) -> str:
    """Lines of so many characters: as the terminal has them, if nothing is said, but 100 at most."""
    width = width or min(100, shutil.get_terminal_size((100, 24)).columns)
    return textwrap.fill(printable(text), width, break_long_words=False, break_on_hyphens=False)


def add_source_flags(parser: argparse.ArgumentParser) -> None:
    """How the real images are read; `reading` makes keywords of `load_source` of them."""
    add = parser.add_argument_group("the real images").add_argument
    add("--data", type=Path, help=DATA)
    add("--size", type=int, help="resize the images to this many pixels square")
    add("--fit", choices=["crop", "squash"], help="cut the longer side for that (default), or squash it")
    add("--channels", type=int, choices=[1, 3], help="convert them to grey (1) or colour (3)")
    add("--classes", type=Path, help="file with the names of the classes, for shards and arrays with numbers")
    add("--label-column", metavar="NAME", help="of the classes, in a dataset of the Hub with several")
    add("--skip-damaged", action="store_true", help="leave out images that cannot be used, and name them")
    add(
        "--workers", type=count, help="processes that decode images (default: one for each core; 0: this one)"
    )


def count(text: str, least: int = 0) -> int:
    if not text.isdecimal() or int(text) < least:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number, {least} or more")
    return int(text)


def positive(text: str) -> int:
    return count(text, 1)


def reading(arguments: argparse.Namespace) -> dict[str, Any]:
    names = ("data", "size", "fit", "channels", "classes", "label_column", "skip_damaged", "workers")
    flags = {name: getattr(arguments, name) for name in names}
    return {name: value for name, value in flags.items() if value is not None and value is not False}


def add_set_flags(parser: argparse.ArgumentParser, settings: str) -> None:
    """A distilled set, what its real images are, and how networks are trained on both."""
    add = parser.add_argument
    add("artifact", metavar="FOLDER_OR_REPO", help="a set in a folder, or org/name[@revision] on the Hub")
    add("--ipc", type=int, help="use only the first images of each class (default: all)")
    places = "cifar10, folder:PATH, ..."
    add("--dataset", help=f"the real images, where the set does not name them itself: {places}")
    add_run_flags(parser, settings)
    add_source_flags(parser)


def add_run_flags(parser: argparse.ArgumentParser, settings: str) -> None:
    """On what, for how long and with which settings a run is made."""
    add = parser.add_argument
    add("--device", default="auto", help="auto, cpu, cuda, cuda:1 ... (default: auto)")
    add("--time-budget", type=duration, metavar="10m", help="stop in good order after this time")
    add("--set", action="append", default=[], metavar="FIELD=VALUE", help=f"any setting of {settings}")


def add_distilling_flags(parser: argparse.ArgumentParser) -> None:
    choices, words = ["auto", "on", "off"], "torch.compile (default: auto, in long runs)"
    parser.add_argument("--compile", choices=choices, default="auto", help=words)
    add_run_flags(parser, "the recipe")


def add_push_flags(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--revision", metavar="TAG", help="tag the published commit")
    add("--private", action="store_true", help="create the repository private")
    add("--gated", choices=["auto", "manual"], help="create the repository gated: who reads it gives consent")
    add("--create-pr", action="store_true", help="open a pull request instead of committing")
    add("--default", action="store_true", help="load this set where no ipc is given (default: the first one)")
    add("--force", action="store_true", help="move a tag that exists; replace sets that cannot be read")
    add("--endpoint", help="the Hub's address (default: HF_ENDPOINT, or huggingface.co)")


def push_options(arguments: argparse.Namespace) -> PushOptions:
    names = {field.name for field in dataclasses.fields(PushOptions)}
    return PushOptions(**{name: value for name, value in vars(arguments).items() if name in names})


def push_command(folder: PurePath, arguments: argparse.Namespace) -> str:
    """The command that publishes `folder` as these flags ask for."""
    words = ["python", "tools/push.py", folder.as_posix(), arguments.repo]
    for name, value in dataclasses.asdict(push_options(arguments)).items():
        if value:
            words += [f"--{name.replace('_', '-')}"] + ([] if value is True else [without_login(value)])
    return shlex.join(words)


def is_repository(place: str) -> bool:
    """Whether a set of this name is looked for on the Hub: it is not a folder, and might be org/name."""
    return place.partition("@")[0].count("/") == 1 and not os.path.isdir(place)


def name_of(place: str) -> str:
    """Of a set: that of its folder, which may be the current one, or of its repository."""
    return os.path.basename(os.path.abspath(place.partition("@")[0] if is_repository(place) else place))


def load(place: str, ipc: int | None) -> DistilledDataset:
    """A set from a folder, or if there is none of this name, from the Hub."""
    if not is_repository(place):
        return DistilledDataset.from_folder(place, ipc=ipc)
    folder = Path(place)
    if "@" not in place and folder.parent.is_dir():  # without a connection the Hub takes half a minute
        close = difflib.get_close_matches(folder.name, [one.name for one in folder.parent.iterdir()], n=1)
        there = "".join(f", there is {folder.with_name(name)}" for name in close)
        warnings.warn(
            f"there is no folder {place}{there}; the Hub is asked for a repository of that name", stacklevel=2
        )
    try:
        return DistilledDataset.from_hub(place, ipc=ipc)
    except HubError as error:
        raise UsageError(f"there is no folder {place}; and as a repository of the Hub: {error}") from error


def refuse_torchrun() -> None:
    if _has_others():
        raise UsageError("this command is for one process; torchrun shares out preparing and distilling")


@contextmanager
def alone(place: Path) -> Iterator[None]:
    """Raise `UsageError` under torchrun, or while another process works at `place`, a file or folder."""
    refuse_torchrun()
    with locked(place, place.with_name(f".{place.name}.lock")):
        yield


def lock_of(output: Path, seconds: float = 0) -> AbstractContextManager[None]:
    """Held by the process that writes; in the cache, so that a refused run leaves no folder behind. It is
    waited for so many `seconds`.
    """
    if not speaks():
        return nullcontext()
    name = hashlib.sha256(os.fsencode(output.resolve())).hexdigest()[:16]
    return locked(output, cache_folder() / "locks" / name, seconds)


@contextmanager
def locked(place: Path, file: Path, seconds: float = 0) -> Iterator[None]:
    """Raise `UsageError` while another process that works at `place` holds the lock `file`."""
    lock = FileLock(file, timeout=seconds)
    try:
        lock.acquire()
    except Timeout as error:
        told = f"another process is at work on {place}; wait for it, or choose another"
        if seconds:  # it comes after the work
            told += ". What was trained is kept; where a command has --resume, that goes on with it"
        raise UsageError(told) from error
    except OSError as error:
        of_cache = cache_folder() in file.parents
        advice = "Choose another cache by XDG_CACHE_HOME." if of_cache else "Check the folder."
        raise OutputError(f"{file} could not be written: {error.strerror}. {advice}") from error
    try:
        yield
    finally:
        lock.release()


def size(text: str) -> int:
    """Bytes of "2GiB", "500MB"."""
    return int(_quantity(text, SIZES, "2GiB"))


def duration(text: str) -> float:
    """Seconds of "10m", "1.5h", "90"."""
    return _quantity(text, TIMES, "10m")


def json_file(text: str) -> Path:
    """Where results are written; a slip is told before they are measured, which may take hours."""
    path = Path(text)
    try:
        fits = path.suffix == ".json" and not path.is_dir()
    except OSError as error:
        raise argparse.ArgumentTypeError(f"{text!r} cannot be written: {error.strerror}") from error
    if not fits:
        raise argparse.ArgumentTypeError(f"{text!r} is not the name of a JSON file, such as results.json")
    return path


def settings(
    pairs: list[str], flag: str = "--set", form: str = "field=value, for instance distill.alpha=0.3"
) -> dict[str, str]:
    """`--set field=value` pairs as a mapping; of a `--set` that is given twice the last one counts."""
    for pair in pairs:
        if "=" not in pair:
            raise UsageError(f"{flag} {pair}: expected {form}")
    chosen = dict(pair.split("=", 1) for pair in pairs)
    if len(chosen) < len(pairs) and flag != "--set":
        raise UsageError(f"{flag} is given twice for one name: {' '.join(pairs)}")
    return chosen


def table(rows: list[dict]) -> str:
    """Result rows as they are shown on the screen."""
    lines = [["labels", "ipc", "network", "n", "distilled", "best epoch", "random images", "all images"]]
    for row in rows:
        setting = (str(row[name]) for name in ("labels", "ipc", "network", "n"))
        kinds = ("last", "best", "random", "full")
        lines.append([*setting, *(score(row[f"{kind}_mean"], row[f"{kind}_std"]) for kind in kinds)])
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    shown = ["  ".join(map(str.ljust, line, widths)) for line in lines]
    held_out = sorted({row["split"] for row in rows} - {"test"})
    return "\n".join([*shown, *(f"tested on {split} of the training images" for split in held_out)])


def _quantity(text: str, units: dict[str, int], example: str) -> float:
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([A-Za-z]*)", text)
    if match is None or match[2] not in units:
        raise argparse.ArgumentTypeError(
            f"{text!r} is not a quantity like {example}; units: {', '.join(u for u in units if u)}"
        )
    return float(match[1]) * units[match[2]]
