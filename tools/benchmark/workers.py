"""Contenders in processes of their own: so that memory is one contender's, and turns can alternate."""

import multiprocessing
import signal
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any, Self

import torch

from distilled_data import DistilledDataError, UsageError
from ncfm_engine.costs import forget_peak, held

from .setup import Setup

# A server that has imported torch, and what torch imports when it first optimises, forks the workers: seconds
# less for each, and CUDA is first used after.
_CONTEXT = multiprocessing.get_context("forkserver")
PRELOADED = ["ncfm_engine.distill", "ncfm_engine.pretrain", "torch._dynamo", "torch.utils.flop_counter"]
_CONTEXT.set_forkserver_preload(PRELOADED)

END = 5  # seconds that a process gets to end by itself


class Contender:
    """Something that plays step after step of the game. Subclasses say how, in `iterate`."""

    images_per_step = 0  # real and synthetic images that a step with fresh real features passes to networks

    def __init__(self, setup: Setup):
        self.setup, self.done = setup, 0

    def iterate(self, step: int) -> Any:
        raise NotImplementedError

    def run(self, iterations: int) -> float:
        """Seconds that the next `iterations` steps take in all. The device is waited for only around them."""
        if self.done == 0:
            self._before = _begin_peak(self.setup.device)
        self._wait()
        start = time.perf_counter()
        for _ in range(iterations):
            self.iterate(self.done)
            self.done += 1
        self._wait()
        return time.perf_counter() - start

    def facts(self) -> dict[str, float]:
        """Images per step; peak memory in MiB, on the CPU above what was held just before the first step."""
        peak = _peak(self.setup.device) - (0 if self.setup.device.startswith("cuda") else self._before)
        return {
            "images_per_step": self.images_per_step,
            "peak_mib": round(peak / 2**20, 1),
            "before_mib": round(self._before / 2**20, 1),
        }

    def _wait(self) -> None:
        if self.setup.device.startswith("cuda"):
            torch.cuda.synchronize()


class Worker:
    """Builds `factory(*arguments)` in a new process, where `call` reaches its methods; a context manager."""

    def __init__(self, factory: Callable[..., Any], *arguments: Any):
        self._name = factory.__name__
        self._pipe, there = _CONTEXT.Pipe()
        self._process = _CONTEXT.Process(target=_serve, args=(there, factory, arguments))
        self._process.start()
        there.close()  # so that the end of the process is the end of the pipe
        try:
            self._answer()
        except BaseException:
            self.__exit__()
            raise

    def call(self, method: str, *arguments: Any) -> Any:
        self._pipe.send((method, arguments))
        return self._answer()

    def _answer(self) -> Any:
        try:
            done, value, expected = self._pipe.recv()
        except EOFError as error:
            self._process.join()
            raise DistilledDataError(
                f"the process of {self._name} ended with code {self._process.exitcode} and without a word; "
                "-9 is most often a lack of memory. Choose smaller shapes or a --memory."
            ) from error
        if done:
            return value
        text, trace = value
        raise (UsageError if expected else DistilledDataError)(text) from _WorkerError(trace)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._pipe.close()
        self._process.join(END)  # longer only in the middle of something, which nobody waits for any more
        self._process.terminate()
        self._process.join()


def in_process(function: Callable[..., Any], *arguments: Any) -> Any:
    """The result of `function(*arguments)`, computed in a process of its own."""
    with Worker(_Once, function, arguments) as worker:
        return worker.call("result")


class _WorkerError(Exception):
    """The traceback of an error in a worker, as its cause here; --debug shows it."""


class _Once:
    def __init__(self, function: Callable[..., Any], arguments: tuple):
        self._function, self._arguments = function, arguments

    def result(self) -> Any:
        return self._function(*self._arguments)


def _serve(pipe: Connection, factory: Callable[..., Any], arguments: tuple) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent ends its workers
    contender, method = None, "built"
    while True:
        try:
            if contender is None:
                contender, value = factory(*arguments), None
            else:
                value = getattr(contender, method)(*arguments)
            answer = True, value, False
        except Exception as error:
            expected = isinstance(error, DistilledDataError)
            text = str(error) if expected else f"{type(error).__name__}: {error}"
            answer = False, (text, traceback.format_exc()), expected and error.exit_code == 2
        pipe.send(answer)
        try:
            method, arguments = pipe.recv()
        except EOFError:
            return


def _begin_peak(device: str) -> int:
    """Forget the peak so far; bytes held now."""
    if device.startswith("cuda"):
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated()
    forget_peak()  # without it, building the contender counts too
    return held("VmRSS")


def _peak(device: str) -> int:
    return torch.cuda.max_memory_allocated() if device.startswith("cuda") else held("VmHWM")
