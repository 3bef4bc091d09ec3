"""The main job: pretrain, distil, label, save, evaluate what was saved."""

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from distilled_data import Artifact, ArtifactError, DistilledDataset, Metadata, UsageError
from distilled_data.files import make_folder, move, read_json, write_json
from distilled_data.format import ARTIFACT_FILE, read_artifact, write_artifact
from distilled_data.manifest import replace_artifact, verify_folder, write_manifest

from .config import Recipe, differences
from .costs import COSTS_FILE, Costs
from .distill import METRICS_FILE, Distilled, begin, distill, resumable
from .evaluate import evaluate, forget_progress, needs_teacher, settings_hash
from .initial import check_packing
from .label import label, teacher
from .origin import is_foreign, real_images, recipe_of, teacher_pool
from .plan import (
    LOSS_PLOT_FILE,
    RESULTS_FILE,
    Plan,
    check_output,
    clear_output,
    compiles,
    describe_evaluation,
    identity,
    layout_of,
    remove_leftovers,
    run_folder_of,
)
from .pool import FeaturePool, build
from .pretrain import check_blendable, pretrain, train_pool
from .provenance import command, provenance
from .ranks import Ranks, join
from .report import Report, dispensable, plot_losses, silent
from .sources import CHANGES, Source, hold_out, load_source
from .stop import Stopped, StopRequest

# What a row says of its evaluation anyway, or what no training depends on.
TOLD = {"network.name", "pretrain.at_once"} | {
    f"evaluate.{name}" for name in ("epochs", "labels", "repeats", "full_repeats", "at_once")
}
AUGMENTING = {"evaluate.augment", "evaluate.cutmix"}  # the protocol says where both are off


@dataclass(frozen=True)
class Outcome:
    """What a run came to."""

    rows: list[dict[str, Any]]
    stages: dict[str, dict[str, Any]]  # as `Costs` has them


def open_source(plan: Plan, **options: Any) -> Source:
    """The real data of a plan, with the test set replaced by a part of train if the recipe says so.

    `options` are ranks, stop and report of `load_source`.
    """
    source = load_source(plan.dataset, **plan.reading, **options)
    return hold_out(source, plan.recipe.validation) if plan.recipe.validation else source


def run(plan: Plan, report: Report = silent, stop: StopRequest | None = None) -> Outcome | None:
    """Do everything but publishing. The artifact is written before it is evaluated, and again with results.

    Without a `stop` it stops at the plan's time budget, SIGTERM or Ctrl-C. Among several processes (torchrun)
    the first one labels, writes, evaluates and returns the outcome; the others return None. Raises `Stopped`
    when it was stopped, and the errors of its stages; whatever was finished before (networks, checkpoint,
    artifact) stays.
    """
    with stop or StopRequest(plan.time_budget) as stop, join(plan.device) as ranks:
        check_output(plan)
        ranks.barrier()  # nobody writes before all have looked
        path = plan.run_folder / COSTS_FILE if ranks.rank == 0 else None
        costs = Costs(path, plan.device, plan.resume)
        rows = _stages(plan, ranks, stop, report if ranks.rank == 0 else silent, costs)
    return None if rows is None else Outcome(rows, costs.stages)


def _stages(
    plan: Plan, ranks: Ranks, stop: StopRequest, report: Report, costs: Costs
) -> list[dict[str, Any]] | None:
    recipe = plan.recipe
    with costs.stage("loading"):
        source = open_source(plan, ranks=ranks, stop=stop, report=report)
        layout, key = layout_of(plan, source, ranks), identity(plan, source)
        check_packing(recipe.distill, source, recipe.ipc)
        check_blendable(build(recipe.network, source, recipe.seed), recipe.network)
        if plan.resume:
            resumable(plan.run_folder, key, recipe.distill.iterations)  # refused now, not after pretraining
        if ranks.rank == 0:
            remove_leftovers(plan)
            make_folder(plan.run_folder)  # what pretraining costs is kept there
            if plan.overwrite:
                begin(plan.run_folder, key)
    with costs.stage("pretraining"):
        pool = _pool(plan, source, ranks, stop, report)
    with costs.stage("distilling"):
        distilled = distill(
            recipe.distill,
            source,
            pool,
            ipc=recipe.ipc,
            seed=recipe.seed,
            device=plan.device,
            folder=plan.run_folder,
            identity=key,
            resume=plan.resume,
            stop=stop,
            layout=layout,
            compile=compiles(plan),
            ranks=ranks,
            report=report,
        )
    if ranks.rank:
        return None
    with costs.stage("labelling"):
        artifact = make_artifact(plan, source, pool, distilled)
        if plan.resume and (rows := _recorded(plan, artifact)):
            forget_progress(plan.run_folder, rows)  # a kill may have come before it was forgotten
            return rows
        if kept := _kept(plan, artifact):  # evaluations of it stay good, those that were broken off too
            artifact = kept
            write_manifest(plan.output)  # a kill may have left none, or an older one
            replace_artifact(plan.output, artifact)
        else:
            new = plan.output / f".{ARTIFACT_FILE}.tmp"
            write_artifact(new, artifact)  # where there is no space for it, what is there stays whole
            clear_output(plan)
            move(new, plan.output / ARTIFACT_FILE)
            write_manifest(plan.output)
        with dispensable():
            plot_losses(plan.run_folder / METRICS_FILE, plan.run_folder / LOSS_PLOT_FILE)
    with costs.stage("evaluating"):
        rows = evaluate(
            DistilledDataset.from_folder(plan.output),
            source,
            recipe.evaluate,
            recipe.network,
            seed=recipe.seed,
            device=plan.device,
            pool=pool,
            folder=plan.run_folder,
            resume=plan.resume,
            stop=stop,
            report=report,
        )
        rows = _telling(rows, Recipe.from_dict(artifact.metadata.recipe["settings"]), recipe)
    record_results(plan.output, rows, plan.device)
    write_results(plan.run_folder / RESULTS_FILE, rows, plan.device, costs.stages)
    forget_progress(plan.run_folder, rows)
    return rows


def _recorded(plan: Plan, artifact: Artifact) -> list[dict[str, Any]] | None:
    """The rows of a run that was finished already, if its folder holds this very artifact and is whole."""
    try:
        stored = verify_folder(plan.output)
        rows = read_json(plan.run_folder / RESULTS_FILE)["rows"]
    except (OSError, ArtifactError):
        return None
    config = plan.recipe.evaluate
    settings = settings_hash(config, plan.recipe.network, plan.recipe.seed)
    wanted = (artifact.content_hash, settings, config.repeats, config.full_repeats)
    names = ("content_hash", "settings", "n", "full_n")
    same = [row for row in rows if tuple(row[name] for name in names) == wanted]
    found = {row["labels"]: row for row in same if _count(row, "random_") == config.repeats}
    whole = _same(stored, artifact) and set(config.labels) <= set(found)
    return [found[labels] for labels in config.labels] if whole else None


def _kept(plan: Plan, artifact: Artifact) -> Artifact | None:
    """The artifact with the results of the one in the output folder, if this run resumes the one that made
    that: if images and labels are the same. Where they would not tell this run's recipe from the one that
    they were made by, that recipe stays.
    """
    try:
        there = read_artifact(plan.output / ARTIFACT_FILE)
    except ArtifactError:
        return None
    if not plan.resume or not _same(there, artifact):
        return None
    metadata, made = artifact.metadata, there.metadata
    if made.results:
        own = Recipe.from_dict(made.recipe["settings"])
        if _changed(own, plan.recipe) or _changed(plan.recipe, own):  # without augmentation one tells nothing
            return there
    return dataclasses.replace(artifact, metadata=dataclasses.replace(metadata, results=made.results))


def _same(one: Artifact, other: Artifact) -> bool:
    """Whether they are the same images and labels, those at the same temperature."""
    return one.content_hash == other.content_hash and one.metadata.labels == other.metadata.labels


def _pool(plan: Plan, source: Source, ranks: Ranks, stop: StopRequest, report: Report) -> FeaturePool:
    """Every process trains its share into the cache, which they have in common, and reads all of it."""
    recipe, stopped = plan.recipe, None
    options: dict[str, Any] = {"seed": recipe.seed, "device": plan.device, "cache": plan.cache, "stop": stop}
    if ranks.count > 1:
        share = (ranks.rank, ranks.count)
        try:
            train_pool(recipe.pretrain, recipe.network, source, share=share, report=report, **options)
        except Stopped as place:
            stopped = place
        if ranks.any(stopped is not None):
            raise stopped or Stopped("pretrain, in another process")
    return pretrain(recipe.pretrain, recipe.network, source, report=report, **options)


def make_artifact(plan: Plan, source: Source, pool: FeaturePool, distilled: Distilled) -> Artifact:
    """Quantised images, teacher logits and everything a user has to know about them.

    No wall-clock time goes in: equal runs give equal bytes. Times are in the run folder's results.json.
    """
    recipe, images = plan.recipe, distilled.quantised()
    reading = {name: plan.reading[name] for name in CHANGES if plan.reading.get(name) is not None}
    metadata = Metadata(
        dataset=source.name,
        classes=source.classes,
        channels=source.channels,
        height=source.height,
        width=source.width,
        mean=source.mean,
        std=source.std,
        ipc=recipe.ipc,
        factor=recipe.distill.factor,
        labels=teacher(recipe.label, recipe.network, pool, source, plan.device),
        source={
            "id": source.origin.id,
            "revision": source.origin.revision,
            "fingerprint": source.fingerprint,
            "images": len(source.train),
            "license": source.origin.license,
            "citation": source.origin.citation,
            **({"reading": reading} if reading else {}),
        },
        recipe={
            "preset": plan.preset,
            "seed": recipe.seed,
            "iterations": distilled.step,
            "augment": recipe.evaluate.augment,
            "settings": dataclasses.asdict(recipe),
            **provenance(plan.device),
        },
    )
    logits = label(images, pool, source, factor=recipe.distill.factor, device=plan.device)
    return Artifact(images, metadata, logits)


def evaluate_folder(folder: Path, *, ipc: int | None = None, **options: Any) -> list[dict[str, Any]]:
    """`evaluate_set` of the artifact in a folder, or its first `ipc` images; `record_results` is left to do.

    The progress is in the folder's run folder. `options` are those of `evaluate_set`.
    """
    return evaluate_set(set_in(folder, ipc), run_folder_of(folder), **options)


def set_in(folder: Path, ipc: int | None = None) -> DistilledDataset:
    """The artifact in a folder, or its first `ipc` images. Raises `UsageError` if it holds several sets."""
    chosen = DistilledDataset.from_folder(folder, ipc=ipc)
    if chosen.folder != folder:
        raise UsageError(f"{folder} holds several sets; name the folder of one, such as {chosen.folder}")
    return chosen


def evaluate_set(
    chosen: DistilledDataset,
    run_folder: Path,
    *,
    changes: dict[str, Any],
    cache: Path,
    device: str,
    dataset: str | None = None,
    reading: dict[str, Any] | None = None,
    random: bool = True,
    resume: bool = False,
    stop: StopRequest | None = None,
    report: Report = silent,
) -> list[dict[str, Any]]:
    """Evaluate a saved set under its own recipe with `changes`; its rows, see `evaluate`, which say what was
    changed.

    `dataset` names the real data where the artifact's own name is not enough (folder:PATH), `reading` are
    keywords of `load_source`; how images were resized is known to the artifact. A set of another project
    records neither, needs `dataset`, and is evaluated as ours of such data are; `changes` may also be of the
    networks that label random images beside it, and its rows have the complete settings, `recipe`. Raises
    `UsageError` for changes that no evaluation depends on, `SourceError` when the data is not what it was
    distilled from, and `Stopped` after saving progress in `run_folder`, from which `resume` goes on; it stays
    until `forget_progress`.
    """
    own, recipe = _recipes(chosen, dataset, changes, random)
    _, source = real_images(chosen, dataset, reading, stop=stop, report=report)
    pool = None
    if needs_teacher(recipe.evaluate, random):  # random images have the artifact's teacher too
        options: dict[str, Any] = {"cache": cache, "device": device, "stop": stop, "report": report}
        pool = teacher_pool(chosen, source, dataset=dataset, config=recipe.pretrain, **options)
    rows = evaluate(
        chosen,
        source,
        recipe.evaluate,
        recipe.network,
        seed=recipe.seed,
        device=device,
        pool=pool,
        random=random,
        folder=run_folder,
        resume=resume,
        stop=stop,
        report=report,
    )
    rows = _telling(rows, own, recipe)
    if not is_foreign(chosen):  # the set has the recipe that the rows tell changes of
        return rows
    asked, usual = dataclasses.asdict(recipe), dataclasses.asdict(own)
    said = {name: asked[name] for name in ("seed", "network", "evaluate")}
    labelling = said | {"teacher": {name: usual[name] for name in ("seed", "network")}}
    labelling["teacher"] |= {"pretrain": asked["pretrain"]}
    return [row | {"recipe": labelling if "teacher" in row else said} for row in rows]


def describe_set(
    chosen: DistilledDataset,
    *,
    changes: dict[str, Any],
    cache: Path,
    device: str,
    dataset: str | None = None,
    reading: dict[str, Any] | None = None,
    random: bool = True,
    **options: Any,
) -> str:
    """What `evaluate_set` would train with these arguments, as text; `options` are stop and report."""
    own, recipe = _recipes(chosen, dataset, changes, random)
    _, source = real_images(chosen, dataset, reading, **options)
    teacher = dataclasses.replace(own, pretrain=recipe.pretrain)
    recipe = dataclasses.replace(recipe, ipc=chosen.ipc)
    return describe_evaluation(recipe, source, teacher, device, cache, random)


def _recipes(
    chosen: DistilledDataset, dataset: str | None, changes: dict[str, Any], random: bool
) -> tuple[Recipe, Recipe]:
    """That of a set, and the one that it is evaluated by. Raises `UsageError` for changes of another kind."""
    own = recipe_of(chosen, dataset)
    recipe = own.replace(changes)
    sections = ["evaluate", "network"]
    if is_foreign(chosen) and needs_teacher(recipe.evaluate, random):
        sections.append("pretrain")  # of the networks that take its teacher's place
    for name in changes:
        if name.partition(".")[0] not in sections and name != "seed":
            raise UsageError(
                f"{name} does not change an evaluation; expected seed, or settings of {', '.join(sections)}"
                + ("; a set is tested on what was held out when it was made" if name == "validation" else "")
            )
    return own, recipe


def _telling(rows: list[dict[str, Any]], own: Recipe, recipe: Recipe) -> list[dict[str, Any]]:
    """The rows of an evaluation by `recipe`, which say where it is not the set's own."""
    unlabelled = dataclasses.replace(recipe, pretrain=own.pretrain)  # hard labels are nobody's
    changes = [_changed(own, unlabelled if row["labels"] == "hard" else recipe) for row in rows]
    return [row | {"changes": said} if said else row for row, said in zip(rows, changes, strict=True)]


def _changed(own: Recipe, recipe: Recipe) -> str:
    """What tells an evaluation from one of the set's own recipe, where its row would not."""
    told = TOLD if recipe.evaluate.augmented else TOLD | AUGMENTING
    # how often a resumed run saves, say, changes no evaluation
    evaluation = {name: getattr(recipe, name) for name in ("seed", "network", "pretrain", "evaluate")}
    other = dataclasses.replace(own, **evaluation)
    return ", ".join(line for line in differences(own, other) if line.partition(" = ")[0] not in told)


def record_results(folder: Path, rows: list[dict[str, Any]], device: str) -> None:
    """Put result rows into the artifact's metadata, in the place of older rows of the same setting.

    Times and the command stay out: a resumed run must give the bytes of an uninterrupted one. So do the
    accuracies of single networks and a row's own recipe, which results.json has. Raises `UsageError` where
    the folder has another set by now, which the rows are not of.
    """
    artifact = read_artifact(folder / ARTIFACT_FILE)
    evaluated = read_artifact(folder / ARTIFACT_FILE, ipc=min(rows[0]["ipc"], artifact.metadata.ipc))
    if evaluated.content_hash != rows[0]["content_hash"]:
        raise UsageError(
            f"{folder} holds another set than the one that was evaluated, which was replaced meanwhile. "
            "Nothing was recorded. Evaluate the set that is there now."
        )
    where = provenance(device)
    origin = {name: where[name] for name in ("device", "versions")}
    told = [
        {name: row[name] for name in row if not name.endswith(("seconds", "recipe", "_accuracies"))} | origin
        for row in rows
    ]
    metadata = dataclasses.replace(artifact.metadata, results=_merged(artifact.metadata.results, told))
    replace_artifact(folder, dataclasses.replace(artifact, metadata=metadata))


def write_results(
    path: Path, rows: list[dict[str, Any]], device: str, stages: dict[str, dict[str, Any]]
) -> None:
    """Merge rows into `results.json`, each with where, by what command and at what costs it was measured."""
    origin = {**provenance(device), "command": command()}
    known = read_json(path)["rows"] if path.exists() else []
    merged = _merged(known, [row | origin | {"stages": stages} for row in rows])
    write_json(path, {"rows": merged})


def _merged(known: Sequence[dict[str, Any]], new: Sequence[dict[str, Any]]) -> tuple[dict[str, Any], ...]:
    """The later row of a setting, unless it is of fewer networks; likewise what they say of random and of all
    images.
    """
    setting = ("content_hash", "factor", "ipc", "network", "protocol", "labels", "split", "settings")
    rows: dict[tuple[Any, ...], dict[str, Any]] = {}
    for row in [*known, *new]:
        key = tuple(row.get(name) for name in (*setting, "changes"))
        old = rows.get(key, {})
        merged = old if old.get("n", 0) > row.get("n", 0) else row
        for part in ("random_", "full_"):
            best = old if _count(old, part) > _count(row, part) else row
            merged = {name: value for name, value in merged.items() if not name.startswith(part)}
            merged |= {name: value for name, value in best.items() if name.startswith(part)}
        if "teacher" in old:  # of the random images, if they are not the new row's
            merged.setdefault("teacher", old["teacher"])
        rows[key] = merged
    return tuple(rows.values())


def _count(row: Mapping[str, Any], part: str) -> int:
    """How many networks were trained on random or on all images; older rows do not say it of random ones."""
    return row.get(f"{part}n", row.get("n", 0))
