"""Make the sets of a table from the real images, evaluate them in every way, and write down all of it.

  python tools/reproduce.py digits
  python tools/reproduce.py small --data DIR --row cifar10-ipc10
  python tools/reproduce.py published --source cifar100=folder:DIR --data DIR --time-budget 9m
  python tools/reproduce.py published --dry-run --data DIR
  python tools/reproduce.py --readme

Every stage can be broken off; the same command goes on with it. What tells most comes first: the sets with
their accuracy on the network they were made with, then the other architectures. Sets whose files have up to
2 MB together, curves, a summary and its table are written to --results.
"""

import argparse
from pathlib import Path

from command_line import DATA, add_distilling_flags, alone, command_parser, run_command, settings

from distilled_data import UnknownNameError, UsageError
from distilled_data.files import make_folder
from ncfm_engine.allocator import keep_freed
from ncfm_engine.cache import cache_folder
from ncfm_engine.operations import operations
from ncfm_engine.pipeline import open_source
from ncfm_engine.presets import PRESETS
from ncfm_engine.report import Bars
from ncfm_engine.stop import StopRequest
from tools.reproduction.campaign import STAGES, TABLE_FILE, Campaign
from tools.reproduction.readme import update
from tools.reproduction.tables import ARCHITECTURES, TABLES

ROOT = Path(__file__).resolve().parents[1]


def parser() -> argparse.ArgumentParser:
    parser = command_parser(__doc__)
    add = parser.add_argument
    add("table", nargs="?", metavar="TABLE", help=", ".join(TABLES))
    add(
        "--row", action="append", default=[], metavar="NAME", help="only this set (default: all of the table)"
    )
    add("--data", type=Path, help=DATA)
    add(
        "--source",
        action="append",
        default=[],
        metavar="DATASET=SPEC",
        help="where the images of a dataset are, for instance cifar100=folder:DIR",
    )
    add("--work", type=Path, default=Path("reproduced"), help="where everything lies (default: reproduced)")
    add(
        "--results",
        type=Path,
        default=Path("reproduced") / "results",
        help="what is worth keeping (default: reproduced/results; tools/results are this project's own)",
    )
    add("--dry-run", action="store_true", help="count operations, and estimate hours from them")
    add("--rate", type=float, default=40.0, help="TFLOP/s that a device sustains, to estimate (default: 40)")
    add("--readme", action="store_true", help="only make tables and README from tools/results")
    add_distilling_flags(parser)
    return parser


def main(arguments: argparse.Namespace) -> None:
    if arguments.readme:
        if arguments.table:
            raise UsageError(
                f"--readme makes the tables of tools/results; expected no table, got {arguments.table}"
            )
        for path in update(ROOT):
            print(path.relative_to(ROOT))
        return
    if not arguments.rate > 0:
        raise UsageError(f"--rate must be positive, got {arguments.rate}")
    chosen = chosen_rows(arguments.table, arguments.row)
    results = arguments.results / arguments.table
    campaign = Campaign(
        TABLES[arguments.table],
        chosen,
        arguments.work / arguments.table,
        results,
        sources=sources(arguments.source),
        data=arguments.data,
        changes=settings(arguments.set),
        options={"cache": cache_folder(), "device": arguments.device, "compile": arguments.compile},
    )
    if arguments.dry_run:
        estimate(campaign, arguments.rate)
        return

    make_folder(campaign.work)
    with alone(campaign.work), StopRequest(arguments.time_budget) as stop, Bars() as bars:
        campaign.run(stop, bars)
    print((results / TABLE_FILE).read_text(encoding="utf-8"))


def chosen_rows(table: str | None, names: list[str]) -> list[str]:
    """The rows asked for, or all of the table."""
    if table is None:
        raise UsageError(f"name a table: {', '.join(TABLES)}")
    if table not in TABLES:
        raise UnknownNameError.of("table", table, TABLES)
    known = [row.name for row in TABLES[table]]
    for name in names:
        if name not in known:
            raise UnknownNameError.of("row", name, known)
    return names or known


def sources(pairs: list[str]) -> dict[str, str]:
    """Places by the name of the dataset. Raises `UsageError` for one that no table has."""
    chosen = settings(pairs, "--source", "dataset=place, for instance cifar100=folder:DIR")
    known = {PRESETS[row.preset].dataset for table in TABLES.values() for row in table}
    for name in chosen:
        if name not in known:
            raise UnknownNameError.of("dataset of a table", name, known)
    return chosen


def estimate(campaign: Campaign, rate: float) -> None:
    """Print what each set takes, without and with the other architectures, from its operations.

    Networks that several sets share are counted with each.
    """
    columns = ("pretraining", "distilling", "evaluating", "architectures")
    head = "".join(f"{name:>14}" for name in columns)
    print(f"{'PFLOP':20}{head}   hours at {rate:g} TFLOP/s: without them, in all")
    none: dict[str, float] = dict.fromkeys(columns, 0.0)
    totals = none
    for row in (row for row in campaign.rows if row.name in campaign.chosen):
        plan = campaign.plan(row)
        source = open_source(plan)
        counts = none | operations(plan.recipe, source)
        for stage in STAGES[1:]:
            changed = plan.recipe.replace(campaign.evaluation(row, stage))
            column = "architectures" if stage in ARCHITECTURES else "evaluating"
            counts[column] += operations(changed, source)["evaluating"]
        totals = {name: totals[name] + count for name, count in counts.items()}
        print(line(row.name, counts, rate))
    print(line("all", totals, rate))


def line(name: str, counts: dict[str, float], rate: float) -> str:
    """Operations of the stages, and the hours that they take without the last one, and with it."""
    cells = "".join(f"{count / 1e15:14.3g}" for count in counts.values())
    *most, rest = (count / rate / 3.6e15 for count in counts.values())
    return f"{name:20}{cells}{sum(most):13.2f}{sum(most) + rest:10.2f}"


if __name__ == "__main__":
    keep_freed()
    run_command(main, parser())
