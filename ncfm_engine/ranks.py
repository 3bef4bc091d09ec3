"""Several processes, one run: each has a part of the classes, and psi is the same in all.

    torchrun --nproc-per-node N tools/distill_and_push.py ...

Draws are addressed by class and step, so the number of processes changes results by rounding only.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
import torch.distributed.nn.functional  # whoever imports it later keeps the group, see `join`
from torch import Tensor
from torch.distributed.rendezvous import rendezvous

from distilled_data import RankError, UsageError

MEET = timedelta(seconds=60)  # for all processes to appear
WAIT = timedelta(days=7)  # for one another while networks are trained; a lost process is noticed at once


@dataclass(frozen=True)
class Ranks:
    """This process among `count`. Alone, every method does nothing; of several, those that wait for others
    raise `RankError` when one is lost.
    """

    rank: int = 0
    count: int = 1

    def part(self, num_classes: int) -> slice:
        """The classes of this process; the parts differ by one class at most. Raises `UsageError` for fewer
        classes than processes.
        """
        if self.count > num_classes:
            raise UsageError(
                f"{self.count} processes are more than the {num_classes} classes, which are shared out among "
                f"them. Start at most {num_classes} (--nproc-per-node)."
            )
        return slice(self.rank * num_classes // self.count, (self.rank + 1) * num_classes // self.count)

    def all_reduce(self, *tensors: Tensor) -> None:
        """Replace each tensor by its sum over the processes, in one message."""
        if self.count == 1:
            return
        flat = torch.cat([tensor.flatten() for tensor in tensors])
        try:
            dist.all_reduce(flat)
        except RuntimeError as error:
            raise RankError(
                f"process {self.rank} of {self.count} lost another one ({str(error).splitlines()[0]}). Its "
                "own message says why it ended. What was saved is kept: start them again, distilling with "
                "--resume."
            ) from error
        for tensor, total in zip(tensors, flat.split([t.numel() for t in tensors]), strict=True):
            tensor.copy_(total.view_as(tensor))

    def gather(self, tensor: Tensor, dim: int, num_classes: int) -> Tensor:
        """The parts of all processes, joined along the dimension of the classes; on the CPU if several."""
        if self.count == 1:
            return tensor
        shape = list(tensor.shape)
        shape[dim] = num_classes
        joined = torch.zeros(shape, dtype=tensor.dtype)
        part = self.part(num_classes)
        joined.narrow(dim, part.start, part.stop - part.start).copy_(tensor)
        self.all_reduce(joined)
        return joined

    def all_gather(self, number: float) -> list[float]:
        """The numbers of all processes."""
        return self.gather(torch.tensor([number], dtype=torch.float64), 0, self.count).tolist()

    def any(self, flag: bool) -> bool:
        """Whether the flag is set in one process or more."""
        return any(self.all_gather(flag))

    def barrier(self) -> None:
        """Wait until all processes are here."""
        self.all_gather(0)


@contextmanager
def join(device: str) -> Iterator[Ranks]:
    """Meet the other processes that torchrun started; without torchrun, be alone. Raises `RankError`.

    Nothing may refer to the group any more at the end: a thread of gloo that frees a tensor while Python
    shuts down aborts the process (one run in 20 on a busy machine; pytorch pull request 179291). The default
    arguments of `torch.distributed.nn.functional` keep the group that exists when it is first imported, and
    parts of torch import it at any time; so it is imported above, while there is none.
    """
    count = int(os.environ.get("WORLD_SIZE", "1"))
    if count == 1:
        yield Ranks()
        return
    backend = "gloo"
    if torch.device(device).type == "cuda":
        torch.cuda.set_device(device)
        backend = "cpu:gloo,cuda:nccl"  # what is agreed on travels by gloo, which notices a lost process
    try:
        store, rank, count = next(rendezvous("env://", timeout=MEET))
        dist.init_process_group(backend, store=store, rank=rank, world_size=count, timeout=WAIT)
    except (RuntimeError, ValueError) as error:
        place = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
        raise RankError(
            f"process {os.environ.get('RANK')} of {count} did not meet the others at {place} within "
            f"{MEET.seconds} s: {str(error).splitlines()[0]}. Check that all were started with the same "
            "address and port, and that a firewall lets them through."
        ) from error
    try:
        yield Ranks(rank, count)
    finally:
        dist.destroy_process_group()
