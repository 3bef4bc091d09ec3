"""Text for people, some of which others may have written."""

import contextlib
import os
import re
import sys
from collections.abc import Sequence
from typing import NoReturn, TextIO


def printable(text: str) -> str:
    """`text` without characters that a terminal obeys: names in a set are those of whoever made it."""
    return re.sub(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]", lambda found: f"\\x{ord(found[0]):02x}", text)


def shortened(words: Sequence[str], most: int = 5) -> str:
    """Words with commas; of more than `most` the first, and how many others there are."""
    others = len(words) - most
    return ", ".join(words[:most]) + (f" and {others} more" if others > 0 else "")


def without_login(address: str) -> str:
    """An address without user and password, which may have spaces in it, and slashes."""
    return re.sub(r"(?s)//.*@", "//", address)


def leave(code: int, text: str, stream: TextIO | None) -> NoReturn:
    """Print `text` and end with the exit code, which stays so where a log is on a full disk or its reader is
    gone: Python would end with 1, or with 120 over what it still has to print.
    """
    with contextlib.suppress(OSError):
        print(text, file=stream)
    for log in filter(None, (sys.stdout, sys.stderr)):
        try:
            log.flush()
        except OSError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), log.fileno())
    sys.exit(code)
