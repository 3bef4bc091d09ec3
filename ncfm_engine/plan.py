"""What a run is going to do, before it does anything: the resolved recipe and what it will cost."""

import dataclasses
import math
import os
import random
import statistics
import sys
import time
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from shutil import which
from typing import Any

import torch
from torch import Tensor, nn

from distilled_data import OutputError, UsageError
from distilled_data.format import ARTIFACT_FILE, FOLDER_FILES, MANIFEST_FILE, PARQUET_FILE, PREVIEW_FILE

from .checkpoint import identity_of, previous_of
from .config import PretrainConfig, Recipe, differences, flatten
from .costs import COSTS_FILE
from .distill import CHECKPOINT_FILE, METRICS_FILE
from .evaluate import PROGRESS_PREFIX, needs_teacher
from .initial import check_packing
from .memory import Footprint, Layout, layout_for
from .operations import operations, passes
from .pool import build
from .presets import find_preset
from .pretrain import check_blendable, count_cached, pool_schedule
from .ranks import Ranks
from .sampling import real_per_class
from .search import place_of, reason_of
from .sources import Source
from .sources.hub import divided
from .sources.store import MEMORY
from .spaces import Architecture, Space, name_of
from .train import Networks

RESULTS_FILE = "results.json"
LOSS_PLOT_FILE = "losses.png"
PROBED = 10  # candidates of a search, to foretell its time
COMPILE_FROM = 1000  # steps; compiling takes up to a minute


@dataclass(frozen=True)
class Plan:
    """Everything a run needs besides the real images."""

    dataset: str  # as `load_source` takes it
    preset: str
    recipe: Recipe
    output: Path  # artifact folder
    cache: Path  # of feature networks
    reading: dict[str, Any] = field(default_factory=dict)  # keywords of `load_source`: data, size, ...
    device: str = "cpu"
    memory: int | None = None  # bytes that one matching step may take
    time_budget: float | None = None  # seconds for all stages, then a checkpoint
    compile: str = "auto"  # "on", "off"
    resume: bool = False
    overwrite: bool = False

    @property
    def run_folder(self) -> Path:
        return run_folder_of(self.output)


def make_plan(
    *,
    dataset: str | None = None,
    ipc: int | None = None,
    preset: str | None = None,
    changes: dict[str, str] | None = None,
    iterations: int | None = None,
    discrepancy: str | None = None,
    seed: int | None = None,
    output: Path | None = None,
    cache: Path,
    reading: dict[str, Any] | None = None,
    device: str = "auto",
    **options,
) -> Plan:
    """Resolve flags: defaults of the recipe, then the preset, then `changes`, then the flags with a name.

    A flag that takes the place of one of `changes` is told in a warning. Raises `UsageError` and, for a
    preset or field that does not exist, `UnknownNameError`; `dataset` is not looked at before it is read.
    """
    if dataset is None and preset is None:
        raise UsageError("name a --dataset or a --preset")
    name, row = find_preset(preset, (dataset or "").partition(":")[0], ipc)
    flags = {"ipc": ipc, "distill.iterations": iterations, "distill.discrepancy": discrepancy, "seed": seed}
    given = {name: value for name, value in flags.items() if value is not None}
    changed = row.recipe().replace(changes or {})
    recipe = changed.replace(given)
    for setting, text in (changes or {}).items():
        if setting in given and changed.replace({setting: given[setting]}) != changed:
            flag = f"--{setting.rpartition('.')[2]} {given[setting]}"
            warnings.warn(f"{flag} takes the place of --set {setting}={text}", stacklevel=2)
    spec = dataset or row.dataset
    if spec == "folder":
        raise UsageError(f"preset {name!r} needs the images: add --dataset folder:PATH")
    if output is None:
        output = Path("distilled") / f"{_stem(spec)}-ipc{recipe.ipc}"
    reading = dict(reading or {})
    if row.size is not None and not spec.startswith("store:"):
        reading.setdefault("size", row.size)
    return Plan(
        dataset=spec,
        preset=name,
        recipe=recipe,
        output=output,
        cache=cache,
        reading=reading,
        device=resolve_device(device),
        **options,
    )


def _stem(spec: str) -> str:
    """A name for the output folder: that of the data set, or of the folder or file at its place, which ends
    before the first dot of a file.
    """
    kind, _, place = spec.partition(":")
    if kind == "hf":
        place = divided(place)[0]
    if kind == "wds":
        place = os.path.dirname(place)
    name = Path(place).name
    if kind not in ("hf", "wds") and not os.path.isdir(place):
        name = name.partition(".")[0]
    return name.strip(".") or kind


def run_folder_of(output: Path) -> Path:
    """Metrics, plots, checkpoint and results.json of an artifact folder lie beside it."""
    output = output.resolve()
    return output.with_name(output.name + ".run")


def shown_run_folder_of(output: Path) -> Path:
    """As people are told it: seen from here, or whole if `output` is, which may lie on another drive."""
    folder = run_folder_of(output)
    return folder if output.is_absolute() else Path(os.path.relpath(folder))


def resolve_device(name: str) -> str:
    """ "auto" is the GPU where there is one; under torchrun each process has its own.

    Raises `UsageError` for a device that torch does not see.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and "LOCAL_RANK" in os.environ:  # torchrun: one GPU for each process
        name = f"cuda:{os.environ['LOCAL_RANK']}"
    try:
        if torch.device(name).type not in ("cpu", "cuda"):
            raise UsageError(f"--device {name}: the engine runs on cpu and cuda")
        torch.zeros(1, device=name)
    except (RuntimeError, AssertionError) as error:
        raise UsageError(f"--device {name} cannot be used here: {str(error).splitlines()[0]}") from error
    return name


def identity(plan: Plan, source: Source) -> dict[str, Any]:
    """Everything that decides the distilled images, flat; a checkpoint made under another is refused.

    The version of torch, the kind of device and whether passes are compiled are part of it: with another one
    results are rounded in another way, and on a GPU other numbers are drawn. The number of iterations is left
    out where nothing depends on it: such a run may be prolonged.
    """
    content = flatten(dataclasses.asdict(plan.recipe))
    free = {"distill.checkpoint_every", "pretrain.at_once"}
    if plan.recipe.distill.schedule == "constant" and not plan.recipe.distill.quantised:
        free.add("distill.iterations")
    kept = {
        name: value
        for name, value in content.items()
        if name not in free and not name.startswith(("label.", "evaluate."))
    }
    kept |= {"dataset": source.name, "dataset fingerprint": source.fingerprint}
    kept |= pool_schedule(plan.recipe.pretrain)
    kept |= {"torch": str(torch.__version__), "device": torch.device(plan.device).type}
    real, counts = plan.recipe.distill.real_batch, source.train.counts
    # Older checkpoints lack it: each class gave as few as the smallest has.
    if (repeated := real_per_class(real, counts)) > counts.min():
        kept["real images per class"] = repeated
    return kept | ({"compiled": True} if compiles(plan) else {})


def check_output(plan: Plan) -> None:
    """Raise `OutputError` when the run would replace something that was not asked to be replaced, and
    `UsageError` when it is both to go on and to begin anew.
    """
    if plan.resume and plan.overwrite:
        raise UsageError(
            "--resume goes on with the run that is there and --overwrite replaces it; choose one"
        )
    for folder in (plan.output, plan.run_folder):
        if (folder.exists() or folder.is_symlink()) and not folder.is_dir():
            what = "is a file" if folder.exists() else "is a link to nothing"
            raise OutputError(f"{folder} {what}; expected a folder, or nothing. Choose another --output.")
    held = [
        path
        for folder in (plan.output, plan.run_folder)
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path != plan.run_folder / COSTS_FILE  # nothing to go on from
    ]
    if not held:
        return
    checkpoint = plan.run_folder / CHECKPOINT_FILE
    begun = {METRICS_FILE, LOSS_PLOT_FILE}  # what a run that was killed before its first checkpoint leaves
    ours = (
        checkpoint.exists()
        or previous_of(checkpoint).exists()
        or all(p.parent == plan.run_folder and (p.name in begun or p.match(".*.tmp")) for p in held)
    )
    left = [plan.output / ARTIFACT_FILE, plan.run_folder / METRICS_FILE, plan.run_folder / RESULTS_FILE]
    left += plan.run_folder.glob(f"{PROGRESS_PREFIX}-*.safetensors")
    replaceable = ours or any(path.exists() for path in left)  # and not somebody's own folder
    if (plan.resume and ours) or (plan.overwrite and replaceable):
        return
    ways = ["continue that run with --resume"] if ours else []
    ways += ["replace it with --overwrite"] if replaceable else []
    more = f" and {len(held) - 1} more" if len(held) > 1 else ""
    raise OutputError(
        f"{plan.output} or {plan.run_folder.name} beside it is not empty: found {held[0]}{more}. Choose "
        f"another --output{', or '.join(['', *ways])}."
    )


def clear_output(plan: Plan) -> None:
    """Remove what was derived from an artifact that is about to be replaced, its manifest first.

    So a run killed before it finishes leaves a folder that does not verify, never one that mixes two sets.
    The card stays, because people edit it, and so does everything of another name.
    """
    stale = [plan.output / name for name in (MANIFEST_FILE, PARQUET_FILE, PREVIEW_FILE)]
    evaluations = plan.run_folder.glob(f"{PROGRESS_PREFIX}-*.safetensors")
    for path in (*stale, plan.run_folder / RESULTS_FILE, *evaluations):
        path.unlink(missing_ok=True)


def remove_leftovers(plan: Plan) -> None:
    """Remove the temporary files of a process that was killed while it wrote."""
    for folder in (plan.output, plan.run_folder):
        for path in folder.glob(".*.tmp"):
            path.unlink(missing_ok=True)


def footprint(plan: Plan, source: Source, ranks: Ranks | None = None) -> Footprint:
    """The memory counts of a run; those of one process where there are several."""
    part = (ranks or Ranks()).part(source.num_classes)
    return Footprint.of(
        plan.recipe.distill,
        build(plan.recipe.network, source, 0),
        source,
        ipc=plan.recipe.ipc,
        kept_networks=plan.recipe.pretrain.networks * (plan.recipe.pretrain.snapshots + 2),
        device=plan.device,
        num_classes=part.stop - part.start,
    )


def layout_of(plan: Plan, source: Source, ranks: Ranks | None = None) -> Layout:
    """How steps are cut: to the memory budget, or else to what a GPU has free. Raises `UsageError`; warns of
    a bank that the host's memory is too small for, which would end the process after pretraining.
    """
    counts = footprint(plan, source, ranks)
    layout = layout_for(counts, plan.device, plan.memory)
    if (counts.cpu or not layout.bank_resident) and counts.bank > MEMORY:
        warnings.warn(
            f"the bank of real features takes {counts.bank / 2**30:.1f} GiB, and this machine has "
            f"{MEMORY / 2**30:.1f}: {counts.num_classes} classes x {counts.real_per_class} real images x "
            f"{counts.dim} features x {plan.recipe.distill.kept_entries}. Lower distill.real_batch, "
            "distill.bank_size or network.width, or raise network.depth; or keep none, with --set "
            "distill.real_features=fresh.",
            stacklevel=2,
        )
    return layout


def compiles(plan: Plan) -> bool:
    """Whether passes are compiled: as asked, or as the run was begun, or where it pays and can be done."""
    if plan.compile != "auto":
        return plan.compile == "on"
    found = which("g++") or which("clang++")
    if torch.device(plan.device).type == "cuda":  # Triton calls a C compiler
        found = find_spec("triton") and (os.environ.get("CC") or which("gcc") or which("clang"))
    if sys.platform != "linux":  # Macs have a clang++ that only offers to install one, Windows another's g++
        found = None
    begun = identity_of(plan.run_folder / CHECKPOINT_FILE) if plan.resume else None
    if begun is not None:
        return bool(found) and bool(begun.get("compiled"))
    return bool(found) and plan.recipe.distill.iterations >= COMPILE_FROM


def describe(plan: Plan, source: Source) -> str:
    """The plan as text: shapes, steps, memory, a time estimate from a short probe, and the files."""
    recipe, config = plan.recipe, plan.recipe.distill
    check_packing(config, source, recipe.ipc)
    check_blendable(build(recipe.network, source, recipe.seed), recipe.network)
    counts = footprint(plan, source)
    layout = layout_of(plan, source)
    real, views = counts.real_per_class, counts.views_per_class
    times, counted = estimate_seconds(recipe, source, plan.device), operations(recipe, source)
    ready = cached_networks(recipe, source, plan.device, plan.cache)
    times["pretraining"] *= 1 - ready / recipe.pretrain.networks
    shape = [recipe.ipc, source.num_classes, source.channels, source.height, source.width]
    files = [plan.output / name for name in FOLDER_FILES]
    names = (METRICS_FILE, CHECKPOINT_FILE, LOSS_PLOT_FILE, RESULTS_FILE, COSTS_FILE)
    files += [shown_run_folder_of(plan.output) / name for name in names]
    changed = differences(Recipe(), recipe)
    lines = [
        f"dataset      {source.name}: {len(source.train)} images of {source.channels}x{source.height}x"
        f"{source.width}, {source.num_classes} classes, tested on {len(source.test)}",
        f"preset       {plan.preset}" + "".join(f"\n             {row}" for row in changed),
        f"images       uint8 {shape}, {views} views per class, {math.prod(shape)} bytes",
        f"step         {source.num_classes} classes x ({real} real + {views} synthetic images), "
        f"{counts.frequencies} frequencies, {layout.classes} classes and {layout.images} real images at once",
        f"features     {_pool(recipe.pretrain, ready)}",
        f"steps        {config.iterations}",
        f"memory       about {counts.total(layout) / 2**20:.0f} MiB on {plan.device}, besides torch itself",
        "operations   " + ", ".join(f"{name} {count / 1e12:.3g} TFLOP" for name, count in counted.items()),
        "time         about " + ", ".join(f"{name} {in_words(s)}" for name, s in times.items()),
        "writes       " + "\n             ".join(str(path) for path in files),
    ]
    return "\n".join(lines)


def describe_evaluation(
    recipe: Recipe, source: Source, teacher: Recipe, device: str, cache: Path, random: bool = True
) -> str:
    """What an evaluation would train, as text; `teacher` is the recipe of the networks that label, where they
    are needed.
    """
    config, classes = recipe.evaluate, source.num_classes
    views, packed = recipe.ipc * recipe.distill.factor**2 * classes, recipe.ipc * classes
    times = {"evaluating": estimate_seconds(recipe, source, device, random)["evaluating"]}
    lines = [
        f"dataset      {source.name}: tested on {len(source.test)} images",
        f"network      {recipe.network.name}",
        f"distilled    {many(len(config.labels) * config.repeats, 'network')}, "
        f"{' and '.join(config.labels)} labels, {many(config.epochs, 'epoch')} of {views} images",
        f"random       {f'as many, in as many steps, of {packed} images' if random else 'left out'}",
        f"all images   {many(config.full_repeats, 'network')}, {many(config.full_epochs, 'epoch')} of "
        f"{len(source.train)}",
    ]
    if needs_teacher(config, random):
        ready = cached_networks(teacher, source, device, cache)
        every = estimate_seconds(teacher, source, device)["pretraining"]
        times = {"pretraining": every * (1 - ready / teacher.pretrain.networks)} | times
        lines.append(f"teacher      {_pool(teacher.pretrain, ready)}")
    lines.append("time         about " + ", ".join(f"{name} {in_words(s)}" for name, s in times.items()))
    return "\n".join(lines)


def cached_networks(recipe: Recipe, source: Source, device: str, cache: Path) -> int:
    """How many of the recipe's feature networks need not be trained, see `count_cached`."""
    return count_cached(recipe.pretrain, recipe.network, source, seed=recipe.seed, device=device, cache=cache)


def _pool(config: PretrainConfig, ready: int) -> str:
    trained = f"{many(config.networks, 'network')}, {many(config.epochs, 'epoch')}"
    return f"{trained}; {ready} in the cache"


def estimate_seconds(recipe: Recipe, source: Source, device: str, random: bool = True) -> dict[str, float]:
    """Seconds per stage, from the measured cost of one forward and backward pass of this network here.

    The products with the frequencies are left out.
    """
    precisions = {
        "pretraining": recipe.pretrain.precision,
        "distilling": recipe.distill.precision,
        "evaluating": recipe.evaluate.precision,
    }
    probed = {precision: _probe(recipe, source, device, precision) for precision in {*precisions.values()}}
    seconds = {}
    for name, stage in passes(recipe, source, random).items():
        forward, both = probed[precisions[name]]
        seconds[name] = stage.forward * forward + (stage.returned + stage.trained) * both
    return seconds


def _probe(recipe: Recipe, source: Source, device: str, precision: str) -> tuple[float, float]:
    """`seconds_of` a batch as pretraining has it, for which a run takes the memory anyway."""
    batch = torch.zeros(recipe.pretrain.batch_size, source.channels, source.height, source.width)
    return seconds_of(build(recipe.network, source, 0), batch, device, precision)


def seconds_of(network: nn.Module, batch: Tensor, device: str, precision: str) -> tuple[float, float]:
    """Seconds per image of a forward pass and of forward and backward, one network alone."""
    networks, batch = Networks([network], device, precision), batch.to(device)

    def seconds(backward: bool) -> float:
        start = time.perf_counter()
        with torch.set_grad_enabled(backward):
            result = networks(batch).sum()
            if backward:
                result.backward()
            result.item()
        return (time.perf_counter() - start) / len(batch)

    return tuple(min(seconds(backward) for _ in range(3)) for backward in (False, True))  # type: ignore[return-value]


def seconds_of_some(
    space: Space,
    candidates: Sequence[Architecture],
    images: Tensor,
    classes: int,
    device: str,
    precision: str,
) -> tuple[float, str]:
    """Seconds per image of forward and backward, the mean of `PROBED` random candidates of a search; 0 where
    none of them can be trained, and then why one of them cannot.
    """
    shape: dict[str, Any] = {"channels": images.shape[1], "size": tuple(images.shape[2:]), "classes": classes}
    seconds, why = [], ""
    for candidate in random.Random(0).sample(candidates, min(PROBED, len(candidates))):
        try:
            network = space.network(candidate, **shape, seed=0)
            seconds.append(seconds_of(network, images, device, precision)[1])
        except (Exception, SystemExit) as error:  # a search records it as failed
            place = place_of(error)
            why = f"{name_of(candidate)}: {reason_of(error)}" + (f" ({place})" if place else "")
    return (statistics.fmean(seconds), "") if seconds else (0.0, why)


def many(count: int, noun: str) -> str:
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"


def in_words(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}h {minutes:02d}m" if hours else f"{minutes}m {rest:02d}s" if minutes else f"{rest}s"
