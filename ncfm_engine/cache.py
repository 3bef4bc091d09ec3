"""Where downloads, feature networks, prepared data and locks are kept between runs."""

import os
from pathlib import Path


def cache_folder() -> Path:
    """`$XDG_CACHE_HOME/distilled-data`, or `~/.cache/distilled-data`."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "distilled-data"
