"""Distil a real dataset into a tiny synthetic one, and publish it.

  python tools/distill_and_push.py --dataset digits
  python tools/distill_and_push.py --dataset cifar10 --preset cpu --data DIR
  python tools/distill_and_push.py --dataset cifar100 --ipc 50 --repo org/cifar100-ncfm
  python tools/distill_and_push.py --dataset folder:photos --size 64 --set distill.alpha=0.3 --dry-run
  torchrun --nproc-per-node 4 tools/distill_and_push.py --dataset cifar100 --ipc 50

A run that was stopped or killed goes on with --resume.
"""

import argparse
from pathlib import Path

from command_line import (
    add_distilling_flags,
    add_push_flags,
    add_source_flags,
    command_parser,
    lock_of,
    push_command,
    push_options,
    reading,
    run_command,
    settings,
    size,
    speaks,
    table,
)

from distilled_data import UsageError
from distilled_data.client import check_arguments
from hub import PushOptions, check_access, complete_folder, push_folder
from ncfm_engine.allocator import keep_freed
from ncfm_engine.cache import cache_folder
from ncfm_engine.pipeline import open_source, run
from ncfm_engine.plan import check_output, describe, make_plan, shown_run_folder_of
from ncfm_engine.report import Bars
from ncfm_engine.sources import SPECS


def parser() -> argparse.ArgumentParser:
    parser = command_parser(__doc__)
    add = parser.add_argument
    add("--dataset", help=f"the real images: {SPECS}")
    add("--ipc", type=int, help="packed images per class (default: as the preset says, or 10)")
    add("--repo", help="publish to this dataset repository of the Hub, org/name; without it, nothing is sent")
    add("--output", type=Path, help="artifact folder (default: distilled/DATASET-ipcN)")
    add("--preset", help="row of ncfm_engine/presets.py (default: the one for this dataset and ipc)")
    add("--iterations", type=int, help="matching steps (default: as the preset says)")
    add("--discrepancy", help="what is matched: ncfd (default), cfd, mmd, dm or mse")
    add("--memory", type=size, metavar="2GiB", help="what matching may take on the device (default: all)")
    add("--seed", type=int, help="of everything random (default: 0)")
    add("--resume", action="store_true", help="go on from the last checkpoint of the same recipe")
    add("--overwrite", action="store_true", help="replace the set in the output folder, or its run")
    add(
        "--dry-run",
        action="store_true",
        help="print what would be done; prepare the real images, and write nothing else",
    )
    add_distilling_flags(parser)
    add_source_flags(parser)
    add_push_flags(parser)
    return parser


def main(arguments: argparse.Namespace) -> None:
    plan = make_plan(
        dataset=arguments.dataset,
        ipc=arguments.ipc,
        preset=arguments.preset,
        changes=settings(arguments.set),
        iterations=arguments.iterations,
        discrepancy=arguments.discrepancy,
        seed=arguments.seed,
        output=arguments.output,
        cache=cache_folder(),
        device=arguments.device,
        reading=reading(arguments),
        memory=arguments.memory,
        time_budget=arguments.time_budget,
        compile=arguments.compile,
        resume=arguments.resume,
        overwrite=arguments.overwrite,
    )
    if arguments.repo:
        check_arguments(arguments.repo, None, arguments.endpoint)
    elif push_options(arguments) != PushOptions():
        raise UsageError(
            "what is said of publishing (--revision, --private ...) needs a --repo to publish to"
        )
    if arguments.dry_run and speaks():
        print(describe(plan, open_source(plan)))
        if arguments.repo:
            print(f"publishes    {push_command(plan.output, arguments)}")
    if arguments.dry_run:
        check_output(plan)
        return
    with lock_of(plan.output), Bars() as bars:
        check_output(plan)  # while another process fills it, --resume is no advice
        if arguments.repo and speaks():
            check_access(arguments.repo, push_options(arguments))
        outcome = run(plan, bars)
        if outcome is None:  # one of several processes, and not the one that writes
            return
        complete_folder(plan.output)
    print(table(outcome.rows))
    print(", ".join(f"{name} {cost['seconds']:.0f} s" for name, cost in outcome.stages.items()), end="; ")
    print(f"peak memory {max(cost['peak_memory_mib'] for cost in outcome.stages.values())} MiB")
    print(f"artifact in {plan.output}, metrics and plots in {shown_run_folder_of(plan.output)}")
    if arguments.repo:
        print(f"publishing; should it fail, go on with: {push_command(plan.output, arguments)}")
        print(push_folder(plan.output, arguments.repo, push_options(arguments)))


if __name__ == "__main__":
    keep_freed()
    run_command(main, parser())
