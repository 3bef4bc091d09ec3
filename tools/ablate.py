"""What each part of the method is worth: distil and evaluate variants of a preset at equal steps.

  python tools/ablate.py --preset digits --seeds 3 --output tools/results/ablation-digits.json

Tested on a part of the training set that no variant sees, so that recipes can be chosen by it. Every seed
distils anew and trains one network on the result, with hard labels. No artifact is saved.
"""

import argparse
import json
import math
import statistics
import time
from pathlib import Path

from command_line import run_command, settings

from distilled_data import DistilledDataset
from distilled_data.decode import tiles
from distilled_data.format import write_file
from distilled_data.loader import Loader
from distilled_data.randomness import seed_at
from ncfm_engine.cache import cache_folder
from ncfm_engine.config import Recipe
from ncfm_engine.distill import Distilled, distill
from ncfm_engine.evaluate import random_subset, train_and_test
from ncfm_engine.pipeline import open_source, provenance
from ncfm_engine.plan import make_plan
from ncfm_engine.pretrain import FeaturePool, pretrain
from ncfm_engine.sources import Source

VARIANTS: dict[str, dict[str, str]] = {
    "the preset": {},
    "no psi (normal frequencies)": {"distill.adversarial": "false"},
    "alpha 0 (phase only)": {"distill.alpha": "0"},
    "alpha 1 (amplitude only)": {"distill.alpha": "1"},
    "no calibration": {"distill.calibration": "0"},
    "16 frequencies": {"distill.frequencies": "16"},
    "1,024 frequencies": {"distill.frequencies": "1024"},
    "from noise": {"distill.initialisation": "noise"},
    "no steps (the real images it starts from)": {"distill.iterations": "0"},
}


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--preset", default="digits", help="row of ncfm_engine/presets.py (default: digits)")
    add("--data", type=Path, help="folder with the files of a named dataset")
    add("--ipc", type=int, help="packed images per class")
    add("--seeds", type=int, default=3, help="distillations per variant (default: 3)")
    add("--device", default="auto", help="auto, cpu, cuda (default: auto)")
    add("--set", action="append", default=[], metavar="FIELD=VALUE", help="a setting for all variants")
    add("--output", type=Path, help="write the rows to this JSON file")
    return parser


def accuracy(
    recipe: Recipe, source: Source, distilled: Distilled, seed: int, device: str, exact: bool
) -> float:
    """Percent, after quantisation or, if `exact`, of the float images."""
    packed = distilled.images * 255 if exact else distilled.quantised()
    dataset = DistilledDataset.from_tensors(
        distilled.quantised(), source.classes, factor=recipe.distill.factor, mean=source.mean, std=source.std
    )
    loader = Loader(
        tiles(packed.flatten(0, 1), recipe.distill.factor).flatten(0, 1),
        dataset.targets,
        size=(source.height, source.width),
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


def main(arguments: argparse.Namespace) -> None:
    changes = {"validation": "0.2"} | settings(arguments.set)
    plan = make_plan(
        preset=arguments.preset,
        ipc=arguments.ipc,
        changes=changes,
        cache=cache_folder(),
        device=arguments.device,
        data=arguments.data,
    )
    source, base = open_source(plan), plan.recipe
    pool = pretrain(base.pretrain, base.network, source, seed=base.seed, device=plan.device, cache=plan.cache)
    rows = [random_row(base, source, arguments.seeds, plan.device)]
    print(f"{'variant':44}  accuracy        seconds\n{show(rows[0])}")
    for name, variant in VARIANTS.items():
        rows += variant_rows(name, base.replace(variant), source, pool, arguments.seeds, plan.device)
    if arguments.output:
        content = {"dataset": source.title, "ipc": base.ipc, "validation": base.validation, "rows": rows}
        write_file(arguments.output, json.dumps(content | provenance(plan.device), indent=1).encode() + b"\n")


def variant_rows(
    name: str, recipe: Recipe, source: Source, pool: FeaturePool, seeds: int, device: str
) -> list[dict]:
    """One row; for the preset itself a second one, of its images before they are rounded to bytes."""
    start, quantised, exact = time.monotonic(), [], []
    for seed in range(seeds):
        distilled = distill(recipe.distill, source, pool, ipc=recipe.ipc, seed=seed, device=device)
        quantised.append(accuracy(recipe, source, distilled, seed_at(0, seed), device, exact=False))
        if name == "the preset":
            exact.append(accuracy(recipe, source, distilled, seed_at(0, seed), device, exact=True))
    rows = [row(name, quantised, start)]
    print(show(rows[0]), flush=True)
    if exact:
        rows.append(row("before rounding to bytes", exact, start))
        print(show(rows[1]), flush=True)
    return rows


def random_row(recipe: Recipe, source: Source, seeds: int, device: str) -> dict:
    start, config, values = time.monotonic(), recipe.evaluate, []
    for repeat in range(seeds):
        seed = seed_at(0, repeat)
        subset = random_subset(source, ipc=recipe.ipc, seed=seed, device=device)
        loader = subset.loader(config.batch_size, device=device, augment=config.augment, seed=seed)
        views = recipe.ipc * source.num_classes * recipe.distill.factor**2
        steps = config.epochs * math.ceil(views / config.batch_size)
        epochs = round(steps / len(loader))  # as many steps as on the distilled views
        values.append(train_and_test(loader, epochs, source, config, recipe.network, seed, checks=1)[0])
    return row("random real images", values, start)


def row(name: str, values: list[float], start: float) -> dict:
    return {
        "variant": name,
        "n": len(values),
        "mean": round(statistics.fmean(values), 2),
        "std": round(statistics.stdev(values), 2) if len(values) > 1 else None,
        "seconds": round(time.monotonic() - start, 1),
    }


def show(row: dict) -> str:
    spread = "" if row["std"] is None else f" ± {row['std']:.1f}"
    return f"{row['variant']:44}  {row['mean']:5.1f}{spread:6}  {row['seconds']:10.0f}"


if __name__ == "__main__":
    run_command(main, parser())
