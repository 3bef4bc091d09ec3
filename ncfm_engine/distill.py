"""The matching loop: synthetic images minimise the discrepancy that the sampling network maximises."""

import errno
import gc
import json
import math
import os
import time
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from distilled_data import CheckpointError, DeviceMemoryError, DivergenceError, OutputError, RankError
from distilled_data.files import advice, write_file

from .checkpoint import Checkpoint, discard, load_checkpoint, save_checkpoint, under
from .config import DistillConfig
from .initial import initial_images
from .kernels import rounded_products, tuned_convolutions
from .matching import MatchingStep, StepLosses
from .memory import Layout, is_out_of_memory
from .pool import FeaturePool
from .ranks import Ranks
from .report import OwnWarning, Report, dispensable, silent
from .sources import Source
from .stop import Stopped, StopRequest

CHECKPOINT_FILE = "checkpoint.safetensors"
METRICS_FILE = "metrics.jsonl"
LOG_EVERY = 10  # steps; the only host synchronisation


@dataclass(frozen=True)
class Distilled:
    """Where the game ended: `images` float32 [ipc, C, channels, H, W] in [0, 1] after `step` steps."""

    images: Tensor
    step: int
    seconds: float  # of matching, over all resumed parts

    def quantised(self) -> Tensor:
        """uint8 images, as they are stored."""
        return (self.images * 255).round().to(torch.uint8).cpu()


def distill(
    config: DistillConfig,
    source: Source,
    pool: FeaturePool,
    *,
    ipc: int,
    seed: int,
    device: str,
    folder: Path | None = None,
    identity: Mapping[str, Any] | None = None,
    resume: bool = False,
    stop: StopRequest | None = None,
    layout: Layout | None = None,
    compile: bool = False,
    ranks: Ranks | None = None,
    report: Report = silent,
) -> Distilled:
    """Play `config.iterations` steps with `ipc` packed images per class, all classes at once or as `layout`
    cuts them.

    With a `folder`, metrics and checkpoints are written there, and `resume` continues from the last whole
    one if it was made under the same `identity`. With `ranks`, each process plays its classes, and the first
    one writes. Raises `Stopped` after a checkpoint when `stop` is requested, `DivergenceError` at a loss that
    is not finite and `DeviceMemoryError`; the last checkpoint is then still good. Raises `CheckpointError`
    for one that cannot be continued, `RankError` where another process is lost or goes on from another step,
    `OutputError`, and `UsageError` for an `ipc` or a factor that the real images do not allow.
    """
    ranks = ranks or Ranks()
    part = ranks.part(source.num_classes)
    if compile:
        torch.compiler.reset()  # what was compiled for other runs would count against this one's limit
    game = MatchingStep(
        config, source, pool, ipc=ipc, seed=seed, device=device, layout=layout, part=part, compile=compile
    )
    identity = dict(identity or {})
    checkpoint = resumable(folder, identity, config.iterations) if folder and resume else None
    if checkpoint:
        images = checkpoint.tensors["images"]
    else:
        images = initial_images(config, source, pool, ipc=ipc, seed=seed)
    match = Match(config, game, images[:, part].contiguous().to(device), ranks, folder, identity)
    if checkpoint:
        match.load(checkpoint)
    if len(steps := set(ranks.all_gather(match.step))) > 1:
        raise RankError(
            f"the processes would go on from different steps: {sorted(steps)}. All must see the same output "
            "folder, on a file system that the machines share."
        )
    if folder and ranks.rank == 0:
        _truncate_metrics(folder / METRICS_FILE, match.step)
    report("distil", match.step, config.iterations)
    rounded = torch.device(device).type == "cuda"  # as it is benchmarked
    with tuned_convolutions(config.iterations), rounded_products(rounded):
        while match.step < config.iterations:
            match.play()
            last = match.step == config.iterations
            logged = last or match.step % LOG_EVERY == 0
            if logged:
                row = match.log()
                if ranks.rank == 0:
                    report("distil", match.step, config.iterations, loss=row["discrepancy"])
            # Processes agree on a stop where they meet anyway; alone, any step will do.
            asked = (logged or ranks.count == 1) and ranks.any(stop is not None and stop.requested)
            if last or asked or match.step % config.checkpoint_every == 0:
                match.save()
            if asked and not last:
                raise Stopped(f"distil, step {match.step} of {config.iterations}")
    if folder and ranks.rank == 0 and config.iterations == 0:
        begin(folder, identity)
    return Distilled(ranks.gather(match.result, 1, source.num_classes), match.step, match.seconds)


def begin(folder: Path, identity: Mapping[str, Any]) -> None:
    """Put a checkpoint of no steps in the place of another run's, so that `resume` goes on with this one."""
    path = folder / CHECKPOINT_FILE
    discard(path)
    save_checkpoint(path, {}, identity=identity, progress={"step": 0})


def resumable(folder: Path, identity: Mapping[str, Any], iterations: int) -> Checkpoint | None:
    """The checkpoint to go on from, or None. Raises `CheckpointError` as `load_checkpoint`, and for one that
    stands beyond `iterations`.
    """
    checkpoint = load_checkpoint(folder / CHECKPOINT_FILE, identity)
    if checkpoint and checkpoint.progress["step"] > iterations:
        raise CheckpointError(
            f"{checkpoint.path} stands at step {checkpoint.progress['step']}, beyond the {iterations} "
            "iterations that were asked for. Ask for more, or start again with --overwrite."
        )
    return checkpoint if checkpoint and checkpoint.progress["step"] else None


class Match:
    """Everything that changes from step to step. Draws are addressed, so they are not part of it."""

    def __init__(
        self,
        config: DistillConfig,
        game: MatchingStep,
        images: Tensor,
        ranks: Ranks,
        folder: Path | None,
        identity: dict[str, Any],
    ):
        self.config, self.game, self.ranks, self.folder, self.identity = config, game, ranks, folder, identity
        self.images = images
        self.average = images.clone() if config.ema else None
        self.classes = game.num_classes
        self.descent = torch.optim.AdamW([images], config.learning_rate, weight_decay=0.0)
        self.players = list(game.sampler.parameters())
        # One backward pass serves both: images descend, psi ascends.
        self.ascent = (
            torch.optim.SGD(
                self.players, config.sampler_learning_rate, config.sampler_momentum, maximize=True
            )
            if self.players
            else None
        )
        self.step, self._start = 0, time.monotonic()
        self.pending: list[Tensor] = []  # losses since the last row, [4, C of this process]
        self._halved = False
        self._unwritten = b""  # rows that found no space yet

    @property
    def seconds(self) -> float:
        return time.monotonic() - self._start

    @property
    def result(self) -> Tensor:
        """The images, or their moving average, of the classes of this process."""
        return self.images.detach() if self.average is None else self.average

    def play(self) -> None:
        """One step of the images; one or more of psi."""
        if self.config.schedule == "cosine":
            rate = (
                self.config.learning_rate * (1 + math.cos(math.pi * self.step / self.config.iterations)) / 2
            )
            self.descent.param_groups[0]["lr"] = rate
        seen = self._seen()
        for turn in range(1, self.config.turns):
            self._gradients(lambda turn=turn: self.game.ascend(seen, self.step, turn))
            self._ascend()
        losses = self._gradients(lambda: self.game.backward(seen, self.step))
        self.images.grad = seen.grad
        self.descent.step()
        self._ascend()
        with torch.no_grad():
            self.images.clamp_(0, 1)
            if self.average is not None:
                self.average.lerp_(self.images, 1 - self.config.ema)
        self.pending.append(torch.stack(losses))
        self.step += 1

    def _seen(self) -> Tensor:
        """What the networks look at; rounded, its gradient is taken for that of the images."""
        if self.step < round((1 - self.config.quantised) * self.config.iterations):
            return self.images
        return (self.images.detach() * 255).round() / 255

    def _ascend(self) -> None:
        if self.ascent:
            self.ranks.all_reduce(*(player.grad for player in self.players if player.grad is not None))
            self.ascent.step()

    def _gradients(self, compute: Callable[[], Any]) -> Any:
        """What `compute` returns, which sets the gradients; in smaller chunks if memory runs out."""
        while True:
            for player in self.players:
                player.grad = None
            try:
                return compute()
            except RuntimeError as error:
                if isinstance(full := getattr(error, "inner_exception", None), OSError):
                    raise OutputError(
                        f"torch.compile could not write what it compiles: {full.strerror}. Free some space "
                        "below TMPDIR, or name another folder by TORCHINDUCTOR_CACHE_DIR; or distil with "
                        "--compile off."
                    ) from error
                if not is_out_of_memory(error):
                    raise
                reason = str(error).splitlines()[0]
            # Out of the handler, so that nothing holds the failed step's tensors.
            self._halve(reason)

    def _halve(self, reason: str) -> None:
        layout = self.game.layout
        if self._halved or layout.classes == layout.images == 1:
            raise DeviceMemoryError(
                f"step {self.step + 1} does not fit into the memory of {self.game.device} with "
                f"{layout.classes} classes and {layout.images} real images at once ({reason}). The last "
                "checkpoint, if there is one, is kept; go on with --resume and a smaller --memory, or on a "
                "larger device."
            )
        self._halved = True
        smaller = replace(layout, classes=-(-layout.classes // 2), images=-(-layout.images // 2))
        self.game.use(smaller)
        gc.collect()
        if torch.device(self.game.device).type == "cuda":
            torch.cuda.empty_cache()
        warnings.warn(
            f"out of memory at step {self.step + 1} ({reason}); going on with {smaller.classes} classes and "
            f"{smaller.images} real images at once instead of {layout.classes} and {layout.images}",
            OwnWarning,
            stacklevel=2,
        )

    def log(self) -> dict[str, float]:
        """Write the row of the steps since the last one, means over steps and classes."""
        table = self._finite()
        self.pending = []
        values = dict(zip(StepLosses._fields, table.mean((0, 2)).tolist(), strict=True))
        rate = self.descent.param_groups[0]["lr"]
        row = {"step": self.step, **values, "learning_rate": rate, "seconds": round(self.seconds, 3)}
        if self.folder and self.ranks.rank == 0:
            self._unwritten += json.dumps(row).encode() + b"\n"
            with dispensable():
                _append(self.folder / METRICS_FILE, self._unwritten)
                self._unwritten = b""
        return row

    def save(self) -> None:
        """Write a checkpoint; a state that is not finite must never become the last good one.

        No process goes on before it is written: a stop ends all of them, and the last would be cut off.
        """
        pending = self._finite()
        state = self.descent.state[self.images]
        moments = {"first moment": state["exp_avg"], "second moment": state["exp_avg_sq"]}
        tensors = {"images": self.images} | moments
        if self.average is not None:
            tensors["average"] = self.average
        whole = {name: self.ranks.gather(tensor, 1, self.classes) for name, tensor in tensors.items()}
        for number, image in enumerate(whole["images"].isfinite().flatten(2).all(2).all(0).tolist()):
            if not image:
                raise _divergence(f"an image of class {number}", self.step)
        ascending = self.ascent.state.values() if self.ascent else ()
        if not all(t.isfinite().all() for t in (*self.players, *(s["momentum_buffer"] for s in ascending))):
            raise _divergence("the sampling network", self.step)
        if self.folder and self.ranks.rank == 0:
            self._write(self.folder / CHECKPOINT_FILE, whole, pending)
        self.ranks.barrier()

    def _write(self, path: Path, tensors: dict[str, Tensor], pending: Tensor) -> None:
        tensors |= {f"sampler/{name}": value for name, value in self.game.sampler.state_dict().items()}
        if self.ascent:
            state = self.ascent.state_dict()["state"]
            tensors |= {f"momentum/{index}": entry["momentum_buffer"] for index, entry in state.items()}
        progress = {"step": self.step, "seconds": self.seconds}
        save_checkpoint(path, tensors | {"pending": pending}, identity=self.identity, progress=progress)

    def load(self, checkpoint: Checkpoint) -> None:
        """Take over the state of a checkpoint, whatever the number of processes that wrote it."""
        tensors, progress = checkpoint.tensors, checkpoint.progress
        part = self.game.part
        self.step, self._start = progress["step"], time.monotonic() - progress["seconds"]
        self.images.copy_(tensors["images"][:, part])
        if self.average is not None:
            self.average.copy_(tensors["average"][:, part])
        state = self.descent.state_dict()
        state["state"] = {
            0: {
                "step": torch.tensor(float(self.step)),
                "exp_avg": tensors["first moment"][:, part],
                "exp_avg_sq": tensors["second moment"][:, part],
            }
        }
        self.descent.load_state_dict(state)
        self.game.sampler.load_state_dict(under("sampler/", tensors))
        if self.ascent:
            state = self.ascent.state_dict()
            buffers = under("momentum/", tensors)
            state["state"] = {int(index): {"momentum_buffer": value} for index, value in buffers.items()}
            self.ascent.load_state_dict(state)
        self.pending = list(tensors["pending"][:, :, part].to(self.images.device))

    def _finite(self) -> Tensor:
        """The pending losses of all classes, [n, 4, C] on the CPU. Raises `DivergenceError`."""
        local = (
            torch.stack(self.pending) if self.pending else self.images.new_zeros(0, 4, self.images.shape[1])
        )
        table = self.ranks.gather(local, 2, self.classes).cpu()
        bad = (~table.isfinite()).nonzero()
        if len(bad):
            step, _, number = bad[0].tolist()
            raise _divergence(f"the loss of class {number}", self.step - len(table) + step + 1)
        return table


def _divergence(what: str, step: int) -> DivergenceError:
    return DivergenceError(
        f"{what} at step {step} is not finite. The last checkpoint, if there is one, is kept. Try a smaller "
        "--set distill.learning_rate or distill.sampler_learning_rate."
    )


def _append(path: Path, lines: bytes) -> None:
    """All of them or none."""
    try:
        with path.open("ab", buffering=0) as file:
            end = file.tell()
            if file.write(lines) < len(lines):  # the disk was full in the middle of it
                file.truncate(end)
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    except OSError as error:
        raise OutputError(f"could not write {path}: {error.strerror}. {advice(error)}") from error


def _truncate_metrics(path: Path, done: int) -> None:
    """Drop the rows after the checkpoint, and one that was cut off: those steps are played again."""
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    kept = [line for line in lines if line.endswith("}\n") and json.loads(line)["step"] <= done]
    write_file(path, "".join(kept).encode())
