"""Training networks of one architecture side by side, for pretraining, evaluation and search.

Networks   M networks as one tensor of weights [M, P], so that one optimiser step serves them all
Course     how they are trained
Training   the two on their batches, and how far it got: it can be stopped and resumed between any two steps
"""

import copy
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel

from distilled_data import DeviceMemoryError, UsageError
from distilled_data.loader import Loader

from .batches import Batches
from .checkpoint import under
from .kernels import tuned_convolutions
from .memory import bytes_saved, is_out_of_memory
from .report import Report
from .sources import Source
from .stop import Stopped, StopRequest

CHECKPOINT_SECONDS = 30.0  # about the most work that a killed process loses

Save = Callable[[Mapping[str, Tensor], Mapping[str, Any]], None]  # tensors, and progress in JSON


def grouped(indices: Sequence[int], size: int) -> list[list[int]]:
    """`indices` in groups, of `size` or less, to be trained together."""
    return [list(indices[first : first + size]) for first in range(0, len(indices), size)]


def named(group: Sequence[int]) -> str:
    """What a group is called in messages, e.g. "networks 0-4"."""
    return f"network {group[0]}" if len(group) == 1 else f"networks {group[0]}-{group[-1]}"


def counting(report: Report, stage: str, done: int, total: int, networks: int) -> Callable[[int], None]:
    """For `after_epoch`: reports the epochs of `networks` trained together after `done` of others."""
    report(stage, done, total)
    return lambda epoch: report(stage, done + epoch * networks, total)


class Networks:
    """M networks of one architecture: `weights` float32 [M, P], a row each, of the parameters that require a
    gradient, in the order of `parameters()`.

    `buffers` are the others and running statistics, [M, ...] each, as the last batch left them.
    `precision` "bfloat16" computes under autocast; weights and optimiser stay float32.
    """

    def __init__(self, networks: Sequence[nn.Module], device: str, precision: str = "float32"):
        trained = [name for name, weights in networks[0].named_parameters() if weights.requires_grad]
        states = [dict(network.named_buffers()) for network in networks]
        rows = []
        for network, state in zip(networks, states, strict=True):
            parameters = dict(network.named_parameters())
            rows.append(nn.utils.parameters_to_vector([parameters.pop(name) for name in trained]).detach())
            state.update({name: weights.detach() for name, weights in parameters.items()})
        self.buffers = {name: torch.stack([s[name] for s in states]).to(device) for name in states[0]}
        self.template = networks[0].to(device).requires_grad_(False).train()  # lends its structure
        self.weights = torch.stack(rows).to(device).requires_grad_()
        self.precision = precision
        shapes = {name: weights.shape for name, weights in self.template.named_parameters()}
        self._shapes = {name: shapes[name] for name in trained}

    def __call__(self, images: Tensor) -> Tensor:
        """Logits float32 [M, B, classes] of images [M, B, channels, H, W], or [B, ...] for all networks."""
        device, half = self.weights.device.type, self.precision == "bfloat16"
        own = images.ndim == 5
        with torch.autocast(device, torch.bfloat16, enabled=half):
            if len(self.weights) == 1:
                buffers = {name: buffer[0] for name, buffer in self.buffers.items()}
                logits, assigned = self._one(self.weights[0], buffers, images[0] if own else images)
                self.buffers |= {name: buffer.clone()[None] for name, buffer in assigned.items()}
                return logits[None].float()
            with sdpa_kernel(SDPBackend.MATH), warnings.catch_warnings():  # fused attention cannot be stacked
                warnings.filterwarnings("ignore", "There is a performance drop")  # one small call of the ViT
                every = vmap(self._one, in_dims=(0, 0, 0 if own else None), randomness="different")
                logits, assigned = every(self.weights, self.buffers, images)
                self.buffers |= {name: buffer.clone() for name, buffer in assigned.items()}
                return logits.float()

    def _one(
        self, weights: Tensor, buffers: dict[str, Tensor], images: Tensor
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Logits, and the buffers that the network assigned anew; others it changes in place. One of another
        shape each time is no state, but what a module keeps for its caller.
        """
        parts = weights.split([shape.numel() for shape in self._shapes.values()])
        parameters = {
            name: part.view(shape) for (name, shape), part in zip(self._shapes.items(), parts, strict=True)
        }
        state = parameters | buffers
        logits = functional_call(self.template, state, (images,))
        if not isinstance(logits, Tensor) or logits.ndim != 2 or len(logits) != len(images):
            got = list(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
            raise UsageError(f"a network must return logits [{len(images)}, classes], got {got}")
        assigned = {
            name: state[name].detach().to(buffer.dtype)
            for name, buffer in buffers.items()
            if state[name] is not buffer and state[name].shape == buffer.shape
        }
        return logits, assigned

    @torch.no_grad()
    def accuracies(self, test: Loader) -> list[float]:
        """Top-1 accuracy of every network on an unshuffled loader, in percent."""
        self.template.eval()
        logits = torch.cat([self(images) for images, _ in test], dim=1)
        self.template.train()
        return [accuracy(row, test.targets) for row in logits]


def trained_at_once(network: nn.Module, source: Source, batch_size: int, device: str) -> int:
    """Networks like this one that are trained together where nothing else is said.

    A CPU is busy with one, and stacked convolutions are slower there. A GPU takes as many as half of its
    memory holds what autograd saves for; not of what is free at the moment, or a resumed run would form
    other groups.
    """
    if torch.device(device).type == "cpu":
        return 1
    # Two, because stacked networks save more than one alone.
    pair = Networks([copy.deepcopy(network).cpu() for _ in range(2)], "cpu")

    def saved(images: int) -> float:
        """Bytes of each of the two for so many images."""
        batch = torch.zeros(images, source.channels, source.height, source.width)
        return bytes_saved(pair, {pair.weights.untyped_storage().data_ptr()}, batch)[1] / 2

    try:
        few, more = saved(2), saved(4)  # batch norm takes no single one
    except (RuntimeError, ValueError) as error:
        if is_out_of_memory(error):
            raise
        return 1  # what cannot be stacked can be trained alone
    each = few + (more - few) / 2 * (batch_size - 2)
    return max(1, int(torch.cuda.mem_get_info(device)[1] / 2 // each))


@dataclass(frozen=True)
class Course:
    """How networks are trained: cross-entropy on class indices or probabilities."""

    steps: int
    optimiser: Callable[[list[Tensor]], torch.optim.Optimizer]  # with the first learning rate
    milestones: Sequence[int]  # steps after which the learning rate is multiplied by `decay`
    decay: float
    tested: Iterable[int]  # steps after which the accuracy is measured
    kept: Iterable[int] = ()  # steps after which the weights are kept as a snapshot


class Training:
    """Networks on their course. `scores` is one list of M accuracies (percent) per test, `snapshots` float32
    [M, P] on the CPU per kept step, `step` the number of optimiser steps taken.
    """

    def __init__(self, networks: Networks, batches: Batches, course: Course, test: Loader):
        self.networks, self.batches, self.course, self.test = networks, batches, course, test
        self.optimiser = course.optimiser([networks.weights])
        self._first_rate = self.optimiser.param_groups[0]["lr"]
        self.step, self.scores, self.snapshots = 0, [], []

    def run(
        self,
        name: str = "training",
        *,
        save: Save | None = None,
        checkpoint_seconds: float = CHECKPOINT_SECONDS,
        stop: StopRequest | None = None,
        after_epoch: Callable[[int], None] = lambda epoch: None,
        after_test: Callable[[list[float]], None] = lambda scores: None,
    ) -> None:
        """Train to the end. `save` gets the state every `checkpoint_seconds`, and when `stop` is requested.
        `after_test` gets the M accuracies of each test; what it raises ends the training.

        Raises `Stopped` then, with `name` and the epoch, but never before one step: a chain of runs
        whose time is too short even to begin still comes to its end.
        """
        steps, saved, began = len(self.batches), time.monotonic(), self.step
        with tuned_convolutions(self.course.steps):
            while self.step < self.course.steps:
                stopped = stop is not None and stop.requested and self.step > began
                if save and (stopped or time.monotonic() - saved >= checkpoint_seconds):
                    save(*self.state())
                    saved = time.monotonic()
                if stopped:
                    raise Stopped(f"{name}, epoch {self.step // steps} of {-(-self.course.steps // steps)}")
                epoch, batch = divmod(self.step, steps)
                try:
                    self._descend(epoch, batch)
                except RuntimeError as error:
                    if not is_out_of_memory(error):
                        raise
                    count, device = len(self.networks.weights), self.networks.weights.device
                    raise DeviceMemoryError(
                        f"{name}: {count} networks at once do not fit into the memory of {device} "
                        f"({str(error).splitlines()[0]}). Train fewer at once (--set pretrain.at_once=1 or "
                        "evaluate.at_once=1), or use smaller batches."
                    ) from error
                self.step += 1
                if self.step in self.course.kept:
                    self.snapshots.append(self.networks.weights.detach().cpu().clone())
                if self.step in self.course.tested:
                    self.scores.append(self.networks.accuracies(self.test))
                    after_test(self.scores[-1])
                if batch + 1 == steps:
                    after_epoch(epoch + 1)

    def _descend(self, epoch: int, batch: int) -> None:
        for group in self.optimiser.param_groups:
            group["lr"] = self.rate(self.step)
        images, targets = self.batches.at(epoch, batch)
        self.optimiser.zero_grad(set_to_none=True)
        logits = self.networks(images)
        if logits.shape[-1] != self.batches.classes:
            raise UsageError(f"a network must return {self.batches.classes} logits, got {logits.shape[-1]}")
        # The sum over the networks of their mean losses: each gets the gradient of its own.
        loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten(0, 1)) * len(logits)
        loss.backward()
        self.optimiser.step()

    def rate(self, step: int) -> float:
        """The learning rate of a step, multiplied up as by `MultiStepLR`, but without a state to resume."""
        rate = self._first_rate
        for milestone, times in sorted(Counter(self.course.milestones).items()):
            rate *= self.course.decay**times if milestone <= step else 1
        return rate

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Everything that the rest of the training depends on, besides its arguments."""
        tensors = {"weights": self.networks.weights.detach()}
        moments = self.optimiser.state[self.networks.weights]
        tensors |= {f"optimiser.{name}": value for name, value in moments.items() if value is not None}
        tensors |= {f"buffer.{name}": value for name, value in self.networks.buffers.items()}
        tensors |= {f"snapshot.{k}": weights for k, weights in enumerate(self.snapshots)}
        return tensors, {"step": self.step, "scores": self.scores}

    @torch.no_grad()
    def restore(self, tensors: Mapping[str, Tensor], progress: Mapping[str, Any]) -> None:
        """Go on from what `state` returned."""
        self.step, self.scores = progress["step"], list(progress["scores"])
        self.networks.weights.copy_(tensors["weights"])
        moments = under("optimiser.", tensors)
        settings = self.optimiser.state_dict()["param_groups"]
        self.optimiser.load_state_dict({"state": {0: moments} if moments else {}, "param_groups": settings})
        for name, value in under("buffer.", tensors).items():
            self.networks.buffers[name].copy_(value)
        snapshots = under("snapshot.", tensors)
        self.snapshots = [snapshots[str(k)] for k in range(len(snapshots))]


@torch.no_grad()
def logits_of(network: nn.Module, loader: Loader) -> Tensor:
    """Logits [N, classes] for an unshuffled loader."""
    network.eval()
    return torch.cat([network(images) for images, _ in loader])


def accuracy(logits: Tensor, targets: Tensor) -> float:
    """Top-1 accuracy in percent of logits [N, classes] against targets [N]."""
    return 100 * (logits.argmax(1) == targets.to(logits.device)).double().mean().item()
