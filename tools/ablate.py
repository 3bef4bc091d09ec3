"""What each part of the method is worth: distil and evaluate variants of a preset, same seeds, same steps.

  python tools/ablate.py --preset digits --seeds 3 --output tools/results/ablation-digits.json
  python tools/ablate.py --study discrepancy --preset digits --plot tools/results/discrepancies-digits.png
  python tools/ablate.py --study engine --preset cpu --data DIR

Tested on a part of the training set that no variant sees, so that recipes can be chosen by it. Every seed
distils anew and trains one network on the result, with hard labels. No artifact is saved.
"""

import argparse
import json
import math
import statistics
import tempfile
from pathlib import Path

from command_line import run_command, settings

from distilled_data import DistilledDataset
from distilled_data.format import write_file
from distilled_data.loader import Loader
from distilled_data.randomness import seed_at
from ncfm_engine.cache import cache_folder
from ncfm_engine.config import Recipe
from ncfm_engine.distill import METRICS_FILE, Distilled, distill
from ncfm_engine.evaluate import random_subset, train_and_test
from ncfm_engine.pipeline import open_source, provenance
from ncfm_engine.plan import compiles, make_plan
from ncfm_engine.pretrain import FeaturePool, pretrain
from ncfm_engine.report import plot_variants
from ncfm_engine.sources import Source

PRESET = "the preset"
STUDIES: dict[str, dict[str, dict[str, str]]] = {
    "method": {
        PRESET: {},
        "no psi (normal frequencies)": {"distill.discrepancy": "cfd"},
        "alpha 0 (phase only)": {"distill.alpha": "0"},
        "alpha 1 (amplitude only)": {"distill.alpha": "1"},
        "no calibration": {"distill.calibration": "0"},
        "16 frequencies": {"distill.frequencies": "16"},
        "1,024 frequencies": {"distill.frequencies": "1024"},
        "from noise": {"distill.initialisation": "noise"},
        "no steps (the real images it starts from)": {"distill.iterations": "0"},
    },
    "discrepancy": {
        name: {"distill.discrepancy": name, "distill.calibration": "0"}
        for name in ("ncfd", "cfd", "mmd", "dm", "mse")
    },
    "engine": {
        "fresh real features": {"distill.real_features": "fresh"},
        **{
            f"bank of {size}, one replaced every {steps} steps": {
                "distill.real_features": "bank",
                "distill.bank_size": str(size),
                "distill.bank_refresh": str(steps),
            }
            for size, steps in ((1, 10), (8, 5), (8, 10), (8, 20))
        },
        "augmentation drawn for every image": {"distill.augment_shared": "false"},
        "bfloat16": {"distill.precision": "bfloat16"},
        "4 snapshots on the way of each network": {"pretrain.snapshots": "4"},
        "constant learning rate": {"distill.schedule": "constant"},
        "cosine learning rate": {"distill.schedule": "cosine"},
        "plateau learning rate": {"distill.schedule": "plateau"},
    },
}


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--study", choices=STUDIES, default="method", help="which variants (default: method)")
    add("--only", action="append", default=[], metavar="TEXT", help="only variants whose name holds TEXT")
    add("--preset", default="digits", help="row of ncfm_engine/presets.py (default: digits)")
    add("--data", type=Path, help="folder with the files of a named dataset")
    add("--ipc", type=int, help="packed images per class")
    add("--seeds", type=int, default=3, help="distillations per variant (default: 3)")
    add("--device", default="auto", help="auto, cpu, cuda (default: auto)")
    add(
        "--compile",
        choices=["auto", "on", "off"],
        default="auto",
        help="torch.compile (default: in long runs)",
    )
    add("--set", action="append", default=[], metavar="FIELD=VALUE", help="a setting for all variants")
    add("--output", type=Path, help="write rows and loss curves to this JSON file")
    add("--plot", type=Path, help="draw the loss curves to this PNG file")
    return parser


def main(arguments: argparse.Namespace) -> None:
    changes = {"validation": "0.2"} | settings(arguments.set)
    plan = make_plan(
        preset=arguments.preset,
        ipc=arguments.ipc,
        changes=changes,
        cache=cache_folder(),
        device=arguments.device,
        reading={"data": arguments.data},
        compile=arguments.compile,
    )
    source, base = open_source(plan), plan.recipe
    rows = [random_row(base, source, arguments.seeds, plan.device)]
    print(f"{'variant':44}  accuracy      s / distillation\n{show(rows[0])}")
    for name, variant in STUDIES[arguments.study].items():
        if arguments.only and not any(text in name for text in arguments.only):
            continue
        recipe = base.replace(variant)
        pool = pretrain(
            recipe.pretrain, recipe.network, source, seed=base.seed, device=plan.device, cache=plan.cache
        )
        compiled = compiles(plan)
        rows += variant_rows(name, recipe, source, pool, arguments.seeds, plan.device, compiled)
    content = {"dataset": source.name, "ipc": base.ipc, "validation": base.validation, "rows": rows}
    if arguments.output:
        write_file(arguments.output, json.dumps(content | provenance(plan.device), indent=1).encode() + b"\n")
    if arguments.plot:
        plot_variants({row["variant"]: row["curves"] for row in rows if row.get("curves")}, arguments.plot)


def variant_rows(
    name: str, recipe: Recipe, source: Source, pool: FeaturePool, seeds: int, device: str, compiled: bool
) -> list[dict]:
    """One row; for the preset itself a second one, of its images before they are rounded to bytes."""
    quantised, exact, seconds, curves = [], [], [], []
    for seed in range(seeds):
        with tempfile.TemporaryDirectory() as folder:
            distilled = distill(
                recipe.distill,
                source,
                pool,
                ipc=recipe.ipc,
                seed=seed,
                device=device,
                folder=Path(folder),
                compile=compiled,
            )
            lines = (Path(folder) / METRICS_FILE).read_text().splitlines()
        curves.append([json.loads(line) for line in lines])
        seconds.append(distilled.seconds)
        quantised.append(accuracy(recipe, source, distilled, seed_at(0, seed), device, exact=False))
        if name == PRESET:
            exact.append(accuracy(recipe, source, distilled, seed_at(0, seed), device, exact=True))
    rows = [row(name, quantised, statistics.median(seconds)) | {"curves": curves}]
    print(show(rows[0]), flush=True)
    if exact:
        rows.append(row("before rounding to bytes", exact, statistics.median(seconds)))
        print(show(rows[1]), flush=True)
    return rows


def accuracy(
    recipe: Recipe, source: Source, distilled: Distilled, seed: int, device: str, exact: bool
) -> float:
    """Percent, after quantisation or, if `exact`, of the float images."""
    packed = distilled.images * 255 if exact else distilled.quantised()
    dataset = DistilledDataset.from_tensors(
        distilled.quantised(), source.classes, factor=recipe.distill.factor, mean=source.mean, std=source.std
    )
    loader = Loader(
        packed.flatten(0, 1),
        dataset.targets,
        factor=recipe.distill.factor,
        mean=source.mean,
        std=source.std,
        batch_size=recipe.evaluate.batch_size,
        device=device,
        augment=recipe.evaluate.augment,
        seed=seed,
    )
    return train_and_test(
        loader, recipe.evaluate.epochs, source, recipe.evaluate, recipe.network, seed, checks=1
    )[0]


def random_row(recipe: Recipe, source: Source, seeds: int, device: str) -> dict:
    config, values = recipe.evaluate, []
    for repeat in range(seeds):
        seed = seed_at(0, repeat)
        subset = random_subset(source, ipc=recipe.ipc, seed=seed, device=device)
        loader = subset.loader(config.batch_size, device=device, augment=config.augment, seed=seed)
        views = recipe.ipc * source.num_classes * recipe.distill.factor**2
        steps = config.epochs * math.ceil(views / config.batch_size)
        epochs = round(steps / len(loader))  # as many steps as on the distilled views
        values.append(train_and_test(loader, epochs, source, config, recipe.network, seed, checks=1)[0])
    return row("random real images", values, 0.0)


def row(name: str, values: list[float], seconds: float) -> dict:
    """`seconds` is the median over the seeds of one distillation."""
    return {
        "variant": name,
        "n": len(values),
        "mean": round(statistics.fmean(values), 2),
        "std": round(statistics.stdev(values), 2) if len(values) > 1 else None,
        "values": [round(value, 2) for value in values],
        "seconds": round(seconds, 1),
    }


def show(row: dict) -> str:
    spread = "" if row["std"] is None else f" ± {row['std']:.1f}"
    return f"{row['variant']:44}  {row['mean']:5.1f}{spread:6}  {row['seconds']:10.1f}"


if __name__ == "__main__":
    run_command(main, parser())
