"""Training networks of one architecture side by side, for pretraining, evaluation and search.

Networks   M networks as one tensor of weights [M, P], so that one optimiser step serves them all
Course     how they are trained
Training   the two on their batches, and how far it got: it can be stopped and resumed between any two steps
"""

import copy
import math
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
from torch.nn.parameter import is_lazy

from distilled_data import DeviceMemoryError, UsageError
from distilled_data.loader import Loader
from distilled_data.randomness import generator_at

from .batches import Batches
from .checkpoint import under
from .kernels import half_precision, tuned_convolutions
from .memory import bytes_saved, is_out_of_memory
from .networks import is_faster_with_channels_last
from .report import Report
from .sources import Source
from .stop import Stopped, StopRequest

CHECKPOINT_SECONDS = 30.0  # about the most work that a killed process loses
SCALES = tuple(2.0**k for k in range(-8, 4))  # of logits, among which the one with the lowest loss is found

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

    One alone is the module itself: its parameters, their gradients and its buffers become views of these
    rows, and it does all that it does in anybody's loop, in its backward pass too. Several are computed with
    the structure of the first one. Raises `UsageError` for parameters that make no row.
    """

    def __init__(self, networks: Sequence[nn.Module], device: str, precision: str = "float32"):
        self._shapes = _shapes(networks[0])
        states, rows = [], []
        for network in networks:
            parameters = dict(network.named_parameters())
            rows.append(torch.cat([parameters.pop(name).detach().flatten() for name in self._shapes]))
            fixed = {name: weights.detach() for name, weights in parameters.items()}
            states.append(dict(network.named_buffers()) | fixed)
        self.buffers = {name: torch.stack([s[name] for s in states]).to(device) for name in states[0]}
        self.template = networks[0].to(device).train()
        self.weights = torch.stack(rows).to(device).requires_grad_()
        self.precision = precision
        self._channels_last = device == "cpu" and is_faster_with_channels_last(self.template)
        if len(networks) == 1:
            self._own()
        else:
            self.template.requires_grad_(False)

    def _own(self) -> None:
        """Give the only network its row, for its parameters, their gradients and its buffers."""
        self.weights.grad = torch.zeros_like(self.weights)
        parameters = dict(self.template.named_parameters())
        weights, gradients = self._parts(self.weights.detach()[0]), self._parts(self.weights.grad[0])
        self._rows = [(parameters[name], part, gradients[name]) for name, part in weights.items()]
        state = parameters | dict(self.template.named_buffers())
        self._state = {name: state[name] for name in self.buffers}
        self._keep()

    def __call__(self, images: Tensor) -> Tensor:
        """Logits float32 [M, B, classes] of images [M, B, channels, H, W], or [B, ...] for all networks."""
        device, half = self.weights.device.type, self.precision == "bfloat16"
        own = images.ndim == 5
        with half_precision(device, half):
            if len(self.weights) == 1:
                return self._alone(images[0] if own else images)[None].float()
            with sdpa_kernel(SDPBackend.MATH), warnings.catch_warnings():  # fused attention cannot be stacked
                warnings.filterwarnings("ignore", "There is a performance drop")  # one small call of the ViT
                every = vmap(self._one, in_dims=(0, 0, 0 if own else None), randomness="different")
                logits, assigned = every(self.weights, self.buffers, images)
                self.buffers |= {name: buffer.clone() for name, buffer in assigned.items()}
                return logits.float()

    def _alone(self, images: Tensor) -> Tensor:
        """Logits of the only network."""
        if self._channels_last:
            images = images.clone(memory_format=torch.channels_last)  # of one channel too
        logits = _logits(self.template(images), images)
        for name, value in _assigned(self._state, dict(self.template.named_buffers())).items():
            self.buffers[name] = value[None]  # not in place: the backward pass may need what was there
            self._state[name] = self.buffers[name][0]
            module, _, buffer = name.rpartition(".")
            setattr(self.template.get_submodule(module), buffer, self._state[name])
        self._keep()
        return logits

    @torch.no_grad()
    def _keep(self) -> None:
        """Bring into the rows what is not there: at first, and after `weight.data = ...` or `zero_grad()`."""
        for weight, part, gradient in self._rows:
            if weight.grad is not gradient:
                weight.grad = gradient
            _move(weight, part)
        for name, buffer in self._state.items():
            _move(buffer, self.buffers[name][0])

    def _one(
        self, weights: Tensor, buffers: dict[str, Tensor], images: Tensor
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Logits of one of several, and the buffers that it assigned anew; others it changes in place."""
        state = self._parts(weights) | buffers
        logits = _logits(functional_call(self.template, state, (images,)), images)
        return logits, _assigned(buffers, state)

    def _parts(self, row: Tensor) -> dict[str, Tensor]:
        """The parameters that a row is made of, as views."""
        parts = row.split([shape.numel() for shape in self._shapes.values()])
        pairs = zip(self._shapes.items(), parts, strict=True)
        return {name: part.view(shape) for (name, shape), part in pairs}

    @torch.no_grad()
    def accuracies(self, test: Loader) -> list[float]:
        """Top-1 accuracy of every network on an unshuffled loader, in percent; NaN where logits are."""
        self.template.eval()
        logits = torch.cat([self(images) for images, _ in test], dim=1)
        self.template.train()
        return [math.nan if row.isnan().any() else accuracy(row, test.targets) for row in logits]


def _shapes(network: nn.Module) -> dict[str, torch.Size]:
    """Of the parameters that are trained."""
    shapes = {}
    for name, weights in network.named_parameters():
        if is_lazy(weights):
            raise UsageError(f"parameter {name} has no shape yet: build must run a lazy module once")
        if weights.requires_grad:
            if weights.dtype != torch.float32:
                raise UsageError(f"a network is trained in float32, got parameter {name} of {weights.dtype}")
            shapes[name] = weights.shape
    if not shapes:
        raise UsageError("a network without parameters that require a gradient cannot be trained")
    return shapes


def _move(tensor: Tensor, place: Tensor) -> None:
    """Copy `tensor` to `place`, where it lies from then on."""
    if tensor.data_ptr() != place.data_ptr() and tensor.shape == place.shape:
        place.copy_(tensor)
        tensor.data = place


def _logits(logits: Any, images: Tensor) -> Tensor:
    if not isinstance(logits, Tensor) or logits.ndim != 2 or len(logits) != len(images):
        got = list(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
        raise UsageError(f"a network must return logits [{len(images)}, classes], got {got}")
    return logits


def _assigned(before: Mapping[str, Tensor], after: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The values of buffers that a forward pass replaced by other tensors, not of those changed in place. One
    that got another shape is no state, but something that a module leaves for its caller.
    """
    return {
        name: after[name].detach().to(buffer.dtype, copy=True)
        for name, buffer in before.items()
        if name in after and after[name] is not buffer and after[name].shape == buffer.shape
    }


def trained_at_once(network: nn.Module, source: Source, batch_size: int, device: str) -> int:
    """Networks like this one that are trained together where nothing else is said.

    A CPU is busy with one, and stacked convolutions are slower there. A GPU takes as many as half of its
    memory holds what autograd saves for; not of what is free at the moment, or a resumed run would form
    other groups. One that computes something else when stacked is trained alone: it keeps parameters where
    they cannot be exchanged, or draws at random in eval mode.
    """
    if torch.device(device).type == "cpu":
        return 1
    shape = source.channels, source.height, source.width

    def saved(images: int) -> float:
        """Bytes that autograd saves for one of the pair, of a batch of so many images."""
        batch, weights = torch.zeros(images, *shape), pair.weights.untyped_storage().data_ptr()
        return bytes_saved(pair, {weights}, batch)[1] / 2

    try:
        # Two, because stacked networks save more than one alone.
        first, second = (copy.deepcopy(network).cpu() for _ in range(2))
        images = torch.rand(2, *shape, generator=generator_at("images for a pair"))
        with torch.no_grad():
            for weights in second.parameters():  # norms would not see them scaled
                weights.add_(torch.rand(weights.shape, generator=generator_at("other weights")), alpha=0.1)
            expected = _logits(second.eval()(images), images)
            pair = Networks([first, second], "cpu")
            pair.template.eval()
            if not torch.allclose(pair(images)[1], expected, rtol=1e-3, atol=1e-4):
                return 1
        pair.template.train()
        few, more = saved(2), saved(4)  # batch norm takes no single one
    except (RuntimeError, ValueError) as error:
        if is_out_of_memory(error):
            raise
        return 1  # what cannot be stacked can be trained alone
    each = few + (more - few) / 2 * (batch_size - 2)
    return max(1, int(torch.cuda.mem_get_info(device)[1] / 2 // max(each, 1)))


@dataclass(frozen=True)
class Course:
    """How networks are trained: cross-entropy on class indices or probabilities."""

    steps: int
    optimiser: Callable[[list[Tensor]], torch.optim.Optimizer]  # with the first learning rate
    milestones: Sequence[int]  # steps after which the learning rate is multiplied by `decay`
    decay: float
    tested: Iterable[int] = ()  # steps after which the accuracy is measured
    kept: Iterable[int] = ()  # steps after which the weights are kept as a snapshot
    weighed: int = 0  # last steps, whose training losses are kept


class Training:
    """Networks on their course. `scores` is one list of M accuracies (percent) per test, `snapshots` float32
    [M, P] on the CPU per kept step, `step` the number of optimiser steps taken.
    """

    def __init__(self, networks: Networks, batches: Batches, course: Course, test: Loader | None = None):
        self.networks, self.batches, self.course, self.test = networks, batches, course, test
        self.optimiser = course.optimiser([networks.weights])
        self._first_rate = self.optimiser.param_groups[0]["lr"]
        self.step, self.scores, self.snapshots = 0, [], []
        self._scales = torch.tensor(SCALES, device=networks.weights.device)
        self._losses = torch.zeros(len(SCALES), len(networks.weights), device=networks.weights.device)

    def run(
        self,
        name: str = "training",
        *,
        save: Save | None = None,
        stop: StopRequest | None = None,
        after_epoch: Callable[[int], None] = lambda epoch: None,
        after_test: Callable[[list[float]], None] = lambda scores: None,
    ) -> None:
        """Train to the end. `save` gets the state every `CHECKPOINT_SECONDS`, and when `stop` is requested.
        `after_test` gets the M accuracies of each test; what it raises ends the training.

        Raises `Stopped` then, with `name` and the epoch, but never before one step: a chain of runs
        whose time is too short even to begin still comes to its end. Raises `DeviceMemoryError` where a step
        or a test finds no memory.
        """
        steps, saved, began = len(self.batches), time.monotonic(), self.step
        with tuned_convolutions(self.course.steps):
            while self.step < self.course.steps:
                stopped = stop is not None and stop.requested and self.step > began
                if save and (stopped or time.monotonic() - saved >= CHECKPOINT_SECONDS):
                    save(*self.state())
                    saved = time.monotonic()
                if stopped:
                    raise Stopped(f"{name}, epoch {self.step // steps} of {-(-self.course.steps // steps)}")
                epoch, batch = divmod(self.step, steps)
                try:
                    self._descend(epoch, batch)
                    self.step += 1
                    if self.step in self.course.kept:
                        self.snapshots.append(self.networks.weights.detach().cpu().clone())
                    if self.test is not None and self.step in self.course.tested:
                        self.scores.append(self.networks.accuracies(self.test))
                        after_test(self.scores[-1])
                except RuntimeError as error:
                    if not is_out_of_memory(error):
                        raise
                    count, device = len(self.networks.weights), self.networks.weights.device
                    raise DeviceMemoryError(
                        f"{name}: {count} networks at once do not fit into the memory of {device} "
                        f"({str(error).splitlines()[0]}). Train fewer at once (--set pretrain.at_once=1 or "
                        "evaluate.at_once=1), or use smaller batches."
                    ) from error
                if batch + 1 == steps:
                    after_epoch(epoch + 1)

    def _descend(self, epoch: int, batch: int) -> None:
        for group in self.optimiser.param_groups:
            group["lr"] = self.rate(self.step)
        images, targets = self.batches.at(epoch, batch, self.course.steps)
        self.optimiser.zero_grad(set_to_none=False)  # of one alone they are the module's own
        logits = self.networks(images)
        if logits.shape[-1] != self.batches.classes:
            raise UsageError(f"a network must return {self.batches.classes} logits, got {logits.shape[-1]}")
        # The sum over the networks of their mean losses: each gets the gradient of its own.
        loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten(0, 1)) * len(logits)
        loss.backward()
        self.optimiser.step()
        if self.step >= self.course.steps - self.course.weighed:
            self._weigh(logits.detach(), targets)

    def _weigh(self, logits: Tensor, targets: Tensor) -> None:
        """Add the losses of a step, [S, M], to their means."""
        scaled = self._scales.view(-1, 1, 1, 1) * logits
        targets = targets.expand(len(scaled), *targets.shape)
        each = F.cross_entropy(scaled.flatten(0, 2), targets.flatten(0, 2), reduction="none")
        self._losses += each.view(*scaled.shape[:2], -1).mean(2) / self.course.weighed

    @property
    def losses(self) -> Tensor:
        """[M]: the mean loss of each network in the steps that are weighed, with all its logits multiplied by
        the one of `SCALES` that makes it lowest. A network that is wide begins with large logits, which says
        nothing about how good it is.
        """
        return self._losses.amin(0)

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
        if self.course.weighed:
            tensors["losses"] = self._losses
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
        if self.course.weighed:
            self._losses.copy_(tensors["losses"])


@torch.no_grad()
def logits_of(network: nn.Module, loader: Loader) -> Tensor:
    """Logits [N, classes] for an unshuffled loader."""
    network.eval()
    return torch.cat([network(images) for images, _ in loader])


def accuracy(logits: Tensor, targets: Tensor) -> float:
    """Top-1 accuracy in percent of logits [N, classes] against targets [N]."""
    return 100 * (logits.argmax(1) == targets.to(logits.device)).double().mean().item()
