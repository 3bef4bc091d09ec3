"""Where downloads, feature networks, prepared data and locks are kept between runs, and by which names."""

import hashlib
import json
import os
from pathlib import Path
from typing import Any

from distilled_data.errors import UsageError


def cache_folder() -> Path:
    """`$XDG_CACHE_HOME/distilled-data`, or `~/.cache/distilled-data`. Raises `UsageError` without a home."""
    try:
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "distilled-data"
    except RuntimeError as error:
        raise UsageError("this user has no home folder; set XDG_CACHE_HOME to one for the cache") from error


def sha256_of(content: Any) -> str:
    """Of anything that is plain JSON."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
