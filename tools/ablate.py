"""What each part of the method is worth: distil and evaluate variants of a preset, same seeds, same steps.

  python tools/ablate.py --study recipe --preset digits
  python tools/ablate.py --study claims --preset cifar10-small-ipc1 --data DIR --time-budget 9m
  python tools/ablate.py --study nested --preset digits --ipc 50 --only alone

Tested on a part of the training set that no variant sees, so that recipes can be chosen by it. Every seed
distils anew and trains one network on the result. Each run is written down when it is done, and the same
command goes on after the last of them: nothing is made twice. The artifacts are not kept.
"""

import argparse
import dataclasses
from pathlib import Path
from typing import Any

from command_line import (
    DATA,
    add_distilling_flags,
    alone,
    command_parser,
    json_file,
    positive,
    run_command,
    settings,
)

from distilled_data import UsageError
from distilled_data.files import make_folder
from ncfm_engine.allocator import keep_freed
from ncfm_engine.cache import cache_folder
from ncfm_engine.pipeline import open_source
from ncfm_engine.plan import Plan, compiles, make_plan
from ncfm_engine.provenance import provenance
from ncfm_engine.report import Bars, plot_variants
from ncfm_engine.sources import Source
from ncfm_engine.stop import StopRequest
from tools.reproduction.findings import Finding, line, read, write
from tools.reproduction.runs import Laboratory
from tools.reproduction.studies import NAMES, study

RESULTS = Path("reproduced") / "results"


def parser() -> argparse.ArgumentParser:
    parser = command_parser(__doc__)
    add = parser.add_argument
    add("--study", choices=NAMES, default="recipe", help="which variants (default: recipe)")
    add("--only", action="append", default=[], metavar="TEXT", help="only variants whose name holds TEXT")
    add("--preset", default="digits", help="row of ncfm_engine/presets.py (default: digits)")
    add("--dataset", help="the real images, where the preset names none: folder:PATH, ...")
    add("--data", type=Path, help=DATA)
    add("--ipc", type=int, help="packed images per class (default: as the preset says)")
    add("--seeds", type=positive, default=3, help="distillations per variant (default: 3)")
    add("--output", type=json_file, help="default: reproduced/results/study-STUDY-PRESET-ipcN.json")
    work = Path("reproduced/studies")
    add("--work", type=Path, default=work, help=f"where unfinished runs lie (default: {work})")
    add("--plot", action="store_true", help="draw the loss curves to a PNG file of the same name")
    add_distilling_flags(parser)
    return parser


def main(arguments: argparse.Namespace) -> None:
    plan = make_plan(
        dataset=arguments.dataset,
        preset=arguments.preset,
        ipc=arguments.ipc,
        changes={"validation": "0.1"} | settings(arguments.set),
        cache=cache_folder(),
        device=arguments.device,
        reading={"data": arguments.data},
        compile=arguments.compile,
    )
    recipe = plan.recipe
    if recipe.evaluate.labels[0] == "teacher":
        raise UsageError("a study trains on stored labels; expected evaluate.labels=hard or soft")
    preset = arguments.preset.removesuffix(f"-ipc{recipe.ipc}")
    output = arguments.output or RESULTS / f"study-{arguments.study}-{preset}-ipc{recipe.ipc}.json"
    variants = study(arguments.study, recipe)
    chosen = [name for name in variants if not arguments.only or any(t in name for t in arguments.only)]
    if not chosen:
        raise UsageError(f"no variant's name holds what --only says; they are {', '.join(variants)}")
    make_folder(output.parent)
    with alone(output), StopRequest(arguments.time_budget) as stop, Bars() as bars:
        source = open_source(plan, stop=stop, report=bars)
        where = provenance(plan.device)
        head = description(arguments.study, plan, source, where["versions"]["torch"])
        findings = read(output, head)
        origin = {"code_revision": where.pop("code_revision"), "compiled": compiles(plan)}
        head |= where
        laboratory = Laboratory(plan, source, arguments.work, stop, bars)
        for name in chosen:
            changes = dict(variants[name].changes)
            finding = findings.setdefault(name, Finding(name, changes))
            if finding.changes != changes:
                raise UsageError(
                    f"{output} has {name!r} with other settings: {finding.changes}, not {changes}"
                )
            for seed in range(len(finding.runs), arguments.seeds):
                finding.runs.append(laboratory.run(variants[name], seed) | origin)
                write(output, head, in_order(findings, list(variants)))
            bars.close()
            print(line(finding), flush=True)
    print(f"written to {output}")
    if arguments.plot:
        curves = {name: findings[name].curves for name in chosen if findings[name].curves}
        if curves:
            plot_variants(curves, output.with_suffix(".png"))
        else:
            print("no plot: nothing was distilled, so there are no losses to draw")


def in_order(findings: dict[str, Finding], names: list[str]) -> list[Finding]:
    """Those that have runs, as the study lists them; then what it no longer has."""
    names = [*names, *(name for name in findings if name not in names)]
    return [findings[name] for name in names if name in findings and findings[name].runs]


def description(name: str, plan: Plan, source: Source, torch_version: str) -> dict[str, Any]:
    """What all findings of a file have in common."""
    return {
        "study": name,
        "preset": plan.preset,
        "dataset": source.name,
        "fingerprint": source.fingerprint,
        "ipc": plan.recipe.ipc,
        "settings": dataclasses.asdict(plan.recipe),
        "torch": torch_version,
        "kind of device": plan.device.partition(":")[0],
    }


if __name__ == "__main__":
    keep_freed()
    run_command(main, parser())
