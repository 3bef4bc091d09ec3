"""Train fresh networks on a set and test them on the real images, beside random and all images.

  python tools/evaluate.py distilled/digits-ipc10
  python tools/evaluate.py distilled/cifar10-ipc10 --data DIR --network resnet18 --seeds 3
  python tools/evaluate.py distilled/digits-ipc10 --ipc 1 --set evaluate.epochs=400
  python tools/evaluate.py org/cifar10-ncfm@v1 --data DIR --ipc 10

The rows are written to results.json in the run folder; where the set is a folder of one's own, they are added
to its artifact's metadata and card too. They take the place of those of the same settings, but for what was
measured with more networks.
"""

import argparse
import warnings
from pathlib import Path

from command_line import (
    RECORDING,
    add_set_flags,
    command_parser,
    is_repository,
    load,
    lock_of,
    name_of,
    reading,
    refuse_torchrun,
    run_command,
    settings,
    table,
)

from distilled_data.format import FOLDER_FILES
from hub import complete_folder
from ncfm_engine.allocator import keep_freed
from ncfm_engine.cache import cache_folder
from ncfm_engine.costs import Costs
from ncfm_engine.evaluate import forget_progress
from ncfm_engine.networks import NETWORKS
from ncfm_engine.pipeline import describe_set, evaluate_set, record_results, set_in, write_results
from ncfm_engine.plan import RESULTS_FILE, resolve_device, run_folder_of, shown_run_folder_of
from ncfm_engine.report import Bars
from ncfm_engine.stop import StopRequest


def parser() -> argparse.ArgumentParser:
    parser = command_parser(__doc__)
    add = parser.add_argument
    add_set_flags(parser, "evaluate.* and network.*; of another project's set with soft labels, pretrain.*")
    add("--network", help=f"{', '.join(NETWORKS)} (default: the artifact's own)")
    add(
        "--seeds",
        type=int,
        help="networks trained on the set, and on random images (default: as its recipe says)",
    )
    add(
        "--no-random",
        action="store_true",
        help="leave out the random images; beside soft labels they need a teacher, which may take hours to "
        "train",
    )
    add("--protocol", choices=["ncfm"], default="ncfm", help="how networks are trained (default: ncfm)")
    add("--resume", action="store_true", help="go on from the last checkpoint of the same evaluation")
    add(
        "--dry-run",
        action="store_true",
        help="print what would be trained; prepare the real images, and write nothing else",
    )
    return parser


def main(arguments: argparse.Namespace) -> None:
    refuse_torchrun()
    changes = settings(arguments.set)
    for name, field in (("network", "network.name"), ("seeds", "evaluate.repeats")):
        if (value := getattr(arguments, name)) is not None:
            if (other := changes.get(field)) not in (None, str(value)):
                warnings.warn(f"--{name} {value} takes the place of --set {field}={other}", stacklevel=1)
            changes[field] = value
    device = resolve_device(arguments.device)
    folder = Path(arguments.artifact)
    if of_hub := is_repository(arguments.artifact):
        folder = Path("evaluations") / name_of(arguments.artifact)
    run_folder = run_folder_of(folder)
    with lock_of(folder):
        pass  # or the set may be another one by the time it is evaluated
    options = {
        "changes": changes,
        "cache": cache_folder(),
        "device": device,
        "dataset": arguments.dataset,
        "reading": reading(arguments),
        "random": not arguments.no_random,
    }
    costs = Costs(None, device, resume=False)
    with Bars() as bars, StopRequest(arguments.time_budget) as stop, costs.stage("evaluating"):
        options |= {"stop": stop, "report": bars}
        chosen = load(arguments.artifact, arguments.ipc) if of_hub else set_in(folder, arguments.ipc)
        if arguments.dry_run:
            planned = describe_set(chosen, **options)
        else:
            rows = evaluate_set(chosen, run_folder, resume=arguments.resume, **options)
    if arguments.dry_run:
        written = [] if of_hub else [folder / name for name in FOLDER_FILES]
        written.append(shown_run_folder_of(folder) / RESULTS_FILE)
        print(planned, "writes       " + "\n             ".join(map(str, written)), sep="\n")
        return
    with lock_of(folder, RECORDING):  # others may evaluate the same set
        if not of_hub:
            record_results(folder, rows, device)
            complete_folder(folder)
        write_results(run_folder / RESULTS_FILE, rows, device, costs.stages)
    forget_progress(run_folder, rows)
    print(table(rows))


if __name__ == "__main__":
    keep_freed()
    run_command(main, parser())
