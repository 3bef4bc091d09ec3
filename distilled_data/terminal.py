"""Text for people, some of which others may have written."""

import re


def printable(text: str) -> str:
    """`text` without characters that a terminal obeys: names in a set are those of whoever made it."""
    return re.sub(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]", lambda found: f"\\x{ord(found[0]):02x}", text)
