"""The commands as the tests run them: on the real digits, at small size."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
TINY = [
    "network.width=8",
    "pretrain.networks=2",
    "pretrain.epochs=2",
    "distill.iterations=30",
    "distill.real_batch=20",
    "distill.frequencies=32",
    "distill.checkpoint_every=5",
    "evaluate.epochs=3",
    "evaluate.repeats=2",
    "evaluate.full_epochs=1",
    "evaluate.full_repeats=1",
]
# All are errors but one of torch 2.11, when it first compiles.
WARNINGS = "error,ignore:`torch.jit.script_method` is deprecated:DeprecationWarning"


def flags(settings) -> list[str]:
    return [word for setting in settings for word in ("--set", setting)]


def command(*arguments: str) -> list[str]:
    return [sys.executable, str(ROOT / "tools" / "distill_and_push.py"), *arguments, *flags(TINY)]


def distil(folder: Path, *arguments: str) -> subprocess.CompletedProcess:
    return called(command(*arguments), folder)


def called(words: list[str], folder: Path, **variables: str) -> subprocess.CompletedProcess:
    """What a command of these words did in `folder`, with these variables of the environment."""
    return subprocess.run(
        words,
        cwd=folder,
        env=environment(folder / "cache") | variables,
        capture_output=True,
        text=True,
        timeout=120,
    )


def environment(cache: Path) -> dict[str, str]:
    return os.environ | {"XDG_CACHE_HOME": str(cache), "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": WARNINGS}
