"""Where, by which versions and by what command something was measured."""

import platform
import re
import shlex
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch


def command() -> str:
    """The command that runs, for publication: of absolute paths only the last names, of URLs nothing before
    the host and after the path, of pipes nothing, so that neither a user's folders nor passwords are told.
    """
    words = sys.argv[1:]
    for pattern in (
        r"(?s)(pipe:).*",
        r"(?s)(//).*@",  # a password may have spaces in it, and slashes
        r"(sqlite:///)(?:[^\\/]*[\\/])*",
        r"(^|[=:])(?:[A-Za-z]:[\\/]|\\)(?:[^\\/]*[\\/])*(?=[^\\/])",  # of Windows
        r"(^|[=:]|file://)/(?!/)(?:[^/]*/)*(?=[^/])",
        r"(?s)(://[^?#]*)[?#].*",
    ):
        words = [re.sub(pattern, r"\1", word) for word in words]
    return shlex.join([Path(sys.argv[0]).name, *words])


def provenance(device: str) -> dict[str, Any]:
    """Hardware, versions and code revision."""
    name = torch.cuda.get_device_name(device) if device.startswith("cuda") else platform.machine()
    try:
        package = version("distilled-data")
    except PackageNotFoundError:  # run from a checkout that is not installed
        package = "unknown"
    return {
        "device": f"{device} ({name})",
        "versions": {
            "distilled-data": package,
            "torch": torch.__version__,
            "python": platform.python_version(),
        },
        "code_revision": _code_revision(),
    }


def _code_revision() -> str:
    root = Path(__file__).parents[1]
    if not (root / ".git").exists():
        return "unknown"
    command = ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=40"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
