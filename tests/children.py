"""Real processes that start at once: forked from one that has imported what they need and runs no threads."""

import multiprocessing
import os
import runpy
import sys
import warnings
from collections.abc import Callable
from multiprocessing import connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import pytest
import torch

context = multiprocessing.get_context("forkserver")
# with what torch and optuna import when they are first used
OURS = ["hub", "huggingface_hub.hf_api", "ncfm_engine.pipeline", "ncfm_engine.search"]
LATE = ["optuna.storages", "torch._dynamo"]
PRELOADED = OURS + LATE
context.set_forkserver_preload(PRELOADED)


def start(
    target: Callable[..., None], *arguments: Any, output: Path | None = None, fresh=False, **variables: str
) -> BaseProcess:
    """A process that calls `target`, with these variables of the environment, that writes to a file.

    A `fresh` one has imported no more than the module of `target`, as a new Python would.
    """
    where = multiprocessing.get_context("spawn") if fresh else context
    process = where.Process(target=_begin, args=(target, arguments, output, os.environ | variables))
    process.start()
    return process


def _begin(target, arguments, output, variables) -> None:
    os.environ.clear()
    os.environ.update(variables)
    torch.set_num_threads(1)
    if output is not None:
        file = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(file, 1)
        os.dup2(file, 2)
    target(*arguments)


def finish(process: BaseProcess, seconds: float = 120) -> int:
    """The exit code of a process, which fails the test if it does not end."""
    process.join(seconds)
    if process.exitcode is None:
        process.kill()
        process.join()
        pytest.fail(f"{process.name} had not ended after {seconds} s")
    return process.exitcode


def is_alive(pid: int) -> bool:
    """Whether a process runs, of anybody's, as Linux shows it; one that has ended may stay listed."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] not in "ZX"
    except (FileNotFoundError, ProcessLookupError):
        return False


def received(queue: Any, process: BaseProcess) -> Any:
    """What the process has put into a `SimpleQueue`, or a failed test."""
    connection.wait([queue._reader, process.sentinel], 60)
    assert not queue.empty(), f"{process.name} said nothing"
    return queue.get()


def run_tool(words: list[str], folder: Path) -> None:
    """Be the command of these words, the first of which is its file, in `folder`."""
    os.chdir(folder)
    sys.argv, sys.path[0] = words, str(Path(words[0]).parent)
    runpy.run_path(words[0], run_name="__main__")


def run_in_a_session(words: list[str], folder: Path) -> None:
    """Be the command of these words, to be killed with its workers; warnings are errors."""
    os.setsid()
    warnings.simplefilter("error")
    run_tool(words, folder)


def run_apart(words: list[str], folder: Path, output: Path) -> None:
    """Be the command of these words, with its output, but not its errors, in a file."""
    os.dup2(os.open(output, os.O_WRONLY | os.O_CREAT), 1)
    run_tool(words, folder)
