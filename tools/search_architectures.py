"""Rank architectures by training each on a distilled set, and say how far the ranking can be trusted.

  python tools/search_architectures.py distilled/digits-ipc10 --axis width=8,16,32 --axis depth=1,2 --verify 5
  python tools/search_architectures.py org/cifar10-ncfm@v1 --data DIR --strategy hyperband --jobs 8
  python tools/search_architectures.py distilled/cifar10-ipc10 --data DIR --space my_module:my_space
  python tools/search_architectures.py distilled/cifar10-ipc1 --data DIR --truth-of searches/cifar10-ipc10-...

Candidates are tested on images held out of the training set. With --verify some of them are trained on all
images and tested on the test set; so are those that random images and early stopping would have picked,
which score all candidates too, or with --compare verified only those that are trained in full.
The same command goes on where it was stopped, in the middle of a training too; started on several machines
with the same --storage, all of them work on it together. Results: search.json, report.md and plots in the
output folder.
"""

import argparse
import contextlib
import dataclasses
import gc
import hashlib
import json
import shutil
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from command_line import (
    add_set_flags,
    command_parser,
    load,
    name_of,
    positive,
    reading,
    refuse_torchrun,
    run_command,
    settings,
)

from distilled_data import CheckpointError, DistilledDataError, DistilledDataset, UsageError
from distilled_data.files import make_folder, read_json
from distilled_data.terminal import printable
from ncfm_engine.allocator import keep_freed
from ncfm_engine.cache import cache_folder
from ncfm_engine.config import EvaluateConfig
from ncfm_engine.evaluate import packing
from ncfm_engine.origin import real_images, recipe_of, teacher_pool
from ncfm_engine.plan import in_words, many, resolve_device, seconds_of_some
from ncfm_engine.provenance import command, provenance
from ncfm_engine.proxies import PROTOCOL, PROXIES, VALIDATION, Proxy, proxies, splits
from ncfm_engine.report import Bars, Report, silent
from ncfm_engine.search import CHECKS, EARLY_ENDING, STRATEGIES, sqlite_url
from ncfm_engine.spaces import SPACES, Architecture, Space, load_space
from ncfm_engine.stop import StopRequest
from tools.architectures.campaign import ACCURACY, ALL, COMPARED, RANKINGS, Campaign
from tools.architectures.crew import Crew, Leash, default_jobs, is_hand
from tools.architectures.report import REPORT_FILE, RESULTS_FILE, full_trainings, read, summary, write

DATABASE_FILE = "search.db"
TRAININGS_FOLDER = "trainings"  # that were stopped; in the output folder
EPOCHS = 300  # over the distilled images, where the recipe of the set has more
RANDOM = 100  # candidates
OF_TRUTH = ("full_epochs", "full_repeats")  # settings of full trainings
# What makes a search, besides its candidates and how many are verified, of which there may be more later.
IDENTITY = ("content_hash", "factor", "ipc", "labels", "space", "axes", "truth_of", "strategy", "seed")


def parser() -> argparse.ArgumentParser:
    parser = command_parser(__doc__)
    add = parser.add_argument
    add_set_flags(parser, "evaluate.*")
    add("--labels", choices=["hard", "soft"], help="to train with (default: soft, if the set has them)")
    add("--space", default="convnet", help=f"{', '.join(SPACES)} or module:function (default: convnet)")
    add(
        "--axis", action="append", default=[], metavar="NAME=A,B", help="other values of an axis of the space"
    )
    add("--strategy", choices=STRATEGIES, default="exhaustive", help="way to search (default: exhaustive)")
    add("--candidates", type=positive, metavar="N", help="draw this many (default: all; random: 100)")
    add(
        "--truth-of",
        type=Path,
        metavar="FOLDER",
        help="take the candidates that the search in this folder trained in full, and its truth: to compare "
        "other labels, steps or sets with it",
    )
    add("--seeds", type=int, default=1, help="networks trained of each candidate (default: 1)")
    add(
        "--verify",
        type=count_or_all,
        metavar="K",
        help="train the K best, K middle and K random candidates in full, or 'all' (default: none)",
    )
    add(
        "--compare",
        choices=COMPARED,
        default="all",
        help="which candidates random images and early stopping score for the comparison: all, as the set "
        "does, in twice the time of that, or only those that --verify chooses by the set (default: all)",
    )
    add(
        "--rank-by",
        choices=RANKINGS,
        default=ACCURACY,
        help="which are the best, for --verify and in the report, which compares both (the pick of the other "
        "is verified too): accuracy on held-out images, or training loss late in the training; halving and "
        "hyperband go by accuracy all the same (default: accuracy)",
    )
    add("--seed", type=int, default=0, help="of the draw and of the trainings (default: 0)")
    add("--output", type=Path, help="folder of the results (default: searches/SET-HASH-SPACE...)")
    add(
        "--storage",
        metavar="URL",
        help="database of the trials (default: search.db in the output folder, or in that of --truth-of if "
        "only that has one)",
    )
    add("--jobs", type=positive, help="processes (default: one for each core; 4 on a GPU)")
    add("--dry-run", action="store_true", help="print what would be trained, and write nothing")
    return parser


def main(arguments: argparse.Namespace) -> None:
    refuse_torchrun()
    if arguments.seed < 0:
        raise UsageError(f"--seed must be 0 or more, got {arguments.seed}")
    device = resolve_device(arguments.device)
    known = read(arguments.truth_of) if arguments.truth_of else {}
    space, candidates = choice(arguments, known)
    if arguments.truth_of:
        arguments.verify = ALL
    with (
        Leash(arguments.time_budget) as stop,
        Bars() as bars,
        Crew(arguments.jobs or default_jobs(device)) as crew,
    ):
        show = silent if is_hand() else bars
        dataset = load(arguments.artifact, arguments.ipc)
        output = arguments.output or Path("searches") / folder_name(arguments, dataset)
        config = training_of(arguments, dataset, known)
        asked = what_is_asked(arguments, dataset, space, config)
        before = check_folder(output, asked)
        if not is_hand() and before.get("code") not in (None, asked["code"]):
            warnings.warn(
                f"the code of {arguments.space} has changed since {output / RESULTS_FILE} was written: "
                "candidates are trained again, and the results there replaced. With another --output they "
                "stay.",
                stacklevel=2,
            )
        if arguments.dry_run:
            print(printable(describe(arguments, dataset, space, candidates, config, device, output)))
            return
        campaign = Campaign(
            space,
            candidates,
            ways_to_score(arguments, dataset, config, device, output, stop, show),
            arguments.storage or sqlite_url(database_of(arguments, output)),
            arguments.strategy,
            arguments.verify,
            arguments.compare,
            arguments.seed,
            arguments.rank_by,
            machine_of(device),
            crew.works,
        )
        campaign.check_ranking()
        if known and known.get("truth") == campaign.truth and not is_hand():
            campaign.take_truth(full_trainings(known))
        if known and not campaign.knows_truth():
            raise UsageError(
                f"--truth-of: the truth of {arguments.truth_of} was not measured by these settings; expected "
                "--seed, images, the code of the space and --set evaluate.* as in that search, but for "
                "evaluate.epochs and --seeds"
                + ("" if "truth" in known else ", and its --storage, as it is of an older version")
            )

        begun = asked | surroundings(arguments, dataset, campaign, device)

        def report(stage: str, done: int, total: int, **figures: float) -> None:
            if done < total:
                crew.mend(stage, done)
            show(f"search ({stage.partition(' ')[0]})", done, total, **figures)

        def save(stopped: bool) -> None:
            if not is_hand():
                check_folder(output, asked)  # another search may have put its results there meanwhile
                write(output, summary(begun | {"stopped": stopped}, campaign))

        gc.freeze()  # what is there by now, or the collections after each candidate take 0.25 s with it
        try:
            campaign.run(stop, report)
        except BaseException:
            with contextlib.suppress(UsageError, CheckpointError):  # why it ends says more
                save(stopped=True)
            raise
        finally:
            gc.unfreeze()
        save(stopped=False)
    shutil.rmtree(output / TRAININGS_FOLDER, ignore_errors=True)  # others have ended what is left there
    if not is_hand():
        print(printable((output / REPORT_FILE).read_text(encoding="utf-8")))
        if not any(result and result.state == "complete" for result in campaign.results()["distilled"]):
            raise DistilledDataError(
                f"none of {len(candidates)} candidates could be trained; {output / REPORT_FILE} says why"
            )


def choice(arguments: argparse.Namespace, known: Mapping[str, Any]) -> tuple[Space, list[Architecture]]:
    """The space, and the candidates: drawn from it, or those whose truth another search, `known`, knows."""
    space, axes = load_space(arguments.space), settings(arguments.axis, "--axis", "name=value,value")
    if not known:
        space = space.with_axes(axes)
        drawn = arguments.candidates or (RANDOM if arguments.strategy == "random" else None)
        return space, space.draw(drawn, arguments.seed)
    path = arguments.truth_of / RESULTS_FILE
    if arguments.output and arguments.output.resolve() == arguments.truth_of.resolve():
        raise UsageError(
            f"--truth-of and --output are both {arguments.output}; that search would be replaced"
        )
    candidates, name = [result.architecture for result in full_trainings(known)], known["space"]
    if not candidates:
        raise UsageError(
            f"--truth-of: the search of {path} trained nothing in full: it had no --verify, or all failed"
        )
    chosen = axes or arguments.candidates or arguments.verify is not None or arguments.compare != "all"
    if chosen or arguments.space != name:
        raise UsageError(
            f"--truth-of takes the candidates of {path}, of the space {name}, all verified; expected "
            "that --space, and no --axis, --candidates, --verify or --compare"
        )
    return dataclasses.replace(space, axes=known["axes"]), candidates


def training_of(
    arguments: argparse.Namespace, dataset: DistilledDataset, known: Mapping[str, Any]
) -> EvaluateConfig:
    """How candidates are trained: as the set's recipe says, or as the truth that is known, and the flags."""
    original = recipe_of(dataset, arguments.dataset)
    changes = {"evaluate.epochs": min(original.evaluate.epochs, EPOCHS), "evaluate.repeats": arguments.seeds}
    theirs = known.get("settings", {})
    changes |= {f"evaluate.{name}": theirs[name] for name in (*PROTOCOL, *OF_TRUTH) if name in theirs}
    said = settings(arguments.set)
    for name in said:
        if not name.startswith("evaluate.") or name in ("evaluate.labels", "evaluate.repeats"):
            raise UsageError(
                f"--set {name} does not change a search; expected evaluate.*, but for labels and repeats, "
                "which are --labels and --seeds"
            )
    config = original.replace(changes | said).evaluate
    if arguments.verify is None and arguments.compare != "all":
        raise UsageError("--compare verified needs --verify, which chooses what to compare")
    if arguments.verify is not None and config.full_repeats < 1:
        raise UsageError("--verify needs evaluate.full_repeats of 1 or more")
    return config


def ways_to_score(
    arguments: argparse.Namespace,
    dataset: DistilledDataset,
    config: EvaluateConfig,
    device: str,
    output: Path,
    stop: StopRequest,
    show: Report,
) -> dict[str, Proxy]:
    """The proxies and the truth on the real images of the set, which are read; creates the output folder."""
    labels = labels_of(arguments, dataset)
    real, seen = real_images(dataset, arguments.dataset, reading(arguments), stop=stop, report=show)
    source, test = splits(real, seen, recipe_of(dataset).validation)
    make_folder(output)
    pool = None
    if labels == "soft" and arguments.verify is not None:
        options = {"cache": cache_folder(), "device": device, "stop": stop, "report": show}
        pool = teacher_pool(dataset, seen, dataset=arguments.dataset, **options)
    checks = CHECKS if arguments.strategy in EARLY_ENDING else 1
    options = {"labels": labels, "seed": arguments.seed, "device": device, "checks": checks, "pool": pool}
    options["folder"] = output.resolve() / TRAININGS_FOLDER  # a module may change the current one
    return proxies(dataset, source, test, config, **options)


def what_is_asked(
    arguments: argparse.Namespace, dataset: DistilledDataset, space: Space, config: EvaluateConfig
) -> dict[str, Any]:
    """What the report says of the search, known before anything is read or trained."""
    info = dataset.info
    return {
        "dataset": info.dataset,
        "set": name_of(arguments.artifact),
        "content_hash": dataset.content_hash,
        **packing(dataset),
        "ipc": dataset.ipc,
        "labels": labels_of(arguments, dataset),
        "space": arguments.space,
        "code": space.own_code,
        "images": {
            "channels": info.channels,
            "size": [info.height, info.width],
            "classes": len(info.classes),
        },
        "axes": {axis: list(values) for axis, values in space.axes.items()},
        "truth_of": arguments.truth_of.resolve().name if arguments.truth_of else None,
        "strategy": arguments.strategy,
        "ranked_by": arguments.rank_by,
        "networks": config.repeats,
        "settings": dataclasses.asdict(config),
        "seed": arguments.seed,
    }


def surroundings(
    arguments: argparse.Namespace, dataset: DistilledDataset, campaign: Campaign, device: str
) -> dict[str, Any]:
    """What else the report says, besides the results."""
    way = campaign.ways["distilled"]
    return {
        "steps": way.identity["steps"],
        "truth": campaign.truth,
        "tested_on": len(way.source.test),
        "seen": not recipe_of(dataset).validation,
        "jobs": arguments.jobs or default_jobs(device),
        **provenance(device),
        "command": command(),
    }


def describe(
    arguments: argparse.Namespace,
    dataset: DistilledDataset,
    space: Space,
    candidates: Sequence[Architecture],
    config: EvaluateConfig,
    device: str,
    output: Path,
) -> str:
    """What would be trained, as text, told before the real images are read."""
    count, verify, truth, most = len(candidates), arguments.verify, "none", 0
    if arguments.truth_of:
        truth = f"known, by {arguments.truth_of}"
    elif verify is not None:
        picks = 1 if arguments.compare == "verified" else len(PROXIES)  # of the losses and the other ways
        most = count if verify == ALL else min(count, 3 * verify + picks)
        truth = f"of {most} at most, {many(config.full_repeats, 'network')} each, "
        truth += many(config.full_epochs, "epoch")
    ways, loader = PROXIES if verify is not None else PROXIES[:1], dataset.loader(config.batch_size)
    compared = most if arguments.compare == "verified" else count
    steps, batch = config.epochs * len(loader), min(config.batch_size, loader.count)
    info = dataset.info
    images = torch.zeros(batch, info.channels, info.height, info.width)
    each, why = seconds_of_some(space, candidates, images, len(info.classes), device, config.precision)
    seconds = (count + compared * (len(ways) - 1)) * config.repeats * steps * batch * each
    times = [f"{in_words(seconds)} on {', '.join(ways)}"]
    if most:
        known = info.source.get("images")  # another project's set does not say
        share = 1 if recipe_of(dataset).validation else 1 - VALIDATION
        if isinstance(known, int):
            seconds = most * config.full_repeats * config.full_epochs * known * share * each
        times.append(f"{in_words(seconds) if isinstance(known, int) else 'an unknown time'} in full")
    names = ", ".join(ways)
    if compared < count and len(ways) > 1:
        names = f"{ways[0]}, and {compared} at most on {', '.join(ways[1:])}"
    database = "--storage" if arguments.storage else database_of(arguments, output)
    soft = verify is not None and labels_of(arguments, dataset) == "soft"
    teacher = recipe_of(dataset, arguments.dataset).pretrain
    labelling = f"{many(teacher.networks, 'network')}, {many(teacher.epochs, 'epoch')}"
    rungs = f", ending at 1/{CHECKS} or 3/{CHECKS}" if arguments.strategy in EARLY_ENDING else ""
    time = f"{'at most' if rungs else 'about'} {', '.join(times)}, one after the other, "
    time += "for the passes through candidates alone"
    lines = [
        f"candidates   {count} of {arguments.space}, {many(config.repeats, 'network')} each, on {names}",
        f"steps        {steps}, {many(config.epochs, 'epoch')} of {loader.count} images",
        f"strategy     {arguments.strategy}{rungs}",
        f"truth        {truth}",
        *([f"teacher      {labelling}, where the cache lacks them"] * soft),
        f"time         {f'unknown: none of the candidates tried could be trained; {why}' if why else time}",
        f"writes       {output}, trials into {database}",
    ]
    return "\n".join(lines)


def database_of(arguments: argparse.Namespace, output: Path) -> Path:
    """The default: that of the search whose truth is asked for, if it is there and this one, which goes on
    where it was stopped, has none beside its results.
    """
    ours, theirs = output / DATABASE_FILE, (arguments.truth_of or output) / DATABASE_FILE
    return theirs if theirs.exists() and not ours.exists() else ours


def check_folder(output: Path, asked: dict[str, Any]) -> dict[str, Any]:
    """What this search has written there before, {} if nothing. Raises `UsageError` where the results of
    another search lie, which these would replace.
    """
    path = output / RESULTS_FILE
    if not path.exists():
        return {}
    found = read_json(path)
    if not isinstance(found.get("settings"), dict):
        raise UsageError(f"{path} is not what a search has found. Choose another --output.")
    deciding = [*PROTOCOL, "epochs", "repeats"]
    deciding += OF_TRUTH if found.get("verified") else []
    there, ours = (
        {name: content.get(name) for name in IDENTITY}
        | {name: content["settings"].get(name) for name in deciding}
        for content in (found, json.loads(json.dumps(asked)))
    )
    other = [f"{name} {there[name]}, not {ours[name]}" for name in ours if there[name] != ours[name]]
    if other:
        raise UsageError(
            f"{output} holds the results of another search: {'; '.join(other)}. Choose another --output; "
            "what they have in common is not trained again with the same --storage."
        )
    return found


def machine_of(device: str) -> str:
    known = provenance(device)
    return f"{known['device']}, torch {known['versions']['torch']}"


def labels_of(arguments: argparse.Namespace, dataset: DistilledDataset) -> str:
    return arguments.labels or ("hard" if dataset.artifact.logits is None else "soft")


def folder_name(arguments: argparse.Namespace, dataset: DistilledDataset) -> str:
    """Of the set, the space, and what else was asked for, so that another search does not take its place."""
    parts = [name_of(arguments.artifact), dataset.content_hash[:6], arguments.space.replace(":", "-")]
    parts += [f"ipc{arguments.ipc}"] if arguments.ipc else []
    parts += [arguments.labels] if arguments.labels else []
    parts += [arguments.strategy] if arguments.strategy != "exhaustive" else []
    parts += [f"seed{arguments.seed}"] if arguments.seed else []
    rest = [sorted(arguments.axis), sorted(arguments.set), arguments.candidates, arguments.seeds]
    rest += [str(arguments.truth_of.resolve())] if arguments.truth_of else []
    if rest != [[], [], None, 1]:
        parts.append(hashlib.sha256(repr(rest).encode()).hexdigest()[:6])
    return "-".join(parts)


def count_or_all(text: str) -> int:
    if text == "all":
        return ALL
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is neither a number, 1 or more, nor 'all'")
    return int(text)


if __name__ == "__main__":
    keep_freed()
    run_command(main, parser())
