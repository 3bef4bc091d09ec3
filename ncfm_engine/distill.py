"""The matching loop: synthetic images minimise the discrepancy that the sampling network maximises."""

import json
import math
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from distilled_data import CheckpointError, DivergenceError, OutputError, UsageError
from distilled_data.format import write_file
from distilled_data.randomness import generator_at

from .config import DistillConfig
from .matching import MatchingStep, StepLosses
from .pretrain import FeaturePool
from .report import Report, silent
from .sampling import ClassSampler
from .sources import Source

CHECKPOINT_FILE = "checkpoint.safetensors"
METRICS_FILE = "metrics.jsonl"
LOG_EVERY = 10  # steps; the only host synchronisation


@dataclass(frozen=True)
class Distilled:
    """Where the game stands: `images` float32 [ipc, C, channels, H, W] in [0, 1] after `step` steps."""

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
    recipe_key: str = "",
    resume: bool = False,
    deadline: float | None = None,
    classes_per_chunk: int | None = None,
    report: Report = silent,
) -> Distilled:
    """Play `config.iterations` steps, or up to `deadline` (`time.monotonic()`), with all classes at once.

    With a `folder`, metrics and checkpoints are written there, and `resume` continues from the last one if
    it was made by the recipe that `recipe_key` names. Raises `DivergenceError` at a loss that is not
    finite; the last checkpoint is then still good.
    """
    game = MatchingStep(config, source, pool, seed=seed, device=device, classes_per_chunk=classes_per_chunk)
    images = initial_images(config, source, ipc=ipc, seed=seed).to(device).requires_grad_()
    optimisers: list[torch.optim.Optimizer] = [
        torch.optim.AdamW([images], config.learning_rate, weight_decay=0.0)
    ]
    if config.adversarial:  # one backward pass serves both: images descend, psi ascends
        optimisers.append(
            torch.optim.SGD(
                game.sampler.parameters(),
                config.sampler_learning_rate,
                config.sampler_momentum,
                maximize=True,
            )
        )
    progress = _Progress(images, game.sampler, optimisers)
    done, spent = 0, 0.0
    checkpoint = read_checkpoint(folder, recipe_key, config.iterations) if folder and resume else None
    if checkpoint:
        progress.load(checkpoint)
        done, spent = checkpoint.step, checkpoint.seconds
    if folder:
        _truncate_metrics(folder / METRICS_FILE, done)

    start, pending = time.monotonic() - spent, []
    report("distil", done, config.iterations)
    for step in range(done, config.iterations):
        optimisers[0].param_groups[0]["lr"] = _learning_rate(config, step)
        for optimiser in optimisers:
            optimiser.zero_grad()
        losses = game.backward(images, step)
        for optimiser in optimisers:
            optimiser.step()
        with torch.no_grad():
            images.clamp_(0, 1)
        pending.append(losses)
        done, last = step + 1, step + 1 == config.iterations
        late = deadline is not None and time.monotonic() > deadline
        save_now = last or late or done % config.checkpoint_every == 0
        if save_now or done % LOG_EVERY == 0:
            row = _log(pending, done, time.monotonic() - start, folder)
            report("distil", done, config.iterations, loss=row["discrepancy"])
            pending = []
        if save_now:
            _check_finite(images, done)
        if save_now and folder:
            progress.save(folder, recipe_key, done, time.monotonic() - start)
        if late:
            break
    return Distilled(images.detach(), done, time.monotonic() - start)


def initial_images(config: DistillConfig, source: Source, *, ipc: int, seed: int) -> Tensor:
    """Packed images [ipc, C, channels, H, W] in [0, 1]: real images shrunk into the tiles, or noise."""
    check_packing(config, source, ipc)
    height, width, factor = source.height, source.width, config.factor
    generator = generator_at(seed, "initial images")
    shape = (ipc, source.num_classes, source.channels, height, width)
    if config.initialisation == "noise":
        return torch.rand(shape, generator=generator)
    # A class with fewer than ipc * factor**2 images gives some of them twice.
    index = ClassSampler(source.train).draw(ipc * factor**2, generator)
    tiles = source.train.images[index.T.flatten()].float() / 255
    tiles = torch.nn.functional.interpolate(
        tiles, size=(height // factor, width // factor), mode="bilinear", antialias=True
    )
    grid = tiles.view(ipc, factor, factor, *shape[1:3], height // factor, width // factor)
    return grid.permute(0, 3, 4, 1, 5, 2, 6).reshape(shape).clamp(0, 1)


def check_packing(config: DistillConfig, source: Source, ipc: int) -> None:
    """Raise `UsageError` for a factor or an IPC that the real images do not allow."""
    height, width, factor = source.height, source.width, config.factor
    if height % factor or width % factor:
        raise UsageError(
            f"factor {factor} does not divide the image size {height}x{width}; each packed image holds "
            f"{factor}x{factor} tiles. Choose another factor (--set distill.factor=1) or size."
        )
    smallest = int(source.train.counts.min())
    if ipc > smallest:
        raise UsageError(
            f"ipc={ipc} is more than the {smallest} training images of the smallest class of {source.title!r}"
        )


def _learning_rate(config: DistillConfig, step: int) -> float:
    if config.schedule == "constant":
        return config.learning_rate
    return config.learning_rate * (1 + math.cos(math.pi * step / config.iterations)) / 2


def _log(pending: list[StepLosses], done: int, seconds: float, folder: Path | None) -> dict[str, float]:
    table = torch.stack([torch.stack([row.discrepancy, row.calibration]) for row in pending]).cpu()
    bad = (~table.isfinite().all(1)).nonzero()
    if len(bad):
        raise _divergence("the loss", done - len(pending) + int(bad[0]) + 1)
    discrepancy, calibration = table.mean(0).tolist()
    row = {"step": done, "discrepancy": discrepancy, "calibration": calibration, "seconds": round(seconds, 3)}
    if folder:
        try:
            with (folder / METRICS_FILE).open("a") as file:
                file.write(json.dumps(row) + "\n")
        except OSError as error:
            raise OutputError(
                f"could not write {folder / METRICS_FILE}: {error.strerror}. The last checkpoint is kept; "
                "free some space and go on with --resume."
            ) from error
    return row


def _check_finite(images: Tensor, done: int) -> None:
    """A finite loss can have a gradient that is not; such a state must never become the last good one."""
    if not bool(images.isfinite().all()):
        raise _divergence("an image", done)


def _divergence(what: str, step: int) -> DivergenceError:
    return DivergenceError(
        f"{what} at step {step} is not finite. The last checkpoint is kept. Try a smaller "
        "--set distill.learning_rate or distill.sampler_learning_rate."
    )


def _truncate_metrics(path: Path, done: int) -> None:
    """Drop the rows after the checkpoint: those steps are played again."""
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    write_file(path, "".join(line for line in lines if json.loads(line)["step"] <= done).encode())


@dataclass(frozen=True)
class Checkpoint:
    """Saved progress of a run."""

    step: int
    seconds: float
    tensors: dict[str, Tensor]


def read_checkpoint(folder: Path, recipe_key: str, iterations: int) -> Checkpoint | None:
    """The checkpoint of a run folder, or None where there is none.

    Raises `CheckpointError` for one that is damaged, of another recipe, or beyond `iterations`.
    """
    path = folder / CHECKPOINT_FILE
    if not path.exists():
        return None
    try:
        with safe_open(path, framework="pt") as file:
            progress = json.loads(file.metadata()["progress"])
            tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
        found, step, seconds = progress["recipe"], int(progress["step"]), float(progress["seconds"])
    except (SafetensorError, KeyError, TypeError, ValueError) as error:
        raise CheckpointError(
            f"{path} is not a whole checkpoint ({error}). Start again with --overwrite."
        ) from error
    if found != recipe_key:
        raise CheckpointError(
            f"{path} belongs to another recipe or dataset: expected {recipe_key}, got {found}. "
            "Use the settings that it was made with, or start again with --overwrite."
        )
    if step > iterations:
        raise CheckpointError(
            f"{path} stands at step {step}, beyond the {iterations} iterations that were asked for. Ask for "
            "more, or start again with --overwrite."
        )
    return Checkpoint(step, seconds, tensors)


class _Progress:
    """Everything that changes from step to step, as one safetensors file. Draws are addressed, not stored."""

    def __init__(self, images: Tensor, sampler: nn.Module, optimisers: list[torch.optim.Optimizer]):
        self.images, self.sampler, self.optimisers = images, sampler, optimisers

    def save(self, folder: Path, recipe_key: str, step: int, seconds: float) -> None:
        tensors = {"images": self.images.detach()}
        tensors |= {f"sampler/{name}": value for name, value in self.sampler.state_dict().items()}
        for player, optimiser in enumerate(self.optimisers):
            for index, state in optimiser.state_dict()["state"].items():
                tensors |= {f"optimiser/{player}/{index}/{name}": value for name, value in state.items()}
        tensors = {name: value.cpu().contiguous() for name, value in tensors.items()}
        progress = json.dumps({"recipe": recipe_key, "seconds": seconds, "step": step}, sort_keys=True)
        write_file(folder / CHECKPOINT_FILE, save(tensors, {"progress": progress}))

    def load(self, checkpoint: "Checkpoint") -> None:
        """Take over the state of a checkpoint."""
        tensors = checkpoint.tensors
        self.images.data.copy_(tensors["images"])
        self.sampler.load_state_dict(_under("sampler/", tensors))
        for player, optimiser in enumerate(self.optimisers):
            content = optimiser.state_dict()
            for name, value in _under(f"optimiser/{player}/", tensors).items():
                index, key = name.split("/")
                content["state"].setdefault(int(index), {})[key] = value
            optimiser.load_state_dict(content)


def _under(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}
