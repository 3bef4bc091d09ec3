"""One step shared by several processes, as torchrun starts them: together they are one contender."""

import os
import socket
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import replace
from typing import Any

import torch

from ncfm_engine.ranks import join

from .engine import Engine
from .setup import Setup
from .workers import Contender, Worker


class Member(Engine):
    """One of `count` processes, with its part of the classes; on GPUs each has one of its own."""

    def __init__(self, setup: Setup, rank: int, count: int, port: int):
        place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        os.environ.update(place | {"RANK": str(rank), "WORLD_SIZE": str(count)})
        if setup.device.startswith("cuda"):
            setup = replace(setup, device=f"cuda:{rank}")
        self._meeting = ExitStack()
        super().__init__(setup, self._meeting.enter_context(join(setup.device)))


class Team(Contender):
    """`count` processes; a step takes as long as the slowest needs. On a CPU they share its threads."""

    def __init__(self, setup: Setup, count: int):
        super().__init__(setup)
        threads = max(1, (setup.threads or torch.get_num_threads()) // count)
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        self._pool = ThreadPoolExecutor(count)  # each member waits for the others, so all are called at once
        setup = replace(setup, threads=threads)
        self._members = list(
            self._pool.map(lambda rank: Worker(Member, setup, rank, count, port), range(count))
        )

    def run(self, iterations: int) -> float:
        return max(self._call("run", iterations))

    def facts(self) -> dict[str, float]:
        """The images of all, the memory of the one that takes most."""
        found = self._call("facts")
        most = max(found, key=lambda facts: facts["peak_mib"])
        return most | {"images_per_step": sum(facts["images_per_step"] for facts in found)}

    def _call(self, method: str, *arguments: Any) -> list[Any]:
        return list(self._pool.map(lambda member: member.call(method, *arguments), self._members))
